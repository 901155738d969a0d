"""For training code that draws its noise inline: the name `torch` of one module stands for a view of torch that pairs what it draws."""

from __future__ import annotations

from typing import Any

import torch

import immiscible


class _Coupled:
    """torch, but for ``randn_like`` of images: [B, ...] of three dimensions or more."""

    def __init__(self, coupling: immiscible.Coupling) -> None:
        self._coupling = coupling

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def randn_like(self, input: torch.Tensor, **options: Any) -> torch.Tensor:
        """The noise of each image; what is as flat as a token is drawn as always."""
        noise = torch.randn_like(input, **options)
        return self._coupling(input.to(noise.dtype), noise) if input.ndim > 2 else noise


def couple_draws(module: Any, coupling: immiscible.Coupling) -> None:
    """Pairs what functions of ``module`` draw by ``torch.randn_like(images)``; for modules that draw nothing else by it from images."""
    module.torch = _Coupled(coupling)
