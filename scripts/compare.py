"""Compares training runs: how many steps and seconds a method saves, with curves, tables and samples in one `report.html`.

It reads finished runs,

    python scripts/compare.py --runs runs/plain runs/coupled --names baseline immiscible

or trains methods x seeds itself, several at a time. The same command continues what was interrupted and skips what is finished:

    python scripts/compare.py --task configs/tasks/digits.yaml --methods baseline immiscible speed immiscible_speed --seeds 0 1 2 \\
        --output_dir runs/compare -- --eval_steps 50 --eval_inference_steps 5 20 --eval_samples 1500

What stands after `--` goes to every run. A method is a name in configs/methods or a path; `a+b` puts two files together, `NAME=a` renames.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import webbrowser
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import IO, Any, NoReturn

import yaml
from tqdm import tqdm

from immiscible.errors import UserError, run_script
from immiscible.reports.comparison import Comparison, compare, group_runs
from immiscible.reports.page import summary, write_report

HERE = Path(__file__).resolve().parent.parent
POLL_SECONDS = 0.3
OURS = ("--config", "--seed", "--output_dir", "--resume_from_checkpoint", "--overwrite_output_dir")


class _Parser(argparse.ArgumentParser):
    """argparse whose usage errors are one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


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

    def start(self, environment: dict[str, str], lock: IO[str]) -> None:
        """Starts the training script, which continues the newest checkpoint if there is one."""
        with self.log.open("ab") as output:
            self.log_start = output.tell()
            # A session of its own, so that Ctrl-C reaches this script alone; the lock lives as long as any run does.
            self.process = subprocess.Popen(
                [sys.executable, *self.words],
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=environment,
                start_new_session=True,
                pass_fds=[lock.fileno()],
            )

    def settle(self, code: int) -> str:
        """Notes how the process ended; returns the line to show."""
        if code == 0 and self.has_summary():
            self.record.write_text(self.settings)
            return f"{self.folder.name}: finished"
        if code < 0:
            self.problem = f"killed by signal {-code} ({signal.Signals(-code).name}); its log is {self.log}"
        else:
            how = "stopped before its last step" if code == 0 else f"failed with exit code {code}"
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


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    own, extra = (list(argv[: argv.index("--")]), list(argv[argv.index("--") + 1 :])) if "--" in argv else (list(argv), [])
    parser = _Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--runs", type=Path, nargs="+", metavar="DIR", help="folders of runs to compare, none is trained")
    parser.add_argument("--names", nargs="+", help="the arm of each of --runs; runs of one name are seeds of one arm")
    parser.add_argument("--task", nargs="+", metavar="FILE", help="what is trained: files or names in configs/tasks")
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help="the arms to train")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="each method is trained once with each (default 0 1 2)")
    parser.add_argument("--baseline", metavar="NAME", help="the arm to compare with (default: the first)")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/compare"), help="runs, logs and report (default runs/compare)")
    parser.add_argument("--jobs", type=int, help="runs at a time, one thread each if several (default: CPU cores, 1 with a GPU)")
    parser.add_argument("--open", action="store_true", help="open the report in a browser, where there is a screen")
    parser.add_argument("--script", type=Path, default=HERE / "train_unconditional.py", help="the training script")
    args = parser.parse_args(own)
    if bool(args.runs) == bool(args.methods):
        raise UserError("give either --runs, to compare what is trained, or --task and --methods, to train")
    if args.runs and (extra or args.task):
        raise UserError("--runs trains nothing, so --task and flags after `--` have no place")
    if args.names and (not args.runs or len(args.names) != len(args.runs)):
        raise UserError(f"--names needs one name for each of --runs: {len(args.names)} names, {len(args.runs or [])} folders")
    if args.methods and not args.task:
        raise UserError("--methods needs --task, which says what is trained")
    if args.jobs is not None and args.jobs < 1:
        raise UserError(f"--jobs must be at least 1, not {args.jobs}")
    if min(args.seeds) < 0 or len(set(args.seeds)) < len(args.seeds):
        raise UserError(f"--seeds must be different numbers of at least 0, not {' '.join(map(str, args.seeds))}")
    for word in extra:
        if word.partition("=")[0] in OURS:
            raise UserError(f"{word} after `--` is set by this script for each run")
    if not args.script.is_file():
        raise UserError(f"--script {args.script}: no such file")
    return args, extra


def main(argv: Sequence[str]) -> None:
    args, extra = parse(argv)
    if args.runs:
        show(compare(arms_of(args.runs, args.names), baseline=args.baseline), args.output_dir, args.open)
        return
    jobs = plan(args, extra)
    if args.baseline and args.baseline not in {job.arm for job in jobs}:
        raise UserError(f"--baseline {args.baseline} is not one of the arms: {', '.join(dict.fromkeys(job.arm for job in jobs))}")
    at_once = args.jobs or default_jobs()
    try:
        (args.output_dir / "logs").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output_dir {args.output_dir} cannot be written: {error.strerror}", exit_code=1) from None
    with locked(args.output_dir) as lock:
        run_all(jobs, at_once, lock)
        arms: dict[str, list[Path]] = {}
        for job in jobs:
            arms.setdefault(job.arm, []).append(job.folder)
        threads = "OMP_NUM_THREADS=1 " if at_once > 1 else ""
        comparison = compare(
            arms,
            baseline=args.baseline,
            commands={job.folder: f"{threads}python {shlex.join([os.path.relpath(job.words[0]), *job.words[1:]])}" for job in jobs},
            problems={job.folder: job.problem for job in jobs if job.problem},
        )
        show(comparison, args.output_dir, args.open)
    failed = [job.folder.name for job in jobs if job.problem]
    if failed:
        raise UserError(f"{len(failed)} of {len(jobs)} runs failed: {', '.join(failed)}; the same command tries them again", exit_code=1)


def show(comparison: Comparison, folder: Path, in_browser: bool) -> None:
    path = write_report(comparison, folder)
    print(f"{summary(comparison)}\nreport in {path} and {path.with_suffix('.md')}")
    if in_browser and (sys.platform in ("darwin", "win32") or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        webbrowser.open(path.resolve().as_uri())  # without a screen it would be a browser in this terminal


def arms_of(runs: Sequence[Path], names: Sequence[str] | None) -> dict[str, list[Path]]:
    """The folders of each arm: by --names, else by folders called ARM-seedN, else by the flags that differ."""
    for number, folder in enumerate(runs):
        if folder.resolve() in {other.resolve() for other in runs[:number]}:
            raise UserError(f"--runs names {folder} twice")
    if names is None:
        matches = [re.fullmatch(r"(.+)-seed\d+", folder.resolve().name) for folder in runs]
        if not all(matches):
            return group_runs(runs)
        names = [match[1] for match in matches if match]
    arms: dict[str, list[Path]] = {}
    for name, folder in zip(names, runs, strict=True):
        arms.setdefault(name, []).append(folder)
    return arms


def plan(args: argparse.Namespace, extra: list[str]) -> list[Job]:
    """The grid, all methods of the first seed first, so that what slows the machine down for a while slows all arms."""
    task = [find_config(text, "tasks") for text in args.task]
    methods: dict[str, list[Path]] = {}
    for text in args.methods:
        name, _, files = text.rpartition("=")
        paths = [find_config(part, "methods") for part in files.split("+")]
        name = name or "+".join(path.stem for path in paths)
        if name in methods or "/" in name:
            raise UserError(f"--methods: {name} {'is there twice' if name in methods else 'is no name of a folder'}; NAME={files} names it")
        methods[name] = paths
    jobs = []
    for seed in args.seeds:
        for name, paths in methods.items():
            files = [*task, *paths]
            if flag_value("eval_steps", files, extra) is None:
                raise UserError("nothing would be measured: set eval_steps in the task's file, or put `-- --eval_steps N` at the end")
            folder = args.output_dir / f"{name}-seed{seed}"
            log = args.output_dir / "logs" / f"{folder.name}.log"
            words = [str(args.script), "--config", *map(str, files), "--seed", str(seed), "--output_dir", str(folder)]
            words += ["--resume_from_checkpoint", "latest", *extra]
            settings = "\n".join([shlex.join(words), *(path.read_text() for path in files)])
            steps = flag_value("max_train_steps", files, extra)
            jobs.append(Job(name, folder, log, words, settings, int(steps) if steps and steps.isdigit() else None))
    return jobs


def find_config(text: str, kind: str) -> Path:
    folder = HERE / "configs" / kind
    for path in (Path(text), folder / f"{text}.yaml"):
        if path.is_file():
            return Path(os.path.relpath(path)) if path.is_relative_to(HERE) else path
    flag, known = {"tasks": "--task", "methods": "--methods"}[kind], sorted(path.stem for path in folder.glob("*.yaml"))
    raise UserError(f"{flag} {text}: no such file; {folder.relative_to(HERE)} holds {', '.join(known)}")


def flag_value(name: str, files: Sequence[Path], extra: Sequence[str]) -> str | None:
    """What a flag is set to by the files and then by the further words, the last one winning; None if by neither."""
    value: Any = None
    for path in files:
        try:
            content = yaml.load(path.read_text(), Loader=yaml.BaseLoader)
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise UserError(f"{path}: {str(error).splitlines()[0]}") from None
        if isinstance(content, dict):
            value = content.get(name, "") or value
    for word, following in pairwise([*extra, ""]):
        flag, equals, inline = word.partition("=")
        if flag == f"--{name}":
            value = inline if equals else following
    return None if value is None else str(value)


def default_jobs() -> int:
    import torch

    return 1 if torch.cuda.is_available() else os.cpu_count() or 1


@contextmanager
def locked(folder: Path) -> Iterator[IO[str]]:
    """No two comparisons train in one folder, and none while runs of one that was killed still do."""
    with (folder / "logs" / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"another comparison, or a run that one left behind, is training in {folder}", exit_code=1) from None
        yield file


def run_all(jobs: Sequence[Job], at_once: int, lock: IO[str]) -> None:
    """Runs what is not finished, ``at_once`` at a time; a run that fails is noted in its job and the others go on.

    Raises:
        UserError: (exit code 1) interrupted by Ctrl-C or SIGTERM; the runs were asked to save and have ended.
    """
    environment = {**os.environ, "TQDM_DISABLE": "1", **({"OMP_NUM_THREADS": "1"} if at_once > 1 else {})}
    waiting = [job for job in jobs if not job.is_finished()]
    if len(waiting) < len(jobs):
        print(f"{len(jobs) - len(waiting)} of {len(jobs)} runs are finished already")
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
                    job.start(environment, lock)
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
    """SIGTERM, at which a run saves at its next step, and wait; a second Ctrl-C kills."""
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
    # SIGINT too: a shell starts background jobs with it ignored, and then not even an explicit `kill -INT` would stop the grid.
    before = {number: signal.signal(number, signal.default_int_handler) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(run_script(main))
