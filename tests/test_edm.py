"""EDM's and FDM's formulas, in float64 from the papers; the axis of sigma with SpeeD's laws and the weightings."""

import math
from types import SimpleNamespace

import numpy
import pytest
import torch
from torch import nn

from immiscible.coupling import IndependentCoupling
from immiscible.edm import EDMScalings, Karras, LogNormal, MomentumObjective, MomentumScalings, SigmaProcess
from immiscible.errors import UserError
from immiscible.objectives import DenoisingObjective
from immiscible.process import NoiseProcess
from immiscible.randomness import Draws, PoolDraws
from immiscible.timesteps import timestep_sampler
from immiscible.weighting import loss_weights

CPU = torch.device("cpu")
SIGMAS = torch.logspace(-3, 3, 61, dtype=torch.float64)


def edm_process(levels=1000, sigma_data=0.5, scalings=None):
    return SigmaProcess.build(LogNormal(-1.2, 1.2), scalings or EDMScalings(sigma_data), sigma_data=sigma_data, num_levels=levels)


class Network(nn.Module):
    """Something that depends on its input and on what it is told of the noise level."""

    def forward(self, x, time):
        return SimpleNamespace(sample=torch.tanh(x) * (1 + 0.1 * time.view(-1, 1, 1, 1)))


def objective(process, kind=DenoisingObjective, weighting="none", law="uniform", **options):
    return kind(
        process=process,
        sampler=timestep_sampler(law, process),
        coupling=IndependentCoupling(),
        weights=loss_weights(weighting, process, "preconditioned"),
        prediction_type="preconditioned",
        **options,
    )


def loss_and_draws(found, batch=32, step=0):
    draws = Draws(3, step, 0, CPU)
    x0 = torch.rand(batch, 1, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
    pairs = found.pair(x0, PoolDraws((draws,), batch))
    return found(Network(), pairs, draws), pairs, draws


@pytest.mark.parametrize("sigma_data", [0.5, 1.3])
def test_preconditioning_identities(sigma_data):
    """Equations 114 to 133 of Karras et al.: unit input, unit target, an error amplified as little as can be, and a weight of 1 / out^2."""
    skip, out, scale, time = EDMScalings(sigma_data)(SIGMAS)
    assert torch.allclose(scale**2 * (sigma_data**2 + SIGMAS**2), torch.ones_like(SIGMAS))
    target_variance = ((1 - skip) ** 2 * sigma_data**2 + skip**2 * SIGMAS**2) / out**2
    assert torch.allclose(target_variance, torch.ones_like(SIGMAS))
    for other in (skip * 0.99, skip * 1.01):  # c_out^2 = (1 - c_skip)^2 sigma_data^2 + c_skip^2 sigma^2 is least at c_skip
        assert ((1 - other) ** 2 * sigma_data**2 + other**2 * SIGMAS**2 > out**2).all()
    assert torch.allclose((SIGMAS**2 + sigma_data**2) / (SIGMAS * sigma_data) ** 2, 1 / out**2)
    assert torch.equal(time, SIGMAS.log() / 4)


@pytest.mark.parametrize("weighting", ["none", "min_snr", "p2", "change_aware"])
def test_loss_is_the_official_formula(weighting):
    """``weight(sigma) (D(x0 + sigma n) - x0)^2`` in float64, with the weight on the noise's error where there is one."""
    process = edm_process()
    found, pairs, draws = loss_and_draws(objective(process, weighting=weighting))
    share = (pairs.timesteps + draws.uniform("level", 32)) / 1000
    sigma = (1.2 * torch.special.ndtri(share) - 1.2).exp().view(-1, 1, 1, 1)
    x0, noise = pairs.x0.double(), pairs.noise.double()
    x, total = x0 + sigma * noise, (sigma**2 + 0.25).sqrt()
    denoised = 0.25 / total**2 * x + 0.5 * sigma / total * Network()(x / total, sigma.flatten().log() / 4).sample
    weight = (sigma**2 + 0.25) / (0.5 * sigma) ** 2
    snr = 0.25 / process.exact_sigma**2
    on_noise = {
        "none": 1 / process.alpha_bar,  # one on what the network says
        "min_snr": (5 / snr).clamp(max=1),
        "p2": 1 / (1 + snr),
        "change_aware": loss_weights("change_aware", process, "preconditioned").vector / process.alpha_bar,
    }[weighting]
    of_level = (on_noise * process.alpha_bar)[pairs.timesteps]
    expected = of_level * (weight * (denoised - x0) ** 2).mean((1, 2, 3))
    assert torch.allclose(found.double(), expected, rtol=2e-5)


def test_change_aware_follows_the_noise_share_per_share_of_the_proposal():
    process = edm_process()
    rate = numpy.gradient((1 - process.alpha_bar).numpy())
    expected = 0.4 + 0.2 * (rate - max(0, rate.min())) / (min(1, rate.max()) - max(0, rate.min()))
    assert numpy.allclose(loss_weights("change_aware", process, "preconditioned").vector / process.alpha_bar, expected)


def test_weights_of_a_sigma_are_those_of_its_level():
    process = edm_process(sigma_data=1.7)
    weights = loss_weights("min_snr", process, "preconditioned")
    assert torch.allclose(weights.at(process.exact_sigma), weights.vector.float(), rtol=1e-5)


def test_sigma_is_log_normal_and_the_same_for_any_split():
    process = edm_process()
    draws, t = Draws(0, 0, 0, CPU), timestep_sampler("uniform", process)(20_000, generator=torch.Generator().manual_seed(0))
    logs = process.drawn_sigma(t, draws).log().sort().values
    uniform = torch.special.ndtr((logs + 1.2) / 1.2)
    assert (uniform - (torch.arange(20_000) + 0.5) / 20_000).abs().max() < 1.63 / math.sqrt(20_000)  # Kolmogorov and Smirnov, 1 %
    later = process.drawn_sigma(t[8:16], Draws(0, 0, 8, CPU))
    assert torch.equal(later, process.drawn_sigma(t[:16], draws)[8:])


@pytest.mark.parametrize(("r", "share"), [(10, 0.0904), (100, 0.0097), (143.55, 0.0064)])
def test_speeds_step_lies_at_its_sigma(r, share):
    """``sigma_r = sigma_data sqrt(r - 1)``, and what the log-normal proposal gives to the area of convergence."""
    process = edm_process(levels=100_000)
    tau = process.convergence_step(r)
    assert float(process.sigma[tau - 1]) == pytest.approx(0.5 * math.sqrt(r - 1), rel=1e-3)
    assert 1 - tau / 100_000 == pytest.approx(share, abs=6e-5)
    law = timestep_sampler("asymmetric", process, asymmetric_r=r).probabilities
    assert float(law[0] / law[-1]) == pytest.approx(5)


def test_target_and_prediction_are_inverse_and_equal_v_prediction():
    """EDM's network says -v of the data divided by sigma_data, on the process of equal SNR."""
    process, t = edm_process(100), torch.arange(100)
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(100, 1, 2, 2, generator=generator), torch.randn(100, 1, 2, 2, generator=generator)
    target = process.target(x0, noise, t, "preconditioned")
    xt = process.add_noise(x0, noise, t)
    assert torch.allclose(process.predict_x0(xt, target, t, "preconditioned"), x0, atol=1e-4)
    signal, deviation = process.alpha_bar.sqrt().view(-1, 1, 1, 1), (1 - process.alpha_bar).sqrt().view(-1, 1, 1, 1)
    assert torch.allclose(target.double(), deviation * x0 / 0.5 - signal * noise, atol=1e-5)
    assert torch.allclose(process.noise_error("preconditioned"), process.alpha_bar)
    with pytest.raises(UserError, match="needs `prediction_type` preconditioned, not 'epsilon'"):
        process.target(x0, noise, t, "epsilon")


def test_levels_in_the_schedulers_terms():
    process, t = edm_process(10), torch.tensor([0, 9])
    levels = process.levels(t, torch.tensor([0.25, 0.75], dtype=torch.float64))
    shares = torch.tensor([0.025, 0.975], dtype=torch.float64)
    assert torch.allclose(levels.sigma.double(), (1.2 * torch.special.ndtri(shares) - 1.2).exp())
    assert torch.allclose(levels.time, levels.sigma.log() / 4) and levels.index.tolist() == [9, 0]
    assert torch.equal(process.levels(t).sigma, process.sigma[t])


def test_proposals_end_where_they_should():
    shares = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    assert torch.allclose(LogNormal(-1.1, 2.0, 0.002, 80)(shares)[[0, 2]], torch.tensor([0.002, 80.0], dtype=torch.float64))
    assert all(torch.isfinite(LogNormal(-1.2, 1.2)(each).log()).all() for each in (shares, shares.float()))  # of any device
    assert torch.allclose(Karras()(shares), torch.tensor([0.002, (0.5 * (0.002 ** (1 / 7) + 80 ** (1 / 7))) ** 7, 80.0]).double())


def test_momentum_solves_its_equation_and_is_a_limit_of_its_recursion():
    """``s'' + 2 s' + s = 0`` in B; the heavy-ball recursion with a double root, ``x - 2 q x' + q^2 x'' = 0`` at q = 1 - h, tends to it."""
    scalings = MomentumScalings(0.5, 0.0, 1.0)

    def scale_at(spent):
        t = (-0.1 + (0.01 + 2 * 19.9 * spent) ** 0.5) / 19.9  # where 0.1 t + 19.9 t^2 / 2 is that
        return scalings(t).input

    spent, h = torch.linspace(0.1, 8, 50, dtype=torch.float64), 1e-4
    before, here, after = scale_at(spent - h), scale_at(spent), scale_at(spent + h)
    assert ((after - 2 * here + before) / h**2 + (after - before) / h + here).abs().max() < 1e-5
    step = 1e-3
    values = [1.0, 1.0]
    for _ in range(3000):
        values.append(2 * (1 - step) * values[-1] - (1 - step) ** 2 * values[-2])
    assert values[3000] == pytest.approx(float(scale_at(torch.tensor(3.0, dtype=torch.float64))), abs=2e-3)
    edm = EDMScalings(0.5)(SIGMAS)
    fdm = MomentumScalings(0.5)(SIGMAS)
    assert all(torch.equal(getattr(fdm, name), getattr(edm, name)) for name in ("skip", "out", "time"))


def test_momentum_caps_edms_weight():
    process = edm_process(scalings=MomentumScalings(0.5))
    plain, pairs, draws = loss_and_draws(objective(process), step=5)
    sigma = process.drawn_sigma(pairs.timesteps, draws)
    weight = (sigma**2 + 0.25) / (0.5 * sigma) ** 2
    for warmup, cap in ((0, 500.0), (10, 252.5)):
        found, _, _ = loss_and_draws(objective(process, MomentumObjective, warmup_steps=warmup), step=5)
        assert torch.allclose(found.double(), weight.clamp(max=cap) / weight * plain.double(), rtol=1e-5)
    assert (weight > 252.5).any() and (weight < 252.5).any()
    rising = objective(process, MomentumObjective, warmup_steps=10)
    assert [rising.cap(step) for step in (0, 10, 20)] == [5, 500, 500]
    with pytest.raises(UserError, match="needs a SigmaProcess"):
        MomentumObjective(
            process=NoiseProcess.from_scheduler(SimpleNamespace(betas=torch.full((4,), 0.1), alphas_cumprod=torch.full((4,), 0.5))),
            sampler=None,
            coupling=None,
            weights=None,
        )
