"""Statistics of reference images: sums in batches, the distance of two, what is kept and what is read."""

from __future__ import annotations

import dataclasses
import zipfile

import numpy as np
import pytest
import torch

from immiscible.errors import UserError
from immiscible.evaluation import inception
from immiscible.evaluation.features import PixelFeatures
from immiscible.evaluation.frechet import FrechetDistance
from immiscible.evaluation.inception import InceptionFeatures
from immiscible.evaluation.statistics import (
    Moments,
    Statistics,
    StatisticsKey,
    cached_statistics,
    distance_of_statistics,
    images_of_npz,
    key_of,
    moments_of,
    read_reference,
    write_reference,
)

KEY = StatisticsKey("a folder of 9 images", "train", "adm", 32, 200, "FID", "67" * 32, "tf-bilinear", "cifar10-legacy")


def features(count, size=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(count, size, generator=generator, dtype=torch.float64) @ torch.randn(
        size, size, generator=generator, dtype=torch.float64
    )
    return mixed + 1e4 + seed  # far from 0, where sums of squares lose digits


def statistics(count=200, **options):
    rows = features(count, **options)
    return Statistics(rows.mean(0), rows.T.cov(), count)


@pytest.mark.parametrize("batch", [1, 7, 64, 200])
def test_moments_are_the_same_for_any_batches_and_ranks(batch):
    rows = features(200)
    ranks = [Moments(12), Moments(12), Moments(12)]
    for number, part in enumerate(rows.split(batch)):
        ranks[number % 2].add(part)
    ranks[0].add(rows[:0])
    for other in ranks[1:]:
        ranks[0].merge(other)
    found = ranks[0].statistics()
    assert found.count == 200
    assert torch.allclose(found.mean, rows.mean(0), rtol=1e-14) and torch.allclose(found.covariance, rows.T.cov(), rtol=1e-10, atol=1e-10)


def test_moments_need_two_images():
    for batches in ([], [{"features": features(1)}]):
        with pytest.raises(UserError, match="needs at least 2 images, not"):
            moments_of(batches, ["features"])
    found = moments_of([{"features": features(3), "spatial": features(3, 5), "more": None}], ["features", "spatial"])
    assert {name: len(of.mean) for name, of in found.items()} == {"features": 12, "spatial": 5}


@pytest.mark.parametrize("count", [6, 200], ids=["singular", "full"])
def test_the_distance_is_that_of_features(count):
    first, second = features(count) - 1e4, features(300, seed=1) - 1e4  # torchmetrics sums squares about 0
    of = [Statistics(rows.mean(0), rows.T.cov(), len(rows)) for rows in (first, second)]
    expected = FrechetDistance("a distance", first)(second)
    assert distance_of_statistics(*of) == pytest.approx(expected, rel=1e-6) == distance_of_statistics(*of[::-1])
    assert distance_of_statistics(of[0], of[0]) < 1e-6
    with pytest.raises(UserError, match="of 12 and of 5 features"):
        distance_of_statistics(of[0], statistics(size=5))


def test_the_distance_of_gaussians_with_common_axes_is_of_their_deviations():
    first, second = torch.tensor([1.0, 4, 9]).double(), torch.tensor([4.0, 0, 1]).double()
    apart = torch.tensor([1.0, 2, 2]).double()
    found = distance_of_statistics(Statistics(apart, first.diag()), Statistics(torch.zeros(3).double(), second.diag()))
    assert found == pytest.approx(9 + float((first.sqrt() - second.sqrt()).square().sum()))


def test_statistics_are_kept_by_their_key(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made = {"features": statistics(), "spatial": statistics(size=5)}
    assert cached_statistics(KEY, lambda: made) is made
    found = cached_statistics(KEY, lambda: pytest.fail("computed again"))
    for name, of in made.items():
        assert torch.equal(found[name].mean, of.mean) and torch.equal(found[name].covariance, of.covariance) and found[name].count == 200
    (path,) = (tmp_path / "immiscible" / "statistics").iterdir()  # and nothing half written beside it
    for field in dataclasses.fields(KEY):
        was = getattr(KEY, field.name)
        other = dataclasses.replace(KEY, **{field.name: was + 1 if isinstance(was, int) else f"{was}x"})
        changed = {"features": statistics(seed=3)}
        assert cached_statistics(other, lambda changed=changed: changed) is changed, field.name
    for damaged in (path.read_bytes()[:-9], max(path.parent.iterdir(), key=lambda one: one != path).read_bytes()):
        caplog.clear()
        path.write_bytes(damaged)
        assert cached_statistics(KEY, lambda: made) is made and "is broken" in caplog.text


def test_a_network_says_its_part_of_the_key(monkeypatch):
    facts = {"data": "x", "split": "train", "crop": "adm", "resolution": 32, "count": 9, "protocol": "default"}
    pixels = key_of(PixelFeatures(), **facts)
    assert (pixels.network, pixels.weights_sha256, pixels.resize, pixels.count) == ("FD-pixels-8x8", "", "own", 9)
    monkeypatch.setattr(inception, "load_inception", lambda path: torch.nn.Identity())
    monkeypatch.setattr(inception, "find_weights", lambda given: given)
    network = key_of(InceptionFeatures(resize="torch-bilinear"), **facts)
    assert (network.network, network.weights_sha256, network.resize) == ("FID-torch-bilinear", inception.WEIGHTS_SHA256, "torch-bilinear")


def test_own_files_come_back_and_others_read_them(tmp_path):
    path, made = tmp_path / "reference.npz", {"features": statistics(), "spatial": statistics(size=5)}
    write_reference(path, KEY, made)
    assert [file.name for file in tmp_path.iterdir()] == ["reference.npz"]
    found = read_reference(path)
    assert found.key == KEY and found.images == 0 and list(found.statistics) == ["features", "spatial"]
    assert torch.equal(found.statistics["features"].mean, made["features"].mean) and found.statistics["spatial"].count == 200
    with np.load(path) as file:  # as pytorch-fid and ADM's evaluator do
        assert np.array_equal(file["mu"], made["features"].mean) and np.array_equal(file["sigma_s"], made["spatial"].covariance)
    with pytest.raises(UserError, match="cannot be written: No such file"):
        write_reference(tmp_path / "none" / "reference.npz", KEY, made)


def test_what_differs_is_said(tmp_path, caplog):
    path = tmp_path / "reference.npz"
    write_reference(path, KEY, {"features": statistics()})
    reference = read_reference(path)
    reference.check(12, network="FID", resize="tf-bilinear", protocol="cifar10-legacy")
    with pytest.raises(UserError, match=r"does not fit: its resize is tf-bilinear, not torch-bilinear; its count is 200, not 50000$"):
        reference.check(12, network="FID", resize="torch-bilinear", count=50_000)
    with pytest.raises(UserError, match="is of 12 features, the samples' network gives 2048"):
        reference.check(2048)
    assert not caplog.records
    np.savez(path, mu=np.zeros(12), sigma=np.eye(12))
    read_reference(path).check(12, resize="torch-bilinear")
    assert "does not say of which network" in caplog.text


def test_adms_file_has_statistics_and_images(tmp_path):
    path, shape = tmp_path / "VIRTUAL_imagenet256_labeled.npz", (5, 4, 6, 3)
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    arrays = {"mu": np.zeros(8), "sigma": np.eye(8), "mu_s": np.ones(3, np.float32), "sigma_s": np.eye(3, dtype=np.float32)}
    for save in (np.savez, np.savez_compressed):
        save(path, arr_0=images, **arrays)
        found = read_reference(path)
        assert found.images == 5 and found.key is None and found.statistics["features"].count is None
        assert found.statistics["spatial"].mean.dtype == torch.float64 and len(found.statistics["spatial"].mean) == 3
        batches = list(images_of_npz(path, 2))
        assert [len(batch) for batch in batches] == [2, 2, 1]
        assert np.array_equal(torch.cat(batches).permute(0, 2, 3, 1).numpy(), images)


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"arr_0": np.zeros((2, 4, 4, 3), np.uint8)}, "it holds arr_0, not mu and sigma"),
        ({"mu": np.zeros(3), "sigma": np.eye(4)}, r"shapes \(3,\) and \(4, 4\)"),
        ({"mu": np.zeros(3), "sigma": np.full((3, 3), np.nan)}, "NaN or infinite"),
        ({"mu": np.zeros(3), "sigma": np.eye(3), "key": np.frombuffer(b'{"data": "x"}', np.uint8)}, "missing 8 required"),
        ({"mu": np.zeros(3), "sigma": np.eye(3), "arr_0": np.zeros(3)}, "arr_0 is float64 of 1 dimensions"),
        ({"mu": np.array([{}]), "sigma": np.eye(3)}, "allow_pickle"),
    ],
)
def test_files_of_something_else_are_one_line(tmp_path, arrays, says):
    path = tmp_path / "reference.npz"
    np.savez(path, **arrays)
    with pytest.raises(UserError, match=says) as error:
        read_reference(path)
    assert str(path) in str(error.value) and error.value.exit_code == 1


def test_damaged_files_are_one_line(tmp_path):
    path = tmp_path / "samples.npz"
    np.savez(path, arr_0=np.zeros((3, 4, 4, 3), np.uint8))
    whole = path.read_bytes()
    for damaged in (whole[:-20], b"", whole.replace(b"\0" * 144, b"\1" * 144)):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="holds no images that can be read"):
            list(images_of_npz(path, 2))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("arr_0.npy", zipfile.ZipFile(_saved(tmp_path, whole)).read("arr_0.npy")[:-50])
    with pytest.raises(UserError, match="ends within an image"):
        list(images_of_npz(path, 2))
    with pytest.raises(UserError, match="No such file"):
        read_reference(tmp_path / "nothing.npz")


def _saved(folder, content):
    path = folder / "whole.npz"
    path.write_bytes(content)
    return path
