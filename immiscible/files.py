"""Files that survive: written beside their final name and renamed, deleted so that no half of them stays under it.

A kill at any moment leaves what was there before or what was to come. What it leaves beside, under names that begin with `PARTIAL` or
`DISCARDED`, `clean_up` removes.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from immiscible.errors import UserError

PARTIAL, DISCARDED = ".partial-", ".discarded-"
LOCK = ".immiscible-lock"  # in a folder that one process at a time may write; it stays there
SPARE = 2**20  # bytes; a disk with less is full


def cache_folder() -> Path:
    """Where what can be made or fetched again is kept from one run to the next: ``immiscible`` in ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "immiscible"


def replace(new: Path, target: Path) -> None:
    """Renames ``new`` to ``target``, whose old content is discarded only when the new stands complete beside it."""
    flush(new)
    if target.is_dir() or target.is_symlink():
        discard(target)
    os.replace(new, target)
    _flush_one(target.parent)


def discard(path: Path) -> None:
    """Deletes a file or folder so that a kill in between cannot leave half of it under its name."""
    doomed = path.with_name(f"{DISCARDED}{path.name}")
    if doomed.exists():
        clean_up(path.parent)
    path.rename(doomed)
    _delete(doomed)


def clean_up(folder: Path) -> None:
    """Removes what a killed process left half written or half deleted."""
    for path in [*folder.glob(f"{PARTIAL}*"), *folder.glob(f"{DISCARDED}*")]:
        _delete(path)


def flush(path: Path) -> None:
    """Forces a file, or all files of a folder, to the disk, readable as the umask says (safetensors makes its files private)."""
    umask = os.umask(0)
    os.umask(umask)
    for item in [path, *path.rglob("*")]:
        if item.is_file():
            item.chmod(0o666 & ~umask)
        _flush_one(item)


def lock(folder: Path, flag: str) -> Any:
    """Takes the lock of a folder, which is there; it is held until the process ends or the returned lock is released.

    Args:
        folder: what nobody else may write meanwhile.
        flag: what names it, such as ``--output_dir``.

    Raises:
        UserError: (exit code 1) another process holds it, or the folder cannot be written.
    """
    from filelock import FileLock, Timeout

    held = FileLock(folder / LOCK, timeout=0)
    try:
        held.acquire()
    except Timeout:
        raise UserError(f"{flag} {folder} is in use by another process; wait for its end, or give another folder", exit_code=1) from None
    except OSError as error:
        raise UserError(f"{flag} {folder} cannot be written: {error.strerror or error}", exit_code=1) from None
    return held


@contextmanager
def full_disk(path: Path) -> Iterator[None]:
    """Inside the block torch's way of failing on a full disk, a `RuntimeError` that does not say why, is an `OSError` that does.

    Args:
        path: a file or folder on the disk that is written to.
    """
    try:
        yield
    except RuntimeError:
        if shutil.disk_usage(path).free > SPARE:
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from None


def file_facts(path: Path) -> dict[str, Any]:
    """``{"bytes": size, "sha256": hexadecimal digest}`` of a file, which is read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def append_line(path: Path, line: dict[str, Any]) -> None:
    """Adds a line to a ``.jsonl`` file."""
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a run's ``.jsonl`` file, none if it is not there; a half-written last line is left out.

    Raises:
        UserError: (exit code 1) it cannot be read, or another line than the last is no JSON object.
    """
    try:
        texts = path.read_bytes().split(b"\n") if path.exists() else []
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}", exit_code=1) from None
    lines = []
    for number, text in enumerate(texts, 1):
        try:
            line = json.loads(text.decode())
        except (ValueError, RecursionError):
            if number == len(texts):  # what a kill has cut, or nothing after the last line's end
                break
            line = None
        if not isinstance(line, dict):
            raise UserError(f"{path} is damaged: line {number} is no JSON object; remove that line, or the file", exit_code=1)
        lines.append(line)
    return lines


def drop_later_lines(path: Path, start_step: int) -> list[dict[str, Any]]:
    """Leaves and returns the lines of steps up to ``start_step``: a killed run may have written on after its last checkpoint.

    Raises:
        UserError: (exit code 1) what `read_lines` raises, or a line does not say its step.
    """
    lines = read_lines(path)
    for number, line in enumerate(lines, 1):
        if not isinstance(line.get("step"), int | float):
            raise UserError(f"{path} is damaged: line {number} has no `step`; remove that line, or the file", exit_code=1)
    kept = [line for line in lines if line["step"] <= start_step]
    partial = path.with_name(f"{PARTIAL}{path.name}")
    partial.write_text("".join(json.dumps(line) + "\n" for line in kept))
    replace(partial, path)
    return kept


def _delete(path: Path) -> None:
    """A link is removed, never what it points to."""
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _flush_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
