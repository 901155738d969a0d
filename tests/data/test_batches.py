"""Bad images and their substitutes; the order of all ranks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import folder, grays, noise, one_batch, save, truncate
from PIL import Image

from immiscible.data.batches import GlobalBatchOrder, ImageDataset, check_batch, collate
from immiscible.data.loading import build_loader
from immiscible.data.sources import ArrayImages
from immiscible.data.transforms import ImageTransform
from immiscible.errors import UserError

CPU = torch.device("cpu")


def test_a_substitute_brings_its_own_label(tmp_path):
    source = folder(tmp_path, {f"{'ab'[i % 2]}/{i}.png": np.full((8, 8), 10 * i, np.uint8) for i in range(6)})
    names = [Path(source.name(i)).name for i in range(6)]
    truncate(tmp_path / "a" / "4.png")  # before b/1.png
    dataset = ImageDataset(source, ImageTransform(8, channels=1), skip_bad_images=True, with_labels=True)
    batch = collate([dataset[0, i] for i in range(6)])
    numbers = (grays(batch["pixel_values"])[:, 0, 0, 0] / 10).round().long()
    assert numbers[names.index("4.png")] == 1 and len(numbers) == 6
    assert torch.equal(batch["labels"], numbers % 2)


@pytest.mark.parametrize("kind", ["png", "jpg"])
def test_truncated_image_is_named(tmp_path, kind):
    path = truncate(save(tmp_path / f"b.{kind}", noise(64, 64, 3)))
    source = folder(tmp_path, {"a.png": noise(8, 8, 3)})
    loader = build_loader(ImageDataset(source, ImageTransform(8)), GlobalBatchOrder(2, 2, 0, stop=1), 1, CPU)
    (batch,) = loader
    with pytest.raises(UserError, match=r"cannot read image .*; remove it or pass --skip_bad_images") as caught:
        check_batch(batch, skip_bad_images=False)
    assert str(path) in str(caught.value) and caught.value.exit_code == 1 and "\n" not in str(caught.value)


def test_file_that_is_no_image_and_file_that_is_gone(tmp_path):
    source = folder(tmp_path, {"a.png": noise(8, 8), "b.png": noise(8, 8), "c.png": noise(8, 8)})
    (tmp_path / "a.png").write_text("hello")
    (tmp_path / "b.png").unlink()
    batch = one_batch(source, ImageTransform(8), [(0, 0), (0, 1), (0, 2)])
    assert [Path(bad.name).name for bad in batch["bad"]] == ["a.png", "b.png"]
    assert [bad.reason for bad in batch["bad"]] == ["not an image format that Pillow knows", "No such file or directory"]
    assert batch["pixel_values"].shape == (1, 3, 8, 8)


@pytest.mark.parametrize("precise", [False, True])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_float_tiff_that_is_not_finite(tmp_path, value, precise):
    pixels = np.full((8, 8), 0.5, dtype=np.float32)
    pixels[3, 3] = value
    source = folder(tmp_path, {"a.tiff": pixels, "b.tiff": np.full((8, 8), 0.5, dtype=np.float32)})
    transform = ImageTransform(8, preserve_input_precision=precise)
    with pytest.raises(UserError, match=r"a\.tiff: it has NaN or infinite pixels"):
        check_batch(one_batch(source, transform, [(0, 0)]), skip_bad_images=False)
    good = one_batch(source, transform, [(0, 1)])
    assert check_batch(good, skip_bad_images=False) == []
    assert good["pixel_values"].abs().max() < 0.01


def test_skipping_puts_the_next_readable_image_and_counts(tmp_path):
    images = {f"{i}.png": noise(8, 8, 3) for i in range(5)}
    source = folder(tmp_path, images)
    for i in (1, 2, 4):
        truncate(tmp_path / f"{i}.png")
    batch = one_batch(source, ImageTransform(8), [(0, i) for i in range(5)], skip=True)
    skipped = check_batch(batch, skip_bad_images=True)
    assert sorted(Path(bad.name).name for bad in skipped) == ["1.png", "2.png", "4.png"]
    used = [images[f"{i}.png"] for i in (0, 3, 3, 3, 0)]
    assert torch.equal(batch["pixel_values"], torch.stack([ImageTransform(8)(image, 0, 0) for image in used]))


@pytest.mark.parametrize(("skip", "message"), [(True, "none of the images can be read"), (False, "cannot read image")])
def test_all_bad(tmp_path, skip, message):
    source = folder(tmp_path, {f"{i}.png": noise(8, 8, 3) for i in range(3)})
    for path in tmp_path.iterdir():
        truncate(path)
    batch = one_batch(source, ImageTransform(8), [(0, 0), (0, 1)], skip=skip)
    with pytest.raises(UserError, match=message) as caught:
        check_batch(batch, skip)
    assert caught.value.exit_code == 1


def test_unconvertible_mode_is_a_bad_image():
    class Lab(ArrayImages):
        def load(self, index):
            return Image.new("LAB", (8, 8))

    batch = one_batch(Lab(np.zeros((1, 8, 8), np.uint8), "lab"), ImageTransform(8, channels=1), [(0, 0)])
    assert "LAB" in batch["bad"][0].reason


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_global_rows_do_not_depend_on_the_ranks(ranks):
    per_rank = [list(GlobalBatchOrder(30, 8 // ranks, 7, stop=9, rank=r, num_processes=ranks)) for r in range(ranks)]
    merged = [[key for rows in per_rank for key in rows[m]] for m in range(9)]
    assert merged == list(GlobalBatchOrder(30, 8, 7, stop=9))


def test_epochs_are_permutations_without_their_last_short_batch():
    order = GlobalBatchOrder(30, 8, 7, stop=6)
    batches = list(order)
    assert order.batches_per_epoch == 3 and len(order) == len(batches) == 6
    assert [{epoch for epoch, _ in batch} for batch in batches] == [{0}] * 3 + [{1}] * 3
    for epoch in (0, 1):
        rows = [index for batch in batches[3 * epoch : 3 * epoch + 3] for _, index in batch]
        assert len(set(rows)) == 24 and set(rows) <= set(range(30))
    assert [i for _, i in batches[0]] != [i for _, i in batches[3]]
    assert batches != list(GlobalBatchOrder(30, 8, 8, stop=6))


@pytest.mark.parametrize("ranks", [1, 2])
def test_small_data_is_repeated(ranks):
    orders = [GlobalBatchOrder(3, 8 // ranks, 0, stop=2, rank=r, num_processes=ranks) for r in range(ranks)]
    assert all(order.batches_per_epoch == 1 for order in orders)
    first, second = ([index for part in parts for _, index in part] for parts in zip(*orders, strict=True))
    assert len(first) == len(second) == 8
    assert sorted(first[:3]) == sorted(second[:3]) == [0, 1, 2] and first == (first[:3] * 3)[:8]


@pytest.mark.parametrize("start", [0, 1, 3, 7, 9, 12])
def test_order_resumes_at_any_place(start):
    assert list(GlobalBatchOrder(30, 8, 7, start=start, stop=9)) == list(GlobalBatchOrder(30, 8, 7, stop=9))[start:]
    assert len(GlobalBatchOrder(30, 8, 7, start=start, stop=9)) == max(0, 9 - start)
