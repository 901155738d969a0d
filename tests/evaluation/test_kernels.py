"""Kernel distances: against sums over all pairs written from their definitions, whatever the order of rows and the size of a part."""

from __future__ import annotations

import numpy
import pytest
import torch
from torchmetrics.image.kid import poly_mmd

from immiscible.evaluation.kernels import cmmd, kid, uniformity


def drawn(count, seed, features=6, shift=0.0):
    return torch.randn(count, features, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift


def unit(rows):
    return rows.numpy() / numpy.linalg.norm(rows.numpy(), axis=1, keepdims=True)


def discrepancy(kernel, x, y, unbiased):
    """The squared maximum mean discrepancy, pair by pair."""

    def within(rows):
        values = [kernel(a, b) for i, a in enumerate(rows) for j, b in enumerate(rows) if not unbiased or i != j]
        return sum(values) / len(values)

    return within(x) + within(y) - 2 * sum(kernel(a, b) for a in x for b in y) / (len(x) * len(y))


def cubic(a, b):
    return (a @ b / len(a) + 1) ** 3


def gaussian(a, b):
    return numpy.exp(-((a - b) ** 2).sum() / (2 * 10**2))


SETS = {
    "plain": (drawn(25, 1), drawn(19, 2, shift=0.5)),
    "fewer images than features": (drawn(4, 1, features=30), drawn(3, 2, features=30)),
    "duplicates": (drawn(6, 1).repeat(3, 1), drawn(7, 2).repeat(2, 1)),
    "equal sets": (drawn(12, 1), drawn(12, 1)),
}


@pytest.mark.parametrize("case", SETS)
def test_kid_of_whole_sets_is_the_unbiased_discrepancy_of_a_cubic_kernel(case):
    x, y = SETS[case]
    least = min(len(x), len(y))  # a subset is as large as the smaller set, so take both of that size
    x, y = x[:least], y[:least]
    expected = discrepancy(cubic, x.numpy(), y.numpy(), unbiased=True)
    assert kid(x, y) == pytest.approx(expected, rel=1e-10)
    assert float(poly_mmd(y, x)) == pytest.approx(expected, rel=1e-10)


def test_kid_is_a_mean_over_random_subsets():
    x, y = drawn(9, 1), drawn(8, 2, shift=0.5)
    whole = discrepancy(cubic, x.numpy(), y.numpy(), unbiased=True)  # also the mean over all subsets
    assert kid(x, y, subsets=1, subset_size=5) != pytest.approx(whole, rel=0.1)
    assert kid(x, y, subsets=500, subset_size=5) == pytest.approx(whole, rel=0.1)


@pytest.mark.parametrize("case", SETS)
@pytest.mark.parametrize("unbiased", [False, True])
def test_cmmd_is_the_discrepancy_of_a_gaussian_kernel_on_embeddings_of_length_1(case, unbiased):
    x, y = SETS[case]
    expected = 1000 * discrepancy(gaussian, unit(x), unit(y), unbiased)
    assert cmmd(x, y, unbiased=unbiased) == pytest.approx(expected, rel=1e-10, abs=1e-9)
    assert cmmd(3 * x, y, unbiased=unbiased) == pytest.approx(expected, rel=1e-10, abs=1e-9)


def test_equal_sets_have_a_cmmd_of_0_and_a_kid_that_is_not_above_it():
    same = drawn(40, 1)
    assert cmmd(same, same) == pytest.approx(0, abs=1e-9)
    assert kid(same, same) < 0 and cmmd(same, same, unbiased=True) < 0  # unbiased for sets that were drawn apart, which equal ones are not


@pytest.mark.parametrize("case", SETS)
def test_uniformity_is_the_log_of_the_mean_over_pairs(case):
    rows = unit(SETS[case][0])
    values = [numpy.exp(-2 * ((a - b) ** 2).sum()) for i, a in enumerate(rows) for b in rows[:i]]
    assert uniformity(SETS[case][0]) == pytest.approx(numpy.log(numpy.mean(values)), rel=1e-10)


def test_uniformity_of_one_image_many_times_is_0():
    assert uniformity(drawn(1, 1).repeat(5, 1)) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("chunk", [7, 64])
def test_neither_the_order_of_rows_nor_the_size_of_a_part_matters(chunk):
    x, y = drawn(50, 1), drawn(40, 2, shift=0.5)
    mixed = [rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(chunk))] for rows in (x, y)]
    assert kid(*mixed, subsets=5, subset_size=20, chunk=chunk) == pytest.approx(kid(x, y, subsets=5, subset_size=20), rel=1e-10)
    assert cmmd(*mixed, chunk=chunk) == pytest.approx(cmmd(x, y), rel=1e-10)
    assert uniformity(mixed[0], chunk=chunk) == pytest.approx(uniformity(x), rel=1e-10)
