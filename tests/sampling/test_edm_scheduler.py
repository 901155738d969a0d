"""Our samplers of EDM networks: Heun's steps against the algorithm as it is written, Euler's against diffusers, FDM's scaling."""

from itertools import pairwise

import pytest
import torch
from diffusers import EDMEulerScheduler

from immiscible.edm import EDMScalings, MomentumScalings
from immiscible.sampling.edm_scheduler import EDMScheduler


def network(x, time):
    return torch.tanh(x) * (1 + 0.1 * float(time))


def sampled(scheduler, x, steps):
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        x = scheduler.step(network(scheduler.scale_model_input(x, t), t), t, x).prev_sample
    return x


def by_the_paper(x, steps, scalings, heun):
    """Algorithm 1 of Karras et al., in float64."""
    ends = 80 ** (1 / 7), 0.002 ** (1 / 7)
    sigmas = [(ends[0] + (number / max(1, steps - 1)) * (ends[1] - ends[0])) ** 7 for number in range(steps)] + [0.0]

    def slope(x, sigma):
        skip, out, scale, time = scalings(torch.tensor(sigma, dtype=torch.float64))
        return (x - (skip * x + out * network(scale * x, time))) / sigma

    x, calls = x.double(), 0
    for here, following in pairwise(sigmas):
        first = slope(x, here)
        end, calls = x + (following - here) * first, calls + 1
        if following and heun:
            end, calls = x + (following - here) * (first + slope(end, following)) / 2, calls + 1
        x = end
    return x, calls


START = 80 * torch.randn(4, 1, 2, 2, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("momentum", [False, True])
@pytest.mark.parametrize("heun", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_steps_are_the_papers(steps, heun, momentum):
    scheduler = EDMScheduler(heun=heun, momentum=momentum)
    expected, calls = by_the_paper(START, steps, MomentumScalings(0.5) if momentum else EDMScalings(0.5), heun)
    for _ in range(2):  # a scheduler is used again
        assert torch.allclose(sampled(scheduler, START, steps).double(), expected, rtol=1e-4, atol=1e-4)
    assert len(scheduler.timesteps) == calls == (2 * steps - 1 if heun else steps)


def test_eulers_steps_are_diffusers():
    assert torch.allclose(sampled(EDMScheduler(heun=False), START, 9), sampled(EDMEulerScheduler(), START, 9), rtol=1e-6)


def test_heun_is_of_second_order():
    """Doubling the steps must divide the error by about four, and by two with Euler's."""
    exact, _ = by_the_paper(START, 3000, EDMScalings(0.5), True)
    errors = {heun: [(sampled(EDMScheduler(heun=heun), START, n).double() - exact).norm() for n in (40, 80)] for heun in (True, False)}
    assert 3 < errors[True][0] / errors[True][1] < 5.5
    assert 1.6 < errors[False][0] / errors[False][1] < 2.4


def test_the_configuration_comes_back(tmp_path):
    EDMScheduler(sigma_max=20.0, momentum=True).save_pretrained(tmp_path)
    again = EDMScheduler.from_pretrained(tmp_path)
    assert (again.config.sigma_max, again.config.momentum, again.config.heun) == (20.0, True, True)
    assert again.step_index is None and len(again.timesteps) == 1000
