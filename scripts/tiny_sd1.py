"""The parts of a tiny Stable Diffusion 1 or 2 checkpoint with random weights; `make_tiny_sd` trains its VAE and writes it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
    from diffusers.schedulers import SchedulerMixin
    from transformers import CLIPTextModel, CLIPTokenizer


def sd1_pipeline(build_tokenizer: Callable[[str], CLIPTokenizer], version: int, *, sample_size: int) -> StableDiffusionPipeline:
    """What `diffusers.StableDiffusionPipeline.from_pretrained` loads once it is saved; weights are drawn from the global generator.

    Args:
        build_tokenizer: of the CLIP model, by what it fills texts up with.
        version: 1 or 2.
        sample_size: of its images, in pixels.
    """
    from diffusers import StableDiffusionPipeline

    tokenizer = build_tokenizer("<|endoftext|>" if version == 1 else "!")
    text_encoder = _build_text_encoder(tokenizer, version)
    unet = _build_unet(text_encoder.config.hidden_size, version)
    return StableDiffusionPipeline(
        vae=sd1_vae(sample_size),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=_build_scheduler(version),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _build_text_encoder(tokenizer: CLIPTokenizer, version: int) -> CLIPTextModel:
    from transformers import CLIPTextConfig, CLIPTextModel

    size = 64 if version == 1 else 96
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=size,
        intermediate_size=2 * size,
        num_hidden_layers=2,
        num_attention_heads=4,
        projection_dim=size,
        hidden_act="quick_gelu" if version == 1 else "gelu",
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config).eval()


def _build_unet(text_size: int, version: int) -> UNet2DConditionModel:
    from diffusers import UNet2DConditionModel

    # diffusers takes attention_head_dim for the number of heads; version 2 has it per block, for heads of one size.
    heads = {"attention_head_dim": 8} if version == 1 else {"attention_head_dim": [2, 4], "use_linear_projection": True}
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=text_size,
        **heads,
    ).eval()


def sd1_vae(sample_size: int) -> AutoencoderKL:
    """Three halvings and four channels."""
    from diffusers import AutoencoderKL

    channels = (16, 16, 32, 32)
    return AutoencoderKL(
        sample_size=sample_size,
        block_out_channels=channels,
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
    ).eval()


def _build_scheduler(version: int) -> SchedulerMixin:
    from diffusers import DDIMScheduler, PNDMScheduler

    schedule = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1, "set_alpha_to_one": False}
    if version == 1:
        return PNDMScheduler(**schedule, skip_prk_steps=True, prediction_type="epsilon")
    return DDIMScheduler(**schedule, clip_sample=False, prediction_type="v_prediction")
