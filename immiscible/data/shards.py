"""Local WebDataset shards: images in any order out of tar files.

Local shards are indexed once (where each sample begins and ends, 16 bytes of memory each), and then are read in any order, as any other
`ImageSource`: any number of loader workers and ranks, an exact resume. What cannot be indexed is streamed, see
`immiscible.data.streaming`.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from immiscible.data.listing import Listing
from immiscible.data.tars import (
    Columns,
    DamagedShard,
    TarSample,
    check_first,
    check_label_column,
    class_number,
    content,
    tar_samples,
)
from immiscible.errors import UserError
from immiscible.files import PARTIAL, replace

logger = logging.getLogger(__name__)

INDEX_FORMAT = 1  # goes up when an index holds something else, so that old ones are not read
SEAL = 16  # bytes at the end of an index, by which one that is damaged is not used


@dataclass(frozen=True)
class ShardImages:
    """The images of local shards, by number; see `ImageSource`.

    Args:
        origin: the folder that the user named.
        shards: the tar files' paths.
        counts: how many samples each holds.
        extents: where each sample begins and ends in its shard, int64 [N,2].
        columns: which members are read.
        fingerprint: see `ImageSource`.
        class_names: the class numbers in words, if there are classes.
    """

    origin: str
    shards: Sequence[str]
    counts: Sequence[int]
    extents: np.ndarray
    columns: Columns
    fingerprint: str
    class_names: Sequence[str] | None = None
    channels: int = 3
    _recent: dict[str, tuple[int, TarSample]] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def _ends(self) -> np.ndarray:
        return np.cumsum(self.counts)

    @property
    def description(self) -> str:
        """One line for summaries."""
        return f"{self.origin}: {len(self)} images in {len(self.shards)} shards"

    def __len__(self) -> int:
        return len(self.extents)

    def sample(self, index: int) -> TarSample:
        """Reads it; image, class and caption of one image are asked for one after the other, so the last sample is kept.

        Raises:
            ValueError: the shard has changed since it was indexed.
        """
        held = self._recent.get("last")
        if held and held[0] == index:
            return held[1]
        start, end = (int(offset) for offset in self.extents[index])
        shard = self._shard(index)
        with open(shard, "rb") as file:
            file.seek(start)
            block = io.BytesIO(file.read(end - start))
        try:
            key, members = next(tar_samples(block, lambda tar, member, _: content(tar, member)))
        except (DamagedShard, StopIteration):
            raise ValueError(f"sample at byte {start} of {shard} is not there any more") from None
        sample = TarSample(shard, key, members, self.columns)
        self._recent["last"] = index, sample
        return sample

    def _shard(self, index: int) -> str:
        return self.shards[int(np.searchsorted(self._ends, index, side="right"))]

    def load(self, index: int) -> Image.Image:
        """See `TarSample`."""
        return self.sample(index).load()

    def size(self, index: int) -> tuple[int, int]:
        """See `ImageSource`."""
        return self.sample(index).size()

    def name(self, index: int) -> str:
        """See `TarSample`; its place in the shard if it cannot be read."""
        try:
            return self.sample(index).name
        except (OSError, ValueError):
            return f"sample at byte {self.extents[index, 0]} of {self._shard(index)}"

    def label(self, index: int) -> int:
        """See `TarSample`."""
        return self.sample(index).label()

    def captions(self, index: int) -> Sequence[str]:
        """See `TarSample`."""
        return self.sample(index).captions()


def load_shards(
    listing: Listing,
    image_column: str = "image",
    label_column: str | None = None,
    labels_for: str | None = None,
    caption_column: str | None = None,
    cache_dir: str | None = None,
    skip_bad_images: bool = False,
) -> ShardImages:
    """The images of a folder's ``.tar`` files at any depth; their index is made once for each shard and kept in the cache folder.

    Args:
        listing: of the folder with the shards.
        image_column: see `Columns`.
        label_column: ``cls`` or None: classes are the numbers in ``.cls`` members.
        labels_for: the flag that needs classes; None if the run does without.
        caption_column: see `Columns`.
        cache_dir: the index goes into its ``tar-index``; None for the cache folder of `datasets`.
        skip_bad_images: use what stands before the damage of a damaged shard, with a warning.

    Raises:
        UserError: a shard is damaged, no sample, or the first ones have no image, class or caption where one is needed.
    """
    root = listing.root
    columns = Columns(image_column, caption_column)
    check_label_column(label_column, caption_column)
    shards = [str(root / name) for name in listing.shards]
    # The parquet files that img2dataset writes are named after their shards, and hold no images.
    tables = {Path(name).with_suffix(".tar").name for name in listing.tables}
    if not tables <= {Path(shard).name for shard in shards}:
        raise UserError(f"--train_data_dir {root} holds both .tar and .parquet files of images; give a folder with one of them")
    table = _indexed(shards, _index_folder(cache_dir), skip_bad_images)
    if not any(map(len, table)):
        raise UserError(f"--train_data_dir {root}: its {len(shards)} .tar files hold no samples")
    rows = np.concatenate(table)
    names = [f"{os.path.relpath(shard, root)} {len(found)}" for shard, found in zip(shards, table, strict=True)]
    digest = hashlib.blake2b("\n".join(names).encode(errors="surrogateescape"), digest_size=8).hexdigest()
    classes = int(rows[:, 2].max()) + 1
    if labels_for and classes > len(rows):
        told = "classes are the numbers in .cls members, which reach %d: the network is told one of %d classes, and there are %d images"
        logger.warning(told, classes - 1, classes, len(rows))
    source = ShardImages(
        str(root),
        shards,
        [len(found) for found in table],
        rows[:, :2].copy(),
        columns,
        f"{len(rows)} samples in {len(shards)} tar shards, names and sizes {digest}",
        [str(number) for number in range(classes)] if classes else None,
    )
    check_first(map(source.sample, range(len(source))), source.origin, labels_for)
    return source


def _index_folder(cache_dir: str | None) -> Path:
    import datasets

    return Path(cache_dir or datasets.config.HF_DATASETS_CACHE).expanduser() / "tar-index"


def _indexed(shards: Sequence[str], cache: Path, skip_damaged: bool) -> list[np.ndarray]:
    """Each shard's rows ``(begin, end, class or -1)`` as int64 [n,3]; ranks and runs that need the same index wait for who makes it."""
    from filelock import FileLock

    paths = [cache / f"{_shard_digest(shard)}.npy" for shard in shards]
    held = list(map(_read, paths))
    missing = [number for number, rows in enumerate(held) if rows is None]
    if missing:
        try:
            cache.mkdir(parents=True, exist_ok=True)
            with FileLock(cache / "lock"):
                held = [_read(path) if rows is None else rows for path, rows in zip(paths, held, strict=True)]  # others may have made some
                todo = [number for number, rows in enumerate(held) if rows is None]
                damaged = 0
                for number in tqdm(todo, desc="indexing shards", unit="shard", disable=len(todo) < 2):
                    held[number], damage = _scan(shards[number])
                    if damage:  # not kept: it is to be told again
                        damaged += 1
                        _tell(shards[number], damage, len(held[number]), skip_damaged, damaged)
                    else:
                        _write(paths[number], held[number])
        except OSError as error:
            raise UserError(f"cannot index the shards: {error.filename or cache}: {error.strerror or error}", exit_code=1) from None
    return [rows for rows in held if rows is not None]


def _tell(shard: str, damage: str, samples: int, skip_damaged: bool, count: int) -> None:
    if not skip_damaged:
        raise UserError(
            f"shard {shard} is damaged: {damage}; fetch it again, or use the {samples} samples before the damage with --skip_bad_images",
            exit_code=1,
        )
    logger.warning("shard %s is damaged: %s; using the %d samples before it (%d damaged so far)", shard, damage, samples, count)


def _shard_digest(shard: str) -> str:
    found = os.stat(shard)
    key = repr((INDEX_FORMAT, os.path.realpath(shard), found.st_size, found.st_mtime_ns))
    return hashlib.blake2b(key.encode(errors="surrogateescape"), digest_size=16).hexdigest()


def _scan(shard: str) -> tuple[np.ndarray, str]:
    """A shard's rows, and what is wrong with it, or an empty string."""
    rows, damage = [], ""
    with open(shard, "rb") as file:
        try:
            for _, members in tar_samples(file, _extent):
                extents = list(members.values())
                rows.append((extents[0][0], extents[-1][1], max(label for _, _, label in extents)))
        except DamagedShard as error:
            damage = str(error)
    return np.array(rows, dtype=np.int64).reshape(-1, 3), damage


def _extent(tar: tarfile.TarFile, member: tarfile.TarInfo, extension: str) -> tuple[int, int, int]:
    blocks = -(-member.size // tarfile.BLOCKSIZE)
    label = class_number(content(tar, member)) if extension == "cls" else -1
    return member.offset, member.offset_data + blocks * tarfile.BLOCKSIZE, label


def _read(path: Path) -> np.ndarray | None:
    """None if it is not there, or not what was written."""
    try:
        content = path.read_bytes()
        whole = content[-SEAL:] == hashlib.blake2b(content[:-SEAL], digest_size=SEAL).digest()
        return np.load(io.BytesIO(content)) if whole else None
    except (OSError, ValueError, EOFError):
        return None


def _write(path: Path, rows: np.ndarray) -> None:
    partial = path.with_name(f"{PARTIAL}{path.name}")
    content = io.BytesIO()
    np.save(content, rows)
    partial.write_bytes(content.getvalue() + hashlib.blake2b(content.getvalue(), digest_size=SEAL).digest())
    replace(partial, path)
