"""Latents of images, with or without classes: what a frozen VAE makes of them is diffused, encoded in passing or read from a cache."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from immiscible.configs import UnconditionalConfig
from immiscible.data.transforms import image_transform
from immiscible.encoding.encoders import LatentEncoder
from immiscible.method import build_objective
from immiscible.networks.kinds import NULL_CLASS
from immiscible.networks.latents import latent_downsampling, load_vae, vae_identity
from immiscible.networks.weights import PRECISIONS
from immiscible.objective_choice import training_scheduler
from immiscible.tasks.pixels import UnconditionalTask, fresh_network, images_of_flags, network_settings, with_masks
from immiscible.training.task import TrainingData

if TYPE_CHECKING:
    from accelerate import Accelerator


def latents_task(config: UnconditionalConfig, accelerator: Accelerator, seed: int) -> UnconditionalTask:
    """As `immiscible.tasks.pixels.pixels_task`, on latents of ``--vae_model_name_or_path``.

    Raises:
        UserError: what does not fit together.
    """
    plain = build_objective(config, training_scheduler(config), accelerator, image_scale=config.image_scale)
    loaded, held_out = images_of_flags(config)
    source: Any = loaded  # no stream where there is a cache
    vae = load_vae(str(config.vae_model_name_or_path), resolution=config.resolution, cache_dir=config.cache_dir)
    cache = None
    if config.cache_latents:
        from immiscible.encoding.cache import open_cache

        cache = open_cache(Path(str(config.latent_cache_dir)), config, vae, source, precision=config.mixed_precision)
    if cache is None or held_out:
        vae.to(accelerator.device)
    settings = network_settings(config, source, channels=vae.config.latent_channels, downsampling=latent_downsampling(vae))
    objective, network = with_masks(config, plain, settings), fresh_network(settings, seed)
    transform = image_transform(config, vae.config.in_channels, seed)
    told = (config.class_conditional, config.class_dropout_prob, settings.get(NULL_CLASS) or 0)
    encode = LatentEncoder(vae, accelerator.device, *told, precision=PRECISIONS[accelerator.mixed_precision])
    data = TrainingData(source, held_out, transform)
    if cache:
        data = TrainingData(source, held_out, transform, cache.images(source), cache.transform(transform))
    identity = {**settings, "vae": vae_identity(vae)}
    encode_loaded = cache.encoder(encode) if cache else encode
    held_out_encode = replace(encode, class_dropout=0.0)
    return UnconditionalTask(config, objective, data, network, identity, encode_loaded, held_out_encode, vae)
