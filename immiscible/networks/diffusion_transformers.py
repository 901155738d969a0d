"""Diffusion transformers as their papers have them: DiT with one embedder of time and class, DiT that is told a text in the class's place,
and MDT, which also learns from masked images.

In diffusers each block of a DiT owns a copy of the embedder, of which the original has one, and drops labels anew in each copy, from the
global generator. Here the copies are one module, and who trains drops labels, once for each image. A DiT is saved as plain diffusers loads
it. A run of another, which diffusers has not, leaves this file beside its weights; it needs torch and diffusers alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import wraps
from inspect import Parameter, signature
from typing import Any

import diffusers
import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn


class DiTTransformer2DModel(diffusers.DiTTransformer2DModel):
    """See the file's first lines. It has the name of diffusers' class, by which its folders and checkpoints are loaded.

    Args:
        config: diffusers' arguments. ``num_embeds_ada_norm``, the number of classes, may be 0; the label of that number says no class.
    """

    @wraps(diffusers.DiTTransformer2DModel.__init__)  # type: ignore[misc]  # by whose signature diffusers knows the settings
    def __init__(self, *args: Any, **config: Any) -> None:
        super().__init__(*args, **config)
        self.embedder.class_embedder.dropout_prob = 0.0  # its row for no class is there already
        self._tie()

    @property
    def embedder(self) -> Any:
        """Of time and class, for every block."""
        return self.transformer_blocks[0].norm1.emb

    def blocks(self) -> list[Any]:
        """All blocks of the network, each with an embedder to be shared."""
        return list(self.transformer_blocks)

    def _tie(self) -> None:
        for block in self.blocks()[1:]:
            block.norm1.emb = self.embedder

    def forward(self, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor | None = None, **options: Any) -> Any:
        """As diffusers', where labels that are not given are those of no class.

        Args:
            hidden_states: [B, C, H, W].
            timestep: [B], of any type.
            class_labels: int64 [B].
            options: diffusers' others.
        """
        return super().forward(hidden_states, timestep, self._told(hidden_states, class_labels), **options)

    def _told(self, hidden_states: Tensor, class_labels: Tensor | None) -> Tensor:
        if class_labels is not None:
            return class_labels
        return torch.full((len(hidden_states),), self.config.num_embeds_ada_norm, device=hidden_states.device)

    def save_pretrained(self, *args: Any, **options: Any) -> None:
        """As diffusers', with a copy of the embedder for each block."""
        for block in self.blocks()[1:]:
            block.norm1.emb = copy.deepcopy(self.embedder)
        try:
            super().save_pretrained(*args, **options)
        finally:
            self._tie()

    @torch.no_grad()
    def draw_weights(self) -> None:
        """Fresh weights as in DiT: Xavier's in linear layers and patches, deviation 0.02 in the embedder, and zero wherever a block or the
        output begins to count, so that every block is the identity at first and the output is zero (adaLN-Zero).
        """
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(module.weight.view(len(module.weight), -1))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        times = self.embedder.timestep_embedder
        told = next(self.embedder.class_embedder.parameters())  # the table of classes, or the matrix of a text
        for weight in (times.linear_1.weight, times.linear_2.weight, told):
            nn.init.normal_(weight, std=0.02)
        for layer in (*(block.norm1.linear for block in self.blocks()), self.proj_out_1, self.proj_out_2):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)


def _with_setting(name: str, default: Any) -> Callable[[Any], Any]:
    """Marks a constructor as one of a DiT with a setting more; diffusers knows the settings by the signature."""

    def mark(constructor: Any) -> Any:
        others = signature(diffusers.DiTTransformer2DModel.__init__).parameters.values()
        own = Parameter(name, Parameter.KEYWORD_ONLY, default=default)
        constructor.__signature__ = signature(constructor).replace(parameters=[*others, own])
        return constructor

    return mark


class TextDiTTransformer2DModel(DiTTransformer2DModel):
    """A DiT that is told a text by one vector: a linear layer of the text encoder's pooled state is added to the embedded time, where a DiT
    has the embedded class (SpeeD, appendix A.7 and its code).

    Args:
        text_width: of the pooled state, E.
        config: as of a DiT; there are no classes.
    """

    @_with_setting("text_width", 768)
    def __init__(self, *args: Any, text_width: int = 768, **config: Any) -> None:
        super().__init__(*args, **config)
        self.register_to_config(text_width=text_width)
        self.embedder.class_embedder = nn.Linear(text_width, self.inner_dim)

    def forward(  # type: ignore[override]  # it takes no labels
        self, hidden_states: Tensor, timestep: Tensor, pooled_projections: Tensor, **options: Any
    ) -> Any:
        """The network's output, [B, C, H, W].

        Args:
            hidden_states: [B, C, H, W].
            timestep: [B], of any type.
            pooled_projections: the text of each image, [B, E], of any floating type; that of the empty text says none.
            options: diffusers' others.
        """
        return super().forward(hidden_states, timestep, pooled_projections.to(self.dtype), **options)


class MDTTransformer2DModel(DiTTransformer2DModel):
    """The masked diffusion transformer of Gao et al. 2023 (arXiv 2303.14389), without its relative positions.

    The last ``num_decoder_layers`` blocks are the decoder, the others the encoder. Told which tokens are kept, it runs the encoder on these
    alone. In the place of each of the others comes a learned token; with the decoder's positions, which are learned, the side-interpolater,
    one block more, predicts them from all, and what was kept stays as it is (eq. 3 to 5). Without, this block is passed over.

    Args:
        num_decoder_layers: at least 1, and fewer than ``num_layers``.
        config: as of a DiT.
    """

    @_with_setting("num_decoder_layers", 2)
    def __init__(self, *args: Any, num_decoder_layers: int = 2, **config: Any) -> None:
        super().__init__(*args, **config)
        self.register_to_config(num_decoder_layers=num_decoder_layers)
        settings, positions = self.config, self.pos_embed.pos_embed
        if not 0 < num_decoder_layers < settings.num_layers:
            raise ValueError(f"num_decoder_layers must be at least 1 and below num_layers {settings.num_layers}, not {num_decoder_layers}")
        own = ["dropout", "activation_fn", "num_embeds_ada_norm", "attention_bias", "upcast_attention", "norm_type"]
        own += ["norm_elementwise_affine", "norm_eps"]
        heads = (settings.num_attention_heads, settings.attention_head_dim)
        last = self._modules.pop("proj_out_2")
        self.side_block = BasicTransformerBlock(self.inner_dim, *heads, **{name: settings[name] for name in own})
        self._modules["proj_out_2"] = last  # again the last of the layers, as which an optimizer may know it
        self.mask_token = nn.Parameter(torch.zeros(1, 1, self.inner_dim))
        self.encoder_position = nn.Parameter(torch.zeros_like(positions))  # added to the fixed ones
        self.decoder_position = nn.Parameter(positions.clone())
        self._tie()

    def blocks(self) -> list[Any]:
        """See `DiTTransformer2DModel.blocks`."""
        return [*self.transformer_blocks, *([self.side_block] if hasattr(self, "side_block") else [])]

    def draw_weights(self) -> None:
        """See `DiTTransformer2DModel.draw_weights`; positions begin as sines and cosines."""
        super().draw_weights()
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(  # type: ignore[override]  # it takes no attention arguments
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        class_labels: Tensor | None = None,
        *,
        kept: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """The network's output, [B, C, H, W].

        Args:
            hidden_states: [B, C, H, W].
            timestep: [B], of any type.
            class_labels: int64 [B]; those of no class if not given.
            kept: the numbers of the tokens that the encoder sees, int64 [B, K], each once; all if not given.
            return_dict: False for a tuple.
        """
        told = timestep, self._told(hidden_states, class_labels)
        count = len(self.transformer_blocks) - self.config.num_decoder_layers
        x = self.pos_embed(hidden_states) + self.encoder_position  #             [B, N, D]
        if kept is None:
            x = self._through(self.transformer_blocks[:count], x, *told) + self.decoder_position
        else:
            index = kept[..., None].expand(-1, -1, x.shape[2])  #                [B, K, D]
            seen = self._through(self.transformer_blocks[:count], x.gather(1, index), *told)
            x = self.mask_token.to(seen.dtype).expand(x.shape).scatter(1, index, seen) + self.decoder_position
            side = self._through([self.side_block], x, *told)
            masked = torch.ones_like(x[..., :1], dtype=torch.bool).scatter(1, kept[..., None], False)
            x = torch.where(masked, side, x)
        x = self._through(self.transformer_blocks[count:], x, *told)
        output = self._image(x, *told)
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)

    def _through(self, blocks: Any, x: Tensor, timestep: Tensor, labels: Tensor) -> Tensor:
        for block in blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                x = self._gradient_checkpointing_func(block, x, None, None, None, timestep, None, labels)
            else:
                x = block(x, timestep=timestep, class_labels=labels)
        return x

    def _image(self, x: Tensor, timestep: Tensor, labels: Tensor) -> Tensor:
        """The tokens [B, N, D] as patches of an image [B, C, H, W]: the last layer of a DiT."""
        conditioning = self.embedder(timestep, labels, hidden_dtype=x.dtype)
        shift, scale = self.proj_out_1(nn.functional.silu(conditioning)).chunk(2, dim=1)
        x = self.proj_out_2(self.norm_out(x) * (1 + scale[:, None]) + shift[:, None])
        side, patch = self.config.sample_size // self.patch_size, self.patch_size
        x = x.view(-1, side, side, patch, patch, self.out_channels).permute(0, 5, 1, 3, 2, 4)
        return x.reshape(-1, self.out_channels, side * patch, side * patch)
