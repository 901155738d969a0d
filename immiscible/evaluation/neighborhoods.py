"""Whether images lie where the others of their kind do: balls around images, as wide as their nearest neighbours are far."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from immiscible.evaluation.kernels import CHUNK, squared_distances

PRECISION_NEIGHBOR, DENSITY_NEIGHBOR = 3, 5  # of the papers
SAME = 1e-11  # of the largest squared norm: squared distances that differ by less are equal, products of matrices being no more exact


@dataclass(frozen=True)
class Neighborhoods:
    """A value of each image, float64; a metric is the mean of its own.

    Attributes:
        precision: [N] of each sample: 1 where it is in the ball of a reference image.
        recall: [M] of each reference image: 1 where it is in the ball of a sample.
        density: [N] of each sample: how many balls of reference images it is in, over 5.
        coverage: [M] of each reference image: 1 where a sample is in its ball.
    """

    precision: Tensor
    recall: Tensor
    density: Tensor
    coverage: Tensor


def neighborhoods(samples: Tensor, reference: Tensor, *, chunk: int = CHUNK) -> Neighborhoods:
    """Precision and recall (Kynkaanniemi et al. 2019, eq. 1 and 2, k = 3), density and coverage (Naeem et al. 2020, k = 5).

    The ball of an image is as wide as its k-th nearest other image of the same set is far. What is just as far as that is in it for
    precision and recall, by their definition, and outside for density and coverage, as in their authors' code: so density is 1 for equal
    sets, and a reference image of which there are k copies more has an empty ball.

    Args:
        samples: float64 [N, F], N at least 6.
        reference: float64 [M, F], M at least 6.
        chunk: memory is that of the pairs of ``chunk`` images with all others; no value depends on it.
    """
    center = reference.mean(0)
    slack = SAME * max(float((part - center).square().sum(1).max()) for rows in (samples, reference) for part in rows.split(chunk))
    narrow, wide = _squared_radii(reference, center, chunk).unbind(1)
    samples_narrow = _squared_radii(samples, center, chunk)[:, 0]
    recall, coverage = torch.zeros(2, len(reference), dtype=torch.bool)
    precision, density = [], []
    for part, own in zip(samples.split(chunk), samples_narrow.split(chunk), strict=True):
        squared = _to_all(part, reference, center, chunk)
        precision.append((squared <= narrow + slack).any(1))
        recall |= (squared <= own[:, None] + slack).any(0)
        inside = squared < wide - slack
        density.append(inside.sum(1).double() / DENSITY_NEIGHBOR)
        coverage |= inside.any(0)
    return Neighborhoods(torch.cat(precision).double(), recall.double(), torch.cat(density), coverage.double())


def _to_all(rows: Tensor, others: Tensor, center: Tensor, chunk: int) -> Tensor:
    """Squared distances [R, M], of features moved to the middle, where products of matrices are exact."""
    squared, centered = rows.new_empty(len(rows), len(others)), rows - center
    for part, values in zip(others.split(chunk), squared.split(chunk, 1), strict=True):
        values.copy_(squared_distances(centered, part - center))
    return squared


def _squared_radii(features: Tensor, center: Tensor, chunk: int) -> Tensor:
    """[N, 2]: the squared distances of each image from its 3rd and its 5th nearest other."""
    radii = []
    for number, part in enumerate(features.split(chunk)):
        squared = _to_all(part, features, center, chunk)
        squared.diagonal(number * chunk)[: len(part)] = torch.inf  # an image is not its own neighbour
        nearest = squared.topk(DENSITY_NEIGHBOR, largest=False).values
        radii.append(nearest[:, [PRECISION_NEIGHBOR - 1, DENSITY_NEIGHBOR - 1]])
    return torch.cat(radii)
