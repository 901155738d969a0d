"""Masked training beside the plain one: each image is learned from all of its patches and from some of them (MDT, Gao et al. 2023)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from immiscible.coupling import Coupling
from immiscible.errors import UserError
from immiscible.objectives import DenoisingObjective, Pairs
from immiscible.process import NoiseProcess
from immiscible.randomness import Draws, PoolDraws, seeded_generator
from immiscible.timesteps import TimestepSampler
from immiscible.weighting import LossWeights


@dataclass(frozen=True)
class MaskedObjective:
    """``L(all tokens) + L(some tokens)``, both of the same noise and timestep (MDT, section 3.2), whatever L's axes are.

    The network is called a second time with ``kept``, the numbers of the tokens that it sees, int64 [B, K]: another choice for each image.

    Args:
        objective: L.
        tokens: N, into how many the network cuts an image.
        least: the share that is masked: ``K = floor(N (1 - share))``; at most all but one.
        greatest: each optimizer step draws the share between the two, as MDTv2 does; the same number is one share.

    Raises:
        UserError: shares that are none, or in the wrong order.
    """

    objective: DenoisingObjective
    tokens: int
    least: float = 0.3
    greatest: float = 0.3

    def __post_init__(self) -> None:
        if not 0 <= self.least <= self.greatest < 1:
            raise UserError(f"`least` and `greatest` must be shares from 0 to below 1, the lower one first: {self.least}, {self.greatest}")

    def __call__(self, model: nn.Module, pairs: Pairs, draws: Draws) -> Tensor:
        """The loss of each image, fp32 [B]; see `Objective`. A law that goes by losses learns of the sum."""
        told = {**pairs.condition, "kept": self.kept(len(pairs.x0), draws).to(pairs.x0.device)}
        loss = self.objective.loss(model, pairs, draws) + self.objective.loss(model, replace(pairs, condition=told), draws)
        return self.sampler.settled(draws.step, pairs.timesteps, loss)

    def kept(self, count: int, draws: Draws) -> Tensor:
        """Which tokens of ``count`` images are seen, int64 [B, K], in ascending order: a function of the image's row, and of the step."""
        generator = seeded_generator(draws.seed, "mask ratio", draws.step)
        share = self.least + (self.greatest - self.least) * float(torch.rand((), generator=generator, dtype=torch.float64))
        keep = max(1, int(self.tokens * (1 - share) + 1e-9))
        return draws.normal("mask", count, self.tokens).argsort(1)[:, :keep].sort(1).values

    def pair(self, x0: Tensor, draws: PoolDraws, labels: Tensor | None = None, condition: Mapping[str, Tensor] | None = None) -> Pairs:
        """See `Objective`; nothing of it is masked."""
        return self.objective.pair(x0, draws, labels, condition)

    @property
    def process(self) -> NoiseProcess:
        """The objective's, like all that follows."""
        return self.objective.process

    @property
    def sampler(self) -> TimestepSampler:
        """The timestep law."""
        return self.objective.sampler

    @property
    def coupling(self) -> Coupling:
        """Which noise belongs to which image."""
        return self.objective.coupling

    @property
    def weights(self) -> LossWeights:
        """What an error at each noise level costs."""
        return self.objective.weights

    @property
    def prediction_type(self) -> str:
        """Diffusers' name of what the network predicts."""
        return self.objective.prediction_type

    @property
    def image_scale(self) -> float:
        """The scale at which images are diffused."""
        return self.objective.image_scale
