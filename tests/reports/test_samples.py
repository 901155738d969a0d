import base64
import io
import re

from compared import decay, write_run
from PIL import Image

from immiscible.reports.comparison import compare
from immiscible.reports.page import html_report


def test_samples_are_kept_apart(tmp_path):
    arms = {"baseline": [write_run(tmp_path / "a", {5: decay()}, eval_batch_size=4)]}
    grid = Image.new("RGB", (64, 64), "black")
    grid.paste("red", (32, 0, 64, 32))
    grid.save(tmp_path / "a" / "samples" / "step-0000500.png")
    data = re.search(r"data:image/png;base64,([^\"]+)", html_report(compare(arms)))[1]
    shown = Image.open(io.BytesIO(base64.b64decode(data)))
    gap = [(x, y) for x in range(66) for y in range(66) if x in (32, 33) or y in (32, 33)]
    assert shown.size == (66, 66) and {shown.getpixel(spot) for spot in gap} == {(255, 255, 255)}
    assert shown.crop((34, 0, 66, 32)).getcolors() == [(1024, (255, 0, 0))]
    assert shown.crop((0, 34, 32, 66)).getcolors() == [(1024, (0, 0, 0))]
    grid.resize((63, 64)).save(tmp_path / "a" / "samples" / "step-0000500.png")  # no grid of four: shown as it is
    data = re.search(r"data:image/png;base64,([^\"]+)", html_report(compare(arms)))[1]
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (63, 64)


def test_grids_of_prompts_are_kept_apart(tmp_path):
    arms = {"baseline": [write_run(tmp_path / "a", {5: decay()}, text=True, validation_prompts=["a", "b"])]}
    grid = Image.new("RGB", (64, 32), "black")
    grid.paste("red", (32, 0, 64, 32))
    grid.save(tmp_path / "a" / "samples" / "step-0000500.png")
    data = re.search(r"data:image/png;base64,([^\"]+)", html_report(compare(arms)))[1]
    shown = Image.open(io.BytesIO(base64.b64decode(data)))
    assert shown.size == (66, 32) and sorted(shown.getcolors()) == [(64, (255, 255, 255)), (1024, (0, 0, 0)), (1024, (255, 0, 0))]
