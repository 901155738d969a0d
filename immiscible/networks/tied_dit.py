"""Diffusers' DiT as its paper has it: one embedder of time and class, and labels that the network never drops by itself.

In diffusers each block owns a copy of the embedder, of which the original has one, and drops labels anew in each copy, from the global
generator. Here the copies are one module, and who trains drops labels, once for each image. It is saved as plain diffusers loads it.
"""

from __future__ import annotations

import copy
from functools import wraps
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from immiscible.networks.kinds import ROWS


class DiTTransformer2DModel(diffusers.DiTTransformer2DModel):
    """See the file's first lines. It has the name of diffusers' class, by which its folders and checkpoints are loaded.

    Args:
        config: diffusers' arguments. ``num_embeds_ada_norm``, the number of classes, may be 0; the label of that number says no class.
    """

    @wraps(diffusers.DiTTransformer2DModel.__init__)  # type: ignore[misc]  # by whose signature diffusers knows the settings
    def __init__(self, *args: Any, **config: Any) -> None:
        super().__init__(*args, **config)
        self.transformer_blocks[0].norm1.emb.class_embedder.dropout_prob = 0.0  # its row for no class is there already
        self._tie()

    def _tie(self) -> None:
        first, *others = self.transformer_blocks
        for block in others:
            block.norm1.emb = first.norm1.emb

    def forward(self, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor | None = None, **options: Any) -> Any:
        """As diffusers', where labels that are not given are those of no class.

        Args:
            hidden_states: [B, C, H, W].
            timestep: [B], of any type.
            class_labels: int64 [B].
            options: diffusers' others.
        """
        if class_labels is None:
            class_labels = torch.full((len(hidden_states),), self.config[ROWS], device=hidden_states.device)
        return super().forward(hidden_states, timestep, class_labels, **options)

    def save_pretrained(self, *args: Any, **options: Any) -> None:
        """As diffusers', with a copy of the embedder for each block."""
        first, *others = self.transformer_blocks
        for block in others:
            block.norm1.emb = copy.deepcopy(first.norm1.emb)
        try:
            super().save_pretrained(*args, **options)
        finally:
            self._tie()


def draw_weights(network: DiTTransformer2DModel) -> None:
    """Fresh weights as in DiT: Xavier's in linear layers and patches, deviation 0.02 in the embedder, and zero wherever a block or the
    output begins to count, so that every block is the identity at first and the output is zero (adaLN-Zero).
    """
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(module.weight.view(len(module.weight), -1))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    embedder = network.transformer_blocks[0].norm1.emb
    times = embedder.timestep_embedder
    for weight in (times.linear_1.weight, times.linear_2.weight, embedder.class_embedder.embedding_table.weight):
        nn.init.normal_(weight, std=0.02)
    for layer in (*(block.norm1.linear for block in network.transformer_blocks), network.proj_out_1, network.proj_out_2):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
