"""Runs a script with kernels that give the same bits each time, and says at its end how much memory of a GPU it used:

python tests/gpu/deterministic.py train_unconditional.py --flag value
"""

from __future__ import annotations

import atexit
import os
import runpy
import sys

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when the first handle is made

import torch

MEMORY = "bytes of GPU memory at most"


def repeatable() -> None:
    """From here on; kernels that have no such form warn."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False


def tell() -> None:
    used = torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else 0
    sys.stderr.write(f"\n{used} {MEMORY}\n")


if __name__ == "__main__":
    repeatable()
    atexit.register(tell)
    sys.argv = sys.argv[1:]
    sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
    runpy.run_path(sys.argv[0], run_name="__main__")
