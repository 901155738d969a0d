"""Samplers of EDM networks that diffusers lacks: Heun's second-order steps, and FDM's scaling of the network's input.

A run of an FDM network leaves this file beside its scheduler, as ``scheduler/edm_scheduler.py``. It needs torch and diffusers alone:

    pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import EDMEulerScheduler
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_edm_euler import EDMEulerSchedulerOutput
from torch import Tensor


class EDMScheduler(EDMEulerScheduler):
    """EDM's deterministic sampler (Karras et al. 2022, algorithm 1), by Euler's or by Heun's steps.

    Args:
        sigma_min: where sampling ends, before 0.
        sigma_max: where it begins.
        sigma_data: standard deviation of the data.
        num_train_timesteps: not read in sampling.
        rho: spacing of the sigmas.
        heun: correct each step but the last by the slope at its end: 2 n - 1 calls of the network in n steps.
        momentum: scale the network's input as FDM does: by ``(1 + B) exp(-B)``, ``B = 0.1 t + 19.9 t^2 / 2``, t from 0 at sigma_min to 1 at
            sigma_max.
    """

    @register_to_config
    def __init__(
        self,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        sigma_data: float = 0.5,
        num_train_timesteps: int = 1000,
        rho: float = 7.0,
        heun: bool = True,
        momentum: bool = False,
    ) -> None:
        settings: dict[str, Any] = {"sigma_schedule": "karras", "prediction_type": "epsilon", "final_sigmas_type": "zero"}
        self.register_to_config(**settings)  # which the base class reads
        ramp = torch.linspace(0, 1, num_train_timesteps, dtype=torch.float64)
        self._lay_out(self._compute_karras_sigmas(ramp).float())
        self.num_inference_steps: int | None = None
        self.is_scale_input_called = False

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """The levels of ``num_inference_steps`` steps, then 0; with Heun's steps all but the first and the last come twice."""
        self.num_inference_steps = num_inference_steps
        ramp = torch.linspace(0, 1, num_inference_steps, dtype=torch.float64)
        sigmas = self._compute_karras_sigmas(ramp).float()
        if self.config.heun:
            sigmas = torch.cat([sigmas[:1], sigmas[1:].repeat_interleave(2)])
        self._lay_out(sigmas, device)

    def _lay_out(self, sigmas: Tensor, device: str | torch.device | None = None) -> None:
        self.timesteps: Tensor = self.precondition_noise(sigmas).to(device)
        self.sigmas = torch.cat([sigmas, sigmas.new_zeros(1)]).cpu()
        self._step_index: int | None = None
        self._begin_index: int | None = None
        self._start: Tensor | None = None
        self._slope: Tensor | None = None

    def _get_conditioning_c_in(self, sigma: float | Tensor) -> float | Tensor:
        if not self.config.momentum:
            return super()._get_conditioning_c_in(sigma)
        low, high = self.config.sigma_min, self.config.sigma_max
        t = (torch.as_tensor(sigma).double().cpu() - low).clamp(min=0) / (high - low)
        spent = 0.1 * t + 19.9 * t**2 / 2
        return float((1 + spent) * (-spent).exp())

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> EDMEulerSchedulerOutput | tuple:
        """The image after one call of the network; nothing is drawn, so ``generator`` is not read.

        With Heun's steps the calls take turns: one steps to the next level, and one, at that level, corrects the step.
        """
        if self.step_index is None:
            self._init_step_index(timestep)
        index = int(self._step_index or 0)
        sigma, following = self.sigmas[index], self.sigmas[index + 1]
        sample = sample.float()
        denoised = self.precondition_outputs(sample, model_output.float(), sigma)
        slope = (sample - denoised) / sigma
        if self._start is not None:  # at the end of a step
            before = self.sigmas[index - 1]
            moved = self._start + (sigma - before) * (self._slope + slope) / 2
            self._start = self._slope = None
        else:
            moved = sample + (following - sigma) * slope
            if self.config.heun and following > 0:
                self._start, self._slope = sample, slope
        self._step_index = index + 1
        moved = moved.to(model_output.dtype)
        return EDMEulerSchedulerOutput(prev_sample=moved, pred_original_sample=denoised) if return_dict else (moved, denoised)
