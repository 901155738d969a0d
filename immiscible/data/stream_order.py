"""The order of a stream: which of its images a rank takes for which micro-batch.

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
import re
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.data import Dataset, Sampler
from tqdm import tqdm

from immiscible.data.batches import ImageDataset
from immiscible.data.streaming import Sample, Stream
from immiscible.data.tars import DamagedShard
from immiscible.data.transforms import ImageTransform, size_of
from immiscible.errors import UserError, first_line
from immiscible.randomness import derive_seed, seeded_generator

logger = logging.getLogger(__name__)

AT_HAND = 8  # images, a batch's and what follows it, of which one must be readable


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
            raise UserError(f"shard {name} cannot be read after {read} samples: {first_line(error)}", exit_code=1) from error


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

    def size(self, index: int) -> tuple[int, int]:
        return size_of(self.load(index))

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
        skip_bad_images: see `ImageDataset`, as for the next three.
        with_labels: see there.
        with_captions: see there.
        with_geometry: see there.

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
        with_geometry: bool = False,
    ):
        self._stream = stream
        self._options = (transform, skip_bad_images, with_labels, with_captions, with_geometry)
        ImageDataset(_BatchImages(stream, []), *self._options)  # now: what is wrong with them is an error of the run, not of a batch

    def __getitems__(self, keys: Sequence[StreamKey]) -> list[dict[str, Any]]:
        """What a loader asks for: the items of a batch."""
        images = ImageDataset(_BatchImages(self._stream, [*(key.sample for key in keys), *keys[-1].spare]), *self._options)
        return [images[key.number, row] for row, key in enumerate(keys)]
