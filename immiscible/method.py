"""The flags of the five axes, and the objective that they ask for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from immiscible.assignment.conditions import CONDITIONS
from immiscible.assignment.costs import COST_DTYPES, METRICS
from immiscible.assignment.ranks import SCOPES
from immiscible.assignment.solve import SOLVERS
from immiscible.configs import UnconditionalConfig
from immiscible.coupling import COUPLINGS, SCORES, build_coupling, pairs_batch
from immiscible.errors import UserError
from immiscible.flags import flag, given
from immiscible.objectives import DenoisingObjective
from immiscible.pools import across_ranks
from immiscible.process import BETA_SCHEDULES, PREDICTION_TYPES, NoiseProcess, check_prediction_type
from immiscible.timesteps import TIMESTEP_SAMPLINGS, timestep_sampler
from immiscible.weighting import LOSS_WEIGHTINGS, loss_weights

if TYPE_CHECKING:
    from accelerate import Accelerator


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
        beta_schedule: one of `BETA_SCHEDULES`, for "ddpm". The papers' quadratic schedule is scaled_linear with the default
            ends; Stable Diffusion's is scaled_linear from 0.00085 to 0.012.
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
    prediction_type = prediction_type or PREDICTION_TYPES.get(noise_process, ("",))[0]
    check_prediction_type(noise_process, prediction_type)
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
    from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler  # late, so that --help and usage errors come quickly

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


def _scaled_betas(betas: Tensor, image_scale: float) -> list[float]:
    alpha_bar = (1 - betas.double()).cumprod(0)
    scaled = image_scale**2 * alpha_bar / (image_scale**2 * alpha_bar + 1 - alpha_bar)
    before = torch.cat([torch.ones_like(scaled[:1]), scaled[:-1]])
    return (1 - scaled / before).tolist()


def training_scheduler(config: UnconditionalConfig) -> Any:
    """The diffusers scheduler of the noise process that the flags ask for."""
    return build_scheduler(
        config.noise_process,
        num_train_timesteps=config.ddpm_num_steps,
        beta_schedule=config.ddpm_beta_schedule,
        beta_start=config.ddpm_beta_start,
        beta_end=config.ddpm_beta_end,
        prediction_type=config.prediction_type,
        image_scale=config.image_scale,
    )


def build_objective(
    config: MethodArguments,
    scheduler: Any,
    accelerator: Accelerator,
    *,
    image_scale: float = 1.0,
    dream_detail_preservation: float | None = None,
) -> DenoisingObjective:
    """The objective that the flags ask for, on the process and the prediction type of a diffusers scheduler; every rank calls it.

    Raises:
        UserError: an option out of range, or what the coupling, the law or the weighting cannot do with this process.
    """
    method, process = given(config, MethodArguments), NoiseProcess.from_scheduler(scheduler)
    prediction_type = scheduler.config.get("prediction_type", "flow_prediction")
    if config.coupling_min_timestep >= process.num_timesteps:
        raise UserError(f"--coupling_min_timestep must be below {process.num_timesteps}, not {config.coupling_min_timestep}")
    coupling = build_coupling(
        config.noise_coupling,
        min_timestep=config.coupling_min_timestep,
        metric=config.coupling_metric,
        dtype=config.coupling_dtype,
        solver=config.coupling_solver,
        condition=config.coupling_condition,
        condition_ratio=config.coupling_condition_ratio,
        candidates=config.coupling_candidates,
        score=config.coupling_score,
        size=config.coupling_reservoir,
    )
    if config.coupling_scope == "global" and pairs_batch(coupling):
        coupling = across_ranks(coupling, accelerator, config.coupling_window)
    return DenoisingObjective(
        process=process.to(accelerator.device),
        sampler=timestep_sampler(config.timestep_sampling, process, **method),
        coupling=coupling,
        weights=loss_weights(config.loss_weighting, process, prediction_type, **method).float().to(accelerator.device),
        prediction_type=prediction_type,
        image_scale=image_scale,
        coupling_start_step=config.coupling_start_step,
        noise_offset=config.noise_offset,
        input_perturbation=config.input_perturbation,
        dream_detail_preservation=dream_detail_preservation,
    )


@dataclass
class MethodArguments:
    """How noise and time are drawn, and what an error costs: the axes this suite adds to the diffusers scripts."""

    _argument_group_name = "method"

    noise_coupling: str = flag(
        "independent",
        "which noise belongs to which image: assignment is Immiscible Diffusion, nearest takes the best of k "
        "(biases the noise), reservoir keeps noises between steps (for batches of 1 to 8), flipped_assignment is the rebuttal's control",
        choices=COUPLINGS,
    )
    coupling_metric: str = flag("l2", "the distance that the assignment minimizes", choices=METRICS)
    coupling_dtype: str = flag(
        "auto",
        "precision of the operands of the assignment's cost; the paper quantizes to float16; auto is bfloat16 where the hardware has it",
        choices=COST_DTYPES,
    )
    coupling_solver: str = flag(
        "auto",
        "exact, or an auction that keeps more than 99.9 % of the reduction in a fraction of the time; auto is exact below 128 images",
        choices=SOLVERS,
    )
    coupling_scope: str = flag(
        "process",
        "global assigns over the batches of all processes at once (one gather of the cost's rows in 16 bits), process over each one's own",
        choices=SCOPES,
    )
    coupling_window: int = flag(
        1, "assign over this many micro-batches at once, accumulated or of successive steps: the remedy for small batches"
    )
    coupling_condition: str = flag(
        "none",
        "so that the noise does not tell the class: assign within each class; centered, after taking each class's mean so far from its "
        "images (experimental; of use with few images of a class in a batch); or with a penalty for exchanges between classes (C2OT)",
        choices=CONDITIONS,
    )
    coupling_condition_ratio: float = flag(
        0.01, "r of --coupling_condition penalty: the share of all pairs of a batch that may still be better than an image's own noise"
    )
    coupling_reservoir: int = flag(256, "noises that the reservoir coupling keeps")
    coupling_candidates: int = flag(8, "k of the nearest coupling")
    coupling_score: str = flag("l2", "nearest by l2, or by dot (keeps the length of the noise)", choices=SCORES)
    coupling_min_timestep: int = flag(0, "pair only images at or above this timestep; the others keep their own noise")
    coupling_start_step: int = flag(
        0, "train with independent noise until this optimizer step; a window is paired if it begins at or after it"
    )
    timestep_sampling: str = flag(
        "uniform",
        "how often each noise level is trained: asymmetric is SpeeD's eq. 3, asymmetric_released what its code does",
        choices=TIMESTEP_SAMPLINGS,
    )
    asymmetric_k: float = flag(5.0, "k of SpeeD: steps before the threshold are drawn k times as often as those after")
    asymmetric_r: float | None = flag(
        None,
        "r of SpeeD: the threshold tau is the first step with alpha_bar <= 1/r; 143.55 (tau = 700 on the linear schedule) if "
        "neither this nor --asymmetric_tau is given",
    )
    asymmetric_tau: int | None = flag(None, "tau of SpeeD, directly: steps 0..tau-1 are boosted; not together with --asymmetric_r")
    logit_mean: float = flag(0.0, "m of logit_normal; positive means noisier")
    logit_std: float = flag(1.0, "s of logit_normal")
    loss_weighting: str = flag(
        "none",
        "what an error at each level costs: none is the plain MSE, change_aware SpeeD's, snr the diffusers script's for "
        "--prediction_type sample",
        choices=LOSS_WEIGHTINGS,
    )
    change_aware_lambda: float = flag(0.6, "lambda of SpeeD's weighting, 0.5 (flat) to 1")
    snr_gamma: float | None = flag(None, "gamma of min_snr; 5 if not given")
    p2_k: float = flag(1.0, "k of p2")
    p2_gamma: float = flag(1.0, "gamma of p2")
    noise_offset: float = flag(0.0, "add this times a normal number per image and channel to the noise, after the coupling")
    log_class_leak: bool = flag(
        False, "log how well a linear probe reads the class from the paired noise (of the last 4,096 images), beside chance"
    )
    input_perturbation: float = flag(0.0, "perturb the noise by this in x_t but not in the target, after coupling and offset")
