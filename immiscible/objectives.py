"""One batch on one screen: from images to the loss of each image, as named moves.

Five independent choices meet here and nowhere else: timestep sampling, noise coupling, noise process, prediction type, loss weighting.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from immiscible.assignment.solve import Assignment, recorded_solutions
from immiscible.coupling import Coupling, coupling_statistics, paired_together, pairs_batch
from immiscible.epoch import EpochCoupling
from immiscible.process import NoiseProcess
from immiscible.randomness import Draws, PoolDraws
from immiscible.samplers import TimestepSampler
from immiscible.weighting import LossWeights


@dataclass(frozen=True)
class Pairs:
    """A micro-batch with everything drawn that the network does not take part in.

    Args:
        x0: images or latents, fp32 [B, C, H, W].
        timesteps: int64 [B].
        noise: the noise of each image, fp32 [B, C, H, W].
        labels: what the coupling may look at, [B] or [B, E], or None.
        condition: keyword arguments of the network, each [B, ...].
        statistics: fp32 scalars on the device: see `coupling_statistics`; also ``paired_images`` and ``coupling_seconds``.
    """

    x0: Tensor
    timesteps: Tensor
    noise: Tensor
    labels: Tensor | None
    condition: Mapping[str, Tensor]
    statistics: dict[str, Tensor]

    def split(self, batch_size: int) -> list[Pairs]:
        """The micro-batches of a window; the statistics are the window's, and its seconds are shared out."""
        count = len(self.x0) // batch_size
        statistics = self.statistics | {"coupling_seconds": self.statistics["coupling_seconds"] / count}
        labels = [None] * count if self.labels is None else self.labels.split(batch_size)
        columns = (self.x0.split(batch_size), self.timesteps.split(batch_size), self.noise.split(batch_size), labels)
        told = {name: value.split(batch_size) for name, value in self.condition.items()}
        conditions = [{name: parts[number] for name, parts in told.items()} for number in range(count)]
        return [Pairs(*parts, statistics) for parts in zip(*columns, conditions, strict=True)]


class Objective(Protocol):
    """The loss of a run, in two calls: `pair`, which needs no network and may run on another thread, and the call itself.

    The rest is read by what a run says, checks, saves and measures: the coupling's state, the law's share, the process of the loss per
    noise level. `DenoisingObjective` is one; another stands in a file beside this one, from which it may import.
    """

    @property
    def process(self) -> NoiseProcess:
        """The noise process, on the training device."""

    @property
    def sampler(self) -> TimestepSampler:
        """The timestep law."""

    @property
    def coupling(self) -> Coupling:
        """Which noise belongs to which image."""

    @property
    def weights(self) -> LossWeights:
        """What an error at each noise level costs."""

    @property
    def prediction_type(self) -> str:
        """Diffusers' name of what the network predicts."""

    @property
    def image_scale(self) -> float:
        """The scale at which images are diffused."""

    def pair(self, x0: Tensor, draws: PoolDraws, labels: Tensor | None = None, condition: Mapping[str, Tensor] | None = None) -> Pairs:
        """See `DenoisingObjective.pair`; the statistics are those of `coupling_statistics`, ``paired_images`` and ``coupling_seconds``."""

    def __call__(self, model: nn.Module, pairs: Pairs, draws: Draws) -> Tensor:
        """The loss of each image, fp32 [B]."""


@dataclass(frozen=True)
class DenoisingObjective:
    """The denoising loss of a batch: epsilon, x0, v or flow prediction.

    The noise is drawn, then paired, then offset: the target holds the noise that x_t holds. ``input_perturbation`` comes last and
    is in x_t alone, as in DDPM-IP. Draws of one purpose never depend on another's, so switching one axis leaves the rest as it was.

    Args:
        process: the noise process, on the training device.
        sampler: the timestep law.
        coupling: which noise belongs to which image.
        weights: the cost of an error at each level, for the MSE of ``prediction_type``; on the training device.
        prediction_type: diffusers' name of the target.
        image_scale: the scale at which images are diffused; the coupling sees them at this scale (`process` has it built in).
        coupling_start_step: noise stays independent before this optimizer step.
        noise_offset: standard deviation of a per-channel constant added to the paired noise.
        input_perturbation: standard deviation of what x_t's noise differs from the target's by.
        dream_detail_preservation: p of DREAM (arXiv 2312.00210), which adds ``sigma_t^p`` of the network's own error in the noise to the
            target and to x_t's noise, found by a forward pass without gradient; epsilon-prediction only. None is without.
    """

    process: NoiseProcess
    sampler: TimestepSampler
    coupling: Coupling
    weights: LossWeights
    prediction_type: str = "epsilon"
    image_scale: float = 1.0
    coupling_start_step: int = 0
    noise_offset: float = 0.0
    input_perturbation: float = 0.0
    dream_detail_preservation: float | None = None

    def pair(self, x0: Tensor, draws: PoolDraws, labels: Tensor | None = None, condition: Mapping[str, Tensor] | None = None) -> Pairs:
        """What does not need the network: timesteps and paired noises. May run on another thread, ahead of its step.

        Args:
            x0: this rank's images or latents, fp32 [K * B, C, H, W], on the process's device.
            draws: the random numbers of the pool that they belong to, of this rank alone or of all.
            labels: for a coupling that looks at the condition: int64 [K * B], or floating [K * B, E].
            condition: keyword arguments of the network, each [K * B, ...].
        """
        uniforms = draws.uniform("timesteps").split(draws.batch_size)  #     a law may tie the draws of one micro-batch together
        steps = [part.step for part in draws.parts for _ in range(draws.ranks)]  # a pool may begin in one step and end in another
        t = torch.cat([self.sampler.at(step).from_uniforms(part) for step, part in zip(steps, uniforms, strict=True)])
        t = t.to(x0.device)  #                                               [N]       how often each level is trained  <- SpeeD
        drawn = draws.normal("noise", *x0.shape[1:])  #                      [N,C,H,W] the pool of noises
        scaled = x0 if self.image_scale == 1 else self.image_scale * x0
        coupled = draws.step >= self.coupling_start_step
        coupling = self.coupling.at(draws) if isinstance(self.coupling, EpochCoupling) and coupled else self.coupling
        own = slice(None) if draws.own is None else draws.own  #             N = K * B rows, or those of all ranks
        start = time.perf_counter()
        with recorded_solutions() as solutions:
            if coupled:
                generator = draws.generator("coupling")
                noise = coupling(scaled, drawn, timesteps=t, labels=labels, generator=generator)  # [K*B,C,H,W]  <- Immiscible
            else:
                noise = drawn[own]
        seconds = torch.tensor(time.perf_counter() - start, device=t.device)
        together = paired_together(coupling, t) if coupled else torch.ones((), device=t.device)
        statistics = {**coupling_statistics(scaled, drawn[own], noise), "paired_images": together, "coupling_seconds": seconds}
        if pairs_batch(self.coupling):
            statistics |= solution_statistics(solutions, t.device)
        return Pairs(x0, t[own], noise, labels, condition or {}, statistics)

    def __call__(self, model: nn.Module, pairs: Pairs, draws: Draws) -> Tensor:
        """The loss of each image, as `loss`; a law that goes by losses learns of it and weighs it."""
        return self.sampler.settled(draws.step, pairs.timesteps, self.loss(model, pairs, draws))

    def loss(self, model: nn.Module, pairs: Pairs, draws: Draws) -> Tensor:
        """The loss of each image.

        Args:
            model: called as ``model(xt, time, **condition)``; returns an object with ``sample``.
            pairs: a micro-batch from `pair`.
            draws: its random numbers.

        Returns:
            fp32 [B], weighted; the loop takes the mean.
        """
        x0, t, noise = pairs.x0, pairs.timesteps, pairs.noise  #             [B,C,H,W], [B], [B,C,H,W]
        batch, channels = x0.shape[:2]
        if self.noise_offset:
            noise = noise + self.noise_offset * draws.normal("noise_offset", batch, channels, 1, 1)
        perturbed = noise
        if self.input_perturbation:
            perturbed = noise + self.input_perturbation * draws.normal("input_perturbation", *x0.shape)
        process, level = self.process.drawn(t, draws)  #                     [B]       of a continuum, each image's own
        xt = process.add_noise(x0, perturbed, level)  #                      [B,C,H,W] the scheduler's arithmetic, fp32
        target = process.target(x0, noise, level, self.prediction_type)
        if self.dream_detail_preservation is not None:
            xt, target = self._dream(model, xt, target, t, pairs.condition, self.dream_detail_preservation)
        output = model(xt, process.model_time[level], **pairs.condition).sample
        return weighted_mse(output, target, self.weights[t])  #              [B]       what an error at each level costs <- SpeeD

    def _dream(
        self, model: nn.Module, xt: Tensor, target: Tensor, t: Tensor, condition: Mapping[str, Tensor], power: float
    ) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            predicted = model(xt, self.process.model_time[t], **condition).sample.float()
        sigma = self.process.noise[t].view(-1, 1, 1, 1)
        correction = sigma**power * (target - predicted)
        return xt + sigma * correction, target + correction


def solution_statistics(solutions: Sequence[Assignment], device: torch.device) -> dict[str, Tensor]:
    """What the solver has to say of one pool's assignments, as fp32 scalars.

    ``assignment_kept`` is the share of the achievable reduction that is certainly kept (the least, if classes are solved apart),
    ``assignment_bids_per_row`` the auction's work, and ``assignment_relaxations`` how often it met its cap and went on more coarsely.
    """
    rows = sum(len(solution.index) for solution in solutions) or 1
    values = {
        "assignment_kept": min((solution.kept for solution in solutions), default=1.0),
        "assignment_bids_per_row": sum(solution.bids for solution in solutions) / rows,
        "assignment_relaxations": float(sum(solution.relaxations for solution in solutions)),
    }
    return {name: torch.tensor(value, device=device) for name, value in values.items()}


def weighted_mse(output: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    """``mean over C,H,W of weight * (output - target)^2`` for each image.

    The weight multiplies before the mean: that is the order of the diffusers scripts, so that gradients agree to the last bit.

    Args:
        output: [B, C, H, W], any floating type; the loss is taken in fp32.
        target: fp32 [B, C, H, W].
        weights: fp32 [B].

    Returns:
        fp32 [B].
    """
    squared = nn.functional.mse_loss(output.float(), target, reduction="none")
    return (weights.view(-1, *[1] * (squared.dim() - 1)) * squared).flatten(1).mean(1)
