"""Tensors that take long to make, in files with their hashes: what is broken is told and made anew, what cannot be written is not kept."""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from immiscible.errors import first_line
from immiscible.files import PARTIAL, replace

logger = logging.getLogger(__name__)


def read_kept(path: Path, use: Callable[[dict[str, Tensor]], None]) -> bool:
    """Hands what is in a file that `write_kept` left to ``use``, which raises where it is something else; whether that went well."""
    if not path.exists():
        return False
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            if (file.metadata() or {}).get("sha256") != _digest(tensors):
                raise ValueError("its contents do not match their hash")
        use(tensors)
    except (OSError, SafetensorError, ValueError, KeyError, RuntimeError) as error:
        logger.warning("%s is broken (%s) and is made anew", path, first_line(error))
        return False
    return True


def write_kept(path: Path, tensors: dict[str, Tensor], what: str) -> None:
    """Writes ``tensors``, called ``what`` where they cannot be. Two processes write equal files; the later one stands."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(dir=path.parent, prefix=PARTIAL)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(save(tensors, metadata={"sha256": _digest(tensors)}))  # one key, for safetensors writes several in any order
            replace(Path(partial), path)
        finally:
            with suppress(FileNotFoundError):
                os.unlink(partial)
    except OSError as error:
        logger.warning("cannot keep %s in %s (%s): made again next time", what, path.parent, error.strerror)


def _digest(tensors: dict[str, Tensor]) -> str:
    return hashlib.sha256(save(tensors)).hexdigest()
