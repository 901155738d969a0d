import numpy
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    PNDMScheduler,
)
from diffusers.training_utils import compute_snr

from immiscible.errors import UserError
from immiscible.process import BETA_SCHEDULES, PREDICTION_TYPES, NoiseProcess, as_process, check_prediction_type
from immiscible.schedulers import build_scheduler

LINEAR = {}
STABLE_DIFFUSION = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
COSINE = {"beta_schedule": "squaredcos_cap_v2"}
QUAD = {"beta_schedule": "scaled_linear"}
ALL_TYPES = [(kind, name) for kind, names in PREDICTION_TYPES.items() for name in names]


def ddpm(**schedule) -> NoiseProcess:
    return NoiseProcess.from_scheduler(DDPMScheduler(**schedule))


def process_of(kind: str) -> NoiseProcess:
    return as_process(build_scheduler(kind))


def batch(dtype=torch.float32, n=1000):
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, n, 3, 2, 2, generator=generator).to(dtype)
    return x0, noise, torch.arange(n)


# Golden values: T = 1000, tau in the paper's 1-based count.
@pytest.mark.parametrize(
    "schedule, taus",
    [
        (LINEAR, {10: 476, 20: 543, 50: 621, 100: 674, 143.55: 700, 200: 724, 500: 784, 1000: 826}),
        (STABLE_DIFFUSION, {10: 675, 100: 934, 143.55: 966}),
        (COSINE, {10: 794, 100: 936, 143.55: 947, 1000: 980}),
        (QUAD, {10: 661, 100: 851, 143.55: 875, 1000: 985}),
    ],
)
def test_convergence_step_is_the_papers_tau(schedule, taus):
    process = ddpm(**schedule)
    assert {r: process.convergence_step(r) for r in taus} == taus
    for r, tau in taus.items():  # the count tau means that index tau - 1 is the first one there
        assert process.alpha_bar[tau - 1] <= 1 / r < process.alpha_bar[tau - 2]


def test_convergence_step_of_flow_is_where_equal_snr_puts_it():
    # s = sqrt(r-1) / (1 + sqrt(r-1)), rounded up to a step of 1/1000
    process = process_of("flow")
    assert [process.convergence_step(r) for r in (10, 100, 143.55)] == [750, 909, 923]


@pytest.mark.parametrize(
    "schedule, peak, most, least",
    [
        (LINEAR, 219, 2.711611e-3, 8.236387e-7),
        (STABLE_DIFFUSION, 313, 1.684124e-3, 5.660039e-5),
        (COSINE, 495, 1.558569e-3, 2.426338e-6),
        (QUAD, 411, 2.115936e-3, 1.496760e-5),
    ],
)
def test_change_rate(schedule, peak, most, least):
    process = ddpm(**schedule)
    rate = process.change_rate()
    numpy.testing.assert_allclose(rate.numpy(), numpy.gradient(1 - process.alpha_bar.numpy()), rtol=1e-9, atol=1e-16)
    assert rate.dtype == torch.float64
    assert process.peak_step() == peak == int(rate.argmax())
    assert float(rate[peak]) == pytest.approx(most, rel=1e-6, abs=1e-9)
    assert int(rate.argmin()) == 999
    assert float(rate[-1]) == pytest.approx(least, rel=1e-5)


def test_areas_tile_the_steps():
    process = ddpm()
    assert process.areas(700) == ((0, 219), (219, 700), (700, 1000))
    assert process.areas(1000) == ((0, 219), (219, 1000), (1000, 1000))
    assert process.areas(100) == ((0, 100), (100, 100), (100, 1000))


@pytest.mark.parametrize("schedule", [LINEAR, STABLE_DIFFUSION, COSINE, QUAD, {"rescale_betas_zero_snr": True}])
def test_ddpm_is_bit_equal_to_diffusers(schedule):
    scheduler = DDPMScheduler(**schedule)
    process = NoiseProcess.from_scheduler(scheduler)
    x0, noise, t = batch()
    assert torch.equal(process.add_noise(x0, noise, t), scheduler.add_noise(x0, noise, t))
    assert torch.equal(process.target(x0, noise, t, "v_prediction"), scheduler.get_velocity(x0, noise, t))
    assert torch.equal((process.signal / process.noise) ** 2, compute_snr(scheduler, t))
    assert torch.equal(process.diffusers_snr, scheduler.alphas_cumprod / (1 - scheduler.alphas_cumprod))
    assert torch.equal(process.model_time, t) and process.model_time.dtype == torch.int64
    torch.testing.assert_close(process.alpha_bar, scheduler.alphas_cumprod.double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(process.snr, process.alpha_bar / (1 - process.alpha_bar), rtol=1e-12, atol=0)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_is_bit_equal_to_diffusers(shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    process = NoiseProcess.from_scheduler(scheduler)
    x0, noise, t = batch()
    assert torch.equal(process.add_noise(x0, noise, t), scheduler.scale_noise(x0, process.model_time, noise))
    assert torch.equal(process.model_time, scheduler.timesteps.flip(0))
    assert (process.noise.diff() > 0).all() and process.noise[-1] == 1 and process.signal[-1] == 0
    sigma = torch.arange(1, 1001).double() / 1000
    sigma = shift * sigma / (1 + (shift - 1) * sigma)
    torch.testing.assert_close(process.noise.double(), sigma, atol=1e-6, rtol=0)
    torch.testing.assert_close(process.alpha_bar, (1 - sigma) ** 2 / ((1 - sigma) ** 2 + sigma**2), atol=1e-6, rtol=0)
    torch.testing.assert_close(process.snr, ((1 - sigma) / sigma) ** 2, rtol=1e-3, atol=1e-9)


def test_flow_reads_training_sigmas_from_a_scheduler_that_has_sampled():
    scheduler = FlowMatchEulerDiscreteScheduler(50, 2.0)  # positional arguments, which diffusers' from_config alone would drop
    expected = scheduler.sigmas.flip(0)
    assert len(expected) == 50
    scheduler.set_timesteps(7)
    assert torch.equal(NoiseProcess.from_scheduler(scheduler).noise, expected)


@pytest.mark.parametrize("scheduler_class", [DDIMScheduler, PNDMScheduler, EulerDiscreteScheduler])
def test_any_scheduler_with_betas_is_the_same_process(scheduler_class):
    other = NoiseProcess.from_scheduler(scheduler_class.from_config(DDPMScheduler(**STABLE_DIFFUSION).config))
    process = ddpm(**STABLE_DIFFUSION)
    assert torch.equal(other.signal, process.signal) and torch.equal(other.alpha_bar, process.alpha_bar)
    assert as_process(process) is process


@pytest.mark.parametrize("scheduler", [FlowMatchHeunDiscreteScheduler(), object()])
def test_other_schedulers_are_refused_by_name(scheduler):
    with pytest.raises(UserError, match=type(scheduler).__name__):
        as_process(scheduler)


@pytest.mark.parametrize("kind", list(PREDICTION_TYPES))
def test_arithmetic_is_fp32_whatever_comes_in(kind):
    process = process_of(kind)
    x0, noise, t = batch(torch.bfloat16)
    xt = process.add_noise(x0, noise, t)
    assert xt.dtype == torch.float32
    assert torch.equal(xt, process.add_noise(x0.float(), noise.float(), t))
    assert not torch.equal(xt[0], x0[0].float())  # in bf16 arithmetic the first steps of "ddpm" would be without noise
    for name in PREDICTION_TYPES[kind]:
        target = process.target(x0, noise, t, name)
        assert target.dtype == torch.float32 and target.shape == x0.shape
        assert process.predict_x0(xt.bfloat16(), target.bfloat16(), t, name).dtype == torch.float32


@pytest.mark.parametrize("kind, prediction_type", ALL_TYPES)
def test_predict_x0_inverts_target(kind, prediction_type):
    process = process_of(kind)
    x0, noise, t = batch()
    xt, target = process.add_noise(x0, noise, t), process.target(x0, noise, t, prediction_type)
    # epsilon divides by the signal, 0.0064 at the end of the linear schedule
    torch.testing.assert_close(process.predict_x0(xt, target, t, prediction_type), x0, atol=1e-4, rtol=1e-4)


def test_targets_are_what_their_names_say():
    x0, noise, t = batch()
    assert torch.equal(ddpm().target(x0, noise, t, "epsilon"), noise)
    assert torch.equal(ddpm().target(x0, noise, t, "sample"), x0)
    assert torch.equal(process_of("flow").target(x0, noise, t, "flow_prediction"), noise - x0)


def test_to_moves_what_a_batch_needs():
    moved = ddpm().to("meta")
    assert {vector.device.type for vector in (moved.signal, moved.noise, moved.model_time, moved.diffusers_snr)} == {"meta"}
    assert moved.alpha_bar.device.type == "cpu" and moved.num_timesteps == 1000


@pytest.mark.parametrize("kind, prediction_type", ALL_TYPES)
def test_build_scheduler_gives_what_diffusers_samples(kind, prediction_type):
    scheduler = build_scheduler(kind, num_train_timesteps=50, prediction_type=prediction_type)
    assert isinstance(scheduler, {"ddpm": DDPMScheduler, "flow": FlowMatchEulerDiscreteScheduler}[kind])
    assert scheduler.config.num_train_timesteps == 50 == as_process(scheduler).num_timesteps
    if kind == "ddpm":
        assert scheduler.config.prediction_type == prediction_type
        assert scheduler.config.trained_betas is None


@pytest.mark.parametrize("schedule", BETA_SCHEDULES)
def test_build_scheduler_passes_the_schedule_on(schedule):
    if schedule != "quadratic":
        built = build_scheduler("ddpm", beta_schedule=schedule, beta_start=0.001, beta_end=0.01)
        expected = DDPMScheduler(beta_schedule=schedule, beta_start=0.001, beta_end=0.01)
        assert torch.equal(built.alphas_cumprod, expected.alphas_cumprod)


def test_quadratic_is_the_papers_and_is_saved_as_diffusers_knows_it():
    built = build_scheduler("ddpm", beta_schedule="quadratic")
    again = DDPMScheduler.from_config(built.config)
    assert built.config.beta_schedule == "scaled_linear" and (again.config.beta_start, again.config.beta_end) == (1e-4, 0.02)
    process, a, b = as_process(again), 1e-4**0.5, 0.02**0.5
    betas = (a + (b - a) * torch.arange(1000, dtype=torch.float64) / 999) ** 2
    torch.testing.assert_close(process.alpha_bar, (1 - betas).cumprod(0), rtol=1e-5, atol=1e-12)
    assert process.peak_step() + 1 == 412 and [process.convergence_step(r) for r in (10, 100, 1000)] == [661, 851, 985]
    with pytest.raises(UserError, match=r"--ddpm_beta_schedule quadratic is the papers', .* for 0\.00085 to 0\.012 give scaled_linear"):
        build_scheduler("ddpm", beta_schedule="quadratic", beta_start=0.00085, beta_end=0.012)


@pytest.mark.parametrize("kind, schedule", [("ddpm", LINEAR), ("ddpm", STABLE_DIFFUSION), ("ddpm", COSINE), ("flow", {})])
@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0])
def test_image_scale_multiplies_the_snr(kind, schedule, scale):
    plain = as_process(build_scheduler(kind, **schedule))
    scaled = as_process(build_scheduler(kind, **schedule, image_scale=scale))
    expected = scale**2 * plain.snr
    # fp32 betas and sigmas: compared as the share of signal, and in ratio where the signal is not yet all but gone
    torch.testing.assert_close(scaled.alpha_bar, expected / (1 + expected), atol=1e-6, rtol=0)
    torch.testing.assert_close(scaled.snr[:950], expected[:950], rtol=1e-3, atol=0)


@pytest.mark.parametrize("kind", list(PREDICTION_TYPES))
def test_image_scale_is_the_scaled_image_over_its_standard_deviation(kind):
    scale = 0.4
    plain, scaled = process_of(kind), as_process(build_scheduler(kind, image_scale=scale))
    x0, noise, t = batch()
    xt = plain.add_noise(scale * x0, noise, t)
    norm = (scale * plain.signal) ** 2 + plain.noise**2 if kind == "ddpm" else (scale * plain.signal + plain.noise) ** 2
    torch.testing.assert_close(scaled.add_noise(x0, noise, t), xt / norm.sqrt().view(-1, 1, 1, 1), atol=2e-4, rtol=1e-4)


def test_image_scale_survives_the_config_file(tmp_path):
    scheduler = build_scheduler("ddpm", image_scale=0.5)
    scheduler.save_pretrained(tmp_path)
    assert torch.equal(DDIMScheduler.from_pretrained(tmp_path).alphas_cumprod, scheduler.alphas_cumprod)


@pytest.mark.parametrize(
    "noise_process, options, flag",
    [
        ("ddmp", {}, "--noise_process"),
        ("flow", {"prediction_type": "epsilon"}, "--noise_process flow needs --prediction_type flow_prediction"),
        ("ddpm", {"prediction_type": "flow_prediction"}, "--prediction_type epsilon or sample or v_prediction"),
        ("ddpm", {"num_train_timesteps": 0}, "--ddpm_num_steps"),
        ("ddpm", {"image_scale": 0.0}, "--image_scale"),
        ("flow", {"image_scale": float("nan")}, "--image_scale"),
        ("ddpm", {"beta_schedule": "cosine"}, "--ddpm_beta_schedule"),
        ("ddpm", {"beta_start": 0.0}, "--ddpm_beta_start"),
        ("ddpm", {"beta_start": 0.03}, "--ddpm_beta_start"),
        ("ddpm", {"beta_end": 1.0}, "--ddpm_beta_end"),
    ],
)
def test_wrong_schedules_are_refused(noise_process, options, flag):
    with pytest.raises(UserError, match=flag):
        build_scheduler(noise_process, **options)


def test_wrong_prediction_types_are_refused():
    x0, noise, t = batch()
    for call in (ddpm().target, ddpm().predict_x0):
        with pytest.raises(UserError, match="`prediction_type`"):
            call(x0, noise, t, "flow_prediction")
    with pytest.raises(UserError, match="the noise process 'flow' needs `prediction_type` flow_prediction, not 'sample'"):
        check_prediction_type("flow", "sample")


def test_unreachable_r_names_the_largest_that_is():
    process = ddpm(**STABLE_DIFFUSION)
    with pytest.raises(UserError, match=r"`asymmetric_r` 1000 .* at most 214\.5"):
        process.convergence_step(1000)
    assert process.convergence_step(214.5) == 1000
    for r in (1.0, 0.0, float("nan")):
        with pytest.raises(UserError, match="`asymmetric_r`"):
            process.convergence_step(r)
