"""The compiled inner loops of the assignment engine: integers, one thread, no interpreter lock held.

Costs are fixed point (the mean row's standard deviation is 2^15), because a minimum over 32-bit integers runs at the width of the
vector unit where one over floats does not. Columns are padded to whole blocks with a cost that no row ever takes.
"""

from __future__ import annotations

import numba
import numpy

BLOCK = 64  # columns whose minimum is taken at once; the winner is looked for inside the best block alone
PADDING = numpy.int32(2**30)  # above every cost plus price, which stay below 3 * 2**28
SPREAD = 2.0**15
LARGEST_COST = 2.0**28
_NONE = numpy.int32(2**31 - 1)


@numba.njit(cache=True, nogil=True, fastmath=True)
def fixed_point(cost: numpy.ndarray, out: numpy.ndarray) -> float:
    """Writes the cost without its row and column means, scaled and rounded, into ``out``; returns the scale.

    Args:
        cost: fp32 [N, N].
        out: int32 [N, width], width a multiple of `BLOCK` and at least N; its last columns become padding.
    """
    n, width = cost.shape[0], out.shape[1]
    row_means = numpy.empty(n, numpy.float32)
    column_means = numpy.zeros(n, numpy.float32)
    for i in range(n):
        total = numpy.float32(0)
        for j in range(n):
            total += cost[i, j]
        row_means[i] = total / numpy.float32(n)
        for j in range(n):
            column_means[j] += cost[i, j] - row_means[i]
    column_means /= numpy.float32(n)
    squares, largest = 0.0, numpy.float32(0)
    for i in range(n):
        row_squares, row_largest = numpy.float32(0), numpy.float32(0)
        for j in range(n):
            centered = cost[i, j] - row_means[i] - column_means[j]
            row_squares += centered * centered
            row_largest = max(row_largest, abs(centered))
        squares += row_squares
        largest = max(largest, row_largest)
    deviation = numpy.sqrt(squares) / n
    scale = min(SPREAD / deviation, LARGEST_COST / largest) if deviation > 0 and largest > 0 else 1.0
    factor = numpy.float32(scale)
    for i in range(n):
        for j in range(n):
            out[i, j] = numpy.int32(numpy.rint((cost[i, j] - row_means[i] - column_means[j]) * factor))
        for j in range(n, width):
            out[i, j] = PADDING
    return scale


@numba.njit(cache=True, nogil=True)
def auction(cost: numpy.ndarray, epsilon: int, prices: numpy.ndarray, owner: numpy.ndarray, index: numpy.ndarray, most_bids: int) -> int:
    """Gauss-Seidel auction (Bertsekas): unassigned rows bid one after the other for their cheapest column.

    A row raises the price of its best column by its advantage over the second best plus ``epsilon`` and takes it from its owner. When
    no row is left without a column, the cost is within ``N * epsilon`` of the least. Works on from any prices and partial assignment;
    stops early after ``most_bids``.

    Args:
        cost: int32 [N, width] from `fixed_point`.
        epsilon: at least 1.
        prices: int32 [width], changed.
        owner: int32 [width], the row of each column or -1, changed.
        index: int32 [N], the column of each row or -1, changed.
        most_bids: where to stop.

    Returns:
        the number of bids; below ``most_bids`` the assignment is complete.
    """
    n, width = cost.shape
    waiting = numpy.empty(n, numpy.int32)
    count = 0
    for i in range(n - 1, -1, -1):
        if index[i] < 0:
            waiting[count] = i
            count += 1
    bids = 0
    while count > 0 and bids < most_bids:
        count -= 1
        i = waiting[count]
        best, second, best_start = _NONE, _NONE, 0
        for start in range(0, width, BLOCK):
            least = _NONE
            for j in range(start, start + BLOCK):
                least = min(least, numpy.int32(cost[i, j] + prices[j]))
            if least < best:
                second = best
                best = least
                best_start = start
            elif least < second:
                second = least
        column = -1
        for j in range(best_start, best_start + BLOCK):
            value = numpy.int32(cost[i, j] + prices[j])
            if value == best and column < 0:
                column = j
            elif value < second:
                second = value
        prices[column] += second - best + epsilon
        loser = owner[column]
        owner[column] = i
        index[i] = column
        if loser >= 0:
            index[loser] = -1
            waiting[count] = loser
            count += 1
        bids += 1
    return bids


@numba.njit(cache=True, nogil=True)
def primal_and_dual(cost: numpy.ndarray, prices: numpy.ndarray, index: numpy.ndarray) -> tuple[int, int]:
    """The assignment's cost, and a lower bound on every assignment's: ``sum_i min_j (cost + price) - sum_j price``."""
    n = cost.shape[0]
    primal, dual = numpy.int64(0), numpy.int64(0)
    for i in range(n):
        least = _NONE
        for j in range(n):
            least = min(least, numpy.int32(cost[i, j] + prices[j]))
        dual += least
        primal += cost[i, index[i]]
    for j in range(n):
        dual -= prices[j]
    return primal, dual
