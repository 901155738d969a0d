"""Stable Diffusion 1.x and 2.x: one text encoder, whose states the U-Net is told, or whose pooled one a transformer in its place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from immiscible.networks.arguments import TextModelArguments
from immiscible.networks.checkpoint_parts import CheckpointParts, check_end, check_unet, check_words
from immiscible.networks.dit import build_dit, text_dit_config
from immiscible.networks.kinds import told_pooled
from immiscible.networks.latents import latent_downsampling

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, ModelMixin
    from transformers import PreTrainedModel


@dataclass(kw_only=True)
class StableDiffusion(CheckpointParts):
    """See `CheckpointParts`; text states are ``states`` [B, L, E] and ``pooled`` [B, E] of the text encoder."""

    family = "a Stable Diffusion 1.x or 2.x checkpoint"
    pipeline_class = "StableDiffusionPipeline"
    tag = "stable-diffusion"
    encoder_classes = {"text_encoder": "CLIPTextModel"}
    tokenizer_classes = {"tokenizer": "CLIPTokenizer"}
    in_single_file = {"text_encoder": "cond_stage_model."}

    def encode(self, tokens: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `CheckpointParts.encode`."""
        output = self.text_encoder(tokens["tokenizer"])
        return {"states": output.last_hidden_state, "pooled": output.pooler_output}

    @property
    def text_shapes(self) -> dict[str, tuple[int, ...]]:
        """See `CheckpointParts.text_shapes`."""
        width = self.text_encoder.config.hidden_size
        return {"states": (self.tokenizer.model_max_length, width), "pooled": (width,)}

    @property
    def states_told(self) -> tuple[str, ...]:
        """See `CheckpointParts.states_told`."""
        return ("pooled",) if told_pooled(self.network) else ("states",)

    def told(self, texts: Mapping[str, Tensor], geometry: Tensor | None) -> dict[str, Tensor]:
        """See `CheckpointParts.told`: ``encoder_hidden_states`` [B, L, E], or ``pooled_projections`` [B, E] of a transformer."""
        if told_pooled(self.network):
            return {"pooled_projections": texts["pooled"]}
        return {"encoder_hidden_states": texts["states"]}

    def check(self) -> None:
        """See `CheckpointParts.check`."""
        if not told_pooled(self.network):
            check_unet(self, self.text_encoder.config.hidden_size)
        check_words(self)
        check_end(self)

    @property
    def pipeline_settings(self) -> dict[str, Any]:
        """See `CheckpointParts.pipeline_settings`; a safety checker would blank samples."""
        return {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}

    @classmethod
    def build_network(
        cls,
        arguments: TextModelArguments,
        options: dict[str, Any],
        vae: AutoencoderKL,
        encoders: Mapping[str, PreTrainedModel],
        *,
        resolution: int,
        from_scratch: bool,
    ) -> ModelMixin:
        """See `CheckpointParts.build_network`; a preset is a transformer with random weights, told the pooled text state."""
        if not arguments.model_preset:
            return super().build_network(arguments, options, vae, encoders, resolution=resolution, from_scratch=from_scratch)
        latents = {"channels": vae.config.latent_channels, "downsampling": latent_downsampling(vae)}
        width = encoders["text_encoder"].config.hidden_size
        return build_dit(text_dit_config(arguments.model_preset, resolution=resolution, width=width, **latents))
