"""The samples that a page shows: a few of each arm's last grid, those at which the arms differ most, and the whole grids."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy

from immiscible.errors import UserError
from immiscible.reports.arms import Report
from immiscible.reports.runs import Run
from immiscible.reports.sentences import numbers
from immiscible.sampling.pipelines import guided

if TYPE_CHECKING:
    from PIL import Image

FEW = 4  # positions of which every arm's sample is shown
LEAST_SIDE, MOST_SIDE = 160, 256  # pixels of such a sample: smaller ones are enlarged by a whole factor, larger ones shrunk
COMPARED = 64  # pixels a side at which samples are compared, whatever their size
MOST_PIXELS, MOST_BYTES = 1024, 2**21  # a side of a whole grid, and of all of them together


class Picture(NamedTuple):
    """A PNG in base64, and what it is of."""

    caption: str
    data: str


@dataclass(frozen=True)
class Samples:
    """What a page shows of the arms' last grids.

    Attributes:
        legend: the seed, how the shown ones were chosen, and what all grids are of.
        rows: of each arm the samples at the chosen positions, side by side.
        grids: of each arm the whole grid; empty where the rows show it already, or where they would make the page large.
    """

    legend: str
    rows: Sequence[Picture]
    grids: Sequence[Picture]


@dataclass(frozen=True)
class _Grid:
    """An arm's last grid, as square as possible and without gaps, as `immiscible.sampling.pipelines.image_grid` makes it."""

    arm: str
    run: Run
    path: Path
    picture: Image.Image

    @property
    def count(self) -> int:
        """How many images it is of."""
        return len(_grid_prompts(self.run.config)) or int(self.run.config.get("eval_batch_size") or 1)

    @property
    def columns(self) -> int:
        """How many images stand in a row."""
        return math.ceil(math.sqrt(self.count))

    @property
    def rows(self) -> int:
        """How many rows there are, the last of which may end with empty places."""
        return math.ceil(self.count / self.columns)

    @property
    def is_cut(self) -> bool:
        """Whether it can be cut into its images."""
        return self.picture.width % self.columns == 0 and self.picture.height % self.rows == 0

    def cell(self, position: int) -> Image.Image:
        """The image at a position, counted row by row from 0."""
        width, height = self.picture.width // self.columns, self.picture.height // self.rows
        row, column = divmod(position, self.columns)
        return self.picture.crop((column * width, row * height, (column + 1) * width, (row + 1) * height))


def samples_of(report: Report) -> Samples | None:
    """What to show of the seed that most arms have; None where no run has a grid.

    Raises:
        UserError: (exit code 1) a grid cannot be read.
    """
    found: dict[int, list[tuple[str, Run, Path]]] = {}
    for name, arm in report.arms.items():
        for seed, run in sorted(arm.runs.items()):
            if pictures := sorted((run.folder / "samples").glob("step-[0-9]*.png")):
                found.setdefault(seed, []).append((name, run, pictures[-1]))
    if not found:
        return None
    seed = max(sorted(found), key=lambda number: len(found[number]))
    grids = [_Grid(name, run, path, _read(path)) for name, run, path in found[seed]]
    words = {grid.arm: _grid_words(grid.run.config) for grid in grids}
    common = next(iter(words.values())) if len(set(words.values())) == 1 else ""
    step = {grid.arm: f"{grid.arm}, step {int(grid.path.stem.partition('-')[2])}" for grid in grids}
    captions = {name: text if common else f"{text}. {words[name]}".rstrip(". ") for name, text in step.items()}
    cut = [grid for grid in grids if grid.is_cut]
    positions = _positions(cut)
    rows = [Picture(captions[grid.arm], _png(_joined([_seen(grid.cell(place)) for place in positions], FEW))) for grid in cut]
    whole: list[Picture] = []
    if not all(grid.is_cut and grid.count <= FEW for grid in grids):
        whole = [Picture(captions[grid.arm], _png(_whole(grid))) for grid in grids]
    if rows and sum(len(data) for _, data in whole) > MOST_BYTES:
        whole = []
    legend = f"Seed {seed}: {_choice(cut, positions)} The whole grids are in each run's folder of samples. {common}"
    return Samples(legend.rstrip(), rows, whole)


def _grid_prompts(config: Mapping[str, Any]) -> list[str]:
    """What a text run's grids are of, an image each; empty for other runs."""
    if one := config.get("validation_prompt"):
        return [one] * int(config.get("num_validation_images", 1))
    return list(config.get("validation_prompts") or [])


def _grid_words(config: Mapping[str, Any]) -> str:
    """What a run's grids are of, where that is not the data as such."""
    if prompts := list(dict.fromkeys(_grid_prompts(config))):
        return f"Guidance {config.get('guidance_scale')}; row by row: {'; '.join(prompts)}."
    guidance = guided(config, config.get("guidance_scale", 1))
    return f"In the order of classes{guidance and f', {guidance}'}." if config.get("class_conditional") else ""


def _read(path: Path) -> Image.Image:
    from PIL import Image

    try:
        with Image.open(path) as picture:
            return picture.convert("RGB")
    except OSError:
        raise UserError(f"{path}: no picture that can be read; the report shows it, so repair or delete it", exit_code=1) from None


def _positions(grids: Sequence[_Grid]) -> list[int]:
    """Up to `FEW` positions that all grids have, in order: those at which they differ most, which for one grid are the first.

    They differ by the sum over pairs of grids, pixels and channels of (x_i - x_j)^2, which is n sum x_i^2 - (sum x_i)^2 and is taken in
    whole numbers, so that equal ones are equal: of these the first come first.
    """
    from PIL import Image

    def agreement(position: int) -> int:
        cells = [grid.cell(position).resize((COMPARED, COMPARED), Image.Resampling.BOX) for grid in grids]
        values = numpy.stack([numpy.asarray(cell, dtype=numpy.int64) for cell in cells])
        return int((values.sum(0) ** 2).sum() - len(values) * (values**2).sum())

    shared = range(min((grid.count for grid in grids), default=0))
    return sorted(sorted(shared, key=agreement)[:FEW])


def _choice(grids: Sequence[_Grid], positions: Sequence[int]) -> str:
    """Which samples are shown, in words."""
    count = min((grid.count for grid in grids), default=0)
    if len(positions) == count:
        return "the same starting noises in every arm's last grid."
    if len(grids) == 1:
        return f"the first {len(positions)} of {count} samples of the last grid."
    return (
        f"{len(positions)} of {count} samples of each arm's last grid, those at which the arms differ most (by the summed squared "
        f"difference of their pictures): positions {numbers([place + 1 for place in positions])}, counted row by row; each column has the "
        f"same starting noise."
    )


def _seen(cell: Image.Image) -> Image.Image:
    """A sample at a size at which it is seen, its pixels sharp where it is enlarged."""
    from PIL import Image

    factor = max(1, math.ceil(LEAST_SIDE / max(cell.size)))
    seen = cell.resize((cell.width * factor, cell.height * factor), Image.Resampling.NEAREST)
    seen.thumbnail((MOST_SIDE, MOST_SIDE))
    return seen


def _whole(grid: _Grid) -> Image.Image:
    """All of a grid with gaps between its images, or as it is where it cannot be cut."""
    picture = grid.picture.copy()
    if grid.is_cut:
        picture = _joined([grid.cell(position) for position in range(grid.count)], grid.columns)
    picture.thumbnail((MOST_PIXELS, MOST_PIXELS))
    return picture


def _joined(cells: Sequence[Image.Image], columns: int) -> Image.Image:
    """Images of one size row by row, with white between them, where dark backgrounds would run together."""
    from PIL import Image

    columns = min(columns, len(cells))
    (width, height), rows = cells[0].size, math.ceil(len(cells) / columns)
    gap = max(1, width // 16)
    joined = Image.new("RGB", ((width + gap) * columns - gap, (height + gap) * rows - gap), "white")
    for position, cell in enumerate(cells):
        row, column = divmod(position, columns)
        joined.paste(cell, (column * (width + gap), row * (height + gap)))
    return joined


def _png(picture: Image.Image) -> str:
    data = io.BytesIO()
    picture.save(data, format="PNG", optimize=True)
    return base64.b64encode(data.getvalue()).decode()
