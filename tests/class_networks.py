"""Networks that are told classes, and one whose samples say which they were told."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace

import numpy
import torch
from diffusers import UNet2DModel

from immiscible.networks.unet import build_unet, unet_config
from immiscible.sampling.pipelines import build_pipeline, sample_images
from immiscible.schedulers import build_scheduler

CPU = torch.device("cpu")
CLASSES = 4


def config_of(num_classes=CLASSES, path=None, **options):
    preset = None if path else "unet-tiny"
    return unet_config(config_name_or_path=path, preset=preset, resolution=8, channels=1, dropout=None, num_classes=num_classes, **options)


def tiny_unet(num_classes=CLASSES, null_class=False, **changes):
    torch.manual_seed(0)
    return build_unet({**config_of(num_classes, null_class=null_class), **changes}).eval()


@contextmanager
def telling(unet, labels):
    """Inside the block every call of ``unet`` gets these classes: a reference that knows nothing of our pipeline."""
    hook = unet.register_forward_pre_hook(lambda _, args, kwargs: (args, {**kwargs, "class_labels": labels}), with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


class Painter(UNet2DModel):
    """Predicts a blank image whose gray is its class."""

    def forward(self, sample, timestep, class_labels=None):
        gray = 2 * class_labels / (CLASSES - 1) - 1
        return SimpleNamespace(sample=gray.view(-1, 1, 1, 1).expand_as(sample))


def pipeline_of(unet, sampler="ddim", prediction_type="epsilon"):
    return build_pipeline(unet, build_scheduler("ddpm", prediction_type=prediction_type), sampler=sampler, spacing="trailing")


def painted(count, **options):
    """The classes of samples of `Painter`, read off their grays."""
    pipeline = pipeline_of(Painter.from_config(config_of()), prediction_type="sample")
    images = sample_images(pipeline, count, steps=2, seed=0, device=CPU, **options)
    assert all(len(numpy.unique(image)) == 1 for image in images)
    return (images[:, 0, 0, 0] / 255 * (CLASSES - 1)).round().astype(int).tolist()
