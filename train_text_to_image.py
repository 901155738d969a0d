#!/usr/bin/env python
"""Trains a Stable Diffusion U-Net from random weights on captions or class names, with noise coupling and asymmetric timesteps.

The checkpoint of --pretrained_model_name_or_path gives VAE, text encoder, tokenizer, scheduler and the U-Net's configuration; to start
from its weights take finetune_sd.py. Takes every flag of the diffusers example of this name:

    accelerate launch train_text_to_image.py --pretrained_model_name_or_path CompVis/stable-diffusion-v1-4 --dataset_name DATA \\
      --config configs/methods/immiscible.yaml
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from immiscible.configs import TextToImageConfig
from immiscible.coupling import coupling_state, restore_coupling
from immiscible.data.loading import batch_order, build_loader, images_of, training_images
from immiscible.data.sources import split_source
from immiscible.data.transforms import image_transform
from immiscible.encoding.cache import open_cache
from immiscible.encoding.texts import TextToImageEncoder
from immiscible.errors import UserError, run_script
from immiscible.evaluation.leakage import ClassLeak
from immiscible.flags import parse_config
from immiscible.method import build_objective
from immiscible.networks.optimization import build_text_ema, build_text_optimizer, text_learning_rate, tuned
from immiscible.networks.stable_diffusion import load_stable_diffusion, place
from immiscible.processes import on_main_process
from immiscible.randomness import reseed_globally
from immiscible.sampling.pipelines import build_text_pipeline
from immiscible.tasks.text_to_image import initial_weights, load_captioned_images, prompt_classes, save_prompt_grid, save_text_pipeline
from immiscible.training.cards import push_pipeline
from immiscible.training.checkpoints import check_identity, load_checkpoint, save_checkpoint
from immiscible.training.folder import check_folder, prepare_folder, run_identity
from immiscible.training.log import RunLog
from immiscible.training.loop import StopRequest, train, whole_windows
from immiscible.training.measuring import RunEvaluation
from immiscible.training.run import follow
from immiscible.training.session import session, settle_seed
from immiscible.training.summary import check_batch_size, is_finished, measured_facts, method_facts, report_end, report_plan, report_start

if TYPE_CHECKING:
    from accelerate import Accelerator


def main(argv: Sequence[str]) -> None:
    config = parse_config(TextToImageConfig, argv, program=Path(__file__).name, description=__doc__)
    if config.use_lora:
        raise UserError("--use_lora adapts pretrained weights, which this script does not load; use finetune_sd.py")
    with session(config) as accelerator:
        train_text_to_image(config, accelerator, from_scratch=True)


def train_text_to_image(config: TextToImageConfig, accelerator: Accelerator, *, from_scratch: bool) -> None:
    config.mixed_precision = accelerator.mixed_precision  # accelerate's own setting where the flag is not given
    # Data, networks, and the checkpoint to continue; nothing is written before all of it is known to fit together.
    resumed = check_folder(config)
    seed = settle_seed(config, resumed)
    source = load_captioned_images(config)
    source, held_out = split_source(source, config.validation_split) if config.validation_split else (source, None)
    reseed_globally(seed, "network")
    parts = load_stable_diffusion(config, from_scratch=from_scratch)
    cache = open_cache(config, parts, source) if config.cache_latents else None
    images = cache.images(source) if cache else source
    place(parts, config, accelerator)
    objective = build_objective(
        config,
        parts.scheduler,
        accelerator,
        dream_detail_preservation=config.dream_detail_preservation if config.dream_training else None,
    )
    ema = build_text_ema(parts.unet, config, accelerator.device)
    model, optimizer = accelerator.prepare(tuned(parts.unet, config), build_text_optimizer(parts.unet, config, accelerator))

    processes, accumulation = accelerator.num_processes, config.gradient_accumulation_steps
    order = batch_order(source, config, seed, accelerator.process_index, processes)
    check_batch_size(config, objective, order.num_images, order.global_batch_size)
    max_steps = config.max_train_steps or max(1, config.num_train_epochs * order.batches_per_epoch // accumulation)
    start_step = 0
    network = {"from_scratch": from_scratch, **parts.identity}
    identity = run_identity(config, data=images.fingerprint, network=network, processes=processes)
    if resumed:
        check_identity(resumed, identity)
        start_step, restored = load_checkpoint(accelerator, resumed, ema)
        restore_coupling(objective.coupling, restored)
    order.start, order.stop = whole_windows(start_step * accumulation, max_steps * accumulation, config.coupling_window)
    transform = image_transform(config, 3, seed)
    augment = cache.transform(transform) if cache else transform
    dataset = training_images(images, augment, config, with_captions=True)
    loader = build_loader(dataset, order, config.dataloader_num_workers, accelerator.device)

    encode = TextToImageEncoder(
        parts,
        accelerator.device,
        empty_prompts=config.proportion_empty_prompts,
        pooled_labels=config.coupling_condition in ("centered", "penalty"),
    )
    stop, leak = StopRequest(), ClassLeak() if config.log_class_leak else None
    steps = train(
        accelerator,
        model,
        optimizer,
        objective,
        images_of(loader, config.skip_bad_images),
        cache.encoder(encode) if cache else encode,
        batch_size=config.train_batch_size,
        seed=seed,
        start_step=start_step,
        max_steps=max_steps,
        learning_rate=text_learning_rate(config, optimizer, max_steps, processes),
        max_grad_norm=config.max_grad_norm,
        ema=ema,
        stop=stop,
        ahead=config.look_ahead,
        window=config.coupling_window,
        watch=leak and (lambda pairs: leak.add(pairs.noise, pairs.labels, pairs.x0)),
    )
    schedule = str(parts.scheduler.config.beta_schedule)
    facts = {
        "initial_weights": initial_weights(config, from_scratch),
        **method_facts(config, objective, schedule=schedule, inference_steps=config.validation_inference_steps),
    }
    classes = prompt_classes(source, config.caption_column)
    report_start(
        facts,
        images.description,
        parts.unet,
        order,
        accumulation,
        start_step,
        max_steps,
        objective.coupling,
        told_apart=len(classes) if classes else min(order.num_images, max_steps * accumulation * order.global_batch_size),
        captions=classes is None,
    )
    if config.plan:
        report_plan(steps, parts.unet, accelerator, max_steps - start_step)
        return
    if is_finished(config, start_step, max_steps):
        return

    # The run: everything that rank 0 does alone goes through on_main_process, so that its failures reach all ranks.
    folder = Path(config.output_dir or "")
    prepare_folder(config, accelerator)
    log = RunLog(folder, accelerator, config, start_step)
    evaluation = RunEvaluation(
        config,
        source,
        held_out,
        transform,
        objective,
        replace(encode, empty_prompts=0.0),
        lambda: build_text_pipeline(parts),
        prompts=config.eval_samples,
    )
    if config.eval_steps:
        on_main_process(accelerator, lambda: evaluation.prepare(start_step))

    def measure(step: int) -> None:
        if config.eval_steps and (step % config.eval_steps == 0 or step == max_steps):
            on_main_process(accelerator, lambda: evaluation(parts.unet, ema, step, log.train_seconds))

    def save(step: int, state: Mapping[str, Tensor]) -> None:
        save_checkpoint(accelerator, folder, step, ema, identity, config.checkpoints_total_limit, state)

    def sample(step: int) -> None:
        if config.prompts:
            on_main_process(accelerator, lambda: log.add_images("validation", save_prompt_grid(parts, ema, config, seed, step), step))

    def show(step: int) -> None:
        if config.validation_steps:
            due = step % config.validation_steps == 0
        else:
            epochs = config.validation_epochs or 1
            now, before = (count * accumulation // order.batches_per_epoch for count in (step, step - 1))
            due = now // epochs > before // epochs
        if due:
            sample(step)

    def save_model() -> None:
        save_text_pipeline(parts, ema, folder, {**facts, **measured_facts(config)})

    state = coupling_state(objective.coupling)
    saved = resumed is not None and resumed.resolve().parent == folder.resolve()
    if resumed and not saved:
        save(start_step, state)  # a run that goes on in another folder has its beginning there too
        saved = True
    finished = follow(
        steps,
        config,
        accelerator,
        log,
        stop,
        start_step=start_step,
        max_steps=max_steps,
        state=state,
        saved=saved,
        leak=leak,
        measure=measure,
        save=save,
        show=show,
    )
    if not finished:
        return
    sample(max_steps)
    on_main_process(accelerator, save_model)
    on_main_process(accelerator, lambda: report_end(config, max_steps, facts))
    if config.push_to_hub:
        on_main_process(accelerator, lambda: push_pipeline(config, max_steps))


if __name__ == "__main__":
    sys.exit(run_script(main))
