"""Learning the variance of the reverse step beside its mean: the hybrid loss of Nichol and Dhariwal (2021), which DiT is trained with."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from immiscible.errors import UserError
from immiscible.objectives import DenoisingObjective, Pairs
from immiscible.process import rows_at
from immiscible.randomness import Draws

HALF_BIN = 1 / 255  # of a value of 8 bits in [-1, 1]


class ReverseSteps(NamedTuple):
    """What is known of the steps from t to t - 1 before training (Ho et al. 2020, eq. 6 and 7).

    Args:
        least: log of the posterior's variance ``(1 - ab[t-1]) / (1 - ab[t]) beta[t]``, float64 [T]; at index 0, where it is -inf, that of
            index 1.
        greatest: log of beta, float64 [T].
        share: the image's coefficient in the posterior's mean, ``sqrt(ab[t-1]) beta[t] / (1 - ab[t])``, float64 [T].
    """

    least: Tensor
    greatest: Tensor
    share: Tensor

    @classmethod
    def of(cls, alpha_bar: Tensor) -> ReverseSteps:
        """Of a process with this alpha-bar, float64 [T]."""
        before = torch.cat([torch.ones_like(alpha_bar[:1]), alpha_bar[:-1]])
        beta = 1 - alpha_bar / before
        posterior = (1 - before) / (1 - alpha_bar) * beta
        posterior[0] = posterior[1] if len(posterior) > 1 else beta[0]
        return cls(posterior.log(), beta.log(), before.sqrt() * beta / (1 - alpha_bar))


def gaussian_nats(error: Tensor, log_variance: Tensor, true_log_variance: Tensor) -> Tensor:
    """KL of a Gaussian from one whose mean differs from its own by ``error``, in nats per element."""
    difference = true_log_variance - log_variance
    return 0.5 * (difference.exp() + error**2 * (-log_variance).exp() - 1 - difference)


def pixel_nats(x0: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """``-log`` of what a Gaussian gives to the bin of each value of 8 bits, whose ends are open at -1 and 1 (Ho et al. 2020, eq. 13)."""
    inverse_deviation = (-0.5 * log_variance).exp()
    above = torch.special.ndtr(inverse_deviation * (x0 - mean + HALF_BIN))
    below = torch.special.ndtr(inverse_deviation * (x0 - mean - HALF_BIN))
    above, below = torch.where(x0 > 0.999, 1, above), torch.where(x0 < -0.999, 0, below)
    return -(above - below).clamp(min=1e-12).log()


@dataclass(frozen=True)
class LearnedSigmaObjective(DenoisingObjective):
    """The hybrid loss of a network with twice the channels, whose second half v says where the variance lies: between the posterior's
    (v = -1) and beta (v = 1), linearly in logarithms (Nichol and Dhariwal 2021, eq. 15; ``learned_range`` of diffusers).

    ``L_simple + 0.001 L_vlb`` (eq. 16), as they and DiT compute it: a timestep's own term of L_vlb, in bits per element, times T / 1000.
    No gradient of it reaches the mean. The loss weighting is L_simple's alone, as SpeeD has it on DiT.
    """

    def __post_init__(self) -> None:
        if self.process.kind != "ddpm":
            raise UserError(f"a variance is learned of steps of a ddpm process, and the noise process is {self.process.kind!r}")

    @cached_property
    def steps(self) -> ReverseSteps:
        """Of the process; fp32 on its device."""
        return ReverseSteps(*(vector.float().to(self.process.signal.device) for vector in ReverseSteps.of(self.process.alpha_bar)))

    def loss(self, model: nn.Module, pairs: Pairs, draws: Draws) -> Tensor:
        """See `DenoisingObjective.loss`."""
        seen: list[tuple[Tensor, Tensor, Tensor]] = []

        def mean_of(xt: Tensor, time: Tensor, **condition: Any) -> SimpleNamespace:
            output, v = model(xt, time, **condition).sample.float().chunk(2, 1)
            seen.append((xt, output, v))
            return SimpleNamespace(sample=output)

        simple = super().loss(mean_of, pairs, draws)  # type: ignore[arg-type]
        return simple + self.process.num_timesteps / 1000 * self.bits(pairs.x0, pairs.timesteps, *seen[-1])

    def bits(self, x0: Tensor, t: Tensor, xt: Tensor, output: Tensor, v: Tensor) -> Tensor:
        """The term of L_vlb at ``t``, in bits per element of each image, fp32 [B].

        Args:
            x0: fp32 [B, C, H, W].
            t: int64 [B]; at 0 the term is the likelihood of the image, else the divergence of two Gaussians.
            xt: what the network saw, fp32 [B, C, H, W].
            output: its prediction, fp32 [B, C, H, W], from which no gradient is taken.
            v: its second half, fp32 [B, C, H, W].
        """
        predicted = self.process.predict_x0(xt, output.detach(), t, self.prediction_type)
        least, greatest, share = (rows_at(vector, t, x0) for vector in self.steps)
        log_variance = (v + 1) / 2 * greatest + (1 - v) / 2 * least
        first = pixel_nats(x0, predicted, log_variance)  # whose mean is the predicted image itself
        nats = torch.where((t == 0).view(-1, 1, 1, 1), first, gaussian_nats(share * (x0 - predicted), log_variance, least))
        return nats.flatten(1).mean(1) / math.log(2)
