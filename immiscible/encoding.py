"""From a loaded batch to what is diffused and what the network is told."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .data import Images
from .randomness import Draws


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


Encoder = Callable[[Any, Draws], Encoded]


class PixelEncoder:
    """Pixels are diffused as they are; the network is told the class if it is class-conditional.

    Args:
        device: where training happens.
        class_conditional: whether the batch's labels go to the network.
    """

    def __init__(self, device: torch.device, class_conditional: bool = False) -> None:
        self._device, self._class_conditional = device, class_conditional

    def __call__(self, batch: Images, draws: Draws) -> Encoded:
        """See `Encoded`."""
        x0 = batch.x0.to(self._device, non_blocking=True)
        labels = None if batch.labels is None else batch.labels.to(self._device, non_blocking=True)
        condition = {"class_labels": labels} if self._class_conditional and labels is not None else {}
        return Encoded(x0, labels, condition)
