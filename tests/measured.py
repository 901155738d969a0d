"""What tests of measurements share: images to measure, and whether measuring left a trace."""

from __future__ import annotations

import random

import numpy
import torch

from immiscible.data.bundled import load_digits

DIGITS = torch.from_numpy(load_digits().images)[:, None]  # uint8 [1797,1,8,8]


def reference_distance(a, b):
    """Float64, by eigenvalues of symmetric matrices alone, and with numpy's covariance."""
    a, b = a.flatten(1).double().numpy(), b.flatten(1).double().numpy()
    cov_a, cov_b = (numpy.atleast_2d(numpy.cov(x, rowvar=False)) for x in (a, b))
    values, vectors = numpy.linalg.eigh(cov_a)
    root = vectors * numpy.sqrt(values.clip(0)) @ vectors.T
    product = numpy.linalg.eigvalsh(root @ cov_b @ root).clip(0)
    means = ((a.mean(0) - b.mean(0)) ** 2).sum()
    return means + numpy.trace(cov_a) + numpy.trace(cov_b) - 2 * numpy.sqrt(product).sum()


def random_state():
    states = {"python": random.getstate(), "numpy": numpy.random.get_state(), "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return {name: repr(state.tolist() if isinstance(state, torch.Tensor) else tuple(map(repr, state))) for name, state in states.items()}
