"""Noise coupling and timestep laws for diffusion training: three lines in your own loop, or whole training scripts.

    coupling = immiscible.AssignmentCoupling()
    noise = coupling(latents)                                    # instead of torch.randn_like(latents)
    timesteps = sampler(len(latents), device=latents.device)     # instead of torch.randint(...)

What is listed in ``__all__``, and `immiscible.adapters`, is the public interface and stays stable. It needs torch, numpy, scipy and numba.
"""

from immiscible.assignment.costs import cost_matrix
from immiscible.assignment.reservoir import ReservoirCoupling
from immiscible.assignment.solve import Assignment, assign, certified_assignment
from immiscible.coupling import (
    COUPLINGS,
    AboveTimestep,
    AssignmentCoupling,
    Coupling,
    FlippedAssignmentCoupling,
    IndependentCoupling,
    NearestCoupling,
    build_coupling,
    coupling_statistics,
)
from immiscible.errors import UserError
from immiscible.evaluation.leakage import ClassLeak, class_leak
from immiscible.pools import GlobalCoupling, Window
from immiscible.process import NoiseLevels, NoiseProcess
from immiscible.timesteps import TIMESTEP_SAMPLINGS, TimestepSampler, timestep_sampler
from immiscible.weighting import LOSS_WEIGHTINGS, LossWeights, loss_weights

__version__ = "0.1.0"

__all__ = [
    "COUPLINGS",
    "LOSS_WEIGHTINGS",
    "TIMESTEP_SAMPLINGS",
    "AboveTimestep",
    "Assignment",
    "AssignmentCoupling",
    "ClassLeak",
    "Coupling",
    "FlippedAssignmentCoupling",
    "GlobalCoupling",
    "IndependentCoupling",
    "LossWeights",
    "NearestCoupling",
    "NoiseLevels",
    "NoiseProcess",
    "ReservoirCoupling",
    "TimestepSampler",
    "UserError",
    "Window",
    "assign",
    "build_coupling",
    "certified_assignment",
    "class_leak",
    "cost_matrix",
    "coupling_statistics",
    "loss_weights",
    "timestep_sampler",
]
