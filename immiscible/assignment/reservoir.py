"""Noise for batches too small to assign within: a pool of noises that outlives the batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from immiscible.errors import UserError


@dataclass
class _Pool:
    """The kept noises of one shape, one by one, so that a state taken earlier keeps those it holds, and stacked for the product."""

    kept: tuple[Tensor, ...]
    stacked: Tensor | None = None

    def on(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The stacked noises on ``device``, in a precision that holds both what is kept and what has ``dtype``."""
        wide = torch.promote_types(self.kept[0].dtype, dtype)
        if wide != self.kept[0].dtype:
            self.kept, self.stacked = tuple(noise.to(wide) for noise in self.kept), None
        if self.stacked is None or self.stacked.device != device:
            self.stacked = torch.stack([noise.to(device) for noise in self.kept])
        return self.stacked


class ReservoirCoupling:
    """Each image takes the best of M kept noises and of its batch's fresh ones, by inner product; what nobody took is kept.

    For batches of 1 to 8, where a batch's own assignment is the identity or nearly so. Of the M + B candidates the B images take the
    assignment of largest summed ``x0 . noise`` (for equal lengths: of least squared distance), and M stay. So every noise that is
    drawn is used exactly once or still kept, and the marginal of the used noises differs from the standard normal by at most M kept
    noises in all images seen; `NearestCoupling` on the other hand throws noises away in every step, for good. In return the pairs of
    neighbouring steps are not independent of each other.

    Images of each shape have a pool of their own, as buckets of aspect ratios need. Its first M noises are drawn at the first call with
    that shape, from its generator. What a call returns has the dtype of its noise, whatever the calls before it brought.

    Args:
        size: M >= 1. More aligns better: at D = 3072, 256 reach about three quarters of what assignment reaches in batches of 1,024.
    """

    pairs_batch: ClassVar[bool] = False

    def __init__(self, size: int = 256) -> None:
        if size < 1:
            raise UserError(f"`size` must be at least 1, not {size}")
        self.size = size
        self._pools: dict[torch.Size, _Pool] = {}

    def __repr__(self) -> str:
        return f"ReservoirCoupling(size={self.size})"

    def state_dict(self) -> dict[str, Tensor]:
        """The kept noises, numbered shape by shape; the mapping stays as it is when the coupling goes on."""
        kept = [noise for pool in self._pools.values() for noise in pool.kept]
        return {f"noise-{number}": noise for number, noise in enumerate(kept)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Goes on from a `state_dict`, on whatever device; from an empty one as from the beginning.

        Raises:
            UserError: the state is another coupling's, or of a reservoir of another size.
        """
        if set(state) != {f"noise-{number}" for number in range(len(state))}:
            some = ", ".join([*state][:3])
            raise UserError(f"a reservoir keeps noises, all of them, but {some} was saved: in part, or by another coupling")
        by_shape: dict[torch.Size, list[Tensor]] = {}
        for number in range(len(state)):
            by_shape.setdefault(state[f"noise-{number}"].shape, []).append(state[f"noise-{number}"])
        for kept in by_shape.values():
            if len(kept) != self.size:
                raise UserError(f"the saved reservoir holds {len(kept)} noises of a shape; give `size` {len(kept)}, not {self.size}")
        self._pools = {shape: _Pool(tuple(kept)) for shape, kept in by_shape.items()}

    def __call__(
        self,
        x0: Tensor,
        noise: Tensor | None = None,
        *,
        timesteps: Tensor | None = None,
        labels: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """See `Coupling`; ``noise`` is what is added to the pool."""
        if noise is None:
            noise = torch.randn(x0.shape, dtype=x0.dtype, device=x0.device, generator=generator)
        if x0.shape[1:] not in self._pools:
            first = torch.randn(self.size, *x0.shape[1:], dtype=noise.dtype, device=x0.device, generator=generator)
            self._pools[x0.shape[1:]] = _Pool(tuple(row.clone() for row in first))
        pool = self._pools[x0.shape[1:]]
        stacked = pool.on(x0.device, noise.dtype)
        images = x0.detach().flatten(1).float()
        score = torch.cat([images @ rows.flatten(1).float().T for rows in (stacked, noise)], dim=1)  # [B, M + B]
        taken = self._best(score)
        candidates = [*pool.kept, *noise]
        paired = torch.stack([candidates[column].to(x0.device, noise.dtype) for column in taken])
        fresh = iter(sorted(set(range(self.size, self.size + len(x0))) - set(taken)))
        kept = list(pool.kept)
        for slot in sorted(column for column in taken if column < self.size):
            kept[slot] = candidates[next(fresh)].to(stacked.dtype, copy=True)  # a view would keep its whole batch
            stacked[slot] = kept[slot]
        pool.kept = tuple(kept)
        return paired

    def _best(self, score: Tensor) -> list[int]:
        """The column of each row, all different, with the largest sum."""
        if not torch.isfinite(score).all():
            row = int((~torch.isfinite(score).all(1)).nonzero()[0])
            raise UserError(f"image {row} of the batch holds NaN or infinite values; it has no best noise")
        if len(score) == 1:
            return [int(score.argmax())]
        from scipy.optimize import linear_sum_assignment

        return linear_sum_assignment(score.double().cpu().numpy(), maximize=True)[1].tolist()
