"""The noise process, timestep laws, loss weights and draws on a GPU against the same on the CPU; and a GPU as torch's default device."""

from __future__ import annotations

import pytest
import torch
from pairs import assert_permutation, images_and_noises, row_of_each
from torch import Tensor

import immiscible
from immiscible.coupling import COUPLINGS, build_coupling
from immiscible.process import EDM_PREDICTION_TYPES, PREDICTION_TYPES, NoiseProcess
from immiscible.randomness import Draws, seeded_generator
from immiscible.timesteps import TIMESTEP_SAMPLINGS, timestep_sampler
from immiscible.weighting import LOSS_WEIGHTINGS, loss_weights

BATCH = 64
CLOSE = {"rtol": 1e-6, "atol": 1e-6}  # one rounding of fp32


def processes() -> dict[str, NoiseProcess]:
    from diffusers import DDPMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler

    schedulers = {"ddpm": DDPMScheduler(), "flow": FlowMatchEulerDiscreteScheduler(), "edm": EDMEulerScheduler(num_train_timesteps=100)}
    return {kind: NoiseProcess.from_scheduler(scheduler) for kind, scheduler in schedulers.items()}


def check_process(device: torch.device, process: NoiseProcess, dtype: torch.dtype) -> None:
    """``add_noise``, each target and its inverse, in fp32, from vectors on the device and from vectors on the CPU."""
    x0, noise = (rows.to(dtype) for rows in images_and_noises(BATCH))
    t = torch.randint(process.num_timesteps, (BATCH,), device="cpu", generator=seeded_generator("t"))
    given = [rows.to(device) for rows in (x0, noise, t)]
    types = {**PREDICTION_TYPES, "edm": EDM_PREDICTION_TYPES}[process.kind]
    for there in (process.to(device), process):
        found = there.add_noise(*given)
        assert found.device == device and found.dtype == torch.float32
        torch.testing.assert_close(found.cpu(), process.add_noise(x0, noise, t), **CLOSE)
        for name in types:
            target = there.target(*given, name)
            assert target.device == device and target.dtype == torch.float32
            torch.testing.assert_close(target.cpu(), process.target(x0, noise, t, name), **CLOSE)
            expected = process.predict_x0(process.add_noise(x0, noise, t), process.target(x0, noise, t, name), t, name)
            torch.testing.assert_close(there.predict_x0(found, target, given[2], name).cpu(), expected, rtol=1e-3, atol=1e-3)
    assert process.to(device).model_time.device == device


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["ddpm", "flow", "edm"])
def test_process(device, kind, dtype):
    check_process(device, processes()[kind], dtype)


def check_weights(device: torch.device, process: NoiseProcess, name: str) -> None:
    """By timestep and by sigma; the weights follow what they are asked for, or are moved once."""
    prediction_type = {**PREDICTION_TYPES, "edm": EDM_PREDICTION_TYPES}[process.kind][0]
    weights = loss_weights(name, process, prediction_type)
    t = torch.randint(process.num_timesteps, (BATCH,), device="cpu", generator=seeded_generator("t"))
    sigma = process.sigma[t].view(-1, 1, 1, 1) * torch.linspace(0.9, 1, BATCH, device="cpu").view(-1, 1, 1, 1)
    for there in (weights, weights.to(device), weights.float().to(device)):
        for found, expected in ((there[t.to(device)], weights[t]), (there.at(sigma.to(device)), weights.at(sigma))):
            assert found.device == device and found.dtype == torch.float32 and found.shape == expected.shape
            torch.testing.assert_close(found.cpu(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["ddpm", "flow", "edm"])
@pytest.mark.parametrize("name", [name for name in LOSS_WEIGHTINGS if "released" not in name])
def test_weights(device, name, kind):
    check_weights(device, processes()[kind], name)


def check_sampler(device: torch.device, name: str, process: NoiseProcess) -> None:
    """The timesteps of a seed do not depend on where they are wanted; drawn on the device they follow the law."""
    sampler = timestep_sampler(name, process)
    expected = sampler(1000, generator=seeded_generator("law"))
    found = sampler(1000, device=device, generator=seeded_generator("law"))
    assert found.device == device and torch.equal(found.cpu(), expected)
    uniforms = torch.rand(1000, dtype=torch.float64, device="cpu", generator=seeded_generator("uniforms"))
    assert torch.equal(sampler.from_uniforms(uniforms.to(device)).cpu(), sampler.from_uniforms(uniforms))
    levels = sampler.levels(100, device=device, generator=seeded_generator("law"), ndim=4, continuous=True)
    for there, here in zip(levels, sampler.levels(100, generator=seeded_generator("law"), ndim=4, continuous=True), strict=True):
        assert there.device == device and torch.equal(there.cpu(), here)
    drawn = sampler(20_000, generator=torch.Generator(device).manual_seed(0))
    assert drawn.device == device
    tenths = max(1, process.num_timesteps // 10)
    counts = torch.bincount(drawn.cpu() // tenths, minlength=10)[:10] / 20_000
    law = torch.stack([part.sum() for part in sampler.marginal(20_000).split(tenths)])[:10]
    assert float((counts - law).abs().max()) < 6 * (0.25 / 20_000) ** 0.5  # six standard errors of a share


@pytest.mark.parametrize("name", TIMESTEP_SAMPLINGS)
def test_sampler(device, name):
    check_sampler(device, name, processes()["ddpm"])


def check_draws(device: torch.device) -> None:
    """A step's noises are a function of seed, step and row, however its rows are split; timesteps are the CPU's."""
    whole = Draws(3, 5, 0, device).normal("noise", 20, 3, 4)
    parts = [Draws(3, 5, first, device).normal("noise", count, 3, 4) for first, count in ((0, 3), (3, 9), (12, 8))]
    assert whole.device == device and whole.dtype == torch.float32
    assert torch.equal(whole.cpu(), torch.cat(parts).cpu())
    for other in (Draws(4, 5, 0, device), Draws(3, 6, 0, device)):
        assert not torch.equal(other.normal("noise", 20, 3, 4).cpu(), whole.cpu())
    assert torch.equal(Draws(3, 5, 0, device).uniform("t", 20).cpu(), Draws(3, 5, 0, torch.device("cpu")).uniform("t", 20))
    many = Draws(3, 5, 0, device).normal("noise", 4096, 16).cpu().double()  # 65,536 numbers: their mean is known to 1/256
    assert abs(float(many.mean())) < 6 / 256 and abs(float(many.square().mean()) - 1) < 6 * 2**0.5 / 256


def test_draws(device):
    check_draws(device)


def check_default_device(device: torch.device, name: str) -> None:
    """A coupling whose caller made the device torch's default: with tensors of the device, and with tensors of the CPU."""
    options = {"candidates": 4} if name == "nearest" else {"size": 16} if name == "reservoir" else {}
    for n in (5, 200):  # the exact solver and the auction
        x0, noise = images_and_noises(n)
        for place in (device, torch.device("cpu")):
            expected = build_coupling(name, **options)(x0, noise)
            with torch.device(device):
                drawn: Tensor = build_coupling(name, **options)(x0.to(place))
                found = build_coupling(name, **options)(x0.to(place), noise.to(place))
            assert drawn.device == found.device == place
            if name in ("assignment", "flipped_assignment", "independent"):
                assert_permutation(row_of_each(found, noise), n, torch.device("cpu"))
            if place.type == "cpu" and name in ("assignment", "flipped_assignment", "independent"):
                assert torch.equal(found, expected)


@pytest.mark.parametrize("name", COUPLINGS)
def test_couplings_under_a_default_device(device, name):
    check_default_device(device, name)


@pytest.mark.parametrize("kind", ["ddpm", "flow", "edm"])
def test_laws_under_a_default_device(device, kind):
    """Processes, laws and weights that are built under a default device are those built without one."""
    plain = processes()[kind]
    with torch.device(device):
        process = processes()[kind]
        names = [name for name in TIMESTEP_SAMPLINGS if "released" not in name]
        drawn = {name: immiscible.timestep_sampler(name, process)(8, generator=seeded_generator("law")) for name in names}
        prediction_type = {**PREDICTION_TYPES, "edm": EDM_PREDICTION_TYPES}[kind][0]
        weights = immiscible.loss_weights("min_snr", process, prediction_type)
        found = weights[torch.arange(8)]
    assert found.device == device
    torch.testing.assert_close(found.cpu(), immiscible.loss_weights("min_snr", plain, prediction_type)[torch.arange(8)])
    torch.testing.assert_close(process.sigma.cpu(), plain.sigma)
    for name, t in drawn.items():
        assert torch.equal(t.cpu(), immiscible.timestep_sampler(name, plain)(8, generator=seeded_generator("law"))), name
