"""The loss per noise level on images held out, and the images that measurements are made on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from tqdm import tqdm

from immiscible.data.batches import ImageDataset, Images, check_batch, collate
from immiscible.data.sources import ImageSource
from immiscible.data.transforms import ImageTransform
from immiscible.networks.weights import evaluation_weights
from immiscible.objectives import weighted_mse
from immiscible.process import NoiseProcess
from immiscible.randomness import Draws, preserved_randomness, seeded_generator

if TYPE_CHECKING:
    from diffusers.training_utils import EMAModel

EVALUATION_SEED = 0  # of the samples' noises and of the held-out loss: one constant for all runs, whatever their seeds
REFERENCE_IMAGES = 10_000  # at most; more would cost time and hardly move the reference's mean and covariance
BATCH_SIZE = 256  # of small images; see `images_together`


def validation_loss(
    model: nn.Module,
    images: Tensor,
    process: NoiseProcess,
    prediction_type: str,
    *,
    condition: Mapping[str, Tensor] | None = None,
    ema: EMAModel | None = None,
    levels: int = 10,
    batch_size: int = BATCH_SIZE,
) -> dict[str, float]:
    """The mean squared error per noise level on images that were not trained on, unweighted, in the model's own prediction type.

    The T timesteps are cut into equal ranges and each is measured at its middle, with independent noises that depend on the range and
    the image's row alone: whatever the coupling, weighting and timestep law of training, this number is comparable between runs of one
    process and prediction type. Drawn on the CPU, so the device does not matter either.

    Args:
        model: called as ``model(xt, time, **condition)``, returns an object with ``sample``; measured in evaluation mode. A variance
            that it learns beside its prediction is not looked at.
        images: pixels or latents, fp32 [N, C, H, W], N at least 1.
        process: the noise process of training, on the model's device.
        prediction_type: what the model predicts.
        condition: keyword arguments of the model, each [N, ...].
        ema: the averaged weights to measure with, swapped in for the time of the call.
        levels: the number of ranges; at most T of them are made.
        batch_size: images measured together.

    Returns:
        The loss per element of each range of timesteps, e.g. ``{"0-99": 0.4, ...}``, ordered from little noise to much.
    """
    device = process.signal.device
    levels = min(levels, process.num_timesteps)
    edges = [level * process.num_timesteps // levels for level in range(levels + 1)]
    losses = {}
    with preserved_randomness(device), evaluation_weights(model, ema), torch.no_grad():
        for level, (start, stop) in enumerate(pairwise(edges)):
            total = 0.0
            for first in range(0, len(images), batch_size):
                x0 = images[first : first + batch_size].to(device)
                noise = Draws(EVALUATION_SEED, level, first, torch.device("cpu")).normal("validation", *x0.shape).to(device)
                t = torch.full((len(x0),), (start + stop) // 2, device=device)
                told = {name: value[first : first + batch_size].to(device) for name, value in (condition or {}).items()}
                output = model(process.add_noise(x0, noise, t), process.model_time[t], **told).sample[:, : x0.shape[1]]
                target = process.target(x0, noise, t, prediction_type)
                total += float(weighted_mse(output, target, torch.ones(len(x0), device=device)).sum())
            losses[f"{start}-{stop - 1}"] = total / len(images)
    return losses


def fixed_images(
    source: ImageSource,
    transform: ImageTransform,
    *,
    limit: int = REFERENCE_IMAGES,
    skip_bad_images: bool = False,
    with_labels: bool = False,
    with_captions: bool = False,
    with_geometry: bool = False,
) -> Iterator[Images]:
    """Images as training sees them but cut from the middle and never flipped: the same ones for every run of this data.

    Args:
        source: the images.
        transform: training's; its crop and flip are overridden.
        limit: at most this many, a fixed random choice.
        skip_bad_images: leave unreadable images out.
        with_labels: give their classes too.
        with_captions: give a caption of each too.
        with_geometry: give each one's `ImageTransform.geometry` too.

    Yields:
        `Images`, in the order of ``source``.

    Raises:
        UserError: an image cannot be read and ``skip_bad_images`` is off.
    """
    fixed = replace(transform, center_crop=True, random_flip=False)
    dataset = ImageDataset(source, fixed, with_labels=with_labels, with_captions=with_captions, with_geometry=with_geometry)
    chosen = torch.randperm(len(source), generator=seeded_generator("fixed_images"))[:limit].sort().values
    with tqdm(total=len(chosen), desc="reading images", unit="image", delay=2, leave=False, disable=None) as bar:
        for indices in chosen.split(images_together(transform.resolution)):
            items = [dataset[0, index] for index in indices.tolist()]
            batch = collate(items)
            if not skip_bad_images:
                check_batch(batch, skip_bad_images)
            if len(batch["pixel_values"]):
                yield Images(batch["pixel_values"], batch["labels"], batch["captions"], batch["geometry"])
            bar.update(len(items))


def images_together(resolution: int) -> int:
    """How many images of this size are sampled, encoded or measured at once: `BATCH_SIZE` up to 64 pixels a side, as many pixels above."""
    return max(1, min(BATCH_SIZE, BATCH_SIZE * 64**2 // resolution**2))


def to_uint8(images: Tensor) -> Tensor:
    """uint8 of floats in [-1, 1], rounded to the nearest of 0..255: what comes out for an 8-bit image is what went in."""
    return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
