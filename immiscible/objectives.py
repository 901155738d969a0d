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
class Pairs:
    """A micro-batch with everything drawn that the network does not take part in.

    Args:
        x0: images or latents, fp32 [B, C, H, W].
        timesteps: int64 [B].
        noise: the noise of each image, fp32 [B, C, H, W].
        statistics: fp32 scalars on the device: see `coupling_statistics`; also ``paired_images`` and ``coupling_seconds``.
    """

    x0: Tensor
    timesteps: Tensor
    noise: Tensor
    statistics: dict[str, Tensor]


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

    def pair(self, x0: Tensor, draws: Draws) -> Pairs:
        """What does not need the network: timesteps and paired noises. May run on another thread, one batch ahead.

        Args:
            x0: images or latents, fp32 [B, C, H, W], on the process's device.
            draws: this micro-batch's random numbers.
        """
        t = self.sampler.from_uniforms(draws.uniform("timesteps", len(x0))).to(x0.device)  # [B] how often each level is trained  <- SpeeD
        drawn = draws.normal("noise", *x0.shape)  #                            [B,C,H,W] the pool of noises
        scaled = x0 if self.image_scale == 1 else self.image_scale * x0
        coupled = draws.step >= self.coupling_start_step
        start = time.perf_counter()
        noise = self.coupling(scaled, drawn, timesteps=t, generator=draws.generator("coupling")) if coupled else drawn  # <- Immiscible
        seconds = torch.tensor(time.perf_counter() - start, device=t.device)
        together = paired_together(self.coupling, t) if coupled else torch.ones((), device=t.device)
        statistics = {**coupling_statistics(scaled, drawn, noise), "paired_images": together, "coupling_seconds": seconds}
        return Pairs(x0, t, noise, statistics)

    def __call__(self, model: nn.Module, pairs: Pairs, draws: Draws, condition: Mapping[str, Tensor] | None = None) -> Tensor:
        """The loss of each image.

        Args:
            model: called as ``model(xt, time, **condition)``; returns an object with ``sample``.
            pairs: from `pair`.
            draws: the same random numbers.
            condition: keyword arguments of the model.

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
        xt = self.process.add_noise(x0, perturbed, t)  #                     [B,C,H,W] the scheduler's arithmetic, fp32
        output = model(xt, self.process.model_time[t], **(condition or {})).sample
        target = self.process.target(x0, noise, t, self.prediction_type)
        return weighted_mse(output, target, self.weights[t])  #              [B]       what an error at each level costs <- SpeeD


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
