"""The sizes of all images, from their headers."""

from __future__ import annotations

import os

import numpy as np
from pictures import folder, noise, save, truncate

from immiscible.data import image_sizes
from immiscible.data.image_sizes import image_shapes
from immiscible.data.sources import Subset
from immiscible.data.tables import TableImages


def test_sizes_are_those_of_the_images_and_nothing_where_there_is_none(tmp_path, monkeypatch):
    monkeypatch.setattr(image_sizes, "TOGETHER", 3)
    shapes = [(4 + i, 20 - i) for i in range(8)]
    source = folder(tmp_path / "images", {f"{i}.png": noise(*shape, 3) for i, shape in enumerate(shapes)})
    (tmp_path / "images" / "5.png").write_text("no image")
    truncate(tmp_path / "images" / "6.png")  # its header is whole
    wanted = np.array([shape if i != 5 else (0, 0) for i, shape in enumerate(shapes)])
    assert np.array_equal(image_shapes(source, str(tmp_path / "cache")), wanted)
    assert image_shapes(Subset(source, [7, 2]), None).tolist() == [[11, 13], [6, 18]]
    assert not (tmp_path / "cache").exists()  # it took no time


def test_what_took_long_is_read_once_until_an_image_changes(tmp_path, monkeypatch):
    monkeypatch.setattr(image_sizes, "LONG", 0)
    source = folder(tmp_path / "images", {f"{i}.png": noise(8, 9 + i, 3) for i in range(3)})
    first = image_shapes(source, str(tmp_path / "cache"))
    (kept,) = (tmp_path / "cache" / "image-sizes").iterdir()
    read, sizes = [], TableImages.size
    monkeypatch.setattr(TableImages, "size", lambda self, index: read.append(index) or sizes(self, index))
    assert image_shapes(source, str(tmp_path / "cache")).equal(first) and not read
    with kept.open("r+b") as file:  # what is damaged is not believed
        file.seek(-1, os.SEEK_END)
        file.write(b"\x7f")
    assert image_shapes(source, str(tmp_path / "cache")).equal(first) and sorted(read) == [0, 1, 2]
    save(tmp_path / "images" / "1.png", noise(31, 30, 3))
    assert image_shapes(source, str(tmp_path / "cache")).tolist() == [[8, 9], [31, 30], [8, 11]]
