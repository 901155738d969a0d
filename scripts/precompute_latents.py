#!/usr/bin/env python
"""Encodes the images and captions of a run once, for --cache_latents of train_text_to_image.py, finetune_sd.py and train_unconditional.py.

Takes the flags of the training command and a folder; can be stopped and started again, on any number of processes:

    accelerate launch scripts/precompute_latents.py --config configs/tasks/TASK.yaml --latent_cache_dir CACHE
    accelerate launch finetune_sd.py --config configs/tasks/TASK.yaml --cache_latents --latent_cache_dir CACHE

With --vae_model_name_or_path these are the flags of train_unconditional.py, and images alone are encoded. With --random_flip the mirrored
images are encoded too. Called on a finished cache it checks the hash of every file.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from immiscible.configs import TextToImageConfig, UnconditionalConfig
from immiscible.data.loading import load_training_images
from immiscible.encoding.cache_writing import write_cache
from immiscible.errors import UserError, run_script
from immiscible.flags import flag, flag_value, parse_config
from immiscible.networks.latents import load_vae
from immiscible.networks.stable_diffusion import load_stable_diffusion
from immiscible.tasks.text_to_image import load_captioned_images
from immiscible.training.session import session


@dataclass
class CacheArguments:
    """How the cache is made; stands before the configuration of a training script."""

    _argument_group_name = "cache"

    encode_batch_size: int = flag(16, "images or captions encoded together")
    rows_per_shard: int = flag(2048, "images or captions in a file; a stopped call loses at most one file per process")

    @classmethod
    def settle(cls, values: dict[str, Any]) -> None:
        """A cache is wanted by whoever calls this.

        Raises:
            UserError: a flag of the training command does not go with one, or the folder is not named.
        """
        super().settle(values)
        if values["streaming"]:
            raise UserError("--streaming reads data in passing, and a cache needs all of it at hand (images, parquet, .tar); leave it out")
        if values["latent_cache_dir"] is None:
            raise UserError("--latent_cache_dir is required: the folder to fill")
        values["cache_latents"] = True

    def check(self) -> None:
        """As for the training script, and this script's own flags.

        Raises:
            UserError: a number is below 1, or as the training script's.
        """
        super().check()
        for name in ("encode_batch_size", "rows_per_shard"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} must be at least 1, not {getattr(self, name)}")


@dataclass
class TextCacheConfig(CacheArguments, TextToImageConfig):
    """The flags of train_text_to_image.py and finetune_sd.py, and this script's."""


@dataclass
class ImageCacheConfig(CacheArguments, UnconditionalConfig):
    """The flags of train_unconditional.py, and this script's."""


def main(argv: Sequence[str]) -> None:
    kind = ImageCacheConfig if flag_value(argv, "vae_model_name_or_path") else TextCacheConfig
    config = parse_config(kind, argv, program=Path(__file__).name, description=__doc__)
    with session(config) as accelerator:
        started = time.monotonic()
        if isinstance(config, UnconditionalConfig):
            source = load_training_images(config)
            parts = load_vae(config.vae_model_name_or_path, resolution=config.resolution, cache_dir=config.cache_dir)
        else:
            source = load_captioned_images(config)
            parts = load_stable_diffusion(config, from_scratch=True)
            parts.unet.to("meta")  # gigabytes that nobody needs here
        sizes = {"batch_size": config.encode_batch_size, "rows_per_shard": config.rows_per_shard}
        made = write_cache(config, parts, source, accelerator, **sizes)
        captions = f" and {made.captions:,} captions" if made.captions else ""
        bad = "".join(f"\n  skipped {each.name}: {each.reason}" for each in made.bad)
        accelerator.print(
            f"{made.images:,} images ({len(made.bad)} of them unreadable){captions}, {made.bytes / 2**20:,.1f} MiB in "
            f"{config.latent_cache_dir}: {made.made} files made, {made.kept} there already, {time.monotonic() - started:.1f} s{bad}\n"
            f"train with --cache_latents --latent_cache_dir {config.latent_cache_dir}"
        )


if __name__ == "__main__":
    sys.exit(run_script(main))
