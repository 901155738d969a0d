"""What tests of measurements share: images to measure, and whether measuring left a trace."""

from __future__ import annotations

import random

import numpy
import torch

from immiscible.data.bundled import load_digits

DIGITS = torch.from_numpy(load_digits().images)[:, None]  # uint8 [1797,1,8,8]


def random_state():
    states = {"python": random.getstate(), "numpy": numpy.random.get_state(), "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return {name: repr(state.tolist() if isinstance(state, torch.Tensor) else tuple(map(repr, state))) for name, state in states.items()}
