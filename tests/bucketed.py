"""Captioned images of several shapes, and the flags that crop them to buckets."""

from __future__ import annotations

import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy
from PIL import Image

SHAPES = [(48, 40)] * 7 + [(32, 64)] * 9 + [(64, 30)] * 6 + [(40, 40)] * 5  # in batches of 2: 6, 4 and 3 of them
BUCKETS: dict[str, Any] = {"buckets": "16,32;32,32;32,16", "train_batch_size": 2, "gradient_accumulation_steps": 2}
_FOLDER = tempfile.TemporaryDirectory(prefix="bucketed-")


@cache
def mixed_folder() -> Path:
    """Noise of `SHAPES`, shuffled, each with two captions."""
    folder = Path(_FOLDER.name) / "images"
    folder.mkdir()
    draw = numpy.random.default_rng(0)
    lines = []
    for number, shape in enumerate(draw.permutation(SHAPES).tolist()):
        Image.fromarray(draw.integers(0, 256, (*shape, 3), dtype=numpy.uint8)).save(folder / f"{number:03}.png")
        lines.append(json.dumps({"file_name": f"{number:03}.png", "text": [f"thing {number}", f"a {number}"]}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder
