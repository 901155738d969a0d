"""Caches of latents."""

from __future__ import annotations

import hashlib
import importlib
import sys
from pathlib import Path

import torch
from launch import ROOT

PRECOMPUTE = "scripts/precompute_latents.py"


def module(path: str):
    folder, name = (ROOT / path).parent, Path(path).stem
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    return importlib.import_module(name)


def precompute(words: list[str], rows_per_shard: int = 5) -> None:
    module(PRECOMPUTE).main([*words, "--rows_per_shard", str(rows_per_shard), "--encode_batch_size", "4"])


def close(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Up to the rounding to fp16 of what goes into it."""
    return torch.allclose(found.float(), wanted.float(), rtol=2**-9, atol=2**-9)


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}
