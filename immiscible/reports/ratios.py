"""How much sooner one curve reaches a quality than another: times that may be known as intervals only, their ratios, and the verdict."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median, median_low

Curve = Sequence[tuple[float, float]]  # (time, distance), times rising; time is optimizer steps or seconds

LEAST_DISTANCE = 1e-12  # a Frechet distance of identical sets may come out as zero or a little below; its logarithm must exist
GAIN, HARM, NO_EFFECT, UNCLEAR = "▲ gain", "▼ harm", "● no effect", "● no clear effect"
BASELINE, UNKNOWN, NOTHING = "baseline", "not known", "–"
RULE = (
    "Gain means that every seed's ratio of steps is above 1, harm that every one is below 1, no effect that all are exactly 1; all else "
    "is no clear effect."
)


@dataclass(frozen=True)
class Interval:
    """What is known of a number: it lies in [low, high], and is known exactly where the ends are equal."""

    low: float
    high: float

    def show(self, digits: int = 0) -> str:
        """``1.25``, ``> 500`` where only a lower bound is known, ``< 0.96`` for an upper one, ``1.20 to 1.50`` between two."""
        low, high = f"{self.low:.{digits}f}", f"{self.high:.{digits}f}"
        if self.low == self.high:
            return low
        if math.isinf(self.high):
            return f"> {low}" if self.low > 0 else UNKNOWN
        return f"< {high}" if self.low <= 0 else f"{low} to {high}"


def crossing(curve: Curve, threshold: float) -> Interval:
    """The first time at which a curve is at or below ``threshold``.

    Between two evaluations the logarithm of the distance is a straight line in time. A curve that is below the threshold at its first
    evaluation got there at an unknown earlier time, (0, first); one that never gets there needs more than its last time, (last, inf).

    Raises:
        ValueError: an empty curve.
    """
    if not curve:
        raise ValueError("a curve needs at least one evaluation")
    first, value = curve[0]
    if value <= threshold:
        return Interval(first if value == threshold else 0.0, first)
    for (before, above), (after, below) in pairwise(curve):
        if below == threshold:  # interpolation would return `after` up to rounding
            return Interval(after, after)
        if below < threshold and math.isinf(above):
            return Interval(before, after)
        if below < threshold:
            logs = [math.log(max(value, LEAST_DISTANCE)) for value in (above, threshold, below)]
            share = (logs[0] - logs[1]) / (logs[0] - logs[2]) if logs[0] > logs[2] else 1.0
            time = before + share * (after - before)
            return Interval(time, time)
    return Interval(curve[-1][0], math.inf)


def ratio(reference: Interval, time: Interval) -> Interval:
    """``reference / time`` for times that may be known as intervals only; above 1 is faster than the reference."""
    low = reference.low / time.high if time.high > 0 else 0.0
    high = reference.high / time.low if time.low > 0 else math.inf
    return Interval(low, high)


def seed_ratio(baseline: Curve, curve: Curve, threshold: float) -> Interval:
    """How many times faster a curve reaches the threshold than the baseline's curve of the same seed.

    The threshold is the seed-mean of the baseline's last values, so some of the baseline's own seeds end above it. For those the ratio
    is taken at the last value of that seed's baseline, the best quality that both can be asked for. The baseline's time therefore
    always exists, and an arm with the baseline's curves has ratio exactly 1 for every seed.

    Returns:
        the baseline's time over the curve's; ``(0, n)``, shown as "< n", where the curve ends before it gets there.
    """
    if list(baseline) == list(curve):
        return Interval(1.0, 1.0)
    asked = max(threshold, baseline[-1][1])
    return ratio(crossing(baseline, asked), crossing(curve, asked))


def highest_ratio(baseline: Curve, curve: Curve) -> tuple[Interval, float] | None:
    """The greatest ratio of times over all qualities: what papers call their highest acceleration, read off two curves.

    The qualities are those at which the baseline is better than it was before; at each the ratio is `crossing` of the baseline over
    `crossing` of the curve. Of many noisy ratios the greatest flatters, also where there is no effect: beside `seed_ratio`, which asks
    at one quality that was fixed beforehand, it only serves to be held against published numbers.

    Returns:
        the ratio of the greatest lower end, and its quality; None where the curve reaches none of them.
    """
    best, found = math.inf, []
    for _, value in baseline:
        if value < best:
            best = value
            at = ratio(crossing(baseline, value), crossing(curve, value))
            if at.low > 0:
                found.append((at, value))
    return max(found, key=lambda pair: pair[0].low) if found else None


def middle(values: Iterable[Interval]) -> Interval:
    """The median of numbers that may be known as intervals only: the medians of their lower and of their upper ends.

    Half of what is not known from below is not known from below either.
    """
    values = list(values)
    lows = [value.low for value in values]
    return Interval(median(lows) if median_low(lows) > 0 else 0.0, median(value.high for value in values))


def verdict(ratios: Sequence[Interval]) -> str:
    """Gain, harm, no effect or no clear effect, by `RULE`, or not known where no seed's ratio is."""

    def side(value: Interval) -> int | None:
        if value.low == value.high == 1:
            return 0
        if value.low >= 1:  # the interval is open where it is not a point: an arm that is late by any amount is late
            return 1
        return -1 if value.high <= 1 else None

    if set(ratios) == {Interval(0.0, math.inf)}:
        return UNKNOWN
    sides = {side(value) for value in ratios}
    return {1: GAIN, -1: HARM, 0: NO_EFFECT, None: UNCLEAR}[sides.pop()] if len(sides) == 1 else UNCLEAR
