"""Runs of the scripts on a GPU, each in an interpreter of its own: CUDA does not survive a fork."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from deterministic import MEMORY
from launch import ROOT, SCRIPT, Result, Running

WRAPPER = Path(__file__).parent / "deterministic.py"


class RunsOnGPU:
    """As `launch.Scripts`, on the GPU.

    Args:
        folder: for what the runs print.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._processes = folder, dict[int, subprocess.Popen[bytes]]()

    def __call__(self, argv: Iterable[Any], *, timeout: float = 600, **options: Any) -> Result:
        """Runs the script to its end."""
        return self.start(argv, **options).wait(timeout)

    def start(self, argv: Iterable[Any], *, program: str = SCRIPT.name) -> Running:
        folder = self._folder / f"run-{len(self._processes)}"
        folder.mkdir()
        env = {name: value for name, value in os.environ.items() if name != "ACCELERATE_USE_CPU"}
        words = [sys.executable, str(WRAPPER), str(ROOT / program), *map(str, argv)]
        with (folder / "stdout").open("wb") as stdout, (folder / "stderr").open("wb") as stderr:
            process = subprocess.Popen(words, cwd=folder, env=env, stdout=stdout, stderr=stderr, start_new_session=True)
        self._processes[process.pid] = process
        return Running(process.pid, self, folder, program)  # type: ignore[arg-type]

    def ask(self, request: Mapping[str, Any]) -> int | None:
        """What `Running` asks: the exit code as a shell sees it, None while it runs."""
        code = self._processes[request["poll"]].poll()
        return 128 - code if code is not None and code < 0 else code

    def close(self) -> None:
        for process in self._processes.values():
            if process.poll() is None:
                process.kill()
            process.wait()


def gpu_memory(result: Result) -> int:
    """Bytes of GPU memory that a run used at most; 0 if it used none, or did not say so."""
    found = re.findall(rf"(\d+) {MEMORY}", result.stderr)
    return int(found[-1]) if found else 0
