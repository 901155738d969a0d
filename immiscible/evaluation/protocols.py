"""Protocols by name: all that must agree before two scores may be compared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from immiscible.errors import UserError


@dataclass(frozen=True)
class Protocol:
    """How images are scored.

    Attributes:
        about: whose way this is, for tables.
        features: an entry of `FEATURES`; None for what the data has by default.
        resize: an entry of `RESIZES`; None for the network's own.
        resolutions: sides of the images in pixels; any where empty.
        crop: how the reference's images become squares, see `ImageTransform`; ``diffusers`` takes the middle.
        samples: how many; None for as many as are asked for.
        labels: of samples with classes, drawn evenly at random or each as often.
        split: of the data, what the samples are held against.
        metrics: what is measured where nothing else is asked for.
        published: a file of the reference's statistics that others use; may be empty.
    """

    about: str
    features: str | None
    resize: str | None = None
    resolutions: tuple[int, ...] = ()
    crop: Literal["diffusers", "adm"] = "diffusers"
    samples: int | None = None
    labels: Literal["random", "equal"] = "random"
    split: str = "train"
    metrics: tuple[str, ...] = ("frechet_distance",)
    published: str = ""


PROTOCOLS: dict[str, Protocol] = {
    "default": Protocol("what runs measure while they train: features by the data, which are not FID's", None, labels="equal"),
    "cifar10-legacy": Protocol(
        "CIFAR-10 as EDM, torchcfm and most since DDPM: the resize of TensorFlow 1, the whole training split",
        "inception",
        "tf-bilinear",
        (32,),
        samples=50_000,
        metrics=("frechet_distance", "inception_score"),
        published="https://nvlabs-fi-cdn.nvidia.com/edm/fid-refs/cifar10-32x32.npz",
    ),
    "imagenet256-pytorchfid": Protocol(
        "ImageNet at 256 as Stable Diffusion's runs in Immiscible Diffusion: pytorch-fid, as many images of each class (which split the "
        "authors held them against, they do not say)",
        "inception",
        "torch-bilinear",
        (256,),
        samples=50_000,
        labels="equal",
    ),
    "adm": Protocol(
        "ImageNet as ADM's evaluator, hence DiT and SiT: statistics of its file, precision and recall of the file's images",
        "inception",
        "tf-bilinear",
        (64, 128, 256, 512),
        crop="adm",
        samples=50_000,
        metrics=("frechet_distance", "sfid", "inception_score", "precision", "recall"),
        published="https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet/256/VIRTUAL_imagenet256_labeled.npz",
    ),
    "dinov2": Protocol(
        "FD-DINOv2 as dgm-eval and EDM2: DINOv2 ViT-L/14, the training split",
        "dinov2",
        "pillow-bicubic",
        samples=50_000,
    ),
}


def find_protocol(name: str) -> Protocol:
    """The entry of `PROTOCOLS`.

    Raises:
        UserError: there is none.
    """
    if name not in PROTOCOLS:
        raise UserError(f"--protocol {name!r} is unknown; known: {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]


def check_protocol(name: str, *, resolution: int, samples: int, labels: str | None = None) -> None:
    """Whether what is there can be scored by a protocol.

    Args:
        name: the entry of `PROTOCOLS`.
        resolution: side of the images, in pixels.
        samples: how many there are.
        labels: how their classes were chosen, ``random`` or ``equal``; None where they have none, or it is not known.

    Raises:
        UserError: the protocol is unknown or asks for something else.
    """
    protocol = find_protocol(name)
    differs = []
    if protocol.resolutions and resolution not in protocol.resolutions:
        differs.append(f"images of {' or '.join(map(str, protocol.resolutions))} pixels a side, not {resolution}")
    if protocol.samples is not None and samples != protocol.samples:
        differs.append(f"{protocol.samples} samples, not {samples}")
    if name != "default" and labels is not None and labels != protocol.labels:
        differs.append(f"{protocol.labels} labels, not {labels}")
    if differs:
        raise UserError(f"--protocol {name} is of {', of '.join(differs)}; --protocol default takes any, by another name")
