"""Couplings over pools larger than a batch: the batches of all ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from immiscible.assignment.conditions import conditioned_index
from immiscible.assignment.costs import cost_matrix
from immiscible.assignment.ranks import Ranks
from immiscible.assignment.solve import LARGEST_BLOCK
from immiscible.coupling import AboveTimestep, AssignmentCoupling, Coupling
from immiscible.errors import UserError

if TYPE_CHECKING:
    from accelerate import Accelerator


ROWS_PER_PRODUCT = 32  # rows of the cost are computed this many at a time, so that they come out alike however the ranks share them


@dataclass(frozen=True)
class GlobalAssignment:
    """The assignment of ``assignment`` over the images of all ranks; called by every rank with its own images and everyone's noises.

    On CPUs of one kind the result for a global batch does not depend on how many ranks share it: rows of the cost are computed alike,
    centered, rounded to bfloat16 and solved alike. For N images a rank sends 2 N bytes for each of its own. That all ranks come to the
    same solution takes hosts of one kind too: the solve is in integers, but what it rounds is not.

    Args:
        assignment: metric, precision, solver and condition.
        ranks: the partners.
        window: K, the micro-batches that a call brings.
        min_timestep: images below this (0-based) timestep keep their own noise.
    """

    assignment: AssignmentCoupling
    ranks: Ranks
    window: int = 1
    min_timestep: int = 0
    pairs_batch: ClassVar[bool] = True

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
            x0: this rank's images, [K * B, C, H, W].
            noise: the pool of all ranks, [K * W * B, C, H, W] in the order of global rows (`PoolDraws`).
            timesteps: of the pool's rows, [K * W * B].
            labels: of this rank's images, [K * B] or [K * B, E].
            generator: not used.

        Raises:
            UserError: the pool is missing or too large, or a row of any rank is NaN or infinite: on all ranks alike.
        """
        if noise is None or len(noise) != self.ranks.count * len(x0) or timesteps is None:
            raise UserError("--coupling_scope global needs the noises and timesteps of all ranks: [ranks * images, ...]")
        if len(noise) > LARGEST_BLOCK:
            raise UserError(
                f"--coupling_scope global pairs at most {LARGEST_BLOCK} images at once, not {len(noise)}, since every rank holds all "
                f"their costs; lower --coupling_window or --train_batch_size, or give --coupling_scope process"
            )
        rule = self.assignment
        if rule.condition not in ("within", "penalty"):
            labels = None
        elif labels is None:
            raise UserError(f"--coupling_condition {rule.condition} needs labels")
        rows = cost_matrix(x0.detach(), rule.cost_noise(noise), metric=rule.metric, dtype=rule.dtype, rows_per_product=ROWS_PER_PRODUCT)
        rows -= rows.mean(1, keepdim=True)
        table, everyones_labels = self.ranks.gather(rows.bfloat16(), labels)
        cost = self._in_global_order(table).float()
        finite = torch.isfinite(cost).all(1)
        if not finite.all():
            row = int((~finite).nonzero()[0])
            raise UserError(f"image {row} of the global batch, or a noise, holds NaN or infinite values; it has no distance", exit_code=1)
        above = (timesteps.cpu() >= self.min_timestep).nonzero()[:, 0]
        index = torch.arange(len(cost))
        if len(above):
            part = cost if len(above) == len(cost) else cost[above][:, above]
            theirs = None if everyones_labels is None else self._in_global_order(everyones_labels)[above]
            index[above] = above[conditioned_index(part, theirs, rule.condition, rule.condition_ratio, rule.solver)]
        mine = index.view(self.window, self.ranks.count, -1)[:, self.ranks.rank].flatten()
        return noise[mine.to(noise.device)]

    def _in_global_order(self, table: Tensor) -> Tensor:
        """[W, K * B, ...] -> [K * W * B, ...]: micro-batch by micro-batch and, within one, rank by rank."""
        return table.unflatten(1, (self.window, -1)).transpose(0, 1).flatten(0, 2)


def across_ranks(coupling: Coupling, accelerator: Accelerator, window: int = 1) -> GlobalAssignment:
    """``coupling`` over the batches of all ranks, ``window`` micro-batches at a time; every rank calls it once.

    Raises:
        UserError: a coupling that does not assign within the batch, one that keeps means of its own on each rank, or a precision of the
            cost that some rank lacks.
    """
    inner, min_timestep = (coupling.coupling, coupling.min_timestep) if isinstance(coupling, AboveTimestep) else (coupling, 0)
    if not isinstance(inner, AssignmentCoupling):
        raise UserError("--coupling_scope global needs a coupling that pairs the images of a batch: --noise_coupling assignment")
    if inner.condition == "centered":
        raise UserError("--coupling_condition centered keeps means of its own on every process; give --coupling_scope process")
    ranks = Ranks(accelerator.process_index, accelerator.num_processes)
    if inner.dtype == "int8":  # found out here and not by one rank alone in the middle of an exchange
        try:
            cost_matrix(torch.zeros(2, 64, device=accelerator.device), torch.zeros(2, 64, device=accelerator.device), dtype="int8")
            failed = False
        except UserError:
            failed = True
        if ranks.any_failed(failed):
            raise UserError("--coupling_dtype int8: not every process can multiply int8; give --coupling_dtype auto or float32")
    return GlobalAssignment(inner, ranks, window, min_timestep)
