"""Resizes: each against its definition in float64, or the library whose way it is; and how far apart they are."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import interpolate

from immiscible.data.bundled import PhotoCrops
from immiscible.evaluation.resize import RESIZES, center_square

SIZES = [(7, 5), (20, 31), (32, 32), (97, 64)]
SIDE = 32


def noise(height, width):
    return torch.randint(0, 256, (2, 3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(height))


def bilinear(images, side, offset):
    """Sampled, never averaged, at ``(i + offset) * size / side - offset``, in float64: offset 0 is TensorFlow 1, one half is torch."""

    def matrix(size):
        made = np.zeros((side, size))
        for i in range(side):
            place = max(0.0, (i + offset) * size / side - offset)
            low = min(int(place), size - 1)
            made[i, low] += 1 - (place - low)
            made[i, min(low + 1, size - 1)] += place - low
        return made

    height, width = images.shape[-2:]
    return np.einsum("yh,xw,nchw->ncyx", matrix(height), matrix(width), images.double().numpy())


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(("name", "offset"), [("tf-bilinear", 0.0), ("torch-bilinear", 0.5)])
def test_bilinear_without_averaging(name, offset, size):
    images = noise(*size)
    found = RESIZES[name](images, SIDE)
    assert found.dtype == torch.float32 and found.shape == (2, 3, SIDE, SIDE)
    assert np.abs(found.numpy() - bilinear(images, SIDE, offset)).max() < 1e-3


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_antialiased_bilinear_is_pillows(size):
    images = noise(*size)
    found = RESIZES["torch-bilinear-antialias"](images, SIDE)
    for image, resized in zip(images, found, strict=True):
        for channel, made in zip(image, resized, strict=True):
            expected = np.asarray(Image.fromarray(channel.float().numpy()).resize((SIDE, SIDE), Image.Resampling.BILINEAR))
            assert np.abs(made.numpy() - expected).max() < 1e-2


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_bicubic_is_the_same_kernel_clipped_or_rounded(size):
    images = noise(*size)
    expected = interpolate(images.double(), (SIDE, SIDE), mode="bicubic", antialias=True).clamp(0, 255)
    clean, rounded = RESIZES["clean-bicubic"](images, SIDE), RESIZES["pillow-bicubic"](images, SIDE)
    assert (clean - expected).abs().max() < 1e-2
    assert torch.equal(rounded, rounded.round())
    direct = np.asarray(Image.fromarray(images[0].permute(1, 2, 0).numpy()).resize((SIDE, SIDE), Image.Resampling.BICUBIC))
    assert np.array_equal(rounded[0].permute(1, 2, 0).numpy(), direct)


def test_whatever_the_way_an_image_of_the_size_is_itself():
    images = noise(SIDE, SIDE)
    for resize in RESIZES.values():
        assert torch.equal(resize(images, SIDE), images.float())


def test_the_ways_differ_where_the_papers_numbers_do():
    arrays = [np.asarray(PhotoCrops(32).load(i)) for i in range(20)]
    images = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)
    made = {name: resize(images, 299) for name, resize in RESIZES.items()}
    assert torch.allclose(made["torch-bilinear"], made["torch-bilinear-antialias"], atol=1e-3)  # averaging does nothing to small images
    assert (made["tf-bilinear"] - made["torch-bilinear"]).abs().mean() > 3  # of 255


def test_the_middle_square():
    images = torch.arange(2 * 3 * 7 * 4).view(2, 3, 7, 4)
    assert torch.equal(center_square(images), images[:, :, 1:5])
    assert torch.equal(center_square(images.mT), images[:, :, 1:5].mT)
    assert center_square(images[..., :4, :]).shape == (2, 3, 4, 4)
