"""WebDataset shards: tar files in which the members of one sample stand together, ``000000042.jpg``, ``.txt``, ``.json``, ``.cls``.

So write img2dataset, webdataset and most data sets of the size of LAION. Nothing is unpacked, and a tar is read forward only; what is
done with its samples is told in `immiscible.data.shards` and `immiscible.data.streaming`.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import IO, Any, TypeVar

from PIL import Image

from immiscible.data.sources import captions_in, image_extensions, open_image, size_in_header
from immiscible.errors import UserError

LARGEST_CLASS = 999_999  # a longer number in .cls is no class but some identifier
LOOKED_AT = 32  # samples, of which one must have what the run needs
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd"}  # by how a file begins

Taken = TypeVar("Taken")


class DamagedShard(Exception):
    """A tar that is cut off or broken; the message says where."""


@dataclass(frozen=True)
class Columns:
    """Which members of a sample are its image and its caption.

    Args:
        image: ``image`` for the first member with one of `image_extensions`, else the extension itself, such as ``png``.
        caption: ``text`` or ``txt`` for the ``.txt`` member, a name that ends in ``.txt`` for the member so called, else a key of the
            ``.json`` member; None if the run does without.
    """

    image: str = "image"
    caption: str | None = None

    def is_image(self, extension: str) -> bool:
        """Whether a member so named is the image."""
        return extension in image_extensions() if self.image == "image" else extension == self.image

    def is_used(self, extension: str) -> bool:
        """Whether a run needs a member so named."""
        return self.is_image(extension) or extension in ("cls", self.caption_member)

    @property
    def caption_member(self) -> str | None:
        """The extension of the member that holds the caption."""
        if self.caption in ("text", "txt"):
            return "txt"
        return self.caption if not self.caption or self.caption.endswith(".txt") else "json"


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
        return open_image(self._image())

    def size(self) -> tuple[int, int]:
        """Height and width; see `size_in_header`.

        Raises:
            ValueError: the sample has no image.
        """
        return size_in_header(self._image())

    def _image(self) -> io.BytesIO:
        for extension, content in self.members.items():
            if self.columns.is_image(extension):
                return io.BytesIO(content)
        raise ValueError(f"it has no image (only {', '.join(self.members) or 'nothing'})")

    def label(self) -> int:
        """The class, from ``.cls``.

        Raises:
            ValueError: there is none, or it is not a number from 0.
        """
        label = class_number(self.members.get("cls", b""))
        if label < 0:
            raise ValueError(f"it has no class (a .cls member with a number from 0 to {LARGEST_CLASS})")
        return label

    def captions(self) -> list[str]:
        """The captions, one at least.

        Raises:
            ValueError: there are none.
        """
        member, column = self.columns.caption_member, self.columns.caption
        content = self.members.get(member or "")
        texts = None if content is None else captions_of_file(content, column if member == "json" else None)
        if texts is None:
            raise ValueError(f"it has no caption (--caption_column {column}: {caption_place(self.columns)})")
        return texts


def caption_place(columns: Columns) -> str:
    """Where captions are looked for, in words."""
    member = columns.caption_member
    return f"the key {columns.caption!r} of its .json member" if member == "json" else f"its .{member} member"


def captions_of_file(content: bytes, key: str | None) -> list[str] | None:
    """The captions in a file that belongs to one image; None if there are none.

    Args:
        content: of the file: a text, or with ``key`` JSON.
        key: where in the JSON the captions are.

    Raises:
        ValueError: it is no UTF-8, or no JSON.
    """
    found: Any = content.decode("utf-8-sig")
    if key is not None:
        found = json.loads(found) if found.strip() else None
        found = found.get(key) if isinstance(found, dict) else None
    texts = captions_in(found)
    return None if texts is None else [text.strip() for text in texts]


def class_number(content: bytes) -> int:
    """The number in a ``.cls`` member; -1 if there is none."""
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
        file.seek(0)
        beginning = file.read(tarfile.BLOCKSIZE)
        kind = next((name for mark, name in COMPRESSED.items() if beginning.startswith(mark)), "")
        raise DamagedShard(f"it is compressed ({kind}) and no plain tar: decompress it" if kind else str(error)) from None
    file.seek(end)
    if file.read(tarfile.BLOCKSIZE).strip(b"\0"):  # tarfile takes a header that it cannot read for the end
        what = "cut off" if size - end < tarfile.BLOCKSIZE else "broken"
        raise DamagedShard(f"it is {what} at byte {end}, where the next member should begin")


def content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    """A member's bytes."""
    file = tar.extractfile(member)
    return file.read() if file else b""


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
