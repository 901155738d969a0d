"""The flags of the latent cache."""

from __future__ import annotations

from dataclasses import dataclass

from immiscible.flags import flag


@dataclass
class LatentCacheArguments:
    """Whether latents come from disk."""

    _argument_group_name = "latent cache"

    cache_latents: bool = flag(
        False,
        "take latents, and of captions the text states, from --latent_cache_dir, which scripts/precompute_latents.py fills: training then "
        "calls neither the VAE's encoder nor a text encoder",
    )
    latent_cache_dir: str | None = flag(None, "the folder of the cache")
