"""The images that install with packages."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from immiscible.configs import UnconditionalConfig
from immiscible.data import bundled
from immiscible.data.batches import ImageDataset
from immiscible.data.bundled import BUNDLED
from immiscible.data.loading import load_images
from immiscible.data.sources import Subset, split_source
from immiscible.data.transforms import ImageTransform
from immiscible.errors import UserError
from immiscible.flags import parse_config


def test_digits_are_the_real_ones():
    from sklearn.datasets import load_digits

    source, reference = load_images(), load_digits().images
    assert (len(source), source.channels) == (1797, 1)
    assert all(np.array_equal(source.load(i), np.round(reference[i] * 255 / 16)) for i in range(1797))
    assert source.load(0).dtype == np.uint8 and max(source.load(i).max() for i in range(9)) == 255
    assert ImageTransform(8, source.channels)(source.load(5), 0, 5).shape == (1, 8, 8)
    assert "1797" in source.description and source.name(3) == "image 3 of digits"


def test_photo_crops_are_a_function_of_the_index():
    source = load_images(bundled_data="photo_crops", resolution=32)
    assert (len(source), source.channels) == (8192, 3)
    before = [np.array(source.load(i)) for i in (0, 17, 8191)]
    torch.manual_seed(5)
    bundled._photographs.cache_clear()
    again = load_images(bundled_data="photo_crops", resolution=32)
    assert all(np.array_equal(a, again.load(i)) for a, i in zip(before, (0, 17, 8191), strict=True))
    pixels = [ImageTransform(32, seed=seed)(source.load(3), epoch, 3) for seed in (0, 1) for epoch in (0, 1)]
    assert pixels[0].numel() == 3072 and all(torch.equal(pixels[0], other) for other in pixels)
    assert len({np.array(source.load(i)).tobytes() for i in range(200)}) == 200
    assert again.fingerprint == source.fingerprint != load_images(bundled_data="photo_crops", resolution=16).fingerprint


def test_photo_crops_larger_than_the_photographs():
    source = load_images(bundled_data="photo_crops", resolution=700)
    assert [source.load(i).size for i in range(3)] == [(700, 700)] * 3


def test_missing_photographs_are_the_users_line(monkeypatch):
    monkeypatch.setattr(bundled, "PHOTOGRAPHS", {"skimage": ["data/no_such.png"]})
    bundled._photographs.cache_clear()
    with pytest.raises(UserError, match=r"photo_crops.*scikit-image"):
        load_images(bundled_data="photo_crops")
    bundled._photographs.cache_clear()


def test_unknown_bundled_data_lists_the_choices():
    with pytest.raises(UserError, match=", ".join(BUNDLED)):
        load_images(bundled_data="cats")


def test_labels_of_the_digits_are_sklearns_through_every_subset():
    from sklearn.datasets import load_digits

    target = load_digits().target
    source = load_images(labels_for="--class_conditional")
    assert list(source.class_names) == [str(digit) for digit in range(10)]
    assert [source.label(i) for i in range(1797)] == target.tolist() and type(source.label(0)) is int
    train, held_out = split_source(load_images(max_train_samples=200), 0.2)
    for part in (train, held_out):
        assert part.class_names == source.class_names
        assert [part.label(i) for i in range(len(part))] == [target[int(part.name(i).split()[1])] for i in range(len(part))]


def test_photo_crops_have_no_classes():
    source = load_images(bundled_data="photo_crops", resolution=8)
    assert source.class_names is None and Subset(source, [1]).class_names is None
    with pytest.raises(UserError, match=r"--class_conditional needs classes, and --bundled_data photo_crops has none"):
        load_images(bundled_data="photo_crops", labels_for="--class_conditional")
    with pytest.raises(UserError, match=r"class labels are asked for, and photo_crops .* has none"):
        ImageDataset(source, ImageTransform(8), with_labels=True)


def test_bundled_data_has_no_label_column():
    words = ["--bundled_data", "digits", "--label_column", "fine", "--class_conditional"]
    with pytest.raises(UserError, match=r"--label_column names a column of --dataset_name or --train_data_dir"):
        parse_config(UnconditionalConfig, words, program="train_unconditional.py", description="", no_data_config=Path("none.yaml"))
