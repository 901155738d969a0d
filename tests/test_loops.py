"""Loops that are not ours, by the formulas of the scripts that are named: DDPM, flows (diffusers' SD3 and Flux, SiT), EDM (k-diffusion)."""

import math

import pytest
import torch
from diffusers import (
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3
from scipy.stats import ks_2samp, kstest

from immiscible import AssignmentCoupling, NoiseLevels, NoiseProcess, TimestepSampler, UserError, loss_weights, timestep_sampler

EDM = {
    "karras": EDMEulerScheduler(),
    "exponential": EDMEulerScheduler(sigma_schedule="exponential", sigma_min=0.01, sigma_max=20.0, num_train_timesteps=100),
    "multistep": EDMDPMSolverMultistepScheduler(num_train_timesteps=200),
}
MANY = 200_000


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def images(n=64):
    x0, noise = torch.randn(2, n, 3, 4, 4, generator=seeded(9)).unbind()
    return x0, noise


def get_sigmas(scheduler, timesteps, n_dim=4, dtype=torch.float32):
    """diffusers' ``examples/dreambooth/train_dreambooth_lora_sd3.py``: a timestep is looked for among the scheduler's."""
    step_indices = [(scheduler.timesteps == t).nonzero().item() for t in timesteps]
    sigma = scheduler.sigmas.to(dtype)[step_indices].flatten()
    while len(sigma.shape) < n_dim:
        sigma = sigma.unsqueeze(-1)
    return sigma


# Flows as diffusers' scripts write them


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("law", ["uniform", "asymmetric", "logit_normal"])
def test_levels_are_what_a_flow_script_looks_up(law, shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    levels = timestep_sampler(law, scheduler).levels(64, generator=seeded(), ndim=4)
    assert isinstance(levels, NoiseLevels)
    sigmas, timesteps, indices = levels
    assert sigmas.shape == (64, 1, 1, 1) and timesteps.shape == indices.shape == (64,) and indices.dtype == torch.int64
    assert torch.equal(timesteps, scheduler.timesteps[indices])
    assert torch.equal(sigmas, get_sigmas(scheduler, timesteps))
    x0, noise = images()
    assert torch.equal((1.0 - sigmas) * x0 + sigmas * noise, scheduler.scale_noise(x0, timesteps, noise))
    assert torch.equal(levels.index, 999 - timestep_sampler(law, scheduler)(64, generator=seeded()))  # the same draws, the other way round


@pytest.mark.parametrize(("shift", "intended", "reversed_"), [(1.0, 0.469, 0.531), (3.0, 0.622, 0.760)])
def test_the_law_is_not_mirrored(shift, intended, reversed_):
    """SpeeD trains the noisy levels less; by the sampler's own indices a flow script would train them more."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    sampler = timestep_sampler("asymmetric", scheduler)
    for continuous in (False, True):
        levels = sampler.levels(MANY, generator=seeded(), continuous=continuous)
        assert float(levels.sigma.mean()) == pytest.approx(intended, abs=2e-3)
        assert float(scheduler.sigmas[levels.index].mean()) == pytest.approx(intended, abs=2e-3)
        assert float((levels.time / 1000).mean()) == pytest.approx(intended, abs=2e-3)
    assert float(scheduler.sigmas[sampler(MANY, generator=seeded())].mean()) == pytest.approx(reversed_, abs=2e-3)


@pytest.mark.parametrize(("mean", "shift"), [(0.0, 1.0), (0.0, 3.0), (0.5, 3.0)])
def test_sd3s_density_is_the_logit_normal_law(mean, shift):
    """The script's indices run from most noise to least, before the shift: hence the sign of the mean and the logarithm of the shift."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    u = compute_density_for_timestep_sampling("logit_normal", 20_000, logit_mean=mean, logit_std=1.0, generator=seeded(1))
    theirs = get_sigmas(scheduler, scheduler.timesteps[(u * 1000).long()][:2000], n_dim=1)
    told = {"logit_mean": math.log(shift) - mean, "logit_std": 1.0}
    ours = timestep_sampler("logit_normal", scheduler, **told).levels(20_000, generator=seeded(2)).sigma
    assert ks_2samp(theirs.numpy(), ours.numpy()).pvalue > 0.01
    other = timestep_sampler("logit_normal", scheduler, logit_mean=told["logit_mean"] + 0.3).levels(20_000, generator=seeded(2)).sigma
    assert ks_2samp(theirs.numpy(), other.numpy()).pvalue < 1e-3  # the test can fail


@pytest.mark.parametrize("shape", [(32, 4, 8, 8), (32, 16, 64), (32, 4, 1, 8, 8)])
def test_a_flow_step_by_the_scripts_formulas(shape):
    """SD3, Flux (packed [B, L, C]) and Qwen (5-D): sigma and weight broadcast against the latents, and the weight is the level's."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    model_input = torch.randn(shape, generator=seeded())
    sampler = timestep_sampler("logit_normal", scheduler)
    weights = loss_weights("min_snr", scheduler, "flow_prediction")
    noise = AssignmentCoupling()(model_input, generator=seeded(1))
    sigmas, timesteps, _ = sampler.levels(len(model_input), generator=seeded(2), ndim=model_input.ndim)
    noisy = (1.0 - sigmas) * model_input + sigmas * noise
    model_pred = 0.1 * noisy
    target = noise - model_input
    weighting = weights.at(sigmas)
    loss = (weighting.float() * (model_pred.float() - target.float()) ** 2).reshape(target.shape[0], -1).mean(1)

    assert weighting.shape == compute_loss_weighting_for_sd3("none", sigmas).shape == (32, *[1] * (len(shape) - 1))
    exact = sigmas.double()
    by_hand = (((1 - exact) / exact) ** 2).clamp(max=5) * exact**2  # min(SNR, 5) on the image's error, of which the flow's is 1 / sigma
    torch.testing.assert_close(weighting.double(), by_hand, rtol=1e-5, atol=1e-6)
    process, t = NoiseProcess.from_scheduler(scheduler), sampler(len(model_input), generator=seeded(2))
    assert torch.equal(noisy, process.add_noise(model_input, noise, t)) and torch.equal(timesteps, process.model_time[t])
    assert torch.equal(weighting.flatten(), weights[t])
    wanted = (by_hand * (model_pred - target).double() ** 2).flatten(1).mean(1)
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-4, atol=1e-6)


def test_a_continuous_uniform_law_is_sits_and_torchtitans():
    """``t = torch.rand(B)``, but for what lies beyond the first and last of a thousand levels."""
    sampler = timestep_sampler("uniform", FlowMatchEulerDiscreteScheduler())
    sigma, time, index = sampler.levels(20_000, generator=seeded(), continuous=True)
    assert kstest(sigma.numpy(), "uniform").pvalue > 0.01
    assert float(sigma.min()) >= 0.001 and float(sigma.max()) <= 1 and len(sigma.unique()) > 19_000
    torch.testing.assert_close(time, 1000 * sigma)
    torch.testing.assert_close(FlowMatchEulerDiscreteScheduler().sigmas[index], sigma, atol=5.01e-4, rtol=0)


def test_a_continuous_level_lies_in_the_bin_of_its_index():
    for scheduler in (FlowMatchEulerDiscreteScheduler(num_train_timesteps=7, shift=2.0), EDM["exponential"], DDPMScheduler()):
        sampler = timestep_sampler("uniform", scheduler)
        levels = sampler.levels(5000, generator=seeded(), continuous=True)
        assert torch.equal(levels.index, sampler.levels(5000, generator=seeded()).index)
        process = sampler.process
        t = levels.index if process.kind == "ddpm" else process.num_timesteps - 1 - levels.index
        low, high = process.sigma[(t - 1).clamp(min=0)], process.sigma[(t + 1).clamp(max=process.num_timesteps - 1)]
        assert bool((levels.sigma >= low).all() and (levels.sigma <= high).all())
        # at the middle of its bin a level is the discrete one; both ends of the law are half as wide
        inside = torch.arange(1, process.num_timesteps - 1)
        middle = process.levels(inside, torch.full((len(inside),), 0.5, dtype=torch.float64))
        torch.testing.assert_close(middle.sigma, process.sigma[inside])
        torch.testing.assert_close(middle.time, process.model_time[inside].float())
    alone = timestep_sampler("uniform", FlowMatchEulerDiscreteScheduler(num_train_timesteps=1)).levels(3, continuous=True)
    assert alone.sigma.tolist() == [1, 1, 1]


# EDM as k-diffusion and EDM2 write it


@pytest.mark.parametrize("name", EDM)
def test_edm_schedulers_are_understood(name):
    scheduler = EDM[name]
    process = NoiseProcess.from_scheduler(scheduler)
    steps = len(scheduler.timesteps)
    assert process.kind == "edm" and process.num_timesteps == steps
    assert torch.equal(process.sigma, scheduler.sigmas[:steps].flip(0)) and bool((process.sigma.diff() > 0).all())
    assert float(process.sigma[0]) == pytest.approx(scheduler.config.sigma_min, rel=1e-5)
    assert float(process.sigma[-1]) == pytest.approx(scheduler.config.sigma_max, rel=1e-5)
    assert torch.equal(process.signal, torch.ones(steps))
    torch.testing.assert_close(process.model_time, process.sigma.log() / 4)
    torch.testing.assert_close(process.snr, process.sigma.double() ** -2, rtol=1e-6, atol=0)
    levels = timestep_sampler("uniform", scheduler).levels(64, generator=seeded(), ndim=4)
    assert torch.equal(levels.sigma.flatten(), scheduler.sigmas[levels.index])
    assert torch.equal(levels.time, scheduler.timesteps[levels.index])
    x0, noise = images()
    assert torch.equal(x0 + noise * levels.sigma, scheduler.add_noise(x0, noise, levels.time))
    t = steps - 1 - levels.index
    assert torch.equal(process.add_noise(x0, noise, t), x0 + noise * levels.sigma)
    torch.testing.assert_close(process.predict_x0(x0 + noise * levels.sigma, noise, t, "epsilon"), x0, atol=1e-4, rtol=1e-4)
    scheduler.set_timesteps(5)  # a scheduler that has sampled is the same process
    assert torch.equal(NoiseProcess.from_scheduler(scheduler).sigma, process.sigma)


def test_edms_law_is_the_logit_normal_one():
    """EDM2: ``sigma = (torch.randn(B) * P_std + P_mean).exp()``."""
    sampler = timestep_sampler("logit_normal", EDM["karras"], logit_mean=-1.2, logit_std=1.2)
    sigma, time, _ = sampler.levels(20_000, generator=seeded(3), continuous=True)
    assert kstest((sigma.double().log() + 1.2).div(1.2).numpy(), "norm").pvalue > 0.01
    torch.testing.assert_close(time, sigma.log() / 4, atol=1e-5, rtol=1e-5)
    other = timestep_sampler("logit_normal", EDM["karras"]).levels(20_000, generator=seeded(3), continuous=True).sigma
    assert kstest((other.double().log() + 1.2).div(1.2).numpy(), "norm").pvalue < 1e-3


def test_a_k_diffusion_step_by_its_formulas():
    """k-diffusion's ``Denoiser.loss``: c_skip, c_out and c_in about a network F; the error of D = c_skip xt + c_out F has our weight."""
    scheduler = EDM["karras"]
    weights = loss_weights("min_snr", scheduler, "sample")
    x0, _ = images()
    noise = AssignmentCoupling()(x0, generator=seeded(1))
    sigma, time, _ = timestep_sampler("logit_normal", scheduler, logit_mean=-1.2, logit_std=1.2).levels(
        64, generator=seeded(2), ndim=4, continuous=True
    )
    xt = x0 + noise * sigma
    torch.testing.assert_close(scheduler.precondition_noise(sigma).flatten(), time, atol=1e-5, rtol=1e-5)
    scheduler_input = scheduler.precondition_inputs(xt, sigma)
    torch.testing.assert_close(scheduler_input, xt / (sigma**2 + scheduler.config.sigma_data**2) ** 0.5)
    denoised = scheduler.precondition_outputs(xt, 0.1 * scheduler_input, sigma)
    loss = (weights.at(sigma) * (denoised - x0) ** 2).flatten(1).mean(1)
    wanted = ((sigma.double() ** -2).clamp(max=5) * (denoised - x0).double() ** 2).flatten(1).mean(1)
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-3, atol=1e-6)


def test_what_edm_is_not_trained_for_is_refused():
    with pytest.raises(UserError, match="the noise process 'edm' needs `prediction_type` epsilon or sample, not 'v_prediction'"):
        loss_weights("none", EDM["karras"], "v_prediction")


# Schedulers with betas


@pytest.mark.parametrize("scheduler_class", [DPMSolverMultistepScheduler, UniPCMultistepScheduler])
@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_schedulers_that_are_configured_for_flows_are_flows(scheduler_class, shift):
    """Wan's: T levels of their shift, those of `FlowMatchEulerDiscreteScheduler`, and their own sampling levels lie among them."""
    scheduler = scheduler_class(use_flow_sigmas=True, flow_shift=shift, prediction_type="flow_prediction")
    process = NoiseProcess.from_scheduler(scheduler)
    reference = NoiseProcess.from_scheduler(FlowMatchEulerDiscreteScheduler(shift=shift))
    assert process.kind == "flow" and torch.equal(process.noise, reference.noise) and torch.equal(process.model_time, reference.model_time)
    scheduler.set_timesteps(10)
    for sigma in scheduler.sigmas[1:-1]:
        assert float((process.sigma - sigma).abs().min()) < 1e-2


@pytest.mark.parametrize("schedule", [{}, {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}])
def test_levels_of_schedulers_with_betas(schedule):
    scheduler = DDPMScheduler(**schedule)
    sampler = timestep_sampler("asymmetric", scheduler)
    sigma, time, index = sampler.levels(64, generator=seeded())
    assert torch.equal(time, index) and torch.equal(time, sampler(64, generator=seeded())) and time.dtype == torch.int64
    euler = EulerDiscreteScheduler(**schedule)  # whose sigmas are k-diffusion's
    torch.testing.assert_close(sigma, euler.sigmas[:-1].flip(0)[index], rtol=1e-4, atol=0)
    x0, noise = images()
    xt = (x0 + sigma.view(-1, 1, 1, 1) * noise) / (1 + sigma.view(-1, 1, 1, 1) ** 2) ** 0.5
    torch.testing.assert_close(xt, scheduler.add_noise(x0, noise, index), atol=1e-4, rtol=1e-4)
    ending = timestep_sampler("uniform", DDPMScheduler(rescale_betas_zero_snr=True)).levels(2000, generator=seeded(), continuous=True)
    assert not ending.sigma.isnan().any() and not ending.time.isnan().any()


# Weights of noise levels


@pytest.mark.parametrize("name", ["none", "change_aware", "min_snr", "snr", "p2"])
@pytest.mark.parametrize(
    ("scheduler", "prediction_type"),
    [
        (DDPMScheduler(), "v_prediction"),
        (DDPMScheduler(rescale_betas_zero_snr=True), "v_prediction"),
        (FlowMatchEulerDiscreteScheduler(shift=3.0), "flow_prediction"),
        (EDM["karras"], "sample"),
    ],
)
def test_the_weight_of_a_level_is_the_weight_of_its_index_and_linear_in_log_snr_between(name, scheduler, prediction_type):
    weights, process = loss_weights(name, scheduler, prediction_type), NoiseProcess.from_scheduler(scheduler)
    sigma, every = process.sigma, torch.arange(process.num_timesteps)
    torch.testing.assert_close(weights.at(sigma), weights[every], rtol=1e-4, atol=1e-6)
    inside = slice(0, process.num_timesteps - 2)  # a level without signal is infinitely far from the one before it
    halfway = (process.snr.log()[:-1][inside] + process.snr.log()[1:][inside]) / 2
    between = 1 / (1 + (halfway / 2).exp()) if process.kind == "flow" else (-halfway / 2).exp()
    mean = (weights[every][:-1][inside] + weights[every][1:][inside]) / 2
    torch.testing.assert_close(weights.at(between).float(), mean, rtol=1e-4, atol=1e-6)
    beyond = weights.at(torch.tensor([float(sigma[0]) / 2, 0.0]))
    torch.testing.assert_close(beyond, weights[torch.tensor([0, 0])])
    assert weights.at(sigma[:6].view(2, 3, 1).bfloat16()).shape == (2, 3, 1)


def test_weights_are_for_multiplying():
    weights = loss_weights("change_aware", DDPMScheduler(), "epsilon")
    t = torch.tensor([0, 500, 999])
    assert weights[t].dtype == weights.at(torch.ones(3)).dtype == torch.float32 and weights.vector.dtype == torch.float64
    assert torch.equal(weights[t], weights.vector[t].float()) and torch.equal(weights.float().to("cpu")[t], weights[t])
    assert len(weights) == 1000 and float(weights[500]) == float(weights[t][1])
    with pytest.raises(UserError, match=r"indexed by int64 timesteps, not by torch\.float32: for noise levels use weights\.at\(sigma\)"):
        weights[FlowMatchEulerDiscreteScheduler().timesteps[:3]]


def test_a_law_without_a_process_has_no_levels():
    with pytest.raises(UserError, match="give TimestepSampler its `process`"):
        TimestepSampler(torch.full((10,), 0.1, dtype=torch.float64)).levels(3)
    with pytest.raises(UserError, match="10 timestep probabilities do not go with a noise process of 1000 timesteps"):
        TimestepSampler(torch.full((10,), 0.1, dtype=torch.float64), process=NoiseProcess.from_scheduler(DDPMScheduler()))
