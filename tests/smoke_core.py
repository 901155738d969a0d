"""The library with nothing but its core requirements: `python tests/smoke_core.py` in an environment of their lowest versions.

Needs no pytest and no diffusers; stand-ins have the attributes that are read of schedulers. Ends with the word ok.
"""

import sys

import torch

import immiscible
from immiscible.adapters import OTPlanSampler


class WithBetas:
    betas = torch.linspace(1e-4, 0.02, 1000)
    alphas_cumprod = torch.cumprod(1 - betas, 0)


class FlowMatchEulerDiscreteScheduler:
    config = {"num_train_timesteps": 1000}

    def __init__(self):
        self.sigmas = torch.linspace(1, 1 / 1000, 1000)
        self.timesteps = 1000 * self.sigmas

    @classmethod
    def from_config(cls, config):
        return cls()


def couplings():
    x0, labels = torch.randn(200, 3, 16, 16), torch.randint(3, (200,))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for metric in ("l2", "squared_l2", "l1"):
            for precision in ("auto", "float32", "bfloat16", "float16"):
                immiscible.AssignmentCoupling(metric=metric, dtype=precision)(x0.to(dtype))
    for solver in ("exact", "auction"):
        assert sorted(immiscible.assign(x0, torch.randn_like(x0), solver=solver).tolist()) == list(range(200))
    for condition in ("within", "penalty", "centered"):
        for told in (labels, torch.randn(200, 5)):
            if condition != "within" or told is labels:
                coupling = immiscible.AssignmentCoupling(condition=condition)
                coupling(x0, labels=told)
                coupling.load_state_dict(coupling.state_dict())
                coupling(x0, labels=told)
    for score in ("l2", "dot"):
        immiscible.build_coupling("nearest", score=score, min_timestep=100)(x0, timesteps=torch.arange(200))
    reservoir = immiscible.ReservoirCoupling(16)
    for images in (x0[:4], x0[:4].bfloat16(), x0[:2, :, :8]):
        assert reservoir(images).dtype == images.dtype
    again = immiscible.ReservoirCoupling(16)
    again.load_state_dict(reservoir.state_dict())
    again(x0[:1])
    immiscible.GlobalCoupling(seed=1)(x0)
    for images, noise in immiscible.Window(immiscible.AssignmentCoupling(), 3)(x0.split(64)):
        assert noise.shape == images.shape
    leak = immiscible.ClassLeak()
    leak.add(torch.randn_like(x0), labels, x0)
    leak.result()
    OTPlanSampler().sample_plan_with_labels(x0, x0, labels, labels)


def laws_and_weights():
    for scheduler, prediction_type in ((WithBetas(), "v_prediction"), (FlowMatchEulerDiscreteScheduler(), "flow_prediction")):
        for name in immiscible.TIMESTEP_SAMPLINGS:
            sampler = immiscible.timestep_sampler(name, scheduler)
            assert sampler(4).shape == (4,) and sampler.levels(4, ndim=4, continuous=True).sigma.shape == (4, 1, 1, 1)
        for name in immiscible.LOSS_WEIGHTINGS:
            weights = immiscible.loss_weights(name, scheduler, prediction_type).to("cpu")
            assert weights[torch.arange(4)].shape == (4,) and weights.at(torch.rand(4, 1)).isfinite().all()


if __name__ == "__main__":
    couplings()
    laws_and_weights()
    print("torch", torch.__version__, *(f"{name} {sys.modules[name].__version__}" for name in ("numpy", "scipy", "numba")), "ok")
