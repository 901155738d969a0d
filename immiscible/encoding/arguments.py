"""The flags of captions and of the latent cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from immiscible.errors import UserError
from immiscible.flags import flag


@dataclass
class CaptionArguments:
    """What becomes of captions before a text encoder reads them; ``--proportion_empty_prompts`` stands with the data."""

    _argument_group_name = "captions"

    shuffle_captions: bool = flag(
        False, "put the tags of each caption into another order at each step, all but the first --keep_tokens", alias="shuffle_caption"
    )
    caption_separator: str = flag(",", "what stands between tags")
    keep_tokens: int = flag(0, "tags that stay where they are, the first ones, with --shuffle_captions", least=0)
    trigger_word: str | None = flag(
        None, "a word that is put first, as a tag, into each caption that does not have it; validation prompts are told as they are"
    )

    if TYPE_CHECKING:  # of the data's arguments
        proportion_empty_prompts: float = 0.0

    def check(self) -> None:
        """What these flags can get wrong.

        Raises:
            UserError: one is of another that is not given.
        """
        if self.keep_tokens and not self.shuffle_captions:
            raise UserError(f"--keep_tokens {self.keep_tokens} is of --shuffle_captions: give it too, or leave this out")
        if self.trigger_word is not None and self.trigger_word != " ".join(self.trigger_word.split()):
            raise UserError(f"--trigger_word {self.trigger_word!r} must not begin or end with blanks, or have several in a row")


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
