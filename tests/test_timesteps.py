import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

from immiscible import timesteps
from immiscible.errors import UserError
from immiscible.process import as_process
from immiscible.schedulers import build_scheduler
from immiscible.timesteps import TIMESTEP_SAMPLINGS, TimestepSampler, threshold, timestep_sampler

PROCESS = as_process(DDPMScheduler())
SCHEDULES = {
    "linear": {},
    "stable_diffusion": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "quad": {"beta_schedule": "scaled_linear"},
}


def law(name, **options) -> TimestepSampler:
    return timestep_sampler(name, PROCESS, **options)


def histogram(t, steps=1000):
    return torch.bincount(t, minlength=steps)


@pytest.mark.parametrize("name", list(TIMESTEP_SAMPLINGS))
@pytest.mark.parametrize("scheduler", [DDPMScheduler(), DDPMScheduler(rescale_betas_zero_snr=True), FlowMatchEulerDiscreteScheduler()])
def test_laws_are_distributions_on_every_process(name, scheduler):
    sampler = timestep_sampler(name, scheduler)
    for p in (sampler.probabilities, sampler.marginal(), sampler.marginal(5)):
        assert p.dtype == torch.float64 and p.shape == (1000,) and (p >= 0).all()
        assert float(p.sum()) == pytest.approx(1, abs=1e-12)
    t = sampler(64, generator=torch.Generator().manual_seed(0))
    assert t.dtype == torch.int64 and t.shape == (64,) and t.min() >= 0 and t.max() < 1000 and len(t.unique()) > 30


def test_uniform():
    assert torch.equal(law("uniform").probabilities, torch.full((1000,), 1 / 1000, dtype=torch.float64))
    assert law("uniform").moved_share() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    "k, before, after, beyond",
    [
        (1, 1e-3, 1e-3, 0.3),
        (5, 1.315789e-3, 2.631579e-4, 0.078947),
        (10, 1.369863e-3, 1.369863e-4, 0.041096),
        (25, 1.404494e-3, 5.617978e-5, 0.016854),
    ],
)
def test_asymmetric_golden_values(k, before, after, beyond):
    p = law("asymmetric", asymmetric_k=k).probabilities  # r = 143.55 is tau = 700 on this schedule
    assert p[:700].numpy() == pytest.approx(before, rel=1e-6)
    assert p[700:].numpy() == pytest.approx(after, rel=1e-6)
    assert float(p[700:].sum()) == pytest.approx(beyond, abs=1e-6)
    assert law("asymmetric", asymmetric_k=k).moved_share() == pytest.approx(0.3 - beyond, abs=1e-6)


def test_asymmetric_takes_tau_or_r():
    by_r, by_tau = law("asymmetric", asymmetric_r=10), law("asymmetric", asymmetric_tau=476)
    assert torch.equal(by_r.probabilities, by_tau.probabilities)
    assert float(by_r.probabilities[475] / by_r.probabilities[476]) == pytest.approx(5)
    assert law("asymmetric", asymmetric_tau=1000).moved_share() == pytest.approx(0, abs=1e-12)
    assert threshold(PROCESS) == 700 and threshold(PROCESS, 10.0) == 476 and threshold(PROCESS, None, 3) == 3


def test_released_golden_values_on_the_linear_schedule():
    sampler = law("asymmetric_released")
    expected = torch.cat([torch.full((n,), units) for n, units in ((1, 10.0), (57, 15.0), (300, 11.0), (285, 10.0), (57, 5.0), (300, 1.0))])
    torch.testing.assert_close(sampler.marginal() * 7600, expected.double(), atol=1e-6, rtol=0)
    assert torch.equal(sampler.probabilities, law("asymmetric", asymmetric_tau=700).probabilities)


@pytest.mark.parametrize(
    "schedule, reflect_at, beyond, measured_at_32",
    [
        ("linear", 642, 0.0395, 0.0419),
        ("stable_diffusion", 866, 0.149, 0.1453),
        ("cosine", 959, 0.2105, 0.2023),
        ("quad", 829, 0.125, 0.1223),
    ],
)
def test_released_golden_values_on_every_schedule(schedule, reflect_at, beyond, measured_at_32):
    sampler = timestep_sampler("asymmetric_released", DDPMScheduler(**SCHEDULES[schedule]))
    assert sampler.reflect_at == reflect_at
    assert float(sampler.marginal()[700:].sum()) == pytest.approx(beyond, abs=5e-4)
    # a Monte-Carlo estimate from the released code, not an exact value
    assert float(sampler.marginal(32)[700:].sum()) == pytest.approx(measured_at_32, abs=5e-4)


@pytest.mark.parametrize("n", [1, 2, 3, 8, 33])
def test_marginal_is_what_batches_of_n_draw(n):
    sampler = TimestepSampler(torch.tensor([0.3, 0.1, 0.0, 0.2, 0.4], dtype=torch.float64), reflect_at=3)
    generator = torch.Generator().manual_seed(n)
    batches = 20_000 // n
    counts = histogram(torch.cat([sampler(n, generator=generator) for _ in range(batches)]), 5).double() / (batches * n)
    # rows of a batch depend on each other in pairs at most: 5 deviations of twice the variance of independent draws
    allowed = 5 * (2 * 0.25 / (batches * n)) ** 0.5
    torch.testing.assert_close(counts, sampler.marginal(n), atol=allowed, rtol=0)
    p = sampler.probabilities
    reflected = torch.stack([p[3], p[2] + p[4], p[1], p[0], torch.tensor(0.0)])
    direct_share = {1: 1, 2: 1, 3: 2 / 3, 8: 5 / 8, 33: 17 / 33}[n]
    torch.testing.assert_close(sampler.marginal(n), direct_share * p + (1 - direct_share) * reflected)


def test_reflected_rows_follow_the_direct_ones():
    sampler = law("asymmetric_released")
    t = sampler(9, generator=torch.Generator().manual_seed(3))
    direct = t[:5]
    assert torch.equal(t[5:], torch.where(direct < 642, 642 - direct, direct - 642)[:4])
    assert sampler(0).shape == (0,)


def test_inverse_cdf_on_stratified_uniforms():
    """p = (a multiple of 1/8): eight uniforms, one in each eighth, hit each step exactly as often as its probability says."""
    p = torch.tensor([0, 1, 0, 4, 2, 0, 1, 0], dtype=torch.float64) / 8
    sampler = TimestepSampler(p)
    for inside in (0.0, 0.5, 1 - 1e-9):
        t = sampler.from_uniforms((torch.arange(8, dtype=torch.float64) + inside) / 8)
        assert t.tolist() == [1, 3, 3, 3, 3, 4, 4, 6]


def test_inverse_cdf_of_a_law_follows_its_probabilities():
    n = 380_000  # 3800 units of probability, 100 uniforms each
    t = law("asymmetric").from_uniforms((torch.arange(n, dtype=torch.float64) + 0.5) / n)
    assert torch.equal(histogram(t), torch.tensor([500] * 700 + [100] * 300))


def test_steps_of_probability_zero_are_never_drawn():
    p = torch.tensor([0.0, *[0.1] * 5, 0.0, *[0.1] * 5, 0.0], dtype=torch.float64)
    assert p.cumsum(0)[-1] <= 1 - 2**-53  # a running sum that ends below 1
    t = TimestepSampler(p).from_uniforms(torch.tensor([0.0, 1 - 2**-53, 1.0], dtype=torch.float64))
    assert t.tolist() == [1, 11, 11]
    everywhere = TimestepSampler(p).from_uniforms(torch.arange(10_000, dtype=torch.float64) / 10_000)
    assert sorted(set(everywhere.tolist())) == [1, 2, 3, 4, 5, 7, 8, 9, 10, 11]


def test_draws_are_those_of_the_generator():
    sampler = law("logit_normal")
    first, second = (sampler(100, generator=torch.Generator().manual_seed(5)) for _ in range(2))
    uniforms = torch.rand(100, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    assert torch.equal(first, second) and torch.equal(first, sampler.from_uniforms(uniforms))
    torch.manual_seed(5)
    assert torch.equal(sampler(100), first)
    assert sampler(3, device="meta").device.type == "meta"


def test_logit_normal_golden_values():
    p = law("logit_normal").probabilities
    assert float((p * torch.arange(1000)).sum()) == pytest.approx(279, abs=0.5)
    assert float(p[700:].sum()) < 0.01
    assert p.argmax() < 300


@pytest.mark.parametrize("mean, std", [(0.0, 1.0), (0.5, 0.6)])
def test_logit_normal_on_flow_is_sd3s_density(mean, std):
    p = timestep_sampler("logit_normal", FlowMatchEulerDiscreteScheduler(), logit_mean=mean, logit_std=std).probabilities
    s = (torch.arange(1, 1000).double()) / 1000
    density = torch.exp(-0.5 * ((s.logit() - mean) / std) ** 2) / (std * (2 * torch.pi) ** 0.5 * s * (1 - s))
    torch.testing.assert_close(p[20:980] * 1000, density[20:980], rtol=1e-3, atol=1e-4)
    draws = torch.sigmoid(mean + std * torch.randn(200_000, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))
    assert float((p * torch.arange(1, 1001)).sum() / 1000) == pytest.approx(float(draws.mean()), abs=3e-3)


def test_logit_normal_does_not_pile_up_where_the_schedule_ends():
    p = timestep_sampler("logit_normal", build_scheduler("ddpm", num_train_timesteps=100)).probabilities
    assert float(p[-1]) < 2 * float(p[-2])
    alone = timestep_sampler("logit_normal", build_scheduler("ddpm", num_train_timesteps=1))
    assert alone.probabilities.tolist() == [1.0]


@pytest.mark.parametrize(
    "name, options, named",
    [
        ("asymetric", {}, r"timestep_sampler\('asymetric'\) is unknown; known: uniform, asymmetric, asymmetric_released, logit_normal"),
        ("asymmetric", {"asymmetric_k": 0.5}, "`asymmetric_k`"),
        ("asymmetric", {"asymmetric_k": float("nan")}, "`asymmetric_k`"),
        ("asymmetric", {"asymmetric_r": 1.0}, "`asymmetric_r`"),
        ("asymmetric", {"asymmetric_r": 1e9}, "`asymmetric_r`"),
        ("asymmetric", {"asymmetric_tau": 0}, "`asymmetric_tau`"),
        ("asymmetric", {"asymmetric_tau": 1001}, "`asymmetric_tau`"),
        ("asymmetric", {"asymmetric_tau": 700, "asymmetric_r": 10.0}, "`asymmetric_tau` and `asymmetric_r`"),
        ("asymmetric_released", {"asymmetric_r": 10.0}, "has no option asymmetric_r; its options are asymmetric_k, asymmetric_tau"),
        ("asymmetric_released", {"asymmetric_k": 0.0}, "`asymmetric_k`"),
        ("asymmetric_released", {"asymmetric_tau": 1001}, "`asymmetric_tau`"),
        ("logit_normal", {"logit_std": 0.0}, "`logit_std`"),
        ("logit_normal", {"logit_mean": float("inf")}, "`logit_mean`"),
        ("logit_normal", {"logit_mean": -100.0}, "`logit_mean`"),
        ("edm_log_normal", {"edm_mean": float("nan")}, "`edm_mean`"),
        ("edm_log_normal", {"edm_std": 0.0}, "`edm_std`"),
        ("edm_log_normal", {"edm_sigma_data": 0.0}, "`edm_sigma_data`"),
        ("mode", {"mode_scale": 1.76}, "`mode_scale` 1.76 is out of range: it must be from -1 to 1.752"),
        ("mode", {"mode_scale": -1.1}, "`mode_scale`"),
        ("laplace", {"laplace_scale": 0.0}, "`laplace_scale`"),
        ("laplace", {"laplace_mean": 1e9}, "`laplace_mean` 1e\\+09 with `laplace_scale` 0.5 is off"),
        ("beta", {"beta_a": 0.0}, "`beta_a`"),
        ("beta", {"beta_b": -1.0}, "`beta_b`"),
        ("clts", {"clts_std": 0.0}, "`clts_std`"),
        ("clts", {"clts_mean": 100.0}, "`clts_mean` 100 with `clts_std` 1 is off"),
        ("clts", {"clts_ramp_steps": 0}, "`clts_ramp_steps`"),
        ("uniform", {"timestep_shift": 0.0}, "`timestep_shift`"),
    ],
)
def test_wrong_options_are_refused(name, options, named):
    with pytest.raises(UserError, match=named):
        law(name, **options)


def test_released_needs_a_schedule_that_it_fits():
    short = build_scheduler("ddpm", num_train_timesteps=100)
    with pytest.raises(UserError, match="`asymmetric_tau`"):
        timestep_sampler("asymmetric_released", short)
    for steps in (1, 100):  # 100 linear steps to beta 0.02 never flatten out
        with pytest.raises(UserError, match=r"use timestep_sampler\('asymmetric'\)"):
            timestep_sampler("asymmetric_released", build_scheduler("ddpm", num_train_timesteps=steps), asymmetric_tau=1)


@pytest.mark.parametrize(
    "probabilities, reflect_at",
    [
        (torch.tensor([0.5, 0.5]), None),
        (torch.tensor([[0.5, 0.5]], dtype=torch.float64), None),
        (torch.tensor([], dtype=torch.float64), None),
        (torch.tensor([0.5, 0.6], dtype=torch.float64), None),
        (torch.tensor([1.5, -0.5], dtype=torch.float64), None),
        (torch.tensor([float("nan"), 1.0], dtype=torch.float64), None),
        (torch.tensor([0.5, 0.5], dtype=torch.float64), 2),
        (torch.tensor([0.5, 0.5], dtype=torch.float64), 0),
    ],
)
def test_wrong_samplers_are_refused(probabilities, reflect_at):
    with pytest.raises(UserError):
        TimestepSampler(probabilities, reflect_at)


def test_a_new_law_is_one_function_and_one_entry(monkeypatch):
    def late(process, *, late_share=0.5):
        p = torch.zeros_like(process.alpha_bar)
        p[-1], p[0] = late_share, 1 - late_share
        return TimestepSampler(p)

    monkeypatch.setitem(timesteps.TIMESTEP_SAMPLINGS, "late", late)
    sampler = timestep_sampler("late", DDPMScheduler(), late_share=0.25)
    assert float(sampler.probabilities[-1]) == 0.25
    assert sampler.moved_share() == pytest.approx(0.998)
