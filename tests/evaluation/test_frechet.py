"""The Frechet distance against a float64 reference."""

from __future__ import annotations

import pytest
import torch
from measured import reference_distance

from immiscible.errors import UserError
from immiscible.evaluation import frechet
from immiscible.evaluation.frechet import FrechetDistance


@pytest.mark.parametrize(
    "case, count_a, count_b, num_features, rank",
    [
        ("plain", 300, 200, 24, 24),
        ("rank deficient", 300, 200, 24, 7),
        ("fewer images than features", 10, 15, 24, 24),
        ("one feature", 50, 60, 1, 1),
    ],
)
def test_frechet_distance_equals_a_float64_reference(case, count_a, count_b, num_features, rank):
    generator = torch.Generator().manual_seed(0)

    def draw(count, shift):
        mixing = torch.randn(rank, num_features, generator=generator, dtype=torch.float64)
        return torch.randn(count, rank, generator=generator, dtype=torch.float64) @ mixing + shift

    a, b = draw(count_a, 3.0), draw(count_b, 3.5)
    distance = FrechetDistance("FD-passed", a)
    assert distance(b) == pytest.approx(reference_distance(a, b), rel=1e-6)
    scale = float(a.var(0).sum())
    for same in (a, a.flip(0)):
        assert distance(same) == pytest.approx(0, abs=1e-6 * scale)
        assert distance(same) >= 0


def test_nothing_of_one_call_is_left_in_the_next():
    distance = FrechetDistance("FD-passed", torch.randn(100, 3, dtype=torch.float64))
    first, second = (scale * torch.randn(50, 3, dtype=torch.float64) for scale in (1, 4))
    values = [distance(first), distance(second), distance(first)]
    assert values[0] == values[2] < values[1]


def test_too_few_images_are_refused():
    with pytest.raises(UserError, match="at least 2 reference images, not 1"):
        FrechetDistance("FD-passed", torch.zeros(1, 2))
    with pytest.raises(UserError, match="at least 2 images, not 0"):
        FrechetDistance("FD-passed", torch.randn(5, 2))(torch.zeros(0, 2))


def test_a_broken_torchmetrics_is_one_clear_line(monkeypatch):
    def fail(name):
        raise ModuleNotFoundError("No module named 'torchvision'")

    monkeypatch.setattr(frechet, "import_module", fail)
    with pytest.raises(UserError, match=r"needs torchmetrics, which cannot be imported .*torchvision.*pip install"):
        FrechetDistance("FD-passed", torch.zeros(0, 2))
