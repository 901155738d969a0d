"""Precision, recall, density and coverage: against their definitions by distances of all pairs, ties and copies among them."""

from __future__ import annotations

import numpy
import pytest
import torch
from scipy.spatial.distance import cdist

from immiscible.evaluation.neighborhoods import neighborhoods


def drawn(count, seed, features=4, shift=0.0):
    return torch.randn(count, features, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift


def of_definition(samples, reference):
    """Each image's four values, from distances that are exact."""
    x, y = samples.numpy(), reference.numpy()
    between = cdist(x, y)  # [N, M]

    def radii(rows, k):
        return numpy.array([sorted(numpy.delete(row, i))[k - 1] for i, row in enumerate(cdist(rows, rows))])

    return {
        "precision": (between <= radii(y, 3)).any(1),
        "recall": (between <= radii(x, 3)[:, None]).any(0),
        "density": (between < radii(y, 5)).sum(1) / 5,
        "coverage": (between < radii(y, 5)).any(0),
    }


def whole_numbers(count, seed):
    """Features among which many distances are equal and some are 0."""
    return torch.randint(3, (count, 3), generator=torch.Generator().manual_seed(seed)).double()


SETS = {
    "plain": (drawn(70, 1), drawn(50, 2, shift=0.7)),
    "fewer images than features": (drawn(8, 1, features=40), drawn(6, 2, features=40)),
    "ties": (whole_numbers(60, 1), whole_numbers(80, 2)),
    "ties far from zero": (whole_numbers(60, 1) + 2**28, whole_numbers(80, 2) + 2**28),  # whose squares are no doubles
    "copies": (torch.cat([drawn(10, 2)] * 7), torch.cat([drawn(10, 2), drawn(9, 3)])),
    "nothing shared": (drawn(20, 1), drawn(20, 2, shift=100.0)),
}


@pytest.mark.parametrize("chunk", [7, 256])
@pytest.mark.parametrize("case", SETS)
def test_each_image_has_the_value_of_the_definition(case, chunk):
    samples, reference = SETS[case]
    found = neighborhoods(samples, reference, chunk=chunk)
    for name, expected in of_definition(samples, reference).items():
        assert getattr(found, name).tolist() == pytest.approx(expected.astype(float).tolist(), abs=1e-15), name


def test_equal_sets_have_1_throughout():
    same = drawn(60, 1)
    found = neighborhoods(same, same.flip(0))
    for name in ("precision", "recall", "coverage"):
        assert getattr(found, name).min() == 1
    assert found.density.mean() == pytest.approx(1, abs=1e-12)


def test_six_copies_of_a_reference_image_are_covered_by_nothing():
    copied = torch.cat([drawn(20, 1), drawn(1, 2).repeat(6, 1)])
    found = neighborhoods(copied, copied)
    assert found.precision.min() == found.recall.min() == 1
    assert found.coverage.tolist() == [1.0] * 20 + [0.0] * 6


def test_samples_of_one_mode_are_precise_and_recall_little():
    reference = torch.cat([drawn(100, 1), drawn(100, 2, shift=50.0)])
    found = neighborhoods(drawn(150, 3), reference)
    assert found.precision.mean() > 0.8 and found.recall.mean() <= 0.5 and found.coverage.mean() <= 0.5


def test_the_order_of_rows_does_not_matter():
    samples, reference = SETS["ties"]
    whole, mixed = neighborhoods(samples, reference), neighborhoods(samples.flip(0), reference.roll(11, 0), chunk=13)
    assert torch.equal(whole.precision, mixed.precision.flip(0)) and torch.equal(whole.density, mixed.density.flip(0))
    assert torch.equal(whole.recall, mixed.recall.roll(-11)) and torch.equal(whole.coverage, mixed.coverage.roll(-11))
