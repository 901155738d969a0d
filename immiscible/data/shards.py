"""WebDataset shards: tar files in which the members of one sample stand together, ``000000042.jpg``, ``.txt``, ``.json``, ``.cls``.

So write img2dataset, webdataset and most data sets of the size of LAION. Nothing is unpacked. Local shards are indexed once (where each
sample begins and ends, 16 bytes of memory each), and then are read in any order, as any other `ImageSource`: any number of loader
workers and ranks, an exact resume. What cannot be indexed is streamed, see `immiscible.data.streaming`.
"""

from __future__ import annotations

import glob
import hashlib
import io
import json
import logging
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np
from PIL import Image
from tqdm import tqdm

from immiscible.data.sources import open_image
from immiscible.errors import UserError

logger = logging.getLogger(__name__)

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm", "jp2")
INDEX_FORMAT = 1  # goes up when an index holds something else, so that old ones are not read
LARGEST_CLASS = 999_999  # a longer number in .cls is no class but some identifier
LOOKED_AT = 32  # samples, of which one must have what the run needs

Taken = TypeVar("Taken")


class DamagedShard(Exception):
    """A tar that is cut off or broken; the message says where."""


@dataclass(frozen=True)
class Columns:
    """Which members of a sample are its image and its caption.

    Args:
        image: ``image`` for the first member with one of `IMAGE_EXTENSIONS`, else the extension itself, such as ``png``.
        caption: ``text`` or ``txt`` for the ``.txt`` member, else a key of the ``.json`` member; None if the run does without.
    """

    image: str = "image"
    caption: str | None = None

    def is_image(self, extension: str) -> bool:
        """Whether a member so named is the image."""
        return extension in IMAGE_EXTENSIONS if self.image == "image" else extension == self.image

    def is_used(self, extension: str) -> bool:
        """Whether a run needs a member so named."""
        return self.is_image(extension) or extension in ("cls", self.caption_member)

    @property
    def caption_member(self) -> str | None:
        """The extension of the member that holds the caption."""
        return self.caption and ("txt" if self.caption in ("text", "txt") else "json")


@dataclass(frozen=True)
class TarSample:
    """One sample of a shard.

    Args:
        shard: the tar file's path or address.
        key: what the names of its members have in common.
        members: the content of each, by extension.
        columns: which of them are read.
    """

    shard: str
    key: str
    members: Mapping[str, bytes]
    columns: Columns

    @property
    def name(self) -> str:
        """What a user needs to find it."""
        return f"{self.key} in {self.shard}"

    def load(self) -> Image.Image:
        """The decoded image; see `open_image`.

        Raises:
            ValueError: the sample has none.
        """
        for extension, content in self.members.items():
            if self.columns.is_image(extension):
                return open_image(io.BytesIO(content))
        raise ValueError(f"it has no image (only {', '.join(self.members) or 'nothing'})")

    def label(self) -> int:
        """The class, from ``.cls``.

        Raises:
            ValueError: there is none, or it is not a number from 0.
        """
        label = _class_number(self.members.get("cls", b""))
        if label < 0:
            raise ValueError(f"it has no class (a .cls member with a number from 0 to {LARGEST_CLASS})")
        return label

    def captions(self) -> list[str]:
        """The captions, one at least.

        Raises:
            ValueError: there are none.
        """
        member, column = self.columns.caption_member, self.columns.caption
        found: Any = self.members.get(member or "", b"").decode()
        if member == "json" and found:
            found = json.loads(found)
            found = found.get(column) if isinstance(found, dict) else None
        texts = [found] if isinstance(found, str) else found
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text.strip() for text in texts):
            raise ValueError(f"it has no caption (--caption_column {column}: {caption_place(self.columns)})")
        return [text.strip() for text in texts]


def caption_place(columns: Columns) -> str:
    """Where captions are looked for, in words."""
    return "its .txt member" if columns.caption_member == "txt" else f"the key {columns.caption!r} of its .json member"


def _class_number(content: bytes) -> int:
    """-1 if it is none."""
    digits = content.strip()
    return int(digits) if digits.isdigit() and len(digits) <= len(str(LARGEST_CLASS)) else -1


def tar_samples(file: IO[bytes], take: Callable[[tarfile.TarFile, tarfile.TarInfo, str], Taken]) -> Iterator[tuple[str, dict[str, Taken]]]:
    """The samples of a tar, in its order and reading forward only: each one's key and, by extension, what ``take`` makes of its members.

    A member's extension is all after the first dot of its file name, in lower case; hidden files belong to no sample.

    Raises:
        DamagedShard: the tar is cut off or broken. A sample that may have lost members by it was not given.
    """
    key, taken = "", dict[str, Taken]()
    size = file.seek(0, os.SEEK_END)
    for tar, member in _members(file, size):
        folder, file_name = os.path.split(member.name)
        stem, _, extension = file_name.partition(".")
        if not stem:
            continue
        found, extension = os.path.join(folder, stem), extension.lower()
        if found != key or extension in taken:
            if taken:
                yield key, taken
            key, taken = found, {}
        if member.offset_data + member.size > size:
            raise DamagedShard(f"it is cut off at byte {size}, in member {member.name}")
        taken[extension] = take(tar, member, extension)
    if taken:
        yield key, taken


def _members(file: IO[bytes], size: int) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    file.seek(0)
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if member.isfile():
                    yield tar, member
            end = tar.offset
    except tarfile.TarError as error:
        raise DamagedShard(str(error)) from None
    file.seek(end)
    if file.read(tarfile.BLOCKSIZE).strip(b"\0"):  # tarfile takes a header that it cannot read for the end
        what = "cut off" if size - end < tarfile.BLOCKSIZE else "broken"
        raise DamagedShard(f"it is {what} at byte {end}, where the next member should begin")


def content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    """A member's bytes."""
    file = tar.extractfile(member)
    return file.read() if file else b""


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


def tar_files(root: Path) -> list[str]:
    """The paths of a folder's shards at any depth, in the order of their names."""
    return sorted(str(root / file) for file in glob.glob("**/*.tar", root_dir=root, recursive=True))


def load_shards(
    folder: str,
    image_column: str = "image",
    label_column: str | None = None,
    labels_for: str | None = None,
    caption_column: str | None = None,
    cache_dir: str | None = None,
    skip_bad_images: bool = False,
) -> ShardImages:
    """The images of a folder's ``.tar`` files at any depth; their index is made once for each shard and kept in the cache folder.

    Args:
        folder: of the shards.
        image_column: see `Columns`.
        label_column: ``cls`` or None: classes are the numbers in ``.cls`` members.
        labels_for: the flag that needs classes; None if the run does without.
        caption_column: see `Columns`.
        cache_dir: the index goes into its ``tar-index``; None for the cache folder of `datasets`.
        skip_bad_images: use what stands before the damage of a damaged shard, with a warning.

    Raises:
        UserError: a shard is damaged, no sample, or the first ones have no image, class or caption where one is needed.
    """
    root = Path(folder).expanduser().resolve()
    columns = Columns(image_column, caption_column)
    check_label_column(label_column, caption_column)
    shards = tar_files(root)
    # The parquet files that img2dataset writes are named after their shards, and hold no images.
    tables = {Path(file).with_suffix(".tar").name for file in glob.glob("**/*.parquet", root_dir=root, recursive=True)}
    if not tables <= {Path(shard).name for shard in shards} | {"metadata.tar"}:
        raise UserError(f"--train_data_dir {folder} holds both .tar and .parquet files of images; give a folder with one of them")
    table = _indexed(shards, _index_folder(cache_dir), skip_bad_images)
    if not any(map(len, table)):
        raise UserError(f"--train_data_dir {folder}: its {len(shards)} .tar files hold no samples")
    rows = np.concatenate(table)
    names = [f"{os.path.relpath(shard, root)} {len(found)}" for shard, found in zip(shards, table, strict=True)]
    digest = hashlib.blake2b("\n".join(names).encode(errors="surrogateescape"), digest_size=8).hexdigest()
    classes = int(rows[:, 2].max()) + 1
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


def check_label_column(label_column: str | None, caption_column: str | None) -> None:
    """Raises `UserError` if a column of classes is named that shards do not have.

    The scripts for text name one column for both, which is the caption's here.
    """
    if label_column not in (None, "cls", caption_column):
        raise UserError(f"--label_column {label_column!r}: the classes of tar shards are the numbers in their .cls members; leave it out")


def check_first(samples: Iterable[TarSample], origin: str, labels_for: str | None) -> None:
    """Looks whether one of the first samples has what the run needs, before anything is begun; others may be bad images.

    Raises:
        UserError: all lack an image, a class or a caption; it says what the last has instead.
    """
    problem: UserError | None = None
    for sample in islice(samples, LOOKED_AT):
        try:
            _check(sample, origin, labels_for)
        except UserError as error:
            problem = error
        else:
            return
    if problem:
        raise problem


def _check(sample: TarSample, origin: str, labels_for: str | None) -> None:
    has = f"its sample {sample.name} has the members {', '.join(sample.members)}"
    if not any(map(sample.columns.is_image, sample.members)):
        raise UserError(f"--image_column {sample.columns.image!r}: no such image in {origin}; {has}")
    if labels_for and "cls" not in sample.members:
        raise UserError(f"{labels_for} needs classes, which tar shards have in .cls members; {origin} has none: {has}")
    if sample.columns.caption is not None:
        try:
            sample.captions()
        except ValueError:
            if "json" in sample.members:
                has += f", and .json the keys {', '.join(_json_keys(sample.members['json']))}"
            if sample.columns.caption_member not in sample.members or sample.columns.caption_member == "json":
                raise UserError(
                    f"--caption_column {sample.columns.caption!r} means {caption_place(sample.columns)}, not found in {origin}; {has}"
                ) from None


def _json_keys(content: bytes) -> list[str]:
    try:
        return list(json.loads(content))
    except (ValueError, TypeError):
        return ["(not readable)"]


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
    label = _class_number(content(tar, member)) if extension == "cls" else -1
    return member.offset, member.offset_data + blocks * tarfile.BLOCKSIZE, label


def _read(path: Path) -> np.ndarray | None:
    """None if it is not there, or not whole."""
    try:
        return np.load(path)
    except (OSError, ValueError, EOFError):
        return None


def _write(path: Path, rows: np.ndarray) -> None:
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        np.save(file, rows)
    partial.replace(path)
