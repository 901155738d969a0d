"""Images to latents and captions to text states."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from immiscible.data.sources import ImageSource
from immiscible.encoding.captions import AS_THEY_ARE, CaptionRules
from immiscible.encoding.encoders import Encoded, latent_draw
from immiscible.networks.checkpoint_parts import CheckpointParts
from immiscible.networks.placing import told_tokens
from immiscible.randomness import Draws

if TYPE_CHECKING:
    from immiscible.data.batches import Images

logger = logging.getLogger(__name__)
LOOKED_AT = 2000  # captions, evenly over the data, to count those that are cut


@dataclass(frozen=True)
class TextToImageEncoder:
    """Images to latents, captions to text states; both without gradient, in the networks' own precision.

    A latent is a fresh draw from the VAE's posterior each time: mean + deviation * normal, less the VAE's shift, times its scaling factor,
    in fp32.

    Args:
        parts: of the checkpoint; VAE and text encoders already on the device.
        device: where training happens.
        rules: what becomes of captions first.
        pooled_labels: give couplings the captions' pooled text states for labels, where the batch has no classes.
        tokens: give the network token ids in the place of text states: its text encoders are trained inside it.
    """

    parts: CheckpointParts
    device: torch.device
    rules: CaptionRules = AS_THEY_ARE
    pooled_labels: bool = False
    tokens: bool = False

    @torch.no_grad()
    def __call__(self, batch: Images, draws: Draws) -> Encoded:
        """See `Encoded`: ``x0`` are latents [B, C, H/8, W/8], the condition is what the network of this family is told."""
        captions = self.rules.drawn(batch.captions or (), draws)
        x0 = latent_draw(*self.posterior(batch.x0), self.parts.vae.config.scaling_factor, draws, self.parts.latent_shift)
        labels = None if batch.labels is None else batch.labels.to(self.device)
        geometry = None if batch.geometry is None else batch.geometry.to(self.device)
        if self.tokens:
            return Encoded(x0, labels, told_tokens(self.parts, self.rules.told(captions), geometry, self.device))
        texts = self.texts(captions)
        if labels is None and self.pooled_labels:
            labels = texts["pooled"].float()
        return Encoded(x0, labels, self.parts.told(texts, geometry))

    @torch.no_grad()
    def expected(self, batch: Images) -> Tensor:
        """See `Encoder`."""
        return (self.posterior(batch.x0)[0].float() - self.parts.latent_shift) * self.parts.vae.config.scaling_factor

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the latents of a batch's images, each [B, C, H/8, W/8]."""
        vae = self.parts.vae
        posterior = vae.encode(images.to(self.device, vae.dtype, non_blocking=True)).latent_dist
        return posterior.mean, posterior.logvar

    def texts(self, captions: Sequence[str]) -> Mapping[str, Tensor]:
        """The text states of captions with their trigger word, see `CheckpointParts.texts`; a cache gives those alone that are needed."""
        return self.parts.texts(self.rules.told(captions), self.device)


def tell_long_captions(source: ImageSource, parts: CheckpointParts) -> None:
    """Says in one line how many captions are longer than any text encoder reads, of all or, where there are many, of some."""
    reader = parts.reader
    length = reader.model_max_length
    found: list[str] = []
    for index in range(0, len(source), -(-len(source) // LOOKED_AT)):
        try:
            found += source.captions(index)
        except (OSError, ValueError):
            continue  # a bad image, which is told when it is met
    # A token is a byte at least, and two tokens are the beginning and the end.
    long = [caption for caption in found if len(caption.encode(errors="replace")) > length - 2]
    lengths = [len(words) for words in reader(long, verbose=False).input_ids] if long else []
    if cut := sum(tokens > length for tokens in lengths):
        logger.warning(
            "%d of %d captions are longer than the %d tokens that the text encoder reads, and are cut (the longest has %d)",
            cut,
            len(found),
            length,
            max(lengths),
        )
