"""What every pretrained network does: parts, gray images, and what is kept."""

from __future__ import annotations

import pytest
import torch

from immiscible.errors import UserError
from immiscible.evaluation.forward import TOGETHER_ON_CPU, PretrainedFeatures


class Sums(PretrainedFeatures):
    """Of each channel, fp32, and how many images came together."""

    name, num_features, weights_sha256, resize, side = "FD-sums", 3, "0" * 64, "own", 8

    def __init__(self):
        self._device, self.parts = torch.device("cpu"), []

    def _of(self, images):
        self.parts.append(len(images))
        return {"features": images.float().sum((2, 3)), "more": images.float().amax((1, 2, 3))}


def images(count, channels=3):
    return torch.randint(0, 256, (count, channels, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(count))


def test_images_are_asked_in_parts_and_joined_in_order():
    features, given = Sums(), images(2 * TOGETHER_ON_CPU + 3)
    found = features.outputs(given)
    assert features.parts == [TOGETHER_ON_CPU, TOGETHER_ON_CPU, 3]
    assert torch.equal(found["features"], given.double().sum((2, 3))) and torch.equal(found["more"], given.double().amax((1, 2, 3)))
    assert torch.equal(features(given), found["features"])


def test_gray_is_three_equal_channels_and_others_are_refused():
    gray = images(2, 1)
    assert torch.equal(Sums()(gray), gray.double().sum((2, 3)).expand(-1, 3))
    with pytest.raises(UserError, match="FD-sums measures images of 1 or 3 channels, not 4"):
        Sums()(images(1, 4))


def test_what_is_kept_is_of_these_images_weights_and_resize(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    given, first, second = images(2), Sums(), Sums()
    assert torch.equal(first.kept(given), first(given)) and torch.equal(second.kept(given), first(given)) and not second.parts
    for name, value in {"weights_sha256": "1" * 64, "resize": "another", "side": 16}.items():
        changed = Sums()
        setattr(changed, name, value)
        assert torch.equal(changed.kept(given), first(given)) and changed.parts == [2]
    assert torch.equal(second.kept(given.flip(0)), first(given).flip(0)) and second.parts == [2]
