"""The parts of a tiny Stable Diffusion XL checkpoint with random weights; `make_tiny_sd` trains its VAE and writes it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTokenizer

CLIP_WIDTHS = (32, 48)  # of the first text encoder and the second, whose states stand side by side
PROJECTED = 40  # numbers of the second one's pooled state
TIME_WIDTH = 8  # of the embedding of each of the six sizes


def sdxl_pipeline(vae: AutoencoderKL, build_tokenizer: Callable[[str], CLIPTokenizer]) -> StableDiffusionXLPipeline:
    """What `diffusers.StableDiffusionXLPipeline.from_pretrained` loads once it is saved; weights are drawn from the global generator.

    Args:
        vae: of any size.
        build_tokenizer: makes one of CLIP, given what it pads with; SDXL's second one pads with ``!``.
    """
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    def config(tokenizer: CLIPTokenizer, width: int, activation: str) -> Any:
        return CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=4,
            projection_dim=PROJECTED,
            hidden_act=activation,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )

    tokenizers = build_tokenizer("<|endoftext|>"), build_tokenizer("!")
    return StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(config(tokenizers[0], CLIP_WIDTHS[0], "quick_gelu")).eval(),
        text_encoder_2=CLIPTextModelWithProjection(config(tokenizers[1], CLIP_WIDTHS[1], "gelu")).eval(),
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        unet=_unet(),
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, timestep_spacing="leading"
        ),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )


def _unet() -> UNet2DConditionModel:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        cross_attention_dim=sum(CLIP_WIDTHS),
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME_WIDTH,
        projection_class_embeddings_input_dim=PROJECTED + 6 * TIME_WIDTH,
    ).eval()
