"""Trains the runs of a comparison, several at a time: what is finished is skipped, what fails is noted, what is interrupted saves."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout
from tqdm import tqdm

from immiscible.errors import UserError

POLL_SECONDS = 0.3


@dataclass
class Job:
    """One run of the grid: an arm's name, its folder, its command, and how it goes."""

    arm: str
    folder: Path
    log: Path
    words: list[str]
    settings: str  # the command and the content of its config files: what a finished run must have been trained by
    max_steps: int | None
    process: subprocess.Popen[bytes] | None = None
    log_start: int = 0
    problem: str = ""

    @property
    def record(self) -> Path:
        """Holds the settings of a run that finished."""
        return self.log.with_suffix(".settings")

    def is_finished(self) -> bool:
        """Whether the run was trained to its end by these very settings, so that no process needs to look."""
        return self.has_summary() and self.record.is_file() and self.record.read_text() == self.settings

    def has_summary(self) -> bool:
        """Whether the training script said that the run is finished."""
        return (self.folder / "summary.json").is_file()

    def start(self, environment: dict[str, str]) -> None:
        """Starts the training script, which continues the newest checkpoint if there is one."""
        apart: dict[str, Any] = {"start_new_session": True}  # so that Ctrl-C reaches the comparison alone
        if sys.platform == "win32":
            apart = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
        with self.log.open("ab") as output:
            self.log_start = output.tell()
            self.process = subprocess.Popen(
                [sys.executable, *self.words],
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=environment,
                **apart,
            )

    def settle(self, code: int) -> str:
        """Notes how the process ended; returns the line to show."""
        if code == 0 and self.has_summary():
            self.record.write_text(self.settings)
            return f"{self.folder.name}: finished"
        if code < 0:
            self.problem = f"killed by signal {-code} ({signal.Signals(-code).name}); its log is {self.log}"
        else:
            stopped = code == 0 or code - 128 in (signal.SIGTERM, signal.SIGINT, getattr(signal, "SIGHUP", signal.SIGTERM))
            how = "stopped before its last step" if stopped else f"failed with exit code {code}"
            self.problem = f"{how}: {self.last_words()} (log {self.log})"
        return f"{self.folder.name}: {self.problem}"

    def last_words(self) -> str:
        """The last line that the process wrote, usually its error."""
        with self.log.open("rb") as file:
            file.seek(self.log_start)
            lines = [line.strip() for line in re.split(r"[\r\n]+", file.read().decode(errors="replace"))]
        return next((line[:300] for line in reversed(lines) if line), "it wrote nothing")

    def step(self) -> int:
        """The last step in its metrics.jsonl."""
        try:
            with (self.folder / "metrics.jsonl").open("rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - 4096))
                found = re.findall(rb'^\{"step": (\d+)', file.read(), flags=re.MULTILINE)
        except OSError:
            return 0
        return int(found[-1]) if found else 0


def default_jobs() -> int:
    """How many runs train at a time: as many as the CPU has cores, or one on a GPU."""
    import torch

    return 1 if torch.cuda.is_available() else os.cpu_count() or 1


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """No two comparisons train in one folder, and none while runs of one that was killed still do.

    Raises:
        UserError: (exit code 1) one of them does.
    """
    busy = f"another comparison, or a run that one left behind, is training in {folder}"
    lock = FileLock(folder / "logs" / "lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(busy, exit_code=1) from None
    try:
        if (process := left_behind(folder)) is not None:
            raise UserError(f"{busy} (process {process})", exit_code=1)
        yield
    finally:
        lock.release()


def left_behind(folder: Path) -> int | None:
    """The id of a process that trains a run of a comparison in ``folder``, if there is one.

    A comparison that is killed does not take its runs along. They are found by their command lines, which exist as long as they do,
    and nothing that was written down can be missing or out of date.
    """
    for process in psutil.process_iter(["cmdline", "cwd"]):  # None for what another user hides
        words, place = process.info["cmdline"] or [], process.info["cwd"]
        for flag, value in pairwise(words if place else []):
            run = Path(place, value)
            if flag == "--output_dir" and run.parent.resolve() == folder.resolve() and (folder / "logs" / f"{run.name}.log").exists():
                return int(process.pid)
    return None


def run_all(jobs: Sequence[Job], at_once: int) -> None:
    """Runs what is not finished, ``at_once`` at a time; a run that fails is noted in its job and the others go on.

    Raises:
        UserError: (exit code 1) interrupted by Ctrl-C or SIGTERM; the runs were asked to save and have ended.
    """
    environment = {**os.environ, "TQDM_DISABLE": "1", **({"OMP_NUM_THREADS": "1"} if at_once > 1 else {})}
    waiting = [job for job in jobs if not job.is_finished()]
    if len(waiting) < len(jobs):
        tqdm.write(f"{len(jobs) - len(waiting)} of {len(jobs)} runs are finished already")
    running: list[Job] = []
    total = sum(job.max_steps or 0 for job in jobs) if all(job.max_steps for job in jobs) else None
    done = sum(job.step() for job in jobs)
    with (
        signals_as_interrupt(),
        tqdm(total=total, initial=done, unit="step", desc="training", disable=None) if waiting else nullcontext() as bar,
    ):
        try:
            while waiting or running:
                while waiting and len(running) < at_once:
                    job = waiting.pop(0)
                    running.append(job)
                    job.start(environment)
                time.sleep(POLL_SECONDS)
                for job in list(running):
                    if job.process is not None and (code := job.process.poll()) is not None:
                        running.remove(job)
                        tqdm.write(job.settle(code))
                if bar is not None:
                    bar.n = sum(job.step() for job in jobs)
                    bar.set_postfix_str(", ".join(job.folder.name for job in running))
        except KeyboardInterrupt:
            raise UserError(
                "interrupted; the runs that were going have saved where they could. The same command continues", exit_code=1
            ) from None
        finally:
            stop([job.process for job in running if job.process is not None])


def stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """SIGTERM, at which a run saves at its next step, and wait; a second Ctrl-C kills. Windows has no such signal: it ends them."""
    if processes:
        tqdm.write(f"stopping {len(processes)} runs; they save first (Ctrl-C again: at once, without saving)")
    try:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait()
    except KeyboardInterrupt:
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()


@contextmanager
def signals_as_interrupt() -> Iterator[None]:
    """Inside the block SIGTERM and SIGINT raise `KeyboardInterrupt`.

    SIGINT too: a shell starts background jobs with it ignored, and then not even an explicit ``kill -INT`` would stop the grid.
    """
    before = {number: signal.signal(number, signal.default_int_handler) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
