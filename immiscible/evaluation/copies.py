"""Whether samples are copies: nearest neighbours among the images that were trained on and among images that were not."""

from __future__ import annotations

import torch
from torch import Tensor

from immiscible.randomness import seeded_generator

TOGETHER = 1024  # samples whose distances to all images are held at once


class NearestNeighborRatio:
    """How much nearer samples lie to the images that were trained on than to as many others of their kind.

    ``sum_i d(s_i, T) / sum_i d(s_i, H)``, where d is the Euclidean distance of a sample's features from the nearest of a set's, T holds
    images that were trained on and H as many held out: of the larger set a fixed random choice. It is 1 where samples know of T no more
    than of H, below 1 where they lean on T, and 0 where each is one of T. A copy is seen only of what is in T, so that H should be as large
    as the data. Meehan, Chaudhuri and Dasgupta (2020, "A Non-Parametric Test to Detect Data-Copying in Generative Models") ask the same of
    three sets by ranks. Sums are divided, not each sample's distances: the mean of such ratios is above 1 where nothing is copied.

    Args:
        training: features float64 [N, F] of images that were trained on.
        held_out: features float64 [M, F] of others.

    Attributes:
        images: min(N, M).
    """

    def __init__(self, training: Tensor, held_out: Tensor) -> None:
        self.images = min(len(training), len(held_out))
        self._training, self._held_out = (_some(features, self.images) for features in (training, held_out))

    def __call__(self, samples: Tensor) -> float:
        """The ratio for samples' features, float64 [S, F]; 1 where both sums are 0, infinite where only the second is."""
        near, far = (_nearest(samples, features).sum() for features in (self._training, self._held_out))
        return float(near / far) if near != far else 1.0


def _some(features: Tensor, count: int) -> Tensor:
    if count == len(features):
        return features
    return features[torch.randperm(len(features), generator=seeded_generator("nearest_neighbor_ratio"))[:count]]


def _nearest(samples: Tensor, others: Tensor) -> Tensor:
    """float64 [S]: each sample's distance from the nearest of the others."""
    return torch.cat([torch.cdist(part, others).amin(1) for part in samples.split(TOGETHER)])
