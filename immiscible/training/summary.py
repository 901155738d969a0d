"""What a run says of itself: at the start, in a plan, and at the end."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from functools import partial
from itertools import islice
from math import isfinite
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import psutil
import torch
from torch import nn
from tqdm import tqdm

from immiscible.assignment.solve import LARGEST_BLOCK
from immiscible.coupling import pairs_batch
from immiscible.data.batches import BucketOrder, GlobalBatchOrder
from immiscible.errors import UserError, first_line
from immiscible.files import PARTIAL, read_lines, replace
from immiscible.objectives import Objective
from immiscible.samplers import TimestepSampler, TwoPhases
from immiscible.training.loop import StepStats
from immiscible.training.memory import at_first_call
from immiscible.training.notices import notices
from immiscible.training.task import Task

if TYPE_CHECKING:
    from accelerate import Accelerator

    from immiscible.data.stream_order import StreamOrder
    from immiscible.training.arguments import RunConfig


logger = logging.getLogger(__name__)


# What each line of metrics.jsonl says of which `measured_facts` tells the mean.
NEEDED = (
    "pair_distance_drawn",
    "pair_distance",
    "distance_reduction_percent",
    "noise_variance_drift",
    "noise_norm_drift",
    "paired_images",
    "coupling_seconds",
    "step_seconds",
)
Predict = Callable[[Sequence[Any], Mapping[str, Any]], tuple[str, int]]
PLAN_SECONDS = 60  # of steps after which --plan takes no further one


def check_batch_size(config: RunConfig, objective: Objective, images: float, global_batch: int) -> None:
    """Warns of a batch in which pairing is void or images repeat.

    Raises:
        UserError: there are too few images for a batch of different ones, and the coupling pairs within the batch; or too many are to
            be paired at once.
    """
    pairs = pairs_batch(objective.coupling)
    if images < global_batch:
        shortage = f"{images} images do not fill a batch of {global_batch} (--train_batch_size x processes)"
        if pairs:
            raise UserError(
                f"{shortage}, which --noise_coupling {config.noise_coupling} needs; lower --train_batch_size to at most {images}"
            )
        logger.warning("%s: images repeat within a batch", shortage)
    shared = global_batch if config.coupling_scope == "global" else config.train_batch_size
    if pairs and config.coupling_scope == "global" and not config.by_epoch and shared * config.window > LARGEST_BLOCK:
        raise UserError(
            f"--coupling_scope global pairs at most {LARGEST_BLOCK} images at once, not {shared} x --coupling_window "
            f"{config.window}, since every rank holds all their costs; lower one of them, or give --coupling_scope process"
        )
    if pairs and shared * config.window == 1 and not config.by_epoch:
        logger.warning(
            "--noise_coupling %s with --train_batch_size 1 is the identity: one image has one noise to choose from; "
            "--coupling_window pairs over several batches, --noise_coupling reservoir keeps noises between them",
            config.noise_coupling,
        )


def method_facts(config: RunConfig, objective: Objective, *, schedule: str, inference_steps: int) -> dict[str, str]:
    """What is trained and how, for the start of the run, the model card and the weights' metadata.

    Args:
        config: the run's flags.
        objective: built from them.
        schedule: the noise schedule's name, empty for a process that has none.
        inference_steps: with which samples are drawn.
    """
    coupling = {
        "assignment": f" ({config.coupling_metric}, cost in {config.coupling_dtype})",
        "flipped_assignment": f" ({config.coupling_metric}, cost in {config.coupling_dtype})",
        "reservoir": f" ({config.coupling_reservoir} noises)",
        "nearest": f" (best of {config.coupling_candidates} by {config.coupling_score})",
    }.get(config.noise_coupling, "")
    if config.coupling_condition != "none":
        coupling += f", condition {config.coupling_condition}"
    if config.by_epoch:
        coupling += ", over whole epochs"
    elif config.coupling_caches:
        coupling += f", {config.coupling_caches} noises kept by each image"
    elif config.window > 1:
        coupling += f", over {config.window} micro-batches"
    if config.coupling_scope == "global" and not config.by_epoch:
        coupling += ", over all processes"
    if config.coupling_min_timestep:
        coupling += f", timesteps from {config.coupling_min_timestep}"
    if config.coupling_start_step:
        coupling += f", from optimizer step {config.coupling_start_step}"
    steps = f"{objective.process.num_timesteps} steps"
    process = f"{objective.process.kind} ({schedule}, {steps})" if schedule else f"{objective.process.kind} ({steps})"
    return {
        "noise_coupling": config.noise_coupling + coupling,
        "timestep_sampling": _laws(config, objective.sampler),
        "loss_weighting": config.loss_weighting,
        "noise_process": process + (f", image scale {objective.image_scale:g}" if objective.image_scale != 1 else ""),
        "prediction_type": objective.prediction_type,
        "inference_steps": str(inference_steps),
        "seed": str(config.seed),
    }


def _laws(config: RunConfig, sampler: TimestepSampler) -> str:
    shift = f", shift {config.timestep_shift:g}" if config.timestep_shift != 1 else ""
    if not isinstance(sampler, TwoPhases):
        return _law(config.timestep_sampling, sampler) + shift
    first, second = _law(config.timestep_sampling, sampler.first), _law(str(config.second_timestep_sampling), sampler.second)
    return f"{first}; from optimizer step {sampler.switch:,} on {second}{shift}"


def _law(name: str, sampler: TimestepSampler) -> str:
    if sampler.course:
        return f"{name}, {sampler.course}"
    moved = sampler.moved_share()
    told = name + (f", moves {100 * moved:.1f} % of the draws" if moved >= 0.0005 else "")
    return told + (" (on this schedule the law hardly differs from uniform)" if name != "uniform" and moved < 0.05 else "")


def measured_facts(config: RunConfig) -> dict[str, str]:
    """Means over the run's ``metrics.jsonl``: what the coupling did and what it cost, if it did anything, and the last loss.

    They are of the lines that say it, and nothing where the last line is none of ours: a file that somebody edited must not cost the end
    of a run.
    """
    lines = read_lines(config.folder / "metrics.jsonl")
    said = {name: [line[name] for line in lines if isinstance(line.get(name), int | float)] for name in (lines[-1] if lines else ())}
    mean = {name: sum(values) / len(values) for name, values in said.items() if values}
    if not {"step", "loss", *NEEDED} <= mean.keys():
        return {}
    drawn, paired = mean["pair_distance_drawn"], mean["pair_distance"]
    coupling_ms = 1000 * config.gradient_accumulation_steps * mean["coupling_seconds"]
    solved = {}
    if mean.get("assignment_bids_per_row"):  # small batches are solved exactly, without bids
        solved["assignment"] = f"at least {100 * mean['assignment_kept']:.2f} % kept, {mean['assignment_bids_per_row']:.1f} bids an image"
        if mean["assignment_relaxations"]:
            solved["assignment"] += f", {mean['assignment_relaxations']:.3g} relaxations a micro-batch: bids met their cap"
    coupled = {
        "pair_distance": f"{drawn:.4f} drawn, {paired:.4f} paired ({mean['distance_reduction_percent']:+.2f} % reduction)",
        "noise_marginal_drift": "none over an epoch, in which no noise is used twice"
        if config.by_epoch or config.coupling_caches
        else f"variance {_signed(mean['noise_variance_drift'])}, norm {_signed(mean['noise_norm_drift'])}",
        **({"images_paired_together": f"{mean['paired_images']:.1f}"} if mean["paired_images"] > 1 else {}),
        **solved,
        "coupling_time": f"{coupling_ms:.2f} ms of a {1000 * mean['step_seconds']:.1f} ms step",
    }
    return {
        "optimizer_steps": f"{lines[-1]['step']:g}",
        **(coupled if paired != drawn else {}),
        "final_loss": f"{lines[-1]['loss']:.5f}",
        **_leak(lines[-1]),
    }


def _signed(value: float) -> str:
    """Such as +0.00012; what rounds to nothing has no sign."""
    text = f"{value:+.5f}"
    return "0" if float(text) == 0 else text


def _leak(line: dict[str, float]) -> dict[str, str]:
    """What the last line of a run with ``--log_class_leak`` found."""
    if "class_leak_accuracy" not in line:
        return {}
    accuracy, chance = line["class_leak_accuracy"], line["class_leak_chance"]
    return {"class_leak": f"a linear probe reads the class in {accuracy:.1%} of cases (chance {chance:.1%})"}


def report_start(
    config: RunConfig, task: Task, order: GlobalBatchOrder | StreamOrder, start_step: int, max_steps: int, rates: str = ""
) -> None:
    """Logs what is about to run, and what a user would want to know of it before (`immiscible.training.notices`); ``rates`` are the
    learning rates, where weights have several.
    """
    network, accumulation = task.network, config.gradient_accumulation_steps
    parameters, stored = parameters_of(network)
    trained = sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
    adapters = f" of which {trained / 1e6:.2f} are trained" if trained < parameters else ""
    adapters += f" ({stored / 1e6:.2f} million stored, with copies of what is shared)" if stored > parameters else ""
    ranks, images = order.global_batch_size // order.batch_size, order.global_batch_size * accumulation
    epoch = f" ({order.batches_per_epoch / accumulation:.4g} an epoch)" if isfinite(order.batches_per_epoch) else ""
    classes = f", {task.num_classes} classes" if task.num_classes else ""
    shape = "x".join(map(str, task.shape))
    for name, value in {
        "data": task.data.images.description,
        "network": f"{type(network).__name__}, {parameters / 1e6:.2f} million parameters{adapters}, {shape}{classes}",
        "batch": f"{order.batch_size} images x {ranks} processes x {accumulation} micro-batches = {images} a step",
        "steps": f"{start_step} to {max_steps}{epoch}",
        **({"learning_rates": rates} if rates else {}),
        **{name: fact for name, fact in task.facts.items() if name != "seed"},  # which was told when it was settled
    }.items():
        logger.info("%-18s %s", name.replace("_", " "), value)
    if isinstance(order, BucketOrder):
        logger.info("%-18s %d, height x width; samples, and images that are measured on, are squares", "buckets", len(order.words) - 1)
        for line in order.words:
            logger.info("%-18s %s", "", line)
    for notice in notices(config, task, order, max_steps):
        logger.warning(notice)


def parameters_of(network: nn.Module) -> tuple[int, int]:
    """How many parameters a network has, and how many numbers are stored of them: what modules share is stored with each."""
    once, stored = (network.named_parameters(remove_duplicate=each) for each in (True, False))
    return sum(parameter.numel() for _, parameter in once), sum(parameter.numel() for _, parameter in stored)


def checkpoint_bytes(network: nn.Module, optimizer: torch.optim.Optimizer, averaged: bool) -> float:
    """How much a checkpoint holds: what is trained of a network, with copies of what is shared, its average, if one is kept, and the
    optimizer's state, once it has taken a step.
    """
    parameters, stored = parameters_of(network)
    trained = _bytes(parameter for parameter in network.parameters() if parameter.requires_grad) * stored / parameters
    return (2 if averaged else 1) * trained + _bytes(value for of_weight in optimizer.state.values() for value in of_weight.values())


def _bytes(values: Iterable[Any]) -> int:
    return sum(value.numel() * value.element_size() for value in values if isinstance(value, torch.Tensor))


def report_plan(
    steps: Iterator[StepStats],
    network: nn.Module,
    accelerator: Accelerator,
    remaining: int,
    planning: Callable[[], str] | None = None,
    *,
    checkpoint: Callable[[], float],
    predict: Predict | None = None,
    timed: int = 5,
) -> None:
    """Takes a few steps that leave nothing behind and prints sizes and the time that the run would take; first what a step will need, which
    is known even where memory does not suffice for one.

    Args:
        steps: of the run.
        network: what is trained.
        accelerator: of the run.
        remaining: how many steps the run would take.
        planning: says, after the steps, what the plan of an epoch has taken; None where none is made.
        checkpoint: says, after the steps, how many bytes a checkpoint holds.
        predict: says, from the network's first call, what a step needs, in words, and how many operations; None where nothing can.
        timed: how many steps are timed, beside the first.
    """
    if remaining <= 0:
        accelerator.print("Plan: nothing is left to train; the checkpoint is at the last step already. Nothing was written.")
        return
    seconds: list[float] = []
    operations: list[int] = []  # of a step, where they can be told
    with at_first_call(network, partial(_predict, accelerator, predict, operations)):
        for stats in tqdm(islice(steps, timed + 1), total=min(timed + 1, remaining), desc="timing", leave=False):
            seconds.append(stats.metrics["step_seconds"])
            spent = accelerator.reduce(torch.tensor(sum(seconds), device=accelerator.device), reduction="mean")
            if len(seconds) > 1 and spent > PLAN_SECONDS:
                break
    typical = median(seconds[1:] or seconds)
    weights, saved = (size / 2**20 for size in (_bytes(network.parameters()), checkpoint()))
    on_gpu = accelerator.device.type == "cuda"
    memory = torch.cuda.max_memory_allocated(accelerator.device) / 2**20 if on_gpu else peak_memory()
    total = timedelta(seconds=round(typical * remaining))
    accelerator.print(
        f"Plan: {remaining} steps of {typical:.3f} s (median of {len(seconds[1:] or seconds)}) = {total}, without sampling and saving\n"
        f"Plan: weights {weights:.1f} MiB, a checkpoint of them and all that goes on {saved:.1f} MiB; peak memory so far {memory:.0f} MiB\n"
        f"{''.join(f'Plan: {_operations(flops, typical)}{chr(10)}' for flops in operations)}"
        f"{f'Plan: {planning()}{chr(10)}' if planning else ''}Plan: nothing was written"
    )


def _predict(
    accelerator: Accelerator, predict: Predict | None, operations: list[int], arguments: Sequence[Any], options: Mapping[str, Any]
) -> None:
    """Prints what a step needs and adds its floating-point operations, or says why not."""
    if not accelerator.is_main_process:
        return
    if predict is None:
        accelerator.print("Plan: memory of a step is not predicted of a network that is compiled or split over the processes")
        return
    try:
        rows, flops = predict(arguments, options)
    except Exception as error:  # of code that tensors without data cannot pass: the steps can be timed all the same
        accelerator.print(f"Plan: memory of a step is not predicted: {type(error).__name__}: {first_line(error)}")
        return
    operations.append(flops)
    accelerator.print(rows)


def _operations(flops: int, seconds: float) -> str:
    """Such that the time of a step elsewhere follows from what another device reaches."""
    return f"{flops / 1e9:,.4g} GFLOP a step of a process, at {flops / 1e9 / seconds:,.4g} GFLOP/s here; elsewhere by what is reached there"


def peak_memory() -> float:
    """The most memory that this process has held so far, in MiB; psutil knows the peak on Windows alone."""
    try:
        import resource
    except ModuleNotFoundError:
        return float(psutil.Process().memory_info().peak_wset / 2**20)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)  # bytes there, KiB elsewhere


def is_finished(config: RunConfig, start_step: int, max_steps: int) -> bool:
    """Whether the resumed run has nothing left to do; says so.

    Raises:
        UserError: it is not finished, and its checkpoint is beyond ``max_steps``.
    """
    summary = config.folder / "summary.json"
    finished = start_step >= max_steps and summary.exists() and json.loads(summary.read_text())["step"] >= max_steps
    if not finished and start_step > max_steps:
        raise UserError(f"--max_train_steps {max_steps} lies before step {start_step} of the checkpoint; give {start_step} or more")
    if finished:
        logger.info("The run in %s is finished (step %d of %d): no step taken, nothing changed", config.output_dir, start_step, max_steps)
    return finished


def report_end(config: RunConfig, step: int, facts: dict[str, str]) -> None:
    """Writes ``summary.json``, which marks the run as finished, and prints what the start of the run could not know of that."""
    folder = config.folder
    measured = measured_facts(config)
    partial = folder / f"{PARTIAL}summary.json"
    partial.write_text(json.dumps({"step": step, "ended": round(time.time(), 3), **facts, **measured}, indent=1))
    replace(partial, folder / "summary.json")
    lines = {
        **measured,
        "pipeline": folder,
        **({"samples": grid_path(folder, step)} if grid_path(folder, step).exists() else {}),
        "metrics": folder / "metrics.jsonl",
        "restart": f"--config {folder / 'config.yaml'} --output_dir ANOTHER_FOLDER",
    }
    sys.stdout.write("\n".join(["Finished.", *(f"  {name.replace('_', ' '):<24}{value}" for name, value in lines.items())]) + "\n")


def grid_path(folder: Path, step: int) -> Path:
    """Where the samples of a step are."""
    return folder / "samples" / f"step-{step:07d}.png"
