"""Stable Diffusion 1.x and 2.x: the parts of a checkpoint, how a batch becomes latents and text states, and what a run leaves."""

from __future__ import annotations

import copy
import dataclasses
import logging
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import torch
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError
from torch import Tensor, nn

from immiscible.data.sources import ImageSource, Subset, TableImages, load_images
from immiscible.data.streaming import Stream, load_stream
from immiscible.encoding.encoders import PRECISIONS, Encoded, latent_draw
from immiscible.errors import UserError
from immiscible.networks.unet import latent_downsampling, learning_rate, weights_digest
from immiscible.randomness import Draws
from immiscible.sampling.pipelines import evaluation_weights, image_grid, sample_images
from immiscible.training.checkpoints import PARTIAL, adapted, replace, save_adapters
from immiscible.training.run import add_metadata, grid_path

if TYPE_CHECKING:
    from accelerate import Accelerator
    from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    from immiscible.configs import TextToImageConfig
    from immiscible.data.sources import Images

logger = logging.getLogger(__name__)

PIPELINE = "StableDiffusionPipeline"
ATTENTION = ["to_k", "to_q", "to_v", "to_out.0"]  # what diffusers' LoRA example adapts


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
        digest: tells the weights that stay as they are from others, so that a run is not resumed on another checkpoint.
        pretrained_prediction: the checkpoint's own prediction type.
    """

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    scheduler: DDPMScheduler
    name: str
    options: dict[str, Any]
    digest: str = ""
    pretrained_prediction: str = "epsilon"

    @property
    def identity(self) -> dict[str, Any]:
        """What tells these parts from another checkpoint's, wherever they were loaded from."""
        configs = {"unet": self.unet.config, "vae": self.vae.config, "scheduler": self.scheduler.config}
        settings = {part: {name: value for name, value in config.items() if not name.startswith("_")} for part, config in configs.items()}
        return {**settings, "frozen": self.digest}


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


def load_stable_diffusion(config: TextToImageConfig, *, from_scratch: bool) -> StableDiffusion:
    """The checkpoint of ``--pretrained_model_name_or_path``; ``from_scratch`` gives the U-Net fresh weights from the global generator.

    The U-Net's ``sample_size`` becomes that of the run's resolution, at which pipelines then sample by default.

    Raises:
        UserError: it cannot be loaded, is no Stable Diffusion 1.x or 2.x, or does not go with the flags.
    """
    from diffusers import DDPMScheduler, UNet2DConditionModel
    from transformers import CLIPTokenizer

    name = str(config.pretrained_model_name_or_path)
    _check_family(name, config)
    common = {"revision": config.revision, "cache_dir": config.cache_dir}
    options = {**common, "variant": config.variant}
    unet_options = {**options, "revision": config.non_ema_revision or config.revision}
    try:
        scheduler = DDPMScheduler.from_pretrained(name, subfolder="scheduler", **common)
        tokenizer = CLIPTokenizer.from_pretrained(name, subfolder="tokenizer", **common)
        vae, text_encoder = _load_frozen(name, options)
        if from_scratch:
            revision = unet_options["revision"]
            settings = UNet2DConditionModel.load_config(name, subfolder="unet", revision=revision, cache_dir=config.cache_dir)
            unet = UNet2DConditionModel.from_config(settings)
        else:
            unet = UNet2DConditionModel.from_pretrained(name, subfolder="unet", **unet_options)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(f"--pretrained_model_name_or_path {name}: cannot be loaded ({_first_line(error)})", exit_code=1) from None
    pretrained_prediction = scheduler.config.prediction_type
    if config.prediction_type is not None:
        scheduler.register_to_config(prediction_type=config.prediction_type)
    prediction = scheduler.config.prediction_type
    if config.dream_training and prediction != "epsilon":
        raise UserError(f"--dream_training needs epsilon-prediction, and {name} predicts {prediction}")
    channels, latent_channels = unet.config.in_channels, vae.config.latent_channels
    if channels != latent_channels or unet.config.class_embed_type or unet.config.num_class_embeds:
        raise UserError(
            f"--pretrained_model_name_or_path {name}: its U-Net takes {channels} channels or class labels, not the VAE's {latent_channels} "
            f"channels and a prompt alone; these scripts train text-to-image checkpoints, not inpainting, upscaling or depth models"
        )
    width, wanted = text_encoder.config.hidden_size, unet.config.cross_attention_dim
    if isinstance(wanted, int) and width != wanted:
        raise UserError(
            f"--pretrained_model_name_or_path {name}: its U-Net takes text states of width {wanted}, its text encoder gives {width}"
        )
    if set(tokenizer("a photograph").input_ids) <= set(tokenizer.all_special_ids):  # made up where the files of words are not there
        raise UserError(f"--pretrained_model_name_or_path {name}: its tokenizer knows no words; is its vocabulary there?", exit_code=1)
    factor = latent_downsampling(vae)
    if config.resolution % factor:
        raise UserError(f"--resolution {config.resolution} must be a multiple of {factor}, by which the VAE of {name} divides images")
    unet.register_to_config(sample_size=config.resolution // factor)
    frozen = [vae, text_encoder, *([unet] if config.use_lora else [])]
    digest = " ".join(map(weights_digest, frozen))
    return StableDiffusion(unet.float(), vae, text_encoder, tokenizer, scheduler, name, options, digest, pretrained_prediction)


def _load_frozen(name: str, options: dict[str, Any]) -> tuple[AutoencoderKL, CLIPTextModel]:
    """VAE and text encoder, fp32, without gradient."""
    from diffusers import AutoencoderKL
    from transformers import CLIPTextModel

    vae = AutoencoderKL.from_pretrained(name, subfolder="vae", **options)
    text_encoder = CLIPTextModel.from_pretrained(name, subfolder="text_encoder", **options)
    for part in (vae, text_encoder):
        part.float().requires_grad_(False).eval()
    return vae, text_encoder


def _check_family(name: str, config: TextToImageConfig) -> None:
    import diffusers

    try:
        found = diffusers.DiffusionPipeline.load_config(name, revision=config.revision, cache_dir=config.cache_dir)
    except (OSError, ValueError) as error:
        raise UserError(
            f"--pretrained_model_name_or_path {name}: no diffusers checkpoint found there ({_first_line(error)}); check the name and, "
            f"for one on the hub, the network",
            exit_code=1,
        ) from None
    family = found.get("_class_name", "an unnamed pipeline")
    parts = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
    if "text_encoder_2" in found or "transformer" in found:
        raise UserError(
            f"--pretrained_model_name_or_path {name} is a {family}: these scripts train Stable Diffusion 1.x and 2.x ({PIPELINE}) only, "
            f"not SDXL, SD3 or Flux"
        )
    # A tokenizer that is not there would be made up without words.
    missing = [
        part for part in parts if not all(found.get(part) or [None]) or (Path(name).is_dir() and not any(Path(name, part).glob("*")))
    ]
    if missing:
        raise UserError(
            f"--pretrained_model_name_or_path {name} is a {family} without {', '.join(missing)}; a Stable Diffusion 1.x or 2.x checkpoint "
            f"has {', '.join(parts)}"
        )
    if not hasattr(diffusers, found["scheduler"][1]):
        raise UserError(f"--pretrained_model_name_or_path {name}: diffusers has no {found['scheduler'][1]}, with which it would be sampled")


def add_adapters(unet: UNet2DConditionModel, rank: int, dtype: torch.dtype) -> None:
    """Freezes the U-Net in ``dtype`` and gives its attention trainable low-rank adapters, always fp32.

    Raises:
        UserError: peft is not installed.
    """
    if find_spec("peft") is None:
        raise UserError("--use_lora needs peft: `pip install peft`")
    from diffusers.training_utils import cast_training_params
    from peft import LoraConfig

    nn.Module.to(unet.requires_grad_(False), dtype=dtype)  # see `place_frozen`
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
        captions = list(batch.captions or ())
        x0 = latent_draw(*self.posterior(batch.x0), self.parts.vae.config.scaling_factor, draws)
        if self.empty_prompts:
            dropped = draws.uniform("empty_prompt", len(captions)) < self.empty_prompts
            captions = ["" if drop else caption for caption, drop in zip(captions, dropped.tolist(), strict=True)]
        states, pooled = self.texts(captions)
        labels = None if batch.labels is None else batch.labels.to(self.device)
        if labels is None and self.pooled_labels and pooled is not None:
            labels = pooled.float()
        return Encoded(x0, labels, {"encoder_hidden_states": states})

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the latents of a batch's images, each [B, 4, H/8, W/8]."""
        vae = self.parts.vae
        posterior = vae.encode(images.to(self.device, vae.dtype, non_blocking=True)).latent_dist
        return posterior.mean, posterior.logvar

    def texts(self, captions: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        """The states [B, L, E] and pooled states [B, E] of captions."""
        return text_states(self.parts, captions, self.device)


def text_states(parts: StableDiffusion, captions: Sequence[str], device: torch.device) -> tuple[Tensor, Tensor]:
    """The text encoder's states [B, L, E] and pooled states [B, E] of captions, cut off at its length."""
    words = parts.tokenizer(
        list(captions), max_length=parts.tokenizer.model_max_length, padding="max_length", truncation=True, return_tensors="pt"
    )
    output = parts.text_encoder(words.input_ids.to(device))
    return output.last_hidden_state, output.pooler_output


def place(parts: StableDiffusion, config: TextToImageConfig, accelerator: Accelerator) -> None:
    """Moves the parts to the device: frozen ones in the run's precision, trained weights in fp32; adds adapters with ``--use_lora``.

    A run from cached latents leaves the frozen parts in host memory (sampling moves them), unless images are held out to be encoded.

    Raises:
        UserError: accelerate is configured for a precision that these networks are not trained in.
    """
    if accelerator.mixed_precision not in PRECISIONS:
        raise UserError(f"--mixed_precision {accelerator.mixed_precision} is not supported here; give no, fp16 or bf16")
    dtype = PRECISIONS[accelerator.mixed_precision]
    idle = config.cache_latents and config.validation_split is None
    place_frozen(parts, torch.device("cpu") if idle else accelerator.device, dtype)
    if config.use_lora:
        add_adapters(parts.unet, config.rank, dtype)
    parts.unet.to(accelerator.device).train()


def place_frozen(parts: StableDiffusion, device: torch.device, dtype: torch.dtype) -> None:
    """Moves VAE and text encoder to ``device``, in ``dtype``."""
    for part in (parts.vae, parts.text_encoder):
        nn.Module.to(part, device=device, dtype=dtype)  # diffusers' own `to` warns of every cast, naming an empty list of modules


def initial_weights(config: TextToImageConfig, from_scratch: bool) -> str:
    """With which weights the U-Net begins, for the start of the run and the model card."""
    name = config.pretrained_model_name_or_path
    if from_scratch:
        return f"random, not those of {name}, with which finetune_sd.py begins"
    return f"those of {name}" + (f", frozen, with adapters of rank {config.rank}" if config.use_lora else "")


def build_text_optimizer(unet: nn.Module, config: TextToImageConfig, accelerator: Accelerator) -> torch.optim.Optimizer:
    """AdamW of the trained weights, with 8-bit states if the flags ask for them.

    Raises:
        UserError: bitsandbytes is not installed.
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

    A sampler that cannot sample that type (PNDM and "sample") gives way to DDIM. A safety checker is left out: it would blank samples.
    """
    import diffusers

    common = {"revision": parts.options["revision"], "cache_dir": parts.options["cache_dir"]}
    index = diffusers.DiffusionPipeline.load_config(parts.name, **common)
    prediction_type, kind = parts.scheduler.config.prediction_type, index["scheduler"][1]
    options = {**common, "prediction_type": prediction_type}
    if prediction_type == "sample" and kind == "PNDMScheduler":
        kind, options = "DDIMScheduler", {**options, "clip_sample": False}
    scheduler = getattr(diffusers, kind).from_pretrained(parts.name, subfolder="scheduler", **options)
    side = parts.unet.config.sample_size
    pipeline = diffusers.StableDiffusionPipeline(
        vae=parts.vae,
        text_encoder=parts.text_encoder,
        tokenizer=copy.deepcopy(parts.tokenizer),  # it has state, and the look-ahead thread uses its own
        unet=parts.unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    # Where a checkpoint is as old as Stable Diffusion 1.4, diffusers takes any size below 64 (512 pixels) for a mistake and puts 64 there.
    pipeline.unet.register_to_config(sample_size=side)
    return pipeline


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


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
