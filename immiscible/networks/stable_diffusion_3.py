"""Stable Diffusion 3 and 3.5: a transformer of latents and text tokens together, which learns the flow from noise to images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from immiscible.errors import UserError
from immiscible.networks.arguments import TextModelArguments
from immiscible.networks.checkpoint_parts import CheckpointParts, check_words, unvaried
from immiscible.networks.kinds import TOKENS_READ
from immiscible.networks.latents import latent_downsampling

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, ModelMixin, SchedulerMixin
    from transformers import PreTrainedTokenizerBase

CLIP = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}  # the two whose states stand side by side, and their tokenizers
T5, T5_TOKENIZER = "text_encoder_3", "tokenizer_3"


@dataclass(kw_only=True)
class StableDiffusion3(CheckpointParts):
    """See `CheckpointParts`.

    Text states are ``states`` [B, L + M, J], the L tokens of both CLIP models, filled up with zeros to the width J that the network reads,
    and then M tokens of T5, zeros where the checkpoint has none; and ``pooled`` [B, P], the projections of the CLIP models. That is what
    diffusers' `StableDiffusion3Pipeline.encode_prompt` gives.
    """

    family = "a Stable Diffusion 3 or 3.5 checkpoint"
    pipeline_class = "StableDiffusion3Pipeline"
    tag = "sd3"
    network_class = "SD3Transformer2DModel"
    network_part = "transformer"
    scheduler_class = "FlowMatchEulerDiscreteScheduler"
    encoder_classes = {**dict.fromkeys(CLIP, "CLIPTextModelWithProjection"), T5: "T5EncoderModel"}
    tokenizer_classes = {**dict.fromkeys(CLIP.values(), "CLIPTokenizer"), T5_TOKENIZER: "T5TokenizerFast"}
    in_single_file = {"text_encoder": "text_encoders.clip_l.", "text_encoder_2": "text_encoders.clip_g.", T5: "text_encoders.t5xxl."}
    optional = (T5, T5_TOKENIZER)
    adapted_texts = tuple(CLIP)
    lora_targets = (
        *(f"attn.{layer}" for layer in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")),
    )

    def tokens(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """See `CheckpointParts.tokens`: [B, L] of CLIP and [B, M] of T5."""
        lengths = {**dict.fromkeys(CLIP.values(), self.tokenizer.model_max_length), T5_TOKENIZER: self.max_sequence_length}
        options: dict[str, Any] = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        words = list(captions)
        return {name: tokenizer(words, max_length=lengths[name], **options).input_ids for name, tokenizer in self.tokenizers.items()}

    def encode(self, tokens: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `CheckpointParts.encode`."""
        outputs = [self.encoders[part](tokens[name], output_hidden_states=True) for part, name in CLIP.items()]
        joint = torch.cat([output.hidden_states[-2] for output in outputs], -1)
        joint = nn.functional.pad(joint, (0, self._width - joint.shape[-1]))
        if T5 in self.encoders:
            third = self.encoders[T5](tokens[T5_TOKENIZER])[0]
        else:
            third = joint.new_zeros(len(joint), self.max_sequence_length, self._width)
        return {"states": torch.cat([joint, third], -2), "pooled": torch.cat([output.text_embeds for output in outputs], -1)}

    @property
    def _width(self) -> int:
        """J."""
        return int(self.network.config.joint_attention_dim)

    @property
    def text_shapes(self) -> dict[str, tuple[int, ...]]:
        """See `CheckpointParts.text_shapes`."""
        pooled = sum(int(self.encoders[part].config.projection_dim) for part in CLIP)
        return {"states": (self.tokenizer.model_max_length + self.max_sequence_length, self._width), "pooled": (pooled,)}

    @property
    def states_told(self) -> tuple[str, ...]:
        """See `CheckpointParts.states_told`."""
        return "states", "pooled"

    def told(self, texts: Mapping[str, Tensor], geometry: Tensor | None) -> dict[str, Tensor]:
        """See `CheckpointParts.told`: ``encoder_hidden_states`` [B, L + M, J] and ``pooled_projections`` [B, P]; nothing of the crop."""
        return {"encoder_hidden_states": texts["states"], "pooled_projections": texts["pooled"]}

    @property
    def reader(self) -> PreTrainedTokenizerBase:
        """See `CheckpointParts.reader`: T5's where it reads more than CLIP does."""
        if T5 not in self.encoders or self.max_sequence_length <= self.tokenizer.model_max_length:
            return self.tokenizer
        reader = copy(self.tokenizers[T5_TOKENIZER])
        reader.model_max_length = self.max_sequence_length
        return reader

    @property
    def schedule(self) -> str:
        """The shift of its sigmas."""
        return f"shift {self.scheduler.config.shift:g}"

    def predict(self, prediction_type: str) -> None:
        """See `CheckpointParts.predict`.

        Raises:
            UserError: always: these checkpoints predict the flow.
        """
        raise UserError(f"--prediction_type {prediction_type}: {self.name} is {self.family}, which predicts the flow; leave it out")

    def sampler(self, kind: str) -> SchedulerMixin:
        """See `CheckpointParts.sampler`."""
        import diffusers

        scheduler: SchedulerMixin = getattr(diffusers, kind).from_pretrained(self.name, subfolder="scheduler", **unvaried(self.options))
        return scheduler

    @classmethod
    def load(
        cls, arguments: TextModelArguments, options: dict[str, Any], parts: Sequence[str], *, resolution: int, from_scratch: bool
    ) -> Self:
        """See `CheckpointParts.load`.

        Raises:
            UserError: T5 is there without its tokenizer, or that without T5.
        """
        there = [part for part in cls.optional if part in parts]
        if len(there) == 1:
            named = f"--pretrained_model_name_or_path {arguments.pretrained_model_name_or_path}"
            raise UserError(f"{named} has {there[0]} alone: {' and '.join(cls.optional)} go together, or are both absent")
        return super().load(arguments, options, parts, resolution=resolution, from_scratch=from_scratch)

    @classmethod
    def fit(cls, network: ModelMixin, arguments: TextModelArguments, vae: AutoencoderKL, *, resolution: int) -> None:
        """See `CheckpointParts.fit`; diffusers has the time fourth among this network's arguments, and here it may be second.

        Raises:
            UserError: it cannot take images of this resolution.
        """
        step = latent_downsampling(vae) * int(network.config.patch_size)
        if resolution % step:
            raise UserError(f"--resolution {resolution} must be a multiple of {step}: its VAE divides images, and its network latents")
        if resolution > (most := step * int(network.config.pos_embed_max_size)):
            raise UserError(f"--resolution {resolution} must be at most {most}: its network knows no positions beyond")
        network.register_forward_pre_hook(_time_by_name, with_kwargs=True)
        network.register_to_config(**{TOKENS_READ: arguments.max_sequence_length})

    def place_frozen(self, device: torch.device, dtype: torch.dtype) -> None:
        """See `CheckpointParts.place_frozen`; the VAE keeps its 32 bits, as in diffusers' script."""
        for name, part in self.frozen.items():
            nn.Module.to(part, device=device, dtype=torch.float32 if name == "vae" else dtype)

    @property
    def max_sequence_length(self) -> int:
        """M, which the network's configuration keeps, so that its samples are told as many tokens."""
        return int(self.network.config[TOKENS_READ])

    @property
    def text_notes(self) -> tuple[str, ...]:
        """See `CheckpointParts.text_notes`."""
        return (f"{self.max_sequence_length} tokens of T5",)

    @property
    def components(self) -> dict[str, Any]:
        """See `CheckpointParts.components`; the pipeline wants to hear of what is absent."""
        return {**dict.fromkeys(self.optional), **super().components}

    def check(self) -> None:
        """See `CheckpointParts.check`."""
        network: Any = self.network.config
        channels = self.vae.config.latent_channels
        if not network.in_channels == (network.out_channels or network.in_channels) == channels:
            raise UserError(
                f"{self.named}: its transformer takes {network.in_channels} channels and gives {network.out_channels}, its VAE has latents "
                f"of {channels}; one of them is of another checkpoint"
            )
        pooled, projected = self.text_shapes["pooled"][0], network.pooled_projection_dim
        if pooled != projected:
            raise UserError(f"{self.named}: its transformer takes pooled text states of width {projected}, its CLIP models give {pooled}")
        clip = sum(int(self.encoders[part].config.hidden_size) for part in CLIP)
        if clip > self._width:
            raise UserError(f"{self.named}: its transformer takes text states of width {self._width}, its CLIP models give {clip}")
        if T5 in self.encoders and (width := self.encoders[T5].config.d_model) != self._width:
            raise UserError(f"{self.named}: its transformer takes text states of width {self._width}, its {T5} gives {width}")
        check_words(self)


def _time_by_name(network: nn.Module, words: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A second argument without a name is the time."""
    return (words[:1], {**named, "timestep": words[1]}) if len(words) == 2 else (words, named)
