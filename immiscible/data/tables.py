"""Tables of images: data sets of the hub, folders of images, parquet files."""

from __future__ import annotations

import glob
import hashlib
import io
import logging
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from immiscible.data.sources import IMAGE_EXTENSIONS, open_image
from immiscible.errors import UserError, first_line

logger = logging.getLogger(__name__)


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


def hub_images(
    name: str,
    config: str | None,
    column: str,
    label_column: str | None,
    labels_for: str | None,
    caption_column: str | None,
    cache_dir: str | None,
) -> TableImages:
    """The ``train`` split of a data set on the hub; the arguments are those of `immiscible.data.loading.load_images`."""
    import datasets

    try:
        table = datasets.load_dataset(name, config, cache_dir=cache_dir, split="train")
    except Exception as error:  # whatever the network, the Hub or the dataset's own files can do wrong
        raise UserError(
            f"--dataset_name {name}: cannot load its train split ({first_line(error)}); check the name and the network", exit_code=1
        ) from error
    origin = name if config is None else f"{name}/{config}"
    labels = only_labels(table, label_column, origin, labels_for)
    texts = only_texts(table, caption_column, origin)
    return TableImages(only_images(table, column, origin), column, origin, f"{origin}, {_summary(table)}", labels, texts)


def folder_images(
    folder: str, column: str, label_column: str | None, labels_for: str | None, caption_column: str | None, cache_dir: str | None
) -> TableImages:
    """A local folder of images or of parquet files, likewise."""
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
        raise UserError(f"--train_data_dir {folder}: {wanted} ({first_line(error)})") from error
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
