import base64
import io
import re

import numpy
import pytest
from compared import decay, words, write_run
from PIL import Image

from immiscible.reports.comparison import compare
from immiscible.reports.page import html_report
from immiscible.reports.samples import FEW, samples_of
from immiscible.sampling.pipelines import image_grid

RED, GREEN, WHITE = (255, 0, 0), (0, 255, 0), (255, 255, 255)


def picture(data):
    return Image.open(io.BytesIO(base64.b64decode(data)))


def with_grid(folder, images, **flags):
    """A run whose last grid is of these images, uint8 [N, H, W, 3]."""
    flags = {"eval_batch_size": len(images), **flags}
    write_run(folder, {5: decay()}, **flags)
    image_grid(images).save(folder / "samples" / "step-0000500.png")
    return folder


def noise(count=16, side=8):
    return numpy.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=numpy.uint8)


def changed(images, **by):
    """The images with some moved by so much, ``p3=50`` the one at position 3."""
    moved = images.copy()
    for name, much in by.items():
        moved[int(name[1:])] ^= numpy.uint8(much)
    return moved


def arms_of(tmp_path, **grids):
    return {name: [with_grid(tmp_path / name, images)] for name, images in grids.items()}


def test_the_samples_at_which_arms_differ_most_are_shown_enlarged_beside_one_another(tmp_path):
    plain = noise()
    other = changed(plain, p2=128, p5=64, p7=1, p8=32, p11=255, p15=2)
    arms = arms_of(tmp_path, baseline=plain, other=other, copy=plain)
    page = html_report(compare(arms))
    samples = samples_of(compare(arms))
    assert [caption for caption, _ in samples.rows] == ["baseline, step 500", "other, step 500", "copy, step 500"]
    for (_, data), images in zip(samples.rows, (plain, other, plain), strict=True):
        row = picture(data)
        assert row.size == (4 * 192 + 3 * 12, 192)  # 8 pixels, 64 in the grid, here 192 with 12 between them
        for number, position in enumerate((2, 5, 8, 11)):
            cell = row.crop((number * 204, 0, number * 204 + 192, 192))
            assert (numpy.asarray(cell) == numpy.kron(images[position], numpy.ones((24, 24, 1), numpy.uint8))).all()
    assert "4 of 16 samples of each arm's last grid, those at which the arms differ most" in words(page)
    assert "positions 3, 6, 9 and 12, counted row by row" in words(page) and "each run's folder of samples" in words(page)
    folded = page[page.index("<details>") : page.index("</details>")]
    assert folded.count("data:image/png") == 3 == page[: page.index("<details>")].count("data:image/png") and "<script" not in page


def test_what_three_arms_differ_in_counts_every_pair(tmp_path):
    """At position 9 one arm is 60 from both others, 2 x 60^2; at position 4 all are apart, 50^2 + 50^2 + 100^2."""
    flat = numpy.full((16, 8, 8, 3), 100, dtype=numpy.uint8)
    one, two = flat.copy(), flat.copy()
    one[9], one[4], two[4], one[1], two[2], two[3] = 160, 150, 200, 170, 180, 190
    samples = samples_of(compare(arms_of(tmp_path, baseline=flat, one=one, two=two)))
    assert "positions 2, 3, 4 and 5," in samples.legend


def test_equal_grids_and_ties_go_by_position(tmp_path):
    assert "positions 1, 2, 3 and 4," in samples_of(compare(arms_of(tmp_path / "a", baseline=noise(), copy=noise()))).legend
    tied = changed(noise(), p3=1, p6=1, p9=1, p12=1, p14=1)
    assert "positions 4, 7, 10 and 13," in samples_of(compare(arms_of(tmp_path / "b", baseline=noise(), other=tied))).legend


def test_one_arm_shows_its_first_samples(tmp_path):
    samples = samples_of(compare(arms_of(tmp_path, baseline=noise())))
    assert samples.legend.startswith("Seed 0: the first 4 of 16 samples of the last grid.")
    first = picture(samples.rows[0].data).crop((0, 0, 192, 192)).resize((8, 8), Image.Resampling.NEAREST)
    assert (numpy.asarray(first) == noise()[0]).all()


def test_arms_of_unequal_grids_show_positions_that_all_have_and_large_samples_are_shrunk(tmp_path):
    arms = arms_of(tmp_path, baseline=noise(9, side=512), other=noise(6, side=64))
    samples = samples_of(compare(arms))
    assert "4 of 6 samples" in samples.legend
    assert [picture(data).height for _, data in samples.rows] == [256, 192]


def test_whole_grids_that_would_make_the_page_large_are_left_out(tmp_path):
    arms = arms_of(tmp_path, baseline=noise(16, side=256), other=noise(16, side=256))  # noise does not compress: 3 MB each
    samples = samples_of(compare(arms))
    assert len(samples.rows) == 2 and not samples.grids
    assert "<details>" not in html_report(compare(arms))


@pytest.mark.parametrize("count", [1, 2, 4])
def test_grids_that_are_shown_in_rows_already_are_not_shown_twice(tmp_path, count):
    arms = arms_of(tmp_path, baseline=noise(count), other=changed(noise(count), p0=9))
    samples = samples_of(compare(arms))
    assert [picture(data).width for _, data in samples.rows] == [204 * count - 12] * 2 and not samples.grids
    assert samples.legend.startswith("Seed 0: the same starting noises in every arm's last grid.")


def test_samples_are_kept_apart(tmp_path):
    images = numpy.zeros((9, 32, 32, 3), dtype=numpy.uint8)
    images[1] = RED
    page = html_report(compare(arms_of(tmp_path, baseline=images)))
    row, whole = map(picture, re.findall(r"data:image/png;base64,([^\"]+)", page))
    assert row.size == (FEW * 192 + 36, 192) and row.crop((192, 0, 204, 192)).getcolors() == [(12 * 192, WHITE)]
    assert row.crop((204, 0, 396, 192)).getcolors() == [(192 * 192, RED)]
    gap = [(x, y) for x in range(200) for y in range(200) if x % 68 >= 64 or y % 68 >= 64]
    assert whole.size == (200, 200) and {whole.getpixel(spot) for spot in gap} == {WHITE}
    assert whole.crop((68, 0, 132, 64)).getcolors() == [(4096, RED)]
    assert whole.crop((0, 68, 64, 132)).getcolors() == [(4096, (0, 0, 0))]


def test_a_picture_that_is_no_such_grid_is_shown_as_it_is(tmp_path):
    arms = arms_of(tmp_path, baseline=noise(), other=changed(noise(), p3=9))
    path = tmp_path / "other" / "samples" / "step-0000500.png"
    Image.new("RGB", (63, 64)).save(path)
    samples = samples_of(compare(arms))
    assert [caption for caption, _ in samples.rows] == ["baseline, step 500"]
    assert [picture(data).size for _, data in samples.grids] == [(4 * 64 + 3 * 4,) * 2, (63, 64)]
    Image.new("RGB", (63, 64)).save(tmp_path / "baseline" / "samples" / path.name)
    samples = samples_of(compare(arms))
    assert not samples.rows and [picture(data).size for _, data in samples.grids] == [(63, 64)] * 2


def test_grids_of_prompts_are_kept_apart(tmp_path):
    images = numpy.zeros((2, 64, 64, 3), dtype=numpy.uint8)
    images[1] = GREEN
    arms = {"baseline": [with_grid(tmp_path / "a", images, eval_batch_size=9, text=True, validation_prompts=["a", "b"])]}
    row = picture(samples_of(compare(arms)).rows[0].data)
    assert row.size == (396, 192)
    assert sorted(row.getcolors()) == [(12 * 192, WHITE), (192 * 192, (0, 0, 0)), (192 * 192, GREEN)]
