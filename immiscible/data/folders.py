"""A folder of image files as a table: an image a row, with the class that its folder is called by, or what the metadata say of it.

Captions stand in the metadata (``metadata.jsonl``, ``.csv`` or ``.parquet``, beside the images or in any folder above them), or in a file
beside each image (``.txt``, ``.caption``, or the ``.json`` that img2dataset writes), which is read when its image is.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from immiscible.data.archives import content, size
from immiscible.data.listing import METADATA, Listing
from immiscible.data.tables import TableImages, only_images, only_labels, only_texts, summary
from immiscible.data.tars import captions_of_file
from immiscible.errors import UserError, first_line

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SidecarImages(TableImages):
    """Images with their captions in a file beside each.

    Args:
        sidecars: the path of each image's, relative to ``origin``; None where there is none.
        key: of the captions in JSON; None for text files.
    """

    sidecars: Sequence[str | None] = ()
    key: str | None = None

    def captions(self, index: int) -> Sequence[str]:
        """See `ImageSource`.

        Raises:
            OSError: the file cannot be read.
            ValueError: there is none, or it holds no caption.
        """
        name = self.sidecars[index]
        if name is None:
            raise ValueError("it has no caption file beside it")
        try:
            found = captions_of_file(content(Path(self.origin, name)), self.key)
        except ValueError as error:
            raise ValueError(f"its caption in {name} cannot be read ({first_line(error)})") from None
        if found is None:
            raise ValueError(f"it has no caption (the key {self.key!r} in {name})")
        return found

    def all_captions(self, rows: range) -> Iterator[Sequence[str] | ValueError]:
        """See `TableImages`; one file after the other."""
        for row in rows:
            try:
                yield self.captions(row)
            except OSError as error:
                yield ValueError(f"its caption in {self.sidecars[row]} cannot be read ({error.strerror})")
            except ValueError as error:
                yield error


def image_folder(
    listing: Listing, column: str, label_column: str | None, labels_for: str | None, caption_column: str | None, skip_bad_images: bool
) -> TableImages:
    """The images of a folder; the arguments are those of `immiscible.data.loading.load_images`.

    Raises:
        UserError: metadata that cannot be read or name images that are not there, no such column, or no captions.
    """
    origin = str(listing.root)
    table = _from_metadata(listing, column, caption_column, skip_bad_images) if listing.metadata else _from_files(listing)
    images = only_images(table, column, origin)
    within = f"{origin}{os.sep}"
    paths = [None if path is None else path.removeprefix(within) for path in _paths(images, column)]
    names = sorted(filter(None, paths))
    digest = hashlib.blake2b("\n".join(names).encode(errors="surrogateescape"), digest_size=8).hexdigest()
    if unnamed := sorted(set(listing.images).difference(names)):
        listing.left_out.append(f"{len(unnamed)} images that are in no line of the metadata, the first {unnamed[0]}")
    labels = only_labels(table, label_column, origin, labels_for)
    shared = (images, column, origin, f"a folder of {summary(table)}, file names {digest}", labels)
    if caption_column is None or caption_column in table.column_names:
        texts = only_texts(table, caption_column, origin)
        if texts is not None and not skip_bad_images:
            _check_captions(listing, paths, texts.data.column(0))
        return TableImages(*shared, texts)
    return _with_sidecars(listing, shared, paths, table.column_names, caption_column, skip_bad_images)


def _check_captions(listing: Listing, paths: Sequence[str | None], texts: Any) -> None:
    """Whether each image has a caption, an empty one or a list of them maybe."""
    if texts.null_count:
        first = next(path for path, text in zip(paths, texts, strict=True) if not text.is_valid)
        raise UserError(
            f"{texts.null_count} of {len(paths)} images in {listing.root} have no caption in the metadata, the first {first}: write one "
            f'("" is the empty prompt), remove it, or pass --skip_bad_images'
        )


def _with_sidecars(
    listing: Listing,
    shared: tuple[Any, ...],
    paths: Sequence[str | None],
    columns: Sequence[str],
    caption_column: str,
    skip_bad_images: bool,
) -> SidecarImages:
    """The images with captions in files; ``text`` is ``.txt``, else ``.caption``; another name that file, or a key of ``.json``."""
    texts = (".txt", ".caption") if caption_column in ("text", "txt") else (f".{caption_column}",)
    found = [None if path is None else _beside(listing, path, texts) for path in paths]
    key = None
    if not any(found):
        key, found = caption_column, [None if path is None else _beside(listing, path, (".json",)) for path in paths]
    missing = [path for path, name in zip(paths, found, strict=True) if name is None]
    if len(missing) == len(paths):
        _refuse_without_captions(listing, caption_column, columns)
    if missing and not skip_bad_images:
        raise UserError(
            f"{len(missing)} of {len(paths)} images in {listing.root} have no caption file, the first {missing[0]}: write one beside it "
            f"(an empty one is the empty prompt), remove it, or pass --skip_bad_images"
        )
    images, column, origin, fingerprint, labels = shared
    source = SidecarImages(images, column, origin, fingerprint, labels, sidecars=found, key=key)
    if key is not None:  # one file is looked into: a key that is nowhere would end the run at its first image
        first = next(index for index, name in enumerate(found) if name)
        try:
            source.captions(first)
        except ValueError as error:
            if not skip_bad_images:
                raise UserError(f"--caption_column {caption_column!r} is not in {origin}: {source.name(first)}: {error}") from None
    return source


def _beside(listing: Listing, path: str, extensions: Sequence[str]) -> str | None:
    """The file that belongs to an image, called ``a.txt`` or ``a.png.txt``."""
    stem = os.path.splitext(path)[0]
    names = (f"{start}{extension}" for extension in extensions for start in (stem, path))
    return next((listing.sidecars[name] for name in names if name in listing.sidecars), None)


def _refuse_without_captions(listing: Listing, caption_column: str, columns: Sequence[str]) -> None:
    above = [str(listing.root.parent / name) for name in METADATA if (listing.root.parent / name).is_file()]
    hint = f"; {above[0]} lies above this folder: move it here, or name its folder as --train_data_dir" if above else ""
    there = f"; columns of the metadata: {', '.join(columns)}" if listing.metadata else ""
    raise UserError(
        f"--caption_column {caption_column!r} is not in {listing.root}, which has no captions: neither .txt or .caption files beside the "
        f"images nor a metadata.jsonl with that column{there}{hint}"
    )


def _from_files(listing: Listing) -> Any:
    """A row for each image; classes, where all images lie at one depth in folders of two names or more."""
    import datasets
    import numpy as np
    import pyarrow as pa

    columns, features = {"image": _cells([f"{listing.root}/{name}" for name in listing.images])}, {"image": datasets.Image()}
    parents = [os.path.basename(os.path.dirname(os.path.join(listing.root, name))) for name in listing.images]
    classes = sorted(set(parents))
    if len(classes) > 1 and len({name.count(os.sep) for name in listing.images}) == 1:
        numbers = {name: number for number, name in enumerate(classes)}
        columns["label"] = pa.array(np.array([numbers[name] for name in parents], dtype=np.int64))
        features["label"] = datasets.ClassLabel(names=classes)
    return _dataset(pa.table(columns), features)


def _from_metadata(listing: Listing, column: str, caption_column: str | None, skip_bad_images: bool) -> Any:
    """The rows of all metadata, in the order of their files, without those of other splits."""
    import datasets
    import pyarrow as pa

    folders = [os.path.dirname(name) for name in listing.metadata]
    twice = [folder for folder in folders if folders.count(folder) > 1]
    if twice:
        both = [name for name in listing.metadata if os.path.dirname(name) == twice[0]]
        raise UserError(f"--train_data_dir {listing.root} holds both {' and '.join(both)}; keep one of them")
    parts = []
    for name in listing.metadata:
        try:
            parts.append(_with_paths(listing, name, _read(listing.root / name, caption_column), column, skip_bad_images))
        except UserError:
            raise
        except Exception as error:  # Arrow's, pandas' and Python's own
            raise UserError(
                f"--train_data_dir {listing.root}: cannot read its images and what their {os.path.basename(name)} says "
                f"({first_line(error)}; {name})"
            ) from None
    try:
        table = pa.concat_tables(parts, promote_options="default")
    except pa.ArrowInvalid as error:
        raise UserError(f"--train_data_dir {listing.root}: {' and '.join(listing.metadata)} do not agree ({first_line(error)})") from None
    features = datasets.Features.from_arrow_schema(table.schema)
    for name, kind in features.items():
        if kind == _CELL():
            features[name] = datasets.Image()
    return _dataset(table, features)


def _read(path: Path, caption_column: str | None) -> Any:
    """A metadata file as an Arrow table."""
    import pyarrow as pa

    found, kind = content(path), path.suffix.lower()
    if kind == ".parquet":
        import pyarrow.parquet as pq

        return pq.read_table(io.BytesIO(found))
    if kind == ".jsonl":
        import pyarrow.json as pj

        if not found.strip():
            raise ValueError("it is empty")
        found.decode()  # Arrow takes any bytes for a text, which fails only where it is looked at
        # One block, or a later line that has another key would not be understood; 2**28 bytes are 2 million lines.
        return pj.read_json(io.BytesIO(found), read_options=pj.ReadOptions(block_size=min(len(found) + 1, 2**28)))
    import pandas

    first = pandas.read_csv(io.BytesIO(found), header=None, nrows=1, dtype=object, keep_default_na=False, encoding="utf-8-sig")
    _check_once(first.iloc[0].tolist())  # pandas would rename the second one
    frame = pandas.read_csv(io.BytesIO(found), encoding="utf-8-sig")
    if not isinstance(frame.index, pandas.RangeIndex) and len(frame.columns) > 1:  # what pandas makes of the first fields then
        raise ValueError("line 2 has more fields than the header: a text with commas stands in quotes")
    # As they stand: an empty field is the empty prompt, not a number that is missing, and neither are the words NA or null.
    texts = [name for name in frame.columns if name == caption_column or name.endswith("file_name")]
    if texts:
        frame[texts] = pandas.read_csv(io.BytesIO(found), usecols=texts, dtype=object, keep_default_na=False, encoding="utf-8-sig")[texts]
    if "file_name" not in frame.columns and len(frame.columns) == 1 and any(mark in frame.columns[0] for mark in ";\t|"):
        raise ValueError(f"its only column is {frame.columns[0]!r}: separate columns by commas")
    return pa.Table.from_pandas(frame, preserve_index=False).replace_schema_metadata(None)


def _check_once(columns: Sequence[str]) -> None:
    """Whether no column is there twice, of which one would be taken silently; ``file_name`` is one called ``image``."""
    if twice := [column for column in columns if columns.count(column) > 1]:
        raise ValueError(f"it has two columns {twice[0]!r}" + (", of which file_name is one" if twice[0] == "image" else ""))


def _with_paths(listing: Listing, name: str, table: Any, column: str, skip_bad_images: bool) -> Any:
    """The table with cells of images in the place of ``file_name`` (for the column ``image``) and ``{column}_file_name``."""
    import pyarrow as pa
    from pyarrow import compute

    folder, kinds = os.path.dirname(name), dict(zip(table.column_names, table.schema.types, strict=True))
    files = {key: key.removesuffix("file_name").removesuffix("_") or "image" for key in kinds if key.endswith("file_name")}
    _check_once([files.get(key, key) for key in table.column_names])
    files = {key: new for key, new in files.items() if pa.types.is_string(kinds[key]) or pa.types.is_large_string(kinds[key])}
    if not table.num_rows:
        raise ValueError("it has no rows")
    if not files and "file_name" in kinds:
        raise ValueError(f"its column file_name holds {kinds['file_name']}, not texts")
    if not files:
        raise UserError(
            f"--train_data_dir {listing.root}: {name} has no column file_name, which says of which image a line is; its columns: "
            f"{', '.join(table.column_names)}"
        )
    kept = None
    for key, new in files.items():
        paths = [None if value is None else _joined(listing, folder, value, name) for value in table[key].to_pylist()]
        if new == column:
            kept = [path is None or listing.trains(path) for path in paths]
            if not skip_bad_images:
                _check_there(listing, name, table[key], paths, kept)
        cells = _cells([None if path is None else f"{listing.root}/{path}" for path in paths])
        place = table.column_names.index(key)
        table = table.set_column(place, new, cells)
    return table if kept is None or all(kept) else table.filter(compute.cast(pa.array(kept), pa.bool_()))


def _joined(listing: Listing, folder: str, value: str, name: str) -> str:
    """The path, from the root, of what a metadata file calls ``value``; Windows' separators are understood."""
    path = os.path.normpath(os.path.join(folder, value if "\\" not in value else value.replace("\\", "/")))
    if os.path.isabs(value) or "://" in value or path.split(os.sep)[0] == "..":
        raise UserError(
            f"--train_data_dir {listing.root}: {name} names {value!r}, which does not lie in this folder; file_name is a path from where "
            f"{os.path.basename(name)} is"
        )
    return path


def _check_there(listing: Listing, name: str, values: Any, paths: Sequence[str | None], kept: Sequence[bool]) -> None:
    """Whether the images are there that metadata name."""
    known = set(listing.images)
    missing = [
        row for row, path in enumerate(paths) if kept[row] and (path is None or (path not in known and size(f"{listing.root}/{path}") < 0))
    ]
    if not missing:
        return
    row = missing[0]
    first = "no file_name" if paths[row] is None else f"{values[row].as_py()!r}, and there is no file {listing.root / str(paths[row])}"
    raise UserError(
        f"--train_data_dir {listing.root}: {len(missing)} of the {len(paths)} images that {name} names are not there; the first, in row "
        f"{row + 1}, is {first}; file_name is a path from where {os.path.basename(name)} is. Mend it, or pass --skip_bad_images"
    )


def _CELL() -> Any:
    import datasets

    return {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}


def _cells(paths: Sequence[str | None]) -> Any:
    """Arrow cells as `datasets.Image` keeps them."""
    import pyarrow as pa

    names = pa.array(paths, pa.string())
    return pa.StructArray.from_arrays([pa.nulls(len(paths), pa.binary()), names], ["bytes", "path"], mask=names.is_null())


def _paths(table: Any, column: str) -> list[str | None]:
    return [path for chunk in table.data.column(column).chunks for path in chunk.field("path").to_pylist()]


def _dataset(table: Any, features: dict[str, Any]) -> Any:
    import datasets

    # Named, as `datasets` would otherwise hash the whole table.
    information = datasets.DatasetInfo(features=datasets.Features(features))
    return datasets.Dataset(datasets.table.InMemoryTable(table), info=information, fingerprint="immiscible")
