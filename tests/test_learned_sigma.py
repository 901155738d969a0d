"""The hybrid loss against formulas in float64, and the sampler that plain diffusers makes of it."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import numpy
import pytest
import torch
from class_networks import CLASSES, CPU, config_of, pipeline_of, tiny_unet
from diffusers import DDPMPipeline, DDPMScheduler
from launch import tiny
from scipy.stats import norm
from test_config import parse
from torch import nn
from torch.distributions import Normal, kl_divergence

from immiscible.coupling import IndependentCoupling
from immiscible.errors import UserError
from immiscible.learned_sigma import LearnedSigmaObjective, ReverseSteps, gaussian_nats, pixel_nats
from immiscible.objective_choice import training_scheduler
from immiscible.objectives import DenoisingObjective
from immiscible.process import NoiseProcess
from immiscible.randomness import Draws, PoolDraws
from immiscible.sampling.class_pipeline import ClassConditionalPipeline
from immiscible.sampling.loaded import take_scheduler
from immiscible.schedulers import build_scheduler
from immiscible.timesteps import timestep_sampler
from immiscible.weighting import loss_weights

T = 100


class Network(nn.Module):
    """Twice the channels, the second half a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.mean, self.v = nn.Parameter(torch.tensor(0.8)), nn.Parameter(torch.tensor(0.3))

    def forward(self, x, time):
        return SimpleNamespace(sample=torch.cat([self.mean * x, self.v * torch.cos(x)], 1))


def half(x, time):
    """The mean of `Network` alone."""
    return SimpleNamespace(sample=Network()(x, time).sample[:, :1])


def objective(kind=LearnedSigmaObjective, prediction_type="epsilon", weighting="none", process=None, law="uniform"):
    process = process or NoiseProcess.from_scheduler(build_scheduler("ddpm", num_train_timesteps=T, prediction_type=prediction_type))
    weights = loss_weights(weighting, process, prediction_type).float()
    return kind(process, timestep_sampler(law, process), IndependentCoupling(), weights, prediction_type)


def drawn(found, batch=64):
    generator = torch.Generator().manual_seed(0)
    x0 = torch.randint(256, (batch, 1, 2, 2), generator=generator) / 127.5 - 1
    draws = Draws(0, 0, 0, CPU)
    pairs = found.pair(x0, PoolDraws((draws,), batch))
    pairs.timesteps[:8] = 0
    return pairs, draws


def betas():
    return numpy.linspace(1e-4, 0.02, T)


def reference_bits(x0, xt, eps, v, t):
    """One image's term of L_vlb, from the definitions: two Gaussians of distributions of torch, or bins of one of scipy's."""
    alpha = 1 - betas()
    bar = numpy.cumprod(alpha)
    before = numpy.concatenate([[1.0], bar[:-1]])
    posterior = betas() * (1 - before) / (1 - bar)
    share, rest = numpy.sqrt(before) * betas() / (1 - bar), numpy.sqrt(alpha) * (1 - before) / (1 - bar)
    predicted = (xt - math.sqrt(1 - bar[t]) * eps) / math.sqrt(bar[t])
    least = math.log(posterior[max(t, 1)])
    deviation = ((v + 1) / 2 * math.log(betas()[t]) + (1 - v) / 2 * least).div(2).exp()
    if t:
        true = Normal(share[t] * x0 + rest[t] * xt, torch.tensor(posterior[t], dtype=torch.float64).sqrt())
        return float(kl_divergence(true, Normal(share[t] * predicted + rest[t] * xt, deviation)).mean()) / math.log(2)
    levels = ((x0 + 1) * 127.5).round().numpy()
    upper = numpy.where(levels == 255, numpy.inf, (levels + 0.5) / 127.5 - 1)
    lower = numpy.where(levels == 0, -numpy.inf, (levels - 0.5) / 127.5 - 1)
    mass = norm.cdf(upper, predicted, deviation) - norm.cdf(lower, predicted, deviation)
    return float(-numpy.log2(numpy.maximum(mass, 1e-12)).mean())


def test_the_loss_is_the_weighted_error_and_a_thousandth_of_the_bound_beside_it():
    found = objective(weighting="p2")
    pairs, draws = drawn(found)
    x0, t = pairs.x0.double(), pairs.timesteps
    bar = torch.from_numpy(numpy.cumprod(1 - betas()))[t].view(-1, 1, 1, 1)
    xt = bar.sqrt() * x0 + (1 - bar).sqrt() * pairs.noise.double()
    eps, v = 0.8 * xt, 0.3 * xt.cos()
    eps[:8] = pairs.noise[:8].double() + 0.5  # near enough that bins of a value hold something
    outputs = torch.cat([eps, v.float().double()], 1).float()
    with torch.no_grad():
        losses = found(lambda x, time: SimpleNamespace(sample=outputs), pairs, draws)
    squared = (outputs[:, :1].double() - pairs.noise.double()).square().flatten(1).mean(1) * found.weights[t].double()
    bits = [reference_bits(x0[i], xt[i], outputs[i, :1].double(), outputs[i, 1:].double(), int(t[i])) for i in range(len(t))]
    expected = squared + T / 1000 * torch.tensor(bits, dtype=torch.float64)
    torch.testing.assert_close(losses.double(), expected, rtol=2e-4, atol=1e-5)
    assert min(bits) > 0 and max(bits) < 40


def test_terms_in_float64():
    """Of the divergence and of bins, both ends among them; the posterior's first variance is that of the second step."""
    generator = torch.Generator().manual_seed(1)
    error, one, other = torch.randn(3, 50, dtype=torch.float64, generator=generator)
    own = kl_divergence(Normal(error, (other / 2).exp()), Normal(torch.zeros(50, dtype=torch.float64), (one / 2).exp()))
    torch.testing.assert_close(gaussian_nats(error, one, other), own, rtol=1e-12, atol=1e-12)
    levels = torch.arange(256, dtype=torch.float64)
    given = pixel_nats(levels / 127.5 - 1, torch.tensor(0.9, dtype=torch.float64), torch.tensor(-1.0, dtype=torch.float64))
    assert float((-given).exp().sum()) == pytest.approx(1, abs=1e-12)
    ab = torch.from_numpy(numpy.cumprod(1 - betas()))
    steps = ReverseSteps.of(ab)
    assert steps.least[0] == steps.least[1] and steps.share[0] == pytest.approx(1, abs=1e-12)
    assert (steps.least[1:] <= steps.greatest[1:]).all()


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_the_mean_learns_what_it_learns_without_a_variance(prediction_type):
    losses, gradients = [], []
    for kind in (LearnedSigmaObjective, DenoisingObjective):
        found, network = objective(kind, prediction_type), Network()
        pairs, draws = drawn(found)
        plain = lambda x, time, network=network: SimpleNamespace(sample=network(x, time).sample[:, :1])  # noqa: E731
        loss = found(network if kind is LearnedSigmaObjective else plain, pairs, draws).mean()
        loss.backward()
        losses.append(loss.item())
        gradients.append((network.mean.grad, network.v.grad))
    assert torch.equal(gradients[0][0], gradients[1][0]) and losses[0] > losses[1]
    assert gradients[0][1].abs() > 0 and gradients[1][1] == 0


def test_a_law_that_goes_by_losses_learns_of_both_terms_and_weighs_both():
    found = objective(law="loss_second_moment")
    pairs, draws = drawn(found)
    history = found.sampler.history
    for step in range(10):  # every level has its losses, those of the last ones twice as great
        history.record(step, torch.arange(T), 1 + (torch.arange(T) >= T // 2).float())
    draws = Draws(0, 12, 0, CPU)
    p = found.sampler.at(12).probabilities[pairs.timesteps]
    loss = found.loss(Network(), pairs, draws)
    assert p.max() > 1.9 * p.min()
    torch.testing.assert_close(found(Network(), pairs, draws), loss / (T * p).float())
    told = history.state_dict()["waiting"][12]
    assert torch.equal(told[:, 1], loss.detach()) and (loss > objective(DenoisingObjective).loss(half, pairs, draws)).all()


def test_the_variance_is_the_one_that_diffusers_samples_with():
    scheduler = DDPMScheduler(num_train_timesteps=T, variance_type="learned_range")
    least, greatest, _ = objective().steps
    for t in (1, 2, 50, T - 1):
        for v in (-1.0, 0.2, 1.0):
            ours = (v + 1) / 2 * greatest[t] + (1 - v) / 2 * least[t]
            assert float(scheduler._get_variance(t, torch.tensor(v))) == pytest.approx(float(ours), abs=2e-3)  # of fp32 products there


def test_250_steps_are_those_of_the_papers_under_linspace():
    """Nichol and Dhariwal's respacing goes from the first timestep to the last in equal strides, rounded."""
    for count in (10, 50, 250, 1000):
        scheduler = DDPMScheduler(timestep_spacing="linspace")
        scheduler.set_timesteps(count)
        stride, position, visited = 999 / (count - 1), 0.0, []
        for _ in range(count):
            visited.append(round(position))
            position += stride
        assert scheduler.timesteps.tolist() == visited[::-1]


def test_guidance_leaves_the_variance_of_the_class():
    unet = tiny_unet(null_class=True, out_channels=2)
    pipeline = ClassConditionalPipeline(
        **pipeline_of(unet, "ddpm").components | {"scheduler": DDPMScheduler(variance_type="learned_range")}
    )
    x, labels = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2])
    with torch.no_grad():
        told, without = (unet(x, 5, class_labels=of).sample for of in (labels, torch.full_like(labels, CLASSES)))
        found = pipeline._predict(x, torch.tensor(5), labels, 3.0)
    torch.testing.assert_close(found[:, :1], (3 * told - 2 * without)[:, :1])
    torch.testing.assert_close(found[:, 1:], told[:, 1:])


def test_only_ddpm_splits_a_variance_off():
    unet = tiny_unet(None, out_channels=2)
    pipeline = DDPMPipeline(unet, DDPMScheduler(variance_type="learned_range"))
    with pytest.raises(UserError, match="--scheduler ddim: the network learned the variance"):
        take_scheduler(pipeline, "ddim")
    assert take_scheduler(pipeline, "ddpm").scheduler.config.variance_type == "learned_range"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--noise_process", "flow", "--prediction_type", "flow_prediction"], "--learned_sigma .* not of --noise_process flow"),
        (["--objective", "edm"], "--learned_sigma belongs to --objective denoising, not to edm"),
        (["--sampling_scheduler", "ddim"], "--sampling_scheduler ddim has no variance to learn"),
        (["--timestep_spacing", "trailing"], "--timestep_spacing trailing .*; take linspace or leading"),
    ],
)
def test_what_it_does_not_go_with_is_one_line(words, says):
    with pytest.raises(UserError, match=says):
        parse("--bundled_data", "digits", "--learned_sigma", *words)


def test_a_configuration_may_say_so_or_not(tmp_path):
    file = tmp_path / "network.json"
    for out, learned, expected in ((1, False, 1), (1, True, 2), (2, True, 2), (2, False, None), (3, True, None)):
        file.write_text(json.dumps({**config_of(None), "out_channels": out}))
        if expected is None:
            with pytest.raises(UserError, match="in_channels and out_channels differ"):
                config_of(None, str(file), learned_sigma=learned)
        else:
            assert config_of(None, str(file), learned_sigma=learned)["out_channels"] == expected
    assert config_of(None, learned_sigma=True)["out_channels"] == 2


def test_the_scheduler_keeps_the_flags_schedule():
    flags = ("--bundled_data", "digits", "--image_scale", "0.5", "--ddpm_beta_schedule", "squaredcos_cap_v2")
    plain, learned = (training_scheduler(parse(*flags, *more)) for more in ((), ("--learned_sigma",)))
    assert learned.config.variance_type == learned.variance_type == "learned_range" != plain.variance_type
    assert torch.equal(plain.alphas_cumprod, learned.alphas_cumprod)


@pytest.mark.slow
def test_trained_measured_and_sampled_by_plain_diffusers(script, tmp_path):
    measured = {"eval_steps": 2, "eval_samples": 16, "eval_inference_steps": [2], "validation_split": 0.2, "eval_features": "pixels"}
    words = tiny(tmp_path / "run", learned_sigma=True, use_ema=True, max_train_steps=2, timestep_spacing="linspace", **measured)
    result = script(words)
    assert result.code == 0, result.stderr
    line = json.loads((tmp_path / "run" / "evaluation.jsonl").read_text())
    assert 0.5 < line["validation_loss"]["900-999"] < 2
    pipeline = DDPMPipeline.from_pretrained(tmp_path / "run")
    assert pipeline.unet.config.out_channels == 2 * pipeline.unet.config.in_channels
    assert pipeline.scheduler.config.variance_type == "learned_range" and pipeline.scheduler.config.timestep_spacing == "linspace"
    images = pipeline(batch_size=2, num_inference_steps=5, generator=torch.Generator().manual_seed(0), output_type="np").images
    assert images.shape == (2, 8, 8, 1) and numpy.isfinite(images).all()
