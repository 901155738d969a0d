"""What a source of images is, images held in memory, and parts of a source.

Other sources stand in `bundled`, `folders`, `tables` and `shards`; what is read in passing, and so is no `ImageSource`, in `streaming`.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any, Protocol

import numpy as np
import torch
from PIL import EpsImagePlugin, ExifTags, Image, ImageOps, UnidentifiedImageError, features

from immiscible.errors import UserError, first_line
from immiscible.randomness import seeded_generator

warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # of images at half of what `open_image` refuses; they are read
# Formats that Pillow knows by name and cannot read without more than itself.
NOT_READ = ("BUFR", "GRIB", "HDF5", "MPEG", "WMF")
# What else is called an image, with the package that lets Pillow read it, or nothing.
PLUG_INS = {"pillow_heif": "pillow-heif", "pillow_jxl": "pillow-jxl-plugin"}
OTHER_IMAGES = {
    **dict.fromkeys(("heic", "heif", "hif"), "pillow-heif"),
    "jxl": "pillow-jxl-plugin",
    **dict.fromkeys(("avif", "avifs", "eps", "ps", "svg", "exr", "hdr", "psb", "xcf"), ""),
    **dict.fromkeys(("dng", "cr2", "cr3", "crw", "nef", "nrw", "arw", "orf", "raf", "rw2", "pef", "srw"), ""),
}


@cache
def image_extensions() -> frozenset[str]:
    """The extensions, in lower case and without a dot, of what Pillow reads here; its plug-ins for HEIC and JXL count where installed."""
    for module in PLUG_INS:
        with suppress(ImportError):
            getattr(import_module(module), "register_heif_opener", lambda: None)()
    Image.init()
    unread = {*NOT_READ, *(() if EpsImagePlugin.has_ghostscript() else ("EPS",))}
    unread |= {kind for kind, feature in (("WEBP", "webp"), ("AVIF", "avif"), ("JPEG2000", "jpg_2000")) if not features.check(feature)}
    readable = set(Image.OPEN) - unread
    return frozenset(extension[1:] for extension, kind in Image.registered_extensions().items() if kind in readable)


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

    def size(self, index: int) -> tuple[int, int]:
        """Height and width of what `load` gives, of its pixels none are decoded. What it raises `load` raises, too."""

    def name(self, index: int) -> str:
        """What a user needs to find the image: its path, or its row and table."""

    def label(self, index: int) -> int:
        """The image's class, a number below ``len(class_names)``. What it raises makes that image a `BadImage`."""

    def captions(self, index: int) -> Sequence[str]:
        """The image's captions, one at least. What it raises makes that image a `BadImage`; data without captions always does."""


def open_image(file: Any) -> Image.Image:
    """The decoded image of a path or a binary file, turned upright as its EXIF orientation says.

    Raises:
        ValueError: it is larger than Pillow opens.
    """
    image_extensions()  # a worker knows the plug-ins too
    with _opened(file) as image:
        image.load()
        try:
            return ImageOps.exif_transpose(image)
        except Exception:  # nearly any type, of EXIF data that is broken; the pixels are sound
            return image


def size_in_header(file: Any) -> tuple[int, int]:
    """Height and width that `open_image` gives, from a file's header alone.

    Raises:
        ValueError: as `open_image`.
    """
    image_extensions()
    with _opened(file) as image:
        height, width = image.height, image.width
        # Pillow turns a TIFF itself, and would decode all of a PNG to look for what may stand behind its pixels.
        told = image.format != "TIFF" and (image.format != "PNG" or {"exif", "Raw profile type exif", "XML:com.adobe.xmp"} & {*image.info})
        with suppress(Exception):  # as in `open_image`
            if told and image.getexif().get(ExifTags.Base.Orientation, 1) >= 5:
                height, width = width, height
        return height, width


def _opened(file: Any) -> Image.Image:
    try:
        return Image.open(file)
    except Image.DecompressionBombError as error:
        said = first_line(error).partition(", could be")[0]
        raise ValueError(f"{said}, above which Pillow takes an image for an attack; put a smaller copy of it in its place") from None


def why_unreadable(error: Exception) -> str:
    """In one line, what a source has raised instead of giving an image."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image format that Pillow knows"  # its own message names a buffer in memory
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return first_line(error)


def captions_in(found: Any) -> list[str] | None:
    """The captions that a text or a list of texts holds; None if there is none, as in null.

    A blank text is the empty prompt; in a list it is dropped, unless there is nothing else.
    """
    texts = [found] if isinstance(found, str) else found
    if not isinstance(texts, Sequence) or not texts or not all(isinstance(text, str) for text in texts):
        return None
    return [text for text in texts if text.strip()] or [""]


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

    def size(self, index: int) -> tuple[int, int]:
        """See `ImageSource`."""
        return self.images.shape[1], self.images.shape[2]

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

    def size(self, index: int) -> tuple[int, int]:
        """See `ImageSource`."""
        return self.source.size(self.indices[index])

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
