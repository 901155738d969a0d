"""A run's folder and its life: opening it safely, logging, saving the pipeline with its method, the final summary."""

from __future__ import annotations

import json
import logging
import os
import resource
import secrets
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from itertools import islice
from math import isfinite
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy
import torch
from torch import Tensor, nn
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from immiscible.assignment.conditions import ClassLeak
from immiscible.assignment.ranks import across_ranks
from immiscible.assignment.solve import LARGEST_BLOCK
from immiscible.coupling import Coupling, bias_notice, build_coupling, leak_notice, pairs_batch
from immiscible.data.sources import GlobalBatchOrder, ImageSource, ImageTransform
from immiscible.encoding.encoders import Encoded, Encoder
from immiscible.errors import UserError
from immiscible.evaluation.metrics import Evaluation, build_features, fixed_images, images_together, to_uint8, validation_loss
from immiscible.flags import OWN_FILES, MethodArguments, UnconditionalConfig, given, save_config
from immiscible.objectives import DenoisingObjective
from immiscible.process import NoiseProcess, build_scheduler
from immiscible.randomness import Draws
from immiscible.sampling.pipelines import build_pipeline, evaluation_weights, image_grid, sample_images, sample_labels, told
from immiscible.timesteps import timestep_sampler
from immiscible.training.checkpoints import PARTIAL, read_state, replace
from immiscible.training.loop import StepStats, StopRequest
from immiscible.weighting import loss_weights

if TYPE_CHECKING:
    from accelerate import Accelerator
    from diffusers import AutoencoderKL, DiffusionPipeline, SchedulerMixin, UNet2DModel
    from diffusers.training_utils import EMAModel

    from immiscible.configs import AnyConfig
    from immiscible.data.streaming import StreamOrder

logger = logging.getLogger(__name__)

PLAN_SECONDS = 60  # of steps after which --plan takes no further one


@contextmanager
def session(config: AnyConfig) -> Iterator[Accelerator]:
    """The accelerator of this process, set up as the flags say, and ended on every path; rank 0 alone logs notices."""
    if config.local_rank != -1 and "RANK" in os.environ:  # without a launcher it means nothing, as in the diffusers script
        os.environ.setdefault("LOCAL_RANK", str(config.local_rank))
    from accelerate import Accelerator, InitProcessGroupKwargs
    from accelerate.utils import GradientAccumulationPlugin, ProjectConfiguration

    _check_launcher()
    _check_tracker(config.logger, "--report_to" if hasattr(config, "report_to") else "--logger")
    if config.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
    try:
        accelerator = Accelerator(
            # A plugin, because accelerate lets the environment overrule a plain number.
            gradient_accumulation_plugin=GradientAccumulationPlugin(
                num_steps=config.gradient_accumulation_steps, sync_with_dataloader=False
            ),
            mixed_precision=config.mixed_precision,
            log_with=None if config.logger == "none" else config.logger,
            project_config=ProjectConfiguration(
                project_dir=config.output_dir, logging_dir=os.path.join(config.output_dir or "", config.logging_dir)
            ),
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=2))],
        )
    except ValueError as error:  # accelerate's word for a precision that this device lacks
        raise UserError(f"--mixed_precision {config.mixed_precision}: {error}") from None
    package_logger = logging.getLogger("immiscible")
    package_logger.setLevel(logging.INFO if accelerator.is_main_process else logging.ERROR)
    if not package_logger.handlers:
        package_logger.addHandler(logging.StreamHandler())
    try:
        if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":  # accelerate would train in fp32 without a word
            raise UserError("--mixed_precision fp16 needs a GPU; on a CPU give bf16 or no")
        with logging_redirect_tqdm([package_logger]):
            yield accelerator
        accelerator.wait_for_everyone()
    except UserError as error:
        traceback.clear_frames(error.__traceback__)  # they hold the model
        accelerator.wait_for_everyone()  # raised by all ranks alike
        raise
    finally:
        accelerator.free_memory()  # DDP must be gone before its process group is, whose end it can deadlock otherwise (gloo, torch 2.13)
        accelerator.end_training()


def _check_launcher() -> None:
    """Refuses what splits the network over the processes: rank 0 alone samples it and saves it, as it holds it."""
    from accelerate.utils import parse_flag_from_env

    for name in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        if parse_flag_from_env(f"ACCELERATE_USE_{name}"):
            raise UserError(
                f"accelerate is configured for {name}, under which this script neither trains nor saves what it should; launch it with "
                f"--multi_gpu, as configs/accelerate/4xa6000.yaml does: every process then holds the whole network (DDP)"
            )


def _check_tracker(name: str, flag: str) -> None:
    from accelerate.tracking import get_available_trackers
    from accelerate.utils import LoggerType

    known = [kind.value for kind in LoggerType]
    if name not in (*known, "none"):
        raise UserError(f"{flag} {name!r} is unknown; known: {', '.join(known)}, none")
    if name not in ("all", "none") and name not in [kind.value for kind in get_available_trackers()]:
        raise UserError(f"{flag} {name} is not installed: `pip install {name}`, or {flag} none (metrics.jsonl is always written)")


def settle_seed(config: AnyConfig, resumed: Path | None) -> int:
    """The run's seed: as given, else the resumed checkpoint's, else drawn by rank 0 and shared. It is written into ``config``."""
    from accelerate.utils import broadcast_object_list

    if config.seed is None:
        shared = [read_state(resumed)["identity"]["--seed"] if resumed else secrets.randbelow(2**31)]
        config.seed = int(broadcast_object_list(shared)[0])
        logger.info("seed %d%s", config.seed, " (the resumed run's)" if resumed else " (drawn; pass --seed to repeat this run)")
    return config.seed


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


def check_batch_size(config: AnyConfig, objective: DenoisingObjective, images: float, global_batch: int) -> None:
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
    if pairs and config.coupling_scope == "global" and shared * config.coupling_window > LARGEST_BLOCK:
        raise UserError(
            f"--coupling_scope global pairs at most {LARGEST_BLOCK} images at once, not {shared} x --coupling_window "
            f"{config.coupling_window}, since every rank holds all their costs; lower one of them, or give --coupling_scope process"
        )
    if pairs and shared * config.coupling_window == 1:
        logger.warning(
            "--noise_coupling %s with --train_batch_size 1 is the identity: one image has one noise to choose from; "
            "--coupling_window pairs over several batches, --noise_coupling reservoir keeps noises between them",
            config.noise_coupling,
        )


class RunLog:
    """``metrics.jsonl`` always, and the tracker if there is one; a line holds means since the line before.

    Args:
        folder: the run's folder.
        accelerator: rank 0 writes.
        config: sent to the tracker.
        start_step: lines of later steps, which a killed run left behind, are dropped.

    ``train_seconds`` is the time spent in steps since the run began, without evaluation, sampling and saving.
    """

    def __init__(self, folder: Path, accelerator: Accelerator, config: AnyConfig, start_step: int) -> None:
        self._path = folder / "metrics.jsonl"
        self._accelerator = accelerator
        self._sums: dict[str, float] = {}
        self._count = 0
        self.train_seconds = 0.0
        if not accelerator.is_main_process:
            return
        for line in _drop_later_lines(self._path, start_step)[-1:]:
            self.train_seconds = line["train_seconds"]
        save_config(config, folder / "config.yaml")
        if config.logger != "none":
            scalars = {
                name: value for name, value in asdict(config).items() if isinstance(value, int | float | str | bool) and name != "hub_token"
            }
            accelerator.init_trackers(getattr(config, "tracker_project_name", "immiscible"), config=scalars)

    def add(self, step: int, metrics: dict[str, float], *, write: bool, leak: ClassLeak | None = None) -> dict[str, float]:
        """Collects a step's metrics; with ``write`` their means become a line, with what ``leak`` has found. Returns the means so far."""
        self.train_seconds += metrics["step_seconds"]
        self._count += 1
        self._sums = {name: self._sums.get(name, 0.0) + value for name, value in metrics.items()}
        means = {name: value / self._count for name, value in self._sums.items()}
        before = means["pair_distance_drawn"]
        means |= {"distance_reduction_percent": 100 * (before - means["pair_distance"]) / before, "train_seconds": self.train_seconds}
        if write:
            self._sums, self._count = {}, 0
            if means.get("assignment_relaxations"):
                logger.warning("the assignment's auction met its cap of bids and went on with a coarser step, up to step %d", step)
            if leak:
                means |= {f"class_leak_{name}": value for name, value in leak.result().items() if isinstance(value, float)}
            if self._accelerator.is_main_process:
                _append_line(self._path, {"step": step, **{name: float(f"{value:.8g}") for name, value in means.items()}})
                self._accelerator.log(means, step=step)
        return means

    def add_images(self, name: str, images: numpy.ndarray, step: int) -> None:
        """Samples, uint8 [N, H, W, 3], for the trackers in which diffusers' examples show theirs; to be called on rank 0."""
        for tracker in self._accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.log_images({name: images}, step=step, dataformats="NHWC")
            elif tracker.name == "wandb":
                tracker.log_images({name: list(images)}, step=step)


class RunEvaluation:
    """``evaluation.jsonl``: what the flags ask to measure every ``--eval_steps``, on rank 0, without disturbing training.

    Args:
        config: the run's flags; ``eval_steps`` is given.
        source: the training images, the reference of the Frechet distance.
        held_out: images for the loss per noise level, or None.
        transform: training's; reference images are cut from the middle and not flipped.
        objective: gives process and prediction type.
        encode: turns held-out images into what is diffused and what the network is told.
        pipeline: what samples the network in training.
        features: the name of the feature network where the flags give none.
        prompts: how many of the data's captions are sampled in turn; 0 for a pipeline without prompts.
    """

    def __init__(
        self,
        config: AnyConfig,
        source: ImageSource,
        held_out: ImageSource | None,
        transform: ImageTransform,
        objective: DenoisingObjective,
        encode: Encoder,
        pipeline: Callable[[], DiffusionPipeline],
        *,
        features: str = "pixels",
        prompts: int = 0,
    ) -> None:
        self._config, self._objective, self._encode, self._pipeline = config, objective, encode, pipeline
        self._source, self._held_out_source, self._transform = source, held_out, transform
        self._features, self._prompts = config.eval_features or features, prompts
        self._path = Path(config.output_dir or "") / "evaluation.jsonl"

    def prepare(self, start_step: int) -> None:
        """Reads the reference images; drops lines of steps after ``start_step``, which a killed run left behind."""
        config, transform = self._config, self._transform
        features = build_features(self._features, channels=transform.channels, resolution=transform.resolution)
        images = fixed_images(self._source, transform, skip_bad_images=config.skip_bad_images)
        reference = (to_uint8(batch.x0) for batch in images)
        prompts = [self._source.captions(index)[0] for index in range(min(self._prompts, len(self._source)))]
        self._evaluation = Evaluation(
            features,
            reference,
            samples=config.eval_samples,
            inference_steps=config.eval_inference_steps,
            batch_size=images_together(transform.resolution),
            prompts=prompts,
        )
        self._held_out: list[Encoded] = []
        if self._held_out_source is not None:
            options = {"with_labels": config.labels_for is not None, "with_captions": self._prompts > 0}
            batches = fixed_images(self._held_out_source, transform, skip_bad_images=config.skip_bad_images, **options)
            device = self._objective.process.signal.device
            self._held_out = [self._encode(batch, Draws(0, 0, number, device)) for number, batch in enumerate(batches)]
        _drop_later_lines(self._path, start_step)

    def __call__(self, unet: nn.Module, ema: EMAModel | None, step: int, train_seconds: float) -> None:
        """Measures the weights at ``step`` and appends a line."""
        line: dict[str, Any] = {
            "step": step,
            "train_seconds": train_seconds,
            "data": self._source.fingerprint,
            **self._evaluation(self._pipeline(), ema),
        }
        line["num_features"] = self._evaluation.distance.features.num_features
        if self._held_out:
            x0 = torch.cat([batch.x0 for batch in self._held_out])
            condition = {name: torch.cat([batch.condition[name] for batch in self._held_out]) for name in self._held_out[0].condition}
            process, prediction_type = self._objective.process, self._objective.prediction_type
            together = images_together(self._transform.resolution)
            line["validation_loss"] = validation_loss(unet, x0, process, prediction_type, condition=condition, ema=ema, batch_size=together)
        _append_line(self._path, {**line, "weights": "raw" if ema is None else "ema", "told": told(asdict(self._config))})
        distances = ", ".join(f"{value:.3f} at {steps} steps" for steps, value in line["frechet_distance"].items())
        logger.info("step %d: %s %s", step, line["feature"], distances)


def _append_line(path: Path, line: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


def _drop_later_lines(path: Path, start_step: int) -> list[dict[str, Any]]:
    """Leaves and returns the lines of steps up to ``start_step``: a killed run may have written on after its last checkpoint."""
    kept = [line for line in read_lines(path) if line["step"] <= start_step]
    partial = path.with_name(f"{PARTIAL}{path.name}")
    partial.write_text("".join(json.dumps(line) + "\n" for line in kept))
    replace(partial, path)
    return kept


def follow(
    steps: Iterator[StepStats],
    config: AnyConfig,
    accelerator: Accelerator,
    log: RunLog,
    stop: StopRequest,
    *,
    start_step: int,
    max_steps: int,
    state: Mapping[str, Tensor],
    saved: bool,
    leak: ClassLeak | None,
    measure: Callable[[int], None],
    save: Callable[[int, Mapping[str, Tensor]], None],
    show: Callable[[int], None],
) -> bool:
    """Takes a run's steps: shows progress, writes lines, saves a checkpoint when one is due and at the end.

    Args:
        steps: from `train`.
        config: the run's flags.
        accelerator: every rank calls this.
        log: of the run.
        stop: what may end the run early.
        start_step: optimizer steps taken before.
        max_steps: the last step.
        state: the coupling's at ``start_step``.
        saved: whether the run's folder holds a checkpoint of ``start_step``.
        leak: what is logged of the classes in the noise, if anything.
        measure: called with each step before it may be saved, so that a run that goes on from there has its measurements.
        save: writes a checkpoint of a step and its coupling state.
        show: called with each step but the last after it may have been saved, for samples.

    Returns:
        whether the last step was reached; if not, a signal stopped the run, and it has said so.

    Raises:
        UserError: a rank met one; everything up to the last step is saved.
    """
    step = start_step
    main = accelerator.is_main_process
    with stop, tqdm(total=max_steps, initial=start_step, desc="training", unit="step", disable=not main) as bar:
        for stats in steps:
            step, state, last = stats.step, stats.coupling_state, stats.step == max_steps
            checkpoint_due = step % config.checkpointing_steps == 0
            means = log.add(step, stats.metrics, write=step % config.logging_steps == 0 or checkpoint_due or last, leak=leak)
            bar.update()
            bar.set_postfix(loss=f"{means['loss']:.4f}", refresh=False)
            measure(step)
            if checkpoint_due:
                save(step, state)
            saved = checkpoint_due
            if not last:
                show(step)
    if not saved:
        save(step, state)
    if stop.error:
        raise UserError(f"{stop.error} (stopped and saved at step {step})", exit_code=1)
    if step < max_steps:
        accelerator.print(f"Stopped by {stop.reason} at step {step} of {max_steps}; continue with --resume_from_checkpoint latest")
    return step == max_steps


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a ``.jsonl`` file; a half-written last line is left out."""
    lines = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines


def method_facts(config: AnyConfig, objective: DenoisingObjective, *, schedule: str, inference_steps: int) -> dict[str, str]:
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
    if config.coupling_window > 1:
        coupling += f", over {config.coupling_window} micro-batches"
    if config.coupling_scope == "global":
        coupling += ", over all processes"
    if config.coupling_min_timestep:
        coupling += f", timesteps from {config.coupling_min_timestep}"
    if config.coupling_start_step:
        coupling += f", from optimizer step {config.coupling_start_step}"
    moved = objective.sampler.moved_share()
    near_none = " (near none: on this schedule the law hardly differs from uniform)" if 0 < moved < 0.05 else ""
    steps = f"{objective.process.num_timesteps} steps"
    process = f"{objective.process.kind} ({schedule}, {steps})" if schedule else f"{objective.process.kind} ({steps})"
    return {
        "noise_coupling": config.noise_coupling + coupling,
        "timestep_sampling": f"{config.timestep_sampling}, moves {100 * moved:.1f} % of the draws{near_none}",
        "loss_weighting": config.loss_weighting,
        "noise_process": process + (f", image scale {objective.image_scale:g}" if objective.image_scale != 1 else ""),
        "prediction_type": objective.prediction_type,
        "inference_steps": str(inference_steps),
        "seed": str(config.seed),
    }


def measured_facts(config: AnyConfig) -> dict[str, str]:
    """Means over the run's ``metrics.jsonl``: what the coupling did and what it cost, and the last loss."""
    lines = read_lines(Path(config.output_dir or "") / "metrics.jsonl")
    mean = {name: sum(line[name] for line in lines) / len(lines) for name in lines[-1]} if lines else {}
    if not mean:
        return {}
    drawn, paired = mean["pair_distance_drawn"], mean["pair_distance"]
    coupling_ms = 1000 * config.gradient_accumulation_steps * mean["coupling_seconds"]
    solved = {}
    if "assignment_kept" in mean:
        solved["assignment"] = f"at least {100 * mean['assignment_kept']:.2f} % kept, {mean['assignment_bids_per_row']:.1f} bids an image"
        if mean["assignment_relaxations"]:
            solved["assignment"] += f", {mean['assignment_relaxations']:.3g} relaxations a micro-batch: bids met their cap"
    return {
        "optimizer_steps": f"{lines[-1]['step']:g}",
        "pair_distance": f"{drawn:.4f} drawn, {paired:.4f} paired ({mean['distance_reduction_percent']:+.2f} % reduction)",
        "noise_marginal_drift": f"variance {mean['noise_variance_drift']:+.5f}, norm {mean['noise_norm_drift']:+.5f}",
        "images_paired_together": f"{mean['paired_images']:.1f}",
        **solved,
        "coupling_time": f"{coupling_ms:.2f} ms of a {1000 * mean['step_seconds']:.1f} ms step",
        "final_loss": f"{lines[-1]['loss']:.5f}",
    }


def report_start(
    facts: dict[str, str],
    data: str,
    unet: UNet2DModel,
    order: GlobalBatchOrder | StreamOrder,
    accumulation: int,
    start_step: int,
    max_steps: int,
    coupling: Coupling,
    *,
    told_apart: int | None = None,
    captions: bool = False,
) -> None:
    """Logs what is about to run, and with numbers where the coupling biases the noise.

    ``told_apart`` is how many classes or, with ``captions``, captions the network is told; by default its own number of classes.
    """
    parameters = sum(parameter.numel() for parameter in unet.parameters())
    trained = sum(parameter.numel() for parameter in unet.parameters() if parameter.requires_grad)
    adapters = f" of which {trained / 1e6:.2f} are trained" if trained < parameters else ""
    ranks = order.global_batch_size // order.batch_size
    epoch = f" ({order.batches_per_epoch / accumulation:.4g} an epoch)" if isfinite(order.batches_per_epoch) else ""
    side, images = unet.config.sample_size, order.global_batch_size * accumulation
    classes = f", {unet.config.num_class_embeds} classes" if unet.config.num_class_embeds else ""
    for name, value in {
        "data": data,
        "network": f"{type(unet).__name__}, {parameters / 1e6:.2f} million parameters{adapters}, "
        f"{unet.config.in_channels}x{side}x{side}{classes}",
        "batch": f"{order.batch_size} images x {ranks} processes x {accumulation} micro-batches = {images} a step",
        "steps": f"{start_step} to {max_steps}{epoch}",
        **facts,
    }.items():
        logger.info("%-18s %s", name.replace("_", " "), value)
    leak = leak_notice(coupling, (unet.config.num_class_embeds or 0) if told_apart is None else told_apart, captions=captions)
    for notice in (bias_notice(coupling, unet.config.in_channels * side**2), leak):
        if notice:
            logger.warning(notice)


def report_plan(steps: Iterator[StepStats], unet: UNet2DModel, accelerator: Accelerator, remaining: int, *, timed: int = 5) -> None:
    """Takes a few steps that leave nothing behind and prints sizes and the time that the run would take."""
    if remaining <= 0:
        accelerator.print("Plan: nothing is left to train; the checkpoint is at the last step already. Nothing was written.")
        return
    seconds: list[float] = []
    for stats in tqdm(islice(steps, timed + 1), total=min(timed + 1, remaining), desc="timing", leave=False):
        seconds.append(stats.metrics["step_seconds"])
        spent = accelerator.reduce(torch.tensor(sum(seconds), device=accelerator.device), reduction="mean")
        if len(seconds) > 1 and spent > PLAN_SECONDS:
            break
    typical = median(seconds[1:] or seconds)
    weights = sum(parameter.numel() * parameter.element_size() for parameter in unet.parameters()) / 2**20
    if accelerator.device.type == "cuda":
        memory = torch.cuda.max_memory_allocated(accelerator.device) / 2**20
    else:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    total = timedelta(seconds=round(typical * remaining))
    accelerator.print(
        f"Plan: {remaining} steps of {typical:.3f} s (median of {len(seconds[1:] or seconds)}) = {total}, without sampling and saving\n"
        f"Plan: weights {weights:.1f} MiB, with AdamW and EMA {4 * weights:.1f} MiB a checkpoint; peak memory so far {memory:.0f} MiB\n"
        f"Plan: nothing was written"
    )


def is_finished(config: AnyConfig, start_step: int, max_steps: int) -> bool:
    """Whether the resumed run has nothing left to do; says so.

    Raises:
        UserError: it is not finished, and its checkpoint is beyond ``max_steps``.
    """
    summary = Path(config.output_dir or "") / "summary.json"
    finished = start_step >= max_steps and summary.exists() and json.loads(summary.read_text())["step"] >= max_steps
    if not finished and start_step > max_steps:
        raise UserError(f"--max_train_steps {max_steps} lies before step {start_step} of the checkpoint; give {start_step} or more")
    if finished:
        logger.info("The run in %s is finished (step %d of %d): no step taken, nothing changed", config.output_dir, start_step, max_steps)
    return finished


def report_end(config: AnyConfig, step: int, facts: dict[str, str]) -> None:
    """Writes ``summary.json``, which marks the run as finished, and prints the summary."""
    folder = Path(config.output_dir or "")
    measured = measured_facts(config)
    partial = folder / f"{PARTIAL}summary.json"
    partial.write_text(json.dumps({"step": step, **facts, **measured}, indent=1))
    replace(partial, folder / "summary.json")
    lines = {
        **facts,
        **measured,
        "pipeline": folder,
        **({"samples": grid_path(folder, step)} if grid_path(folder, step).exists() else {}),
        "metrics": folder / "metrics.jsonl",
        "restart": f"--config {folder / 'config.yaml'} --output_dir ANOTHER_FOLDER",
    }
    sys.stdout.write("\n".join(["Finished.", *(f"  {name.replace('_', ' '):<24}{value}" for name, value in lines.items())]) + "\n")


def save_pipeline(
    unet: UNet2DModel,
    ema: EMAModel | None,
    scheduler: SchedulerMixin,
    config: UnconditionalConfig,
    facts: dict[str, str],
    class_names: Sequence[str] | None = None,
    vae: AutoencoderKL | None = None,
) -> None:
    """Leaves in the run's folder a pipeline that plain diffusers samples, with the model card and the method in the weights' metadata.

    With EMA the pipeline holds the averaged weights, and ``unet_non_ema`` beside it the others. ``class_names`` are the data's; the
    card of a class-conditional network lists them by number. ``vae`` decodes latents, and is saved along.
    """
    folder = Path(config.output_dir or "")
    partial = folder / f"{PARTIAL}pipeline"
    shutil.rmtree(partial, ignore_errors=True)
    if ema is not None:
        unet.save_pretrained(partial / "unet_non_ema")
    with evaluation_weights(unet, ema):
        pipeline = build_pipeline(unet, scheduler, sampler=config.sampling_scheduler, spacing=config.timestep_spacing, vae=vae)
        pipeline.save_pretrained(partial)
    num_classes = unet.config.num_class_embeds
    names = class_names if num_classes and class_names else ()
    for weights in partial.glob("unet*/*.safetensors"):
        add_metadata(weights, facts)
    (partial / "README.md").write_text(_model_card(folder.resolve().name, type(pipeline).__name__, facts, num_classes, names))
    for item in sorted(partial.iterdir(), key=lambda path: path.name == "model_index.json"):  # last: it makes the folder a pipeline
        replace(item, folder / item.name)
    partial.rmdir()


def save_samples(
    unet: UNet2DModel,
    ema: EMAModel | None,
    scheduler: SchedulerMixin,
    config: UnconditionalConfig,
    seed: int,
    step: int,
    vae: AutoencoderKL | None = None,
) -> numpy.ndarray:
    """Writes a grid of samples with the same noises at every step and returns them, uint8 [N, H, W, C]; a class-conditional network's
    are in the order of classes.
    """
    with evaluation_weights(unet, ema):
        pipeline = build_pipeline(unet, scheduler, sampler=config.sampling_scheduler, spacing=config.timestep_spacing, vae=vae)
        images = sample_images(
            pipeline,
            config.eval_batch_size,
            steps=config.ddpm_num_inference_steps,
            seed=seed,
            batch_size=config.eval_batch_size,
            device=unet.device,
        )
    labels = sample_labels(unet, len(images))
    if labels is not None:
        images = images[labels.argsort(stable=True).numpy()]
    path = grid_path(Path(config.output_dir or ""), step)
    path.parent.mkdir(parents=True, exist_ok=True)
    image_grid(images).save(path)
    return images


def grid_path(folder: Path, step: int) -> Path:
    """Where the samples of a step are."""
    return folder / "samples" / f"step-{step:07d}.png"


def push_pipeline(config: AnyConfig, step: int) -> None:
    """Uploads the pipeline, samples, config and metrics, no checkpoints."""
    from huggingface_hub import create_repo, upload_folder

    folder = Path(config.output_dir or "")
    try:
        name = config.hub_model_id or folder.resolve().name
        repository = create_repo(name, private=config.hub_private_repo or None, exist_ok=True, token=config.hub_token).repo_id
        upload_folder(
            repo_id=repository,
            folder_path=folder,
            token=config.hub_token,
            commit_message=f"step {step}",
            allow_patterns=[f"{item}/**" if (folder / item).is_dir() else item for item in OWN_FILES if (folder / item).exists()],
        )
    except Exception as error:  # whatever the network, the hub or its client can do wrong; without a network it is no OSError
        first_line = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"--push_to_hub failed ({first_line}); the run is complete in {folder}", exit_code=1) from None


def add_metadata(path: Path, facts: dict[str, str]) -> None:
    """Adds ``facts`` to the metadata of a safetensors file, each as ``immiscible.{name}``."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(path, framework="pt") as file:
        metadata = {**(file.metadata() or {}), **{f"immiscible.{name}": value for name, value in facts.items()}}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    save_file(tensors, path, metadata=metadata)


def _model_card(title: str, pipeline: str, facts: dict[str, str], num_classes: int | None, class_names: Sequence[str]) -> str:
    if num_classes is None:
        example = f"""from diffusers import {pipeline}
image = {pipeline}.from_pretrained("THIS_FOLDER")(num_inference_steps={facts["inference_steps"]}).images[0]"""
    else:
        example = f"""import torch
from diffusers import {pipeline}

pipeline = {pipeline}.from_pretrained("THIS_FOLDER")
labels = torch.arange({min(num_classes, 8)})  # the class of each image, by its number


def tell_classes(unet, args, kwargs):  # the pipeline has no argument for them
    return args, {{**kwargs, "class_labels": labels.to(unet.device)}}


pipeline.unet.register_forward_pre_hook(tell_classes, with_kwargs=True)
images = pipeline(batch_size=len(labels), num_inference_steps={facts["inference_steps"]}).images"""
    classes = "\nClasses:\n\n" + "".join(f"{number}. {name}\n" for number, name in enumerate(class_names)) if class_names else ""
    if pipeline == "LDMPipeline":
        classes = "\nThe VAE is an `AutoencoderKL` where diffusers expects a VQ model, and says so; it decodes as it should.\n" + classes
    rows = "\n".join(f"| {name.replace('_', ' ')} | {value} |" for name, value in facts.items())
    return f"""---
library_name: diffusers
pipeline_tag: unconditional-image-generation
tags: [diffusers, unconditional-image-generation, immiscible-diffusion]
---

# {title}

```python
{example}
```
{classes}
How it was trained (`config.yaml` holds every flag):

| | |
|---|---|
{rows}
"""
