"""Distances of two sets of features by the means of a kernel over pairs; no matrix of all pairs is ever held."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import normalize

from immiscible.evaluation.image_sets import shuffled
from immiscible.randomness import seeded_generator

CHUNK = 256  # rows whose pairs with as many others are held at once
CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0  # of the paper

Kernel = Callable[[Tensor, Tensor], Tensor]


def squared_distances(rows: Tensor, columns: Tensor) -> Tensor:
    """[R, C] of float64 [R, F] and [C, F], by products of matrices: right to about 1e-15 of the largest squared norm."""
    norms = rows.square().sum(1)[:, None] + columns.square().sum(1)
    return torch.addmm(norms, rows, columns.T, alpha=-2).clamp_(min=0)


def pair_mean(kernel: Kernel, rows: Tensor, others: Tensor | None = None, *, chunk: int = CHUNK) -> float:
    """The mean of ``kernel`` over all pairs of a row and another set's row; of two different rows of the same set where none is given.

    Args:
        kernel: [R, C] of [R, F] and [C, F].
        rows: float64 [N, F]; N at least 2 where there are no others.
        others: float64 [M, F].
        chunk: memory is that of ``chunk`` squared pairs; the mean does not depend on it.
    """
    total = 0.0
    for first, part in enumerate(rows.split(chunk)):
        for second, column in enumerate((rows if others is None else others).split(chunk)):
            values = kernel(part, column)
            if others is None and first == second:
                values.fill_diagonal_(0)
            total += float(values.sum())
    return total / (len(rows) * (len(rows) - 1) if others is None else len(rows) * len(others))


def kid(samples: Tensor, reference: Tensor, *, subsets: int = 100, subset_size: int = 1000, chunk: int = CHUNK) -> float:
    """The mean of unbiased squared maximum mean discrepancies of random subsets, by ``k(x, y) = (x . y / F + 1)^3``.

    ``mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean_{i, j} k(x_i, y_j)`` (Binkowski et al. 2018, "Demystifying MMD
    GANs", section 4). Subsets are drawn without repetition, from a fixed seed; of fewer images than ``subset_size`` they are as large as
    the smaller set. It is 0 on average for sets of one distribution and may be negative.

    Args:
        samples: float64 [N, F], N at least 2.
        reference: float64 [M, F], M at least 2.
        subsets: how many.
        subset_size: images of either set in each.
        chunk: see `pair_mean`.
    """
    size, generator = min(subset_size, len(samples), len(reference)), seeded_generator("kid subsets")
    if size == len(samples) == len(reference):
        subsets = 1  # they would all be these
    orders = [shuffled(rows, "kid") for rows in (samples, reference)]
    total = 0.0
    for _ in range(subsets):
        x, y = (
            rows[order[torch.randperm(len(rows), generator=generator)[:size]]]
            for rows, order in zip((samples, reference), orders, strict=True)
        )
        total += pair_mean(_cubic, x, chunk=chunk) + pair_mean(_cubic, y, chunk=chunk) - 2 * pair_mean(_cubic, x, y, chunk=chunk)
    return total / subsets


def cmmd(samples: Tensor, reference: Tensor, *, unbiased: bool = False, chunk: int = CHUNK) -> float:
    """1000 times the squared maximum mean discrepancy of CLIP's embeddings by ``k(x, y) = exp(-|x - y|^2 / (2 * 10^2))``.

    Jayasumana et al. 2024, "Rethinking FID" (CMMD). Embeddings are scaled to length 1, as the authors' code does. That code takes the
    mean over all pairs, each image with itself among them (the V-statistic): never negative, 0 for equal sets, and too large by
    ``1000 ((1 - a) / N + (1 - b) / M)``, where a and b are the means of k over two different images of either set. Published numbers are
    of this kind. The paper's own estimator leaves an image's pair with itself out: ``unbiased``.

    Args:
        samples: float64 [N, E], N at least 2.
        reference: float64 [M, E], M at least 2.
        unbiased: the U-statistic, which is 0 on average for sets of one distribution and may be negative.
        chunk: see `pair_mean`.
    """

    def kernel(rows: Tensor, columns: Tensor) -> Tensor:
        return (squared_distances(normalize(rows), normalize(columns)) / (-2 * CMMD_SIGMA**2)).exp()

    def within(rows: Tensor) -> float:
        mean = pair_mean(kernel, rows, chunk=chunk)
        return mean if unbiased else mean + (1 - mean) / len(rows)

    return CMMD_SCALE * (within(samples) + within(reference) - 2 * pair_mean(kernel, samples, reference, chunk=chunk))


def uniformity(features: Tensor, *, chunk: int = CHUNK) -> float:
    """``log mean_{i != j} exp(-2 |x_i - x_j|^2)`` of features float64 [N, F] scaled to length 1; the lower, the more evenly spread.

    Wang and Isola 2020, "Understanding Contrastive Representation Learning through Alignment and Uniformity on the Hypersphere", with
    t = 2: near -4 for features spread over a sphere of many dimensions, 0 where all images are one.
    """

    def kernel(rows: Tensor, columns: Tensor) -> Tensor:
        return (-2 * squared_distances(normalize(rows), normalize(columns))).exp()

    return math.log(pair_mean(kernel, features, chunk=chunk))


def _cubic(rows: Tensor, columns: Tensor) -> Tensor:
    return (rows @ columns.T / rows.shape[1] + 1).pow(3)
