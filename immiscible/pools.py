"""Couplings over pools larger than a batch: the batches of all ranks, and several micro-batches at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from immiscible.assignment.conditions import conditioned_index
from immiscible.assignment.costs import cost_matrix
from immiscible.assignment.ranks import Ranks
from immiscible.assignment.solve import LARGEST_BLOCK
from immiscible.coupling import AboveTimestep, AssignmentCoupling, Coupling, coupling_state, restore_coupling
from immiscible.errors import UserError
from immiscible.randomness import seeded_generator

ROWS_PER_PRODUCT = 32  # rows of the cost are computed this many at a time, so that they come out alike however the ranks share them

Batch = TypeVar("Batch")


class GlobalCoupling:
    """One assignment over the images of all ranks: every rank calls it with its own images, at the same time, and gets their noises.

        coupling = immiscible.GlobalCoupling(accelerator)
        noise = coupling(latents)

    On CPUs of one kind the result for a global batch does not depend on how many ranks share it: rows of the cost are computed alike,
    centered, rounded to bfloat16 and solved alike. For N images a rank sends 2 N bytes for each of its own. That all ranks come to the
    same solution takes hosts of one kind too: the solve is in integers, but what it rounds is not.

    No noise is sent: every rank draws the noises of all, so the pool, W times a batch, must fit on its device. Without ``noise`` they are
    drawn from a generator that ``seed`` and the number of calls determine, in x0's dtype and on its device; devices of all ranks must
    then be of one kind, as generators of different kinds give different numbers.

    Args:
        accelerator: accelerate's, or any object with ``process_index``, ``num_processes`` and ``device``. Without one, the ranks of
            torch.distributed's default group, or this process alone if there is none.
        coupling: an `AssignmentCoupling`, with its metric, precision, solver and condition, or an `AboveTimestep` of one. Not ``centered``,
            whose means differ between ranks.
        window: K, the micro-batches that a call with a given ``noise`` brings, which says in which order its rows stand.
        seed: of the noises drawn here. By default the first call takes one from rank 0's global generator, as ``torch.randn`` would.

    Raises:
        UserError: a coupling that does not assign within the batch, one that keeps means of its own on each rank, one by the stable
            matching, or a precision of the cost that some rank lacks.
    """

    pairs_batch: ClassVar[bool] = True

    def __init__(self, accelerator: Any = None, coupling: Coupling | None = None, *, window: int = 1, seed: int | None = None) -> None:
        above = coupling if isinstance(coupling, AboveTimestep) else None
        inner = above.coupling if above else coupling or AssignmentCoupling()
        self.min_timestep = above.min_timestep if above else 0
        if not isinstance(inner, AssignmentCoupling):
            raise UserError("GlobalCoupling needs a coupling that pairs the images of a batch: build_coupling('assignment')")
        if inner.condition == "centered":
            raise UserError("`condition` centered keeps means of its own on every process; use the coupling without GlobalCoupling")
        if inner.solver == "stable":
            raise UserError("`solver` stable compares whole distances, of which GlobalCoupling exchanges differences; give auto or exact")
        self.coupling, self.window = inner, window
        self.ranks = _ranks(accelerator)
        self._seed, self._calls = seed, 0
        if inner.dtype == "int8":  # found out here and not by one rank alone in the middle of an exchange
            probe = torch.zeros(2, 64, device=getattr(accelerator, "device", "cpu"))
            try:
                cost_matrix(probe, probe, dtype="int8")
                failed = False
            except UserError:
                failed = True
            if self.ranks.any_failed(failed):
                raise UserError("`dtype` int8: not every process can multiply int8; give `dtype` auto or float32")

    def __repr__(self) -> str:
        return f"GlobalCoupling({self.coupling}, rank {self.ranks.rank} of {self.ranks.count}, min_timestep={self.min_timestep})"

    def __call__(
        self,
        x0: Tensor,
        noise: Tensor | None = None,
        *,
        timesteps: Tensor | None = None,
        labels: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """The noise of each of this rank's images.

        Args:
            x0: this rank's images, [K * B, C, H, W], as many on every rank.
            noise: the pool of all ranks, the same on each, [K * W * B, C, H, W] in the order of global rows (micro-batch by micro-batch
                and, within one, rank by rank); drawn here if not given.
            timesteps: of this rank's images, [K * B], or of the pool's rows, [K * W * B]; needed with a ``min_timestep``.
            labels: of this rank's images, [K * B] or [K * B, E].
            generator: not used, since the pool must be the same on all ranks.

        Raises:
            UserError: ranks bring different numbers of images, the pool is of another size or too large, timesteps or labels are missing,
                or a row of any rank is NaN or infinite: on all ranks alike.
        """
        window = 1 if noise is None else self.window
        noise = self._drawn(x0) if noise is None else noise
        self._check(x0, noise, timesteps, labels)
        rule = self.coupling
        rows = cost_matrix(x0.detach(), rule.cost_noise(noise), metric=rule.metric, dtype=rule.dtype, rows_per_product=ROWS_PER_PRODUCT)
        rows -= rows.mean(1, keepdim=True)
        labels = labels if rule.condition in ("within", "penalty") else None
        own_timesteps = timesteps if self.min_timestep > 0 and timesteps is not None and len(timesteps) != len(noise) else None
        own = [column for column in (labels, own_timesteps) if column is not None]
        table, *everyones = (_in_global_order(part, window) for part in self.ranks.gather(rows.bfloat16(), *own))
        index = self._index(
            table.float(),
            labels if labels is None else everyones[0],
            timesteps if own_timesteps is None else everyones[-1],
        )
        mine = index.view(window, self.ranks.count, -1)[:, self.ranks.rank].flatten()
        return noise[mine.to(noise.device)]

    def _drawn(self, x0: Tensor) -> Tensor:
        """The pool of this call, the same on every rank."""
        fresh = self._seed is None and self.ranks.rank == 0
        drawn = int(torch.randint(2**62, (1,), device="cpu")) if fresh else -1
        most, negative_least, seed = self.ranks.largest(len(x0), -len(x0), drawn)
        if most != -negative_least:
            raise UserError(f"every rank must bring as many images, not between {-negative_least} and {most}: drop the last short batch")
        self._seed = seed if self._seed is None else self._seed
        generator = seeded_generator(self._seed, "global coupling", self._calls, device=x0.device)
        self._calls += 1
        shape = (self.ranks.count * len(x0), *x0.shape[1:])
        return torch.randn(shape, dtype=x0.dtype, device=x0.device, generator=generator)

    def _check(self, x0: Tensor, noise: Tensor, timesteps: Tensor | None, labels: Tensor | None) -> None:
        pool = self.ranks.count * len(x0)
        if len(noise) != pool:
            raise UserError(f"GlobalCoupling needs the noises of all ranks, {pool} for {len(x0)} images here, not {len(noise)}; or none")
        if pool > LARGEST_BLOCK:
            raise UserError(
                f"GlobalCoupling pairs at most {LARGEST_BLOCK} images at once, not {pool}, since every rank holds all their costs; bring "
                "fewer, or use the coupling without it"
            )
        if timesteps is None and self.min_timestep > 0:
            raise UserError("a coupling with `min_timestep` needs the timesteps: coupling(x0, timesteps=t)")
        if timesteps is not None and len(timesteps) not in (len(x0), pool):
            raise UserError(f"timesteps must be those of the {len(x0)} images here or of all {pool}, not {len(timesteps)}")
        if labels is None and self.coupling.condition in ("within", "penalty"):
            raise UserError(f"`condition` {self.coupling.condition} needs labels")

    def _index(self, cost: Tensor, labels: Tensor | None, timesteps: Tensor | None) -> Tensor:
        """Which noise each image of the pool gets, int64 [N] on the CPU."""
        finite = torch.isfinite(cost).all(1)
        if not finite.all():
            row = int((~finite).nonzero()[0])
            raise UserError(f"image {row} of the global batch, or a noise, holds NaN or infinite values; it has no distance", exit_code=1)
        index = torch.arange(len(cost), device="cpu")
        above = index if timesteps is None or self.min_timestep == 0 else (timesteps.cpu() >= self.min_timestep).nonzero()[:, 0]
        if len(above) == 0:
            return index
        part = cost if len(above) == len(cost) else cost[above][:, above]
        theirs, rule = None if labels is None else labels[above], self.coupling
        paired = above[conditioned_index(part, theirs, rule.condition, rule.condition_ratio, rule.solver)]
        return index.index_copy(0, above, paired)

    def state_dict(self) -> dict[str, Tensor]:
        """Which noises come next, the same on all ranks; empty while all were given."""
        if self._calls == 0:
            return {}
        return {name: torch.tensor(value, device="cpu") for name, value in (("seed", self._seed), ("calls", self._calls))}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Goes on from a `state_dict`.

        Raises:
            UserError: the state is another coupling's.
        """
        if set(state) not in (set(), {"seed", "calls"}):
            raise UserError(f"GlobalCoupling keeps seed and calls, but {', '.join(state)} was saved: by another coupling")
        if state:
            self._seed, self._calls = int(state["seed"]), int(state["calls"])


class Window:
    """``coupling`` over k micro-batches at once: the remedy for small batches, at the price of holding k of them.

        window = immiscible.Window(immiscible.AssignmentCoupling(), 8)
        for batch, noise in window(loader, x0=lambda batch: batch["latents"]):
            ...  # one micro-batch, with the noise of each of its images

    Micro-batches come out one by one and in order, each with its part of what the coupling gives for all their images together; what comes
    after the last whole window is paired among itself. So what a window holds must be known beforehand: encode where the loader is
    iterated, in a generator. A run that is to continue exactly is saved where a window ends.

    Args:
        coupling: any coupling; over all ranks with `GlobalCoupling`.
        k: micro-batches, at least 1.
    """

    def __init__(self, coupling: Coupling, k: int) -> None:
        if k < 1:
            raise UserError(f"`k`, the micro-batches of a window, must be at least 1, not {k}")
        self.coupling, self.k = coupling, k

    def __repr__(self) -> str:
        return f"Window({self.coupling}, k={self.k})"

    def __call__(
        self,
        batches: Iterable[Batch],
        x0: Callable[[Batch], Tensor] | None = None,
        *,
        timesteps: Callable[[Batch], Tensor] | None = None,
        labels: Callable[[Batch], Tensor] | None = None,
        generator: torch.Generator | None = None,
    ) -> Iterator[tuple[Batch, Tensor]]:
        """Each micro-batch with its noises.

        Args:
            batches: micro-batches; their images may differ in number, not in shape.
            x0: gives a micro-batch's images, [B, C, H, W]; the micro-batch itself if not given.
            timesteps: gives its timesteps, [B], for couplings that act on some noise levels only.
            labels: gives its conditions, [B] or [B, E], for couplings that look at them.
            generator: for what the coupling draws.
        """
        iterator = iter(batches)
        while window := list(islice(iterator, self.k)):
            images: list[Any] = [batch if x0 is None else x0(batch) for batch in window]
            told = {
                name: None if get is None else torch.cat([get(batch) for batch in window])
                for name, get in (("timesteps", timesteps), ("labels", labels))
            }
            noise = self.coupling(torch.cat(images), generator=generator, **told)
            yield from zip(window, noise.split([len(rows) for rows in images]), strict=True)

    def state_dict(self) -> dict[str, Tensor]:
        """The coupling's, which knows all of the last window."""
        return dict(coupling_state(self.coupling))

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """As the coupling's."""
        restore_coupling(self.coupling, state)


def _in_global_order(table: Tensor, window: int) -> Tensor:
    """[W, K * B, ...] -> [K * W * B, ...]: micro-batch by micro-batch and, within one, rank by rank."""
    return table.unflatten(1, (window, -1)).transpose(0, 1).flatten(0, 2)


def _ranks(accelerator: Any) -> Ranks:
    if accelerator is not None:
        return Ranks(accelerator.process_index, accelerator.num_processes)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return Ranks(torch.distributed.get_rank(), torch.distributed.get_world_size())
    return Ranks()
