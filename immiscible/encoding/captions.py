"""What becomes of an image's caption before a text encoder reads it: its tags in another order, a trigger word, or nothing left of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from immiscible.encoding.arguments import CaptionArguments
from immiscible.randomness import Draws


@dataclass(frozen=True)
class CaptionRules:
    """How captions are told; by default as they are.

    Args:
        empty: share of the images whose caption is left empty, drawn for each image.
        shuffled: put the tags of a caption into another order, drawn for each image.
        separator: between tags.
        kept: this many tags stay where they are, the first ones.
        trigger: a word that stands first in each caption that does not have it; an empty caption stays empty.
    """

    empty: float = 0.0
    shuffled: bool = False
    separator: str = ","
    kept: int = 0
    trigger: str | None = None

    @classmethod
    def of(cls, arguments: CaptionArguments) -> CaptionRules:
        """Those of the flags."""
        return cls(
            arguments.proportion_empty_prompts,
            arguments.shuffle_captions,
            arguments.caption_separator,
            arguments.keep_tokens,
            arguments.trigger_word,
        )

    @property
    def still(self) -> CaptionRules:
        """The same with nothing drawn."""
        return replace(self, empty=0.0, shuffled=False)

    def drawn(self, captions: Sequence[str], draws: Draws) -> list[str]:
        """The captions of a micro-batch, shuffled and left empty; the same for a global row however the rows are split over ranks."""
        found = list(captions)
        if self.shuffled:
            orders = draws.uniform("caption_order", len(found)).tolist()
            found = [self._shuffled(caption, order) for caption, order in zip(found, orders, strict=True)]
        if self.empty:
            dropped = draws.uniform("empty_prompt", len(found)) < self.empty
            found = ["" if drop else caption for caption, drop in zip(found, dropped.tolist(), strict=True)]
        return found

    def told(self, captions: Sequence[str]) -> list[str]:
        """The captions with the trigger word: what the text encoder reads, and what a cache's text states are of."""
        if self.trigger is None:
            return list(captions)
        return [caption if not caption or self._has_trigger(caption) else self._with_trigger(caption) for caption in captions]

    def _shuffled(self, caption: str, order: float) -> str:
        """``order`` in [0, 1) says which order it is."""
        tags = [tag.strip() for tag in caption.split(self.separator)]
        kept, rest = tags[: self.kept], tags[self.kept :]
        permutation = torch.randperm(len(rest), generator=torch.Generator().manual_seed(int(order * 2**53)))
        return self._joined([*kept, *(rest[place] for place in permutation.tolist())])

    def _has_trigger(self, caption: str) -> bool:
        """As a word or a row of words, not within one."""
        caption_words, trigger = (f" {' '.join(text.replace(self.separator, ' ').split())} " for text in (caption, str(self.trigger)))
        return trigger in caption_words

    def _with_trigger(self, caption: str) -> str:
        return self._joined([str(self.trigger), caption])

    def _joined(self, tags: Sequence[str]) -> str:
        return f"{self.separator} ".join(tags)


AS_THEY_ARE = CaptionRules()
