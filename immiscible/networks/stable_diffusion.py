"""Stable Diffusion 1.x and 2.x: the parts of a checkpoint, where they are placed for training, adapters, and text states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from immiscible.errors import UserError, first_line
from immiscible.networks.arguments import TextModelArguments
from immiscible.networks.dit import build_dit, text_dit_config
from immiscible.networks.kinds import part_of, told_pooled
from immiscible.networks.latents import latent_downsampling, refuse_single_file
from immiscible.networks.weights import LOAD_ERRORS, PRECISIONS, weights_digest

if TYPE_CHECKING:
    from accelerate import Accelerator
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    from immiscible.networks.diffusion_transformers import TextDiTTransformer2DModel

PIPELINE = "StableDiffusionPipeline"
TEXT_PIPELINE = "PooledTextPipeline"  # ours, of a transformer in the U-Net's place: `immiscible.sampling.text_pipeline`
LEAST_SIGNAL = 1e-6  # of alpha_bar at the last step; Stable Diffusion's is 0.0047
ATTENTION = ["to_k", "to_q", "to_v", "to_out.0"]  # what diffusers' LoRA example adapts


@dataclass
class StableDiffusion:
    """The parts of a checkpoint; VAE and text encoder are frozen.

    Args:
        network: what is trained, fp32: the U-Net, of which with adapters its own weights are frozen, or a transformer in its place.
        vae: images to latents and back.
        text_encoder: token ids to text states.
        tokenizer: of the text encoder.
        scheduler: the noise process, with the prediction type that is trained.
        name: where the checkpoint is.
        options: ``revision``, ``variant`` and ``cache_dir`` for loading further parts.
        digest: tells the weights that stay as they are from others, so that a run is not resumed on another checkpoint.
        pretrained_prediction: the checkpoint's own prediction type.
    """

    network: UNet2DConditionModel | TextDiTTransformer2DModel
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
        configs = {part_of(self.network): self.network.config, "vae": self.vae.config, "scheduler": self.scheduler.config}
        settings = {part: {name: value for name, value in config.items() if not name.startswith("_")} for part, config in configs.items()}
        return {**settings, "frozen": self.digest}


def load_stable_diffusion(arguments: TextModelArguments, *, resolution: int, cache_dir: str | None, from_scratch: bool) -> StableDiffusion:
    """The checkpoint of ``--pretrained_model_name_or_path``, on the CPU.

    Args:
        arguments: which checkpoint, and what it shall predict; with ``use_lora`` the digest is of the U-Net's own weights too.
        resolution: of the run's images. The network's ``sample_size`` becomes its, at which pipelines then sample by default.
        cache_dir: where models of the hub are kept.
        from_scratch: gives the U-Net fresh weights, drawn from the global generator. A transformer has no others.

    Raises:
        UserError: it cannot be loaded, is no Stable Diffusion 1.x or 2.x, or does not go with the flags.
    """
    name = str(arguments.pretrained_model_name_or_path)
    refuse_single_file("--pretrained_model_name_or_path", name, PIPELINE)
    common = {"revision": arguments.revision, "cache_dir": cache_dir}
    _check_family(name, common, with_unet=not arguments.model_preset)
    try:
        parts = _load_parts(arguments, {**common, "variant": arguments.variant}, resolution, from_scratch)
    except UserError:
        raise
    except LOAD_ERRORS as error:
        raise UserError(f"--pretrained_model_name_or_path {name}: cannot be loaded ({first_line(error)})", exit_code=1) from None
    if arguments.prediction_type is not None:
        parts.scheduler.register_to_config(prediction_type=arguments.prediction_type)
    _check_parts(parts)
    _check_end(parts)
    factor = latent_downsampling(parts.vae)
    if resolution % factor:
        raise UserError(f"--resolution {resolution} must be a multiple of {factor}, by which the VAE of {name} divides images")
    parts.network.register_to_config(sample_size=resolution // factor)
    frozen = [parts.vae, parts.text_encoder, *([parts.network] if arguments.use_lora else [])]
    parts.digest = " ".join(map(weights_digest, frozen))
    return parts


def _load_parts(arguments: TextModelArguments, options: dict[str, Any], resolution: int, from_scratch: bool) -> StableDiffusion:
    """The parts as they are in the checkpoint; ``options`` are those of its revision, variant and cache."""
    from diffusers import DDPMScheduler
    from transformers import CLIPTokenizer

    name = str(arguments.pretrained_model_name_or_path)
    common = {"revision": options["revision"], "cache_dir": options["cache_dir"]}
    scheduler = DDPMScheduler.from_pretrained(name, subfolder="scheduler", **common)
    tokenizer = CLIPTokenizer.from_pretrained(name, subfolder="tokenizer", **common)
    vae, text_encoder = load_frozen(name, options)
    limit_length(tokenizer, text_encoder)
    if arguments.model_preset:
        latents = {"channels": vae.config.latent_channels, "downsampling": latent_downsampling(vae)}
        width = text_encoder.config.hidden_size
        network: Any = build_dit(text_dit_config(arguments.model_preset, resolution=resolution, width=width, **latents))
    else:
        network = _load_unet(name, {**options, "revision": arguments.non_ema_revision or arguments.revision}, from_scratch)
    own = scheduler.config.prediction_type
    return StableDiffusion(network.float(), vae, text_encoder, tokenizer, scheduler, name, options, pretrained_prediction=own)


def _load_unet(name: str, options: dict[str, Any], from_scratch: bool) -> UNet2DConditionModel:
    """The checkpoint's, or one of its configuration with fresh weights."""
    from diffusers import UNet2DConditionModel

    if not from_scratch:
        return UNet2DConditionModel.from_pretrained(name, subfolder="unet", **options)
    common = {key: value for key, value in options.items() if key != "variant"}
    return UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(name, subfolder="unet", **common))


def limit_length(tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel) -> None:
    """Lets a tokenizer cut at what the text encoder reads; some name no length, which `transformers` takes for 10**30."""
    longest = getattr(text_encoder.config, "max_position_embeddings", None)
    if longest is not None:  # encoders of other families have none
        tokenizer.model_max_length = min(tokenizer.model_max_length, longest)


def load_frozen(name: str, options: dict[str, Any]) -> tuple[AutoencoderKL, CLIPTextModel]:
    """VAE and text encoder of a checkpoint, fp32, without gradient, on the CPU; ``options`` as in `StableDiffusion`."""
    from diffusers import AutoencoderKL
    from transformers import CLIPTextModel

    vae = AutoencoderKL.from_pretrained(name, subfolder="vae", **options)
    text_encoder = CLIPTextModel.from_pretrained(name, subfolder="text_encoder", **options)
    for part in (vae, text_encoder):
        part.float().requires_grad_(False).eval()
    return vae, text_encoder


def _check_family(name: str, options: dict[str, Any], *, with_unet: bool) -> None:
    """Looks at what the checkpoint says it is, and whether it has all parts, of which a U-Net is not always wanted; loads nothing."""
    import diffusers

    try:
        found = diffusers.DiffusionPipeline.load_config(name, **options)
    except (OSError, ValueError) as error:
        raise UserError(
            f"--pretrained_model_name_or_path {name}: no diffusers checkpoint found there ({first_line(error)}); check the name and, "
            f"for one on the hub, the network",
            exit_code=1,
        ) from None
    family = found.get("_class_name", "an unnamed pipeline")
    parts = (*(["unet"] if with_unet else []), "vae", "text_encoder", "tokenizer", "scheduler")
    if "text_encoder_2" in found or ("transformer" in found and family != TEXT_PIPELINE):
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


def _check_parts(parts: StableDiffusion) -> None:
    """Whether they go together, and are what is trained here."""
    named = f"--pretrained_model_name_or_path {parts.name}"
    if not told_pooled(parts.network):
        _check_unet(parts, named)
    words = parts.tokenizer("a photograph").input_ids
    if set(words) <= set(parts.tokenizer.all_special_ids):  # made up where the files of words are not there
        raise UserError(f"{named}: its tokenizer knows no words; is its vocabulary there?", exit_code=1)


def _check_unet(parts: StableDiffusion, named: str) -> None:
    """Whether the U-Net takes the VAE's latents and the text encoder's states, and nothing else."""
    unet: Any = parts.network
    channels, latent_channels = unet.config.in_channels, parts.vae.config.latent_channels
    if channels != latent_channels or unet.config.class_embed_type or unet.config.num_class_embeds:
        raise UserError(
            f"{named}: its U-Net takes {channels} channels or class labels, not the VAE's {latent_channels} "
            f"channels and a prompt alone; these scripts train text-to-image checkpoints, not inpainting, upscaling or depth models"
        )
    width, wanted = parts.text_encoder.config.hidden_size, unet.config.cross_attention_dim
    if isinstance(wanted, int) and width != wanted:
        raise UserError(f"{named}: its U-Net takes text states of width {wanted}, its text encoder gives {width}")


def _check_end(parts: StableDiffusion) -> None:
    """Whether the last noise level leaves something to predict."""
    scheduler = parts.scheduler
    if scheduler.config.prediction_type == "epsilon" and float(scheduler.alphas_cumprod[-1]) < LEAST_SIGNAL:
        raise UserError(
            f"--pretrained_model_name_or_path {parts.name}: its scheduler ends in pure noise (rescale_betas_zero_snr), where epsilon tells "
            f"nothing of the image; give --prediction_type v_prediction, or set rescale_betas_zero_snr to false in its "
            f"scheduler/scheduler_config.json"
        )


def initial_weights(name: str, *, from_scratch: bool, rank: int | None, preset: str | None = None) -> str:
    """With which weights a network begins, in words, for the start of the run and the model card.

    Args:
        name: of the checkpoint.
        from_scratch: whether it has fresh ones.
        rank: of its adapters; None without.
        preset: of a transformer in the U-Net's place; None of a U-Net.
    """
    if preset:
        return f"random, of {preset}, which is told the pooled text state in the place of the U-Net of {name}"
    if from_scratch:
        return f"random, not those of {name}, with which finetune_sd.py begins"
    return f"those of {name}" + ("" if rank is None else f", frozen, with adapters of rank {rank}")


def place(parts: StableDiffusion, accelerator: Accelerator, *, rank: int | None, idle: bool) -> None:
    """Moves the parts to the device: frozen ones in the run's precision, trained weights in fp32.

    Args:
        parts: as loaded.
        accelerator: gives device and precision.
        rank: of the adapters that the U-Net gets; None leaves it to be trained whole.
        idle: leave VAE and text encoder in host memory, where nothing is encoded; sampling moves them.

    Raises:
        UserError: accelerate is configured for a precision that these networks are not trained in; or peft is not installed.
    """
    if accelerator.mixed_precision not in PRECISIONS:
        raise UserError(f"--mixed_precision {accelerator.mixed_precision} is not supported here; give no, fp16 or bf16")
    dtype = PRECISIONS[accelerator.mixed_precision]
    place_frozen(parts, torch.device("cpu") if idle else accelerator.device, dtype)
    if rank is not None:
        add_adapters(parts.network, rank, dtype)
    parts.network.to(accelerator.device).train()


def place_frozen(parts: StableDiffusion, device: torch.device, dtype: torch.dtype) -> None:
    """Moves VAE and text encoder to ``device``, in ``dtype``."""
    for part in (parts.vae, parts.text_encoder):
        nn.Module.to(part, device=device, dtype=dtype)  # diffusers' own `to` warns of every cast, naming an empty list of modules


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


def text_states(parts: StableDiffusion, captions: Sequence[str], device: torch.device) -> tuple[Tensor, Tensor]:
    """The text encoder's states [B, L, E] and pooled states [B, E] of captions, cut off at its length."""
    words = parts.tokenizer(
        list(captions), max_length=parts.tokenizer.model_max_length, padding="max_length", truncation=True, return_tensors="pt"
    )
    output = parts.text_encoder(words.input_ids.to(device))
    return output.last_hidden_state, output.pooler_output
