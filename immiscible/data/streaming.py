"""Training from shards that are read from front to back, over the network if need be: ``--streaming``.

A rank's images are a function of (seed, rank, number of ranks) and a position, as they are for other data:

- In epoch e the shards stand in an order drawn from (seed, e), and rank r of W reads the shards r, r + W, r + 2W, ... of it. A rank that
  has read its own goes on with its next epoch; so no rank waits, and none runs out of batches, whatever the sizes of the shards.
- Within a shard, blocks of ``--shuffle_buffer`` images are shuffled by (seed, e, shard, block). A sorted shard stays sorted on
  the scale of a block: shards should be written in random order, as img2dataset and the usual tools do.
- Images are read by the training process and decoded by the loader's workers, whose number changes nothing.

Resuming is exact: the run reads past what it has seen, without decoding it. How many images a shard holds is remembered in the cache
folder once it has been read to its end, and such a shard is not opened again on the way. What cannot be exact: shards that changed
under the same name.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import re
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from inspect import signature
from itertools import chain, count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from PIL import Image
from torch.utils.data import Dataset, Sampler
from tqdm import tqdm

from immiscible.data.shards import Columns, DamagedShard, TarSample, check_first, check_label_column, content, tar_files, tar_samples
from immiscible.data.sources import (
    GlobalBatchOrder,
    ImageDataset,
    ImageSource,
    ImageTransform,
    TableImages,
    load_images,
    only_images,
    only_labels,
    only_texts,
    parquet_files,
)
from immiscible.errors import UserError
from immiscible.flags import DataArguments, UnconditionalConfig, given
from immiscible.randomness import derive_seed, seeded_generator

if TYPE_CHECKING:
    from immiscible.configs import AnyConfig

logger = logging.getLogger(__name__)

AT_HAND = 8  # images, a batch's and what follows it, of which one must be readable


@dataclass(frozen=True)
class TarStream:
    """WebDataset shards, local or remote, read as `shards` describes; they have no classes here, as their number is not known.

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
    import datasets

    builder: Any = None
    try:
        if dataset_name is not None:
            builder = datasets.load_dataset_builder(dataset_name, dataset_config_name, cache_dir=cache_dir)
            files = [str(file) for file in (builder.config.data_files or {}).get("train", ())]
            origin = dataset_name if dataset_config_name is None else f"{dataset_name}/{dataset_config_name}"
        else:
            root = Path(str(train_data_dir)).expanduser().resolve()
            if not root.is_dir():
                raise UserError(f"--train_data_dir {train_data_dir}: no such folder")
            origin, files = str(root), tar_files(root)
            if not files:
                files = [str(root / file) for file in parquet_files(root)]
                if not files:
                    raise UserError(
                        f"--streaming reads .tar or .parquet files, and --train_data_dir {train_data_dir} holds none; leave out --streaming"
                    )
                builder = datasets.load_dataset_builder("parquet", data_files={"train": files}, cache_dir=cache_dir)
        if files and all(file.endswith(".tar") for file in files):
            return _tar_stream(origin, files, Columns(image_column, caption_column), label_column, labels_for)
        if hasattr(builder.config, "decode_num_threads"):
            builder.config.decode_num_threads = 0  # the loader's workers decode
        table: Any = builder.as_streaming_dataset(split="train")
        if table.features is None:
            table = table._resolve_features()
    except UserError:
        raise
    except Exception as error:  # whatever the network, the Hub or the files can do wrong
        given = f"--dataset_name {dataset_name}" if dataset_name else f"--train_data_dir {train_data_dir}"
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{given}: cannot stream its train split ({reason}); check the name and the network", exit_code=1) from error
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


class StreamKey(NamedTuple):
    """A sample on its way to be decoded, and a number that stands for its epoch, shard and row, from which crop and flip are drawn.

    The last of a small batch brings those that follow it, to take the places of bad images.
    """

    number: int
    sample: Sample
    spare: Sequence[Sample] = ()


class StreamOrder(Sampler[list[StreamKey]]):
    """The samples of one rank's micro-batches, read, from the run's micro-batch ``start`` to ``stop``; the module says in which order.

    Args:
        stream: the shards, as many as ranks at least.
        batch_size: images a rank sees in a micro-batch.
        seed: the run's seed.
        start: first micro-batch, counted from the beginning of the run.
        stop: the micro-batch after the last.
        rank: this process.
        num_processes: ranks.
        shuffle_buffer: images of a block that is shuffled in itself; 1 keeps the order of the shard.
        skip_bad_images: go on behind a damaged shard.
        cache_dir: where the sizes of shards are remembered; None for the cache folder of `datasets`.

    Raises:
        UserError: too few shards; while reading, a shard that cannot be read or that is damaged, or no images at all.
    """

    num_images = batches_per_epoch = math.inf  # not known

    def __init__(
        self,
        stream: Stream,
        batch_size: int,
        seed: int,
        *,
        start: int = 0,
        stop: int,
        rank: int = 0,
        num_processes: int = 1,
        shuffle_buffer: int = 1,
        skip_bad_images: bool = False,
        cache_dir: str | None = None,
    ):
        import datasets

        if len(stream.shards) < num_processes:
            raise UserError(
                f"{stream.description}, which is fewer than the {num_processes} processes, of which each reads its own; "
                f"leave out --streaming or use fewer processes"
            )
        self.stream = stream
        self.batch_size = batch_size
        self.seed = seed
        self.start = start
        self.stop = stop
        self.rank = rank
        self.num_processes = num_processes
        self.global_batch_size = num_processes * batch_size
        self.shuffle_buffer = shuffle_buffer
        self.skip_bad_images = skip_bad_images
        self._sizes = _ShardSizes(Path(cache_dir or datasets.config.HF_DATASETS_CACHE).expanduser(), stream, rank)
        self._damaged: set[int] = set()

    def __len__(self) -> int:
        return max(0, self.stop - self.start)

    def __iter__(self) -> Iterator[list[StreamKey]]:
        samples = self._samples(skip=self.start * self.batch_size)
        spare = max(0, AT_HAND - self.batch_size) if self.skip_bad_images else 0
        ahead = deque[StreamKey]()
        for _ in range(self.start, self.stop):
            ahead.extend(islice(samples, self.batch_size + spare - len(ahead)))
            *keys, last = [ahead.popleft() for _ in range(self.batch_size)]
            yield [*keys, last._replace(spare=[key.sample for key in ahead])]

    def _samples(self, skip: int) -> Iterator[StreamKey]:
        """This rank's samples, over and over, without the first ``skip``."""
        bar = tqdm(total=skip, desc="reading past what was seen", unit="image", disable=not skip or self.rank > 0)
        for epoch in count():
            found = 0
            for shard in self._order("shards", epoch, len(self.stream.shards))[self.rank :: self.num_processes]:
                size = self._sizes.get(shard)
                if size is not None and size <= skip:
                    blocks: Iterator[list[StreamKey]] = iter([])
                    skip, found = skip - size, found + size
                    bar.update(size)
                else:
                    blocks, size = self._blocks(epoch, shard), 0
                for number, block in enumerate(blocks):
                    size += len(block)
                    passed = min(skip, len(block))
                    skip -= passed
                    bar.update(passed)
                    if passed < len(block):
                        bar.close()
                        for row in self._order("block", epoch, shard, number, len(block))[passed:]:
                            yield block[row]
                found += size
                self._sizes.put(shard, size)
            if not found:
                raise UserError(f"{self.stream.description}, and the shards of process {self.rank} hold no images", exit_code=1)

    def _order(self, *parts: int | str) -> list[int]:
        """A permutation of as many things as the last of ``parts`` says, drawn from all of them."""
        return torch.randperm(int(parts[-1]), generator=seeded_generator(self.seed, *parts)).tolist()

    def _blocks(self, epoch: int, shard: int) -> Iterator[list[StreamKey]]:
        samples = self._read(shard)
        for first in count(step=self.shuffle_buffer):
            block = list(islice(samples, self.shuffle_buffer))
            if not block:
                return
            yield [StreamKey(derive_seed(epoch, shard, first + row), sample) for row, sample in enumerate(block)]

    def _read(self, shard: int) -> Iterator[Sample]:
        name, read = self.stream.shards[shard], 0
        try:
            for sample in self.stream.read(shard):
                yield sample
                read += 1
        except DamagedShard as error:
            if not self.skip_bad_images:
                raise UserError(
                    f"shard {name} is damaged after {read} samples: {error}; fetch it again or pass --skip_bad_images", exit_code=1
                ) from None
            if shard not in self._damaged:
                self._damaged.add(shard)
                logger.warning(
                    "shard %s is damaged after %d samples, the rest is skipped: %s (%d damaged so far)",
                    name,
                    read,
                    error,
                    len(self._damaged),
                )
        except Exception as error:  # of the network, fsspec, Arrow
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(f"shard {name} cannot be read after {read} samples: {reason}", exit_code=1) from error


class _ShardSizes:
    """How many samples each shard holds that was read to its end, by any rank of any run: a line for each, in a file for each rank."""

    def __init__(self, cache: Path, stream: Stream, rank: int):
        digest = hashlib.blake2b(stream.fingerprint.encode(), digest_size=16).hexdigest()
        self._path = cache / "shard-sizes" / f"{digest}-{rank}.txt"
        lines = [line for path in self._path.parent.glob(f"{digest}-*.txt") for line in path.read_text().splitlines()]
        matches = filter(None, map(re.compile(r"(\d+) (\d+)\.").fullmatch, lines))  # the dot: a line that was cut off has none
        self._sizes = {int(match[1]): int(match[2]) for match in matches}

    def get(self, shard: int) -> int | None:
        """None if it is not known."""
        return self._sizes.get(shard)

    def put(self, shard: int, size: int) -> None:
        """Remembers it; a cache that cannot be written costs time on resume and nothing else."""
        if self.get(shard) == size:
            return
        self._sizes[shard] = size
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a") as file:
                file.write(f"\n{shard} {size}.\n")  # whole lines, also behind one that was cut off
        except OSError as error:
            logger.warning("cannot remember the sizes of shards in %s: %s", self._path.parent, error.strerror or error)


@dataclass(frozen=True)
class _BatchImages:
    """The samples of one batch, as an `ImageSource`."""

    stream: Stream
    samples: Sequence[Sample]

    @property
    def channels(self) -> int:
        return self.stream.channels

    @property
    def description(self) -> str:
        return self.stream.description

    @property
    def fingerprint(self) -> str:
        return self.stream.fingerprint

    @property
    def class_names(self) -> Sequence[str] | None:
        return self.stream.class_names

    def __len__(self) -> int:
        return len(self.samples)

    def load(self, index: int) -> Any:
        return self.samples[index].load()

    def name(self, index: int) -> str:
        return self.samples[index].name

    def label(self, index: int) -> int:
        return self.samples[index].label()

    def captions(self, index: int) -> Sequence[str]:
        return self.samples[index].captions()


class StreamDataset(Dataset[dict[str, Any]]):
    """As `ImageDataset`, for the keys of `StreamOrder`; a bad image is replaced by the next readable one at hand.

    Args:
        stream: the images.
        transform: what makes pixels of them.
        skip_bad_images: see `ImageDataset`, as for the next two.
        with_labels: see there.
        with_captions: see there.

    Raises:
        UserError: ``with_labels``, and the stream has no classes.
    """

    def __init__(
        self,
        stream: Stream,
        transform: ImageTransform,
        skip_bad_images: bool = False,
        with_labels: bool = False,
        with_captions: bool = False,
    ):
        self._stream = stream
        self._options = (transform, skip_bad_images, with_labels, with_captions)
        ImageDataset(_BatchImages(stream, []), *self._options)  # now: what is wrong with them is an error of the run, not of a batch

    def __getitems__(self, keys: Sequence[StreamKey]) -> list[dict[str, Any]]:
        """What a loader asks for: the items of a batch."""
        images = ImageDataset(_BatchImages(self._stream, [*(key.sample for key in keys), *keys[-1].spare]), *self._options)
        return [images[key.number, row] for row, key in enumerate(keys)]


def load_training_images(config: UnconditionalConfig) -> ImageSource | Stream:
    """The images that the flags of ``train_unconditional.py`` name, with their classes if a flag needs them.

    Raises:
        UserError: as `load_images` or, with ``--streaming``, `load_stream`.
    """
    load = load_stream if config.streaming else load_images
    data = given(config, DataArguments)
    chosen: dict[str, Any] = {name: data[name] for name in signature(load).parameters if name in data}
    return load(**chosen, labels_for=config.labels_for)


def batch_order(
    source: ImageSource | Stream, config: AnyConfig, seed: int, rank: int, num_processes: int
) -> GlobalBatchOrder | StreamOrder:
    """Which images a rank takes for which micro-batch; ``stop`` is to be set.

    Raises:
        UserError: see `StreamOrder`.
    """
    if not isinstance(source, Stream):
        return GlobalBatchOrder(len(source), config.train_batch_size, seed, stop=0, rank=rank, num_processes=num_processes)
    return StreamOrder(
        source,
        config.train_batch_size,
        seed,
        stop=0,
        rank=rank,
        num_processes=num_processes,
        shuffle_buffer=config.shuffle_buffer,
        skip_bad_images=config.skip_bad_images,
        cache_dir=config.cache_dir,
    )


def training_images(
    source: ImageSource | Stream, transform: ImageTransform, config: AnyConfig, *, with_captions: bool = False
) -> ImageDataset | StreamDataset:
    """What the loader loads, for the keys of `batch_order`.

    Raises:
        UserError: classes are needed, and the source has none.
    """
    kind: Any = StreamDataset if isinstance(source, Stream) else ImageDataset
    return kind(source, transform, config.skip_bad_images, with_labels=config.labels_for is not None, with_captions=with_captions)
