import math
import random
from itertools import pairwise

import pytest
from compared import INF, decay, exactly, near, noisy

from immiscible.reports.ratios import (
    GAIN,
    HARM,
    NO_EFFECT,
    UNCLEAR,
    UNKNOWN,
    Interval,
    crossing,
    highest_ratio,
    middle,
    ratio,
    seed_ratio,
    verdict,
)


def test_crossing_interpolates_the_logarithm():
    curve = [(100.0, 8.0), (200.0, 2.0), (300.0, 1.0)]
    assert near(crossing(curve, 4.0), 150)
    assert near(crossing(curve, math.sqrt(2)), 250)
    assert crossing(curve, 2.0) == exactly(200.0) and crossing(curve, 1.0) == exactly(300.0)


def test_crossing_takes_the_first_time_and_knows_what_it_does_not_know():
    assert near(crossing([(100.0, 8.0), (200.0, 2.0), (300.0, 8.0), (400.0, 1.0)], 4.0), 150)  # noise: it comes back up
    assert crossing([(100.0, 8.0), (200.0, 4.0), (300.0, 4.0)], 4.0) == exactly(200.0)  # a tie lasts
    assert crossing([(100.0, 8.0), (500.0, 4.1)], 4.0) == Interval(500.0, INF)
    assert crossing([(100.0, 3.0), (200.0, 2.0)], 4.0) == Interval(0.0, 100.0)
    assert crossing([(100.0, 4.0), (200.0, 2.0)], 4.0) == exactly(100.0)
    assert crossing([(100.0, INF), (200.0, 2.0)], 4.0) == Interval(100.0, 200.0)  # nothing to interpolate from
    assert crossing([(100.0, 1.0), (200.0, 0.0)], 1e-6).high < 200  # zero has no logarithm
    with pytest.raises(ValueError, match="at least one"):
        crossing([], 1.0)


def test_crossing_of_noisy_curves_equals_a_search_over_a_fine_grid():
    generator, found = random.Random(0), 0
    for _ in range(200):
        curve, threshold = noisy(generator), round(generator.uniform(1, 30), 1)
        result = crossing(curve, threshold)
        spots = [
            (start + share * (end - start) / 1000, high * (low / high) ** (share / 1000))
            for (start, high), (end, low) in pairwise(curve)
            for share in range(1001)
        ]
        first = next((time for time, value in spots if value <= threshold * (1 + 1e-12)), None)
        if first is None:
            assert result == Interval(curve[-1][0], INF)
        elif curve[0][1] < threshold:
            assert result == Interval(0.0, curve[0][0])
        else:
            assert result.low == result.high == pytest.approx(first, abs=0.5)
            found += 1
    assert found > 50


@pytest.mark.parametrize("seed", range(20))
def test_ratio_does_not_depend_on_units_and_names(seed):
    generator = random.Random(seed)
    baseline, curve = noisy(generator), noisy(generator)
    threshold = baseline[-1][1] * generator.uniform(0.8, 1.2)
    result = seed_ratio(baseline, curve, threshold)
    scaled = [[(3 * step, 7 * value) for step, value in one] for one in (baseline, curve)]
    for one, other in zip((result.low, result.high), (lambda r: (r.low, r.high))(seed_ratio(*scaled, 7 * threshold)), strict=True):
        assert one == pytest.approx(other)
    for c in (0.25, 2.0, 4.0):  # powers of two, which no rounding touches
        faster = seed_ratio(baseline, [(step / c, value) for step, value in baseline], threshold)
        assert faster == exactly(c) or faster == Interval(0.0, INF)  # the latter where the first evaluation was below already


def test_ratio_of_intervals_keeps_bounds_the_right_way_round():
    assert ratio(exactly(500.0), exactly(250.0)) == exactly(2.0)
    assert ratio(exactly(450.0), Interval(500.0, INF)) == Interval(0.0, 0.9)  # the arm never got there: below 0.9
    assert ratio(exactly(500.0), Interval(0.0, 100.0)) == Interval(5.0, INF)  # there before its first evaluation: above 5
    assert ratio(Interval(0.0, 100.0), Interval(0.0, 100.0)) == Interval(0.0, INF)


@pytest.mark.parametrize("threshold", [0.1, 0.2, 0.4, 1.0, 5.0, 30.0, 60.0])
@pytest.mark.parametrize("curve", [decay(), [(100.0, 9.0), (200.0, 3.0), (300.0, 4.0)], [(100.0, 3.0), (200.0, 5.0)], [(500.0, 3.0)]])
def test_identical_curves_give_exactly_one(curve, threshold):
    assert seed_ratio(curve, list(curve), threshold) == exactly(1.0)


@pytest.mark.parametrize("c", [0.5, 1.25, 2.0, 3.7])
@pytest.mark.parametrize("scale", [0.8, 1.0, 1.3])
def test_a_curve_compressed_in_time_by_c_gives_c(c, scale):
    baseline = decay(scale=scale)  # scale 1.3: a seed that ends above the threshold, 0.8: one that reaches it early
    compressed = [(step / c, value) for step, value in baseline]
    assert near(seed_ratio(baseline, compressed, decay()[-1][1]), c)


def test_an_arm_that_is_faster_on_the_same_grid_of_steps():
    assert near(seed_ratio(decay(), decay(speed=1.6), decay()[-1][1]), 1.6)


def test_an_arm_that_never_gets_there_is_below_one():
    late = seed_ratio(decay(), decay(speed=0.7), decay()[-1][1])
    assert late == Interval(0.0, 1.0) and late.show(2) == "< 1.00" and verdict([late]) == HARM
    early_baseline = seed_ratio(decay(scale=0.8), decay(speed=0.7), decay()[-1][1])
    assert early_baseline.low == 0 and early_baseline.high < 1
    longer = seed_ratio(decay(), decay(stop=1000, speed=0.3), decay()[-1][1])
    assert longer.show(2) == "< 0.50"  # trained twice as long as the baseline, and still not there


def test_middle_and_words_of_intervals():
    assert middle([exactly(1.0), exactly(3.0), exactly(2.0)]) == exactly(2.0)
    assert middle([exactly(1.2), Interval(1.3, INF), exactly(1.5)]) == Interval(1.3, 1.5)
    assert middle([Interval(1.2, INF), Interval(1.3, INF)]).show(2) == "> 1.25"
    assert middle([Interval(0.0, 0.9), Interval(0.0, 0.8), exactly(1.1)]) == Interval(0.0, 0.9)
    shown = [value.show(1) for value in (exactly(2.0), Interval(0.0, INF), Interval(1.0, 2.0), Interval(0.0, 2.0))]
    assert shown == ["2.0", "not known", "1.0 to 2.0", "< 2.0"]


def test_verdict_needs_every_seed_on_one_side_of_one():
    assert verdict([exactly(1.1), exactly(1.5), Interval(1.0, INF)]) == GAIN
    assert verdict([exactly(0.9), Interval(0.0, 1.0)]) == HARM
    assert verdict([exactly(1.0)] * 3) == NO_EFFECT
    for mixed in (
        [exactly(1.1), exactly(0.9)],
        [exactly(1.1), exactly(1.0)],
        [exactly(2.0), Interval(0.0, INF)],
        [exactly(1.1), Interval(0.5, 1.5)],
    ):
        assert verdict(mixed) == UNCLEAR
    assert verdict([Interval(0.0, INF)] * 2) == UNKNOWN


def test_half_of_what_is_not_known_is_not_known():
    assert middle([Interval(0.0, 0.83), exactly(0.91)]).show(2) == "< 0.87"
    assert middle([Interval(0.0, 0.83), exactly(0.9), exactly(1.0)]) == exactly(0.9)
    assert middle([Interval(500.0, INF), exactly(400.0)]).show() == "> 450"


def test_the_highest_ratio_is_that_of_the_quality_where_it_is_greatest():
    found, level = highest_ratio(decay(), decay(speed=2))
    assert near(found, 2) and level in [value for _, value in decay()]
    generator = random.Random(5)
    for _ in range(50):
        baseline, curve = noisy(generator), noisy(generator)
        levels = [value for number, (_, value) in enumerate(baseline) if all(value < before for _, before in baseline[:number])]
        lows = [at.low for value in levels if (at := ratio(crossing(baseline, value), crossing(curve, value))).low > 0]
        found = highest_ratio(baseline, curve)
        assert found is None if not lows else found[0].low == max(lows) and found[1] in levels


def test_the_highest_ratio_of_the_baseline_itself_is_one_and_of_a_curve_that_never_gets_there_none():
    assert highest_ratio(decay(), decay())[0] == exactly(1.0)
    assert highest_ratio(decay(), [(500.0, 1e3)]) is None
