#!/usr/bin/env python
"""Everything that a CUDA device can get wrong, checked against the CPU, and then the benchmarks on it.

    python scripts/gpu_check.py                                  # make gpu-check
    python scripts/gpu_check.py --only assignment look_ahead     # some of it
    python scripts/gpu_check.py --skip_benchmarks

The checks are the tests of tests/gpu with a real device; each runs in a process of its own, so that one that takes the device down does
not take the others with it. What is printed goes into gpu-<device>.txt in the output folder too, the table of results into
gpu-<device>.csv and, with the versions, gpu-<device>.md. The exit code is 1 if anything failed, 0 otherwise. Without a device this only
says what it would run.
"""

from __future__ import annotations

import argparse
import csv
import io
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TextIO

import torch
from benchmark_device import as_slug

from immiscible.errors import UserError, run_script

ROOT = Path(__file__).resolve().parent.parent
HOURS = 2  # after which a part is taken to hang
REPORTED = ("immiscible", "torch", "numpy", "scipy", "numba", "diffusers", "transformers", "accelerate", "bitsandbytes")


@dataclass(frozen=True)
class Check:
    """Some of the tests of tests/gpu.

    Args:
        about: what they compare.
        tests: the files, or ``file::test``, below tests/gpu.
        minutes: about, of a busy H200.
    """

    about: str
    tests: tuple[str, ...]
    minutes: float

    def command(self, report: Path) -> list[str]:
        """Runs them; the outcome of each goes into ``report``."""
        tests = [f"tests/gpu/{name}" for name in self.tests]
        # The plug-in for several processes is left out: they would share the device.
        return [sys.executable, "-m", "pytest", "-m", "gpu", "-v", "-p", "no:xdist", f"--junitxml={report}", *tests]


@dataclass(frozen=True)
class Benchmark:
    """A benchmark script on the device.

    Args:
        about: what it measures.
        script: in scripts/.
        words: its flags.
        minutes: a guess; none has been timed on a GPU.
        writes: whether it takes ``--output_dir``.
    """

    about: str
    script: str
    words: tuple[str, ...]
    minutes: float
    writes: bool = True

    def command(self, output_dir: Path) -> list[str]:
        """Runs it."""
        written = ["--output_dir", str(output_dir)] if self.writes else []
        return [sys.executable, f"scripts/{self.script}", *self.words, "--device", "cuda", *written]


CHECKS = {
    "assignment": Check("assign and certified_assignment: every metric and dtype, N = 2 to 4096", ("test_engine.py::test_assignment",), 1),
    "solve": Check(
        "solve on a cost of the device; a broken image is named",
        ("test_engine.py::test_solve", "test_engine.py::test_a_broken_image_is_named"),
        1,
    ),
    "costs": Check(
        "costs and fixed point against float64 and their compiled twins",
        ("test_engine.py::test_costs", "test_engine.py::test_costs_from_products", "test_engine.py::test_fixed_point"),
        1,
    ),
    "couplings": Check("assignment under every condition, nearest, reservoir, all with their states", ("test_couplings.py",), 1),
    "axes": Check(
        "noise process, timestep laws, loss weights, draws",
        tuple(f"test_axes.py::test_{name}" for name in ("process", "weights", "sampler", "draws")),
        1,
    ),
    "default_device": Check(
        "the library under torch.set_default_device",
        ("test_axes.py::test_couplings_under_a_default_device", "test_axes.py::test_laws_under_a_default_device"),
        1,
    ),
    "look_ahead": Check(
        "training with look-ahead on its own stream: the same bits as without",
        ("test_gpu_training.py::test_look_ahead", "test_gpu_training.py::test_another_seed_trains_other_weights"),
        1,
    ),
    "half_precision": Check(
        "training and fine-tuning in fp16 and bf16",
        ("test_gpu_training.py::test_half_precision", "test_gpu_training.py::test_fine_tuning_in_half_precision"),
        3,
    ),
    "resume": Check("killed and resumed: the same bits as never killed", ("test_gpu_training.py::test_resume",), 2),
    "step_memory": Check("the memory of a step that a plan predicts, against torch's allocator", ("test_step_memory.py",), 1),
    "compile": Check("--torch_compile", ("test_gpu_training.py::test_compiled",), 2),
    "adam_8bit": Check("--use_8bit_adam, where bitsandbytes is installed", ("test_gpu_training.py::test_adam_in_8_bits",), 1),
}
BENCHMARKS = {
    "assignment_time": Benchmark(
        "time of an assignment, N = 256 to 16384",
        "benchmark_assignment.py",
        ("--sizes", "256", "1024", "4096", "16384", "--dimensions", "3072"),
        40,
    ),
    "exposed_time": Benchmark("what assignment adds to a step under look-ahead", "benchmark_look_ahead.py", (), 6),
    "step_ratio": Benchmark(
        "a step against one of plain diffusers", "benchmark_step.py", ("--batch", "128", "--preset", "unet-cifar10"), 4, writes=False
    ),
}
PARTS: dict[str, Check | Benchmark] = {**CHECKS, **BENCHMARKS}


@dataclass(frozen=True)
class Outcome:
    """A line of the table.

    Args:
        name: of the part.
        result: ``passed``, ``failed`` or ``skipped``.
        why: how many tests, or the first reasons; empty where there is nothing to say.
        seconds: it took.
    """

    name: str
    result: str
    why: str
    seconds: float


class Transcript:
    """What is printed, printed and written to a file."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def write(self, line: str = "") -> None:
        """A line of it."""
        print(line, flush=True)
        self._file.write(line + "\n")
        self._file.flush()

    def pass_on(self, text: str) -> None:
        """Part of a line that will be written over, such as a progress bar: printed alone."""
        print(text, end="", flush=True)


def device_facts() -> dict[str, str] | None:
    """The device and what drives it, in words by name; None without one."""
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "device": properties.name,
        "memory": f"{properties.total_memory / 2**30:.1f} GiB",
        "compute capability": f"{properties.major}.{properties.minor}",
        "driver": _driver(),
        "CUDA of torch": str(torch.version.cuda),
        "cuDNN": str(torch.backends.cudnn.version()),
        "Python": f"{platform.python_version()} on {platform.system()}",
        "packages": ", ".join(f"{name} {_version(name)}" for name in REPORTED),
    }


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return "unknown (no nvidia-smi)"
    return found[0] if found else "unknown"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def run_part(name: str, output_dir: Path, transcript: Transcript) -> Outcome:
    """Runs a part to its end, passing on what it prints."""
    part = PARTS[name]
    transcript.write(f"\n== {name}: {part.about}")
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = part.command(report if isinstance(part, Check) else output_dir)
        transcript.write("$ " + " ".join(["python", *command[1:]]))
        start = time.monotonic()
        code = stream(command, transcript)
        took = time.monotonic() - start
        if isinstance(part, Benchmark):
            return Outcome(name, "failed" if code else "passed", f"exit code {code}" if code else "", took)
        return judged(name, report, code, took)


def stream(command: Sequence[str], transcript: Transcript) -> int:
    """Runs a command in the repository's root, line by line into the transcript; its exit code, negative for a signal."""
    env = {**os.environ, "PYTHONUNBUFFERED": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    timer = threading.Timer(3600 * HOURS, process.kill)
    timer.start()
    try:
        assert process.stdout is not None
        for piece in io.TextIOWrapper(process.stdout, errors="replace", newline=""):  # ends where the terminal's line begins anew too
            if piece.endswith("\r"):
                transcript.pass_on(piece)
            else:
                transcript.write(piece.rstrip("\r\n"))
        return process.wait()
    finally:
        timer.cancel()
        process.kill()


def judged(name: str, report: Path, code: int, took: float) -> Outcome:
    """The outcome of a check from pytest's own report and exit code; a check of which nothing ran has failed unless all was skipped."""
    if not report.exists() or code not in (0, 1):
        ended = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
        return Outcome(name, "failed", f"pytest ended with {ended}" + ("" if report.exists() else " and left no report"), took)
    found: Counter[str] = Counter()
    reasons: dict[str, list[str]] = {"failed": [], "skipped": []}
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        bad, skipped = case.find("failure"), case.find("skipped")
        bad = case.find("error") if bad is None else bad
        kind = "failed" if bad is not None else "skipped" if skipped is not None else "passed"
        found[kind] += 1
        element = bad if bad is not None else skipped
        if element is not None:
            said = (element.get("message") or "").strip().splitlines()
            reasons[kind].append(f"{case.get('name')}: {said[0] if said else 'no message'}" if kind == "failed" else (said or ["?"])[0])
    result = "failed" if found["failed"] or code or not found else "passed" if found["passed"] else "skipped"
    counted = ", ".join(f"{count} {kind}" for kind, count in found.items()) or "no test was found"
    why = list(dict.fromkeys(reasons["failed"] or reasons["skipped"]))
    return Outcome(name, result, "; ".join([counted, *why[:3]]), took)


def chosen(only: Sequence[str] | None, skip_benchmarks: bool) -> list[str]:
    """The names of what is to run, in the order in which it runs.

    Raises:
        UserError: a name is unknown, or nothing is left.
    """
    unknown = [name for name in only or () if name not in PARTS]
    if unknown:
        raise UserError(f"--only {unknown[0]!r} is unknown; known: {', '.join(PARTS)}")
    names = [name for name in PARTS if (only is None or name in only) and not (skip_benchmarks and name in BENCHMARKS)]
    if not names:
        raise UserError("nothing is left to run: --only names benchmarks alone, and --skip_benchmarks leaves them out")
    return names


def plan(names: Sequence[str]) -> str:
    """What is about to run, a line each."""
    lines = [f"{'':<4}{name:<17}{PARTS[name].minutes:>4g} min  {PARTS[name].about}" for name in names]
    total = sum(PARTS[name].minutes for name in names)
    return "\n".join(
        [*lines, f"{len(names)} parts, about {total:g} minutes (a guess for the benchmarks, which have not been timed on a GPU)"]
    )


def table(outcomes: Sequence[Outcome]) -> str:
    """Aligned text."""
    return "\n".join(f"{each.name:<17}{each.result:<9}{each.seconds:>7.0f} s  {each.why}".rstrip() for each in outcomes)


def write_results(outcomes: Sequence[Outcome], facts: dict[str, str], stem: Path, words: Sequence[str]) -> None:
    """The table as CSV, and as markdown with what it was measured on."""
    with stem.with_name(f"{stem.name}.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["part", "result", "seconds", "why"])
        writer.writerows([each.name, each.result, f"{each.seconds:.1f}", each.why] for each in outcomes)
    lines = [f"# {facts['device']}", "", f"`{' '.join(['python scripts/gpu_check.py', *words])}`", ""]
    lines += [f"- {name}: {value}" for name, value in facts.items()]
    lines += ["", "| part | result | seconds | what it is | why |", "|---|---|---|---|---|"]
    for each in outcomes:
        why = each.why.replace("|", "\\|")
        lines.append(f"| {each.name} | {each.result} | {each.seconds:.0f} | {PARTS[each.name].about} | {why} |")
    lines += ["", f"All that was printed, the benchmarks' tables included: `{stem.name}.txt`."]
    stem.with_name(f"{stem.name}.md").write_text("\n".join(lines) + "\n")


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help=f"run these: {', '.join(PARTS)}")
    parser.add_argument("--skip_benchmarks", "--skip-benchmarks", action="store_true")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "benchmarks", help="of the results, and of those of the benchmarks")
    arguments = parser.parse_args(argv)
    names = chosen(arguments.only, arguments.skip_benchmarks)
    facts = device_facts()
    if facts is None:
        print(f"With a CUDA device this would run:\n{plan(names)}")
        print(f"No CUDA device is visible to torch {torch.__version__}: nothing was run, nothing was checked.")
        return
    check_all(names, facts, arguments.output_dir.resolve(), argv)


def check_all(names: Sequence[str], facts: dict[str, str], output_dir: Path, words: Sequence[str]) -> None:
    """Says what it runs, runs it, and writes what came of it.

    Raises:
        UserError: (exit code 1) something failed.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    stem = output_dir / f"gpu-{as_slug(facts['device'])}"
    outcomes: list[Outcome] = []
    with stem.with_name(f"{stem.name}.txt").open("w") as file:
        transcript = Transcript(file)
        for name, value in facts.items():
            transcript.write(f"{name:<20}{value}")
        transcript.write(f"\nThis runs:\n{plan(names)}")
        for number, name in enumerate(names, start=1):
            outcomes.append(run_part(name, output_dir, transcript))
            transcript.write(f"[{number}/{len(names)}] {table(outcomes[-1:])}")
            write_results(outcomes, facts, stem, words)  # as far as it came, should it be stopped
        transcript.write(f"\n{table(outcomes)}")
        transcript.write(f"\n{stem}.txt, .csv, .md")
    failed = [each.name for each in outcomes if each.result == "failed"]
    if failed:
        raise UserError(f"{len(failed)} of {len(outcomes)} parts failed on {facts['device']}: {', '.join(failed)}", exit_code=1)


if __name__ == "__main__":
    sys.exit(run_script(main))
