"""Arms, which are what any report is of, and how many images their steps took."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from functools import cached_property

from immiscible.errors import UserError
from immiscible.reports.clock import Clock, clock
from immiscible.reports.runs import Run


@dataclass
class Arm:
    """One method: the runs that count, those that are not finished, and what is wrong with any.

    Attributes:
        runs: by seed. Only these count; of a comparison they are finished.
        unfinished: drawn, but not counted.
        commands: one for each run.
        problems: for each run that failed, was stopped or is missing, what happened, in plain words.
    """

    name: str
    runs: dict[int, Run] = field(default_factory=dict)
    unfinished: list[Run] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def count(self, run: Run) -> None:
        """Takes a run among those that count.

        Raises:
            UserError: there is one of its seed.
        """
        if run.seed in self.runs:
            folders = f"{self.runs[run.seed].folder} and {run.folder}"
            raise UserError(f"{folders} are both seed {run.seed} of {self.name}; give them different names")
        self.runs[run.seed] = run

    @property
    def images_a_step(self) -> list[int]:
        """The numbers of images that a step takes in its runs, of which there is one unless --names put unlike runs together."""
        return sorted({run.images_a_step for run in (*self.runs.values(), *self.unfinished)})


@dataclass
class Report:
    """Arms side by side.

    Attributes:
        arms: by name, in the order in which they are shown.
        baseline: the name of the arm beside which the others stand.
        notes: what a reader must know, such as too few samples.
    """

    arms: dict[str, Arm]
    baseline: str
    notes: list[str] = field(default_factory=list)

    @property
    def runs(self) -> list[Run]:
        """All runs, those of each arm that count before its others."""
        return [run for arm in self.arms.values() for run in (*arm.runs.values(), *arm.unfinished)]

    @cached_property
    def clock(self) -> Clock:
        """By which its seconds are told; to be asked for when all runs are read."""
        return clock(self.runs)

    @property
    def unequal_steps(self) -> bool:
        """Whether a step is of more images in one run than in another."""
        return len({run.images_a_step for run in self.runs}) > 1


def chosen_baseline(names: Collection[str], baseline: str | None) -> str:
    """The arm beside which the others stand: ``baseline``, or the first.

    Raises:
        UserError: it is not one of the arms.
    """
    chosen = next(iter(names), "") if baseline is None else baseline
    if chosen not in names:
        raise UserError(f"the baseline {chosen!r} is not one of the arms: {', '.join(names)}")
    return chosen


def notes_on_images(report: Report) -> list[str]:
    """What a reader must know of the numbers of images that are shown."""
    unknown = [run.folder.name for run in report.runs if run.processes is None]
    notes = []
    if report.unequal_steps:
        sizes = ", ".join(f"{' and '.join(map(str, arm.images_a_step))} ({name})" for name, arm in report.arms.items() if arm.images_a_step)
        notes.append(f"Steps of the arms are of {sizes} images, so equal steps are not equal training: images seen stand beside steps.")
    if unknown:
        notes.append(f"Images are counted as of one process for {', '.join(unknown)}, of which no checkpoint is left that says how many.")
    return notes
