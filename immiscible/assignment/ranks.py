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

    def largest(self, *values: int) -> list[int]:
        """The largest of every rank's first value, of every rank's second one, and so on: one reduction."""
        return self.merged(torch.tensor(values, dtype=torch.int64, device="cpu")).tolist()

    def merged(self, tensor: Tensor) -> Tensor:
        """The largest of every rank's numbers, place by place: a tensor on the CPU, of one shape and dtype on all ranks."""
        if self._group is None:
            return tensor
        reduced = tensor.clone()
        torch.distributed.all_reduce(reduced, torch.distributed.ReduceOp.MAX, group=self._group)
        return reduced

    def any_failed(self, failed: bool) -> bool:
        """Whether any rank says so: one reduced number. A rank that cannot come to `gather` says it here, and nobody goes."""
        return bool(self.largest(failed)[0])

    def gather(self, rows: Tensor, *columns: Tensor) -> tuple[Tensor, ...]:
        """All ranks' rows of the cost, bfloat16 [n, N] -> [W, n, N] on the CPU, and what goes with them, each [n, ...] -> [W, n, ...]."""
        parts = [rows.cpu(), *(column.reshape(len(rows), -1).cpu() for column in columns)]
        words = [part.contiguous().view(torch.uint8) for part in parts]
        payload = torch.cat(words, dim=1)
        received = [payload]
        if self._group is not None:
            received = [torch.empty_like(payload) for _ in range(self.count)]
            torch.distributed.all_gather(received, payload, group=self._group)
        everyones = torch.stack(received).split([word.shape[1] for word in words], dim=2)
        whole = zip(everyones, (rows, *columns), strict=True)
        return tuple(_packed(part).view(own.dtype).view(self.count, *own.shape) for part, own in whole)


def _packed(words: Tensor) -> Tensor:
    """A copy that begins where memory does: bytes of any offset are not seen as wider numbers."""
    return words.clone(memory_format=torch.contiguous_format)
