#!/usr/bin/env python
"""Trains an unconditional diffusion model with noise coupling (Immiscible Diffusion) and asymmetric timesteps (SpeeD).

Takes every flag of the diffusers example of this name. Without flags it trains on the bundled digits; it diffuses pixels, or latents
with --vae_model_name_or_path:

    accelerate launch train_unconditional.py
    accelerate launch train_unconditional.py --train_data_dir photos --config configs/methods/immiscible_speed.yaml
    accelerate launch train_unconditional.py --train_data_dir photos --resolution 256 --vae_model_name_or_path stabilityai/sd-vae-ft-mse
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from immiscible.configs import UnconditionalConfig
from immiscible.coupling import coupling_state, restore_coupling
from immiscible.data.loading import batch_order, build_loader, images_of, load_training_images, training_images
from immiscible.data.sources import split_source
from immiscible.data.transforms import image_transform
from immiscible.encoding.encoders import Encoder, LatentEncoder, PixelEncoder
from immiscible.errors import run_script
from immiscible.evaluation.leakage import ClassLeak
from immiscible.flags import parse_config
from immiscible.method import build_objective, training_scheduler
from immiscible.networks.latents import latent_downsampling, load_vae, vae_identity
from immiscible.networks.optimization import build_ema, build_optimizer, learning_rate, tuned
from immiscible.networks.unet import build_unet, unet_config
from immiscible.networks.weights import PRECISIONS
from immiscible.processes import on_main_process
from immiscible.randomness import reseed_globally
from immiscible.sampling.pipelines import build_pipeline
from immiscible.tasks.pixels import save_pipeline, save_samples
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

HERE = Path(__file__).resolve().parent


def main(argv: Sequence[str]) -> None:
    config = parse_config(
        UnconditionalConfig, argv, program=Path(__file__).name, description=__doc__, no_data_config=HERE / "configs/tasks/digits.yaml"
    )
    with session(config) as accelerator:
        train_unconditional(config, accelerator)


def train_unconditional(config: UnconditionalConfig, accelerator: Accelerator) -> None:
    scheduler = training_scheduler(config)
    objective = build_objective(config, scheduler, accelerator, image_scale=config.image_scale)

    # Data, network, and the checkpoint to continue; nothing is written before all of it is known to fit together.
    resumed = check_folder(config)
    seed = settle_seed(config, resumed)
    source = load_training_images(config)
    source, held_out = split_source(source, config.validation_split) if config.validation_split else (source, None)
    vae, cache = None, None
    if config.vae_model_name_or_path:
        vae = load_vae(config.vae_model_name_or_path, resolution=config.resolution, cache_dir=config.cache_dir)
    if vae and config.cache_latents:
        from immiscible.encoding.cache import open_cache

        cache = open_cache(config, vae, source)
    if vae and (cache is None or held_out):
        vae.to(accelerator.device)
    images = cache.images(source) if cache else source
    network = unet_config(
        config_name_or_path=config.model_config_name_or_path,
        preset=config.model_preset,
        resolution=config.resolution,
        channels=vae.config.latent_channels if vae else source.channels,
        dropout=config.dropout,
        num_classes=len(source.class_names or ()) if config.class_conditional else None,
        downsampling=latent_downsampling(vae) if vae else 1,
    )
    reseed_globally(seed, "network")
    unet = build_unet(network)
    ema = build_ema(unet, config, accelerator.device)
    model, optimizer = accelerator.prepare(tuned(unet, config), build_optimizer(unet, config))

    processes, accumulation = accelerator.num_processes, config.gradient_accumulation_steps
    order = batch_order(source, config, seed, accelerator.process_index, processes)
    check_batch_size(config, objective, order.num_images, order.global_batch_size)
    max_steps = config.max_train_steps or max(1, config.num_epochs * order.batches_per_epoch // accumulation)
    start_step = 0
    identity = run_identity(
        config,
        data=images.fingerprint,
        network={**network, "vae": vae_identity(vae)} if vae else network,
        processes=processes,
    )
    if resumed:
        check_identity(resumed, identity)
        start_step, restored = load_checkpoint(accelerator, resumed, ema)
        restore_coupling(objective.coupling, restored)
    order.start, order.stop = whole_windows(start_step * accumulation, max_steps * accumulation, config.coupling_window)
    channels = vae.config.in_channels if vae else network["in_channels"]
    transform = image_transform(config, channels, seed)
    augment = cache.transform(transform) if cache else transform
    dataset = training_images(images, augment, config)
    loader = build_loader(dataset, order, config.dataloader_num_workers, accelerator.device)

    encode: Encoder = PixelEncoder(accelerator.device, config.class_conditional)
    if vae:
        encode = LatentEncoder(vae, accelerator.device, config.class_conditional, PRECISIONS[accelerator.mixed_precision])
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
        learning_rate=learning_rate(config, optimizer, max_steps),
        max_grad_norm=config.max_grad_norm,
        ema=ema,
        stop=stop,
        ahead=config.look_ahead,
        window=config.coupling_window,
        watch=leak and (lambda pairs: leak.add(pairs.noise, pairs.labels, pairs.x0)),
    )
    schedule = config.ddpm_beta_schedule if config.noise_process == "ddpm" else ""
    facts = method_facts(config, objective, schedule=schedule, inference_steps=config.ddpm_num_inference_steps)
    if vae:
        facts["latents"] = f"of {config.vae_model_name_or_path}, scaled by {vae.config.scaling_factor:g}"
    report_start(facts, images.description, unet, order, accumulation, start_step, max_steps, objective.coupling)
    if config.plan:
        report_plan(steps, unet, accelerator, max_steps - start_step)
        return
    if is_finished(config, start_step, max_steps):
        return

    # The run: everything that rank 0 does alone goes through on_main_process, so that its failures reach all ranks.
    folder = Path(config.output_dir)
    prepare_folder(config, accelerator)
    log = RunLog(folder, accelerator, config, start_step)
    evaluation = RunEvaluation(
        config,
        source,
        held_out,
        transform,
        objective,
        encode,
        lambda: build_pipeline(unet, scheduler, sampler=config.sampling_scheduler, spacing=config.timestep_spacing, vae=vae),
        features="digits" if config.bundled_data == "digits" and not vae else "pixels",
    )
    if config.eval_steps:
        on_main_process(accelerator, lambda: evaluation.prepare(start_step))

    def measure(step: int) -> None:
        if config.eval_steps and (step % config.eval_steps == 0 or step == max_steps):
            on_main_process(accelerator, lambda: evaluation(unet, ema, step, log.train_seconds))

    def save(step: int, state: Mapping[str, Tensor]) -> None:
        save_checkpoint(accelerator, folder, step, ema, identity, config.checkpoints_total_limit, state)

    def passed(epochs: int, step: int) -> bool:
        """Whether this step ended an epoch whose number divides by ``epochs``."""
        now, before = (count * accumulation // order.batches_per_epoch for count in (step, step - 1))
        return epochs > 0 and now // epochs > before // epochs

    def sample(step: int) -> None:
        on_main_process(
            accelerator, lambda: log.add_images("test_samples", save_samples(unet, ema, scheduler, config, seed, step, vae), step)
        )

    def save_model() -> None:
        on_main_process(
            accelerator, lambda: save_pipeline(unet, ema, scheduler, config, {**facts, **measured_facts(config)}, source.class_names, vae)
        )

    def show(step: int) -> None:
        if passed(config.save_images_epochs, step):
            sample(step)
        if passed(config.save_model_epochs, step):
            save_model()

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
    save_model()
    on_main_process(accelerator, lambda: report_end(config, max_steps, facts))
    if config.push_to_hub:
        on_main_process(accelerator, lambda: push_pipeline(config, max_steps))


if __name__ == "__main__":
    sys.exit(run_script(main))
