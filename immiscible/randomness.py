"""Randomness as a function: every draw of a step comes from a seed derived from (seed, purpose, step, block of global rows).

No generator state is kept, so nothing needs to be stored for an exact resume, two runs that differ in one method share every
other draw, and any rank can regenerate another rank's rows. *Global rows* number the images of one optimizer step across ranks
and accumulated micro-batches: row ``(micro_batch * num_processes + rank) * batch_size + i``.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property

import numpy
import torch
from torch import Tensor

ROWS_PER_BLOCK = 8  # few enough that any split of a batch over ranks wastes little, enough that seeding costs nothing


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed that is a function of ``parts`` alone, equal on every machine and process (torch's CPU generator uses 32 of them)."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seeded_generator(*parts: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator on ``device`` seeded by `derive_seed` of ``parts``."""
    return torch.Generator(device).manual_seed(derive_seed(*parts))


def reseed_globally(*parts: int | str) -> None:
    """Seeds the global generators of Python, NumPy and torch (all devices), which library code such as dropout draws from."""
    seed = derive_seed(*parts)
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@contextmanager
def preserved_randomness(device: torch.device | None = None) -> Iterator[None]:
    """After the block the global generators of Python, NumPy, the CPU and, if it is a GPU, ``device`` are what they were before."""
    python, array = random.getstate(), numpy.random.get_state()
    gpus = [device] if device is not None and device.type == "cuda" else []
    try:
        with torch.random.fork_rng(gpus):
            yield
    finally:
        random.setstate(python)
        numpy.random.set_state(array)


@dataclass(frozen=True)
class Draws:
    """The random numbers of one micro-batch.

    Args:
        seed: the run's seed.
        step: the optimizer step, from 0.
        first_row: the micro-batch's first global row within the step.
        device: where the numbers are drawn; CPU and CUDA generators give different numbers.
        by_shape: rows of each shape have numbers of their own, for a step whose micro-batches differ in shape: those of one block would
            begin with the same numbers.
    """

    seed: int
    step: int
    first_row: int
    device: torch.device
    by_shape: bool = False

    def normal(self, purpose: str, *shape: int) -> Tensor:
        """Standard normal numbers, fp32, of ``shape`` [rows, ...], the same for a global row however the rows are split."""
        return self._rows(purpose, shape, lambda block, generator: block.normal_(generator=generator), torch.float32)

    def uniform(self, purpose: str, rows: int) -> Tensor:
        """Uniform numbers in [0, 1), float64 on the CPU (not every device has float64), of shape [rows], the same for a global row
        however the rows are split."""
        on_cpu = replace(self, device=torch.device("cpu"))
        return on_cpu._rows(purpose, (rows,), lambda block, generator: block.uniform_(generator=generator), torch.float64)

    def generator(self, purpose: str) -> torch.Generator:
        """A generator for draws whose number is not known beforehand; a function of the micro-batch's first global row."""
        return seeded_generator(self.seed, purpose, self.step, self.first_row, device=self.device)

    def _rows(self, purpose: str, shape: tuple[int, ...], fill: Callable[[Tensor, torch.Generator], Tensor], dtype: torch.dtype) -> Tensor:
        first_block, last_block = self.first_row // ROWS_PER_BLOCK, (self.first_row + shape[0] - 1) // ROWS_PER_BLOCK
        blocks = torch.empty(last_block - first_block + 1, ROWS_PER_BLOCK, *shape[1:], dtype=dtype, device=self.device)
        generator = torch.Generator(self.device)
        told = shape[1:] if self.by_shape else ()
        for number, block in enumerate(blocks, start=first_block):
            fill(block, generator.manual_seed(derive_seed(self.seed, purpose, self.step, number, *told)))
        offset = self.first_row - first_block * ROWS_PER_BLOCK
        return blocks.flatten(0, 1)[offset : offset + shape[0]].contiguous()


@dataclass(frozen=True)
class PoolDraws:
    """The random numbers of a pool: the images that a coupling pairs together, one micro-batch or more, of this rank or of all ranks.

    Rows of the pool stand in the order of global rows: micro-batch by micro-batch and, within one, rank by rank. So the pool of a
    global batch is the same however many ranks share it.

    Args:
        parts: each micro-batch's own draws, of this rank.
        batch_size: B, images of a micro-batch on a rank.
        rank: this process, if the pool spans the ranks.
        ranks: W, how many ranks the pool spans; 1 is this rank alone.
    """

    parts: tuple[Draws, ...]
    batch_size: int
    rank: int = 0
    ranks: int = 1

    @cached_property
    def own(self) -> Tensor | None:
        """Where this rank's rows are in the pool, int64 [K * B] on the draws' device; None where they are all of it."""
        if self.ranks == 1:
            return None
        rows = torch.arange(len(self.parts) * self.ranks * self.batch_size, device=self.parts[0].device)
        return rows.view(-1, self.ranks, self.batch_size)[:, self.rank].flatten()

    @property
    def step(self) -> int:
        """The optimizer step of the pool's first micro-batch."""
        return self.parts[0].step

    def normal(self, purpose: str, *shape: int) -> Tensor:
        """As `Draws.normal` for all rows of the pool: [K * W * B, *shape], where ``shape`` is one row's."""
        return _joined([part.normal(purpose, self.ranks * self.batch_size, *shape) for part in self._parts_over_ranks()])

    def uniform(self, purpose: str) -> Tensor:
        """As `Draws.uniform` for all rows of the pool: [K * W * B]."""
        return _joined([part.uniform(purpose, self.ranks * self.batch_size) for part in self._parts_over_ranks()])

    def generator(self, purpose: str) -> torch.Generator:
        """As `Draws.generator`, a function of the first micro-batch's first global row on this rank."""
        return self.parts[0].generator(purpose)

    def _parts_over_ranks(self) -> list[Draws]:
        before = self.rank * self.batch_size if self.ranks > 1 else 0
        return [replace(part, first_row=part.first_row - before) for part in self.parts]


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
