"""Compares training runs: how many steps and seconds a method saves, with curves, tables and samples in one `report.html`.

It reads finished runs, each of which was trained with --eval_steps,

    python scripts/compare.py --runs runs/plain runs/coupled --names baseline immiscible

or trains methods x seeds itself, several at a time. The same command continues what was interrupted and skips what is finished:

    python scripts/compare.py --task configs/tasks/digits.yaml --methods baseline immiscible speed immiscible_speed --seeds 0 1 2 \\
        --output_dir runs/compare -- --eval_steps 50 --eval_inference_steps 5 20 --eval_samples 1500

Of runs that were all trained without --eval_steps it reports losses, times and samples, which do not say which method is better.

What stands after `--` goes to every run; an arm goes without those flags of the method that it does not use, and that is said. A method is
a name in configs/methods or a path; `a+b` puts two files together, `NAME=a` renames.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
import webbrowser
from collections.abc import Sequence
from pathlib import Path

from immiscible.config_files import PACKAGE
from immiscible.errors import UserError, run_script
from immiscible.flags import Parser, number, plain_text, text_path

OWN = PACKAGE.parent / "train_unconditional.py"  # of a checkout
COMMANDS = tuple(f"immiscible-{name}" for name in ("train-unconditional", "train-text-to-image", "finetune-sd"))  # of an installation
OURS = ("--config", "--seed", "--output_dir", "--resume_from_checkpoint", "--overwrite_output_dir")


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    own, extra = (list(argv[: argv.index("--")]), list(argv[argv.index("--") + 1 :])) if "--" in argv else (list(argv), [])
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument(
        "--runs",
        type=text_path,
        nargs="+",
        metavar="DIR",
        help="folders of runs to compare, each trained with --eval_steps, or none of them; none is trained",
    )
    parser.add_argument(
        "--names", type=plain_text, nargs="+", metavar="NAME", help="the arm of each of --runs; runs of one name are seeds of one arm"
    )
    parser.add_argument("--task", type=plain_text, nargs="+", metavar="FILE", help="what is trained: files or names in configs/tasks")
    parser.add_argument("--methods", type=plain_text, nargs="+", metavar="METHOD", help="the arms to train")
    parser.add_argument(
        "--seeds",
        type=number(int, least=0, most=2**63 - 1),
        nargs="+",
        metavar="N",
        default=[0, 1, 2],
        help="each method is trained once with each (default 0 1 2)",
    )
    parser.add_argument("--baseline", type=plain_text, metavar="NAME", help="the arm to compare with (default: the first)")
    parser.add_argument(
        "--output_dir", type=text_path, metavar="DIR", default=Path("runs/compare"), help="runs, logs and report (default runs/compare)"
    )
    parser.add_argument(
        "--jobs",
        type=number(int, least=1, most=1024),
        metavar="N",
        help="runs at a time, one thread each if several (default: CPU cores, 1 with a GPU)",
    )
    parser.add_argument(
        "--guidance_scale",
        type=number(float, least=0, most=100),
        metavar="W",
        default=1.0,
        help="compare samples of this guidance, one of the runs' --eval_guidance_scales (default 1: none); a table shows the others",
    )
    parser.add_argument("--open", action="store_true", help="open the report in a browser, where there is a screen")
    parser.add_argument(
        "--script",
        type=text_path,
        metavar="FILE",
        default=OWN if OWN.is_file() else Path(COMMANDS[0]),
        help="the training script, or one of the commands that it is installed as: " + ", ".join(COMMANDS),
    )
    args = parser.parse_args(own)
    _check(args, extra)
    return args, extra


def _check(args: argparse.Namespace, extra: Sequence[str]) -> None:
    if bool(args.runs) == bool(args.methods):
        raise UserError("give either --runs, to compare what is trained, or --task and --methods, to train")
    if args.runs and (extra or args.task):
        raise UserError("--runs trains nothing, so --task and flags after `--` have no place")
    if args.names and (not args.runs or len(args.names) != len(args.runs)):
        raise UserError(f"--names needs one name for each of --runs: {len(args.names)} names, {len(args.runs or [])} folders")
    if args.methods and not args.task:
        raise UserError("--methods needs --task, which says what is trained")
    if len(set(args.seeds)) < len(args.seeds):
        raise UserError(f"--seeds must be different numbers, not {' '.join(map(str, args.seeds))}")
    for word in extra:
        if word.partition("=")[0] in OURS:
            raise UserError(f"{word} after `--` is set by this script for each run")
    if not args.script.is_file() and str(args.script) not in COMMANDS:
        raise UserError(f"--script {args.script}: no such file, and none of {', '.join(COMMANDS)}")


def main(argv: Sequence[str]) -> None:
    args, extra = parse(argv)
    if args.runs:  # what both import is heavy: --help and usage errors come at once
        report_runs(args)
    else:
        train_and_compare(args, extra)


def report_runs(args: argparse.Namespace) -> None:
    from immiscible.reports import overview, page
    from immiscible.reports.comparison import compare
    from immiscible.reports.runs import all_measured

    arms = arms_of(args.runs, args.names)
    if all_measured(args.runs):
        comparison = compare(arms, baseline=args.baseline, guidance_scale=args.guidance_scale)
        show(page.write_report(comparison, args.output_dir), page.summary(comparison), args.open)
    elif args.guidance_scale != 1:
        raise UserError("--guidance_scale chooses among distances, and none of these runs was measured; leave it out")
    else:
        report = overview.look_over(arms, baseline=args.baseline)
        show(overview.write_report(report, args.output_dir), overview.summary(report), args.open)


def train_and_compare(args: argparse.Namespace, extra: Sequence[str]) -> None:
    from immiscible.reports.comparison import compare
    from immiscible.reports.grid import default_jobs, locked, run_all
    from immiscible.reports.page import summary, write_report
    from immiscible.reports.plan import plan

    jobs, lines = plan(
        task=args.task,
        methods=args.methods,
        seeds=args.seeds,
        script=words_of(args.script),
        output_dir=args.output_dir,
        shared=extra,
        guidance_scale=args.guidance_scale,
    )
    if args.baseline and args.baseline not in {job.arm for job in jobs}:
        raise UserError(f"--baseline {args.baseline} is not one of the arms: {', '.join(dict.fromkeys(job.arm for job in jobs))}")
    at_once = args.jobs or default_jobs()
    try:
        (args.output_dir / "logs").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output_dir {args.output_dir} cannot be written: {error.strerror}", exit_code=1) from None
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    with locked(args.output_dir):
        run_all(jobs, at_once)
        arms: dict[str, list[Path]] = {}
        for job in jobs:
            arms.setdefault(job.arm, []).append(job.folder)
        threads = "OMP_NUM_THREADS=1 " if at_once > 1 else ""
        comparison = compare(
            arms,
            baseline=args.baseline,
            commands={job.folder: threads + command_line(job.words) for job in jobs},
            problems={job.folder: job.problem for job in jobs if job.problem},
            guidance_scale=args.guidance_scale,
        )
        show(write_report(comparison, args.output_dir), summary(comparison), args.open)
    failed = [job.folder.name for job in jobs if job.problem]
    if failed:
        raise UserError(f"{len(failed)} of {len(jobs)} runs failed: {', '.join(failed)}; the same command tries them again", exit_code=1)


def words_of(script: Path) -> list[str]:
    """What the interpreter is given to run a training script."""
    if str(script) in COMMANDS:
        return ["-m", f"immiscible.commands.{str(script).removeprefix('immiscible-').replace('-', '_')}"]
    return [str(script)]


def command_line(words: Sequence[str]) -> str:
    """The words of a run, as a user would type them here."""
    from immiscible.reports.plan import short

    script = words[:2] if words[0] == "-m" else [str(short(Path(words[0])))]
    return shlex.join(["python", *script, *words[len(script) :]])


def show(path: Path, words: str, in_browser: bool) -> None:
    sys.stdout.write(f"{words}\nreport in {path} and {path.with_suffix('.md')}\n")
    if in_browser and (sys.platform in ("darwin", "win32") or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        webbrowser.open(path.resolve().as_uri())  # without a screen it would be a browser in this terminal


def arms_of(runs: Sequence[Path], names: Sequence[str] | None) -> dict[str, list[Path]]:
    """The folders of each arm: by --names, else by folders called ARM-seedN, else by the flags that differ."""
    from immiscible.reports.runs import group_runs

    for place, folder in enumerate(runs):
        if folder.resolve() in {other.resolve() for other in runs[:place]}:
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


if __name__ == "__main__":
    sys.exit(run_script(main))
