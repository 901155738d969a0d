"""Text-to-image: a Stable Diffusion U-Net trained on captions."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import torch
from diffusers.training_utils import EMAModel

from immiscible.data.loading import load_images
from immiscible.data.sources import ImageSource, Subset, TableImages
from immiscible.data.streaming import Stream, load_stream
from immiscible.errors import UserError
from immiscible.files import PARTIAL, replace
from immiscible.networks.latents import latent_downsampling
from immiscible.networks.stable_diffusion import StableDiffusion, _load_frozen
from immiscible.networks.weights import adapted, add_metadata, evaluation_weights, save_adapters
from immiscible.sampling.pipelines import build_text_pipeline, image_grid, sample_images
from immiscible.training.summary import grid_path

if TYPE_CHECKING:
    from immiscible.configs import TextToImageConfig


def load_captioned_images(config: TextToImageConfig) -> ImageSource | Stream:
    """The images that the flags name, with their captions.

    Raises:
        UserError: as `load_images` or, with ``--streaming``, `load_stream`; or a flag needs classes and the captions are texts.
    """
    named: dict[str, Any] = {
        "dataset_name": config.dataset_name,
        "dataset_config_name": config.dataset_config_name,
        "train_data_dir": config.train_data_dir,
        "image_column": config.image_column,
        "caption_column": config.caption_column,
        "cache_dir": config.cache_dir,
    }
    if config.streaming:
        return load_stream(**named, label_column=config.caption_column if config.labels_for else None, labels_for=config.labels_for)
    source = load_images(
        **named,
        max_train_samples=config.max_train_samples,
        train_subset_fraction=config.train_subset_fraction,
        skip_bad_images=config.skip_bad_images,
    )
    if config.labels_for is None:
        return source
    if prompt_classes(source, config.caption_column) is None:
        raise UserError(
            f"{config.labels_for} needs classes, and --caption_column {config.caption_column} holds texts: name a column of classes "
            f"(ClassLabel); --coupling_condition centered and penalty take texts"
        )
    return _with_classes(source)


def _with_classes(source: ImageSource) -> ImageSource:
    """The same images, their captions' classes for labels."""
    if isinstance(source, Subset):
        return dataclasses.replace(source, source=_with_classes(source.source))
    assert isinstance(source, TableImages)
    return dataclasses.replace(source, labels=source.texts)


def initial_weights(config: TextToImageConfig, from_scratch: bool) -> str:
    """With which weights the U-Net begins, for the start of the run and the model card."""
    name = config.pretrained_model_name_or_path
    if from_scratch:
        return f"random, not those of {name}, with which finetune_sd.py begins"
    return f"those of {name}" + (f", frozen, with adapters of rank {config.rank}" if config.use_lora else "")


def save_prompt_grid(parts: StableDiffusion, ema: EMAModel | None, config: TextToImageConfig, seed: int, step: int) -> numpy.ndarray:
    """Writes a grid of samples of the validation prompts, with the same noises at every step, and returns them, uint8 [N, H, W, 3]."""
    with evaluation_weights(parts.unet, ema):
        images = sample_images(
            build_text_pipeline(parts),
            len(config.prompts),
            steps=config.validation_inference_steps,
            seed=seed,
            batch_size=config.eval_batch_size,
            device=parts.unet.device,
            prompts=config.prompts,
            guidance_scale=config.guidance_scale,
        )
    path = grid_path(Path(config.output_dir or ""), step)
    path.parent.mkdir(parents=True, exist_ok=True)
    image_grid(images).save(path)
    return images


def save_text_pipeline(parts: StableDiffusion, ema: EMAModel | None, folder: Path, facts: dict[str, str]) -> None:
    """Leaves in ``folder`` what plain diffusers samples: the whole pipeline, or the adapters alone, with the model card.

    The method's ``facts`` are in the card and in the metadata of the trained weights.

    With EMA the pipeline holds the averaged weights. All parts are saved in fp32, those that this run rounded anew from the checkpoint.
    """
    partial = folder / f"{PARTIAL}pipeline"
    shutil.rmtree(partial, ignore_errors=True)
    if adapted(parts.unet):
        partial.mkdir(parents=True)
        save_adapters(parts.unet, partial)
    else:
        if parts.vae.dtype != torch.float32:
            vae, text_encoder = _load_frozen(parts.name, parts.options)
            parts = dataclasses.replace(parts, vae=vae, text_encoder=text_encoder)
        with evaluation_weights(parts.unet, ema):
            build_text_pipeline(parts).save_pretrained(partial)
    for weights in [*partial.glob("*.safetensors"), *partial.glob("unet/*.safetensors")]:
        add_metadata(weights, facts)
    grid = max(folder.glob("samples/step-*.png"), default=None)
    (partial / "README.md").write_text(text_model_card(parts, folder.resolve().name, facts, grid and grid.relative_to(folder)))
    for item in sorted(partial.iterdir(), key=lambda path: path.name == "model_index.json"):  # last: it makes the folder a pipeline
        replace(item, folder / item.name)
    partial.rmdir()


def text_model_card(parts: StableDiffusion, title: str, facts: dict[str, str], grid: Path | None) -> str:
    """What a reader of the saved model needs: how to sample it, what that gives (``grid``, if there is one), how it was trained."""
    rows = "\n".join(f"| {name.replace('_', ' ')} | {value} |" for name, value in facts.items())
    lora, arguments = adapted(parts.unet), '"a prompt"'
    if lora:
        load = f'StableDiffusionPipeline.from_pretrained("{parts.name}")\npipeline.load_lora_weights("THIS_FOLDER")'
        trained = parts.scheduler.config.prediction_type
        if trained != parts.pretrained_prediction:
            load += f'\npipeline.scheduler.register_to_config(prediction_type="{trained}")'
        side = parts.unet.config.sample_size * latent_downsampling(parts.vae)
        arguments += f", height={side}, width={side}"  # the base pipeline would sample at its own size
    else:
        load = 'StableDiffusionPipeline.from_pretrained("THIS_FOLDER")'
    samples = f"\n![Samples of the validation prompts]({grid.as_posix()})\n" if grid else ""
    base = "" if Path(parts.name).exists() else f"base_model: {parts.name}\n"  # the hub refuses a card with a path
    tags = f"[diffusers, stable-diffusion, text-to-image, {'lora, ' if lora else ''}immiscible-diffusion]"
    return f"""---
library_name: diffusers
pipeline_tag: text-to-image
{base}tags: {tags}
---

# {title}

```python
from diffusers import StableDiffusionPipeline

pipeline = {load}
image = pipeline({arguments}).images[0]
```
{samples}
How it was trained (`config.yaml` holds every flag):

| | |
|---|---|
{rows}
"""


def prompt_classes(source: ImageSource | Stream, caption_column: str) -> Sequence[str] | None:
    """The names of the classes that the caption column holds, by number; None if it holds texts."""
    while isinstance(source, Subset):
        source = source.source
    texts = getattr(source, "texts", None)
    return None if texts is None else getattr(texts.features[caption_column], "names", None)
