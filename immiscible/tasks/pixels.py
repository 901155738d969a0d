"""Pixels or latents of images, with or without classes."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy

from immiscible.configs import UnconditionalConfig
from immiscible.files import PARTIAL, replace
from immiscible.networks.weights import add_metadata, evaluation_weights
from immiscible.sampling.pipelines import build_pipeline, image_grid, sample_images, sample_labels
from immiscible.training.summary import grid_path

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, SchedulerMixin, UNet2DModel
    from diffusers.training_utils import EMAModel


def save_pipeline(
    unet: UNet2DModel,
    ema: EMAModel | None,
    scheduler: SchedulerMixin,
    config: UnconditionalConfig,
    facts: dict[str, str],
    class_names: Sequence[str] | None = None,
    vae: AutoencoderKL | None = None,
) -> None:
    """Leaves in the run's folder a pipeline that plain diffusers samples, with the model card and the method in the weights' metadata.

    With EMA the pipeline holds the averaged weights, and ``unet_non_ema`` beside it the others. ``class_names`` are the data's; the
    card of a class-conditional network lists them by number. ``vae`` decodes latents, and is saved along.
    """
    folder = Path(config.output_dir or "")
    partial = folder / f"{PARTIAL}pipeline"
    shutil.rmtree(partial, ignore_errors=True)
    if ema is not None:
        unet.save_pretrained(partial / "unet_non_ema")
    with evaluation_weights(unet, ema):
        pipeline = build_pipeline(unet, scheduler, sampler=config.sampling_scheduler, spacing=config.timestep_spacing, vae=vae)
        pipeline.save_pretrained(partial)
    num_classes = unet.config.num_class_embeds
    names = class_names if num_classes and class_names else ()
    for weights in partial.glob("unet*/*.safetensors"):
        add_metadata(weights, facts)
    (partial / "README.md").write_text(_model_card(folder.resolve().name, type(pipeline).__name__, facts, num_classes, names))
    for item in sorted(partial.iterdir(), key=lambda path: path.name == "model_index.json"):  # last: it makes the folder a pipeline
        replace(item, folder / item.name)
    partial.rmdir()


def save_samples(
    unet: UNet2DModel,
    ema: EMAModel | None,
    scheduler: SchedulerMixin,
    config: UnconditionalConfig,
    seed: int,
    step: int,
    vae: AutoencoderKL | None = None,
) -> numpy.ndarray:
    """Writes a grid of samples with the same noises at every step and returns them, uint8 [N, H, W, C]; a class-conditional network's
    are in the order of classes.
    """
    with evaluation_weights(unet, ema):
        pipeline = build_pipeline(unet, scheduler, sampler=config.sampling_scheduler, spacing=config.timestep_spacing, vae=vae)
        images = sample_images(
            pipeline,
            config.eval_batch_size,
            steps=config.ddpm_num_inference_steps,
            seed=seed,
            batch_size=config.eval_batch_size,
            device=unet.device,
        )
    labels = sample_labels(unet, len(images))
    if labels is not None:
        images = images[labels.argsort(stable=True).numpy()]
    path = grid_path(Path(config.output_dir or ""), step)
    path.parent.mkdir(parents=True, exist_ok=True)
    image_grid(images).save(path)
    return images


def _model_card(title: str, pipeline: str, facts: dict[str, str], num_classes: int | None, class_names: Sequence[str]) -> str:
    if num_classes is None:
        example = f"""from diffusers import {pipeline}
image = {pipeline}.from_pretrained("THIS_FOLDER")(num_inference_steps={facts["inference_steps"]}).images[0]"""
    else:
        example = f"""import torch
from diffusers import {pipeline}

pipeline = {pipeline}.from_pretrained("THIS_FOLDER")
labels = torch.arange({min(num_classes, 8)})  # the class of each image, by its number


def tell_classes(unet, args, kwargs):  # the pipeline has no argument for them
    return args, {{**kwargs, "class_labels": labels.to(unet.device)}}


pipeline.unet.register_forward_pre_hook(tell_classes, with_kwargs=True)
images = pipeline(batch_size=len(labels), num_inference_steps={facts["inference_steps"]}).images"""
    classes = "\nClasses:\n\n" + "".join(f"{number}. {name}\n" for number, name in enumerate(class_names)) if class_names else ""
    if pipeline == "LDMPipeline":
        classes = "\nThe VAE is an `AutoencoderKL` where diffusers expects a VQ model, and says so; it decodes as it should.\n" + classes
    rows = "\n".join(f"| {name.replace('_', ' ')} | {value} |" for name, value in facts.items())
    return f"""---
library_name: diffusers
pipeline_tag: unconditional-image-generation
tags: [diffusers, unconditional-image-generation, immiscible-diffusion]
---

# {title}

```python
{example}
```
{classes}
How it was trained (`config.yaml` holds every flag):

| | |
|---|---|
{rows}
"""
