"""The grids of samples that a comparison shows, one for each arm."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from immiscible.errors import UserError
from immiscible.reports.comparison import Comparison
from immiscible.reports.runs import Run

if TYPE_CHECKING:
    from PIL import Image


def _grid_prompts(config: Mapping[str, Any]) -> list[str]:
    """What a text run's grids are of, an image each; empty for other runs."""
    if one := config.get("validation_prompt"):
        return [one] * int(config.get("num_validation_images", 1))
    return list(config.get("validation_prompts") or [])


def _grid_words(config: Mapping[str, Any]) -> str:
    """What a run's grids are of, where that is not the data as such."""
    if prompts := list(dict.fromkeys(_grid_prompts(config))):
        return f"Guidance {config.get('guidance_scale')}; row by row: {'; '.join(prompts)}."
    return "In the order of classes." if config.get("class_conditional") else ""


def sample_grids(comparison: Comparison, most_pixels: int = 1024) -> tuple[str, list[tuple[str, str]]]:
    """The seed that most arms have, with what all its grids are of, and each arm's last grid of it as a data address."""
    from PIL import Image

    grids: dict[int, list[tuple[str, Run, Path]]] = {}
    for name, arm in comparison.arms.items():
        for seed, run in sorted(arm.runs.items()):
            if pictures := sorted((run.folder / "samples").glob("step-[0-9]*.png")):
                grids.setdefault(seed, []).append((name, run, pictures[-1]))
    if not grids:
        return "", []
    seed = max(sorted(grids), key=lambda number: len(grids[number]))
    words = {name: _grid_words(run.config) for name, run, _ in grids[seed]}
    common = next(iter(words.values())) if len(set(words.values())) == 1 else ""
    shown = []
    for name, run, path in grids[seed]:
        try:
            with Image.open(path) as picture:
                spaced = _spaced(picture, len(_grid_prompts(run.config)) or int(run.config.get("eval_batch_size") or 1))
        except OSError:
            raise UserError(f"{path}: no picture that can be read; the report shows it, so repair or delete it", exit_code=1) from None
        spaced.thumbnail((most_pixels, most_pixels))
        data = io.BytesIO()
        spaced.save(data, format="PNG", optimize=True)
        caption = f"{name}, step {int(path.stem.partition('-')[2])}{'' if common else f'. {words[name]}'.rstrip('. ')}"
        shown.append((caption, base64.b64encode(data.getvalue()).decode()))
    return f"Seed {seed}: the same starting noises in every grid, at the end of training. {common}".rstrip(), shown


def _spaced(grid: Image.Image, images: int) -> Image.Image:
    """A grid as square as possible of so many ``images`` with white between them, where dark backgrounds would run together."""
    from PIL import Image

    columns = math.ceil(math.sqrt(images))
    rows = math.ceil(images / columns)
    width, height = grid.width // columns, grid.height // rows
    if (width * columns, height * rows) != grid.size:
        return grid.copy()
    gap = max(1, width // 16)
    spaced = Image.new("RGB", (grid.width + gap * (columns - 1), grid.height + gap * (rows - 1)), "white")
    for row, column in product(range(rows), range(columns)):
        cell = grid.crop((column * width, row * height, (column + 1) * width, (row + 1) * height))
        spaced.paste(cell, (column * (width + gap), row * (height + gap)))
    return spaced
