"""Tables of images: data sets of the hub, parquet files; folders of images become such tables in `immiscible.data.folders`."""

from __future__ import annotations

import base64
import glob
import hashlib
import io
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from immiscible.data.archives import readable, size
from immiscible.data.listing import Listing
from immiscible.data.sources import captions_in, open_image, size_in_header
from immiscible.errors import UserError, first_line, short

_BEGINNINGS = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"RIFF", b"BM", b"II*\0", b"MM\0*")  # of image files

Read = TypeVar("Read")


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
        folders: where the files are that relative paths name.
    """

    table: Any
    column: str
    origin: str
    fingerprint: str
    labels: Any = None
    texts: Any = None
    channels: int = 3
    folders: Sequence[str] = ()

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
        """The decoded image, turned upright as its EXIF orientation says.

        Raises:
            ValueError: there is none, or something else in its place.
            OSError: it cannot be read.
        """
        return self._of_file(index, open_image)

    def size(self, index: int) -> tuple[int, int]:
        """See `ImageSource`; raises as `load`."""
        return self._of_file(index, size_in_header)

    def _of_file(self, index: int, read: Callable[[Any], Read]) -> Read:
        """What ``read`` makes of an image's file, or of its bytes."""
        cell = self.table[index][self.column]
        if cell is None or (cell["bytes"] is None and cell["path"] is None):
            raise ValueError("the row holds no image")
        try:
            return read(readable(self._found(cell["path"])) if cell["bytes"] is None else io.BytesIO(cell["bytes"]))
        except (OSError, ValueError) as error:
            if what := _instead(cell):
                raise ValueError(what) from None
            if isinstance(error, FileNotFoundError) and not os.path.isabs(cell["path"]):
                raise ValueError("there is no such file where the table lies") from None
            raise

    def _found(self, path: str) -> str:
        """A path of the table as one that can be opened."""
        return next((found for folder in self.folders if os.path.exists(found := os.path.join(folder, path))), path)

    def name(self, index: int) -> str:
        """The image's path, or its row with the file name that the table remembers."""
        cell = self.table[index][self.column] or {"bytes": None, "path": None}
        path = cell["path"] and self._found(cell["path"])
        if path and cell["bytes"] is None and os.path.isabs(path) and not _instead(cell):
            return path
        return f"row {index} of {self.origin}" + (f" ({short(cell['path'])})" if path else "")

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
        found = captions_in(value)
        if found is None:
            raise ValueError(f"it has no caption in column {column!r}")
        return found

    def sizes(self) -> np.ndarray:
        """Bytes of each encoded image, int64 [N], its cell's or its file's; -1 where there is none."""
        from pyarrow import compute

        found = []
        for chunk in self.table.data.column(self.column).chunks:
            sizes = compute.fill_null(compute.binary_length(chunk.field("bytes")), -1).to_numpy(zero_copy_only=False).astype(np.int64)
            paths = chunk.field("path")
            for row in np.flatnonzero(sizes < 0):
                path = paths[int(row)].as_py()
                sizes[row] = size(self._found(path)) if path else -1
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
    return TableImages(only_images(table, column, origin), column, origin, f"{origin}, {summary(table)}", labels, texts)


def parquet_images(
    listing: Listing, column: str, label_column: str | None, labels_for: str | None, caption_column: str | None, cache_dir: str | None
) -> TableImages:
    """A local folder of parquet files, likewise; relative paths in them are from where they lie."""
    import datasets

    root, names = str(listing.root), parquet_files(listing)
    files = [os.path.join(root, name) for name in names]
    # The builder serves no stale table: the key of its cache has every file's path and modification time.
    try:
        with _no_progress_bars():
            table = datasets.load_dataset("parquet", data_files=list(map(glob.escape, files)), cache_dir=cache_dir, split="train")
    except Exception as error:  # Arrow's and datasets' own types
        raise UserError(f"--train_data_dir {root}: cannot read its .parquet files ({_fault(files) or first_line(error)})") from error
    images = only_images(table, column, root)
    digest = hashlib.blake2b("\n".join(sorted(names)).encode(errors="surrogateescape"), digest_size=8).hexdigest()
    labels = only_labels(table, label_column, root, labels_for)
    texts = only_texts(table, caption_column, root)
    folders = tuple(dict.fromkeys(map(os.path.dirname, files)))
    return TableImages(images, column, root, f"a folder of {summary(table)}, file names {digest}", labels, texts, folders=folders)


def _fault(files: Sequence[str]) -> str:
    """Which file is broken or has other columns, or that all are empty, which `datasets` does not say; an empty string if it is else."""
    import pyarrow.parquet

    rows, first = 0, dict[str, str]()
    for file in files:
        try:
            found = pyarrow.parquet.ParquetFile(file)
        except (OSError, ValueError) as error:  # Arrow's own types are of these
            return f"{file}: {first_line(error)}"
        rows, columns = rows + found.metadata.num_rows, {field.name: str(field.type) for field in found.schema_arrow}
        first = first or columns
        if other := next((name for name in {**first, **columns} if first.get(name) != columns.get(name)), None):
            return f"column {other} is {columns.get(other, 'not there')} in {file} and {first.get(other, 'not there')} in {files[0]}"
    return "" if rows else f"{len(files)} of them, the first {files[0]}, and they hold no rows"


def _instead(cell: Mapping[str, Any]) -> str:
    """What stands in an image's cell in the place of its bytes or its path, where that can be told."""
    text = cell["path"] if cell["bytes"] is None else cell["bytes"][:100].decode("latin-1")
    if cell["bytes"] is None and re.match(r"https?://", text):
        return "it is an address, and nothing is fetched: download the images, by img2dataset for instance"
    start = text.partition(";base64,")[2][:64] or text[:64]
    for kind, decode in (("base64", base64.b64decode), ("hexadecimal digits", bytes.fromhex)):
        with suppress(ValueError):
            if decode(start).startswith(_BEGINNINGS):
                return f"it is written as a text of {kind}; write the bytes that the text stands for"
    return ""


def summary(table: Any) -> str:
    """How many images, and which columns."""
    return f"{len(table)} images, columns {' '.join(sorted(table.column_names))}"


def parquet_files(listing: Listing) -> list[str]:
    """The parquet files of a folder. Those of the hub are named after splits (``train-00000.parquet``): if some are, they count alone."""
    named = [file for file in listing.tables if re.search(r"(?:^|[^a-z0-9])train(?:ing)?(?![a-z0-9])", file.lower())]
    if named and len(named) < len(listing.tables):
        listing.left_out.append(f"{len(listing.tables) - len(named)} .parquet files beside those named after the split `train`")
    return named or listing.tables


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
