"""The last distances of a grid's arms at every number of inference steps and guidance scale, each tested against one arm over the seeds.

A cell is a gain or a harm where a paired t-test of the logarithms of the distances, over the seeds that both arms have, gives p below
`ALPHA`. How many cells were tested stands beneath: of so many, chance alone marks `ALPHA` of them.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from scipy import stats

from immiscible.errors import UserError

ALPHA = 0.05
MEASURES = {
    "frechet_distance": "distance from the images trained on",
    "frechet_distance_held_out": "distance from the images held out",
    "nearest_neighbor_ratio": "nearest trained image over nearest held out (below 1: nearer to the trained ones)",
}
Cell = tuple[float, int]  # guidance scale, inference steps
Arms = dict[str, dict[int, dict[Cell, float]]]  # arm, seed


@dataclass(frozen=True)
class Difference:
    """An arm against another in one cell.

    Attributes:
        ratio: geometric mean over the seeds of its distance over the other's.
        p: of the paired test; NaN with fewer than two seeds in common.
        seeds: how many they have in common.
    """

    ratio: float
    p: float
    seeds: int

    @property
    def mark(self) -> str:
        """▲ less, ▼ more, nothing where the test does not tell."""
        return "" if not self.p < ALPHA else "▲" if self.ratio < 1 else "▼"


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
        by_scale = {"1": line[measure], **line.get(f"{measure}_guided", {})}
        return {(float(scale), int(steps)): float(value) for scale, of in by_scale.items() for steps, value in of.items()}
    except (OSError, IndexError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: its last line holds no {measure} ({type(error).__name__}: {error})") from None


def difference(arm: Mapping[int, Mapping[Cell, float]], other: Mapping[int, Mapping[Cell, float]], cell: Cell) -> Difference:
    """See `Difference`; both must be positive and finite there."""
    seeds = sorted(seed for seed in arm.keys() & other.keys() if cell in arm[seed] and cell in other[seed])
    logs = [math.log(arm[seed][cell] / other[seed][cell]) for seed in seeds]
    if not logs:
        return Difference(math.nan, math.nan, 0)
    p = float(stats.ttest_1samp(logs, 0).pvalue) if len(logs) > 1 else math.nan
    return Difference(math.exp(math.fsum(logs) / len(logs)), p, len(logs))


def paired_tables(arms: Arms, baseline: str) -> str:
    """Markdown: for each guidance scale the arms against the numbers of inference steps, medians over the seeds, and what is marked.

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
                    found = difference(arms[name], arms[baseline], cell)
                    tested, marked = tested + (found.seeds > 1), marked + bool(found.mark)
                    text += f" ({found.ratio:.2f}x {found.mark})".replace(" )", ")")
                told.append(text)
            lines.append(f"| {name} | " + " | ".join(told) + " |")
        lines.append("")
    counts = sorted({len(seeds) for seeds in arms.values()})
    seeds = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    lines += [
        f"Medians over {seeds} seeds; in brackets the geometric mean ratio to {baseline}, ▲ less and ▼ more where a paired t-test of the",
        f"logarithms gives p < {ALPHA}. {tested} comparisons, {marked} marked; chance alone would mark some {ALPHA * tested:.0f}.",
    ]
    return "\n".join(lines)
