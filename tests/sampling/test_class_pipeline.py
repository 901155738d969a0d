"""Our pipeline of networks that are told classes: without guidance diffusers' own to the bit, with it a sampler written by hand."""

from __future__ import annotations

import ast
import sys
from contextlib import contextmanager

import numpy
import pytest
import torch
from class_networks import CLASSES, pipeline_of, telling, tiny_unet
from latent_networks import network
from tiny_text import model_folder

from immiscible.networks.latents import load_vae
from immiscible.randomness import seeded_generator
from immiscible.sampling.class_pipeline import ClassConditionalPipeline
from immiscible.sampling.loaded import take_scheduler
from immiscible.sampling.pipelines import CLASS_PIPELINE, build_pipeline, class_pipeline, sample_images, told_generators
from immiscible.schedulers import build_scheduler

CPU = torch.device("cpu")
LABELS = torch.tensor([2, 0, 3])


@pytest.fixture(scope="module")
def vae():
    return load_vae(str(model_folder()), resolution=32)


def flow_of(unet):
    scheduler = build_scheduler("flow", prediction_type="flow_prediction")
    return build_pipeline(unet, scheduler, sampler="ddpm", spacing="leading")


def latents_of(vae, sampler, **changes):
    unet = network(num_classes=CLASSES, **changes)
    return build_pipeline(unet, build_scheduler("ddpm"), sampler=sampler, spacing="leading", vae=vae)


def generators(count=3):
    return [seeded_generator(7, "sample", number) for number in range(count)]


def sampled(pipeline, labels=LABELS, **options):
    found = class_pipeline(pipeline)(labels, generator=generators(), num_inference_steps=4, output_type="np", **options)
    return found.images


def injected(pipeline, labels):
    """What diffusers' own pipeline samples when its network is told the classes behind its back."""
    with telling(pipeline.unet, labels), told_generators(pipeline, (drawn := generators())):
        return pipeline(batch_size=len(labels), generator=drawn, num_inference_steps=4, output_type="np").images


@contextmanager
def counted(unet):
    """The number of images in each call of a network."""
    calls: list[int] = []
    hook = unet.register_forward_pre_hook(lambda _, args: calls.append(len(args[0])))
    yield calls
    hook.remove()


MAKE = {
    "ddpm": lambda unet: pipeline_of(unet, "ddpm", "v_prediction"),
    "ddim": lambda unet: pipeline_of(unet, "ddim"),
    "dpm_solver": lambda unet: take_scheduler(pipeline_of(unet, "ddim"), "dpm_solver"),
    "flow": flow_of,
}


@pytest.mark.parametrize("null_class", [False, True])
@pytest.mark.parametrize("kind", MAKE)
def test_without_guidance_pixels_are_bit_equal_to_diffusers(kind, null_class):
    pipeline = MAKE[kind](tiny_unet(null_class=null_class))
    found = sampled(pipeline)
    assert numpy.array_equal(found, injected(pipeline, LABELS)) and found.std() > 0.05
    assert numpy.array_equal(found, sampled(pipeline, LABELS.tolist(), guidance_scale=1.0, guidance_interval=(0.2, 0.3)))
    assert not numpy.array_equal(found, sampled(pipeline, LABELS.flip(0)))


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_without_guidance_latents_are_bit_equal_to_diffusers(vae, sampler):
    pipeline = latents_of(vae, sampler)
    found = sampled(pipeline)
    assert found.shape == (3, 32, 32, 3) and numpy.array_equal(found, injected(pipeline, LABELS))


@pytest.mark.parametrize("kind", ["ddpm", "flow"])
def test_no_class_is_the_null_class_to_the_bit(kind):
    pipeline = MAKE[kind](tiny_unet(null_class=True))
    with counted(pipeline.unet) as calls:
        found = sampled(pipeline, guidance_scale=0)
    assert numpy.array_equal(found, injected(pipeline, torch.full_like(LABELS, CLASSES))) and calls == [3] * 4


def by_hand(pipeline, scale, interval, timesteps, step):
    """Samples in float64, by ``step(output, number, x)`` of a guided network; returns images in [0, 1]."""
    unet = pipeline.unet.double()
    x = torch.cat([torch.randn(1, 1, 8, 8, generator=generator) for generator in generators()]).double()
    with torch.no_grad():
        for number, t in enumerate(timesteps):
            told = unet(x, t, class_labels=LABELS).sample
            if interval[0] <= t / 1000 <= interval[1]:
                without = unet(x, t, class_labels=torch.full_like(LABELS, CLASSES)).sample
                told = scale * told + (1 - scale) * without
            x = step(told, number, x)
    unet.float()
    return (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.499, 0.749)])
@pytest.mark.parametrize("scale", [0.5, 3.0])
def test_guided_ddim_is_that_of_a_sampler_in_float64(scale, interval):
    pipeline = pipeline_of(tiny_unet(null_class=True), "ddim", "v_prediction")
    timesteps = [999, 749, 499, 249]  # trailing
    kept = [*pipeline.scheduler.alphas_cumprod[timesteps].double(), pipeline.scheduler.final_alpha_cumprod.double()]

    def step(v, number, x):
        now, then = kept[number : number + 2]
        x0 = (now.sqrt() * x - (1 - now).sqrt() * v).clamp(-1, 1)
        noise = now.sqrt() * v + (1 - now).sqrt() * x
        return then.sqrt() * x0 + (1 - then).sqrt() * noise

    with counted(pipeline.unet) as calls:
        found = sampled(pipeline, guidance_scale=scale, guidance_interval=interval)
    assert calls == ([6] * 4 if interval == (0.0, 1.0) else [3, 6, 6, 3])
    numpy.testing.assert_allclose(found, by_hand(pipeline, scale, interval, timesteps, step), atol=2e-5)
    assert numpy.abs(found - sampled(pipeline)).max() > 0.01


def test_guided_flow_is_that_of_a_sampler_in_float64():
    pipeline = flow_of(tiny_unet(null_class=True))
    pipeline.scheduler.set_timesteps(4)
    sigmas = pipeline.scheduler.sigmas.double()
    wanted = by_hand(pipeline, 2.0, (0.3, 1.0), 1000 * sigmas[:-1], lambda v, number, x: x + (sigmas[number + 1] - sigmas[number]) * v)
    numpy.testing.assert_allclose(sampled(pipeline, guidance_scale=2.0, guidance_interval=(0.3, 1.0)), wanted, atol=2e-5)


def test_samplers_with_sigmas_guide_latents_as_ddim_does(vae):
    images = []
    for name in ("ddim", "euler"):
        pipeline = take_scheduler(latents_of(vae, "ddim", null_class=True), name)
        options = {"steps": 3, "seed": 0, "batch_size": 2, "device": CPU, "guidance_scale": 2.0}
        images.append(sample_images(pipeline, 4, **options).astype(int))
    assert numpy.abs(images[0] - images[1]).max() <= 1 and len(numpy.unique(images[0])) > 10


def test_what_it_returns():
    pipeline = class_pipeline(pipeline_of(tiny_unet(null_class=True)))
    assert isinstance(pipeline, ClassConditionalPipeline) and pipeline.num_classes == CLASSES
    pipeline.set_progress_bar_config(disable=True)
    kinds = {kind: pipeline([1, 2], 2.0, generator=generators(2), num_inference_steps=2, output_type=kind) for kind in ("pil", "np", "pt")}
    assert kinds["np"].images.shape == (2, 8, 8, 1) and torch.equal(
        kinds["pt"].images, torch.from_numpy(kinds["np"].images).permute(0, 3, 1, 2)
    )
    assert [numpy.asarray(image).tolist() for image in kinds["pil"].images] == (255 * kinds["np"].images).round()[..., 0].tolist()
    (one,) = pipeline(1, generator=torch.Generator().manual_seed(0), num_inference_steps=2, return_dict=False)
    assert len(one) == 1 and one[0].size == (8, 8)


@pytest.mark.parametrize(
    ("null_class", "options", "message"),
    [
        (True, {"class_labels": [CLASSES]}, "class_labels must be numbers from 0 to 3"),
        (True, {"class_labels": [-1]}, "class_labels must be numbers from 0 to 3"),
        (True, {"class_labels": []}, "class_labels must be numbers from 0 to 3"),
        (False, {"guidance_scale": 1.5}, "guidance_scale 1.5: this network was always told the class"),
        (False, {"guidance_scale": 0}, "guidance_scale 0: this network"),
        (True, {"guidance_interval": (0.5, 0.2)}, "guidance_interval must be two numbers from 0 to 1"),
        (True, {"guidance_interval": (0.5, 1.2)}, "guidance_interval must be two numbers from 0 to 1"),
        (True, {"generator": generators(2)}, "generator holds 2 generators for 3 images"),
    ],
)
def test_mistakes_are_one_line(null_class, options, message):
    pipeline = class_pipeline(pipeline_of(tiny_unet(null_class=null_class)))
    with pytest.raises(ValueError, match=message):
        pipeline(**{"class_labels": LABELS, **options})


def test_a_network_without_classes_is_named():
    with pytest.raises(ValueError, match="told no classes"):
        ClassConditionalPipeline(**pipeline_of(tiny_unet(None)).components)(LABELS)


def test_its_file_needs_torch_and_diffusers_alone():
    nodes = [node for node in ast.walk(ast.parse(CLASS_PIPELINE.read_text())) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert not any(getattr(node, "level", 0) for node in nodes)
    roots = {(name.name if isinstance(node, ast.Import) else node.module).partition(".")[0] for node in nodes for name in node.names}
    assert roots - sys.stdlib_module_names == {"torch", "diffusers"}
