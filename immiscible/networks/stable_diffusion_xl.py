"""Stable Diffusion XL (Podell et al., arXiv:2307.01952): two text encoders, and a U-Net that is told sizes and crops too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from immiscible.errors import UserError
from immiscible.networks.arguments import TextModelArguments
from immiscible.networks.checkpoint_parts import CheckpointParts, check_end, check_unet, check_words

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, ModelMixin

SIZES = 6  # numbers in an image's geometry; the refiner of these checkpoints, which is not trained here, is told five


@dataclass(kw_only=True)
class StableDiffusionXL(CheckpointParts):
    """See `CheckpointParts`.

    Text states are ``states`` [B, L, E1 + E2], those of the last layer but one of both encoders side by side, and ``pooled`` [B, P], the
    projection of the second one's; what diffusers' ``train_text_to_image_sdxl.py`` makes of captions, the empty one too.
    """

    family = "a Stable Diffusion XL checkpoint"
    pipeline_class = "StableDiffusionXLPipeline"
    tag = "stable-diffusion-xl"
    default_resolution = 1024
    told_geometry = True
    encoder_classes = {"text_encoder": "CLIPTextModel", "text_encoder_2": "CLIPTextModelWithProjection"}
    tokenizer_classes = {"tokenizer": "CLIPTokenizer", "tokenizer_2": "CLIPTokenizer"}
    in_single_file = {"text_encoder": "conditioner.embedders.0.", "text_encoder_2": "conditioner.embedders.1."}
    adapted_texts = ("text_encoder", "text_encoder_2")

    def encode(self, tokens: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `CheckpointParts.encode`."""
        pairs = zip(self.tokenizers, self.encoders.values(), strict=True)
        outputs = [encoder(tokens[tokenizer], output_hidden_states=True) for tokenizer, encoder in pairs]
        return {"states": torch.cat([output.hidden_states[-2] for output in outputs], -1), "pooled": outputs[-1].text_embeds}

    @property
    def text_shapes(self) -> dict[str, tuple[int, ...]]:
        """See `CheckpointParts.text_shapes`."""
        width = sum(encoder.config.hidden_size for encoder in self.encoders.values())
        return {"states": (self.tokenizer.model_max_length, width), "pooled": (self._projected,)}

    @property
    def _projected(self) -> int:
        """P."""
        return int(self.encoders["text_encoder_2"].config.projection_dim)

    @property
    def states_told(self) -> tuple[str, ...]:
        """See `CheckpointParts.states_told`."""
        return "states", "pooled"

    def told(self, texts: Mapping[str, Tensor], geometry: Tensor | None) -> dict[str, Tensor]:
        """See `CheckpointParts.told`: ``encoder_hidden_states`` [B, L, E1 + E2], ``text_embeds`` [B, P] and ``time_ids`` fp32 [B, 6]."""
        states = texts["states"]
        if geometry is None:
            side = self.resolution
            geometry = torch.tensor([side, side, 0, 0, side, side], device=states.device).expand(len(states), -1)
        return {"encoder_hidden_states": states, "text_embeds": texts["pooled"], "time_ids": geometry.float()}

    @property
    def pipeline_settings(self) -> dict[str, Any]:
        """See `CheckpointParts.pipeline_settings`.

        What samples are guided away from is zeros in these checkpoints, in place of the states of the empty caption. A network with random
        weights never sees zeros, and is guided away from the empty caption, which it is told where captions are left out.
        """
        zeros = not self.from_scratch and bool(self.index.get("force_zeros_for_empty_prompt", True))
        return {"force_zeros_for_empty_prompt": zeros, "add_watermarker": False}

    def place_frozen(self, device: torch.device, dtype: torch.dtype) -> None:
        """See `CheckpointParts.place_frozen`; the checkpoint's own VAE, which overflows in fp16, keeps 32 bits, as in diffusers'."""
        for name, part in self.frozen.items():
            exact = name == "vae" and self.vae_name is None
            nn.Module.to(part, device=device, dtype=torch.float32 if exact else dtype)

    def check(self) -> None:
        """See `CheckpointParts.check`."""
        config: Any = self.network.config
        check_unet(self, self.text_shapes["states"][1])
        wanted = self._projected + SIZES * (config.addition_time_embed_dim or 0)
        if config.addition_embed_type != "text_time" or config.projection_class_embeddings_input_dim != wanted:
            raise UserError(
                f"{self.named}: its U-Net takes {config.projection_class_embeddings_input_dim} numbers of pooled text and sizes, and its "
                f"second text encoder and {SIZES} sizes make {wanted}; a refiner is not trained here"
            )
        check_words(self)
        check_end(self)

    @classmethod
    def fit(cls, network: ModelMixin, arguments: TextModelArguments, vae: AutoencoderKL, *, resolution: int) -> None:
        """See `CheckpointParts.fit`; diffusers has the last two of `told` in a mapping, and here they are arguments as well."""
        network.register_forward_pre_hook(_gather_added, with_kwargs=True)


def _gather_added(network: nn.Module, words: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Moves pooled text and sizes to where the U-Net looks for them; a pipeline has put them there."""
    added = {name: value for name, value in named.items() if name in ("text_embeds", "time_ids")}
    if not added:
        return words, named
    return words, {**{name: value for name, value in named.items() if name not in added}, "added_cond_kwargs": added}
