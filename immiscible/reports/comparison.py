"""Several runs -> one comparison: how many steps and seconds an arm saves. `page` writes it as an HTML and a Markdown file.

An *arm* is one method trained with several seeds, its *runs* (`immiscible.reports.arms`). A run's *curve* is a Frechet distance, at one
number of inference steps, against optimizer steps or against seconds of training (`immiscible.reports.clock`). What counts as an
acceleration is defined by `Comparison.ratios`.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

from immiscible.errors import UserError
from immiscible.reports.arms import Arm, Report, chosen_baseline, notes_on_images
from immiscible.reports.ratios import BASELINE, NOTHING, Curve, Interval, crossing, middle, seed_ratio, verdict
from immiscible.reports.runs import Run, check_measured, command_of, read_measured, script_of
from immiscible.sampling.pipelines import told

logger = logging.getLogger(__name__)

# Dimensions of features whose evaluations do not say it themselves (`num_features` in evaluation.jsonl).
KNOWN_FEATURES = {"FD-digits": 64, "FID": 2048}


@dataclass
class Comparison(Report):
    """Arms that were measured alike, of which the others are compared with the baseline.

    Attributes:
        inference_steps: those that every run measured.
        guidance_scale: of the samples that were measured; 1 is no guidance.
    """

    inference_steps: list[int] = field(default_factory=list)
    guidance_scale: float = 1.0

    @property
    def feature(self) -> str:
        """What the distance is called: the name of its feature network."""
        return str(self.runs[0].evaluations[0]["feature"])

    def curves(self, arm: str, inference_steps: int) -> list[Curve]:
        """The curves of an arm's finished runs against steps."""
        return [run.curve(inference_steps) for run in self.arms[arm].runs.values()]

    def threshold(self, inference_steps: int) -> float | None:
        """The seed-mean of the baseline's last values; None if no run of the baseline is finished."""
        finals = [run.curve(inference_steps)[-1][1] for run in self.arms[self.baseline].runs.values()]
        return min(max(fmean(finals), min(finals)), max(finals)) if finals else None  # rounding must not put it outside

    def goal(self, seed: int, inference_steps: int) -> float | None:
        """The value at which `seed_ratio` compares a seed: the `threshold`, or the last one of its own baseline if that is above."""
        threshold, own = self.threshold(inference_steps), self.arms[self.baseline].runs.get(seed)
        return threshold if threshold is None or own is None else max(threshold, own.curve(inference_steps)[-1][1])

    def times(self, arm: str, inference_steps: int, time: str = "step") -> dict[int, Interval]:
        """For each seed the time to its `goal`, which every finished seed of the baseline reaches; none where ``time`` is empty."""
        if not time:
            return {}
        goals = {seed: self.goal(seed, inference_steps) for seed in self.arms[arm].runs}
        return {
            seed: crossing(self.arms[arm].runs[seed].curve(inference_steps, time), goal) for seed, goal in goals.items() if goal is not None
        }

    def images(self, arm: str, inference_steps: int) -> dict[int, Interval]:
        """For each seed the images seen up to its `goal`."""
        sizes = {seed: run.images_a_step for seed, run in self.arms[arm].runs.items()}
        times = self.times(arm, inference_steps)
        return {seed: Interval(time.low * sizes[seed], time.high * sizes[seed]) for seed, time in times.items()}

    def crossings(self, arm: str, inference_steps: int, time: str = "step") -> dict[int, Interval]:
        """For each seed the time to the `threshold`, as `crossing` says."""
        threshold = self.threshold(inference_steps)
        if threshold is None:
            return {}
        return {seed: crossing(run.curve(inference_steps, time), threshold) for seed, run in self.arms[arm].runs.items()}

    def ratios(self, arm: str, inference_steps: int, time: str = "step") -> dict[int, Interval]:
        """The acceleration ratio of each seed: the baseline's time to the `threshold` over the arm's, by `seed_ratio`.

        An arm's seed is compared with the baseline's run of the same seed, which shares its initial weights, batches and noises. A seed
        that the baseline lacks is compared with the median of its ratios to all seeds of the baseline. None where ``time`` is empty.
        """
        threshold = self.threshold(inference_steps)
        if threshold is None or not time:
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
    guidance_scale: float = 1.0,
) -> Comparison:
    """Reads the arms' runs and checks that they can be compared.

    Args:
        arms: folders by the arm's name, in the order in which they are to be shown.
        baseline: the arm to compare with; by default the first.
        commands: the command of a folder's run; by default it is made from its ``config.yaml``.
        problems: what went wrong with a folder's run, which may then be missing or unreadable.
        notes: further lines for the reader.
        guidance_scale: at which the samples are compared.

    Raises:
        UserError: what `check_measured` and `read_measured` raise; runs of different data or measured differently; no run at all; an
            unknown baseline.
    """
    commands, problems = commands or {}, problems or {}
    baseline = chosen_baseline(arms, baseline)
    check_measured([folder for folders in arms.values() for folder in folders if folder not in problems])
    comparison = Comparison({name: Arm(name) for name in arms}, baseline, list(notes), guidance_scale=guidance_scale)
    for name, folders in arms.items():
        for folder in folders:
            _read_into(comparison.arms[name], folder, commands.get(folder), problems.get(folder), guidance_scale)
    runs = comparison.runs
    if not runs:
        raise UserError("no run has been measured yet, so there is nothing to compare", exit_code=1)
    _check_measured_alike(runs, guidance_scale)
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


def _read_into(arm: Arm, folder: Path, command: str | None, problem: str | None, guidance_scale: float) -> None:
    try:
        run = read_measured(folder, guidance_scale)
    except UserError as error:
        if problem is None:
            raise
        arm.problems.append(f"{folder.name}: {problem} (not measured: {error})" if folder.is_dir() else f"{folder.name}: {problem}")
        if command:
            arm.commands.append(command)
        return
    arm.commands.append(command or command_of(run.config, script_of(run)))
    if run.finished and problem is None:
        arm.count(run)
    else:
        arm.unfinished.append(run)
        asked = run.config.get("max_train_steps")
        reached = f"last measured at step {run.last_step}" + (f" of {asked}" if asked else "")
        arm.problems.append(f"{folder.name}: {problem or 'not finished'} ({reached}; drawn, not counted)")


def _check_measured_alike(runs: Sequence[Run], guidance_scale: float) -> None:
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
    held_out = {line["held_out"]: run for run in runs for line in run.evaluations if line.get("held_out")}
    if len(held_out) > 1:
        folders = " and ".join(str(run.folder) for run in held_out.values())
        raise UserError(f"{folders} cannot be compared: different held-out images ({' and '.join(held_out)})")
    for run in runs:
        one, other = (told(each.config, guidance_scale) or "nothing" for each in (first, run))
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
    if comparison.unequal_steps:
        notes += notes_on_images(comparison)
    for text in notes:
        logger.warning("%s", text)
    return notes
