"""What a user would want to hear before the hours are spent: one line each, at the start of a run and in its plan."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite, prod
from typing import TYPE_CHECKING

import torch

from immiscible.coupling import bias_notice, pairs_batch
from immiscible.evaluation.leakage import leak_notice
from immiscible.flags import defaults_of
from immiscible.networks.sd3_arguments import SD3Arguments
from immiscible.objective_choice import ObjectiveArguments
from immiscible.training.arguments import calls_in_a_step
from immiscible.training.task import Task

if TYPE_CHECKING:
    from immiscible.data.batches import GlobalBatchOrder
    from immiscible.data.stream_order import StreamOrder
    from immiscible.training.arguments import RunConfig

BACKWARD = 3  # forward passes that a training step of an image costs, about: its own and a backward pass of two
BETAS = ("ddpm_beta_start", "ddpm_beta_end")
OF_DENOISING = ("prediction_type", "sampling_scheduler", "timestep_spacing")  # no errors elsewhere: task files that are combined name them
OF_DDPM = ("ddpm_beta_schedule", *BETAS, "timestep_spacing")  # likewise where the process is a flow
OF_OTHERS = {  # of AdamW, and of the average that the flags describe
    "adafactor": ("adam_beta1", "adam_beta2", "adam_epsilon"),
    "schedule_free": ("use_ema_warmup", "ema_inv_gamma", "ema_power", "ema_max_decay", "ema_min_decay"),
}
BEGINNINGS = ("second_phase_step", "coupling_start_step")  # optimizer steps at which something begins
UNWARMED = ("constant",)  # schedules that know no warm-up


def notices(config: RunConfig, task: Task, order: GlobalBatchOrder | StreamOrder, max_steps: int) -> list[str]:
    """The lines, in the order of what they can cost; most runs have none.

    Args:
        config: the flags.
        task: what is trained.
        order: which images a rank takes for which micro-batch.
        max_steps: optimizer steps in all.
    """
    images = order.global_batch_size * config.gradient_accumulation_steps
    coupling = task.objective.coupling
    conditions, captions = task.told_apart(min(order.num_images, max_steps * images))
    epochs = max_steps * config.gradient_accumulation_steps / order.batches_per_epoch if isfinite(order.batches_per_epoch) else 0.0
    found = [
        _warm_up(config, max_steps),
        _unreached(config, max_steps),
        _epsilon(task),
        _scheme(config, task),
        *_unread(config),
        _sampling(config, max_steps, epochs, max_steps * images),
        bias_notice(coupling, prod(task.shape)),
        leak_notice(coupling, int(conditions), captions=captions),
    ]
    return list(filter(None, found))


def _warm_up(config: RunConfig, max_steps: int) -> str:
    if max_steps > config.lr_warmup_steps or config.lr_scheduler in UNWARMED:
        return ""
    return (
        f"the run ends inside the warm-up: {max_steps} steps, --lr_warmup_steps {config.lr_warmup_steps}; the learning rate never reaches "
        f"--learning_rate {config.learning_rate:g}, so give more steps or a shorter warm-up"
    )


def _unreached(config: RunConfig, max_steps: int) -> str:
    begins = {name: getattr(config, name) or 0 for name in BEGINNINGS}
    flags = [f"--{name} {step}" for name, step in begins.items() if step >= max_steps]
    return f"never reached in a run of {max_steps} steps: {', '.join(flags)}; what was to begin there does not" if flags else ""


def _epsilon(task: Task) -> str:
    objective = task.objective
    weights = objective.weights.vector
    flat = bool(torch.equal(weights, weights[:1].expand_as(weights)))
    if not (pairs_batch(objective.coupling) and objective.prediction_type == "epsilon" and flat):
        return ""
    return (
        "assignment under plain epsilon-prediction: on pixels in docs/RESULTS.md it helps at 5 inference steps and does harm at 20; "
        "--prediction_type v_prediction or sample gains at both; for a checkpoint that predicts epsilon, --loss_weighting velocity keeps "
        "the gain without the harm"
    )


def _scheme(config: RunConfig, task: Task) -> str:
    """Of a checkpoint that learned a flow: its own authors' and diffusers' law is another than this suite's default."""
    named = isinstance(config, SD3Arguments) and config.weighting_scheme is None and task.objective.prediction_type == "flow_prediction"
    if not named or (config.timestep_sampling, config.loss_weighting) != ("uniform", "none") or config.second_timestep_sampling:
        return ""
    return (
        "each level of the checkpoint's flow is trained equally often, and its error as it is; --weighting_scheme logit_normal has the law "
        "and the weighting that diffusers' SD3 script has by default, --weighting_scheme none only its weighting"
    )


def _unread(config: RunConfig) -> list[str]:
    owners: dict[str, Sequence[str]] = {}
    if isinstance(config, ObjectiveArguments) and config.objective != "denoising":
        owners[f"{config.objective} has a target and a sampler"] = OF_DENOISING
    elif isinstance(config, ObjectiveArguments) and config.noise_process == "flow":
        owners["a flow has a schedule and a sampler"] = OF_DDPM
    elif isinstance(config, ObjectiveArguments) and config.ddpm_beta_schedule == "squaredcos_cap_v2":
        owners["squaredcos_cap_v2 has ends"] = BETAS
    if config.optimizer in OF_OTHERS:
        owners[f"{config.optimizer} has averages"] = OF_OTHERS[config.optimizer]
    defaults, lines = defaults_of(type(config)), []
    for owner, names in owners.items():
        flags = [f"--{name} {getattr(config, name)}" for name in names if name in defaults and getattr(config, name) != defaults[name]]
        lines += [f"not read, as {owner} of its own: {', '.join(flags)}"] if flags else []
    return lines


def _sampling(config: RunConfig, max_steps: int, epochs: float, images: int) -> str:
    calls = config.grids(max_steps, epochs) * config.grid_calls
    if config.eval_steps:
        a_sample = sum(config.eval_inference_steps) * sum(calls_in_a_step(scale, config.interval) for scale in config.eval_guidance_scales)
        times = -(-max_steps // config.eval_steps) * (2 if config.eval_raw_weights else 1)
        calls += round(times * config.eval_samples * a_sample)
    ratio = calls / (BACKWARD * images)
    if ratio <= 1:
        return ""
    return (
        f"samples and evaluations will cost about {ratio:.1f} times what the training costs ({calls:,} calls of the network for an image, "
        f"against {BACKWARD} x {images:,}): fewer inference steps, grids or --eval_samples shorten the run"
    )
