"""Resizing to the square that a feature network looks at: the five ways by which published numbers differ.

Each takes uint8 [N, C, H, W] and gives float32 [N, C, side, side] in 0..255, on the device of the images. They give different pixels,
hence different distances: a number is comparable only with those whose images were resized in the same way.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate


def tf_bilinear(images: Tensor, side: int) -> Tensor:
    """As TensorFlow 1 does without corner alignment: pixel i of the result is read at ``i * size / side``, from the top left corner.

    The graph of the FID network resizes so, and torch-fidelity and the evaluators of ADM and EDM after it. Larger images are not averaged.
    """
    return _lerp(_lerp(images.float(), 3, side), 2, side)  # rows first, in fp32, as its kernel does


def torch_bilinear(images: Tensor, side: int) -> Tensor:
    """By torch, pixel centers on pixel centers, larger images not averaged: pytorch-fid."""
    return interpolate(images.float(), (side, side), mode="bilinear", align_corners=False)


def torch_bilinear_antialias(images: Tensor, side: int) -> Tensor:
    """By torch, larger images averaged: torchmetrics, since 2025."""
    return interpolate(images.float(), (side, side), mode="bilinear", align_corners=False, antialias=True)


def clean_bicubic(images: Tensor, side: int) -> Tensor:
    """By Pillow, bicubic, averaging larger images, each channel in floats, clipped to 0..255: clean-fid (Parmar et al. 2022)."""

    def resized(image: np.ndarray) -> np.ndarray:
        channels = [Image.fromarray(channel.astype(np.float32)).resize((side, side), Image.Resampling.BICUBIC) for channel in image]
        return np.stack([np.asarray(channel) for channel in channels]).clip(0, 255)

    return _each(images, side, resized)


def pillow_bicubic(images: Tensor, side: int) -> Tensor:
    """By Pillow, bicubic, averaging larger images, rounded to 8 bits: CLIP, CMMD and the DINOv2 of dgm-eval."""

    def resized(image: np.ndarray) -> np.ndarray:
        channels = [Image.fromarray(channel).resize((side, side), Image.Resampling.BICUBIC) for channel in image]
        return np.stack([np.asarray(channel, np.float32) for channel in channels])

    return _each(images, side, resized)


RESIZES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "tf-bilinear": tf_bilinear,
    "torch-bilinear": torch_bilinear,
    "torch-bilinear-antialias": torch_bilinear_antialias,
    "clean-bicubic": clean_bicubic,
    "pillow-bicubic": pillow_bicubic,
}


def center_square(images: Tensor) -> Tensor:
    """The square [N, C, S, S] in the middle of [N, C, H, W], S being the shorter side."""
    height, width = images.shape[-2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return images[..., top : top + side, left : left + side]


def _lerp(x: Tensor, dim: int, side: int) -> Tensor:
    size = x.shape[dim]
    place = torch.arange(side, dtype=torch.float32, device=x.device) * torch.tensor(size / side, dtype=torch.float32, device=x.device)
    low = place.long()
    weight = (place - low).view(-1, *[1] * (x.ndim - 1 - dim))
    first, second = x.index_select(dim, low), x.index_select(dim, (low + 1).clamp_max(size - 1))
    return first + (second - first) * weight


def _each(images: Tensor, side: int, resized: Callable[[np.ndarray], np.ndarray]) -> Tensor:
    """Image by image [C, H, W], on the CPU."""
    made = np.empty((len(images), images.shape[1], side, side), np.float32)
    for i, image in enumerate(images.cpu().numpy()):
        made[i] = resized(image)
    return torch.from_numpy(made).to(images.device)
