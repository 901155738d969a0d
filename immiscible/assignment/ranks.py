"""One assignment over the batches of all ranks.

Every rank draws the noises of all ranks itself (`PoolDraws`: draws are functions of global rows), computes the costs of its own images
against all of them, and the ranks exchange these rows, in 16 bits: one gather. Then every rank solves the same problem, in integers
and so with the same result, and takes its own images' noises from the pool. No noise crosses the wire, no rank waits for another's
solve, and the noises of all ranks are distinct.

The exchange goes through a process group of its own on the CPU, where the solve is, so that a look-ahead thread can use it while the
main thread reduces gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor

from immiscible.errors import UserError

SCOPES = ("process", "global")


class AnotherRankFailed(UserError):
    """Raised on the ranks that have nothing to complain of themselves."""


class Ranks:
    """The processes of a run as partners of one assignment; every one of them makes the same calls in the same order.

    Args:
        rank: this process.
        count: W; with 1 nothing is exchanged.
    """

    def __init__(self, rank: int = 0, count: int = 1) -> None:
        self.rank, self.count = rank, count
        self._group = torch.distributed.new_group(backend="gloo") if count > 1 else None

    def any_failed(self, failed: bool) -> bool:
        """Whether any rank says so: one reduced number. A rank that cannot come to `gather` says it here, and nobody goes."""
        flag = torch.tensor(int(failed))
        if self._group is not None:
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX, group=self._group)
        return bool(flag)

    def gather(self, rows: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """All ranks' rows of the cost, bfloat16 [n, N] -> [W, n, N] on the CPU, and their labels [n, ...] -> [W, n, ...]."""
        columns = [rows.cpu()] if labels is None else [rows.cpu(), labels.reshape(len(rows), -1).cpu()]
        payload = torch.cat([column.contiguous().view(torch.uint8) for column in columns], dim=1)
        received = [payload]
        if self._group is not None:
            received = [torch.empty_like(payload) for _ in range(self.count)]
            torch.distributed.all_gather(received, payload, group=self._group)
        table = torch.stack(received)
        width = 2 * rows.shape[1]
        everyones = _packed(table[..., :width]).view(rows.dtype)
        if labels is None:
            return everyones, None
        return everyones, _packed(table[..., width:]).view(labels.dtype).view(self.count, *labels.shape)


def _packed(bytes_: Tensor) -> Tensor:
    """A copy that begins where memory does: bytes of any offset are not seen as wider numbers."""
    return bytes_.clone(memory_format=torch.contiguous_format)
