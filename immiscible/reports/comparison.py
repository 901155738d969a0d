"""Several runs -> one comparison: how many steps and seconds an arm saves. `report_page` writes it as an HTML and a Markdown file.

An *arm* is one method trained with several seeds, its *runs*. A run's *curve* is a Frechet distance, at one number of inference steps,
against optimizer steps or against seconds of training. What counts as an acceleration is defined by `Comparison.ratios`.
"""

from __future__ import annotations

import logging
import math
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median, median_low
from typing import Any

import yaml

from immiscible.configs import TextToImageConfig, UnconditionalConfig
from immiscible.errors import UserError
from immiscible.files import read_lines
from immiscible.method import MethodArguments
from immiscible.sampling.pipelines import told
from immiscible.training.arguments import RunArguments, TextRunArguments
from immiscible.training.checkpoints import checkpoints, is_complete, read_state

logger = logging.getLogger(__name__)

Curve = Sequence[tuple[float, float]]  # (time, distance), times rising; time is optimizer steps or seconds

# What may differ between two runs of one arm: the seed, and what says where a run goes and not what it learns.
NOT_THE_METHOD = {item.name for group in (RunArguments, TextRunArguments) for item in fields(group)}
NOT_THE_METHOD -= {"sampling_scheduler", "timestep_spacing"}
NOT_THE_METHOD |= {"seed", "cache_dir", "cache_latents", "latent_cache_dir", "dataloader_num_workers", "local_rank"}
# Dimensions of features whose evaluations do not say it themselves (`num_features` in evaluation.jsonl).
KNOWN_FEATURES = {"FD-digits": 64, "FID": 2048}
LEAST_DISTANCE = 1e-12  # a Frechet distance of identical sets may come out as zero or a little below; its logarithm must exist
GAIN, HARM, NO_EFFECT, UNCLEAR = "▲ gain", "▼ harm", "● no effect", "● no clear effect"
BASELINE, UNKNOWN, NOTHING = "baseline", "not known", "–"
RULE = (
    "Gain means that every seed's ratio of steps is above 1, harm that every one is below 1, no effect that all are exactly 1; all else "
    "is no clear effect."
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
    """The median of numbers that may be known as intervals only: the medians of their lower and of their upper ends.

    Half of what is not known from below is not known from below either.
    """
    values = list(values)
    lows = [value.low for value in values]
    return Interval(median(lows) if median_low(lows) > 0 else 0.0, median(value.high for value in values))


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
        evaluations: the lines of ``evaluation.jsonl``, one per step, in order; distances by number of inference steps.
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
        return set.intersection(*(set(line["frechet_distance"]) for line in self.evaluations))

    @property
    def last_step(self) -> int:
        """The last step that was evaluated."""
        return int(self.evaluations[-1]["step"])

    def curve(self, inference_steps: int, time: str = "step") -> Curve:
        """The Frechet distance against ``step`` or ``train_seconds``; values that are not finite count as infinitely bad."""
        values = [line["frechet_distance"][inference_steps] for line in self.evaluations]
        finite = [value if math.isfinite(value) else math.inf for value in values]
        return [(float(line[time]), value) for line, value in zip(self.evaluations, finite, strict=True)]

    def mean(self, metric: str) -> float | None:
        """The mean of a metric over ``metrics.jsonl``; the median for seconds, which a slow first step must not move."""
        values = [value for line in self.metrics if isinstance(value := line.get(metric), int | float)]
        return (median if metric.endswith("seconds") else fmean)(values) if values else None


def read_run(folder: Path) -> Run:
    """Reads a run's folder.

    Raises:
        UserError: the folder is no run (exit code 2), or holds no evaluations or broken files (1).
    """
    if not (folder / "config.yaml").is_file():
        what = "no such folder" if not folder.exists() else "not a run's folder: it holds no config.yaml"
        if inside := sorted(path.parent.name for path in folder.glob("*/config.yaml")):
            what += f", but runs; name them, as {folder / inside[0]}"
        raise UserError(f"{folder}: {what}")
    with _reading(folder / "config.yaml") as path:
        config = yaml.safe_load(path.read_text())
        if not isinstance(config, dict):
            raise ValueError("expected lines of `flag: value`")
        asked, _ = (int(config.get(flag) or 0) for flag in ("max_train_steps", "seed"))
    with _reading(folder / "metrics.jsonl") as path:
        metrics = [dict(line) for line in read_lines(path)]
    with _reading(folder / "summary.json") as path:
        done = int(yaml.safe_load(path.read_text())["step"]) if path.exists() else None
    with _reading(folder / "evaluation.jsonl") as path:
        evaluations = {line["step"]: line for line in map(_measured, read_lines(path))}
    if not evaluations:
        raise UserError(
            f"{folder}: evaluation.jsonl is missing or empty, so there is nothing to compare; train with --eval_steps", exit_code=1
        )
    run = Run(folder, config, [evaluations[step] for step in sorted(evaluations)], metrics, done is not None and done >= asked)
    if not run.inference_steps:
        raise UserError(f"{folder / 'evaluation.jsonl'}: no number of inference steps was measured at every step", exit_code=1)
    return run


@contextmanager
def _reading(path: Path) -> Iterator[Path]:
    """Turns what goes wrong with a file of a run into one line that names it."""
    try:
        yield path
    except (OSError, ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError) as error:
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: cannot be read ({first_line})", exit_code=1) from None


def _measured(line: Mapping[str, Any]) -> dict[str, Any]:
    """A line of ``evaluation.jsonl`` whose numbers are numbers; a distance that is ``null`` was not finite."""
    needed = ("step", "train_seconds", "feature", "samples", "reference_images", "data", "frechet_distance")
    if missing := sorted(set(needed) - line.keys()):
        raise ValueError(f"lines without {', '.join(missing)}")
    counts = {name: int(line[name]) for name in ("step", "samples", "reference_images")}
    distances = {int(steps): math.nan if value is None else float(value) for steps, value in line["frechet_distance"].items()}
    return {**line, **counts, "train_seconds": float(line["train_seconds"]), "frechet_distance": distances}


def differing_flags(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The flags that say what is learnt and are not equal in all configs."""
    names = dict.fromkeys(name for config in configs for name in config if name not in NOT_THE_METHOD)
    return [name for name in names if any(config.get(name) != configs[0].get(name) for config in configs)]


def group_runs(folders: Sequence[Path]) -> dict[str, list[Path]]:
    """Runs of one script that differ in their seeds alone form an arm, named by its flags that differ from other arms' and the defaults.

    Raises:
        UserError: what `read_run` raises.
    """
    runs = {folder: read_run(folder) for folder in folders}
    configs: dict[Path, dict[str, Any]] = {folder: {**run.config, "script": script_of(run)} for folder, run in runs.items()}
    differing = differing_flags(list(configs.values()))
    defaults = _defaults(next(iter(configs.values()), {}))
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
    defaults = _defaults(config)
    words = ["python", script]
    for name, value in config.items():
        if value is None or value == defaults.get(name) or name in ("resume_from_checkpoint", "overwrite_output_dir", "hub_token"):
            continue
        words.append(f"--{name}")
        if value is not True:
            words += [str(item) for item in (value if isinstance(value, list) else [value])]
    return shlex.join(words)


def script_of(run: Run) -> str:
    """The script that trained a run. The flags of a text run do not say whether it began with random weights; its checkpoints do."""
    if "pretrained_model_name_or_path" not in run.config:
        return "train_unconditional.py"
    saved = [read_state(path) for path in checkpoints(run.folder) if is_complete(path)]
    from_scratch = bool(saved) and saved[-1]["identity"]["network"]["from_scratch"]
    return "train_text_to_image.py" if from_scratch else "finetune_sd.py"


def _defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """Of the script whose flags these are."""
    blank = TextToImageConfig() if "pretrained_model_name_or_path" in config else UnconditionalConfig()
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

    def goal(self, seed: int, inference_steps: int) -> float | None:
        """The value at which `seed_ratio` compares a seed: the `threshold`, or the last one of its own baseline if that is above."""
        threshold, own = self.threshold(inference_steps), self.arms[self.baseline].runs.get(seed)
        return threshold if threshold is None or own is None else max(threshold, own.curve(inference_steps)[-1][1])

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
    arm.commands.append(command or command_of(run.config, script_of(run)))
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
    for run in runs:
        one, other = (told(each.config) or "nothing" for each in (first, run))
        if one != other:
            raise UserError(f"{first.folder} and {run.folder} cannot be compared: their samples were told {one} and {other}")


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
