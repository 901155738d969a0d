"""Noise coupling and timestep laws for diffusion training: three lines in your own loop, or whole training scripts.

    coupling = immiscible.AssignmentCoupling()
    noise = coupling(latents)                                    # instead of torch.randn_like(latents)
    timesteps = sampler(len(latents), device=latents.device)     # instead of torch.randint(...)

What is listed in ``__all__`` is the public interface and stays stable.
"""

from immiscible.assignment.costs import cost_matrix
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
from immiscible.process import NoiseProcess
from immiscible.timesteps import TIMESTEP_SAMPLINGS, TimestepSampler, timestep_sampler
from immiscible.weighting import LOSS_WEIGHTINGS, loss_weights

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
    "IndependentCoupling",
    "NearestCoupling",
    "NoiseProcess",
    "TimestepSampler",
    "UserError",
    "assign",
    "build_coupling",
    "certified_assignment",
    "class_leak",
    "cost_matrix",
    "coupling_statistics",
    "loss_weights",
    "timestep_sampler",
]
