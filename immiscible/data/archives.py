"""Files inside of ``.zip`` archives, read where they are: an archive in a path is a folder, as in ``/data/photos.zip/cats/1.png``.

Nothing is unpacked. A member is read as a whole, at random; each process opens an archive for itself, as a file position that processes
share would be moved by all of them.
"""

from __future__ import annotations

import io
import os
import re
from functools import lru_cache
from pathlib import Path
from zipfile import BadZipFile, ZipFile

ZIP = ".zip"
OPEN_AT_ONCE = 64  # archives in a process

_THROUGH = re.compile(rf"{re.escape(ZIP)}(?={re.escape(os.sep)})", re.IGNORECASE)


def members(archive: Path) -> tuple[list[str], list[str]]:
    """The paths of an archive's files in it, and the names of others that are none (``../a``, ``/a``, ``a//b``), both sorted.

    Those that are hidden or lie in a folder that is, or begins with two underscores, are in neither.

    Raises:
        ValueError: it cannot be read, or its files are encrypted.
        OSError: likewise.
    """
    try:
        found = _open(str(archive)).infolist()
    except BadZipFile as error:
        raise ValueError(str(error)) from None
    if any(member.flag_bits & 1 for member in found):
        raise ValueError("its files are encrypted")
    names = {member.filename for member in found if not member.is_dir()}
    # An empty part would be lost in a path, and one of dots leads elsewhere.
    strange = {name for name in names if {"", ".", ".."} & set(name.split("/"))}
    shown = {name for name in names - strange if not any(part.startswith((".", "__")) for part in name.split("/"))}
    return sorted(os.path.join(*name.split("/")) for name in shown), sorted(strange)


def readable(path: str) -> str | io.BytesIO:
    """What opens a file: its path, or the content of one in an archive.

    Raises:
        OSError: the archive is not as it was listed.
    """
    archive, member = _parted(path)
    if not member:
        return path
    try:
        return io.BytesIO(_open(archive).read(member))
    except (KeyError, BadZipFile, RuntimeError, NotImplementedError) as error:
        raise OSError(str(error.args[0])) from None


def content(path: Path) -> bytes:
    """A file's bytes; raises as `readable`."""
    file = readable(str(path))
    return Path(file).read_bytes() if isinstance(file, str) else file.getvalue()


def size(path: str) -> int:
    """A file's bytes, unpacked; -1 if there is none."""
    archive, member = _parted(path)
    if not member:
        return os.path.getsize(path) if os.path.isfile(path) else -1
    found = _open(archive).NameToInfo.get(member)
    return found.file_size if found else -1


def _parted(path: str) -> tuple[str, str]:
    """The archive that a path goes through and the name in it; no name if it goes through none."""
    for place in _THROUGH.finditer(path):
        if os.path.isfile(path[: place.end()]):
            return path[: place.end()], path[place.end() + 1 :].replace(os.sep, "/")
    return path, ""


def _open(archive: str) -> ZipFile:
    return _opened(archive, os.stat(archive).st_mtime_ns, os.getpid())


@lru_cache(maxsize=OPEN_AT_ONCE)
def _opened(archive: str, changed: int, process: int) -> ZipFile:
    """Anew where it has changed, and in a process that was forked."""
    return ZipFile(archive)
