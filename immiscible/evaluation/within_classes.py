"""How samples of one class lie: from the class's images, and from each other. A number a class; the metric is their mean."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from immiscible.evaluation.image_sets import shuffled

WITHIN_CLASS_IMAGES = 100  # of a class at most, as a reviewer of Immiscible Diffusion asked


def per_class_frechet_distance(samples: Tensor, labels: Tensor, reference: Tensor, reference_labels: Tensor) -> dict[int, float]:
    """The squared Frechet distance of the samples of each class from its reference images.

    Classes with fewer than 2 images on a side have no covariance and are left out. Many have fewer images than features, and there may be
    a thousand of them. So ``tr((C1 C2)^(1/2))`` is taken as the sum of the singular values of ``A1 A2^T``, where ``C = A^T A`` and A holds
    the class's n features less their mean, over the root of n - 1: it is the same, exact where a covariance is singular, and takes a matrix
    no larger than the number of images.

    Args:
        samples: float64 [N, F].
        labels: int64 [N].
        reference: float64 [M, F].
        reference_labels: int64 [M].
    """
    shared = set(_classes(labels)) & set(_classes(reference_labels))
    return {label: _frechet_distance(samples[labels == label], reference[reference_labels == label]) for label in sorted(shared)}


def within_class_distance(features: Tensor, labels: Tensor) -> dict[int, float]:
    """The mean Euclidean distance between two different images of each class, of 100 of it at most (a fixed random choice).

    Small where a class has collapsed; to be held against the number of the reference images. Classes of one image are left out.

    Args:
        features: float64 [N, F].
        labels: int64 [N].
    """
    distances = {}
    for label in _classes(labels):
        rows = features[labels == label]
        distances[label] = float(torch.pdist(rows[shuffled(rows, "within class")[:WITHIN_CLASS_IMAGES]]).mean())
    return distances


def alignment(features: Tensor, labels: Tensor) -> dict[int, float]:
    """``mean_{i != j} |x_i - x_j|^2`` of the images of each class, features scaled to length 1; small where they are alike.

    Wang and Isola 2020 (see `uniformity`), with alpha = 2; where their two views are of one image, these are of one class.
    Two images that are drawn from a class differ by twice the sum of the variances. Classes of one image are left out.

    Args:
        features: float64 [N, F].
        labels: int64 [N].
    """
    return {label: 2 * float(normalize(features[labels == label]).var(0).sum()) for label in _classes(labels)}


def _classes(labels: Tensor) -> list[int]:
    """The classes that have 2 images at least."""
    found, counts = labels.unique(return_counts=True)
    return found[counts > 1].tolist()


def _frechet_distance(ours: Tensor, theirs: Tensor) -> float:
    means = ours.mean(0) - theirs.mean(0)
    roots = [(rows - rows.mean(0)) / (len(rows) - 1) ** 0.5 for rows in (ours, theirs)]
    # R of A = Q R has no more rows than features, and gives the same A^T A
    a, b = (torch.linalg.qr(root, mode="r").R if len(root) > root.shape[1] else root for root in roots)
    squared = means.square().sum() + a.square().sum() + b.square().sum() - 2 * torch.linalg.svdvals(a @ b.T).sum()
    return max(0.0, float(squared))
