"""The diffusers scheduler of a noise process."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from immiscible.errors import UserError
from immiscible.process import BETA_SCHEDULES, PREDICTION_TYPES

QUADRATIC_BETAS = (1e-4, 0.02)  # the papers' ends


def build_scheduler(
    noise_process: str,
    *,
    num_train_timesteps: int = 1000,
    beta_schedule: str = "linear",
    beta_start: float = 1e-4,
    beta_end: float = 0.02,
    prediction_type: str | None = None,
    image_scale: float = 1.0,
) -> Any:
    """The diffusers scheduler to train with and to save with the run.

    Args:
        noise_process: "ddpm" for a `DDPMScheduler`, "flow" for a `FlowMatchEulerDiscreteScheduler`.
        num_train_timesteps: T.
        beta_schedule: one of `BETA_SCHEDULES`, for "ddpm". The papers' "quadratic" is diffusers' scaled_linear with the default ends, as
            which it is saved; Stable Diffusion's is scaled_linear from 0.00085 to 0.012.
        beta_start: the first beta, for "ddpm" (not read by squaredcos_cap_v2).
        beta_end: the last beta.
        prediction_type: what the network predicts, one of `PREDICTION_TYPES`; the first one of the process if not given.
        image_scale: the factor c on the image in ``xt = signal * c * x0 + noise * n`` (Chen 2023, "On the importance of noise
            scheduling"); below 1 every step is noisier. Dividing such an xt by its standard deviation for data of unit variance
            gives back a process of the same kind with c^2 times the SNR: alpha_bar' = c^2 ab / (c^2 ab + 1 - ab) for "ddpm", written
            into the scheduler as trained betas, and sigma' = (sigma / c) / (1 + (1 / c - 1) sigma) for "flow", which is diffusers'
            shift of 1/c. The images are not scaled and plain diffusers pipelines sample the run as it is.

    Raises:
        UserError: a value is out of range or two do not go together; the message names the flag.
    """
    prediction_type = _trained_type(noise_process, prediction_type)
    if num_train_timesteps < 1:
        raise UserError(f"--ddpm_num_steps {num_train_timesteps} is too small: it must be at least 1")
    if not 0 < image_scale < float("inf"):
        raise UserError(f"--image_scale {image_scale:g} is out of range: it must be above 0 (1 leaves the noise process as it is)")
    if beta_schedule not in BETA_SCHEDULES:
        raise UserError(f"--ddpm_beta_schedule {beta_schedule!r} is unknown; known: {', '.join(BETA_SCHEDULES)}")
    if not 0 < beta_start <= beta_end < 1:
        raise UserError(
            f"--ddpm_beta_start {beta_start:g} and --ddpm_beta_end {beta_end:g} are out of range: they must be 0 < start <= end < 1"
        )
    beta_schedule = _of_diffusers(beta_schedule, (beta_start, beta_end))
    from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

    if noise_process == "flow":
        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=num_train_timesteps, shift=1 / image_scale)
    settings: dict[str, Any] = {
        "num_train_timesteps": num_train_timesteps,
        "beta_schedule": beta_schedule,
        "beta_start": beta_start,
        "beta_end": beta_end,
        "prediction_type": prediction_type,
    }
    scheduler: Any = DDPMScheduler(**settings)
    if image_scale == 1:
        return scheduler
    return DDPMScheduler(**settings, trained_betas=_scaled_betas(scheduler.betas, image_scale))


def _of_diffusers(beta_schedule: str, ends: tuple[float, float]) -> str:
    """What diffusers calls a schedule of `BETA_SCHEDULES`; of the papers' quadratic one with the papers' ends alone."""
    if beta_schedule != "quadratic":
        return beta_schedule
    if ends != QUADRATIC_BETAS:
        raise UserError(
            f"--ddpm_beta_schedule quadratic is the papers', with betas from {QUADRATIC_BETAS[0]:g} to {QUADRATIC_BETAS[1]:g}: for "
            f"{ends[0]:g} to {ends[1]:g} give scaled_linear"
        )
    return "scaled_linear"


def _trained_type(noise_process: str, prediction_type: str | None) -> str:
    """The prediction type, of those that plain diffusers samples with this process; the first of them if none is given."""
    if noise_process not in PREDICTION_TYPES:
        raise UserError(f"--noise_process {noise_process!r} is unknown; known: {', '.join(PREDICTION_TYPES)}")
    trained = PREDICTION_TYPES[noise_process]
    prediction_type = prediction_type or trained[0]
    if prediction_type not in trained:
        raise UserError(
            f"--noise_process {noise_process} needs --prediction_type {' or '.join(trained)}, not {prediction_type!r}: "
            "plain diffusers could not sample anything else"
        )
    return prediction_type


def _scaled_betas(betas: Tensor, image_scale: float) -> list[float]:
    alpha_bar = (1 - betas.double()).cumprod(0)
    scaled = image_scale**2 * alpha_bar / (image_scale**2 * alpha_bar + 1 - alpha_bar)
    before = torch.cat([torch.ones_like(scaled[:1]), scaled[:-1]])
    return (1 - scaled / before).tolist()
