"""Tables of images: data sets of the hub, folders of images, parquet files."""

from __future__ import annotations

import glob
import hashlib
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from immiscible.data.sources import TableImages, _first_line
from immiscible.errors import UserError

logger = logging.getLogger(__name__)


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
