"""Stable Diffusion 1.x and 2.x: the parts of a checkpoint, how a batch becomes latents and text states, and what a run leaves."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from .checkpoints import PARTIAL, adapted, replace, save_adapters
from .encoding import Encoded
from .errors import UserError
from .evaluation import evaluation_weights, image_grid, sample_images
from .models import learning_rate
from .randomness import Draws
from .run import grid_path

if TYPE_CHECKING:
    from accelerate import Accelerator
    from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    from .data import Images
    from .text_config import TextToImageConfig

logger = logging.getLogger(__name__)

PIPELINE = "StableDiffusionPipeline"
ATTENTION = ["to_k", "to_q", "to_v", "to_out.0"]  # what diffusers' LoRA example adapts
PRECISIONS: dict[str, torch.dtype] = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass
class StableDiffusion:
    """The parts of a checkpoint; VAE and text encoder are frozen.

    Args:
        unet: what is trained, fp32; with adapters its own weights are frozen.
        vae: images to latents and back.
        text_encoder: token ids to text states.
        tokenizer: of the text encoder.
        scheduler: the noise process, with the prediction type that is trained.
        name: where the checkpoint is.
        options: ``revision``, ``variant`` and ``cache_dir`` for loading further parts.
    """

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    scheduler: DDPMScheduler
    name: str
    options: dict[str, Any]


def load_stable_diffusion(config: TextToImageConfig, *, from_scratch: bool) -> StableDiffusion:
    """The checkpoint of ``--pretrained_model_name_or_path``; ``from_scratch`` gives the U-Net fresh weights from the global generator.

    Raises:
        UserError: it cannot be loaded, or is no Stable Diffusion 1.x or 2.x.
    """
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    name = str(config.pretrained_model_name_or_path)
    _check_family(name, config)
    common = {"revision": config.revision, "cache_dir": config.cache_dir}
    options = {**common, "variant": config.variant}
    unet_options = {**options, "revision": config.non_ema_revision or config.revision}
    try:
        scheduler = DDPMScheduler.from_pretrained(name, subfolder="scheduler", **common)
        tokenizer = CLIPTokenizer.from_pretrained(name, subfolder="tokenizer", **common)
        text_encoder = CLIPTextModel.from_pretrained(name, subfolder="text_encoder", **options)
        vae = AutoencoderKL.from_pretrained(name, subfolder="vae", **options)
        if from_scratch:
            settings = UNet2DConditionModel.load_config(name, subfolder="unet", **common)
            unet = UNet2DConditionModel.from_config(settings)
        else:
            unet = UNet2DConditionModel.from_pretrained(name, subfolder="unet", **unet_options)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"--pretrained_model_name_or_path {name}: cannot be loaded ({_first_line(error)})", exit_code=1) from None
    if config.prediction_type is not None:
        scheduler.register_to_config(prediction_type=config.prediction_type)
    prediction = scheduler.config.prediction_type
    if config.dream_training and prediction != "epsilon":
        raise UserError(f"--dream_training needs epsilon-prediction, and {name} predicts {prediction}")
    for part in (vae, text_encoder):
        part.requires_grad_(False).eval()
    return StableDiffusion(unet.float(), vae, text_encoder, tokenizer, scheduler, name, options)


def _check_family(name: str, config: TextToImageConfig) -> None:
    from diffusers import DiffusionPipeline

    try:
        found = DiffusionPipeline.load_config(name, revision=config.revision, cache_dir=config.cache_dir)
    except (OSError, ValueError) as error:
        raise UserError(
            f"--pretrained_model_name_or_path {name}: no diffusers checkpoint found there ({_first_line(error)})", exit_code=1
        ) from None
    family = found.get("_class_name", "an unnamed pipeline")
    parts = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
    if "text_encoder_2" in found or "transformer" in found or not all(part in found for part in parts):
        raise UserError(
            f"--pretrained_model_name_or_path {name} is a {family}: these scripts train Stable Diffusion 1.x and 2.x ({PIPELINE}) only, "
            f"not SDXL, SD3 or Flux"
        )


def add_adapters(unet: UNet2DConditionModel, rank: int, dtype: torch.dtype) -> None:
    """Freezes the U-Net in ``dtype`` and gives its attention trainable low-rank adapters, always fp32.

    Raises:
        UserError: peft is not installed.
    """
    if find_spec("peft") is None:
        raise UserError("--use_lora needs peft: `pip install peft`")
    from diffusers.training_utils import cast_training_params
    from peft import LoraConfig

    unet.requires_grad_(False).to(dtype=dtype)
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=ATTENTION))
    cast_training_params(unet, dtype=torch.float32)


@dataclass(frozen=True)
class TextToImageEncoder:
    """Images to latents, captions to text states; both without gradient, in the networks' own precision.

    A latent is a fresh draw from the VAE's posterior each time: mean + deviation * normal, times the VAE's scaling factor, in fp32.

    Args:
        parts: of the checkpoint; VAE and text encoder already on the device.
        device: where training happens.
        empty_prompts: share of the images whose caption is left empty, drawn for each image.
        pooled_labels: give couplings the captions' pooled text states for labels, where the batch has no classes.
    """

    parts: StableDiffusion
    device: torch.device
    empty_prompts: float = 0.0
    pooled_labels: bool = False

    @torch.no_grad()
    def __call__(self, batch: Images, draws: Draws) -> Encoded:
        """See `Encoded`: ``x0`` are latents [B, 4, H/8, W/8], the condition is ``encoder_hidden_states`` [B, L, E]."""
        vae, captions = self.parts.vae, list(batch.captions or ())
        posterior = vae.encode(batch.x0.to(self.device, vae.dtype, non_blocking=True)).latent_dist
        mean, deviation = posterior.mean.float(), posterior.std.float()
        x0 = (mean + deviation * draws.normal("latent", *mean.shape)) * vae.config.scaling_factor
        if self.empty_prompts:
            dropped = draws.uniform("empty_prompt", len(captions)) < self.empty_prompts
            captions = ["" if drop else caption for caption, drop in zip(captions, dropped.tolist(), strict=True)]
        states, pooled = text_states(self.parts, captions, self.device)
        labels = None if batch.labels is None else batch.labels.to(self.device)
        if labels is None and self.pooled_labels:
            labels = pooled.float()
        return Encoded(x0, labels, {"encoder_hidden_states": states})


def text_states(parts: StableDiffusion, captions: Sequence[str], device: torch.device) -> tuple[Tensor, Tensor]:
    """The text encoder's states [B, L, E] and pooled states [B, E] of captions, cut off at its length."""
    words = parts.tokenizer(
        list(captions), max_length=parts.tokenizer.model_max_length, padding="max_length", truncation=True, return_tensors="pt"
    )
    output = parts.text_encoder(words.input_ids.to(device))
    return output.last_hidden_state, output.pooler_output


def place(parts: StableDiffusion, config: TextToImageConfig, accelerator: Accelerator) -> None:
    """Moves the parts to the device: frozen ones in the run's precision, trained weights in fp32; adds adapters with ``--use_lora``."""
    dtype = PRECISIONS[accelerator.mixed_precision]
    for part in (parts.vae, parts.text_encoder):
        part.to(accelerator.device, dtype=dtype)
    if config.use_lora:
        add_adapters(parts.unet, config.rank, dtype)
    parts.unet.to(accelerator.device)


def build_text_optimizer(unet: nn.Module, config: TextToImageConfig, accelerator: Accelerator) -> torch.optim.Optimizer:
    """AdamW of the trained weights, with 8-bit states if the flags ask for them.

    Raises:
        UserError: bitsandbytes is not installed, or there is no GPU for it.
    """
    kind: Any = torch.optim.AdamW
    if config.use_8bit_adam:
        if find_spec("bitsandbytes") is None:
            raise UserError("--use_8bit_adam needs bitsandbytes: `pip install bitsandbytes`")
        kind = import_module("bitsandbytes").optim.AdamW8bit
    trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    betas = (config.adam_beta1, config.adam_beta2)
    optimizer: torch.optim.Optimizer = kind(
        trained, lr=config.learning_rate, betas=betas, weight_decay=config.adam_weight_decay, eps=config.adam_epsilon
    )
    return optimizer


def text_learning_rate(
    config: TextToImageConfig, optimizer: torch.optim.Optimizer, max_steps: int, processes: int
) -> Callable[[int], float]:
    """As `learning_rate`, times the images of a step with ``--scale_lr``."""
    rate = learning_rate(config, optimizer, max_steps)
    factor = config.gradient_accumulation_steps * config.train_batch_size * processes if config.scale_lr else 1
    return lambda step: factor * rate(step)


class _OffloadedEMA(EMAModel):
    """An average that lives in host memory and visits the weights' device for its update, where it is quick."""

    def step(self, parameters: Iterable[nn.Parameter]) -> None:
        weights = list(parameters)
        self.to(weights[0].device)
        super().step(weights)
        self.to("cpu")


def build_text_ema(unet: UNet2DConditionModel, config: TextToImageConfig, device: torch.device) -> EMAModel | None:
    """The moving average of diffusers' text-to-image example, or None: decay ``(1 + n) / (10 + n)`` up to 0.9999."""
    if not config.use_ema:
        return None
    kind: Any = _OffloadedEMA if config.offload_ema else EMAModel
    ema: EMAModel = kind(unet.parameters(), model_cls=type(unet), model_config=unet.config, foreach=config.foreach_ema)
    ema.to("cpu" if config.offload_ema else device)
    return ema


def build_text_pipeline(parts: StableDiffusion) -> StableDiffusionPipeline:
    """The checkpoint's own pipeline with the U-Net in training, and its own sampler told the prediction type that is trained.

    Whatever else the checkpoint holds (a safety checker) is left as the checkpoint has it in a saved pipeline, and not loaded here.
    """
    import diffusers

    common = {"revision": parts.options["revision"], "cache_dir": parts.options["cache_dir"]}
    index = diffusers.DiffusionPipeline.load_config(parts.name, **common)
    scheduler = getattr(diffusers, index["scheduler"][1]).from_pretrained(parts.name, subfolder="scheduler", **common)
    scheduler.register_to_config(prediction_type=parts.scheduler.config.prediction_type)
    return diffusers.StableDiffusionPipeline(
        vae=parts.vae,
        text_encoder=parts.text_encoder,
        tokenizer=parts.tokenizer,
        unet=parts.unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def save_prompt_grid(parts: StableDiffusion, ema: EMAModel | None, config: TextToImageConfig, seed: int, step: int) -> None:
    """A grid of samples of the validation prompts, with the same noises at every step, in ``samples/``."""
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


def save_text_pipeline(parts: StableDiffusion, ema: EMAModel | None, folder: Path, card: str) -> None:
    """Leaves in ``folder`` what plain diffusers samples: the whole pipeline, or the adapters alone, and the model card.

    With EMA the pipeline holds the averaged weights.
    """
    partial = folder / f"{PARTIAL}pipeline"
    shutil.rmtree(partial, ignore_errors=True)
    if adapted(parts.unet):
        partial.mkdir(parents=True)
        save_adapters(parts.unet, partial)
    else:
        with evaluation_weights(parts.unet, ema):
            build_text_pipeline(parts).save_pretrained(partial)
    (partial / "README.md").write_text(card)
    for item in sorted(partial.iterdir(), key=lambda path: path.name == "model_index.json"):  # last: it makes the folder a pipeline
        replace(item, folder / item.name)
    partial.rmdir()


def text_model_card(parts: StableDiffusion, title: str, facts: dict[str, str]) -> str:
    """What a reader of the saved model needs: how to sample it, and how it was trained."""
    rows = "\n".join(f"| {name.replace('_', ' ')} | {value} |" for name, value in facts.items())
    if adapted(parts.unet):
        load = f'StableDiffusionPipeline.from_pretrained("{parts.name}")\npipeline.load_lora_weights("THIS_FOLDER")'
    else:
        load = 'StableDiffusionPipeline.from_pretrained("THIS_FOLDER")'
    tags = "[diffusers, stable-diffusion, text-to-image, immiscible-diffusion]"
    return f"""---
library_name: diffusers
pipeline_tag: text-to-image
base_model: {parts.name}
tags: {tags}
---

# {title}

```python
from diffusers import StableDiffusionPipeline

pipeline = {load}
image = pipeline("a prompt").images[0]
```

How it was trained (`config.yaml` holds every flag):

| | |
|---|---|
{rows}
"""


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
