"""Folders of images."""

from __future__ import annotations

from pathlib import Path

from PIL import Image


def colored(folder: Path, color=(204, 102, 51), count: int = 16) -> Path:
    folder.mkdir()
    for number in range(count):
        Image.new("RGB", (8, 8), color).save(folder / f"{number:02}.png")
    return folder
