"""One batch on one screen: from images to the loss of each image, as named moves.

Five independent choices meet here and nowhere else: timestep sampling, noise coupling, noise process, prediction type, loss weighting.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .coupling import Coupling, coupling_statistics, paired_together
from .process import NoiseProcess
from .randomness import Draws
from .timesteps import TimestepSampler


@dataclass(frozen=True)
class DenoisingObjective:
    """The denoising loss of a batch: epsilon, x0, v or flow prediction.

    The noise is drawn, then paired, then offset: the target holds the noise that x_t holds. ``input_perturbation`` comes last and
    is in x_t alone, as in DDPM-IP. Draws of one purpose never depend on another's, so switching one axis leaves the rest as it was.

    Args:
        process: the noise process, on the training device.
        sampler: the timestep law.
        coupling: which noise belongs to which image.
        weights: fp32 [T], the cost of an error at each level, for the MSE of ``prediction_type``.
        prediction_type: diffusers' name of the target.
        image_scale: the scale at which images are diffused; the coupling sees them at this scale (`process` has it built in).
        coupling_start_step: noise stays independent before this optimizer step.
        noise_offset: standard deviation of a per-channel constant added to the paired noise.
        input_perturbation: standard deviation of what x_t's noise differs from the target's by.
    """

    process: NoiseProcess
    sampler: TimestepSampler
    coupling: Coupling
    weights: Tensor
    prediction_type: str = "epsilon"
    image_scale: float = 1.0
    coupling_start_step: int = 0
    noise_offset: float = 0.0
    input_perturbation: float = 0.0

    def __call__(
        self, model: nn.Module, x0: Tensor, draws: Draws, condition: Mapping[str, Tensor] | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """One batch.

        Args:
            model: called as ``model(xt, time, **condition)``; returns an object with ``sample``.
            x0: images or latents, fp32 [B, C, H, W], on the process's device.
            draws: this micro-batch's random numbers.
            condition: keyword arguments of the model.

        Returns:
            losses: fp32 [B], one per image, weighted; the loop takes the mean.
            statistics: fp32 scalars on the device, see `coupling_statistics`; also ``paired_images`` and ``coupling_seconds``.
        """
        batch, channels = x0.shape[:2]
        t = self.sampler.from_uniforms(draws.uniform("timesteps", batch))  # [B]       how often each level is trained  <- SpeeD
        drawn = draws.normal("noise", *x0.shape)  #                          [B,C,H,W] the pool of noises
        paired, statistics = self._pair(x0, drawn, t, draws)  #              [B,C,H,W] which noise belongs to which image <- Immiscible
        noise = paired
        if self.noise_offset:
            noise = noise + self.noise_offset * draws.normal("noise_offset", batch, channels, 1, 1)
        perturbed = noise
        if self.input_perturbation:
            perturbed = noise + self.input_perturbation * draws.normal("input_perturbation", *x0.shape)
        xt = self.process.add_noise(x0, perturbed, t)  #                     [B,C,H,W] the scheduler's arithmetic, fp32
        output = model(xt, self.process.model_time[t], **(condition or {})).sample
        target = self.process.target(x0, noise, t, self.prediction_type)
        losses = weighted_mse(output, target, self.weights[t])  #            [B]       what an error at each level costs <- SpeeD
        return losses, statistics

    def _pair(self, x0: Tensor, drawn: Tensor, t: Tensor, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        scaled = x0 if self.image_scale == 1 else self.image_scale * x0
        start = time.perf_counter()
        coupled = draws.step >= self.coupling_start_step
        paired = self.coupling(scaled, drawn, timesteps=t, generator=draws.generator("coupling")) if coupled else drawn
        seconds = time.perf_counter() - start
        together = paired_together(self.coupling, t) if coupled else torch.ones((), device=t.device)
        statistics = coupling_statistics(scaled, drawn, paired)
        return paired, {**statistics, "paired_images": together, "coupling_seconds": torch.tensor(seconds, device=t.device)}


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
