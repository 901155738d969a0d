"""Several runs -> one comparison: how many steps and seconds an arm saves, in one self-contained HTML file and one Markdown file.

An *arm* is one method trained with several seeds, its *runs*. A run's *curve* is a Frechet distance, at one number of inference steps,
against optimizer steps or against seconds of training. What counts as an acceleration is defined by `Comparison.ratios`.
"""

from __future__ import annotations

import base64
import html
import io
import logging
import math
import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median
from typing import Any

import yaml

from .checkpoints import PARTIAL, replace
from .config import MethodArguments, RunArguments, UnconditionalConfig
from .errors import UserError
from .run import read_lines

logger = logging.getLogger(__name__)

Curve = Sequence[tuple[float, float]]  # (time, distance), times rising; time is optimizer steps or seconds

# What may differ between two runs of one arm: the seed, and what says where a run goes and not what it learns.
NOT_THE_METHOD = {item.name for item in fields(RunArguments)} - {"sampling_scheduler", "timestep_spacing"} | {
    "seed",
    "cache_dir",
    "dataloader_num_workers",
    "local_rank",
}
# Dimensions of features whose evaluations do not say it themselves (`num_features` in evaluation.jsonl).
KNOWN_FEATURES = {"FD-digits": 64, "FID": 2048}
LEAST_DISTANCE = 1e-12  # a Frechet distance of identical sets may come out as zero or a little below; its logarithm must exist
GAIN, HARM, NO_EFFECT, UNCLEAR = "▲ gain", "▼ harm", "● no effect", "● no clear effect"
BASELINE, UNKNOWN, NOTHING = "baseline", "not known", "–"
RULE = (
    "Gain means that every seed's ratio of steps is above 1, harm that every one is below 1, no effect that all are exactly 1; all else "
    "is no clear effect."
)
CURVES_LEGEND = (
    "Thin: every seed. Thick: the median of an arm. Dotted: a run that was not finished. Ticks on the dashed line: where a seed reaches "
    "the baseline's final value."
)


@dataclass(frozen=True)
class Interval:
    """What is known of a number: it lies in [low, high], and is known exactly where the ends are equal."""

    low: float
    high: float

    def show(self, digits: int = 0) -> str:
        """``1.25``, ``> 500`` where only a lower bound is known, ``< 0.96`` for an upper one, ``1.20 to 1.50`` between two."""
        low, high = f"{self.low:.{digits}f}", f"{self.high:.{digits}f}"
        if self.low == self.high:
            return low
        if math.isinf(self.high):
            return f"> {low}" if self.low > 0 else UNKNOWN
        return f"< {high}" if self.low <= 0 else f"{low} to {high}"


def crossing(curve: Curve, threshold: float) -> Interval:
    """The first time at which a curve is at or below ``threshold``.

    Between two evaluations the logarithm of the distance is a straight line in time. A curve that is below the threshold at its first
    evaluation got there at an unknown earlier time, (0, first); one that never gets there needs more than its last time, (last, inf).

    Raises:
        ValueError: an empty curve.
    """
    if not curve:
        raise ValueError("a curve needs at least one evaluation")
    first, value = curve[0]
    if value <= threshold:
        return Interval(first if value == threshold else 0.0, first)
    for (before, above), (after, below) in pairwise(curve):
        if below == threshold:  # interpolation would return `after` up to rounding
            return Interval(after, after)
        if below < threshold and math.isinf(above):
            return Interval(before, after)
        if below < threshold:
            logs = [math.log(max(value, LEAST_DISTANCE)) for value in (above, threshold, below)]
            share = (logs[0] - logs[1]) / (logs[0] - logs[2]) if logs[0] > logs[2] else 1.0
            time = before + share * (after - before)
            return Interval(time, time)
    return Interval(curve[-1][0], math.inf)


def ratio(reference: Interval, time: Interval) -> Interval:
    """``reference / time`` for times that may be known as intervals only; above 1 is faster than the reference."""
    low = reference.low / time.high if time.high > 0 else 0.0
    high = reference.high / time.low if time.low > 0 else math.inf
    return Interval(low, high)


def seed_ratio(baseline: Curve, curve: Curve, threshold: float) -> Interval:
    """How many times faster a curve reaches the threshold than the baseline's curve of the same seed.

    The threshold is the seed-mean of the baseline's last values, so some of the baseline's own seeds end above it. For those the ratio
    is taken at the last value of that seed's baseline, the best quality that both can be asked for. The baseline's time therefore
    always exists, and an arm with the baseline's curves has ratio exactly 1 for every seed.

    Returns:
        the baseline's time over the curve's; ``(0, n)``, shown as "< n", where the curve ends before it gets there.
    """
    if list(baseline) == list(curve):
        return Interval(1.0, 1.0)
    asked = max(threshold, baseline[-1][1])
    return ratio(crossing(baseline, asked), crossing(curve, asked))


def middle(values: Iterable[Interval]) -> Interval:
    """The median of numbers that may be known as intervals only: the medians of their lower and of their upper ends."""
    values = list(values)
    return Interval(median(value.low for value in values), median(value.high for value in values))


def verdict(ratios: Sequence[Interval]) -> str:
    """Gain, harm, no effect or no clear effect, by `RULE`, or not known where no seed's ratio is."""

    def side(value: Interval) -> int | None:
        if value.low == value.high == 1:
            return 0
        if value.low >= 1:  # the interval is open where it is not a point: an arm that is late by any amount is late
            return 1
        return -1 if value.high <= 1 else None

    if set(ratios) == {Interval(0.0, math.inf)}:
        return UNKNOWN
    sides = {side(value) for value in ratios}
    return {1: GAIN, -1: HARM, 0: NO_EFFECT, None: UNCLEAR}[sides.pop()] if len(sides) == 1 else UNCLEAR


@dataclass(frozen=True)
class Run:
    """One run's folder as it was read.

    Attributes:
        folder: where it is.
        config: its flags.
        evaluations: the lines of ``evaluation.jsonl``, one per step, in order.
        metrics: the lines of ``metrics.jsonl``.
        finished: whether ``summary.json`` says that the last step was taken.
    """

    folder: Path
    config: Mapping[str, Any]
    evaluations: Sequence[Mapping[str, Any]]
    metrics: Sequence[Mapping[str, float]]
    finished: bool

    @property
    def seed(self) -> int:
        """The seed of everything that the run drew."""
        return int(self.config.get("seed") or 0)

    @property
    def inference_steps(self) -> set[int]:
        """The numbers of inference steps at which every evaluation measured."""
        return set.intersection(*({int(steps) for steps in line["frechet_distance"]} for line in self.evaluations))

    @property
    def last_step(self) -> int:
        """The last step that was evaluated."""
        return int(self.evaluations[-1]["step"])

    def curve(self, inference_steps: int, time: str = "step") -> Curve:
        """The Frechet distance against ``step`` or ``train_seconds``; values that are not finite count as infinitely bad."""
        values = [line["frechet_distance"][str(inference_steps)] for line in self.evaluations]
        finite = [value if value is not None and math.isfinite(value) else math.inf for value in values]
        return [(float(line[time]), value) for line, value in zip(self.evaluations, finite, strict=True)]

    def mean(self, metric: str) -> float | None:
        """The mean of a metric over ``metrics.jsonl``; the median for seconds, which a slow first step must not move."""
        values = [line[metric] for line in self.metrics if metric in line]
        return (median if metric.endswith("seconds") else fmean)(values) if values else None


def read_run(folder: Path) -> Run:
    """Reads a run's folder.

    Raises:
        UserError: the folder is no run (exit code 2), or holds no evaluations or broken files (1).
    """
    if not (folder / "config.yaml").is_file():
        what = "no such folder" if not folder.exists() else "not a run's folder: it holds no config.yaml"
        raise UserError(f"{folder}: {what}")
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text())
        evaluations = {line["step"]: line for line in read_lines(folder / "evaluation.jsonl")}
        metrics = read_lines(folder / "metrics.jsonl")
        summary = folder / "summary.json"
        done = yaml.safe_load(summary.read_text())["step"] if summary.exists() else None
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError) as error:
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{folder}: a file of the run cannot be read ({first_line})", exit_code=1) from None
    if not isinstance(config, dict):
        raise UserError(f"{folder / 'config.yaml'}: expected lines of `flag: value`", exit_code=1)
    if not evaluations:
        raise UserError(
            f"{folder}: evaluation.jsonl is missing or empty, so there is nothing to compare; train with --eval_steps", exit_code=1
        )
    needed = ("train_seconds", "feature", "samples", "reference_images", "data", "frechet_distance")
    missing = sorted({key for line in evaluations.values() for key in needed if key not in line})
    if missing:
        raise UserError(f"{folder / 'evaluation.jsonl'}: lines without {', '.join(missing)}", exit_code=1)
    finished = done is not None and done >= (config.get("max_train_steps") or 0)
    run = Run(folder, config, [evaluations[step] for step in sorted(evaluations)], metrics, finished)
    if not run.inference_steps:
        raise UserError(f"{folder / 'evaluation.jsonl'}: no number of inference steps was measured at every step", exit_code=1)
    return run


def differing_flags(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The flags that say what is learnt and are not equal in all configs."""
    names = dict.fromkeys(name for config in configs for name in config if name not in NOT_THE_METHOD)
    return [name for name in names if any(config.get(name) != configs[0].get(name) for config in configs)]


def group_runs(folders: Sequence[Path]) -> dict[str, list[Path]]:
    """Runs that differ in nothing but their seeds form an arm, named by its flags that differ from other arms' and from the defaults.

    Raises:
        UserError: what `read_run` raises.
    """
    configs = {folder: read_run(folder).config for folder in folders}
    differing = differing_flags(list(configs.values()))
    defaults = _defaults()
    method = {item.name for item in fields(MethodArguments)}
    arms: dict[str, list[Path]] = {}
    for folder, config in configs.items():
        parts = [
            str(value) if isinstance(value, str) and name in method else f"{name}={value}"
            for name in differing
            if (value := config.get(name)) != defaults.get(name) and value is not None
        ]
        arms.setdefault(" + ".join(parts) or BASELINE, []).append(folder)
    return arms


def command_of(config: Mapping[str, Any], script: str = "train_unconditional.py") -> str:
    """The command line that gives this config: every flag whose value is not the default."""
    defaults = _defaults()
    words = ["python", script]
    for name, value in config.items():
        if value is None or value == defaults.get(name) or name in ("resume_from_checkpoint", "overwrite_output_dir", "hub_token"):
            continue
        words.append(f"--{name}")
        if value is not True:
            words += [str(item) for item in (value if isinstance(value, list) else [value])]
    return shlex.join(words)


def _defaults() -> dict[str, Any]:
    blank = UnconditionalConfig()
    return {item.name: getattr(blank, item.name) for item in fields(blank)}


@dataclass
class Arm:
    """One method: the runs that count, those that are not finished, and what is wrong with any.

    Attributes:
        runs: finished, by seed. Only these count.
        unfinished: drawn, but not counted.
        commands: one for each run.
        problems: for each run that failed, was stopped or is missing, what happened, in plain words.
    """

    name: str
    runs: dict[int, Run] = field(default_factory=dict)
    unfinished: list[Run] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


@dataclass
class Comparison:
    """Arms that were measured alike, and the baseline among them.

    Attributes:
        arms: by name, in the order in which they are shown.
        baseline: the name of the arm that the others are compared with.
        inference_steps: those that every run measured.
        notes: what a reader must know, such as too few samples.
    """

    arms: dict[str, Arm]
    baseline: str
    inference_steps: list[int]
    notes: list[str] = field(default_factory=list)

    @property
    def runs(self) -> list[Run]:
        """All runs, the finished ones of each arm before its others."""
        return [run for arm in self.arms.values() for run in (*arm.runs.values(), *arm.unfinished)]

    @property
    def feature(self) -> str:
        """What the distance is called: the name of its feature network."""
        return str(self.runs[0].evaluations[0]["feature"])

    def threshold(self, inference_steps: int) -> float | None:
        """The seed-mean of the baseline's last values; None if no run of the baseline is finished."""
        finals = [run.curve(inference_steps)[-1][1] for run in self.arms[self.baseline].runs.values()]
        return min(max(fmean(finals), min(finals)), max(finals)) if finals else None  # rounding must not put it outside

    def crossings(self, arm: str, inference_steps: int, time: str = "step") -> dict[int, Interval]:
        """For each seed the time to the `threshold`, as `crossing` says."""
        threshold = self.threshold(inference_steps)
        if threshold is None:
            return {}
        return {seed: crossing(run.curve(inference_steps, time), threshold) for seed, run in self.arms[arm].runs.items()}

    def ratios(self, arm: str, inference_steps: int, time: str = "step") -> dict[int, Interval]:
        """The acceleration ratio of each seed: the baseline's time to the `threshold` over the arm's, by `seed_ratio`.

        An arm's seed is compared with the baseline's run of the same seed, which shares its initial weights, batches and noises. A seed
        that the baseline lacks is compared with the median of its ratios to all seeds of the baseline.
        """
        threshold = self.threshold(inference_steps)
        if threshold is None:
            return {}
        baseline = {seed: run.curve(inference_steps, time) for seed, run in self.arms[self.baseline].runs.items()}
        return {
            seed: middle(
                seed_ratio(reference, run.curve(inference_steps, time), threshold)
                for reference in ([baseline[seed]] if seed in baseline else baseline.values())
            )
            for seed, run in self.arms[arm].runs.items()
        }

    def verdict(self, arm: str, inference_steps: int) -> str:
        """The word for an arm, from its ratios of steps."""
        if arm == self.baseline:
            return BASELINE
        ratios = list(self.ratios(arm, inference_steps).values())
        return verdict(ratios) if ratios else NOTHING


def compare(
    arms: Mapping[str, Sequence[Path]],
    *,
    baseline: str | None = None,
    commands: Mapping[Path, str] | None = None,
    problems: Mapping[Path, str] | None = None,
    notes: Sequence[str] = (),
) -> Comparison:
    """Reads the arms' runs and checks that they can be compared.

    Args:
        arms: folders by the arm's name, in the order in which they are to be shown.
        baseline: the arm to compare with; by default the first.
        commands: the command of a folder's run; by default it is made from its ``config.yaml``.
        problems: what went wrong with a folder's run, which may then be missing or unreadable.
        notes: further lines for the reader.

    Raises:
        UserError: what `read_run` raises; runs of different data or measured differently; no run at all; an unknown baseline.
    """
    commands, problems = commands or {}, problems or {}
    baseline = next(iter(arms), "") if baseline is None else baseline
    if baseline not in arms:
        raise UserError(f"the baseline {baseline!r} is not one of the arms: {', '.join(arms)}")
    comparison = Comparison({name: Arm(name) for name in arms}, baseline, [], list(notes))
    for name, folders in arms.items():
        for folder in folders:
            _read_into(comparison.arms[name], folder, commands.get(folder), problems.get(folder))
    runs = comparison.runs
    if not runs:
        raise UserError("no run has been measured yet, so there is nothing to compare", exit_code=1)
    _check_measured_alike(runs)
    comparison.inference_steps = sorted(set.intersection(*(run.inference_steps for run in runs)))
    if not comparison.inference_steps:
        raise UserError("the runs have no number of inference steps in common; give all the same --eval_inference_steps")
    for seed, run in list(comparison.arms[baseline].runs.items()):
        if any(math.isinf(run.curve(steps)[-1][1]) for steps in comparison.inference_steps):
            comparison.arms[baseline].unfinished.append(comparison.arms[baseline].runs.pop(seed))
            comparison.arms[baseline].problems.append(f"{run.folder.name}: diverged, its last distance is not finite (not counted)")
    ends = Counter(run.last_step for run in comparison.arms[baseline].runs.values())
    if len(ends) > 1:
        raise UserError(f"the runs of {baseline} end at different steps ({', '.join(map(str, sorted(ends)))}): it has no final quality")
    comparison.notes += _notes(comparison)
    return comparison


def _read_into(arm: Arm, folder: Path, command: str | None, problem: str | None) -> None:
    try:
        run = read_run(folder)
    except UserError as error:
        if problem is None:
            raise
        arm.problems.append(f"{folder.name}: {problem} (not measured: {error})" if folder.is_dir() else f"{folder.name}: {problem}")
        if command:
            arm.commands.append(command)
        return
    arm.commands.append(command or command_of(run.config))
    if run.finished and problem is None:
        if run.seed in arm.runs:
            raise UserError(f"{arm.runs[run.seed].folder} and {folder} are both seed {run.seed} of {arm.name}; give them different names")
        arm.runs[run.seed] = run
    else:
        arm.unfinished.append(run)
        asked = run.config.get("max_train_steps")
        reached = f"last measured at step {run.last_step}" + (f" of {asked}" if asked else "")
        arm.problems.append(f"{folder.name}: {problem or 'not finished'} ({reached}; drawn, not counted)")


def _check_measured_alike(runs: Sequence[Run]) -> None:
    what = {
        "data": "different data",
        "feature": "different features",
        "samples": "different numbers of samples",
        "reference_images": "different numbers of reference images",
        "weights": "different weights (EMA or not)",
    }
    first = runs[0]
    for key, text in what.items():
        wanted = first.evaluations[0].get(key)
        for run in runs:
            found = {line.get(key) for line in run.evaluations} - {wanted}
            if found:
                raise UserError(f"{first.folder} and {run.folder} cannot be compared: {text} ({key} {wanted} and {found.pop()})")


def _notes(comparison: Comparison) -> list[str]:
    notes = []
    line = comparison.runs[0].evaluations[0]
    dimension = line.get("num_features") or KNOWN_FEATURES.get(comparison.feature)
    for count, what in ((line["samples"], "samples"), (line["reference_images"], "reference images")):
        if dimension and count <= dimension:
            notes.append(
                f"{count} {what} are too few for the {dimension} dimensions of {comparison.feature}: their covariance is singular; "
                f"at least {dimension + 1} are needed, ten times as many are better."
            )
    if any(not math.isfinite(value) for run in comparison.runs for steps in comparison.inference_steps for _, value in run.curve(steps)):
        notes.append("Some distances are not finite (a run diverged); they count as worse than any other.")
    baseline = comparison.arms[comparison.baseline]
    if not baseline.runs:
        notes.append(f"No run of the baseline, {comparison.baseline}, is finished: there is no final quality to compare with.")
    unpaired = [name for name, arm in comparison.arms.items() if baseline.runs and arm.runs.keys() - baseline.runs.keys()]
    if unpaired:
        notes.append(
            f"Not every seed of {', '.join(unpaired)} was trained as baseline too; those are compared with all seeds of the baseline."
        )
    for text in notes:
        logger.warning("%s", text)
    return notes


@dataclass(frozen=True)
class Table:
    """Cells of text under a caption."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        """The table in Markdown, its columns aligned, so that it reads in a terminal too."""
        rows = [[cell.replace("|", "\\|") for cell in row] for row in (self.columns, *self.rows)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(self.columns))]
        lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows]
        lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
        return f"**{self.caption}**\n\n" + "\n".join(lines) + "\n"

    def html(self) -> str:
        """The table in a box in which it scrolls sideways if it must."""

        def cell(tag: str, text: str) -> str:
            mark = f' class="{text[2:].replace(" ", "-")}"' if text in (GAIN, HARM, UNCLEAR, NO_EFFECT) else ""
            shown = re.sub(r" (\(.*\))$", r" <small>\1</small>", html.escape(text))  # brackets may go to a second line on a phone
            return f"<{tag}{mark}>{shown}</{tag}>"

        def cells(tag: str, row: Sequence[str]) -> str:
            scope = "col" if tag == "th" else "row"
            name = html.escape(row[0]).replace("_", "_<wbr>")
            return f'<th scope="{scope}">{name}</th>' + "".join(cell(tag, text) for text in row[1:])

        body = "".join(f"<tr>{cells('td', row)}</tr>" for row in self.rows)
        head = f"<thead><tr>{cells('th', self.columns)}</tr></thead>"
        return (
            f'<figure><figcaption>{html.escape(self.caption)}</figcaption><div class="scroll" tabindex="0"><table>{head}'
            f"<tbody>{body}</tbody></table></div></figure>"
        )


def headline(comparison: Comparison) -> list[str]:
    """What happened, in plain sentences; the first names the best arm or says that nothing helped."""
    quality = f"{comparison.baseline}'s final {comparison.feature}"
    others = [name for name in comparison.arms if name != comparison.baseline]
    words = {(name, steps): comparison.verdict(name, steps) for name in others for steps in comparison.inference_steps}

    def factor(name: str, steps: int, time: str = "step") -> Interval:
        return middle(comparison.ratios(name, steps, time).values())

    def saving(name: str, steps: int) -> str:
        fewer, less = (factor(name, steps, time).show(2).replace("> ", "over ") for time in ("step", "train_seconds"))
        time = "" if less == UNKNOWN else f" ({less}x less time)"
        return f"{fewer}x fewer training steps{time} at {steps} inference steps"

    def at(name: str, word: str, text: Callable[[int], str]) -> str:
        return " and ".join(text(steps) for steps in comparison.inference_steps if words[name, steps] == word)

    def merit(name: str) -> tuple[int, float]:
        lows = [max(factor(name, steps).low, 0.01) for steps in comparison.inference_steps]
        return -sum(words[name, steps] == HARM for steps in comparison.inference_steps), math.prod(lows)

    gaining = [name for name in others if any(words[name, steps] == GAIN for steps in comparison.inference_steps)]
    sentences = []
    if not any(comparison.arms[name].runs for name in others) or not comparison.arms[comparison.baseline].runs:
        sentences.append("Nothing can be said yet: it takes a finished run of the baseline and one of another arm.")
    elif gaining:
        best = max(gaining, key=merit)
        seeds = len(comparison.arms[best].runs)
        gains = at(best, GAIN, lambda steps: saving(best, steps))
        basis = f"medians of {seeds} seeds" if seeds > 1 else "one seed only, so this may be chance"
        sentences.append(f"Best arm: {best} reached {quality} in {gains} ({basis}).")
    else:
        sentences.append(f"Nothing helped: no arm reached {quality} sooner with every seed.")
    harmed = [
        f"{name} at {at(name, HARM, str)} inference steps"
        for name in others
        if HARM in {words[name, s] for s in comparison.inference_steps}
    ]
    if harmed:
        sentences.append(f"Harm, slower than {comparison.baseline} with every seed: {', '.join(harmed)}.")
    for title, verdicts in (("No clear effect", (UNCLEAR, NO_EFFECT)), ("Not known, for want of earlier evaluations", (UNKNOWN,))):
        places = {
            name: " and ".join(str(steps) for steps in comparison.inference_steps if words[name, steps] in verdicts) for name in others
        }
        if any(places.values()):
            listed = ", ".join(f"{name} at {where} inference steps" for name, where in places.items() if where)
            sentences.append(f"{title}: {listed}.")
    failures = sum(len(arm.problems) for arm in comparison.arms.values())
    if failures:
        sentences.append(f"Not counted: {failures} {'run' if failures == 1 else 'runs'}, named below.")
    return sentences


def summary_table(comparison: Comparison, inference_steps: int) -> Table:
    """One row per arm: the verdict, the ratios, and what they were computed from, for one number of inference steps."""
    rows = []
    for name, arm in comparison.arms.items():
        finals = [run.curve(inference_steps)[-1][1] for run in arm.runs.values()]
        by_time = [comparison.ratios(name, inference_steps, time) for time in ("step", "train_seconds")]
        reached = [comparison.crossings(name, inference_steps, time) for time in ("step", "train_seconds")]
        rows.append(
            [
                name,
                comparison.verdict(name, inference_steps),
                *(_spread(ratios, 2, "x") for ratios in by_time),
                _spread({seed: Interval(value, value) for seed, value in enumerate(finals)}, 2),
                *(middle(times.values()).show() if times else NOTHING for times in reached),
                str(len(arm.runs)) + (f" of {len(arm.runs) + len(arm.problems)}" if arm.problems else ""),
            ]
        )
    threshold = comparison.threshold(inference_steps)
    goal = NOTHING if threshold is None else f"{threshold:.3g}"
    return Table(
        f"At {inference_steps} inference steps: how soon each arm reaches the baseline's final {comparison.feature} of {goal} (lower is "
        "better). Median over seeds, least to greatest in brackets",
        ["arm", "verdict", "fewer steps", "less time", f"final {comparison.feature}", "steps to it", "seconds to it", "seeds"],
        rows,
    )


def cost_table(comparison: Comparison) -> Table:
    """What a step costs in each arm, and what its coupling did to the pairs and to the noise."""
    metrics = {
        "step_seconds": ("ms per step", 1000, "{:.1f}"),
        "coupling_seconds": ("of it coupling, ms", 1000, "{:.2f}"),
        "distance_reduction_percent": ("pair distance reduced by, %", 1, "{:+.2f}"),
        "noise_variance_drift": ("noise variance drift", 1, "{:+.4f}"),
        "noise_norm_drift": ("noise norm drift", 1, "{:+.4f}"),
        "paired_images": ("images paired together", 1, "{:.0f}"),
    }
    means: dict[str, dict[str, float | None]] = {}
    for name, arm in comparison.arms.items():
        of_runs = {metric: [value for run in arm.runs.values() if (value := run.mean(metric)) is not None] for metric in metrics}
        means[name] = {metric: median(values) if values else None for metric, values in of_runs.items()}
    reference = means[comparison.baseline]["step_seconds"]
    rows = []
    for name, of_arm in means.items():
        cells = [
            NOTHING if (value := of_arm[metric]) is None else text.format(value * scale) for metric, (_, scale, text) in metrics.items()
        ]
        seconds = of_arm["step_seconds"]
        cells.insert(1, NOTHING if not seconds or not reference else f"{100 * (seconds / reference - 1):+.1f} %")
        rows.append([name, *cells])
    columns = ["arm", *(column for column, _, _ in metrics.values())]
    columns.insert(2, "against baseline")
    return Table(
        "What a step costs, and what the coupling did (medians over seeds; drift is 0 for noise that stays standard normal)", columns, rows
    )


def validation_table(comparison: Comparison) -> Table | None:
    """The held-out loss of each arm's last step per range of timesteps; None if no run has it."""
    levels = list(dict.fromkeys(level for run in comparison.runs for level in run.evaluations[-1].get("validation_loss") or {}))
    if not levels:
        return None
    rows = []
    for name, arm in comparison.arms.items():
        last = [run.evaluations[-1].get("validation_loss") or {} for run in arm.runs.values()]
        values = [[losses[level] for losses in last if level in losses] for level in levels]
        rows.append([name, *(f"{median(value):.4g}" if value else NOTHING for value in values)])
    return Table(
        "Held-out loss per range of timesteps (low is little noise) at the last step: images not trained on, fixed independent noises, "
        "unweighted; medians over seeds",
        ["arm", *levels],
        rows,
    )


def seed_table(comparison: Comparison, inference_steps: int) -> Table:
    """Every seed of every arm, so that each ratio can be computed again by hand."""
    rows = []
    for name, arm in comparison.arms.items():
        ratios = [comparison.ratios(name, inference_steps, time) for time in ("step", "train_seconds")]
        reached = [comparison.crossings(name, inference_steps, time) for time in ("step", "train_seconds")]
        for seed, run in arm.runs.items():
            times = [times[seed].show() if seed in times else NOTHING for times in reached]
            shown = [values[seed].show(3) if seed in values else NOTHING for values in ratios]
            seconds = f"{run.evaluations[-1]['train_seconds']:.0f}"
            rows.append([name, str(seed), f"{run.curve(inference_steps)[-1][1]:.4g}", *times, *shown, str(run.last_step), seconds])
    return Table(
        f"Every seed at {inference_steps} inference steps",
        ["arm", "seed", "final", "steps to it", "seconds to it", "fewer steps, x", "less time, x", "steps trained", "seconds trained"],
        rows,
    )


def curve_table(comparison: Comparison, inference_steps: int, most: int = 10) -> Table:
    """The curves as numbers: each arm's median over seeds at up to ``most`` of the evaluated steps, the last among them."""
    steps = sorted({line["step"] for arm in comparison.arms.values() for run in arm.runs.values() for line in run.evaluations})
    stride = math.ceil(len(steps) / most) if steps else 1
    shown = steps[::-1][::stride][::-1]
    rows = []
    for name, arm in comparison.arms.items():
        curves = [dict(run.curve(inference_steps)) for run in arm.runs.values()]
        values = [[curve[step] for curve in curves if step in curve] for step in shown]
        rows.append([name, *(f"{median(value):.3g}" if value else NOTHING for value in values)])
    return Table(
        f"{comparison.feature} at {inference_steps} inference steps after so many training steps (medians)", ["arm", *map(str, shown)], rows
    )


def arm_table(comparison: Comparison) -> Table:
    """What each arm is: the flags in which the arms differ."""
    configs = {name: run.config for name, arm in comparison.arms.items() for run in (*arm.runs.values(), *arm.unfinished)}
    flags = differing_flags(list(configs.values()))
    rows = [
        [name, *("" if (value := configs.get(name, {}).get(flag)) is None else str(value) for flag in flags)] for name in comparison.arms
    ]
    return Table("The flags in which the arms differ; all others are equal", ["arm", *flags], rows)


def setting(comparison: Comparison) -> str:
    """What all arms share, in one line."""
    run, line = comparison.runs[0], comparison.runs[0].evaluations[0]
    differing = differing_flags([run.config for run in comparison.runs])
    config = {name: value for name, value in run.config.items() if name not in differing and value is not None}
    source = next((str(config[name]) for name in ("bundled_data", "dataset_name", "train_data_dir") if config.get(name)), "")
    seeds = sorted({run.seed for run in comparison.runs})
    parts = [
        f"{source} {config['resolution']}x{config['resolution']}" if source and "resolution" in config else source,
        str(config.get("prediction_type", "")),
        f"{config['sampling_scheduler']} sampling, {config.get('timestep_spacing', '')} spacing" if "sampling_scheduler" in config else "",
        f"{config['max_train_steps']} steps" if "max_train_steps" in config else "",
        f"batch {config['train_batch_size']}" if "train_batch_size" in config else "",
        f"seeds {', '.join(map(str, seeds))}",
        f"{comparison.feature} of {line['samples']} samples against {line['reference_images']} reference images",
        "EMA weights" if line.get("weights") == "ema" else "",
        f"data {line['data']}",
    ]
    return "; ".join(part for part in parts if part)


def reading_guide(comparison: Comparison) -> list[str]:
    """How every number is defined, in plain words."""
    seeds = len(comparison.arms[comparison.baseline].runs)
    chance = (
        f" With {seeds} seeds an arm without any effect is called a gain or a harm in 1 of {2 ** (seeds - 1)} comparisons."
        if seeds > 1
        else ""
    )
    return [
        f"The distance is {comparison.feature}, named by its feature network; it is comparable only within this report. Lower is better.",
        "The goal is the baseline's final quality: the mean over seeds of its last distance. 'Steps to it' is when a run first gets there; "
        "between two evaluations the logarithm of the distance is taken as a straight line. '> n' means not within the n steps trained.",
        "'Fewer steps' is the baseline's steps to the goal over the arm's, seed by seed: 2 means half as many, below 1 means more. A seed "
        "whose baseline ends above the goal is compared at its own baseline's last distance. '< n' means that the arm never got there and "
        "its ratio is below n; '> n' that it was there before its first evaluation. 'Less time' is the same in seconds of training.",
        RULE + chance + " No confidence interval is given: so few seeds do not carry one.",
        "Seconds are those of this machine as busy as it was; runs that train side by side slow one another. They leave evaluation out.",
        "The baseline compares with itself: its ratio is 1 by definition. Equal seeds share initial weights, batches and noises.",
    ]


def _spread(values: Mapping[int, Interval], digits: int, unit: str = "") -> str:
    """``median (least to greatest)``."""
    if not values:
        return NOTHING
    center = middle(values.values()).show(digits)
    center += unit if center != UNKNOWN else ""
    least = Interval(min(value.low for value in values.values()), min(value.high for value in values.values()))
    greatest = Interval(max(value.low for value in values.values()), max(value.high for value in values.values()))
    if len(values) == 1 or least == greatest:
        return center
    return f"{center} ({least.show(digits)} to {greatest.show(digits)})"


INK = "#123457"  # stands for the page's text color, light or dark
# Okabe and Ito's colors, which color-blind readers tell apart; dashes and markers do it in print.
LOOKS: list[tuple[str, Any, str]] = [
    ("#0072B2", "-", "o"),
    ("#D55E00", "--", "s"),
    ("#009E73", "-.", "^"),
    ("#CC79A7", (0, (5, 1, 1, 1, 1, 1)), "D"),
    ("#E69F00", (0, (3, 1)), "v"),
    ("#56B4E9", (0, (1, 1)), "P"),
]
FIGURE_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "immiscible",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "legend.frameon": False,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color"), INK),
}


def _looks(comparison: Comparison) -> dict[str, dict[str, Any]]:
    """Color, dashes and marker of each arm; the baseline has the page's text color."""
    others = [name for name in comparison.arms if name != comparison.baseline]
    looks: dict[str, dict[str, Any]] = {comparison.baseline: {"color": INK, "linestyle": "-", "marker": "x"}}
    for number, name in enumerate(others):
        color, dashes, marker = LOOKS[number % len(LOOKS)]
        looks[name] = {"color": color, "linestyle": dashes, "marker": marker}
    return looks


def _svg(draw: Callable[[Any], None], width: float, height: float) -> str:
    """A figure drawn by ``draw(axes)`` as an SVG element that takes the page's text color and refers to nothing outside."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context(FIGURE_STYLE):
        figure = Figure(figsize=(width, height))
        FigureCanvasSVG(figure)
        draw(figure.subplots())
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, bbox_inches="tight", metadata={"Date": None})
    svg = text.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg)
    svg = re.sub(r' id="[A-Za-z0-9]+_\d+"', "", svg)  # groups' names, which would be repeated from figure to figure
    size = re.search(r'viewBox="([^"]*)"', svg)
    start = f'<svg role="img" viewBox="{size[1] if size else ""}">'
    return (start + svg[svg.index(">") + 1 :]).replace(INK, "currentColor")


def _plain_ticks(axis: Any, ticks: Sequence[float] | None = None) -> None:
    """Ticks of a logarithmic axis as plain numbers, at 1, 2 and 5 times the powers of ten or where ``ticks`` says."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)) if ticks is None else FixedLocator(ticks))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _legend(axes: Any, names: Iterable[str]) -> None:
    columns = 1 if max(len(name) for name in names) > 24 else 2
    axes.legend(loc="upper left", bbox_to_anchor=(-0.1, -0.17), ncol=columns, handlelength=3.2, columnspacing=1.2)


def curve_figure(comparison: Comparison, inference_steps: int) -> str:
    """Distance against training steps: thin lines are seeds, thick ones medians, dots where a seed reaches the baseline's final value."""
    looks, threshold = _looks(comparison), comparison.threshold(inference_steps)

    def draw(axes: Any) -> None:
        for name, arm in comparison.arms.items():
            color = looks[name]["color"]
            curves = [run.curve(inference_steps) for run in arm.runs.values()]
            for curve in curves:
                axes.plot(*zip(*curve, strict=True), color=color, linewidth=0.6, alpha=0.6)
            for run in arm.unfinished:
                axes.plot(*zip(*run.curve(inference_steps), strict=True), color=color, linewidth=0.6, alpha=0.6, linestyle=":")
            by_step: dict[float, list[float]] = {}
            for step, value in (point for curve in curves for point in curve):
                by_step.setdefault(step, []).append(value)
            shared = sorted(step for step, values in by_step.items() if len(values) == len(curves))
            axes.plot(
                shared, [median(by_step[step]) for step in shared], linewidth=2, markersize=4, markevery=0.2, label=name, **looks[name]
            )
            times = [time.low for time in comparison.crossings(name, inference_steps).values() if time.low == time.high]
            if threshold is not None:
                axes.plot(times, [threshold] * len(times), color=color, marker="|", markersize=9, markeredgewidth=1.5, linestyle="none")
        if threshold is not None:
            axes.axhline(threshold, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
            axes.annotate(
                f"{comparison.baseline}'s final {threshold:.3g}", (0.0, threshold), (2, -9), xycoords=("axes fraction", "data"),
                textcoords="offset points", fontsize=8,
            )  # fmt: skip
        axes.set(yscale="log", xlim=(0, None), xlabel="training steps", ylabel=f"{comparison.feature} (log; lower is better)")
        axes.set_title(f"{inference_steps} inference steps", loc="left")
        axes.grid(axis="y", alpha=0.2, linewidth=0.6)
        _plain_ticks(axes.yaxis)
        _legend(axes, comparison.arms)

    return _svg(draw, 4.4, 3.2)


def ratio_figure(comparison: Comparison) -> str:
    """The acceleration ratios: a dot per seed, a bar from least to greatest, arrows where only a bound is known, a line at 1."""
    looks = _looks(comparison)
    rows = [(name, steps) for steps in comparison.inference_steps for name in comparison.arms if name != comparison.baseline]

    def draw(axes: Any) -> None:
        for height, (name, steps) in enumerate(reversed(rows)):
            look = looks[name]
            for value in comparison.ratios(name, steps).values():
                if value.low == value.high:
                    axes.plot(value.low, height, color=look["color"], marker=look["marker"], markersize=5, alpha=0.8)
                elif math.isinf(value.high) and value.low > 0:
                    axes.plot(value.low, height, color=look["color"], marker=">", markersize=7, fillstyle="none")
                elif value.low <= 0 and not math.isinf(value.high):
                    axes.plot(value.high, height, color=look["color"], marker="<", markersize=7, fillstyle="none")
        axes.axvline(1, color=INK, linewidth=1)
        names = [f"{name}, {steps}" for name, steps in reversed(rows)]
        axes.set(xscale="log", ylim=(-0.6, len(rows) - 0.4), xlabel="times fewer training steps (left of 1: harm)")
        low, high = axes.get_xlim()
        axes.set_xlim(min(low, 0.8), max(high, 1.25))
        axes.set_yticks(range(len(rows)), names)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x", alpha=0.2, linewidth=0.6)
        axes.set_title("Ratio per seed (arm, inference steps)", loc="left", x=0)
        _plain_ticks(axes.xaxis, [0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 4, 5, 7, 10, 20, 50, 100])

    return _svg(draw, 3.2, 1.0 + 0.24 * len(rows))


def inference_figure(comparison: Comparison) -> str:
    """The last distance against the number of inference steps, lines as in `curve_figure`."""
    looks, steps = _looks(comparison), comparison.inference_steps

    def draw(axes: Any) -> None:
        for name, arm in comparison.arms.items():
            finals = [[run.curve(count)[-1][1] for count in steps] for run in arm.runs.values()]
            for values in finals:
                axes.plot(steps, values, color=looks[name]["color"], linewidth=0.6, alpha=0.6)
            if finals:
                axes.plot(
                    steps, [median(values) for values in zip(*finals, strict=True)], linewidth=2, markersize=5, label=name, **looks[name]
                )
        axes.set(xscale="log", yscale="log", xlabel="inference steps (log)", ylabel=f"{comparison.feature} at the end (log)")
        axes.set_title("Quality against inference steps", loc="left")
        axes.grid(axis="y", alpha=0.2, linewidth=0.6)
        _plain_ticks(axes.xaxis, steps)
        _plain_ticks(axes.yaxis)
        _legend(axes, comparison.arms)

    return _svg(draw, 4.4, 3.2)


def _sample_grids(comparison: Comparison, most_pixels: int = 1024) -> tuple[str, list[tuple[str, str]]]:
    """The seed that most arms have, and each arm's last grid of it as a data address."""
    from PIL import Image

    grids: dict[int, list[tuple[str, Path]]] = {}
    for name, arm in comparison.arms.items():
        for seed, run in sorted(arm.runs.items()):
            if pictures := sorted((run.folder / "samples").glob("step-*.png")):
                grids.setdefault(seed, []).append((name, pictures[-1]))
    if not grids:
        return "", []
    seed = max(sorted(grids), key=lambda number: len(grids[number]))
    shown = []
    for name, path in grids[seed]:
        with Image.open(path) as picture:
            picture.thumbnail((most_pixels, most_pixels))
            data = io.BytesIO()
            picture.save(data, format="PNG", optimize=True)
        shown.append((f"{name}, step {int(path.stem.partition('-')[2])}", base64.b64encode(data.getvalue()).decode()))
    return str(seed), shown


STYLE = """
:root{color-scheme:light dark;--back:#fff;--ink:#1a1a1a;--soft:#666;--line:#d0d0d0;--box:#f5f5f5;--gain:#00694d;--harm:#b34700}
@media(prefers-color-scheme:dark){:root{--back:#16181b;--ink:#e6e6e6;--soft:#a0a0a0;--line:#3c4046;--box:#202327;--gain:#3fcf9f;--harm:#ff9750}}
*{box-sizing:border-box}
body{margin:0 auto;padding:1rem;max-width:76rem;font:1rem/1.5 system-ui,sans-serif;background:var(--back);color:var(--ink)}
h1{font-size:1.4rem;line-height:1.25;margin:.2rem 0}
h2{font-size:1.1rem;margin:2rem 0 .5rem;border-bottom:1px solid var(--line)}
p,li{max-width:50rem;overflow-wrap:anywhere}
.lead{font-size:1.2rem;font-weight:600}
.soft,figcaption{color:var(--soft);font-size:.9rem}
.warning{border-left:4px solid var(--harm);padding:.2rem .8rem;background:var(--box)}
figure{margin:.8rem 0}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{padding:.3rem .7rem;text-align:right;white-space:nowrap;border-bottom:1px solid var(--line)}
thead th{vertical-align:bottom;border-bottom:2px solid var(--ink)}
th:first-child{text-align:left;position:sticky;left:0;background:var(--back)}
tbody th{font-weight:600}
.gain{color:var(--gain);font-weight:700}
.harm{color:var(--harm);font-weight:700}
.figures{display:grid;gap:1rem 2rem;grid-template-columns:repeat(auto-fit,minmax(min(100%,27rem),1fr));align-items:start}
.figures svg{display:block;width:100%;max-width:36rem;height:auto}
.grids{display:grid;gap:.8rem;grid-template-columns:repeat(auto-fill,minmax(min(46%,13rem),1fr))}
.grids figure{margin:0}
.grids img{width:100%;display:block;border:1px solid var(--line);image-rendering:pixelated}
pre{background:var(--box);padding:.6rem;overflow-x:auto;font-size:.8rem}
@media(max-width:30rem){body{padding:.7rem}th,td{padding:.3rem .4rem}table{font-size:.82rem}.lead{font-size:1.05rem}
tbody th{white-space:normal;max-width:7rem}small{display:block;font-size:.72rem}}
@media print{:root{--back:#fff;--ink:#000;--soft:#444;--line:#bbb;--box:#fff;--gain:#000;--harm:#000}
body{max-width:none;padding:0;font-size:9.5pt}.scroll,pre{overflow:visible}
table{font-size:7.5pt}th,td{padding:.1rem .3rem;white-space:normal}
pre{white-space:pre-wrap;overflow-wrap:anywhere}th:first-child{position:static}figure,tr{break-inside:avoid}h2{break-after:avoid}
.figures{grid-template-columns:1fr 1fr}}
"""


def html_report(comparison: Comparison) -> str:
    """The report as one HTML page that needs nothing but itself: no scripts, no addresses."""
    first, *others = headline(comparison)
    problems = [problem for arm in comparison.arms.values() for problem in arm.problems]
    warnings = [*comparison.notes, *(f"Not counted: {problem}" for problem in problems)]
    arms = [arm for arm in comparison.arms if arm != comparison.baseline]
    steps = comparison.inference_steps
    seed, grids = _sample_grids(comparison)
    validation = validation_table(comparison)

    def figures(*drawn: str) -> str:
        return '<div class="figures">' + "".join(f"<figure>{svg}</figure>" for svg in drawn) + "</div>"

    parts = [
        f"<h1>{html.escape(', '.join(arms))} against {html.escape(comparison.baseline)}</h1>",
        f'<p class="soft">{html.escape(setting(comparison))}</p>',
        f'<p class="lead">{html.escape(first)}</p>',
        *(f"<p>{html.escape(sentence)}</p>" for sentence in others),
        *(f'<p class="warning">{html.escape(text)}</p>' for text in warnings),
        "<h2>How many steps and seconds it saves</h2>",
        *(summary_table(comparison, count).html() for count in steps),
        f'<p class="soft">{html.escape(RULE)}</p>',
        figures(ratio_figure(comparison)) if arms and comparison.arms[comparison.baseline].runs else "",
        f"<h2>{html.escape(comparison.feature)} while training</h2>",
        f'<p class="soft">{CURVES_LEGEND}</p>',
        figures(*(curve_figure(comparison, count) for count in steps)),
        "<h2>Quality against inference steps</h2>" + figures(inference_figure(comparison)) if len(steps) > 1 else "",
    ]
    if grids:
        parts.append(f"<h2>Samples</h2><p class='soft'>Seed {seed}: the same starting noises in every grid, at the end of training.</p>")
        cells = (
            f'<figure><img alt="samples of {html.escape(name)}" src="data:image/png;base64,{data}"><figcaption>{html.escape(name)}'
            "</figcaption></figure>"
            for name, data in grids
        )
        parts.append(f'<div class="grids">{"".join(cells)}</div>')
    parts += [
        "<h2>What it costs and what it does</h2>",
        cost_table(comparison).html(),
        validation.html() if validation else "",
        "<h2>The arms</h2>",
        arm_table(comparison).html(),
        *(f"<h3>{html.escape(arm.name)}</h3><pre>{html.escape(chr(10).join(arm.commands))}</pre>" for arm in comparison.arms.values()),
        "<h2>Every seed</h2>",
        *(seed_table(comparison, count).html() for count in steps),
        "<h2>How to read this</h2>",
        "<ul>" + "".join(f"<li>{html.escape(text)}</li>" for text in reading_guide(comparison)) + "</ul>",
    ]
    body = "\n".join(part for part in parts if part)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{html.escape(first)}</title><style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def markdown_report(comparison: Comparison) -> str:
    """The report's words and numbers in Markdown; the curves are tables."""
    steps = comparison.inference_steps
    problems = [problem for arm in comparison.arms.values() for problem in arm.problems]
    validation = validation_table(comparison)
    parts = [
        f"# {', '.join(name for name in comparison.arms if name != comparison.baseline)} against {comparison.baseline}",
        "\n".join(headline(comparison)),
        setting(comparison),
        *(f"> {text}" for text in comparison.notes),
        *(f"> Not counted: {problem}" for problem in problems),
        "## How many steps and seconds it saves",
        *(summary_table(comparison, count).markdown() for count in steps),
        f"## {comparison.feature} while training",
        *(curve_table(comparison, count).markdown() for count in steps),
        "## What it costs and what it does",
        cost_table(comparison).markdown(),
        *([validation.markdown()] if validation else []),
        "## The arms",
        arm_table(comparison).markdown(),
        *(f"{arm.name}:\n\n```\n{chr(10).join(arm.commands)}\n```" for arm in comparison.arms.values()),
        "## Every seed",
        *(seed_table(comparison, count).markdown() for count in steps),
        "## How to read this",
        "\n".join(f"- {text}" for text in reading_guide(comparison)),
    ]
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def summary(comparison: Comparison) -> str:
    """What a terminal shows: the sentences and the tables of ratios."""
    tables = [summary_table(comparison, count).markdown() for count in comparison.inference_steps]
    return "\n".join([*headline(comparison), "", *tables])


def write_report(comparison: Comparison, folder: Path) -> Path:
    """Writes ``report.html`` and ``report.md`` into ``folder``, each complete or not at all; returns the path of the first.

    Raises:
        UserError: (exit code 1) the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in (("report.md", markdown_report(comparison)), ("report.html", html_report(comparison))):
            partial = folder / f"{PARTIAL}{name}"
            partial.write_text(text, encoding="utf-8")
            replace(partial, folder / name)
    except OSError as error:
        raise UserError(f"the report cannot be written to {folder}: {error.strerror or error}", exit_code=1) from None
    return folder / "report.html"
