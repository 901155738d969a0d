"""Images to score, in files: a folder, tables, bundled data or an ``.npz``, read in parts that do not depend on who reads them."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from immiscible.data.batches import ImageDataset, collate
from immiscible.data.loading import load_images
from immiscible.data.sources import ImageSource
from immiscible.data.transforms import ImageTransform
from immiscible.errors import UserError, first_line
from immiscible.evaluation.statistics import images_of_npz, shape_of_npz
from immiscible.evaluation.validation import images_together, to_uint8
from immiscible.files import read_lines
from immiscible.sampling.folder import MANIFEST, METADATA

LEAST_PART = 16  # images that are read, measured and kept at once


@dataclass(frozen=True)
class Part:
    """Consecutive images.

    Attributes:
        number: of the part, from 0.
        images: uint8 [B, C, H, W].
        labels: int64 [B], or None.
        captions: one of each image, or None.
    """

    number: int
    images: Tensor
    labels: Tensor | None = None
    captions: list[str] | None = None

    @property
    def digest(self) -> str:
        """Of the pixels."""
        digest = hashlib.blake2b(repr(tuple(self.images.shape)).encode(), digest_size=16)
        digest.update(self.images.contiguous().numpy().data)
        return digest.hexdigest()


class ImageFiles(ABC):
    """Square images of one size.

    Attributes:
        named: the flag and what it names, for messages.
        count: how many.
        side: in pixels.
        channels: 1 or 3.
        fingerprint: what data this is, in a line.
        crop: how they became squares, see `ImageTransform`; empty where they are taken as they are.
        class_names: where the images have classes with names.
        has_labels: whether parts have labels.
        has_captions: whether parts have captions.
    """

    named: str
    count: int
    side: int
    channels: int
    fingerprint: str
    crop: str = ""
    class_names: Sequence[str] | None = None
    has_labels: bool = False
    has_captions: bool = False

    @abstractmethod
    def parts(self, rank: int = 0, ranks: int = 1) -> Iterator[Part]:
        """Every ``ranks``-th part from ``rank`` on; together the processes read each image once, the last, smaller part too.

        Raises:
            UserError: (exit code 1) an image cannot be read, or is of another size than the first.
        """

    def share(self, rank: int, ranks: int) -> int:
        """How many images these parts have."""
        return sum(map(len, self._ranges(rank, ranks)))

    def _ranges(self, rank: int, ranks: int) -> Iterator[range]:
        size = self._together
        for first in range(rank * size, self.count, ranks * size):
            yield range(first, min(first + size, self.count))

    def _number(self, numbers: range) -> int:
        return numbers.start // self._together

    @property
    def _together(self) -> int:
        return max(LEAST_PART, images_together(self.side))


@dataclass(frozen=True)
class _Whole(ImageTransform):
    """Takes images of one size as they are."""

    def decode(self, image: Image.Image | np.ndarray) -> Image.Image | Tensor:
        found = super().decode(image)
        assert isinstance(found, Image.Image)
        if found.size != (self.resolution, self.resolution):
            size, first = (f"{width}x{height}" for width, height in (found.size, (self.resolution, self.resolution)))
            raise ValueError(f"it is {size} and the first is {first}; samples must be of one size")
        return found


class SourceFiles(ImageFiles):
    """The images of a source.

    Args:
        source: where they are.
        named: see `ImageFiles`.
        transform: what makes squares of them.
        labels: of each image; None for the source's classes.
        with_labels: give them.
        with_captions: give captions.
    """

    def __init__(
        self,
        source: ImageSource,
        named: str,
        transform: ImageTransform,
        *,
        labels: Sequence[int] | None = None,
        with_labels: bool = False,
        with_captions: bool = False,
    ) -> None:
        self.named, self.count, self.side, self.channels = named, len(source), transform.resolution, transform.channels
        self.fingerprint, self.class_names, self.crop = source.fingerprint, source.class_names, transform.crop
        self.has_labels = with_labels and (labels is not None or source.class_names is not None)
        self.has_captions = with_captions
        self._labels = labels
        self._dataset = ImageDataset(source, transform, with_labels=self.has_labels and labels is None, with_captions=with_captions)

    def parts(self, rank: int = 0, ranks: int = 1) -> Iterator[Part]:
        """See `ImageFiles`."""
        for numbers in self._ranges(rank, ranks):
            batch = collate([self._dataset[0, number] for number in numbers])
            for bad in batch["bad"]:
                raise UserError(f"{self.named}: cannot read {bad.name}: {bad.reason}", exit_code=1)
            labels = batch["labels"]
            if self.has_labels and self._labels is not None:
                labels = torch.tensor(self._labels[numbers.start : numbers.stop])
            yield Part(self._number(numbers), to_uint8(batch["pixel_values"]), labels, batch["captions"])


class NpzFiles(ImageFiles):
    """The images of an ``.npz`` as ADM's evaluator reads them: ``arr_0``, and where it is there ``arr_1``, the classes.

    Args:
        path: the file.
        named: see `ImageFiles`.

    Raises:
        UserError: it holds no such images, or they are not square.
    """

    def __init__(self, path: Path, named: str) -> None:
        self.named, self._path = named, path
        self.count, height, width, self.channels = shape_of_npz(path)
        if height != width or self.channels not in (1, 3):
            raise UserError(f"{named} holds images of {width}x{height} with {self.channels} channels; they must be square, of 1 or 3")
        self.side, self.fingerprint = height, f"{self.count} images of an .npz"
        self._labels = _labels_of_npz(path, self.count)
        self.has_labels = self._labels is not None

    def parts(self, rank: int = 0, ranks: int = 1) -> Iterator[Part]:
        """See `ImageFiles`; the whole file is read by each process."""
        wanted = {self._number(numbers): numbers for numbers in self._ranges(rank, ranks)}
        for number, images in enumerate(images_of_npz(self._path, self._together)):
            if numbers := wanted.get(number):
                yield Part(number, images, None if self._labels is None else self._labels[numbers.start : numbers.stop])


def open_samples(path: Path, *, with_labels: bool, with_captions: bool) -> ImageFiles:
    """The samples in an ``.npz``, a folder of images (of `scripts/sample.py`, or any other) or of tables, pixel by pixel as they are.

    Args:
        path: which.
        with_labels: whether classes are needed: those of subfolders or tables, or what ``metadata.jsonl`` of sample.py says.
        with_captions: whether captions are needed: the column ``text``.

    Raises:
        UserError: it holds no images, or no complete folder of samples; the first is not square, or cannot be read.
    """
    named = f"--samples {path}"
    if path.suffix == ".npz" and path.is_file():
        return NpzFiles(path, named)
    told = sampled(path)
    if told and not told.get("complete"):
        raise UserError(f"{named} is not complete: its {MANIFEST} says so; run scripts/sample.py again")
    source = load_source("--samples", train_data_dir=str(path), caption_column="text" if with_captions else None)
    labels = [int(line["label"]) for line in read_lines(path / METADATA)] if with_labels and labels_of(told) else None
    try:
        image = source.load(0)
    except Exception as error:  # Pillow's decoders raise nearly any type
        raise UserError(f"{named}: cannot read {source.name(0)}: {first_line(error)}", exit_code=1) from None
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    if image.width != image.height:
        raise UserError(f"{named}: {source.name(0)} is {image.width}x{image.height}; only square images are scored")
    channels = 1 if image.mode in ("1", "L", "LA") or image.mode.startswith(("I", "F")) else 3
    whole = _Whole(image.width, channels, center_crop=True)
    return SourceFiles(source, named, whole, labels=labels, with_labels=with_labels, with_captions=with_captions)


def labels_of(told: Mapping[str, Any]) -> str | None:
    """Of what `sampled` returns: how the classes were chosen, ``equal`` or ``random``; None where there are none."""
    labels = str(told.get("labels"))
    if not labels.startswith("class"):
        return None
    return "random" if labels.endswith("at random") else "equal"


def sampled(folder: Path) -> dict[str, Any]:
    """What `scripts/sample.py` says of a folder of its samples; nothing of another folder.

    Raises:
        UserError: it cannot be read.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({first_line(error)})", exit_code=1) from None
    return found if isinstance(found, dict) and "num_images" in found else {}


def load_source(flag: str, **options: Any) -> ImageSource:
    """`load_images`, whose flags are called otherwise here."""
    try:
        return load_images(**options)
    except UserError as error:
        said = str(error).replace("--train_data_dir", flag).replace("--bundled_data", flag).replace("training images", "images")
        raise UserError(said, error.exit_code) from None


def _labels_of_npz(path: Path, count: int) -> Tensor | None:
    with np.load(path, allow_pickle=False) as file:
        if "arr_1" not in file.files:
            return None
        labels = file["arr_1"]
    if labels.shape != (count,) or labels.dtype.kind not in "iu":
        raise UserError(f"{path}: arr_1 must hold {count} whole numbers, the classes of the images, not {labels.dtype} {labels.shape}")
    return torch.from_numpy(labels.astype(np.int64))
