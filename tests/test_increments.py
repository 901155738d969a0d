import math

import pytest
import torch
from diffusers import DDPMScheduler

from immiscible.errors import UserError
from immiscible.increments import ContinuousProcess, ddpm, edm, flow, increments, ve, vp
from immiscible.process import as_process

SCHEDULES = {
    "linear": {},
    "scaled_linear": {},
    "stable_diffusion": {"beta_start": 0.00085, "beta_end": 0.012},
    "squaredcos_cap_v2": {},
}
CONTINUOUS = {"vp": vp(0.1, 19.9), "even": vp(5.0, 0.0), "ve": ve(), "edm": edm(), "flow": flow()}


def schedule(name) -> dict:
    return {"beta_schedule": "scaled_linear" if name == "stable_diffusion" else name, **SCHEDULES[name]}


def alpha_bar_of(name):
    return as_process(DDPMScheduler(**schedule(name))).alpha_bar


def closed_of(name) -> ContinuousProcess:
    return CONTINUOUS[name] if name in CONTINUOUS else ddpm(**schedule(name))


def steps_of(alpha_bar):
    return increments(alpha_bar.sqrt(), (1 - alpha_bar).sqrt())


T = torch.arange(1, 1001, dtype=torch.float64)  # the paper's steps


@pytest.mark.parametrize("name", SCHEDULES)
def test_mean_and_variance_are_theorem_1s(name):
    alpha_bar = alpha_bar_of(name)
    alpha = alpha_bar[1:] / alpha_bar[:-1]
    step = steps_of(alpha_bar)
    torch.testing.assert_close(step.mean, (alpha.sqrt() - 1) * alpha_bar[:-1].sqrt(), rtol=1e-9, atol=1e-15)
    torch.testing.assert_close(step.variance, 2 - alpha_bar[:-1] * (1 + alpha), rtol=1e-9, atol=1e-15)
    chain = (1 - alpha.sqrt()).square() * (1 - alpha_bar[:-1]) + (1 - alpha)
    torch.testing.assert_close(step.chain_variance, chain, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("t, chain_variance, variance", [(500, 0.01008, 1.8436), (998, 0.0201, 1.9999)])
def test_the_papers_variance_is_that_of_independent_noises_and_not_the_chains(t, chain_variance, variance):
    alpha_bar, index = alpha_bar_of("linear"), t - 1
    step = steps_of(alpha_bar)
    assert float(step.variance[index]) == pytest.approx(variance, abs=5e-5)
    assert float(step.chain_variance[index]) == pytest.approx(chain_variance, abs=5e-5)
    n = torch.randn(3, 400_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    (before, after), beta = alpha_bar[index : index + 2], 1 - alpha_bar[index + 1] / alpha_bar[index]
    x0 = 0.7
    now = before.sqrt() * x0 + (1 - before).sqrt() * n[0]
    apart = after.sqrt() * x0 + (1 - after).sqrt() * n[1] - now
    chained = (1 - beta).sqrt() * now + beta.sqrt() * n[2] - now
    for drawn, expected in ((apart, step.variance[index]), (chained, step.chain_variance[index])):
        assert float(drawn.var()) == pytest.approx(float(expected), rel=0.01)  # four deviations of a variance from so many draws
        assert float(drawn.mean()) == pytest.approx(float(step.mean[index]) * x0, abs=5 * math.sqrt(float(expected) / 4e5))


def test_lemma_1_needs_beta_0_and_not_the_first_beta():
    alpha_bar = alpha_bar_of("linear")
    closed = ddpm("linear")
    bound = 1 - closed.increment_variance(T) / 2
    assert (alpha_bar <= bound).all() and float((bound - alpha_bar).max()) < 3.6e-3  # half of the variance's widest gap
    read_wrongly = vp(1e-4, 1.99e-5, last=1000)
    excess = alpha_bar - (1 - read_wrongly.increment_variance(T) / 2)
    assert int((excess > 0).sum()) == 314 and float(excess.max()) == pytest.approx(8.1e-4, abs=1e-5)


@pytest.mark.parametrize("name", ["linear", "scaled_linear", "stable_diffusion"])
def test_bounds_hold_at_every_step(name):
    alpha_bar, closed = alpha_bar_of(name), closed_of(name)
    step, t = steps_of(alpha_bar), T[:-1]
    largest_beta = schedule(name).get("beta_end", 0.02)
    assert (step.variance >= closed.increment_variance(t)).all()
    assert (step.mean.square() <= closed.mean_bound(t, largest_beta)).all()
    if name == "linear":
        assert float((step.variance - closed.increment_variance(t)).max()) == pytest.approx(7.1e-3, abs=5e-5)
    torch.testing.assert_close(
        closed.mean_bound(t, largest_beta), largest_beta * (1 - closed.increment_variance(t) / 2), rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear"])
@pytest.mark.parametrize("steps", [10, 100, 250])
def test_bounds_hold_with_few_steps_too(beta_schedule, steps):
    alpha_bar = as_process(DDPMScheduler(num_train_timesteps=steps, beta_schedule=beta_schedule)).alpha_bar
    assert (alpha_bar <= 1 - ddpm(beta_schedule, steps).increment_variance(T[:steps]) / 2).all()


def test_the_cosine_schedule_is_its_closed_form_up_to_its_cap():
    bound = 1 - ddpm("squaredcos_cap_v2").increment_variance(T[:-1]) / 2
    torch.testing.assert_close(alpha_bar_of("squaredcos_cap_v2")[:-1], bound, rtol=0, atol=5e-7)  # diffusers' betas are fp32


@pytest.mark.parametrize("name", [*CONTINUOUS, *SCHEDULES])
def test_derivatives_are_finite_differences(name):
    closed = closed_of(name)
    times = closed.grid(101)[1:]
    h = 1e-6 * times
    before, at, after = (closed.ingredients(t) for t in (times - h, times, times + h))
    torch.testing.assert_close(at.s_rate, (after.s - before.s) / (2 * h), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(at.variance_rate, (after.variance - before.variance) / (2 * h), rtol=1e-6, atol=1e-12)
    rate = (closed.increment_variance(times + h) - closed.increment_variance(times - h)) / (2 * h)
    torch.testing.assert_close(closed.increment_variance_rate(times), rate, rtol=1e-5, atol=1e-8)


def test_table_1():
    t = torch.tensor([0.25, 0.5], dtype=torch.float64)
    exponent, beta = 0.1 * t + 19.9 * t**2 / 2, 0.1 + 19.9 * t
    expected = {
        "vp": ((-exponent / 2).exp(), exponent.exp() - 1, 2 - 2 * (-exponent).exp(), 2 * beta * (-exponent).exp()),
        "ve": (torch.ones(2), t, 2 * t, torch.full((2,), 2.0)),
        "edm": (torch.ones(2), t**2, 2 * t**2, 4 * t),
        "flow": (1 - t, (t / (1 - t)) ** 2, 2 * t**2, 4 * t),
    }
    for name, (s, sigma_square, variance, rate) in expected.items():
        at = CONTINUOUS[name].ingredients(t)
        found = (at.s, at.variance, CONTINUOUS[name].increment_variance(t), CONTINUOUS[name].increment_variance_rate(t))
        for actual, value in zip(found, (s, sigma_square, variance, rate), strict=True):
            torch.testing.assert_close(actual, value.double(), rtol=1e-12, atol=0, msg=name)


def test_neighbors_of_a_fine_grid_have_the_limits_of_table_1():
    closed = CONTINUOUS["vp"]
    times = closed.grid(10_000)
    at = closed.ingredients(times)
    step = increments(at.s, at.s * at.variance.sqrt())
    torch.testing.assert_close(step.mean * 10_000, at.s_rate[:-1], rtol=0, atol=1e-3)
    torch.testing.assert_close(step.variance, closed.increment_variance(times[:-1]), rtol=0, atol=1e-3)
    torch.testing.assert_close(step.chain_variance * 10_000, 0.1 + 19.9 * times[:-1], rtol=0, atol=2e-2)  # beta(t) dt


# Golden values: tau by r, from closed forms that were checked against the schedules themselves.
@pytest.mark.parametrize(
    "name, peak, taus",
    [
        ("linear", 220.14, {10: 477.05, 20: 544.70, 50: 623.02, 100: 676.30, 200: 725.71, 500: 786.29, 1000: 829.20}),
        ("scaled_linear", 412.1, {100: 852.8}),
        ("stable_diffusion", 314.7, {100: 935.5, 1000: None}),
        ("squaredcos_cap_v2", 496.0, {100: 935.7}),
        ("vp", 0.2191, {10: 0.4761}),
    ],
)
def test_peak_and_tau(name, peak, taus):
    closed = closed_of(name)
    digits = 5e-5 if name == "vp" else 5e-3 if name == "linear" else 0.05
    assert closed.peak == pytest.approx(peak, abs=digits) and not closed.no_areas
    for r, tau in taus.items():
        assert closed.tau(r) == (None if tau is None else pytest.approx(tau, abs=digits))
    rates = closed.increment_variance_rate(closed.grid(10_000))
    assert float(closed.grid(10_000)[rates.argmax()]) == pytest.approx(closed.peak, abs=2e-4 * closed.times[1])
    if name in SCHEDULES:  # the formula is a few steps beside the first step that is there
        process = as_process(DDPMScheduler(**schedule(name)))
        assert process.peak_step() + 1 == pytest.approx(closed.peak, abs=1)
        for r in (10, 100):
            assert closed.tau(r) == pytest.approx(process.convergence_step(r), abs=3)


@pytest.mark.parametrize("name", [*CONTINUOUS, *SCHEDULES])
@pytest.mark.parametrize("sigma_data", [1.0, 0.5])
def test_at_tau_one_in_r_is_left_of_the_signal(name, sigma_data):
    closed = closed_of(name)
    tau = closed.tau(10, sigma_data)
    at = closed.ingredients(torch.tensor(tau, dtype=torch.float64))
    assert 1 / (1 + float(at.variance) / sigma_data**2) == pytest.approx(0.1, rel=1e-9)
    if name in {"vp", *SCHEDULES} and sigma_data == 1:  # theorem 1: 1 - 1/r of the greatest variance
        assert float(closed.increment_variance(torch.tensor(tau, dtype=torch.float64))) == pytest.approx(2 * (1 - 1 / 10), rel=1e-9)


def test_tau_by_equal_snr():
    assert [flow().tau(r) for r in (10, 100, 143.55)] == pytest.approx([0.75, 0.909, 0.923], abs=5e-4)
    assert edm().tau(10, 0.5) == pytest.approx(1.5) and ve().tau(10, 0.5) == pytest.approx(2.25)
    assert edm().tau(1000, 5.0) is None  # sigma 158, beyond 80


@pytest.mark.parametrize("name", ["ve", "edm", "flow"])
def test_where_the_paper_gives_no_areas_there_is_no_peak_but_a_reason(name):
    closed = CONTINUOUS[name]
    rate = closed.increment_variance_rate(closed.grid(100))
    assert (rate.diff() >= 0).all()  # nothing ever decelerates
    assert closed.peak is None and "variance grows" in closed.no_areas


def test_even_betas_change_most_at_the_start():
    even = ddpm("scaled_linear", 1000, 0.01, 0.01)
    assert even.peak == 0 and even.tau(10) == pytest.approx(math.log(10) / 0.01)
    assert float(even.increment_variance_rate(even.grid(100)).argmax()) == 0


def test_wrong_values_are_refused():
    for r in (1.0, 0.5, math.nan, math.inf):
        with pytest.raises(UserError, match="`r`"):
            edm().tau(r)
    for sigma_data in (0.0, -1.0, math.nan):
        with pytest.raises(UserError, match="`sigma_data`"):
            edm().tau(10, sigma_data)
    assert ddpm("quadratic").peak == ddpm("scaled_linear").peak
    with pytest.raises(UserError, match="'sigmoid' has no closed form; known: linear"):
        ddpm("sigmoid")
