"""Images to training batches: where they come from, how they become pixels, and in which order.

A run's data is a function, not a state: the global batch at a position is fixed by (seed, position), and the crop and the flip of
an image by (seed, epoch, index). So it is the same with any number of ranks and loader workers, and a resumed run begins in the
middle of an epoch without reading what came before.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image, ImageOps

from immiscible.errors import UserError
from immiscible.randomness import seeded_generator

logger = logging.getLogger(__name__)


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
class TableImages:
    """The images of one column of a `datasets.Dataset`, decoded here and not by `datasets`, so that an unreadable one can be named.

    Args:
        table: rows whose ``column`` is ``{"bytes": bytes | None, "path": str | None}`` or None.
        column: the column's name.
        origin: what the user asked for: a dataset's name or a folder.
        fingerprint: see `ImageSource`.
        labels: the same rows with the one column of classes, a `datasets.ClassLabel`, or None.
        texts: the same rows with the one column of captions, or None.
    """

    table: Any
    column: str
    origin: str
    fingerprint: str
    labels: Any = None
    texts: Any = None
    channels: int = 3

    @cached_property
    def class_names(self) -> Sequence[str] | None:
        """See `ImageSource`."""
        return None if self.labels is None else next(iter(self.labels.features.values())).names

    @property
    def description(self) -> str:
        """One line for summaries."""
        return f"{self.origin}: {len(self)} images"

    def __len__(self) -> int:
        return len(self.table)

    def load(self, index: int) -> Image.Image:
        """The decoded image, turned upright as its EXIF orientation says."""
        cell = self.table[index][self.column]
        if cell is None:
            raise ValueError("the row holds no image")
        return open_image(cell["path"] if cell["bytes"] is None else io.BytesIO(cell["bytes"]))

    def name(self, index: int) -> str:
        """The image's path, or its row with the file name that the table remembers."""
        cell = self.table[index][self.column] or {"bytes": None, "path": None}
        if cell["path"] and cell["bytes"] is None:
            return str(cell["path"])
        return f"row {index} of {self.origin}" + (f" ({cell['path']})" if cell["path"] else "")

    def label(self, index: int) -> int:
        """See `ImageSource`.

        Raises:
            ValueError: the row's class is empty, -1 (which `datasets` writes where it is not known) or otherwise none of the classes.
        """
        (label,) = self.labels[index].values()
        if label is None or not 0 <= label < len(self.class_names or ()):
            raise ValueError(f"its class is {label}, not a number from 0 to {len(self.class_names or ()) - 1}")
        return label

    def captions(self, index: int) -> Sequence[str]:
        """See `ImageSource`; a class is captioned by its name, found by number.

        Raises:
            ValueError: the row has no caption, or something else in its place.
        """
        if self.texts is None:
            raise ValueError("this data has no captions")
        return self.captions_of(self._cells[index].as_py())

    def all_captions(self, rows: range) -> Iterator[Sequence[str] | ValueError]:
        """Those of rows that follow each other, or what is wrong with them; read in blocks, in a fraction of the time."""
        for start in range(rows.start, rows.stop, 10_000):
            ((_, values),) = self.texts[start : min(start + 10_000, rows.stop)].items()
            for value in values:
                try:
                    yield self.captions_of(value)
                except ValueError as error:
                    yield error

    @cached_property
    def _cells(self) -> Any:
        """The captions as one Arrow column, of which a row takes a microsecond, and from `datasets` many."""
        (column,) = self.texts.column_names
        return self.texts.with_format("arrow")[:][column]

    @cached_property
    def _caption_kind(self) -> tuple[str, Sequence[str]]:
        """The column of the captions, and the names of its classes, if they are classes; `datasets` copies its features when asked."""
        ((column, kind),) = self.texts.features.items()
        return column, getattr(kind, "names", ())

    def captions_of(self, value: Any) -> Sequence[str]:
        """The captions in a cell of ``texts``, as `captions`."""
        column, names = self._caption_kind
        if isinstance(value, int):
            value = names[value] if 0 <= value < len(names) else None
        found = [value] if isinstance(value, str) else value
        if not found or not all(isinstance(text, str) and text.strip() for text in found):
            raise ValueError(f"it has no caption in column {column!r}")
        return list(found)

    def sizes(self) -> np.ndarray:
        """Bytes of each encoded image, int64 [N], its cell's or its file's; -1 where there is none."""
        from pyarrow import compute

        found = []
        for chunk in self.table.data.column(self.column).chunks:
            sizes = compute.fill_null(compute.binary_length(chunk.field("bytes")), -1).to_numpy(zero_copy_only=False).astype(np.int64)
            paths = chunk.field("path")
            for row in np.flatnonzero(sizes < 0):
                path = paths[int(row)].as_py()
                sizes[row] = os.path.getsize(path) if path and os.path.exists(path) else -1
            found.append(sizes)
        return np.concatenate(found)


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


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


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
