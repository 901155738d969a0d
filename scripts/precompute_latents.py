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
from typing import TYPE_CHECKING, Any

from immiscible.configs import TextToImageConfig, UnconditionalConfig
from immiscible.errors import UserError, run_script
from immiscible.flags import flag, flag_value, parse_config

if TYPE_CHECKING:
    from accelerate import Accelerator

    from immiscible.encoding.cache_writing import CacheSummary

NAMES_THE_MODEL = ("pretrained_model_name_or_path", "vae_model_name_or_path", "revision", "variant")


@dataclass
class CacheArguments:
    """How the cache is made; stands beside the flags of a training script."""

    _argument_group_name = "cache"

    encode_batch_size: int = flag(16, "images or captions encoded together", least=1, most=2**16)
    rows_per_shard: int = flag(2048, "images or captions in a file; a stopped call loses at most one file per process", least=1)

    def check(self) -> None:
        """Nothing here: neither of these flags contradicts another."""


@dataclass
class TextCacheConfig(TextToImageConfig, CacheArguments):
    """The flags of train_text_to_image.py and finetune_sd.py, and this script's."""

    @staticmethod
    def settle(values: dict[str, Any]) -> None:
        """As there, and a cache is wanted."""
        TextToImageConfig.settle(values)
        want_cache(values)


@dataclass
class ImageCacheConfig(UnconditionalConfig, CacheArguments):
    """The flags of train_unconditional.py, and this script's."""

    @staticmethod
    def settle(values: dict[str, Any]) -> None:
        """As there, and a cache is wanted."""
        UnconditionalConfig.settle(values)
        want_cache(values)


def want_cache(values: dict[str, Any]) -> None:
    """A cache is wanted by whoever calls this.

    Raises:
        UserError: a flag of the training command does not go with one, or the folder is not named.
    """
    if values["streaming"]:
        raise UserError("--streaming reads data in passing, and a cache needs all of it at hand (images, parquet, .tar); leave it out")
    if values["latent_cache_dir"] is None:
        raise UserError("--latent_cache_dir is required: the folder to fill")
    values["cache_latents"] = True


def main(argv: Sequence[str]) -> None:
    kind = ImageCacheConfig if flag_value(argv, "vae_model_name_or_path") else TextCacheConfig
    config = parse_config(kind, argv, program=Path(__file__).name, description=__doc__ or "")
    # After parsing, so that --help and usage errors come at once.
    from immiscible.training.session import session

    with session(config) as accelerator:
        started = time.monotonic()
        made = fill(config, accelerator)
        captions = f" and {made.captions:,} captions" if made.captions else ""
        bad = "".join(f"\n  skipped {each.name}: {each.reason}" for each in made.bad)
        laid = "which are laid upon --alpha_color (white by default)"
        more = bad + (f"\n{made.transparent:,} images have transparent pixels, {laid}" if made.transparent else "")
        accelerator.print(
            f"{made.images:,} images ({len(made.bad)} of them unreadable){captions}, {made.bytes / 2**20:,.1f} MiB in "
            f"{config.latent_cache_dir}: {made.made} files made, {made.kept} there already, {time.monotonic() - started:.1f} s{more}\n"
            f"train with --cache_latents --latent_cache_dir {config.latent_cache_dir}"
        )


def fill(config: TextCacheConfig | ImageCacheConfig, accelerator: Accelerator) -> CacheSummary:
    """Loads the images and what encodes them, and fills the folder."""
    from immiscible.data.loading import captioned_source, training_source
    from immiscible.encoding.cache_writing import write_cache
    from immiscible.encoding.captions import AS_THEY_ARE, CaptionRules
    from immiscible.networks.families import load_checkpoint
    from immiscible.networks.latents import load_vae

    common: dict[str, Any] = {"resolution": config.resolution, "cache_dir": config.cache_dir}
    if isinstance(config, ImageCacheConfig):
        source = training_source(config, config.labels_for)
        parts = load_vae(str(config.vae_model_name_or_path), **common)
    else:
        source = captioned_source(config, config.labels_for)
        parts = load_checkpoint(config, from_scratch=True, **common)
        parts.network.to("meta")  # gigabytes that nobody needs here
    return write_cache(
        Path(str(config.latent_cache_dir)),
        config,
        parts,
        source,
        accelerator,
        model={name: getattr(config, name) for name in NAMES_THE_MODEL if hasattr(config, name)},
        batch_size=config.encode_batch_size,
        rows_per_shard=config.rows_per_shard,
        rules=AS_THEY_ARE if isinstance(config, ImageCacheConfig) else CaptionRules.of(config),
    )


if __name__ == "__main__":
    sys.exit(run_script(main))
