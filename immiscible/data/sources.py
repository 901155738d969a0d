"""What a source of images is, images held in memory, and parts of a source.

Other sources stand in `bundled`, `tables` and `shards`; what is read in passing, and so is no `ImageSource`, in `streaming`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image, ImageOps

from immiscible.errors import UserError
from immiscible.randomness import seeded_generator

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm", "jp2")


class ImageSource(Protocol):
    """A finite, indexable collection of images. What `load` raises makes that image a `BadImage`; it does not end the run."""

    @property
    def channels(self) -> int:
        """The natural number of channels, 1 or 3."""

    @property
    def description(self) -> str:
        """One line for summaries."""

    @property
    def fingerprint(self) -> str:
        """A short line that tells this data from other data, so that a run is not resumed on the wrong images."""

    @property
    def class_names(self) -> Sequence[str] | None:
        """The name of each class, by its number, or None if there are no classes. Two classes may bear one name."""

    def __len__(self) -> int:
        """The number of images."""

    def load(self, index: int) -> Image.Image | np.ndarray:
        """The decoded image; an array is what `PIL.Image.fromarray` takes, e.g. uint8 [H,W] or [H,W,3]."""

    def name(self, index: int) -> str:
        """What a user needs to find the image: its path, or its row and table."""

    def label(self, index: int) -> int:
        """The image's class, a number below ``len(class_names)``. What it raises makes that image a `BadImage`."""

    def captions(self, index: int) -> Sequence[str]:
        """The image's captions, one at least. What it raises makes that image a `BadImage`; data without captions always does."""


def open_image(file: Any) -> Image.Image:
    """The decoded image of a path or a binary file, turned upright as its EXIF orientation says."""
    with Image.open(file) as image:
        image.load()
        try:
            return ImageOps.exif_transpose(image)
        except Exception:  # nearly any type, of EXIF data that is broken; the pixels are sound
            return image


@dataclass(frozen=True)
class ArrayImages:
    """Images held in memory.

    Args:
        images: uint8 [N,H,W] or [N,H,W,3].
        origin: their name.
        labels: int64 [N], of classes 0 to ``len(class_names)`` - 1; None without classes.
        class_names: see `ImageSource`.
    """

    images: np.ndarray
    origin: str
    labels: np.ndarray | None = None
    class_names: Sequence[str] | None = None

    @property
    def channels(self) -> int:
        """1 for [N,H,W], 3 for [N,H,W,3]."""
        return 1 if self.images.ndim == 3 else self.images.shape[-1]

    @property
    def description(self) -> str:
        """One line for summaries."""
        return f"{self.origin} (bundled): {len(self)} images of {self.images.shape[1]}x{self.images.shape[2]}"

    @property
    def fingerprint(self) -> str:
        """See `ImageSource`."""
        return f"bundled {self.origin}, {len(self)} images"

    def __len__(self) -> int:
        return len(self.images)

    def load(self, index: int) -> np.ndarray:
        """uint8 [H,W] or [H,W,3]."""
        return self.images[index]

    def name(self, index: int) -> str:
        """The image's number."""
        return f"image {index} of {self.origin}"

    def label(self, index: int) -> int:
        """See `ImageSource`."""
        if self.labels is None:
            raise ValueError(f"{self.origin} has no classes")
        return int(self.labels[index])

    def captions(self, index: int) -> Sequence[str]:
        """None here."""
        raise ValueError(f"{self.origin} has no captions")


@dataclass(frozen=True)
class Subset:
    """The images of ``source`` at ``indices``."""

    source: ImageSource
    indices: Sequence[int]

    @property
    def channels(self) -> int:
        """Those of the source."""
        return self.source.channels

    @property
    def description(self) -> str:
        """One line for summaries."""
        return f"{self.source.description}, of which {len(self)} are used"

    @property
    def fingerprint(self) -> str:
        """See `ImageSource`."""
        digest = hashlib.blake2b(repr(list(self.indices)).encode(), digest_size=8).hexdigest()
        return f"{self.source.fingerprint}, of which {len(self)} are used ({digest})"

    @property
    def class_names(self) -> Sequence[str] | None:
        """Those of the source, also if some classes are left without images."""
        return self.source.class_names

    def __len__(self) -> int:
        return len(self.indices)

    def load(self, index: int) -> Image.Image | np.ndarray:
        """See `ImageSource`."""
        return self.source.load(self.indices[index])

    def name(self, index: int) -> str:
        """The name in the source."""
        return self.source.name(self.indices[index])

    def label(self, index: int) -> int:
        """See `ImageSource`."""
        return self.source.label(self.indices[index])

    def captions(self, index: int) -> Sequence[str]:
        """See `ImageSource`."""
        return self.source.captions(self.indices[index])


def split_source(source: ImageSource, fraction: float) -> tuple[Subset, Subset]:
    """``source`` as images to train on and images to hold out, the same ones whatever the run's seed.

    Args:
        source: all images.
        fraction: the share to hold out, rounded to whole images.

    Raises:
        UserError: one of the two would be empty.
    """
    count = round(len(source) * fraction) if 0 < fraction < 1 else 0
    if not 0 < count < len(source):
        raise UserError(f"--validation_split {fraction:g} of {len(source)} images leaves none on one side; give a share between 0 and 1")
    shuffled = torch.randperm(len(source), generator=seeded_generator("validation_split"))
    return Subset(source, shuffled[count:].sort().values.tolist()), Subset(source, shuffled[:count].sort().values.tolist())
