#!/usr/bin/env python
"""Trains an unconditional diffusion model with noise coupling (Immiscible Diffusion) and asymmetric timesteps (SpeeD).

Takes every flag of the diffusers example of this name. Without flags it trains on the bundled digits:

    accelerate launch train_unconditional.py
    accelerate launch train_unconditional.py --train_data_dir photos --config configs/methods/immiscible_speed.yaml
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from immiscible.checkpoints import check_identity, load_checkpoint, save_checkpoint
from immiscible.config import DataArguments, MethodArguments, UnconditionalConfig, given, parse_config
from immiscible.coupling import build_coupling
from immiscible.data import GlobalBatchOrder, ImageDataset, ImageTransform, build_loader, images_of, load_images
from immiscible.errors import UserError, run_script
from immiscible.metrics import split_source
from immiscible.models import build_ema, build_optimizer, build_unet, learning_rate, tuned, unet_config
from immiscible.objectives import DenoisingObjective
from immiscible.process import NoiseProcess, build_scheduler
from immiscible.randomness import reseed_globally
from immiscible.run import (
    RunEvaluation,
    RunLog,
    check_batch_size,
    is_finished,
    measured_facts,
    method_facts,
    push_pipeline,
    report_end,
    report_plan,
    report_start,
    save_pipeline,
    save_samples,
    session,
    settle_seed,
)
from immiscible.run_folder import check_folder, on_main_process, prepare_folder, run_identity
from immiscible.timesteps import timestep_sampler
from immiscible.training import StopRequest, train
from immiscible.weighting import loss_weights

if TYPE_CHECKING:
    from accelerate import Accelerator

HERE = Path(__file__).resolve().parent


def main(argv: Sequence[str]) -> None:
    config = parse_config(
        UnconditionalConfig, argv, program=Path(__file__).name, description=__doc__, no_data_config=HERE / "configs/tasks/digits.yaml"
    )
    with session(config) as accelerator:
        train_unconditional(config, accelerator)


def train_unconditional(config: UnconditionalConfig, accelerator: Accelerator) -> None:
    method = given(config, MethodArguments)

    # The five axes: noise process, prediction type, coupling, timestep law, loss weighting.
    scheduler = build_scheduler(
        config.noise_process,
        num_train_timesteps=config.ddpm_num_steps,
        beta_schedule=config.ddpm_beta_schedule,
        beta_start=config.ddpm_beta_start,
        beta_end=config.ddpm_beta_end,
        prediction_type=config.prediction_type,
        image_scale=config.image_scale,
    )
    process = NoiseProcess.from_scheduler(scheduler)
    objective = DenoisingObjective(
        process=process.to(accelerator.device),
        sampler=timestep_sampler(config.timestep_sampling, process, **method),
        coupling=build_coupling(
            config.noise_coupling,
            min_timestep=config.coupling_min_timestep,
            metric=config.coupling_metric,
            dtype=config.coupling_dtype,
            solver=config.coupling_solver,
            candidates=config.coupling_candidates,
            score=config.coupling_score,
        ),
        weights=loss_weights(config.loss_weighting, process, config.prediction_type, **method).float().to(accelerator.device),
        prediction_type=config.prediction_type,
        image_scale=config.image_scale,
        coupling_start_step=config.coupling_start_step,
        noise_offset=config.noise_offset,
        input_perturbation=config.input_perturbation,
    )

    # Data, network, and the checkpoint to continue; nothing is written before all of it is known to fit together.
    resumed = check_folder(config)
    seed = settle_seed(config, resumed)
    data = given(config, DataArguments)
    source = load_images(**{name: data[name] for name in signature(load_images).parameters if name in data})
    source, held_out = split_source(source, config.validation_split) if config.validation_split else (source, None)
    network = unet_config(
        config_name_or_path=config.model_config_name_or_path,
        preset=config.model_preset,
        resolution=config.resolution,
        channels=source.channels,
        dropout=config.dropout,
    )
    reseed_globally(seed, "network")
    unet = build_unet(network)
    ema = build_ema(unet, config, accelerator.device)
    model, optimizer = accelerator.prepare(tuned(unet, config), build_optimizer(unet, config))

    processes, accumulation = accelerator.num_processes, config.gradient_accumulation_steps
    order = GlobalBatchOrder(len(source), config.train_batch_size, seed, stop=0, rank=accelerator.process_index, num_processes=processes)
    check_batch_size(config, objective, len(source), order.global_batch_size)
    max_steps = config.max_train_steps or max(1, config.num_epochs * order.batches_per_epoch // accumulation)
    start_step = 0
    identity = run_identity(config, data=source.fingerprint, network=network, processes=processes)
    if resumed:
        check_identity(resumed, identity)
        start_step = load_checkpoint(accelerator, resumed, ema)
    order.start, order.stop = start_step * accumulation, max_steps * accumulation
    transform = ImageTransform(
        config.resolution, network["in_channels"], config.center_crop, config.random_flip, config.preserve_input_precision, seed
    )
    loader = build_loader(ImageDataset(source, transform, config.skip_bad_images), order, config.dataloader_num_workers, accelerator.device)

    stop = StopRequest()
    steps = train(
        accelerator,
        model,
        optimizer,
        objective,
        images_of(loader, config.skip_bad_images),
        seed=seed,
        start_step=start_step,
        max_steps=max_steps,
        learning_rate=learning_rate(config, optimizer, max_steps),
        max_grad_norm=config.max_grad_norm,
        ema=ema,
        stop=stop,
        ahead=config.look_ahead,
    )
    facts = method_facts(config, objective)
    report_start(facts, source.description, unet, order, accumulation, start_step, max_steps, objective.coupling)
    if config.plan:
        report_plan(steps, unet, accelerator, max_steps - start_step)
        return
    if is_finished(config, start_step, max_steps):
        return

    # The run: everything that rank 0 does alone goes through on_main_process, so that its failures reach all ranks.
    folder = Path(config.output_dir)
    prepare_folder(config, accelerator)
    log = RunLog(folder, accelerator, config, start_step)
    evaluation = RunEvaluation(config, source, held_out, transform, objective, scheduler)
    if config.eval_steps:
        on_main_process(accelerator, lambda: evaluation.prepare(start_step))
    step, saved_at = start_step, start_step if resumed and resumed.resolve().parent == folder.resolve() else None

    def save() -> int:
        save_checkpoint(accelerator, folder, step, ema, identity, config.checkpoints_total_limit)
        return step

    def passed(epochs: int) -> bool:
        """Whether this step ended an epoch whose number divides by ``epochs``."""
        now, before = (count * accumulation // order.batches_per_epoch for count in (step, step - 1))
        return epochs > 0 and now // epochs > before // epochs

    def evaluate() -> None:
        evaluation(unet, ema, step, log.train_seconds)

    def sample() -> None:
        save_samples(unet, ema, scheduler, config, seed, step)

    def save_model() -> None:
        save_pipeline(unet, ema, scheduler, config, {**facts, **measured_facts(config)})

    if resumed and saved_at is None:
        saved_at = save()  # a run that goes on in another folder has its beginning there too
    with stop, tqdm(total=max_steps, initial=start_step, desc="training", unit="step", disable=not accelerator.is_main_process) as bar:
        for stats in steps:
            step, last = stats.step, stats.step == max_steps
            checkpoint_due = step % config.checkpointing_steps == 0
            means = log.add(step, stats.metrics, write=step % config.logging_steps == 0 or checkpoint_due or last)
            bar.update()
            bar.set_postfix(loss=f"{means['loss']:.4f}", refresh=False)
            if config.eval_steps and (step % config.eval_steps == 0 or last):
                on_main_process(accelerator, evaluate)
            if checkpoint_due:
                saved_at = save()
            if passed(config.save_images_epochs) and not last:
                on_main_process(accelerator, sample)
            if passed(config.save_model_epochs) and not last:
                on_main_process(accelerator, save_model)
    if saved_at != step:
        save()
    if stop.error:
        raise UserError(f"{stop.error} (stopped and saved at step {step})", exit_code=1)
    if step < max_steps:
        accelerator.print(f"Stopped by {stop.reason} at step {step} of {max_steps}; continue with --resume_from_checkpoint latest")
        return
    on_main_process(accelerator, sample)
    on_main_process(accelerator, save_model)
    on_main_process(accelerator, lambda: report_end(config, step, facts))
    if config.push_to_hub:
        on_main_process(accelerator, lambda: push_pipeline(config, step))


if __name__ == "__main__":
    sys.exit(run_script(main))
