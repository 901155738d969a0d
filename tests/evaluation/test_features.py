"""Feature networks: the digits classifier, whenever and wherever it is trained, and pooled pixels."""

from __future__ import annotations

import pytest
import torch
from measured import DIGITS, random_state
from safetensors.torch import save

from immiscible import kept
from immiscible.errors import UserError
from immiscible.evaluation import features as features_module
from immiscible.evaluation.features import FEATURES, DigitsFeatures, PixelFeatures, build_features
from immiscible.evaluation.frechet import FrechetDistance
from immiscible.evaluation.validation import to_uint8


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def digits_features(cache):
    return DigitsFeatures(cache)


def noise_images(count, seed=0):
    return to_uint8(torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed)).clamp(-1, 1))


def test_digits_classifier_is_good_and_its_features_are_scaled(digits_features):
    assert digits_features.accuracy > 0.95
    features = digits_features(DIGITS)
    assert features.dtype == torch.float64 and features.shape == (1797, 64)
    assert float(features.var(0).sum()) == pytest.approx(100, rel=1e-4)
    assert torch.linalg.matrix_rank(features.T.cov()) == 64
    assert torch.allclose(digits_features(DIGITS[:1]), features[:1], atol=1e-4)


@pytest.mark.slow
def test_digits_classifier_is_the_same_whenever_it_is_trained(cache, digits_features, tmp_path, monkeypatch):
    torch.manual_seed(99)
    threads, before = torch.get_num_threads(), random_state()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    DigitsFeatures()
    assert (torch.get_num_threads(), random_state()) == (threads, before)
    (first,), (second,) = cache.iterdir(), (tmp_path / "immiscible").iterdir()  # and nothing half written beside it
    assert first.name == second.name and first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("damage", ["truncated", "one bit", "foreign", "empty", "other shapes"])
def test_a_broken_cache_is_made_anew(cache, digits_features, tmp_path, monkeypatch, caplog, damage):
    (whole,) = cache.iterdir()
    content = whole.read_bytes()
    broken = {
        "truncated": content[:-100],
        "one bit": content[:-1] + bytes([content[-1] ^ 1]),
        "foreign": b"not safetensors at all",
        "empty": b"",
        "other shapes": save({"scale": torch.ones(1)}, metadata={"sha256": kept._digest({"scale": torch.ones(1)})}),
    }[damage]
    (tmp_path / whole.name).write_bytes(broken)
    monkeypatch.setattr(features_module, "_train_digits_classifier", lambda: digits_features._tensors)
    features = DigitsFeatures(tmp_path)
    assert "is broken" in caplog.text and "made anew" in caplog.text
    assert (tmp_path / whole.name).read_bytes() == content
    assert torch.equal(features(DIGITS), digits_features(DIGITS))


def test_a_cache_is_read_and_not_trained_again(cache, digits_features, monkeypatch):
    monkeypatch.setattr(features_module, "_train_digits_classifier", lambda: pytest.fail("trained again"))
    again = DigitsFeatures(cache)
    assert again.accuracy == digits_features.accuracy and torch.equal(again(DIGITS), digits_features(DIGITS))


def test_without_a_place_for_the_cache_it_still_works(digits_features, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(features_module, "_train_digits_classifier", lambda: digits_features._tensors)
    DigitsFeatures(tmp_path / "file")
    assert "cannot keep the digits classifier" in caplog.text


def test_distances_of_digits_have_the_expected_sizes(digits_features):
    distance = FrechetDistance(digits_features.name, digits_features(DIGITS))
    half = DIGITS[torch.randperm(1797, generator=torch.Generator().manual_seed(0))[:898]]
    assert distance(digits_features(DIGITS)) < 1e-6
    assert 1e-3 < distance(digits_features(half)) < 1
    assert distance(digits_features(noise_images(1500))) > 20


def test_pixel_features_average_at_most_8x8():
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    features = PixelFeatures(channels=3, resolution=32)(images)
    assert features.dtype == torch.float64 and features.shape == (3, 192)
    blocks = images.double().reshape(3, 3, 8, 4, 8, 4).mean((3, 5)).flatten(1) / 127.5 - 1
    assert torch.allclose(features, blocks, atol=1e-6)
    assert PixelFeatures(1, 4)(images[:, :1, :4, :4]).shape == (3, 16)
    assert PixelFeatures(3, 30)(images[:, :, :30, :30]).shape == (3, 192)


def test_features_for_other_images_are_refused(digits_features):
    with pytest.raises(UserError, match="gray images of 1x8x8, not 3x32x32"):
        digits_features(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    with pytest.raises(UserError, match="64 features; these images have 192"):
        PixelFeatures(1, 8)(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))


def test_features_are_built_by_name(cache, digits_features, monkeypatch, tmp_path):
    monkeypatch.setattr(features_module, "cache_folder", lambda: cache)
    assert list(FEATURES) == ["digits", "pixels", "efficientnet", "inception", "clip", "clip-l14-336", "dinov2"]
    device = torch.device("cpu")
    assert build_features("digits", channels=1, resolution=8, device=device).name == "FD-digits"
    pixels = build_features("pixels", channels=3, resolution=32, device=device)
    assert (pixels.name, pixels.num_features) == ("FD-pixels-8x8", 192)
    with pytest.raises(UserError, match=r"'vgg' are unknown; known: digits, pixels, .*, dinov2, and paths"):
        build_features("vgg", channels=3, resolution=32, device=device)
    (tmp_path / "network.pt").write_bytes(b"")
    with pytest.raises(UserError, match=r"network\.pt does not hold a network in TorchScript"):
        build_features(str(tmp_path / "network.pt"), channels=3, resolution=32, device=device)


def test_weights_and_resizes_go_to_networks_that_take_them(tmp_path):
    facts = {"channels": 3, "resolution": 32, "device": torch.device("cpu")}
    with pytest.raises(UserError, match=f"not at {tmp_path}"):
        build_features("inception", weights=tmp_path, **facts)
    with pytest.raises(UserError, match="cannot be resized by 'nearest'"):
        build_features("inception", resize="nearest", **facts)
    with pytest.raises(UserError, match=r"config\.json"):
        build_features("dinov2", weights=tmp_path, **facts)
    with pytest.raises(UserError, match=f"--feature_weights {tmp_path}: the features pixels take no weights"):
        build_features("pixels", weights=tmp_path, **facts)
    with pytest.raises(UserError, match="pixels resize images in their own way, not by tf-bilinear"):
        build_features("pixels", resize="tf-bilinear", **facts)
