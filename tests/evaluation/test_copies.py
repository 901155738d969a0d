"""The nearest-neighbour ratio: 0 for copies, 1 for samples that know of the training images no more than of others."""

from __future__ import annotations

import math

import pytest
import torch

from immiscible.evaluation.copies import NearestNeighborRatio


def drawn(count, seed, features=6):
    return torch.randn(count, features, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_ratio_is_that_of_the_sums_of_nearest_distances():
    samples, training, held_out = drawn(2500, 1), drawn(40, 2), drawn(40, 3)  # samples in three parts
    near, far = ((samples[:, None] - others[None]).norm(dim=2).min(1).values.sum() for others in (training, held_out))
    assert NearestNeighborRatio(training, held_out)(samples) == pytest.approx(float(near / far), rel=1e-9)


def test_copies_have_a_ratio_of_0_and_fresh_samples_one_of_1():
    training, held_out = drawn(2000, 1), drawn(2000, 2)
    ratio = NearestNeighborRatio(training, held_out)
    assert ratio(training[:500]) < 1e-6
    assert ratio(drawn(2000, 3)) == pytest.approx(1, abs=0.03)
    half = torch.cat([training[:500], drawn(500, 3)])
    assert ratio(half) == pytest.approx(0.5, abs=0.03)
    assert ratio(held_out[:500]) > 1e6 or math.isinf(ratio(held_out[:500]))


def test_both_sets_count_with_equally_many_images():
    training, held_out, samples = drawn(3000, 1), drawn(300, 2), drawn(2000, 3)
    ratio = NearestNeighborRatio(training, held_out)
    assert ratio.images == 300 and ratio(samples) == pytest.approx(1, abs=0.05)
    assert ratio(samples) == NearestNeighborRatio(training, held_out)(samples)  # the same choice every time
    assert NearestNeighborRatio(held_out, training)(samples) == pytest.approx(1 / ratio(samples), rel=1e-9)
    everything = torch.cdist(samples, training).amin(1).sum() / torch.cdist(samples, held_out).amin(1).sum()
    assert everything < 0.8  # what more training images alone would do


def test_sets_that_are_equal_have_a_ratio_of_1():
    same = drawn(10, 1)
    assert NearestNeighborRatio(same, same)(drawn(5, 2)) == NearestNeighborRatio(same, same)(same) == 1
