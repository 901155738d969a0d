"""Real images that install with packages: digits, and crops of photographs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from importlib.resources import files
from typing import Any

import numpy as np
from PIL import Image

from immiscible.data.sources import ArrayImages, ImageSource
from immiscible.errors import UserError, first_line
from immiscible.randomness import derive_seed

PHOTOGRAPHS = {
    "skimage": [
        *("data/astronaut.png", "data/chelsea.png", "data/coffee.png", "data/hubble_deep_field.jpg", "data/ihc.png"),
        *("data/motorcycle_left.png", "data/motorcycle_right.png", "data/retina.jpg", "data/rocket.jpg"),
    ],
    "sklearn": ["datasets/images/china.jpg", "datasets/images/flower.jpg"],
}


def load_digits() -> ArrayImages:
    """The 1797 handwritten digits that scikit-learn installs, 8x8, their 17 grey levels spread over 0..255."""
    with _needs("scikit-learn", "digits"):
        digits = import_module("sklearn.datasets").load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    return ArrayImages(pixels, "digits", labels=digits.target.astype(np.int64), class_names=[str(digit) for digit in range(10)])


@lru_cache(maxsize=1)
def _photographs() -> list[Image.Image]:
    with _needs("scikit-image and scikit-learn", "photo_crops"):
        return [_open_rgb(files(package) / path) for package, paths in PHOTOGRAPHS.items() for path in paths]


def _open_rgb(file: Any) -> Image.Image:
    with file.open("rb") as stream, Image.open(stream) as image:
        return image.convert("RGB")


@dataclass(frozen=True)
class PhotoCrops:
    """8192 square crops of the eleven photographs that scikit-image and scikit-learn install: natural colour images without a download.

    Crop ``i`` depends on ``i`` and ``resolution`` alone, never on a run's seed. Its side is log-uniform between ``resolution`` (at
    most the short side of its photograph) and that short side, its position uniform; it is area-averaged to ``resolution``.
    """

    resolution: int
    channels: int = 3
    class_names: None = None

    def __post_init__(self) -> None:
        _photographs()  # now: a missing package is an error of the run, not of one image, and forked workers share the pixels

    @property
    def description(self) -> str:
        """One line for summaries."""
        return f"photo_crops (bundled): {len(self)} crops of {len(_photographs())} photographs, {self.resolution}x{self.resolution}"

    @property
    def fingerprint(self) -> str:
        """See `ImageSource`."""
        return f"bundled photo_crops, {len(self)} images of {self.resolution}x{self.resolution}"

    def __len__(self) -> int:
        return 8192

    def load(self, index: int) -> Image.Image:
        """RGB, ``resolution`` x ``resolution``."""

        def draw(what: str) -> int:
            return derive_seed("photo_crops", index, what)

        photograph = _photographs()[draw("photograph") % len(_photographs())]
        short = min(photograph.size)
        smallest = min(self.resolution, short)
        side = round(smallest * (short / smallest) ** ((draw("side") >> 10) / 2**53))
        left, top = draw("left") % (photograph.width - side + 1), draw("top") % (photograph.height - side + 1)
        box = (left, top, left + side, top + side)
        return photograph.resize((self.resolution, self.resolution), Image.Resampling.BOX, box)

    def size(self, index: int) -> tuple[int, int]:
        """See `ImageSource`."""
        return self.resolution, self.resolution

    def name(self, index: int) -> str:
        """The crop's number."""
        return f"crop {index} of photo_crops"

    def label(self, index: int) -> int:
        """There are no classes: raises ValueError."""
        raise ValueError("photo_crops has no classes")

    def captions(self, index: int) -> Sequence[str]:
        """None here."""
        raise ValueError("photo_crops has no captions")


# By what --bundled_data is called; each takes the resolution of the run.
BUNDLED: dict[str, Callable[[int], ImageSource]] = {"digits": lambda resolution: load_digits(), "photo_crops": PhotoCrops}


@contextmanager
def _needs(packages: str, choice: str) -> Iterator[None]:
    try:
        yield
    except (ImportError, OSError) as error:
        raise UserError(f"--bundled_data {choice} needs the files that {packages} install: {first_line(error)}", exit_code=1) from error
