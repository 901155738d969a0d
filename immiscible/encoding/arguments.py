"""The flags of the latent cache."""

from __future__ import annotations

from dataclasses import dataclass

from immiscible.errors import UserError
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

    def check(self) -> None:
        """What these flags can get wrong.

        Raises:
            UserError: one of them is given without the other.
        """
        if self.latent_cache_dir is not None and not self.cache_latents:
            raise UserError("--latent_cache_dir names a cache that is not used; add --cache_latents, or leave it out")
        if self.cache_latents and self.latent_cache_dir is None:
            raise UserError("--cache_latents needs --latent_cache_dir, the folder that scripts/precompute_latents.py filled")
