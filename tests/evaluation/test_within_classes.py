"""Numbers by class: against their definitions, with classes of one image, of fewer images than features, and of copies."""

from __future__ import annotations

import numpy
import pytest
import torch
from scipy.linalg import sqrtm

from immiscible.evaluation.frechet import FrechetDistance
from immiscible.evaluation.within_classes import alignment, per_class_frechet_distance, within_class_distance


def drawn(count, seed, features=5, shift=0.0):
    return torch.randn(count, features, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift


def frechet_of_definition(a, b):
    a, b = a.numpy(), b.numpy()
    first, second = numpy.cov(a, rowvar=False), numpy.cov(b, rowvar=False)
    root = sqrtm(sqrtm(first) @ second @ sqrtm(first)).real
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + numpy.trace(first + second - 2 * root)


def test_each_class_has_its_frechet_distance():
    sizes, reference_sizes = {0: 40, 1: 3, 2: 1, 3: 9, 5: 6}, {0: 30, 1: 2, 2: 50, 3: 1, 4: 7, 5: 40}  # of 5 features
    labels, reference_labels = (torch.cat([torch.full((n,), c) for c, n in each.items()]) for each in (sizes, reference_sizes))
    samples, reference = drawn(len(labels), 1), drawn(len(reference_labels), 2, shift=0.5)
    found = per_class_frechet_distance(samples, labels, reference, reference_labels)
    assert list(found) == [0, 1, 5]  # the others have one image on a side, or none
    for label, distance in found.items():
        ours, theirs = samples[labels == label], reference[reference_labels == label]
        assert distance == pytest.approx(FrechetDistance("FD", theirs)(ours), rel=1e-6)
        if min(len(ours), len(theirs)) > 5:  # scipy's roots of singular matrices are wrong by 1e-8 and more
            assert distance == pytest.approx(frechet_of_definition(ours, theirs), rel=1e-8)


@pytest.mark.parametrize("count", [2, 4, 30])
def test_a_class_of_the_same_images_has_a_distance_of_0(count):
    same, labels = drawn(count, 1), torch.zeros(count, dtype=torch.int64)
    for rows in (same, same.roll(1, 0), same[:1].repeat(count, 1)):
        assert per_class_frechet_distance(rows, labels, rows.flip(0), labels)[0] == pytest.approx(0, abs=1e-12)


def test_singular_covariances_whose_distance_is_known():
    # Two lines at an angle: variances v and w along unit vectors e and f, so tr((C1 C2)^(1/2)) = sqrt(v w) |e . f|.
    steps = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)[:, None]
    angle = torch.tensor(0.7, dtype=torch.float64)
    e, f = torch.tensor([1.0, 0, 0], dtype=torch.float64), torch.stack([angle.cos(), angle.sin(), angle * 0])
    labels = torch.zeros(3, dtype=torch.int64)
    found = per_class_frechet_distance(2 * steps * e, labels, 3 * steps * f + 1, labels)[0]
    assert found == pytest.approx(3 + 4 + 9 - 2 * 6 * float(angle.cos()), rel=1e-12)


def test_distance_and_alignment_are_means_over_pairs_of_a_class():
    features, labels = drawn(30, 1), torch.tensor([0] * 12 + [3] * 2 + [1] + [2] * 15)
    features[20:24] = features[19]  # copies
    distances, aligned = within_class_distance(features, labels), alignment(features, labels)
    assert list(distances) == list(aligned) == [0, 2, 3]
    for label in distances:
        rows = features[labels == label].numpy()
        on_sphere = rows / numpy.linalg.norm(rows, axis=1, keepdims=True)
        pairs = [(i, j) for i in range(len(rows)) for j in range(i)]
        assert distances[label] == pytest.approx(numpy.mean([numpy.linalg.norm(rows[i] - rows[j]) for i, j in pairs]), rel=1e-12)
        assert aligned[label] == pytest.approx(numpy.mean([((on_sphere[i] - on_sphere[j]) ** 2).sum() for i, j in pairs]), rel=1e-12)


def test_a_class_that_has_collapsed_has_no_distance_within():
    features, labels = drawn(1, 1).repeat(8, 1), torch.zeros(8, dtype=torch.int64)
    assert within_class_distance(features, labels)[0] == 0
    assert alignment(features, labels)[0] == pytest.approx(0, abs=1e-15)


def test_a_hundred_images_of_a_class_are_chosen_whatever_their_order():
    features, labels = drawn(250, 1), torch.zeros(250, dtype=torch.int64)
    found = within_class_distance(features, labels)[0]
    assert found != pytest.approx(float(torch.pdist(features).mean()), rel=1e-6)
    assert found == pytest.approx(float(torch.pdist(features).mean()), rel=0.05)
    assert within_class_distance(features.flip(0), labels)[0] == pytest.approx(found, rel=1e-12)
