"""Images opened, and images held out."""

from __future__ import annotations

import struct
import zlib

import pytest
import torch
from launch import tiny
from PIL import Image

from immiscible.data.arguments import DataArguments
from immiscible.data.bundled import load_digits
from immiscible.data.loading import load_images, training_source, with_held_out
from immiscible.data.sources import split_source
from immiscible.errors import UserError


def test_photographs_taken_sideways_are_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[274] = 6  # orientation: rotate by 90 degrees
    Image.new("RGB", (8, 4)).save(tmp_path / "a.jpg", exif=exif)
    assert load_images(train_data_dir=str(tmp_path)).load(0).size == (4, 8)


@pytest.mark.parametrize("orientation", [None, 1, 3, 6, 8])
@pytest.mark.parametrize("kind", ["jpg", "png", "webp", "tiff"])
def test_the_size_in_the_header_is_that_of_the_upright_image(tmp_path, kind, orientation):
    exif = Image.Exif()
    if orientation:
        exif[274] = orientation
    Image.new("RGB", (8, 4)).save(tmp_path / f"a.{kind}", exif=exif)
    source = load_images(train_data_dir=str(tmp_path))
    assert source.size(0) == source.load(0).size[::-1] == ((8, 4) if orientation in (6, 8) else (4, 8))


def test_broken_exif_data_spoils_no_image(tmp_path):
    Image.new("RGB", (8, 4)).save(tmp_path / "a.png", exif=b"Exif\0\0what is this")
    source = load_images(train_data_dir=str(tmp_path))
    assert source.load(0).size == (8, 4) and source.size(0) == (4, 8)


def png_of(width: int, height: int) -> bytes:
    """The beginning of a PNG of that size, which is all that Pillow reads to know it."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">II4s", zlib.crc32(header), 9, b"IDAT")


def test_a_scan_beyond_pillows_limit_says_what_to_do(script, tmp_path):
    for name, side in (("large.png", 10_000), ("larger.png", 14_000)):
        (tmp_path / name[:-4]).mkdir()
        (tmp_path / name[:-4] / name).write_bytes(png_of(side, side))
    result = script(tiny(tmp_path / "run", train_data_dir=tmp_path / "larger", train_batch_size=1))
    assert result.code == 1 and "larger.png: Image size (196000000 pixels) exceeds limit of 178956970 pixels" in result.error
    assert "put a smaller copy of it in its place" in result.error and "bomb" not in result.stderr
    result = script(tiny(tmp_path / "other", train_data_dir=tmp_path / "large", train_batch_size=1))
    assert "large.png: image file is truncated" in result.error and "Bomb" not in result.stderr  # of a sound file all is read


def test_split_is_a_fixed_partition():
    source = load_digits()
    train, held_out = split_source(source, 0.1)
    assert (len(train), len(held_out)) == (1617, 180)
    assert sorted([*train.indices, *held_out.indices]) == list(range(1797))
    torch.manual_seed(4)
    assert split_source(source, 0.1)[1].indices == held_out.indices


@pytest.mark.parametrize("fraction", [0, 1, -0.5, 1.5, 1e-6, 1 - 1e-6])
def test_a_split_with_an_empty_side_is_refused(fraction):
    with pytest.raises(UserError, match=r"--validation_split .* of 1797 images leaves none on one side"):
        split_source(load_digits(), fraction)


def colors(folder, **classes):
    """A folder of 8x8 images, so many of each class."""
    for name, count in classes.items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / name / f"{number}.png")
    return str(folder)


def test_held_out_images_of_another_folder(tmp_path):
    train, other = colors(tmp_path / "train", cat=6, dog=6), colors(tmp_path / "other", cat=2, dog=1)
    arguments = DataArguments(train_data_dir=train, max_train_samples=5)
    source, held_out = with_held_out(training_source, arguments, "--class_conditional", share=None, folder=other)
    assert (len(source), len(held_out)) == (5, 3) and [held_out.label(row) for row in range(3)] == [0, 0, 1]
    source, held_out = with_held_out(training_source, DataArguments(bundled_data="digits"), None, share=None, folder=other)
    assert (len(source), len(held_out)) == (1797, 3)
    _, held_out = with_held_out(training_source, DataArguments(bundled_data="digits"), None, share=0.5, folder=None)
    assert len(held_out) == round(1797 / 2)
    assert with_held_out(training_source, arguments, None, share=None, folder=None)[1] is None


def test_held_out_images_that_do_not_fit_are_one_line(tmp_path):
    train, other = colors(tmp_path / "train", cat=2, dog=2), colors(tmp_path / "other", ant=1, dog=1)
    arguments = DataArguments(train_data_dir=train)
    with pytest.raises(UserError, match=r"--eval_data_dir .*other has the classes ant, dog; it must have those of .* images, cat, dog"):
        with_held_out(training_source, arguments, "--class_conditional", share=None, folder=other)
    assert len(with_held_out(training_source, arguments, None, share=None, folder=other)[1]) == 2  # where no class counts
    with pytest.raises(UserError, match=r"--eval_data_dir .*nowhere: no such folder"):
        with_held_out(training_source, arguments, None, share=None, folder=str(tmp_path / "nowhere"))
