"""Buckets of aspect ratios: their sizes, which one an image goes to, what is seen of it, and the order of the batches."""

from __future__ import annotations

from collections import Counter
from math import log
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import folder, grays, noise, truncate
from PIL import Image

from immiscible.configs import TextToImageConfig
from immiscible.data.batches import BucketOrder, ImageDataset, check_batch, collate
from immiscible.data.buckets import Buckets, assigned_buckets, bucket_sizes, check_multiple, nearest_bucket
from immiscible.data.transforms import ImageTransform
from immiscible.errors import UserError
from immiscible.flags import parse_config

REQUIRED = ["--pretrained_model_name_or_path", "m", "--train_data_dir", "d"]
SIZES = [(16, 32), (24, 24), (32, 16)]


def parse(*words) -> TextToImageConfig:
    return parse_config(TextToImageConfig, [*REQUIRED, *map(str, words)], program="", description="")


def test_the_sizes_that_are_made_of_a_resolution():
    halves = {
        512: [(320, 640), (384, 640), (448, 576), (512, 512)],
        1024: [(704, 1408), (768, 1344), (832, 1216), (896, 1152), (960, 1088), (1024, 1024)],
    }
    for resolution, flat in halves.items():
        sizes = bucket_sizes(parse("--buckets", "auto", "--resolution", resolution))
        assert sizes == [*flat, *((width, height) for height, width in reversed(flat[:-1]))]


@pytest.mark.parametrize(("resolution", "step", "ratio"), [(512, 64, 4), (1024, 32, 2.5), (100, 8, 2), (640, 128, 3.7), (72, 8, 1.2)])
def test_no_bucket_is_larger_than_the_square_nor_longer_than_asked(resolution, step, ratio):
    sizes = bucket_sizes(parse("--buckets", "auto", "--resolution", resolution, "--bucket_step", step, "--bucket_max_ratio", ratio))
    ratios = [height / width for height, width in sizes]
    assert ratios == sorted(set(ratios)) and [1 / each for each in reversed(ratios)] == pytest.approx(ratios)
    for height, width in sizes:
        assert height * width <= resolution**2 and height % step == width % step == 0
        assert max(height, width) <= ratio * min(height, width)
    side = resolution // step * step
    assert (side, side) in sizes


def test_sizes_that_are_listed_are_height_and_width():
    assert bucket_sizes(parse("--aspect_ratio_buckets", "512,512; 384,768;768,384")) == [(384, 768), (512, 512), (768, 384)]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--buckets", "512x512"], r"--buckets '512x512': give auto, or sizes as height,width;height,width such as 512,512;448,576"),
        (["--buckets", "512,512,3"], "give auto, or sizes"),
        (["--buckets", "512,512;"], "give auto, or sizes"),
        (["--buckets", "0,512"], "each side must be from 1 to 16384, not those of 0,512"),
        (["--buckets", "64,64;64,64"], "64,64 is there twice"),
        (["--buckets", "auto", "--resolution", 64], "has no bucket beside the square at --resolution 64, --bucket_step 64 and"),
        (["--buckets", "auto", "--resolution", 32], "has no bucket beside the square"),
        (["--buckets", "auto", "--bucket_max_ratio", 1], "give a smaller step or a larger ratio"),
    ],
)
def test_sizes_that_are_none(words, message):
    with pytest.raises(UserError, match=message):
        parse(*words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--bucket_step", 32], "--bucket_step is of --buckets auto"),
        (["--buckets", "64,64", "--bucket_max_ratio", 3], "--bucket_max_ratio is of --buckets auto"),
        (["--buckets", "auto", "--streaming", "--max_train_steps", 1], "--buckets needs the sizes of all images beforehand"),
        (["--buckets", "auto", "--crop", "adm"], "--crop adm cuts squares"),
        (["--buckets", "auto", "--model_preset", "dit-tiny"], "--model_preset dit-tiny is a network of squares"),
        (
            ["--buckets", "auto", "--noise_coupling", "assignment", "--coupling_condition", "centered"],
            "--coupling_condition centered keeps means of images of one size",
        ),
        (["--buckets", "auto", "--bucket_max_ratio", 0.5], "--bucket_max_ratio must be at least 1"),
    ],
)
def test_flags_that_do_not_go_together(words, message):
    with pytest.raises(UserError, match=message):
        parse(*words)


def test_sides_that_the_network_cannot_divide_are_refused():
    listed, made = parse("--buckets", "64,64;40,100"), parse("--buckets", "auto", "--resolution", 64, "--bucket_step", 4)
    with pytest.raises(UserError, match="--buckets: the sides of 40,100 must be multiples of 8, by which the VAE divides images"):
        check_multiple(bucket_sizes(listed), listed, 8, "the VAE")
    with pytest.raises(UserError, match="--bucket_step 4 must be a multiple of 8, by which the VAE divides images"):
        check_multiple(bucket_sizes(made), made, 8, "the VAE")
    check_multiple(bucket_sizes(listed), listed, 4, "the VAE")


def test_an_image_goes_to_the_nearest_ratio_by_logarithm():
    draw = np.random.default_rng(0)
    shapes, sizes = draw.integers(10, 4000, (300, 2)), bucket_sizes(parse("--buckets", "auto", "--resolution", 1024))
    found = nearest_bucket(torch.from_numpy(shapes), sizes).tolist()
    for (height, width), number in zip(shapes, found, strict=True):
        distances = [abs(log(height / width) - log(tall / wide)) for tall, wide in sizes]
        assert distances[number] == pytest.approx(min(distances), abs=1e-12)
    assert set(found) == set(range(len(sizes)))
    assert nearest_bucket(torch.tensor([[0, 0], [500, 490], [30, 29]]), [(32, 32), (512, 512)]).tolist() == [-1, 1, 0]


SHAPES = [(480, 640), (640, 480), (300, 900), (1000, 301), (350, 350), (97, 103), (60, 20), (25, 90)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("precise", [False, True])
def test_no_image_is_stretched_and_every_bucket_is_covered(shape, precise):
    """Red grows to the right and green downwards at one rate in the original, so they do in the crop, wherever that is."""
    rows, columns = np.mgrid[: shape[0], : shape[1]] / max(shape)
    original = np.stack([columns, rows, np.full(shape, 0.9)], axis=2)
    image = Image.fromarray((original * 255).round().astype(np.uint8))
    sizes = [(64, 128), (96, 96), (128, 64)]
    size = sizes[int(nearest_bucket(torch.tensor([shape]), sizes))]
    transform = ImageTransform(96, preserve_input_precision=precise, interpolation="bilinear")
    for epoch in range(3):
        pixels = transform.augment(transform.decode(image), epoch, 0, size)
        assert pixels.shape == (3, *size)
        assert ((pixels[2] + 1) / 2 - 0.9).abs().max() < 0.01  # nothing is padded
        red, green = pixels[0, :, 4:-4], pixels[1, 4:-4]
        across, down = ((part[-1] - part[0]).mean().item() / (len(part) - 1) for part in (red.T, green))
        assert across == pytest.approx(down, rel=0.03)
        cut = transform.cut(*shape, epoch, 0, size)
        assert cut.height * shape[1] / (cut.width * shape[0]) == pytest.approx(1, abs=1 / min(cut[:2]))
        assert (cut.height == size[0] and cut.width >= size[1]) or (cut.width == size[1] and cut.height >= size[0])


@pytest.mark.parametrize("options", [{}, {"center_crop": True}])
@pytest.mark.parametrize("size", SIZES)
def test_the_geometry_is_that_of_the_buckets_crop(options, size):
    original = noise(29, 37)
    transform = ImageTransform(24, channels=1, random_flip=True, seed=1, **options)
    for epoch in range(6):
        height, width, top, left, *target = transform.geometry(29, 37, epoch, 2, size)
        cut = transform.cut(29, 37, epoch, 2, size)
        resized = np.array(Image.fromarray(original).resize((cut.width, cut.height), Image.Resampling.BILINEAR))
        seen = (resized[:, ::-1] if transform.flips(epoch, 2) else resized)[top : top + size[0], left : left + size[1]]
        assert (height, width) == (29, 37) and tuple(target) == size
        assert np.array_equal(grays(transform.augment(transform.decode(original), epoch, 2, size))[0].round().numpy(), seen)


# Order


OF = torch.tensor([0] * 21 + [1] * 40 + [2] * 7 + [1] * 3 + [-1] * 2)  # 21, 43 and 7 images, and 2 that cannot be read


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("window", [1, 3])
def test_a_window_of_all_ranks_is_of_one_bucket(ranks, window):
    def order(rank, count, **options):
        return BucketOrder(Buckets(SIZES, OF), 4 // count, 7, window=window, stop=24, rank=rank, num_processes=count, **options)

    per_rank = [list(order(rank, ranks)) for rank in range(ranks)]
    merged = [[key for rows in per_rank for key in rows[number]] for number in range(24)]
    assert merged == list(order(0, 1))
    buckets = [{int(OF[index]) for _, index in batch} for batch in merged]
    assert all(len(set.union(*buckets[first : first + window])) == 1 for first in range(0, 24, window))
    assert len({tuple(each) for each in buckets[: order(0, 1).batches_per_epoch]}) > 1
    assert merged[5:] == list(order(0, 1, start=5))  # whoever goes on in the middle of an epoch


@pytest.mark.parametrize("window", [1, 2])
def test_every_image_comes_once_in_an_epoch_but_the_remainders_that_are_counted(window):
    order = BucketOrder(Buckets(SIZES, OF), 4, 7, window=window, stop=60)
    whole = [count // (4 * window) * 4 * window for count in (21, 43, 7)]
    assert order.batches_per_epoch * 4 == sum(whole)
    epochs = [order.permutation(epoch) for epoch in range(3)]
    for rows in epochs:
        assert len(set(rows.tolist())) == len(rows) == sum(whole)
        assert [Counter(OF[rows].tolist())[number] for number in range(3)] == whole
    assert not torch.equal(epochs[0], epochs[1])
    assert set(epochs[0].tolist()) != set(epochs[1].tolist())  # what is left out in one epoch is not in the next
    firsts = [OF[rows.view(-1, 4)[:, 0]].tolist() for rows in epochs]
    assert firsts[0] != firsts[1]
    *sizes, last = order.words
    assert sizes[1] == f"24 x 24: 43 images, {whole[1] // 4} batches an epoch" and len(sizes) == 3
    assert last.startswith(f"{73 - sum(whole)} of 73 images are left out of each epoch")
    assert last.endswith("; 7 of them are in buckets of less than one, and are never used" if window == 2 else "whole batches")


def test_buckets_without_one_batch_are_an_error():
    with pytest.raises(
        UserError, match="no bucket has the 48 images that are trained on together, the fullest has 43: lower --train_batch"
    ):
        BucketOrder(Buckets(SIZES, OF), 24, 0, stop=1, num_processes=2)
    with pytest.raises(UserError, match="no bucket has the 44 images of --coupling_window 11 that"):
        BucketOrder(Buckets(SIZES, OF), 4, 0, window=11, stop=1)


def test_a_bad_image_is_replaced_by_the_next_of_its_bucket(tmp_path):
    shapes = [(16, 32), (24, 24), (16, 32), (24, 24), (32, 16), (16, 32)]
    images = {f"{number}.png": noise(*shape, 3) for number, shape in enumerate(shapes)}
    source = folder(tmp_path, images)
    for name in ("2.png", "3.png", "4.png"):
        truncate(tmp_path / name)
    config = parse("--buckets", "16,32;24,24;32,16", "--skip_bad_images")
    buckets = assigned_buckets(source, bucket_sizes(config), config)
    assert buckets.of.tolist() == [0, 1, 0, 1, 2, 0]  # their headers are whole
    dataset = ImageDataset(source, ImageTransform(24), skip_bad_images=True, buckets=buckets)
    batch = collate([dataset[0, 2]])
    assert torch.equal(batch["pixel_values"][0], ImageTransform(24).augment(Image.fromarray(images["5.png"]), 0, 2, (16, 32)))
    assert [Path(bad.name).name for bad in check_batch(batch, True)] == ["2.png"]
    assert torch.equal(collate([dataset[0, 3]])["pixel_values"][0], (torch.from_numpy(images["1.png"]).permute(2, 0, 1) / 255 - 0.5) / 0.5)
    assert [Path(bad.name).name for bad in dataset[0, 4]["bad"]] == ["4.png"] and "pixel_values" not in dataset[0, 4]


def test_an_image_without_a_header_is_in_no_bucket(tmp_path, caplog):
    source = folder(tmp_path, {f"{number}.png": noise(24, 24, 3) for number in range(3)})
    (tmp_path / "1.png").write_text("no image")
    config = parse("--buckets", "24,24;16,32")
    with pytest.raises(UserError, match=r"cannot read image .*1\.png: not an image format that Pillow knows; remove it or pass --skip_bad"):
        assigned_buckets(source, bucket_sizes(config), config)
    config = parse("--buckets", "24,24;16,32", "--skip_bad_images")
    assert assigned_buckets(source, bucket_sizes(config), config).of.tolist() == [1, -1, 1]
    assert "skipped 1 images that cannot be read and so are in no bucket, the first" in caplog.text
