"""Images to training batches: where they come from, how they become pixels, and in which order.

A run's data is a function, not a state: the global batch at a position is fixed by (seed, position), and the crop and the flip of
an image by (seed, epoch, index). So it is the same with any number of ranks and loader workers, and a resumed run begins in the
middle of an epoch without reading what came before.
"""

from __future__ import annotations

import glob
import hashlib
import io
import logging
import os
import re
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypedDict

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from immiscible.choices import build_choice
from immiscible.errors import UserError
from immiscible.randomness import derive_seed, seeded_generator

if TYPE_CHECKING:
    from immiscible.configs import AnyConfig

logger = logging.getLogger(__name__)

PIL_MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # channels -> Pillow's 8-bit mode


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


def load_digits() -> ArrayImages:
    """The 1797 handwritten digits that scikit-learn installs, 8x8, their 17 grey levels spread over 0..255."""
    with _needs("scikit-learn", "digits"):
        digits = import_module("sklearn.datasets").load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    return ArrayImages(pixels, "digits", labels=digits.target.astype(np.int64), class_names=[str(digit) for digit in range(10)])


PHOTOGRAPHS = {
    "skimage": [
        *("data/astronaut.png", "data/chelsea.png", "data/coffee.png", "data/hubble_deep_field.jpg", "data/ihc.png"),
        *("data/motorcycle_left.png", "data/motorcycle_right.png", "data/retina.jpg", "data/rocket.jpg"),
    ],
    "sklearn": ["datasets/images/china.jpg", "datasets/images/flower.jpg"],
}


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

    def name(self, index: int) -> str:
        """The crop's number."""
        return f"crop {index} of photo_crops"

    def label(self, index: int) -> int:
        """There are no classes: raises ValueError."""
        raise ValueError("photo_crops has no classes")

    def captions(self, index: int) -> Sequence[str]:
        """None here."""
        raise ValueError("photo_crops has no captions")


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


BUNDLED: dict[str, Callable[..., ImageSource]] = {"digits": load_digits, "photo_crops": PhotoCrops}


def load_images(
    *,
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    train_data_dir: str | None = None,
    bundled_data: str = "digits",
    image_column: str = "image",
    label_column: str | None = None,
    labels_for: str | None = None,
    caption_column: str | None = None,
    cache_dir: str | None = None,
    max_train_samples: int | None = None,
    train_subset_fraction: float | None = None,
    skip_bad_images: bool = False,
    resolution: int = 64,
) -> ImageSource:
    """The training images: a dataset of the Hub, else a local folder, else bundled data.

    Args:
        dataset_name: what `datasets.load_dataset` takes; its ``train`` split is used.
        dataset_config_name: the dataset's configuration.
        train_data_dir: a folder of images (with or without a subfolder per class), or one that holds ``.parquet`` files or WebDataset
            shards (``.tar``, see `immiscible.data.shards`, where what is called columns here is explained for them) at any depth.
        bundled_data: a key of `BUNDLED`; used when the two above are None.
        image_column: the column of images in a Hub dataset or in parquet files.
        label_column: the column of classes, a `datasets.ClassLabel`; None for the one called ``label``, if it is of that kind. An image
            folder has it if all its images lie in subfolders of one depth, two at least: one per class, in the order of their names.
        labels_for: the flag that needs classes; None if the run does without.
        caption_column: the column of captions, texts or lists of texts or classes; None if the run does without.
        cache_dir: where `datasets` keeps its tables; None for its default.
        max_train_samples: use that many images, the same ones for every seed; more than there are means all.
        train_subset_fraction: use this share of the images, rounded to whole ones, the same ones for every seed.
        skip_bad_images: use what stands before the damage of a damaged ``.tar``.
        resolution: side of the crops of ``photo_crops``; the other sources keep their sizes.

    Raises:
        UserError: nothing there, no such column, both sources given, a number below 1, or no classes where ``labels_for`` needs them.
    """
    if dataset_name is not None and train_data_dir is not None:
        raise UserError("--dataset_name and --train_data_dir are both given; choose one")
    if max_train_samples is not None and max_train_samples < 1:
        raise UserError(f"--max_train_samples {max_train_samples} is below 1")
    if dataset_name is not None:
        source: ImageSource = _hub_images(
            dataset_name, dataset_config_name, image_column, label_column, labels_for, caption_column, cache_dir
        )
    elif train_data_dir is not None:
        from immiscible.data.shards import load_shards, tar_files

        columns = (image_column, label_column, labels_for, caption_column, cache_dir)
        if tar_files(Path(train_data_dir).expanduser()):
            source = load_shards(train_data_dir, *columns, skip_bad_images)
        else:
            source = _folder_images(train_data_dir, *columns)
    else:
        source = build_choice(BUNDLED, "--bundled_data", bundled_data, resolution=resolution)
        if labels_for and source.class_names is None:
            raise UserError(
                f"{labels_for} needs classes, and --bundled_data {bundled_data} has none; choose data with classes, e.g. digits"
            )
    if train_subset_fraction is not None:
        max_train_samples = round(train_subset_fraction * len(source))
        if max_train_samples < 1:
            raise UserError(f"--train_subset_fraction {train_subset_fraction:g} of {len(source)} images leaves none; give a larger share")
    if max_train_samples is not None and max_train_samples < len(source):
        chosen = torch.randperm(len(source), generator=seeded_generator("max_train_samples"))[:max_train_samples]
        source = Subset(source, chosen.tolist())
    return source


def _hub_images(
    name: str,
    config: str | None,
    column: str,
    label_column: str | None,
    labels_for: str | None,
    caption_column: str | None,
    cache_dir: str | None,
) -> TableImages:
    import datasets

    try:
        table = datasets.load_dataset(name, config, cache_dir=cache_dir, split="train")
    except Exception as error:  # whatever the network, the Hub or the dataset's own files can do wrong
        raise UserError(
            f"--dataset_name {name}: cannot load its train split ({_first_line(error)}); check the name and the network", exit_code=1
        ) from error
    origin = name if config is None else f"{name}/{config}"
    labels = only_labels(table, label_column, origin, labels_for)
    texts = only_texts(table, caption_column, origin)
    return TableImages(only_images(table, column, origin), column, origin, f"{origin}, {_summary(table)}", labels, texts)


def _folder_images(
    folder: str, column: str, label_column: str | None, labels_for: str | None, caption_column: str | None, cache_dir: str | None
) -> TableImages:
    import datasets

    root = Path(folder).expanduser().resolve()
    if not root.is_dir():
        raise UserError(f"--train_data_dir {folder}: no such folder")
    parquet = parquet_files(root)
    splits = not parquet and _names_splits(root)
    # Neither builder serves a stale table: the key of its cache has every file's path and modification time.
    try:
        with _no_progress_bars():
            if parquet:
                table = datasets.load_dataset(
                    "parquet", data_files=[str(root / file) for file in parquet], cache_dir=cache_dir, split="train"
                )
            else:
                # Told that all files are training images, `datasets` does not search them 66 times for the names of splits.
                files = None if splits else {"train": "**"}
                table = datasets.load_dataset("imagefolder", data_dir=str(root), data_files=files, cache_dir=cache_dir, split="train")
    except Exception as error:  # an empty folder alone comes as three types
        wanted = "cannot read its .parquet files" if parquet else "no training images found in it, nor .parquet files"
        if not parquet and any(_image_files(root)):
            wanted = "cannot read its images and what their metadata.jsonl says"
        raise UserError(f"--train_data_dir {folder}: {wanted} ({_first_line(error)})") from error
    images = only_images(table, column, str(root))
    within = f"{root}{os.sep}"
    names = parquet or [path.removeprefix(within) for path in _paths(images, column)]
    digest = hashlib.blake2b("\n".join(sorted(names)).encode(errors="surrogateescape"), digest_size=8).hexdigest()
    labels = only_labels(table, label_column, str(root), labels_for)
    texts = only_texts(table, caption_column, str(root))
    if not parquet and not splits and set(table.column_names) - {"image", "label"}:  # it has metadata, which name the images
        unnamed = sorted(set(_image_files(root)).difference(names))
        if unnamed:
            logger.warning("%d images of %s are in no line of its metadata and are left out, the first %s", len(unnamed), root, unnamed[0])
    return TableImages(images, column, str(root), f"a folder of {_summary(table)}, file names {digest}", labels, texts)


def _summary(table: Any) -> str:
    return f"{len(table)} images, columns {' '.join(sorted(table.column_names))}"


def parquet_files(root: Path) -> list[str]:
    """Relative paths. As `datasets` does, files named after a split (``train-00000.parquet``) count only if that is ``train``."""
    found = sorted(glob.glob("**/*.parquet", root_dir=root, recursive=True))
    found = [file for file in found if Path(file).name != "metadata.parquet"]  # that one describes an image folder
    return [file for file in found if re.search(r"(?:^|[^a-z0-9])train(?:ing)?(?![a-z0-9])", file.lower())] or found


def _image_files(root: Path) -> Iterator[str]:
    """Relative paths of what looks like an image; hidden ones are not looked at, as by `datasets`."""
    from immiscible.data.shards import IMAGE_EXTENSIONS

    endings = tuple(f".{extension}" for extension in IMAGE_EXTENSIONS)
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith((".", "__"))]
        found = (name for name in names if name.lower().endswith(endings) and not name.startswith((".", "__")))
        yield from (os.path.join(folder, name).removeprefix(f"{root}{os.sep}") for name in found)


def _names_splits(root: Path) -> bool:
    """Whether any file might count as one of a certain split for `datasets`; it has narrower rules than this."""
    word = re.compile(r"train|val|dev|test|eval|-of-|^data$|^task\.toml$|^instruction\.md$", re.IGNORECASE)
    return any(word.search(name) for _, folders, names in os.walk(root, followlinks=True) for name in (*folders, *names))


def only_images(table: Any, column: str, origin: str) -> Any:
    """The table's one column, each cell ``{"bytes", "path"}`` or None."""
    import datasets

    if column not in table.column_names:
        raise UserError(f"--image_column {column!r} is not in {origin}; its columns: {', '.join(table.column_names)}")
    if getattr(table, "num_rows", 1) == 0:  # a streamed table does not know
        raise UserError(f"{origin} holds no images")
    try:
        return table.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    except Exception as error:  # Arrow's and datasets' own types for "neither bytes, paths nor images"
        kind = table.features[column]
        raise UserError(
            f"--image_column {column!r} of {origin} holds {kind}, not images; columns: {', '.join(table.column_names)}"
        ) from error


def only_labels(table: Any, column: str | None, origin: str, labels_for: str | None) -> Any:
    """The table's one column of classes; None if none is named or needed, and ``label`` is not one."""
    import datasets

    classes = [name for name, kind in table.features.items() if isinstance(kind, datasets.ClassLabel)]
    chosen = column or "label"
    if chosen in classes:
        return table.select_columns([chosen])
    columns = f"its columns: {', '.join(table.column_names)}; of classes: {', '.join(classes) or 'none'}"
    if column:
        raise UserError(f"--label_column {column!r} is not a column of classes (ClassLabel) in {origin}; {columns}")
    if labels_for:
        raise UserError(
            f"{labels_for} needs classes, and {origin} has no column of them (ClassLabel) called 'label': name it with --label_column, or "
            f"sort a folder of images into one subfolder per class; {columns}"
        )
    return None


def only_texts(table: Any, column: str | None, origin: str) -> Any:
    """The table's one column of captions; None if none is asked for."""
    import datasets

    if column is None:
        return None
    if column not in table.column_names:
        raise UserError(f"--caption_column {column!r} is not in {origin}; its columns: {', '.join(table.column_names)}")
    kind = table.features[column]
    element = getattr(kind, "feature", kind[0] if isinstance(kind, list) else kind)
    if not isinstance(kind, datasets.ClassLabel) and getattr(element, "dtype", "") not in ("string", "large_string"):
        raise UserError(f"--caption_column {column!r} of {origin} holds {kind}, not texts, lists of texts or classes (ClassLabel)")
    return table.select_columns([column])


def _paths(table: Any, column: str) -> list[str]:
    chunks = table.data.column(column).chunks  # from Arrow: a million rows in a second
    return [path for chunk in chunks for path in chunk.field("path").to_pylist() if path]


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    import datasets

    if datasets.are_progress_bars_disabled():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()


@contextmanager
def _needs(packages: str, choice: str) -> Iterator[None]:
    try:
        yield
    except (ImportError, OSError) as error:
        raise UserError(f"--bundled_data {choice} needs the files that {packages} install: {_first_line(error)}", exit_code=1) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@dataclass(frozen=True)
class ImageTransform:
    """From an image of any size and mode to ``[channels, resolution, resolution]``, float32 in [-1, 1], as diffusers' example does it.

    The short side is resized to ``resolution`` (antialiased), a square is cut out, and perhaps mirrored. Crop and flip are
    functions of (seed, epoch, index), drawn apart, so that turning one off leaves the other as it was.

    Args:
        resolution: side in pixels.
        channels: 1, 3 or 4.
        center_crop: cut the square from the middle and not at a random place.
        random_flip: mirror left-right with probability 1/2.
        preserve_input_precision: keep the 16 or 32 bits of such images through the resizing; else every image becomes 8-bit first.
            Either way 16 bits span 0..65535, integers of 32 bits 0..2**31-1 and floats 0..1.
        seed: the run's seed.
        interpolation: how 8-bit images are resized, by Pillow's name in lower case; images of more bits are bilinear.
        crop: ``diffusers`` as above; ``adm`` as in the guided-diffusion papers on ImageNet: halve by box filters while twice the
            resolution fits, then bicubic, and the center square.

    Raises:
        UserError: another number of channels, or a resolution below 1.
    """

    resolution: int
    channels: int = 3
    center_crop: bool = False
    random_flip: bool = False
    preserve_input_precision: bool = False
    seed: int = 0
    interpolation: str = "bilinear"
    crop: str = "diffusers"

    def __post_init__(self) -> None:
        if self.channels not in PIL_MODES:
            raise UserError(f"{self.channels} image channels are not supported; use 1 (gray), 3 (RGB) or 4 (RGBA)")
        if self.resolution < 1:
            raise UserError(f"--resolution {self.resolution} is below 1")

    def __call__(self, image: Image.Image | np.ndarray, epoch: int, index: int) -> Tensor:
        """`decode`, then `augment`."""
        return self.augment(self.decode(image), epoch, index)

    def decode(self, image: Image.Image | np.ndarray) -> Image.Image | Tensor:
        """The image in the wanted channels: 8-bit as a PIL image, or float32 [C,H,W] in [0,1] with ``preserve_input_precision``.

        Raises:
            ValueError: pixels that are NaN or infinite, or a mode that Pillow cannot convert.
        """
        if isinstance(image, np.ndarray):
            image = Image.fromarray(image)
        if image.mode.startswith(("I", "F")):
            gray = _unit_gray(image)
            if self.preserve_input_precision:
                return torch.cat([gray.expand(min(self.channels, 3), -1, -1), torch.ones_like(gray).expand(self.channels // 4, -1, -1)])
            # Pillow's own conversion would clip at 255, which turns most 16-bit images white and floats in 0..1 black.
            image = Image.fromarray(gray[0].clamp(0, 1).mul(255).round().to(torch.uint8).numpy())
        if image.mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")  # straight to RGB is the same but warns once per image
        image = image.convert(PIL_MODES[self.channels])
        return _bytes_tensor(image).div(255) if self.preserve_input_precision else image

    def augment(self, pixels: Image.Image | Tensor, epoch: int, index: int) -> Tensor:
        """Resize, crop, flip and scale what `decode` returned: float32 [channels, resolution, resolution] in [-1, 1]."""
        if isinstance(pixels, Tensor):
            size = self._resized(*pixels.shape[-2:])
            if size != tuple(pixels.shape[-2:]):
                pixels = torch.nn.functional.interpolate(pixels[None], size, mode="bilinear", antialias=True)[0]
        else:
            if self.crop == "adm":
                pixels, kernel = _halved(pixels, self.resolution), Image.Resampling.BICUBIC
                factor = self.resolution / min(pixels.size)
                width, height = (round(side * factor) for side in pixels.size)
            else:
                kernel = Image.Resampling[self.interpolation.removesuffix("_exact").upper()]
                height, width = self._resized(pixels.height, pixels.width)
            pixels = _bytes_tensor(pixels.resize((width, height), kernel))
        top, left = (self._offset(side, extra, epoch, index) for side, extra in zip(("top", "left"), self._extra(pixels), strict=True))
        pixels = pixels[:, top : top + self.resolution, left : left + self.resolution]
        if self.flips(epoch, index):
            pixels = pixels.flip(-1)
        unit = pixels if pixels.is_floating_point() else pixels.to(torch.float32).div(255)
        return unit.sub(0.5).div(0.5).contiguous()

    def flips(self, epoch: int, index: int) -> bool:
        """Whether the image is mirrored in this epoch."""
        return self.random_flip and derive_seed(self.seed, "flip", epoch, index) % 2 == 1

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        short, long = sorted((height, width))
        other = int(self.resolution * long / short)  # torchvision's rule: rounded down
        return (self.resolution, other) if height <= width else (other, self.resolution)

    def _extra(self, pixels: Tensor) -> tuple[int, int]:
        return pixels.shape[-2] - self.resolution, pixels.shape[-1] - self.resolution

    def _offset(self, side: str, extra: int, epoch: int, index: int) -> int:
        if self.crop == "adm":
            return extra // 2
        if self.center_crop:
            return round(extra / 2)  # torchvision's rule: halves go to the even neighbour
        return derive_seed(self.seed, "crop", side, epoch, index) % (extra + 1)


def image_transform(config: AnyConfig, channels: int, seed: int) -> ImageTransform:
    """What makes pixels of the images, as the flags say."""
    return ImageTransform(
        config.resolution,
        channels,
        config.center_crop,
        config.random_flip,
        config.preserve_input_precision,
        seed,
        config.image_interpolation_mode,
        config.crop,
    )


def _halved(image: Image.Image, resolution: int) -> Image.Image:
    while min(image.size) >= 2 * resolution:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    return image


def _bytes_tensor(image: Image.Image) -> Tensor:
    """uint8 [C,H,W] from a mode L, RGB or RGBA."""
    array = torch.from_numpy(np.array(image))
    return array[None] if array.ndim == 2 else array.permute(2, 0, 1)


def _unit_gray(image: Image.Image) -> Tensor:
    """float32 [1,H,W] from a 16 or 32-bit mode, 1 being the largest value of its integers."""
    array = np.array(image)
    largest = {"u": 65535, "i": 2**31 - 1, "f": 1}[array.dtype.kind]
    gray = torch.from_numpy((array.astype(np.float64) / largest).astype(np.float32))[None]
    if not gray.isfinite().all():
        raise ValueError("it has NaN or infinite pixels")
    return gray


@dataclass(frozen=True)
class BadImage:
    """An image that could not be used: its name in the source, and why."""

    name: str
    reason: str


class Batch(TypedDict):
    """``pixel_values`` float32 [B,C,H,W], contiguous; ``labels`` int64 [B] of a dataset ``with_labels``, else None; ``captions`` of one
    ``with_captions``, else None; ``bad`` the images that were met and not used. Give it to `check_batch`.
    """

    pixel_values: Tensor
    labels: Tensor | None
    captions: list[str] | None
    bad: list[BadImage]


class Images(NamedTuple):
    """A batch as training takes it: ``x0`` float32 [B,C,H,W] in [-1, 1], the class of each image, int64 [B], and its caption, or None."""

    x0: Tensor
    labels: Tensor | None = None
    captions: list[str] | None = None


class ImageDataset(Dataset[dict[str, Any]]):
    """The pixels of ``(epoch, index)``; a bad image is reported and raises nothing, as a worker's traceback would hide which it is.

    Args:
        source: the images.
        transform: what makes pixels of them.
        skip_bad_images: use the next readable image in place of a bad one.
        with_labels: give the images' classes too; an image without one is a bad image.
        with_captions: give a caption of each too, of several one drawn by (seed, epoch, index); an image without one is a bad image.

    Raises:
        UserError: ``with_labels``, and the source has no classes.
    """

    def __init__(
        self,
        source: ImageSource,
        transform: ImageTransform,
        skip_bad_images: bool = False,
        with_labels: bool = False,
        with_captions: bool = False,
    ):
        if with_labels and source.class_names is None:
            raise UserError(f"class labels are asked for, and {source.description} has none")
        self.source = source
        self.transform = transform
        self.skip_bad_images = skip_bad_images
        self.with_labels = with_labels
        self.with_captions = with_captions

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        """``{"pixel_values": float32 [C,H,W], "label": int | None, "caption": str | None, "bad": list[BadImage]}``; ``bad`` alone if there
        is no image to give.
        """
        epoch, index = key
        bad: list[BadImage] = []
        for step in range(len(self.source) if self.skip_bad_images else 1):
            position = (index + step) % len(self.source)
            try:
                pixels = self.transform.decode(self.source.load(position))
                label = self.source.label(position) if self.with_labels else None
                captions = self.source.captions(position) if self.with_captions else [None]
            except Exception as error:  # Pillow's decoders raise nearly any type on broken files
                bad.append(BadImage(self.source.name(position), _why_unreadable(error)))
            else:
                # Drawn for the index that was asked for: a substitute differs from its own appearance in the epoch.
                caption = captions[derive_seed(self.transform.seed, "caption", epoch, index) % len(captions)]
                return {"pixel_values": self.transform.augment(pixels, epoch, index), "label": label, "caption": caption, "bad": bad}
        return {"bad": bad}


def _why_unreadable(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not an image format that Pillow knows"  # its own message names a buffer in memory
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return _first_line(error)


def collate(items: Sequence[dict[str, Any]]) -> Batch:
    """A `Batch` of items of `ImageDataset`; those without pixels leave their row out, and ``pixel_values`` is [0] if all do."""
    good = [item for item in items if "pixel_values" in item]
    labels = [item["label"] for item in good if item["label"] is not None]
    captions = [item["caption"] for item in good if item["caption"] is not None]
    return {
        "pixel_values": torch.stack([item["pixel_values"] for item in good]) if good else torch.empty(0),
        "labels": torch.tensor(labels) if labels else None,
        "captions": captions or None,
        "bad": [bad for item in items for bad in item["bad"]],
    }


def check_batch(batch: Batch, skip_bad_images: bool) -> list[BadImage]:
    """The images that were skipped in this batch, once each; to be called in the main process, where an error ends the run.

    On several ranks only the one that met the bad image raises.

    Raises:
        UserError: there is a bad image and ``skip_bad_images`` is off, or no image of the data can be read.
    """
    if batch["bad"] and not skip_bad_images:
        first = batch["bad"][0]
        raise UserError(f"cannot read image {first.name}: {first.reason}; remove it or pass --skip_bad_images", exit_code=1)
    if len(batch["pixel_values"]) == 0:
        first = batch["bad"][0]
        raise UserError(f"none of the images can be read; the first tried was {first.name}: {first.reason}", exit_code=1)
    return list(dict.fromkeys(batch["bad"]))


class GlobalBatchOrder(Sampler[list[tuple[int, int]]]):
    """The keys ``(epoch, index)`` of one rank's micro-batches, from the run's micro-batch ``start`` to ``stop``.

    Epoch e is a permutation of the images that depends on (seed, e), cut into global micro-batches of ``num_processes * batch_size``
    rows, of which the last short one is dropped; rank r has rows ``r * batch_size`` to ``(r + 1) * batch_size``. So the global rows
    depend on the product alone. Data smaller than one global micro-batch is repeated to fill one.

    Args:
        num_images: at least 1.
        batch_size: images a rank sees in a micro-batch.
        seed: the run's seed.
        start: first micro-batch, counted from the beginning of the run over epochs.
        stop: the micro-batch after the last.
        rank: this process.
        num_processes: ranks.
    """

    def __init__(self, num_images: int, batch_size: int, seed: int, *, start: int = 0, stop: int, rank: int = 0, num_processes: int = 1):
        self.num_images = num_images
        self.batch_size = batch_size
        self.seed = seed
        self.start = start
        self.stop = stop
        self.rank = rank
        self.global_batch_size = num_processes * batch_size
        self.batches_per_epoch = max(1, num_images // self.global_batch_size)

    def __len__(self) -> int:
        return max(0, self.stop - self.start)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        permuted_epoch, permutation = -1, torch.empty(0, dtype=torch.int64)
        for micro_batch in range(self.start, self.stop):
            epoch, position = divmod(micro_batch, self.batches_per_epoch)
            if epoch != permuted_epoch:
                permuted_epoch, permutation = epoch, self._permutation(epoch)
            first = position * self.global_batch_size + self.rank * self.batch_size
            yield [(epoch, index) for index in permutation[first : first + self.batch_size].tolist()]

    def _permutation(self, epoch: int) -> Tensor:
        permutation = torch.randperm(self.num_images, generator=seeded_generator(self.seed, "order", epoch))
        return permutation.repeat(-(-self.global_batch_size // self.num_images))


def build_loader(dataset: Dataset[Any], order: Iterable[list[Any]], num_workers: int, device: torch.device) -> DataLoader[dict[str, Any]]:
    """A loader of `Batch`, on the CPU (pinned if ``device`` is a GPU), in ``order``, that draws nothing from the global generators."""
    return DataLoader(
        dataset,
        batch_sampler=order,
        collate_fn=collate,
        num_workers=num_workers,
        pin_memory=device.type == "cuda",
        persistent_workers=num_workers > 0,
        worker_init_fn=_leave_signals_to_the_parent,
        generator=torch.Generator(),
    )


def _leave_signals_to_the_parent(worker: int) -> None:
    # Ctrl-C and a scheduler's SIGTERM reach the whole process group. The parent must find its workers alive while it finishes the
    # step and saves; they end when it closes the loader, sends them SIGTERM itself as multiprocessing does at exit, or is gone
    # (torch's watchdog). Only sigwaitinfo tells the sender; where it is missing, torch's own handler stays, which obeys anyone.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_at_the_parents_sigterm, daemon=True).start()


def _end_at_the_parents_sigterm() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def images_of(loader: DataLoader[Batch], skip_bad_images: bool) -> Iterator[Images]:
    """The images of each batch, on the CPU, with labels if the dataset gives them; names each skipped image once, and counts them.

    Raises:
        UserError: as `check_batch`.
    """
    skipped: set[BadImage] = set()
    for batch in loader:
        for bad in check_batch(batch, skip_bad_images):
            if bad not in skipped:
                skipped.add(bad)
                logger.warning("skipped image %s: %s (%d skipped so far)", bad.name, bad.reason, len(skipped))
        yield Images(batch["pixel_values"], batch["labels"], batch["captions"])
