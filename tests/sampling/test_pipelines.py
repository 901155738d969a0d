"""Samples of a network: what it is told, and that they are those of the sampler's own steps."""

from __future__ import annotations

from types import SimpleNamespace

import diffusers
import numpy
import pytest
import torch
from class_networks import CLASSES, painted, pipeline_of, tiny_unet
from latent_networks import network
from tiny_text import model_folder

from immiscible.errors import UserError
from immiscible.networks.latents import load_vae
from immiscible.randomness import seeded_generator
from immiscible.sampling.loaded import SCHEDULERS, take_scheduler
from immiscible.sampling.pipelines import build_pipeline, class_pipeline, sample_images, sample_labels, vae_at_its_precision
from immiscible.schedulers import build_scheduler

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def vae():
    return load_vae(str(model_folder()), resolution=32)


def test_an_unconditional_network_is_told_nothing():
    pipeline = pipeline_of(tiny_unet(None))
    assert sample_labels(pipeline.unet, 5) is None and class_pipeline(pipeline) is pipeline


def test_the_null_class_is_no_class_of_samples():
    assert sample_labels(tiny_unet(null_class=True), 3 * CLASSES).tolist() == [*range(CLASSES)] * 3


def test_samples_are_balanced_whatever_the_batches():
    expected = [number % CLASSES for number in range(11)]
    assert sample_labels(tiny_unet(), 11).tolist() == expected
    for batch_size in (1, 3, 4, 11):
        assert painted(11, batch_size=batch_size) == expected
    assert painted(2, batch_size=2) + painted(9, batch_size=5, first=2) == expected


@pytest.mark.parametrize(("sampler", "prediction_type"), [("ddim", "epsilon"), ("ddpm", "v_prediction")])
def test_samples_are_those_of_a_loop_that_passes_the_labels(sampler, prediction_type):
    unet = tiny_unet()
    pipeline = pipeline_of(unet, sampler, prediction_type)
    images = sample_images(pipeline, 6, steps=3, seed=7, batch_size=4, device=CPU)
    generators = [seeded_generator(7, "sample", number) for number in range(6)]
    x = torch.cat([torch.randn(1, 1, 8, 8, generator=generator) for generator in generators])
    pipeline.scheduler.set_timesteps(3)
    with torch.no_grad():
        for t in pipeline.scheduler.timesteps:
            output = unet(x, t, class_labels=torch.arange(6) % CLASSES).sample
            x = pipeline.scheduler.step(output, t, x, generator=generators).prev_sample
    reference = ((x / 2 + 0.5).clamp(0, 1) * 255).round().permute(0, 2, 3, 1).numpy()
    assert images.std() > 10 and numpy.abs(images - reference).max() <= 1  # other batches round otherwise


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_samples_are_unclipped_latents_decoded(vae, sampler):
    """Against the sampler's own steps, image by image; a stochastic one draws from the image's generator too."""
    scheduler = build_scheduler("ddpm")
    pipeline = build_pipeline(network(), scheduler, sampler=sampler, spacing="leading", vae=vae)
    assert pipeline.scheduler.config.clip_sample is False
    assert build_pipeline(network(), scheduler, sampler=sampler, spacing="leading").scheduler.config.clip_sample is True
    found = sample_images(pipeline, 3, steps=4, seed=7, batch_size=2, device=CPU)
    largest = 0.0
    for number in range(3):
        generator = seeded_generator(7, "sample", number)
        pipeline.scheduler.set_timesteps(4)
        x = torch.randn(1, 4, 4, 4, generator=generator)
        for t in pipeline.scheduler.timesteps:
            with torch.no_grad():
                output = pipeline.unet(x, t).sample
            x = pipeline.scheduler.step(output, t, x, generator=generator).prev_sample
        with torch.no_grad():
            image = vae.decode(x / vae.config.scaling_factor).sample[0].permute(1, 2, 0)
        wanted = ((image / 2 + 0.5).clamp(0, 1) * 255).round().numpy()
        assert numpy.abs(found[number].astype(int) - wanted).max() <= 1
        largest = max(largest, float(x.abs().max()))
    assert largest > 1
    assert "step" not in vars(pipeline.scheduler)  # it is as it was


@pytest.mark.parametrize(("one", "other"), [("ddpm", "euler_ancestral"), ("ddim", "euler")])
def test_samplers_with_sigmas_begin_at_the_right_scale_in_every_batch(vae, one, other):
    """Two formulas of one sampler. `LDMPipeline` scales its noise before it tells the sampler how many steps there are."""
    images = []
    for name in (one, other):
        pipeline = build_pipeline(network(), build_scheduler("ddpm"), sampler="ddpm", spacing="leading", vae=vae)
        images.append(sample_images(take_scheduler(pipeline, name), 4, steps=3, seed=0, batch_size=2, device=CPU).astype(int))
    assert numpy.abs(images[0] - images[1]).max() <= 1 and len(numpy.unique(images[0])) > 10


@pytest.mark.parametrize("kind", ["CMStochasticIterativeScheduler", "EDMEulerScheduler"])
def test_an_axis_of_sigma_is_sampled_by_its_own_sampler(kind):
    """Others would run, and sample noise: they scale the network's input and output otherwise."""
    pipeline = build_pipeline(tiny_unet(None), getattr(diffusers, kind)(), sampler="ddpm", spacing="leading")
    for name in SCHEDULERS:
        with pytest.raises(UserError, match=f"--scheduler {name}: EDM and consistency networks are sampled by their own"):
            take_scheduler(pipeline, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_vae_decodes_at_the_precision_of_its_weights_under_autocast(vae, dtype):
    """A stand-in for SDXL's, which overflows in fp16."""
    own = vae.__class__.from_config(vae.config).to(dtype)
    latents = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.no_grad():
        exact = own.decode(latents.to(dtype)).sample
        with vae_at_its_precision(SimpleNamespace(vae=own)), torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(own.decode(latents).sample, exact) and exact.dtype == dtype
        with torch.autocast("cpu", dtype=torch.bfloat16):  # it is as it was
            assert own.decode(latents).sample.dtype == torch.bfloat16
