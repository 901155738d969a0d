"""Shards that are read from front to back, over the network if need be, and kept nowhere: ``--streaming``.

A stream is no `ImageSource`: it has no length, and its samples come in the order in which they are written. In which order a rank sees
them is told in `immiscible.data.stream_order`.
"""

from __future__ import annotations

import glob
import hashlib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice
from typing import Any, NamedTuple

from PIL import Image

from immiscible.data.listing import list_folder
from immiscible.data.tables import TableImages, only_images, only_labels, only_texts, parquet_files
from immiscible.data.tars import Columns, DamagedShard, TarSample, check_first, check_label_column, content, tar_samples
from immiscible.errors import UserError, first_line

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TarStream:
    """WebDataset shards, local or remote, read as `tars` describes; they have no classes here, as their number is not known.

    What it shares with the properties of `ImageSource` means the same.

    Args:
        origin: what the user named.
        shards: paths or addresses that fsspec opens.
        columns: which members are read.
    """

    origin: str
    shards: Sequence[str]
    columns: Columns
    class_names: None = None
    channels: int = 3

    @property
    def description(self) -> str:
        """One line for summaries."""
        return f"{self.origin}: a stream of {len(self.shards)} tar shards"

    @property
    def fingerprint(self) -> str:
        """See `ImageSource`."""
        return f"a stream of {len(self.shards)} tar shards, names {_digest(self.shards)}"

    def read(self, shard: int) -> Iterator[TarSample]:
        """The samples of a shard, from front to back.

        Raises:
            DamagedShard: after the last one that can be read.
        """
        import fsspec

        address, columns = self.shards[shard], self.columns
        with fsspec.open(address, "rb") as file:
            for key, members in tar_samples(file, lambda tar, member, kind: content(tar, member) if columns.is_used(kind) else b""):
                yield TarSample(address, key, members, columns)


class _OneRow(NamedTuple):
    """What `TableImages` takes for a table: one row, with the features of its columns."""

    row: Mapping[str, Any]
    features: Any

    def __getitem__(self, index: Any) -> Any:
        return self.row


@dataclass(frozen=True)
class TableSample:
    """A streamed row of a table; image, class and caption are read from it as from any other table, see `TableImages`."""

    name: str
    row: TableImages

    def load(self) -> Image.Image:
        """See `ImageSource`."""
        return self.row.load(0)

    def label(self) -> int:
        """See `ImageSource`."""
        return self.row.label(0)

    def captions(self) -> Sequence[str]:
        """See `ImageSource`."""
        ((_, value),) = self.row.texts[0].items()
        return self.row.captions_of(value)


@dataclass(frozen=True)
class TableStream:
    """The shards of a table that `datasets` streams, such as parquet files.

    Args:
        origin: what the user named.
        rows: the table's columns that are read, images undecoded.
        fingerprint: see `ImageSource`.
        image_column: of ``rows``.
        label_column: likewise, or None.
        caption_column: likewise, or None.
    """

    origin: str
    rows: Any
    fingerprint: str
    image_column: str
    label_column: str | None = None
    caption_column: str | None = None
    channels: int = 3

    @cached_property
    def shards(self) -> Sequence[str]:
        """What they are called in messages."""
        return [f"shard {number} of {self.origin}" for number in range(self.rows.num_shards)]

    @property
    def class_names(self) -> Sequence[str] | None:
        """See `ImageSource`."""
        return self.rows.features[self.label_column].names if self.label_column else None

    @property
    def texts(self) -> Any:
        """The rows with the captions, as `TableImages` has them, or None."""
        return self.rows if self.caption_column else None

    @property
    def description(self) -> str:
        """One line for summaries."""
        return f"{self.origin}: a stream of {len(self.shards)} shards"

    def read(self, shard: int) -> Iterator[TableSample]:
        """The samples of a shard, from front to back."""
        features = self.rows.features
        for number, row in enumerate(self.rows.shard(num_shards=len(self.shards), index=shard)):
            row[self.image_column] = _fetched(row[self.image_column])
            image, labels, texts = (
                name and _OneRow({name: row[name]}, {name: features[name]})
                for name in (self.image_column, self.label_column, self.caption_column)
            )
            yield TableSample(f"row {number} of {self.shards[shard]}", TableImages(image, self.image_column, "", "", labels, texts))


def _fetched(cell: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """An image's cell with its bytes, if it names a file elsewhere; without them, if that is not there, it is a bad image."""
    import fsspec

    if cell and cell["bytes"] is None and "://" in (cell["path"] or ""):
        with suppress(FileNotFoundError), fsspec.open(cell["path"], "rb") as file:
            return {**cell, "bytes": file.read()}
    return cell


Sample = TarSample | TableSample  # what was read and not yet decoded; what their methods raise makes them a `BadImage`
Stream = TarStream | TableStream  # shards that are read from front to back


def load_stream(
    *,
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    train_data_dir: str | None = None,
    image_column: str = "image",
    label_column: str | None = None,
    labels_for: str | None = None,
    caption_column: str | None = None,
    cache_dir: str | None = None,
) -> Stream:
    """The training images as a stream; the arguments are those of `load_images`.

    Args:
        dataset_name: a dataset of the Hub, of tar shards or of whatever `datasets` streams.
        dataset_config_name: see `load_images`.
        train_data_dir: a folder of ``.tar`` or ``.parquet`` files at any depth.
        image_column: see `load_images`; for tar shards see `Columns`, as for ``caption_column``.
        label_column: see `load_images`.
        labels_for: see `load_images`.
        caption_column: see `load_images`.
        cache_dir: see `load_images`.

    Raises:
        UserError: nothing there, or it lacks what the run needs.
    """
    try:
        origin, files, builder = _found(dataset_name, dataset_config_name, train_data_dir, cache_dir)
        if files and all(file.endswith(".tar") for file in files):
            return _tar_stream(origin, files, Columns(image_column, caption_column), label_column, labels_for)
        table = _streaming_table(builder)
    except UserError:
        raise
    except Exception as error:  # whatever the network, the Hub or the files can do wrong
        given = f"--dataset_name {dataset_name}" if dataset_name else f"--train_data_dir {train_data_dir}"
        raise UserError(
            f"{given}: cannot stream its train split ({first_line(error)}); check the name and the network", exit_code=1
        ) from error
    return _table_stream(table, origin, files, image_column, label_column, labels_for, caption_column)


def _found(
    dataset_name: str | None, dataset_config_name: str | None, train_data_dir: str | None, cache_dir: str | None
) -> tuple[str, list[str], Any]:
    """What the data is called, its files, and the builder of `datasets` that reads them, or None for a folder of tars."""
    import datasets

    if dataset_name is not None:
        builder = datasets.load_dataset_builder(dataset_name, dataset_config_name, cache_dir=cache_dir)
        files = [str(file) for file in (builder.config.data_files or {}).get("train", ())]
        return dataset_name if dataset_config_name is None else f"{dataset_name}/{dataset_config_name}", files, builder
    listing = list_folder(str(train_data_dir))
    root = listing.root
    files = [str(root / name) for name in listing.shards or parquet_files(listing)]
    if listing.left_out:
        logger.warning("left out of %s: %s", root, "; ".join(listing.left_out))
    if listing.shards:
        return str(root), files, None
    if not files:
        remedy = f"unpack {listing.archives[0]}" if listing.archives else "leave out --streaming"
        raise UserError(f"--streaming reads .tar or .parquet files, and --train_data_dir {train_data_dir} holds none; {remedy}")
    escaped = {"train": list(map(glob.escape, files))}
    return str(root), files, datasets.load_dataset_builder("parquet", data_files=escaped, cache_dir=cache_dir)


def _streaming_table(builder: Any) -> Any:
    """Its train split, with known columns."""
    if hasattr(builder.config, "decode_num_threads"):
        builder.config.decode_num_threads = 0  # the loader's workers decode
    table = builder.as_streaming_dataset(split="train")
    return table._resolve_features() if table.features is None else table


def _table_stream(
    table: Any,
    origin: str,
    files: Sequence[str],
    image_column: str,
    label_column: str | None,
    labels_for: str | None,
    caption_column: str | None,
) -> TableStream:
    import datasets

    only_images(table, image_column, origin)
    labels = only_labels(table, label_column, origin, labels_for)
    only_texts(table, caption_column, origin)
    label = next(iter(labels.features)) if labels is not None else None
    columns = dict.fromkeys(name for name in (image_column, label, caption_column) if name)
    rows = table.select_columns(list(columns)).cast_column(image_column, datasets.Image(decode=False))
    fingerprint = f"a stream of {origin}, {rows.num_shards} shards, {_digest(files)}"
    return TableStream(origin, rows, fingerprint, image_column, label, caption_column)


def _tar_stream(origin: str, files: Sequence[str], columns: Columns, label_column: str | None, labels_for: str | None) -> TarStream:
    check_label_column(label_column, columns.caption)
    if labels_for:
        raise UserError(
            f"{labels_for} needs to know the classes beforehand, which streamed tar shards do not tell; give --train_data_dir a folder of "
            f"the shards, without --streaming"
        )
    stream = TarStream(origin, files, columns)
    samples = _sound_samples(stream)
    first = list(islice(samples, 1))
    if not first:
        raise UserError(f"{stream.description}, of which none holds a sample that can be read", exit_code=1)
    check_first(chain(first, samples), origin, labels_for)
    return stream


def _sound_samples(stream: TarStream) -> Iterator[TarSample]:
    """All, one shard after another, up to the damage of each that is damaged: that is told when a run meets it."""
    for shard in range(len(stream.shards)):
        with suppress(DamagedShard):
            yield from stream.read(shard)


def _digest(files: Sequence[str]) -> str:
    """Of the files' names, with the size of local ones; a Hub file's address holds its commit."""
    names = [f"{os.path.basename(file)} {os.path.getsize(file)}" if os.path.exists(file) else file for file in files]
    return hashlib.blake2b("\n".join(names).encode(errors="surrogateescape"), digest_size=8).hexdigest()
