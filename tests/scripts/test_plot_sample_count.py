"""What ``scripts/plot_sample_count.py`` prints, draws and refuses."""

from __future__ import annotations

import re
import runpy

import numpy
import pytest
from launch import ROOT
from PIL import Image

from immiscible.errors import UserError

main = runpy.run_path(f"{ROOT}/scripts/plot_sample_count.py")["main"]
WORDS = ["--side", "16", "--draws", "2", "--features", "pixels", "pixels:8"]


@pytest.fixture
def two_sets(tmp_path):
    draws = numpy.random.default_rng(0)
    for name, count in (("reference", 60), ("images", 40)):
        numpy.savez(tmp_path / f"{name}.npz", arr_0=draws.integers(0, 256, (count, 16, 16, 3), dtype=numpy.uint8))
    return ["--reference", str(tmp_path / "reference.npz"), "--images", str(tmp_path / "images.npz")]


def test_the_distance_falls_with_the_number_of_images(two_sets, tmp_path, capsys):
    picture = tmp_path / "deeper" / "counts.png"
    main([*two_sets, *WORDS, "--counts", "10", "20", "40", "--output", str(picture)])
    said = capsys.readouterr().out
    assert "FD-pixels-8x8 (192 features)" in said and "FD-pixels-8x8-PCA8 (8 features)" in said
    falls = [[float(value) for value in re.findall(r"\d+ ([\d.]+)", line)] for line in said.splitlines() if "real images:" in line]
    assert len(falls) == 2 and all(few > more > most for few, more, most in falls), falls
    blind = [line.split(":")[1] for line in said.splitlines() if line.startswith("  ")][:2]
    values = [[float(value) for value in re.findall(r"\d+ ([\d.]+)", line)] for line in blind]
    assert values[0] == pytest.approx(values[1], rel=0.01)  # pixels pooled to 8x8 do not see what is finer
    with Image.open(picture) as image:
        assert len(numpy.unique(numpy.asarray(image.convert("L")))) > 20


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--counts", "10", "41"], "--counts must be from 2 to the number of --images, 40, not 10 41"),
        (["--counts", "10", "--draws", "0"], "--draws must be at least 1"),
        (["--counts", "10", "--features", "pixels:none"], "after the colon goes a number of directions, such as pixels:64"),
        (["--counts", "10", "--features", "pixel"], "the features 'pixel' are unknown"),
    ],
)
def test_what_is_refused(two_sets, tmp_path, words, said):
    with pytest.raises(UserError, match=re.escape(said)):
        main([*two_sets, *WORDS, *words, "--output", str(tmp_path / "x.png")])
