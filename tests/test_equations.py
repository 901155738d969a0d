"""Every timestep law and every loss weighting, recomputed from its equation in float64 by numpy and scipy.

The tables of equations must name all there are: a new entry needs its equation here. Beside them, what the literature says of the laws:
where they push their mass, and diffusers' own code where it has any.
"""

import math

import numpy
import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3, compute_snr
from scipy import stats
from scipy.optimize import brentq

from immiscible.errors import UserError
from immiscible.process import PREDICTION_TYPES
from immiscible.timesteps import TIMESTEP_SAMPLINGS, timestep_sampler
from immiscible.weighting import LOSS_WEIGHTINGS, loss_weights

T = 1000
AT = [0, 50, 100, 200, 300, 500, 700, 998]
SCHEDULERS = {
    "linear": DDPMScheduler(),
    "quadratic": DDPMScheduler(beta_schedule="scaled_linear"),
    "flow": FlowMatchEulerDiscreteScheduler(),
}
LONG = 10**9  # an optimizer step after any curriculum


class Levels:
    """A process of T levels in float64, and what the equations are of."""

    def __init__(self, name):
        if name == "flow":
            sigma = SCHEDULERS[name].sigmas.double().numpy()[::-1]
            self.ratio = ((1 - sigma) / sigma) ** 2
        else:
            alpha_bar = numpy.cumprod(1 - SCHEDULERS[name].betas.double().numpy())
            self.ratio = alpha_bar / (1 - alpha_bar)
        self.share = 1 / (1 + self.ratio)  # 1 - alpha_bar
        self.time = 1 / (1 + numpy.sqrt(self.ratio))
        middle = (self.time[1:] + self.time[:-1]) / 2
        self.edges = numpy.clip([2 * self.time[0] - middle[0], *middle, 2 * self.time[-1] - middle[-1]], 0, 1)

    def cut(self, cdf, edges=None):
        """The law of a distribution function between the edges of the levels."""
        values = numpy.array([cdf(edge) for edge in (self.edges if edges is None else edges)])
        return numpy.diff(values) / (values[-1] - values[0])


def log_sigma(time):
    return numpy.log(time) - numpy.log1p(-time) if 0 < time < 1 else -math.inf if time == 0 else math.inf


def boosted(levels, tau):
    return numpy.where(numpy.arange(T) < tau, 5, 1) / (T + 4 * tau)


def mode_cdf(time, scale=1.29):
    return 1 - brentq(lambda u: 1 - u - scale * (math.cos(math.pi * u / 2) ** 2 - 1 + u) - time, 0, 1, xtol=1e-15)


def released_log_normal(levels):
    n = numpy.sqrt(levels.share[levels.share < 1])
    masses = n / (1 - n) * stats.norm.pdf(numpy.log(n / (1 - n))) / (n * (1 - n))
    return numpy.pad(masses, (0, T - len(n))) / masses.sum()


def curriculum(levels, step, ramp=50_000):
    normal, g = stats.norm.pdf(numpy.arange(1, T + 1), 0.3 * T, T), min(step / ramp, 1)
    return (1 - g) / T + g * normal / normal.sum()


LAWS = {  # of levels and an optimizer step
    "uniform": lambda levels, step: numpy.full(T, 1 / T),
    "asymmetric": lambda levels, step: boosted(levels, 1 + numpy.argmax(levels.share >= 1 - 1 / 143.55)),
    "asymmetric_released": lambda levels, step: boosted(levels, 700),
    "logit_normal": lambda levels, step: levels.cut(lambda time: stats.norm.cdf(log_sigma(time))),
    "edm_log_normal": lambda levels, step: levels.cut(lambda time: stats.norm.cdf(log_sigma(time), -1.2, 1.2)),
    "mode": lambda levels, step: levels.cut(mode_cdf),
    "sd3_logit_normal": lambda levels, step: levels.cut(lambda place: stats.norm.cdf(log_sigma(place)), numpy.arange(T + 1) / T)[::-1],
    "sd3_mode": lambda levels, step: levels.cut(mode_cdf, numpy.arange(T + 1) / T)[::-1],
    "laplace": lambda levels, step: levels.cut(lambda time: stats.laplace.sf(-2 * log_sigma(time), 0, 0.5)),
    "beta": lambda levels, step: levels.cut(stats.beta(0.8, 1).cdf, numpy.arange(T + 1) / T),
    "log_normal_released": lambda levels, step: released_log_normal(levels),
    "clts": curriculum,
    "loss_second_moment": lambda levels, step: numpy.full(T, 1 / T),  # before it has losses: tests/test_samplers.py
}


def change_aware(levels):
    rate = numpy.gradient(levels.share)
    least, most = max(0, rate.min()), min(1, rate.max())
    return 0.4 + 0.2 * (rate - least) / (most - least)


WEIGHTS = {  # on the noise's error, as the papers have them or after SNR x (image's error), 1 / (1 - s)^2 x (velocity's)
    "change_aware": change_aware,
    "change_aware_released": lambda levels: numpy.where(numpy.arange(T) < 700, change_aware(levels), 1),
    "min_snr": lambda levels: numpy.minimum(levels.ratio, 5) / levels.ratio,
    "snr": lambda levels: numpy.ones(T),
    "p2": lambda levels: 1 / (1 + levels.ratio),
    "velocity": lambda levels: numpy.minimum(1 / (1 - levels.share), 10),
    "soft_min_snr": lambda levels: 1 / (1 / levels.ratio + 1 / 4) / levels.ratio,
    "min_snr_released": lambda levels: 5 / (1 + levels.ratio),
    "debiased": lambda levels: 1 / numpy.sqrt(levels.ratio),
    "cosmap": lambda levels: 2 / (math.pi * (1 - 2 * levels.time + 2 * levels.time**2)) / (1 - levels.time) ** 2,
    "cosmap_image": lambda levels: 2 / (math.pi * (1 - 2 * levels.time + 2 * levels.time**2)) / levels.ratio,
    "sigma_sqrt": lambda levels: 1 / (levels.time * (1 - levels.time)) ** 2,
    "image": lambda levels: 1 / levels.ratio,
    "edm": lambda levels: (1 / levels.ratio + 0.5**2) / (1 / levels.ratio * 0.5**2) / levels.ratio,
}
ERRORS = {  # what an error of one is as one of the noise
    "epsilon": lambda levels: 1,
    "sample": lambda levels: levels.ratio,
    "v_prediction": lambda levels: levels.ratio / (levels.ratio + 1),
    "flow_prediction": lambda levels: (1 - levels.time) ** 2,
}


def test_every_law_and_weighting_has_an_equation():
    assert LAWS.keys() == TIMESTEP_SAMPLINGS.keys()
    assert {"none", *WEIGHTS} == LOSS_WEIGHTINGS.keys()


@pytest.mark.parametrize("which", SCHEDULERS)
@pytest.mark.parametrize("name", TIMESTEP_SAMPLINGS)
def test_laws_are_their_equations(name, which):
    if name.startswith("asymmetric") and which == "quadratic":
        pytest.skip("the same code: SpeeD's own goldens on this schedule are in test_timesteps.py")
    for step in (0, 1, 12_500, 50_000, 50_001, LONG):
        found = timestep_sampler(name, SCHEDULERS[which]).at(step).probabilities.numpy()
        expected = LAWS[name](Levels(which), step)
        assert found.sum() == pytest.approx(1, abs=1e-12) and (found >= 0).all()
        assert found[AT] == pytest.approx(expected[AT], rel=1e-6, abs=1e-15)
        assert found == pytest.approx(expected, abs=1e-9)
        if name != "clts":
            break


@pytest.mark.parametrize("which, prediction_type", [("linear", name) for name in PREDICTION_TYPES["ddpm"]] + [("flow", "flow_prediction")])
@pytest.mark.parametrize("name", LOSS_WEIGHTINGS)
def test_weights_are_their_equations(name, which, prediction_type):
    found = loss_weights(name, SCHEDULERS[which], prediction_type).vector.numpy()
    assert (found >= 0).all()
    levels = Levels(which)
    with numpy.errstate(all="ignore"):  # at a flow's last step, which has no signal: its limits are below
        expected = numpy.ones(T) if name == "none" else WEIGHTS[name](levels) * ERRORS[prediction_type](levels)
    in_fp32 = (name, prediction_type) == ("snr", "sample")  # diffusers' own rounding: 1 - alpha_bar is 1e-4 at first
    assert found[AT] == pytest.approx(expected[AT], rel=1e-3 if in_fp32 else 1e-6, abs=1e-12)


# The literature and diffusers


@pytest.mark.parametrize(
    "name, options, mean",
    [("edm_log_normal", {}, 133.4), ("edm_log_normal", {"edm_sigma_data": 1.0}, 213.8), ("log_normal_released", {}, 332.2)],
)
def test_log_normals_push_forward_to_their_means_on_the_linear_schedule(name, options, mean):
    p = timestep_sampler(name, DDPMScheduler(), **options).probabilities.numpy()
    assert p @ numpy.arange(T) == pytest.approx(mean, abs=0.1)
    if name == "edm_log_normal":  # by drawing sigmas; those that the schedule does not reach are not drawn
        levels = Levels("linear")
        drawn = numpy.exp(numpy.random.default_rng(0).normal(-1.2, 1.2, 200_000)) * options.get("edm_sigma_data", 0.5) / 0.5
        times = drawn / (1 + drawn)
        kept = times[(times > levels.edges[0]) & (times < levels.edges[-1])]
        assert (numpy.searchsorted(levels.edges, kept) - 1).mean() == pytest.approx(mean, abs=1.5)  # four standard errors
    else:
        assert p[700:].sum() == pytest.approx(5.37e-5, rel=1e-3)


def test_edms_law_of_a_flow_is_normal_in_log_sigma():
    p = timestep_sampler("edm_log_normal", SCHEDULERS["flow"]).probabilities.numpy()[:-1]
    s = numpy.arange(1, T) / T
    of_log_sigma = numpy.log(s / (1 - s))
    mean = p @ of_log_sigma / p.sum()
    assert mean == pytest.approx(-1.2, abs=2e-3)
    assert math.sqrt(p @ (of_log_sigma - mean) ** 2 / p.sum()) == pytest.approx(1.2, abs=5e-3)


@pytest.mark.parametrize("name, scheme, options", [("mode", "mode", {"mode_scale": 1.29}), ("logit_normal", "logit_normal", {})])
def test_sd3s_laws_are_diffusers_draws(name, scheme, options):
    draws = compute_density_for_timestep_sampling(
        scheme, 50_000, logit_mean=0.0, logit_std=1.0, generator=torch.Generator().manual_seed(0), **options
    )
    p = timestep_sampler(name, SCHEDULERS["flow"], **options).probabilities.numpy()
    edges = Levels("flow").edges
    found = stats.kstest(draws.double().numpy(), lambda u: numpy.interp(u, edges, numpy.cumsum([0, *p])))
    assert found.pvalue > 0.01
    uniform = stats.kstest(draws.double().numpy(), "uniform")
    assert uniform.pvalue < 1e-6


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("scheme, options", [("logit_normal", {"logit_mean": -0.5, "logit_std": 0.8}), ("mode", {"mode_scale": 0.81})])
def test_sd3s_places_are_those_of_diffusers_scripts(scheme, options, shift):
    """An index is the whole part of T times their draw, in the scheduler's own order, from most to least noise."""
    filled = {"logit_mean": 0.0, "logit_std": 1.0, "mode_scale": 1.29, **options}
    draws = compute_density_for_timestep_sampling(scheme, 50_000, generator=torch.Generator().manual_seed(0), **filled)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    sampler = timestep_sampler(f"sd3_{scheme}", scheduler, **options)
    counts = torch.bincount((draws * T).long(), minlength=T).flip(0)  # of ours, from least to most
    expected = 50_000 * sampler.probabilities
    groups = [part.sum() for part in counts.double().split(20)], [part.sum() for part in expected.split(20)]
    found, wanted = (torch.stack(group).numpy() for group in groups)
    kept = wanted > 5
    assert stats.chisquare(found[kept], wanted[kept] * found[kept].sum() / wanted[kept].sum()).pvalue > 0.01
    levels = sampler.levels(64, generator=torch.Generator().manual_seed(1))
    assert torch.equal(levels.time, scheduler.timesteps[levels.index]) and torch.equal(levels.sigma, scheduler.sigmas[levels.index])


def test_cosmap_is_diffusers_weight():
    sigmas = SCHEDULERS["flow"].sigmas.flip(0)
    expected = compute_loss_weighting_for_sd3("cosmap", sigmas=sigmas)
    torch.testing.assert_close(loss_weights("cosmap", SCHEDULERS["flow"], "flow_prediction").vector.float(), expected)


def test_min_snr_is_diffusers_weight():
    """As train_text_to_image.py has it, for epsilon and for velocity."""
    scheduler, t = SCHEDULERS["linear"], torch.arange(T)
    ratio = compute_snr(scheduler, t)
    capped = torch.stack([ratio, 5.0 * torch.ones_like(t)], dim=1).min(dim=1)[0]
    for prediction_type, expected in (("epsilon", capped / ratio), ("v_prediction", capped / (ratio + 1)), ("sample", capped)):
        found = loss_weights("min_snr", scheduler, prediction_type, snr_gamma=5.0).vector.float()
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=0)  # compute_snr is of fp32 products


def test_soft_min_snr_is_k_diffusions():
    """``(sigma d)^2 / (sigma^2 + d^2)^2`` on a preconditioned network's error, which is v-prediction's where d is 1; gamma is 1 / d^2."""
    sigma = Levels("linear").ratio ** -0.5
    found = loss_weights("soft_min_snr", SCHEDULERS["linear"], "v_prediction", snr_gamma=1.0).vector.numpy()
    assert found == pytest.approx(sigma**2 / (sigma**2 + 1) ** 2, rel=1e-6)


@pytest.mark.parametrize(
    "name, limit",
    [("debiased", 0.0), ("cosmap", 2 / math.pi), ("cosmap_image", 2 / math.pi), ("sigma_sqrt", 1.0), ("image", 1.0), ("edm", 4.0)],
)
def test_weights_that_grow_without_end_have_a_limit_where_no_signal_is_left(name, limit):
    ending = DDPMScheduler(rescale_betas_zero_snr=True)
    with pytest.raises(UserError, match=rf"loss_weights\('{name}'\) is infinite under `prediction_type` epsilon"):
        loss_weights(name, ending, "epsilon")
    for scheduler, prediction_type in ((ending, "sample"), (ending, "v_prediction"), (SCHEDULERS["flow"], "flow_prediction")):
        assert float(loss_weights(name, scheduler, prediction_type).vector[-1]) == pytest.approx(limit, rel=1e-12)


def test_debiased_takes_a_cap():
    weights = loss_weights("debiased", SCHEDULERS["linear"], "epsilon", debiased_cap=1000.0).vector
    free = loss_weights("debiased", SCHEDULERS["linear"], "epsilon").vector
    assert float(weights.min()) == pytest.approx(1000**-0.5) and float(free.min()) < 0.011
    assert torch.equal(weights[free > 0.032], free[free > 0.032])


# The resolution shift


def shifted_time(time, m):
    return m * time / (1 + (m - 1) * time)


@pytest.mark.parametrize("m", [3.0, 0.5])
def test_a_shifted_law_is_pushed_forward_in_flow_time(m):
    """By drawing: the law of uniform draws within the level's bin, each moved by the map."""
    levels = Levels("linear")
    p = timestep_sampler("edm_log_normal", SCHEDULERS["linear"]).probabilities.numpy()
    rng = numpy.random.default_rng(1)
    bins = rng.choice(T, 100_000, p=p)
    times = shifted_time(levels.edges[bins] + rng.random(100_000) * numpy.diff(levels.edges)[bins], m)
    kept = times[(times > levels.edges[0]) & (times < levels.edges[-1])]
    found = timestep_sampler("edm_log_normal", SCHEDULERS["linear"], timestep_shift=m).probabilities.numpy()
    assert stats.kstest(kept, lambda s: numpy.interp(s, levels.edges, numpy.cumsum([0, *found]))).pvalue > 0.01


def test_shifts_of_a_flow_are_sd3s():
    """A logit-normal's mean grows by ln m; of uniform times the mass up to s is that up to ``s / (m - (m - 1) s)``."""
    shifted = timestep_sampler("logit_normal", SCHEDULERS["flow"], timestep_shift=3.0).probabilities
    moved = timestep_sampler("logit_normal", SCHEDULERS["flow"], logit_mean=math.log(3)).probabilities
    torch.testing.assert_close(shifted, moved, rtol=0, atol=1e-6)
    levels = Levels("flow")
    uniform = timestep_sampler("uniform", SCHEDULERS["flow"], timestep_shift=3.0).probabilities.numpy()
    before = levels.edges / (3 - 2 * levels.edges)
    inside = slice(2, T - 2)  # the bins at the ends are half as wide as the others
    assert uniform[inside] == pytest.approx(numpy.diff(before)[inside], rel=5e-5)  # sigmas in fp32 are not quite even
    same = timestep_sampler("uniform", SCHEDULERS["flow"], timestep_shift=1.0)
    assert torch.equal(same.probabilities, timestep_sampler("uniform", SCHEDULERS["flow"]).probabilities)


@pytest.mark.parametrize("name", ["asymmetric_released", "loss_second_moment"])
def test_laws_that_cannot_be_shifted(name):
    with pytest.raises(UserError, match="`timestep_shift`"):
        timestep_sampler(name, SCHEDULERS["linear"], timestep_shift=2.0)


def test_the_curriculum_is_shifted_at_both_ends():
    plain, moved = (timestep_sampler("clts", SCHEDULERS["flow"], timestep_shift=m) for m in (1.0, 3.0))
    index = torch.arange(T).double()
    for step in (0, 50_000):
        assert float(moved.at(step).probabilities @ index) > float(plain.at(step).probabilities @ index) + 100
