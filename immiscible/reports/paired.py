"""A grid's last distances or other metrics at each number of inference steps and guidance scale, arms tested against one over the seeds.

A cell is marked where a paired t-test, over the seeds that both arms have, gives p below `ALPHA`: of the logarithms of values that are
always above 0, else of the values. How many cells were tested stands beneath: of so many, chance alone marks `ALPHA` of them.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

from scipy import stats

from immiscible.errors import UserError

ALPHA = 0.05


@dataclass(frozen=True)
class Measure:
    """What can be told of a grid.

    Args:
        words: what it is.
        better: less of it or more; none where it can be too little and too much, as real images have neither least nor most of it.
        ratios: whether it is always above 0, so that ratios are compared; else differences are, as of what may be 0 or below.
    """

    words: str
    better: Literal["less", "more"] | None = "less"
    ratios: bool = True

    @property
    def marks(self) -> tuple[str, str]:
        """Of less and of more."""
        return {"less": ("▲", "▼"), "more": ("▼", "▲"), None: ("↓", "↑")}[self.better]


MEASURES = {
    "frechet_distance": Measure("distance from the images trained on"),
    "frechet_distance_held_out": Measure("distance from the images held out"),
    "nearest_neighbor_ratio": Measure("nearest trained image over nearest held out (below 1: nearer to the trained ones)", None),
    "sfid": Measure("distance of features that see the layout"),
    "kid": Measure("squared MMD with a cubic kernel, which may be below 0", ratios=False),
    "cmmd": Measure("1000 times the squared MMD of CLIP's embeddings"),
    "precision": Measure("share of samples in the ball of a training image", "more", ratios=False),
    "recall": Measure("share of training images in the ball of a sample", "more", ratios=False),
    "density": Measure("how many training images' balls a sample is in, over 5", "more", ratios=False),
    "coverage": Measure("share of training images with a sample in their ball", "more", ratios=False),
    "inception_score": Measure("Inception score", "more"),
    "clip_score": Measure("100 times the cosine of samples and their captions", "more", ratios=False),
    "per_class_frechet_distance": Measure("mean over classes of the distance from the images trained on"),
    "within_class_distance": Measure("mean distance between samples of a class", None),
    "alignment": Measure("mean squared distance between samples of a class, of features of length 1", None),
    "uniformity": Measure("log mean of exp(-2 d^2) between samples, of features of length 1", None, ratios=False),
}
Cell = tuple[float, int]  # guidance scale, inference steps
Arms = dict[str, dict[int, dict[Cell, float]]]  # arm, seed


@dataclass(frozen=True)
class Difference:
    """An arm against another in one cell.

    Attributes:
        measure: what is compared.
        change: geometric mean over the seeds of its value over the other's, or mean of its value less the other's; see `Measure.ratios`.
        p: of the paired test; NaN with fewer than two seeds in common.
        seeds: how many they have in common.
    """

    measure: Measure
    change: float
    p: float
    seeds: int

    @property
    def mark(self) -> str:
        """▲ better, ▼ worse, or of a measure of which neither is: ↓ less, ↑ more; nothing where the test does not tell."""
        less, more = self.measure.marks
        return "" if not self.p < ALPHA else less if self.change < (1 if self.measure.ratios else 0) else more

    def __str__(self) -> str:
        shown = f"{self.change:.2f}x" if self.measure.ratios else f"{self.change:+.2g}"
        return f"{shown} {self.mark}".rstrip()


def read_grid(folder: Path, measure: str = "frechet_distance") -> Arms:
    """The last values of each run ``ARM-seedN`` of a grid.

    Args:
        folder: of a comparison's runs (``ARM-seedN/evaluation.jsonl``), or of what ``scripts/results.sh`` keeps (``ARM-seedN.jsonl``).
        measure: of `MEASURES`.

    Raises:
        UserError: no run is there, or a line cannot be read or does not hold the measure.
    """
    found = sorted(path for path in [*folder.glob("*-seed*/evaluation.jsonl"), *folder.glob("*-seed*.jsonl")])
    arms: Arms = {}
    for path in found:
        name = path.parent.name if path.name == "evaluation.jsonl" else path.stem
        if match := re.fullmatch(r"(.+)-seed(\d+)", name):
            arms.setdefault(match[1], {})[int(match[2])] = _last(path, measure)
    if not arms:
        raise UserError(f"{folder} holds no evaluations of runs called ARM-seedN")
    return arms


def _last(path: Path, measure: str) -> dict[Cell, float]:
    try:
        line = json.loads(path.read_text().splitlines()[-1])
        held: Any = line if measure in line else line.get("metrics", {})
        by_scale = {"1": held[measure], **held.get(f"{measure}_guided", {})}
        return {(float(scale), int(steps)): float(value) for scale, of in by_scale.items() for steps, value in of.items()}
    except (OSError, IndexError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: its last line holds no {measure} ({type(error).__name__}: {error})") from None


def difference(
    arm: Mapping[int, Mapping[Cell, float]], other: Mapping[int, Mapping[Cell, float]], cell: Cell, measure: str = "frechet_distance"
) -> Difference:
    """See `Difference`; both must be finite there, and positive where ratios are compared."""
    compared = MEASURES[measure]
    pairs = [
        (arm[seed][cell], other[seed][cell]) for seed in sorted(arm.keys() & other.keys()) if cell in arm[seed] and cell in other[seed]
    ]
    changes = [math.log(ours / theirs) if compared.ratios else ours - theirs for ours, theirs in pairs]
    if not changes:
        return Difference(compared, math.nan, math.nan, 0)
    p = float(stats.ttest_1samp(changes, 0).pvalue) if len(changes) > 1 else math.nan
    mean = math.fsum(changes) / len(changes)
    return Difference(compared, math.exp(mean) if compared.ratios else mean, p, len(changes))


def paired_tables(arms: Arms, baseline: str, measure: str = "frechet_distance") -> str:
    """Markdown: for each guidance scale the arms against the numbers of inference steps, medians over the seeds, and what is marked.

    Args:
        arms: from `read_grid`, of this measure.
        baseline: the arm that the others are tested against.
        measure: of `MEASURES`.

    Raises:
        UserError: there is no arm of the baseline's name.
    """
    if baseline not in arms:
        raise UserError(f"--baseline {baseline} is not one of the arms: {', '.join(arms)}")
    cells = sorted({cell for seeds in arms.values() for values in seeds.values() for cell in values})
    order = [baseline, *(name for name in arms if name != baseline)]
    lines, tested, marked = [], 0, 0
    for scale in sorted({scale for scale, _ in cells}):
        columns = [cell for cell in cells if cell[0] == scale]
        if any(other != 1 for other, _ in cells):
            lines += [f"**Guidance {scale:g}{', none' if scale == 1 else ''}**", ""]
        lines += ["| arm | " + " | ".join(f"{steps} steps" for _, steps in columns) + " |", "|---|" + "---|" * len(columns)]
        for name in order:
            told = []
            for cell in columns:
                values = [of[cell] for of in arms[name].values() if cell in of]
                text = f"{median(values):.3g}" if values else "-"
                if name != baseline and values:
                    found = difference(arms[name], arms[baseline], cell, measure)
                    tested, marked = tested + (found.seeds > 1), marked + bool(found.mark)
                    text += f" ({found})"
                told.append(text)
            lines.append(f"| {name} | " + " | ".join(told) + " |")
        lines.append("")
    counts = sorted({len(seeds) for seeds in arms.values()})
    seeds = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    compared = MEASURES[measure]
    less, more = compared.marks
    marks = f"{more} more and {less} less" if compared.better == "more" else f"{less} less and {more} more"
    change, of = (
        (f"geometric mean ratio to {baseline}", "logarithms") if compared.ratios else (f"mean difference from {baseline}", "values")
    )
    lines += [
        f"Medians over {seeds} seeds; in brackets the {change}, {marks} where a paired t-test of the",
        f"{of} gives p < {ALPHA}. {tested} comparisons, {marked} marked; chance alone would mark some {ALPHA * tested:.0f}.",
    ]
    if compared.better is None:
        lines.append("Neither less nor more of it is better by itself.")
    return "\n".join(lines)
