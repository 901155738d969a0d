"""The parts of a tiny Stable Diffusion 3 or 3.5 checkpoint with random weights; `make_tiny_sd` trains its VAE and writes it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, SD3Transformer2DModel, StableDiffusion3Pipeline
    from transformers import CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel, T5Tokenizer

VERSIONS = ("3", "3.5")
CLIP_WIDTHS = {"text_encoder": 32, "text_encoder_2": 48}  # of CLIP-L and CLIP-G, whose states stand side by side
JOINT_WIDTH = 96  # T5's, to which theirs are filled up with zeros


def sd3_pipeline(
    build_tokenizer: Callable[[str], CLIPTokenizer], texts: Iterable[str], version: str, *, sample_size: int, with_t5: bool = True
) -> StableDiffusion3Pipeline:
    """What `diffusers.StableDiffusion3Pipeline.from_pretrained` loads once it is saved; weights are drawn from the global generator.

    Args:
        build_tokenizer: of a CLIP model, by what it fills texts up with.
        texts: whose words are T5's vocabulary.
        version: of `VERSIONS`; 3.5 has normalized queries and keys, and a second attention in the first block.
        sample_size: of its images, in pixels.
        with_t5: without, the third encoder and its tokenizer are absent, as in checkpoints that were made small.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    tokenizers = [build_tokenizer(pad_token) for pad_token in ("<|endoftext|>", "!")]
    encoders = {name: _clip(tokenizer, width, name) for (name, width), tokenizer in zip(CLIP_WIDTHS.items(), tokenizers, strict=True)}
    third = _t5_tokenizer(texts) if with_t5 else None
    vae = _vae(sample_size)
    return StableDiffusion3Pipeline(
        vae=vae,
        **encoders,
        text_encoder_3=None if third is None else _t5(third),
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        tokenizer_3=third,
        transformer=_transformer(vae, version),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def _vae(sample_size: int) -> AutoencoderKL:
    """Three halvings and sixteen channels, without the convolutions around the latents, as in Stable Diffusion 3."""
    from diffusers import AutoencoderKL

    channels = (16, 16, 32, 32)
    return AutoencoderKL(
        sample_size=sample_size,
        block_out_channels=channels,
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=16,
        shift_factor=0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
    ).eval()


def _clip(tokenizer: CLIPTokenizer, width: int, name: str) -> CLIPTextModelWithProjection:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        projection_dim=width,
        hidden_act="quick_gelu" if name == "text_encoder" else "gelu",
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModelWithProjection(config).eval()


def _t5(tokenizer: T5Tokenizer) -> T5EncoderModel:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=len(tokenizer), d_model=JOINT_WIDTH, d_kv=16, d_ff=128, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu"
    )
    return T5EncoderModel(config).eval()


def _t5_tokenizer(texts: Iterable[str]) -> T5Tokenizer:
    """T5's tokenizer over the words of ``texts``, the commonest likeliest, and the letters and signs of ASCII for others."""
    from transformers import T5Tokenizer

    words = Counter(f"▁{word}" for text in texts for word in re.findall(r"\S+", text))
    letters = [chr(code) for code in range(33, 127)]
    pieces: list[tuple[str, float]] = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(word, -1.0 - 0.001 * place) for place, (word, _) in enumerate(sorted(words.items(), key=lambda item: (-item[1], item[0])))]
    pieces += [(piece, -20.0) for piece in ("▁", *letters) if piece not in words]
    kind: Any = T5Tokenizer
    return kind(vocab=pieces, extra_ids=0, model_max_length=512)


def _transformer(vae: AutoencoderKL, version: str) -> SD3Transformer2DModel:
    from diffusers import SD3Transformer2DModel

    newer: dict[str, Any] = {"qk_norm": "rms_norm", "dual_attention_layers": (0,)} if version == "3.5" else {}
    return SD3Transformer2DModel(
        sample_size=vae.config.sample_size // 8,
        in_channels=vae.config.latent_channels,
        out_channels=vae.config.latent_channels,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        caption_projection_dim=64,
        joint_attention_dim=JOINT_WIDTH,
        pooled_projection_dim=sum(CLIP_WIDTHS.values()),
        pos_embed_max_size=16,
        **newer,
    ).eval()
