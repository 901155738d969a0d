"""By which clock a report tells time: runs that train side by side slow one another, so that their wall time says nothing of a method."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from immiscible.reports.runs import Run, is_number

SECONDS_RULE = (
    "Seconds are wall time where no two of the runs overlapped in time, else CPU time: that of the training process with its threads, "
    "without loader processes. None are shown (–) where not every run logged what this takes: older runs, and runs that overlapped on a "
    "GPU, whose work CPU time does not measure. They leave evaluation out."
)


@dataclass(frozen=True)
class Clock:
    """A way to tell time.

    Attributes:
        total: what runs call their time of training by it; empty where no time is told.
        step: what they call that of a step; empty likewise.
        prefix: stands before the unit in a column's title.
        why: it is this one, in a sentence.
    """

    total: str
    step: str
    prefix: str
    why: str

    @property
    def unit(self) -> str:
        """What its seconds are called."""
        return f"{self.prefix}seconds"


WALL = Clock("train_seconds", "step_seconds", "", "Seconds are wall time, as no two of these runs overlapped in time.")
CPU = Clock(
    "train_cpu_seconds",
    "step_cpu_seconds",
    "CPU ",
    "Seconds are CPU time, as some of these runs overlapped in time and slowed one another.",
)
OLD = Clock(
    "", "", "", "No seconds are shown (–): older ones of these runs did not log when they trained, so runs may have slowed one another."
)
OVERLAPPED = Clock(
    "",
    "",
    "",
    "No seconds are shown (–): some of these runs overlapped in time and slowed one another, and not all logged CPU time, which says "
    "little on a GPU.",
)


def clock(runs: Sequence[Run]) -> Clock:
    """The clock by which runs can be compared, from what they logged: `SECONDS_RULE`."""
    spans = [_spans(run) for run in runs]
    known = [of_run for of_run in spans if of_run is not None]
    if len(known) < len(runs):
        return OLD
    if not _overlap(known):
        return WALL
    return CPU if all(map(_logged_cpu_time, runs)) else OVERLAPPED


def _spans(run: Run) -> list[tuple[float, float]] | None:
    """When a run was under way, session by session, (start, end) in seconds since 1970; None where a line of its log does not say."""
    spans: list[tuple[float, float]] = []
    for line in run.metrics:
        began, ended = line.get("began"), line.get("ended")
        if not is_number(began) or not is_number(ended):
            return None
        if spans and began == spans[-1][1]:  # the same session goes on
            began = spans.pop()[0]
        spans.append((began, ended))
    if spans and run.ended is not None:
        spans[-1] = (spans[-1][0], max(spans[-1][1], run.ended))  # what is measured and sampled after the last line
    return spans


def _overlap(runs: Iterable[Iterable[tuple[float, float]]]) -> bool:
    """Whether a time lies within spans of two runs; touching is not overlapping."""
    in_order = sorted((began, ended, number) for number, spans in enumerate(runs) for began, ended in spans)
    return any(later[0] < earlier[1] and later[2] != earlier[2] for earlier, later in pairwise(in_order))


def _logged_cpu_time(run: Run) -> bool:
    lines = (*run.metrics, *run.evaluations)
    return all(is_number(line.get(CPU.total)) for line in lines)
