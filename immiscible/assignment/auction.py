"""The compiled inner loops of the assignment engine: one thread, no interpreter lock held.

Costs are solved in fixed point, 16 bits (a standard deviation is 2^12, so epsilon is about 100 and rounding costs nothing beside it),
since a minimum over integers runs at the width of the vector unit where one over floats does not, and half the bytes are half the time
once the costs exceed the cache. A row of costs is K blocks of `BLOCK` columns; the last one is filled up with columns whose price
nobody pays. Loops over a block have a constant length and no wrapped index, without which they are not vectorized.
"""

from __future__ import annotations

import numba
import numpy

BLOCK = 64  # columns whose minimum is taken at once; the winner is looked for inside the best block alone
SPREAD = 2.0**12
LARGEST_COST = 2.0**15 - 1
ROUNDING = 1e-6  # of the column means: less than this is not told from rounding
LISTS_FROM = 4096  # rows; the costs of fewer stay in the cache
LONGEST_LIST = 192
LEVEL_GROUPS = 16
UNPAYABLE = numpy.int32(2**30)  # a price above every cost plus price, which stay below 2^19
_NONE = numpy.int32(2**31 - 1)
_WITHOUT_SIGN = numpy.int32(2**31 - 1)  # bits of a float whose order as integers is that of the absolute value, infinite and NaN last
_REORDERED = {"reassoc", "contract", "arcp", "nsz"}  # sums may be vectorized; NaN and infinity stay what they are


@numba.njit(cache=True, nogil=True, fastmath=_REORDERED)
def quantize(rows: numpy.ndarray, out: numpy.ndarray, scale: numpy.ndarray) -> None:
    """Writes each row, scaled so that its largest absolute value is 127 and rounded, into ``out``: ``rows ~ scale[:, None] * out``.

    Args:
        rows: fp32 [N, D], finite.
        out: int8 [N, D].
        scale: fp32 [N].
    """
    n, dimension = rows.shape
    for i in range(n):
        bits = numpy.int32(0)
        for j in range(dimension):
            bits = max(bits, numpy.float32(rows[i, j]).view(numpy.int32) & _WITHOUT_SIGN)
        largest = numpy.int32(bits).view(numpy.float32)
        scale[i] = largest / numpy.float32(127)
        factor = numpy.float32(127) / largest if largest > 1e-36 else numpy.float32(0)
        for j in range(dimension):
            out[i, j] = numpy.int8(numpy.int32(rows[i, j] * factor + numpy.float32(128.5)) - 128)  # truncated from above 0: rounded


@numba.njit(cache=True, nogil=True, fastmath=_REORDERED, error_model="numpy")  # a division that may raise is not vectorized
def costs_from_products(
    products: numpy.ndarray,
    image_scale: numpy.ndarray,
    noise_scale: numpy.ndarray,
    image_norm: numpy.ndarray,
    noise_norm: numpy.ndarray,
    far: numpy.ndarray,
    squared: bool,
    out: numpy.ndarray,
) -> None:
    """The costs of `immiscible.assignment.solve.cost_matrix` from inner products, in one pass.

    Args:
        products: int32 or fp32 [N, M]; times ``image_scale[:, None] * noise_scale`` they are ``x.n``.
        image_scale: fp32 [N].
        noise_scale: fp32 [M].
        image_norm: ``|x|``, fp32 [N].
        noise_norm: ``|n|``, fp32 [M].
        far: bool [N], which images count as longer than the noises.
        squared: ``squared_l2`` rather than ``l2``.
        out: fp32 [N, M].
    """
    n, m = products.shape
    for i in range(n):
        factor = numpy.float32(-2) * image_scale[i]
        norm = image_norm[i]
        if squared:
            for j in range(m):
                out[i, j] = factor * noise_scale[j] * numpy.float32(products[i, j])
        elif far[i]:
            for j in range(m):
                excess = noise_norm[j] * noise_norm[j] + factor * noise_scale[j] * numpy.float32(products[i, j])
                out[i, j] = excess / (numpy.sqrt(max(norm * norm + excess, numpy.float32(0))) + norm) - noise_norm[j]
        else:
            for j in range(m):
                excess = norm * norm + factor * noise_scale[j] * numpy.float32(products[i, j])
                length = noise_norm[j] + numpy.float32(1e-30)  # not 0 / 0 where a noise and an image are zero
                out[i, j] = excess / (numpy.sqrt(max(length * length + excess, numpy.float32(0))) + length)


@numba.njit(cache=True, nogil=True, fastmath=_REORDERED)
def fixed_point(cost: numpy.ndarray, out: numpy.ndarray) -> tuple[float, float]:
    """Writes the cost without its row and column means, scaled and rounded, into ``out``.

    The mean row's standard deviation becomes `SPREAD`, or less where the largest cost would not fit. What is left of costs that depend
    on the column alone is rounding and becomes 0: rows would go to war about it.

    Args:
        cost: fp32 [N, N].
        out: int16 [N, width], width at least N; further columns become 0.

    Returns:
        the scale, infinite if everything became 0, and what the standard deviation became; NaN, and nothing written, for a cost with NaN
        or infinite values.
    """
    n, width = cost.shape[0], out.shape[1]
    row_means = numpy.empty(n, numpy.float32)
    sums = numpy.zeros(n, numpy.float64)
    for i in range(n):
        total = 0.0
        for j in range(n):
            total += cost[i, j]
        mean = numpy.float32(total / n)
        row_means[i] = mean
        for j in range(n):
            sums[j] += cost[i, j] - mean
    column_means = (sums / n).astype(numpy.float32)
    deviations, bits = 0.0, numpy.int32(0)
    for i in range(n):
        squares, row_bits = 0.0, numpy.int32(0)
        for j in range(n):
            centered = cost[i, j] - row_means[i] - column_means[j]
            squares += numpy.float64(centered) * numpy.float64(centered)
            row_bits = max(row_bits, numpy.float32(centered).view(numpy.int32) & _WITHOUT_SIGN)
        deviations += numpy.sqrt(squares / n)
        bits = max(bits, row_bits)
    largest = numpy.int32(bits).view(numpy.float32)
    if not numpy.isfinite(largest):
        return numpy.nan, numpy.nan
    deviation, offset = deviations / n, numpy.sqrt((sums / n * sums / n).sum() / n)
    scale = min(SPREAD / deviation, LARGEST_COST / largest, 1e38) if deviation > ROUNDING * offset else numpy.inf
    factor = numpy.float32(scale if scale < numpy.inf else 0.0)
    for i in range(n):
        for j in range(n):
            value = (cost[i, j] - row_means[i] - column_means[j]) * factor
            out[i, j] = numpy.int16(numpy.int32(value + numpy.float32(32768.5)) - 32768)  # truncated from above 0: rounded
        for j in range(n, width):
            out[i, j] = 0
    return scale, deviation * factor


@numba.njit(cache=True, nogil=True)
def auction(
    cost: numpy.ndarray,
    epsilon: int,
    prices: numpy.ndarray,
    owner: numpy.ndarray,
    index: numpy.ndarray,
    most_bids: int,
    with_lists: bool,
) -> int:
    """Gauss-Seidel auction (Bertsekas): unassigned rows bid one after the other for their cheapest column.

    A row raises the price of its best column by its advantage over the second best plus ``epsilon`` and takes it from its owner, who
    joins the end of the queue. When no row is left without a column, the cost is within ``N * epsilon`` of the least. Works on from any
    prices and partial assignment; stops early after ``most_bids``.

    Args:
        cost: int16 [N, K, BLOCK].
        epsilon: at least 1.
        prices: int32 [K, BLOCK], `UNPAYABLE` in columns beyond N; changed.
        owner: int32 [K * BLOCK], the row of each column or -1, changed.
        index: int32 [N], the column of each row or -1, changed.
        most_bids: where to stop.
        with_lists: bid from `_list` where it suffices; changes the time alone.

    Returns:
        the number of bids; below ``most_bids`` the assignment is complete.
    """
    n, price, minima = len(cost), prices.reshape(-1), numpy.empty(cost.shape[1], numpy.int32)
    lists = n if with_lists else 0
    listed, others = numpy.zeros(lists, numpy.int32), numpy.zeros(lists, numpy.int32)
    columns, costs = numpy.empty((lists, LONGEST_LIST), numpy.uint32), numpy.empty((lists, LONGEST_LIST), numpy.int16)
    waiting = numpy.empty(n, numpy.int32)  # a ring of `count` rows from `head` on
    head, count = 0, 0
    for i in range(n):
        if index[i] < 0:
            waiting[count] = i
            count += 1
    bids = 0
    while count > 0 and bids < most_bids:
        i = numpy.uint32(waiting[head])
        head = head + 1 if head + 1 < n else 0
        count -= 1
        if with_lists:
            best, second, column = _scan_list(costs, columns, i, listed[i], price)
        if not with_lists or second >= others[i]:
            best, second, column = _scan(cost, i, prices, minima)
            if with_lists:
                listed[i], others[i] = _list(cost, i, prices, minima, columns, costs)
        price[column] += second - best + epsilon
        loser = owner[column]
        owner[column] = i
        index[i] = column
        if loser >= 0:
            index[loser] = -1
            tail = head + count
            waiting[tail if tail < n else tail - n] = loser
            count += 1
        bids += 1
    return bids


@numba.njit(cache=True, nogil=True)
def _scan(cost: numpy.ndarray, i: int, prices: numpy.ndarray, minima: numpy.ndarray) -> tuple[int, int, int]:
    """Row i's least cost plus price, the second least, and the least one's column; each block's least goes into ``minima``."""
    best, second, best_block = _NONE, _NONE, numpy.uint32(0)
    for k in range(cost.shape[1]):
        least = _NONE
        for j in range(BLOCK):
            least = min(least, numpy.int32(numpy.int32(cost[i, k, j]) + prices[k, j]))
        minima[k] = least
        if least < best:
            second = best
            best = least
            best_block = numpy.uint32(k)
        elif least < second:
            second = least
    place = numpy.int32(BLOCK)
    for j in range(BLOCK):
        value = numpy.int32(numpy.int32(cost[i, best_block, j]) + prices[best_block, j])
        place = min(place, numpy.int32(j) if value == best else numpy.int32(BLOCK))
    for j in range(BLOCK):
        value = numpy.int32(numpy.int32(cost[i, best_block, j]) + prices[best_block, j])
        second = min(second, _NONE if numpy.int32(j) == place else value)
    return best, second, numpy.uint32(best_block * BLOCK + place)


@numba.njit(cache=True, nogil=True)
def _scan_list(costs: numpy.ndarray, columns: numpy.ndarray, i: int, listed: int, price: numpy.ndarray) -> tuple[int, int, int]:
    """As `_scan`, of the ``listed`` columns of row i's list."""
    best, second, place = _NONE, _NONE, numpy.int32(LONGEST_LIST)
    for j in range(listed):
        best = min(best, numpy.int32(numpy.int32(costs[i, j]) + price[columns[i, j]]))
    for j in range(listed):
        value = numpy.int32(numpy.int32(costs[i, j]) + price[columns[i, j]])
        place = min(place, numpy.int32(j) if value == best else numpy.int32(LONGEST_LIST))
    for j in range(listed):
        value = numpy.int32(numpy.int32(costs[i, j]) + price[columns[i, j]])
        second = min(second, _NONE if numpy.int32(j) == place else value)
    return best, second, columns[i, place] if listed > 0 else numpy.uint32(0)


@numba.njit(cache=True, nogil=True)
def _list(
    cost: numpy.ndarray, i: int, prices: numpy.ndarray, minima: numpy.ndarray, columns: numpy.ndarray, costs: numpy.ndarray
) -> tuple[int, int]:
    """Lists row i's columns below a level that about fifty are below; returns their number, 0 if they are too many, and the level.

    What all other columns cost at least, the level, stays true as prices only rise: while two of the list are below it, a bid from the
    list is the bid that a scan of the row would make. It pays where a scan waits for memory.

    The level is the greatest of the least values of `LEVEL_GROUPS` equal parts of the row.
    """
    blocks = cost.shape[1]
    group = max(1, blocks // LEVEL_GROUPS)
    level = -_NONE
    for start in range(0, blocks - group + 1, group):
        least = _NONE
        for k in range(start, start + group):
            least = min(least, minima[k])
        level = max(level, least)
    listed = 0
    for k in range(blocks):
        if minima[k] >= level:
            continue
        place = numpy.int32(-1)
        while True:
            after = place
            place = numpy.int32(BLOCK)
            for j in range(BLOCK):
                value = numpy.int32(numpy.int32(cost[i, k, j]) + prices[k, j])
                place = min(place, numpy.int32(j) if (value < level) & (numpy.int32(j) > after) else numpy.int32(BLOCK))
            if place == BLOCK:
                break
            if listed == LONGEST_LIST:
                return 0, level
            columns[i, listed] = k * BLOCK + place
            costs[i, listed] = cost[i, k, place]
            listed += 1
    return listed, level


@numba.njit(cache=True, nogil=True)
def primal_and_dual(cost: numpy.ndarray, prices: numpy.ndarray, index: numpy.ndarray) -> tuple[int, int]:
    """The assignment's cost, and a lower bound on every assignment's: ``sum_i min_j (cost + price) - sum_j price``.

    Args:
        cost: int16 [N, K, BLOCK].
        prices: int32 [K, BLOCK], of `auction`.
        index: int32 [N], a permutation.
    """
    n, blocks = cost.shape[0], cost.shape[1]
    primal, dual = numpy.int64(0), numpy.int64(0)
    for i in range(n):
        least = _NONE
        for k in range(blocks):
            for j in range(BLOCK):
                least = min(least, numpy.int32(numpy.int32(cost[i, k, j]) + prices[k, j]))
        column = index[i]
        primal += cost[i, column // BLOCK, column % BLOCK]
        dual += least - prices[column // BLOCK, column % BLOCK]
    return primal, dual
