"""Images and folders of them, and what reads them."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from immiscible.data.batches import ImageDataset, collate
from immiscible.data.loading import load_images

RANDOM = np.random.default_rng(0)


def colored(folder: Path, color=(204, 102, 51), count: int = 16) -> Path:
    folder.mkdir()
    for number in range(count):
        Image.new("RGB", (8, 8), color).save(folder / f"{number:02}.png")
    return folder


def noise(height, width, *channels):
    return RANDOM.integers(0, 256, (height, width, *channels), dtype=np.uint8)


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return path


def truncate(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    return path


def encoded(array, kind="PNG"):
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, kind)
    return stream.getvalue()


def grays(pixels):
    """[-1,1] -> 0..255"""
    return (pixels * 0.5 + 0.5) * 255


def one_batch(source, transform, keys, skip=False):
    dataset = ImageDataset(source, transform, skip)
    return collate([dataset[key] for key in keys])


def folder(path, images, **options):
    for name, array in images.items():
        save(path / name, array)
    return load_images(train_data_dir=str(path), **options)
