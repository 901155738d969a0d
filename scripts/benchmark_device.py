"""The device that a benchmark runs on: its name, its clock, its memory."""

from __future__ import annotations

import platform
import re
import time
from argparse import ArgumentParser
from collections.abc import Callable
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from accelerate import Accelerator

CPU_FEATURES = {
    "avx512_f": "AVX-512",
    "avx2": "AVX2",
    "avx512_bf16": "bf16",
    "avx512_vnni": "VNNI",
    "avx_vnni": "AVX-VNNI",
    "amx_bf16": "AMX",
}


def add_device(parser: ArgumentParser) -> None:
    """``--device``, a GPU where there is one."""
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1, ...")


def accelerator_on(device: torch.device, **words: Any) -> Accelerator:
    """accelerate's, on ``device`` and nowhere else."""
    from accelerate import Accelerator

    if device.type == "cuda":
        torch.cuda.set_device(device)
    accelerator = Accelerator(cpu=device.type == "cpu", **words)
    assert accelerator.device.type == device.type, f"accelerate is configured for {accelerator.device}"
    return accelerator


def processor(device: torch.device) -> str:
    """What computes, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    known: Callable[[], dict[str, Any]] = getattr(torch.cpu, "get_capabilities", dict)
    return f"{platform.machine()} with {', '.join(name for key, name in CPU_FEATURES.items() if known().get(key))}, one core"


def slug(device: torch.device) -> str:
    """The device in the name of a file: ``cpu``, or a GPU's own name."""
    return as_slug(torch.cuda.get_device_name(device)) if device.type == "cuda" else device.type


def as_slug(name: str) -> str:
    """A name in small letters, digits and hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def versions() -> str:
    """What computes with it."""
    return ", ".join([f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in ("torch", "numpy", "scipy", "numba"))])


def synchronize(device: torch.device) -> None:
    """Waits for all that was asked of a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def milliseconds(work: Callable[[], Any], device: torch.device) -> float:
    """What ``work`` takes, with the work that it leaves to the device."""
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return 1000 * (time.perf_counter() - start)


def most_memory(device: torch.device) -> float:
    """MiB that this process has held at its peak: on a GPU of tensors, on a CPU of everything."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    from immiscible.training.summary import peak_memory

    return peak_memory()
