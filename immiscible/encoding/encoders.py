"""From a loaded batch to what is diffused and what the network is told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from immiscible.data.batches import Images
from immiscible.randomness import Draws

if TYPE_CHECKING:
    from diffusers import AutoencoderKL


class Encoded(NamedTuple):
    """A micro-batch on the training device.

    Args:
        x0: pixels or latents, fp32 [B, C, H, W].
        labels: what a coupling may look at: classes, int64 [B], or pooled text states [B, E]; None where there are none.
        condition: keyword arguments of the network, each [B, ...].
    """

    x0: Tensor
    labels: Tensor | None
    condition: Mapping[str, Tensor]


class Encoder(Protocol):
    """From a loaded batch to `Encoded`."""

    def __call__(self, batch: Any, draws: Draws) -> Encoded:
        """Of a micro-batch and its random numbers."""
        ...

    def expected(self, batch: Any) -> Tensor:
        """What is diffused, x0, without what is drawn afresh each time: of latents the posterior's mean; fp32 [B, C, H, W]."""
        ...


@dataclass(frozen=True)
class PixelEncoder:
    """Pixels are diffused as they are; the network is told the class if it is class-conditional.

    Args:
        device: where training happens.
        class_conditional: whether the batch's labels go to the network.
        class_dropout: share of the images, drawn for each, of which the network is told ``null_class`` instead; `Encoded.labels` stay.
        null_class: the number that says no class.
    """

    device: torch.device
    class_conditional: bool = False
    class_dropout: float = 0.0
    null_class: int = 0

    def __call__(self, batch: Images, draws: Draws) -> Encoded:
        """See `Encoded`."""
        x0 = batch.x0.to(self.device, non_blocking=True)
        labels = None if batch.labels is None else batch.labels.to(self.device, non_blocking=True)
        if labels is None or not self.class_conditional:
            return Encoded(x0, labels, {})
        told = labels
        if self.class_dropout:
            dropped = draws.uniform("class_dropout", len(labels)) < self.class_dropout
            told = labels.masked_fill(dropped.to(self.device), self.null_class)
        return Encoded(x0, labels, {"class_labels": told})

    def expected(self, batch: Images) -> Tensor:
        """See `Encoder`."""
        return batch.x0


@dataclass(frozen=True)
class LatentEncoder:
    """A VAE's latents are diffused; the network is told the class if it is class-conditional.

    The VAE keeps its fp32 weights, with which samples are decoded, and encodes in ``precision``.

    Args:
        vae: frozen, on the device.
        device: where training happens.
        class_conditional: as of `PixelEncoder`, like the two that follow.
        class_dropout: share of the images whose class is not told.
        null_class: the number that says no class.
        precision: of the VAE's arithmetic.
    """

    vae: AutoencoderKL
    device: torch.device
    class_conditional: bool = False
    class_dropout: float = 0.0
    null_class: int = 0
    precision: torch.dtype = torch.float32

    @torch.no_grad()
    def __call__(self, batch: Images, draws: Draws) -> Encoded:
        """See `Encoded`: ``x0`` are latents [B, 4, H/8, W/8] for Stable Diffusion's VAE."""
        pixels = PixelEncoder(self.device, self.class_conditional, self.class_dropout, self.null_class)(batch, draws)
        x0 = latent_draw(*self.posterior(pixels.x0), self.vae.config.scaling_factor, draws)
        return pixels._replace(x0=x0)

    @torch.no_grad()
    def expected(self, batch: Images) -> Tensor:
        """See `Encoder`."""
        return self.posterior(batch.x0)[0].float() * self.vae.config.scaling_factor

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the latents of a batch's images, each [B, 4, H/8, W/8]."""
        with torch.autocast(self.device.type, dtype=self.precision, enabled=self.precision != torch.float32):
            posterior = self.vae.encode(images.to(self.device)).latent_dist
        return posterior.mean, posterior.logvar


def latent_draw(mean: Tensor, log_variance: Tensor, scaling_factor: float, draws: Draws, shift: float = 0.0) -> Tensor:
    """A fresh latent of each image from its posterior: ``scaling_factor * (mean + deviation * normal - shift)``, fp32.

    Args:
        mean: of the VAE's posterior, any floating dtype [B, C, H, W].
        log_variance: likewise; the deviation is taken from it in fp32.
        scaling_factor: of the VAE's configuration; it gives latents unit variance.
        draws: the micro-batch's random numbers, of which this takes the normal ones called "latent".
        shift: ``shift_factor`` of the VAE's configuration, if it has one.
    """
    deviation = (0.5 * log_variance.float()).exp()
    return (mean.float() + deviation * draws.normal("latent", *mean.shape) - shift) * scaling_factor
