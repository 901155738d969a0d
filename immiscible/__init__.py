"""Noise coupling and timestep laws for diffusion training: three lines in your own loop, or whole training scripts.

    coupling = immiscible.AssignmentCoupling()
    noise = coupling(latents)                                    # instead of torch.randn_like(latents)
    timesteps = sampler(len(latents), device=latents.device)     # instead of torch.randint(...)

What is listed in ``__all__``, and `immiscible.adapters`, is the public interface and stays stable. It needs torch, numpy, scipy and numba.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for type checkers and readers; at run time a name is imported when it is asked for, so that --help needs no torch
    from immiscible.assignment.costs import cost_matrix as cost_matrix
    from immiscible.assignment.reservoir import ReservoirCoupling as ReservoirCoupling
    from immiscible.assignment.solve import Assignment as Assignment
    from immiscible.assignment.solve import assign as assign
    from immiscible.assignment.solve import certified_assignment as certified_assignment
    from immiscible.coupling import COUPLINGS as COUPLINGS
    from immiscible.coupling import AboveTimestep as AboveTimestep
    from immiscible.coupling import AssignmentCoupling as AssignmentCoupling
    from immiscible.coupling import Coupling as Coupling
    from immiscible.coupling import FlippedAssignmentCoupling as FlippedAssignmentCoupling
    from immiscible.coupling import IndependentCoupling as IndependentCoupling
    from immiscible.coupling import NearestCoupling as NearestCoupling
    from immiscible.coupling import build_coupling as build_coupling
    from immiscible.coupling import coupling_statistics as coupling_statistics
    from immiscible.epoch import epoch_noise as epoch_noise
    from immiscible.epoch import plan_epoch as plan_epoch
    from immiscible.errors import UserError as UserError
    from immiscible.evaluation.leakage import ClassLeak as ClassLeak
    from immiscible.evaluation.leakage import class_leak as class_leak
    from immiscible.pools import GlobalCoupling as GlobalCoupling
    from immiscible.pools import Window as Window
    from immiscible.process import NoiseLevels as NoiseLevels
    from immiscible.process import NoiseProcess as NoiseProcess
    from immiscible.timesteps import TIMESTEP_SAMPLINGS as TIMESTEP_SAMPLINGS
    from immiscible.timesteps import TimestepSampler as TimestepSampler
    from immiscible.timesteps import timestep_sampler as timestep_sampler
    from immiscible.weighting import LOSS_WEIGHTINGS as LOSS_WEIGHTINGS
    from immiscible.weighting import LossWeights as LossWeights
    from immiscible.weighting import loss_weights as loss_weights

__version__ = "0.1.0"

_NAMES = {
    "immiscible.assignment.costs": "cost_matrix",
    "immiscible.assignment.reservoir": "ReservoirCoupling",
    "immiscible.assignment.solve": "Assignment assign certified_assignment",
    "immiscible.coupling": "COUPLINGS AboveTimestep AssignmentCoupling Coupling FlippedAssignmentCoupling IndependentCoupling "
    "NearestCoupling build_coupling coupling_statistics",
    "immiscible.epoch": "epoch_noise plan_epoch",
    "immiscible.errors": "UserError",
    "immiscible.evaluation.leakage": "ClassLeak class_leak",
    "immiscible.pools": "GlobalCoupling Window",
    "immiscible.process": "NoiseLevels NoiseProcess",
    "immiscible.timesteps": "TIMESTEP_SAMPLINGS TimestepSampler timestep_sampler",
    "immiscible.weighting": "LOSS_WEIGHTINGS LossWeights loss_weights",
}
_ROOMS = {name: module for module, names in _NAMES.items() for name in names.split()}
__all__ = sorted(_ROOMS)


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        value = globals()[name] = getattr(import_module(_ROOMS[name]), name)
        return value
    if name == "adapters":
        return import_module("immiscible.adapters")
    raise AttributeError(f"module 'immiscible' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
