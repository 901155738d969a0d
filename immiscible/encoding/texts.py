"""Images to latents and captions to text states."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from immiscible.data.sources import ImageSource
from immiscible.encoding.encoders import Encoded, latent_draw
from immiscible.networks.stable_diffusion import StableDiffusion, text_states
from immiscible.randomness import Draws

if TYPE_CHECKING:
    from immiscible.data.batches import Images

logger = logging.getLogger(__name__)
LOOKED_AT = 2000  # captions, evenly over the data, to count those that are cut


@dataclass(frozen=True)
class TextToImageEncoder:
    """Images to latents, captions to text states; both without gradient, in the networks' own precision.

    A latent is a fresh draw from the VAE's posterior each time: mean + deviation * normal, times the VAE's scaling factor, in fp32.

    Args:
        parts: of the checkpoint; VAE and text encoder already on the device.
        device: where training happens.
        empty_prompts: share of the images whose caption is left empty, drawn for each image.
        pooled: tell the network the pooled state of a caption, and not the states of its tokens.
        pooled_labels: give couplings the captions' pooled text states for labels, where the batch has no classes.
    """

    parts: StableDiffusion
    device: torch.device
    empty_prompts: float = 0.0
    pooled: bool = False
    pooled_labels: bool = False

    @torch.no_grad()
    def __call__(self, batch: Images, draws: Draws) -> Encoded:
        """See `Encoded`: ``x0`` are latents [B, 4, H/8, W/8], the condition is ``encoder_hidden_states`` [B, L, E] or
        ``pooled_projections`` [B, E].
        """
        captions = list(batch.captions or ())
        x0 = latent_draw(*self.posterior(batch.x0), self.parts.vae.config.scaling_factor, draws)
        if self.empty_prompts:
            dropped = draws.uniform("empty_prompt", len(captions)) < self.empty_prompts
            captions = ["" if drop else caption for caption, drop in zip(captions, dropped.tolist(), strict=True)]
        states, pooled = self.texts(captions)
        labels = None if batch.labels is None else batch.labels.to(self.device)
        if labels is None and self.pooled_labels and pooled is not None:
            labels = pooled.float()
        name, told = ("pooled_projections", pooled) if self.pooled else ("encoder_hidden_states", states)
        assert told is not None
        return Encoded(x0, labels, {name: told})

    @torch.no_grad()
    def expected(self, batch: Images) -> Tensor:
        """See `Encoder`."""
        return self.posterior(batch.x0)[0].float() * self.parts.vae.config.scaling_factor

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the latents of a batch's images, each [B, 4, H/8, W/8]."""
        vae = self.parts.vae
        posterior = vae.encode(images.to(self.device, vae.dtype, non_blocking=True)).latent_dist
        return posterior.mean, posterior.logvar

    def texts(self, captions: Sequence[str]) -> tuple[Tensor | None, Tensor | None]:
        """The states [B, L, E] and pooled states [B, E] of captions; a cache gives those alone that are needed."""
        return text_states(self.parts, captions, self.device)


def tell_long_captions(source: ImageSource, parts: StableDiffusion) -> None:
    """Says in one line how many captions are longer than the text encoder reads, of all or, where there are many, of some."""
    length = parts.tokenizer.model_max_length
    found: list[str] = []
    for index in range(0, len(source), -(-len(source) // LOOKED_AT)):
        try:
            found += source.captions(index)
        except (OSError, ValueError):
            continue  # a bad image, which is told when it is met
    # A token is a byte at least, and two tokens are the beginning and the end.
    long = [caption for caption in found if len(caption.encode(errors="replace")) > length - 2]
    lengths = [len(words) for words in parts.tokenizer(long, verbose=False).input_ids] if long else []
    if cut := sum(tokens > length for tokens in lengths):
        logger.warning(
            "%d of %d captions are longer than the %d tokens that the text encoder reads, and are cut (the longest has %d)",
            cut,
            len(found),
            length,
            max(lengths),
        )
