import base64
import html
import io
import json
import math
import random
import re
from itertools import pairwise

import pytest
from launch import tiny
from PIL import Image

from immiscible.configs import TextToImageConfig, UnconditionalConfig
from immiscible.errors import UserError
from immiscible.flags import save_config
from immiscible.reports.comparison import compare
from immiscible.reports.figures import looks
from immiscible.reports.page import html_report, markdown_report, summary, write_report
from immiscible.reports.ratios import (
    GAIN,
    HARM,
    NO_EFFECT,
    UNCLEAR,
    UNKNOWN,
    Interval,
    crossing,
    middle,
    ratio,
    seed_ratio,
    verdict,
)
from immiscible.reports.runs import command_of, group_runs, read_run
from immiscible.reports.sentences import headline
from immiscible.reports.tables import cost_table, seed_table, spread, summary_table

INF = math.inf


def decay(stop=500, every=100, speed=1.0, scale=1.0):
    """A curve that falls by a factor of e in 100 steps at speed 1, evaluated every ``every`` steps."""
    return [(float(step), scale * 50 * math.exp(-speed * step / 100)) for step in range(every, stop + 1, every)]


def exactly(value):
    return Interval(value, value)


def words(page):
    """A page's text without its tags."""
    return html.unescape(re.sub(r"<[^>]+>", "", page))


def noisy(generator, stop=500):
    """A curve that falls on average, with noise and ties, at steps that are not evenly spaced."""
    steps = sorted(generator.sample(range(1, stop), 8))
    return [(float(step), max(0.1, round(30 * math.exp(-step / 200) * generator.uniform(0.6, 1.5), 1))) for step in steps]


def near(interval, value, tolerance=1e-9):
    return interval.low == interval.high == pytest.approx(value, rel=tolerance)


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


def write_run(folder, curves, *, seed=0, finished=True, dimension=None, line=None, seconds_per_step=0.05, metric=None, text=False, **flags):
    """A folder as a training script leaves it; ``curves`` by number of inference steps."""
    (folder / "samples").mkdir(parents=True)
    data = {"pretrained_model_name_or_path": "sd", "train_data_dir": "photos"} if text else {"bundled_data": "digits"}
    values = {**data, "resolution": 8, "prediction_type": "v_prediction", "max_train_steps": 500, **flags}
    config = TextToImageConfig if text else UnconditionalConfig
    save_config(config(seed=seed, output_dir=str(folder), **values), folder / "config.yaml")
    common = {"feature": "FD-digits", "samples": 1500, "reference_images": 1797, "data": "abc", "weights": "ema"}
    common |= {"validation_loss": {"0-499": 0.2, "500-999": 0.1}, **({"num_features": dimension} if dimension else {}), **(line or {})}
    with (folder / "evaluation.jsonl").open("w") as file:
        for number, (step, _) in enumerate(next(iter(curves.values()))):
            distances = {str(steps): curve[number][1] for steps, curve in curves.items()}
            seconds = step * seconds_per_step
            file.write(json.dumps({"step": int(step), "train_seconds": seconds, **common, "frechet_distance": distances}) + "\n")
    metrics = {"step_seconds": seconds_per_step, "coupling_seconds": 0.005, "distance_reduction_percent": 9.5}
    metrics |= {"noise_variance_drift": 0.01, "noise_norm_drift": -0.02, "paired_images": 256, "loss": 0.1, **(metric or {})}
    (folder / "metrics.jsonl").write_text("".join(json.dumps({"step": step, **metrics}) + "\n" for step in (10, 20)))
    if finished:
        (folder / "summary.json").write_text(json.dumps({"step": 500}))
        Image.new("RGB", (64, 64), "navy").save(folder / "samples" / "step-0000500.png")
    return folder


@pytest.fixture
def arms(tmp_path):
    """A baseline, an arm twice as fast at 5 inference steps and harmful at 20, and a copy of the baseline; three seeds each."""
    made = {"baseline": [], "coupled": [], "copy": []}
    for seed, scale in enumerate((0.9, 1.0, 1.15)):
        plain = {5: decay(scale=scale), 20: decay(scale=scale / 2)}
        coupled = {5: decay(scale=scale, speed=2), 20: decay(scale=scale / 2, speed=0.8)}
        made["baseline"].append(write_run(tmp_path / f"baseline-seed{seed}", plain, seed=seed))
        made["coupled"].append(
            write_run(tmp_path / f"coupled-seed{seed}", coupled, seed=seed, noise_coupling="assignment", seconds_per_step=0.06)
        )
        made["copy"].append(write_run(tmp_path / f"copy-seed{seed}", plain, seed=seed))
    return made


def test_comparison_of_three_seeds(arms):
    comparison = compare(arms)
    final = decay()[-1][1]
    assert comparison.threshold(5) == pytest.approx(final * (0.9 + 1 + 1.15) / 3)
    assert all(near(value, 2) for value in comparison.ratios("coupled", 5).values())
    assert all(near(value, 2 * 0.05 / 0.06) for value in comparison.ratios("coupled", 5, "train_seconds").values())
    assert set(comparison.ratios("copy", 5).values()) == {exactly(1.0)} == set(comparison.ratios("copy", 20, "train_seconds").values())
    assert [comparison.verdict(name, 5) for name in arms] == ["baseline", GAIN, NO_EFFECT]
    assert [comparison.verdict(name, 20) for name in arms] == ["baseline", HARM, NO_EFFECT]
    assert comparison.crossings("baseline", 5)[2] == Interval(500.0, INF)
    sentences = headline(comparison)
    assert sentences[0] == (
        "Best arm: coupled reached baseline's final FD-digits 2.00 times sooner in training steps (1.67 in seconds) at 5 inference steps "
        "(medians of 3 seeds; seconds of this machine, as busy as it was)."
    )
    assert sentences[1] == "Harm, slower than baseline with every seed: coupled at 20 inference steps."
    assert "No clear effect: copy at 5 and 20 inference steps." in sentences


def test_two_seeds_say_that_it_may_be_chance(arms):
    sentences = headline(compare({name: folders[:2] for name, folders in arms.items()}))
    assert " at 5 inference steps (2 seeds only, so this may be chance; " in sentences[0]
    assert (
        sentences[1] == "Harm, slower than baseline with every seed: coupled at 20 inference steps (2 seeds only, so this may be chance)."
    )


def run_pair(tmp_path, name, **curves):
    """The folders of an arm's two seeds with the same curves, whose speed at 5 and at 20 inference steps is given."""
    return [
        write_run(tmp_path / f"{name}-seed{seed}", {5: decay(speed=curves["five"]), 20: decay(speed=curves["twenty"])}, seed=seed)
        for seed in range(2)
    ]


def test_the_headline_says_where_an_arm_is_best(tmp_path):
    arms = {
        "baseline": run_pair(tmp_path, "baseline", five=1, twenty=1),
        "steady": run_pair(tmp_path, "steady", five=1.9, twenty=1.6),
        "steep": run_pair(tmp_path, "steep", five=2.5, twenty=1.1),
    }
    sentences = headline(compare(arms))
    assert sentences[0].startswith(
        "Best arm over 5 and 20 inference steps together: steady reached baseline's final FD-digits 1.90 times sooner in training steps "
        "(1.90 in seconds) at 5 inference steps and 1.60 times sooner in training steps (1.60 in seconds) at 20 inference steps ("
    )
    assert sentences[1] == (
        "Best at 5 inference steps alone: steep, 2.50 times sooner in training steps (2.50 in seconds) "
        "(2 seeds only, so this may be chance)."
    )
    assert headline(compare({name: arms[name] for name in ("baseline", "steady")}))[0].startswith("Best arm: steady reached")


def test_an_arm_that_is_sooner_in_steps_and_later_in_seconds_is_said_to_be(tmp_path):
    arms = {
        "baseline": [write_run(tmp_path / "a", {5: decay()})],
        "dear": [write_run(tmp_path / "b", {5: decay(speed=1.25)}, seconds_per_step=0.1)],
    }
    assert "1.25 times sooner in training steps (0.62 in seconds, which is later) at 5" in headline(compare(arms))[0]


def test_every_baseline_reaches_its_goal(arms):
    for seed in range(3):
        assert compare(arms).times("baseline", 5)[seed].high <= 500
    table = summary_table(compare(arms), 5)
    baseline = dict(zip(table.columns, table.rows[0], strict=True))
    assert baseline["steps to it"] == "498" and "of 0.343, its mean over seeds" in table.caption
    assert "seconds of this machine, as busy as it was" in table.caption


@pytest.mark.parametrize(
    ("speeds", "shown"),
    [
        ((0.7, 0.8, 0.9), "< 1.00x (up to 1.00)"),  # two of them end above their goals
        ((2, 2.5, 4), "2.50x (2.00 to 4.00)"),
        ((2, 2, 2), "2.00x"),
    ],
)
def test_a_spread_is_read_at_a_glance(tmp_path, speeds, shown):
    arms = {"baseline": [], "other": []}
    for seed, speed in enumerate(speeds):
        arms["baseline"].append(write_run(tmp_path / f"a{seed}", {5: decay(scale=1 - seed / 10)}, seed=seed))
        arms["other"].append(write_run(tmp_path / f"b{seed}", {5: decay(scale=1 - seed / 10, speed=speed)}, seed=seed))
    table = summary_table(compare(arms), 5)
    assert dict(zip(table.columns, table.rows[1], strict=True))["sooner in steps"] == shown


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ([Interval(0.0, 0.9), exactly(1.0)], "< 0.95x (up to 1.00)"),
        ([Interval(0.0, 0.9), Interval(0.0, 0.9)], "< 0.90x"),
        ([exactly(1.2), exactly(1.3), Interval(2.0, INF)], "1.30x (1.20 and more)"),
        ([Interval(0.0, 0.9), exactly(1.0), Interval(2.0, INF)], "1.00x (neither end known)"),
        ([Interval(0.0, INF)], "not known"),
    ],
)
def test_what_is_known_of_a_spread(values, shown):
    assert spread(dict(enumerate(values)), 2, "x") == shown


def test_half_of_what_is_not_known_is_not_known():
    assert middle([Interval(0.0, 0.83), exactly(0.91)]).show(2) == "< 0.87"
    assert middle([Interval(0.0, 0.83), exactly(0.9), exactly(1.0)]) == exactly(0.9)
    assert middle([Interval(500.0, INF), exactly(400.0)]).show() == "> 450"


@pytest.mark.parametrize("c", [0.75, 1.25, 3.0])
def test_arms_compressed_in_time_have_that_ratio_with_every_seed(tmp_path, c):
    generator = random.Random(int(10 * c))
    arms = {"baseline": [], "other": []}
    for seed in range(3):
        curve = [(step, value * generator.uniform(0.9, 1.1)) for step, value in decay(stop=600, every=60)]
        arms["baseline"].append(write_run(tmp_path / f"a{seed}", {5: curve}, seed=seed))
        compressed = [(step / c, value) for step, value in curve]
        arms["other"].append(write_run(tmp_path / f"b{seed}", {5: compressed}, seed=seed))
    comparison = compare(arms)
    for time in ("step", "train_seconds"):
        assert all(near(value, c) for value in comparison.ratios("other", 5, time).values())
    assert comparison.verdict("other", 5) == (GAIN if c > 1 else HARM)


def test_an_arm_that_never_gets_there_is_shown_the_right_way_round(tmp_path):
    arms = {
        "baseline": [write_run(tmp_path / f"a{seed}", {5: decay()}, seed=seed) for seed in range(2)],
        "late": [write_run(tmp_path / f"b{seed}", {5: decay(speed=0.5)}, seed=seed) for seed in range(2)],
    }
    comparison = compare(arms)
    table = summary_table(comparison, 5)
    late = dict(zip(table.columns, table.rows[1], strict=True))
    assert [late[column] for column in ("verdict", "sooner in steps", "sooner in seconds", "steps to it", "seconds to it")] == [
        HARM,
        "< 1.00x",
        "< 1.00x",
        "> 500",
        "> 25.00",
    ]
    assert "late at 5 inference steps" in headline(comparison)[1] and headline(comparison)[1].startswith("Harm")
    for report in (words(html_report(comparison)), markdown_report(comparison)):
        assert "< 1.00x" in report and "> 500" in report and "> 1.00x" not in report


def test_every_ratio_can_be_computed_again_by_hand(arms):
    table = seed_table(compare(arms), 5)
    rows = [dict(zip(table.columns, row, strict=True)) for row in table.rows]
    baseline = {row["seed"]: row for row in rows if row["arm"] == "baseline"}
    assert len(rows) == 9 and {row["goal"] for row in rows} == {"0.3425", "0.3874"}  # the mean, and seed 2's own last value
    for row in rows:
        for time, shown in (("steps to goal", "sooner in steps, x"), ("seconds to goal", "sooner in seconds, x")):
            assert float(baseline[row["seed"]][time]) / float(row[time]) == pytest.approx(float(row[shown]), rel=2e-3)


def test_the_baseline_may_be_any_arm(arms):
    comparison = compare(arms, baseline="coupled")
    assert comparison.verdict("baseline", 5) == HARM and comparison.verdict("baseline", 20) == GAIN
    with pytest.raises(UserError, match="'plain' is not one of the arms: baseline, coupled, copy"):
        compare(arms, baseline="plain")


def test_equal_finals_cannot_put_the_threshold_out_of_reach(tmp_path):
    value = 0.1  # the mean of three is not 0.1 in floating point when summed naively
    arms = {"a": [write_run(tmp_path / f"a{seed}", {5: [(100, 1.0), (500, value)]}, seed=seed) for seed in range(3)]}
    assert set(compare(arms).crossings("a", 5).values()) == {exactly(500.0)}


def test_seeds_that_the_baseline_lacks_are_compared_with_all_of_its_seeds(arms, tmp_path):
    extra = write_run(tmp_path / "coupled-seed7", {5: decay(speed=2), 20: decay(scale=0.5)}, seed=7)
    comparison = compare({**arms, "coupled": [*arms["coupled"], extra]})
    assert 1.5 < comparison.ratios("coupled", 5)[7].low <= comparison.ratios("coupled", 5)[7].high < 2.5
    assert any("Not every seed of coupled" in note for note in comparison.notes)


def test_nothing_helped_is_said_first(tmp_path):
    arms = {
        "baseline": [write_run(tmp_path / "a", {5: decay()})],
        "slow": [write_run(tmp_path / "b", {5: decay(speed=0.9)})],
    }
    assert headline(compare(arms))[0] == "Nothing helped: no arm reached baseline's final FD-digits sooner with every seed."
    one = {"slow": arms["slow"], "baseline": arms["baseline"]}
    assert "one seed only" in headline(compare(one))[0]


def test_too_few_evaluations_are_said_to_be_too_few(tmp_path):
    rising = [(100.0, 3.0), (500.0, 5.0)]  # below its own end from the first evaluation on
    arms = {
        "baseline": [write_run(tmp_path / "a", {5: rising, 20: decay()})],
        "other": [write_run(tmp_path / "b", {5: [(100.0, 2.0), (500.0, 1.0)], 20: [(100.0, 0.1), (500.0, 0.1)]})],
    }
    comparison = compare(arms)
    assert comparison.verdict("other", 5) == UNKNOWN and comparison.verdict("other", 20) == GAIN
    assert "over 5.00 times sooner in training steps (over 5.00 in seconds) at 20 inference steps" in headline(comparison)[0]
    assert headline(comparison)[1] == "Not known, for want of earlier evaluations: other at 5 inference steps."
    html_report(comparison)


def test_report_holds_every_arm_seed_and_command(arms, tmp_path):
    comparison = compare(arms, commands={arms["copy"][0]: "OMP_NUM_THREADS=1 python mine.py --copy"})
    path = write_report(comparison, tmp_path / "out")
    page, text = path.read_text(), (tmp_path / "out" / "report.md").read_text()
    for report in (page, text):
        assert headline(comparison)[0].split(" reached")[0] in report
        for seed in range(3):
            for name in arms:
                assert re.search(rf"{name}\b.*\b{seed}\b", report)
    for report in (words(page), text):
        assert "OMP_NUM_THREADS=1 python mine.py --copy" in report
        assert report.count("--noise_coupling assignment") == 3
        assert "1 of 4 comparisons" in report
        assert "not known" not in report and "nan" not in report.lower().replace("nancy", "")
    assert page.count("data:image/png;base64,") == 3
    assert page.count("<svg") == 5  # curves and ratios at two numbers of inference steps, inference steps
    assert not list((tmp_path / "out").glob(".*"))  # nothing half written
    assert "0-499" in page and "0-499" in text


def test_many_arms_have_looks_of_their_own_and_a_figure_each(arms, tmp_path):
    arms |= {f"a_long_name_{number}": [write_run(tmp_path / str(number), {5: decay(), 20: decay()})] for number in range(9)}
    assert len({(look["color"], str(look["linestyle"]), look["marker"]) for look in looks(compare(arms)).values()}) == 12
    page = html_report(compare({name: arms[name] for name in list(arms)[:5]}))
    assert "<h1>4 arms against baseline</h1>" in page and page.count("<svg") == 5 + 2 * 4
    assert len(set(re.findall(r'viewBox="0 0 ([\d.]+) ', page))) == 2  # two widths, so that all letters have one size
    few = html_report(compare({name: arms[name] for name in list(arms)[:4]}))
    assert 'class="panels"' not in few and "<h1>coupled, copy, a_<wbr>long_<wbr>name_<wbr>0 against baseline</h1>" in few


@pytest.mark.parametrize("evaluations", [1, 2, 3, 4, 8, 20])
def test_curves_have_marks_and_the_last_point_always_has_one(tmp_path, evaluations):
    points = [(100.0 * (number + 1), 60.0 / (number + 1)) for number in range(evaluations)]
    arms = {"baseline": [write_run(tmp_path / "a", {5: points})], "b": [write_run(tmp_path / "b", {5: points})]}
    figure = next(figure for figure in re.findall(r"<svg.*?</svg>", html_report(compare(arms)), re.S) if "against training steps" in figure)
    color = looks(compare(arms))["b"]["color"].lower()
    marks = re.findall(rf'<use xlink:href="#(\w+)" x="([\d.]+)" y="[\d.]+" style="fill: {color}', figure)
    shape = marks[-1][0]  # the legend's is the last one, and of the median's line
    tick = next(x for other, x in marks if other != shape)  # where the seed reaches the baseline's last value: at its own last point
    places = [x for other, x in marks[:-1] if other == shape]
    assert len(places) == (evaluations if evaluations <= 8 else 7)  # of twenty points every third, counted from the last
    assert places == sorted(places, key=float) and places[-1] == tick


@pytest.mark.parametrize("last, ticks", [(15.0, [20, 40, 60]), (2.0, [2, 5, 10, 20, 50]), (0.003, [0.01, 0.1, 1, 10])])
def test_axes_have_a_few_plain_ticks(tmp_path, last, ticks):
    page = html_report(compare({"a": [write_run(tmp_path / "a", {5: [(100.0, 60.0), (500.0, last)]})]}))
    curves = next(figure for figure in re.findall(r"<svg.*?</svg>", page, re.S) if "5 inference steps" in figure)
    shown = [float(text) for text in re.findall(r">([\d.]+)</text>", curves)]
    assert shown[-len(ticks) :] == ticks  # the last axis is the upright one


def test_ratios_that_are_not_known_are_drawn_or_said(tmp_path):
    arms = {
        "baseline": [write_run(tmp_path / "a", {5: [(100.0, 9.0), (500.0, 3.0)], 20: [(100.0, 3.0), (500.0, 5.0)]})],
        "early": [write_run(tmp_path / "b", {5: [(100.0, 0.1), (500.0, 0.1)], 20: [(100.0, 2.0), (500.0, 1.0)]})],
        "killed": [write_run(tmp_path / "c", {5: decay(stop=200), 20: decay(stop=200)}, finished=False)],
    }
    page = html_report(compare(arms))
    drawn = [figure for figure in re.findall(r"<svg.*?</svg>", page, re.S) if "times sooner in training steps" in figure]
    assert ["not known" in figure for figure in drawn] == [False, True]
    assert all("no finished run" in figure for figure in drawn)


def test_samples_are_kept_apart(tmp_path):
    arms = {"baseline": [write_run(tmp_path / "a", {5: decay()}, eval_batch_size=4)]}
    grid = Image.new("RGB", (64, 64), "black")
    grid.paste("red", (32, 0, 64, 32))
    grid.save(tmp_path / "a" / "samples" / "step-0000500.png")
    data = re.search(r"data:image/png;base64,([^\"]+)", html_report(compare(arms)))[1]
    shown = Image.open(io.BytesIO(base64.b64decode(data)))
    gap = [(x, y) for x in range(66) for y in range(66) if x in (32, 33) or y in (32, 33)]
    assert shown.size == (66, 66) and {shown.getpixel(spot) for spot in gap} == {(255, 255, 255)}
    assert shown.crop((34, 0, 66, 32)).getcolors() == [(1024, (255, 0, 0))]
    assert shown.crop((0, 34, 32, 66)).getcolors() == [(1024, (0, 0, 0))]
    grid.resize((63, 64)).save(tmp_path / "a" / "samples" / "step-0000500.png")  # no grid of four: shown as it is
    data = re.search(r"data:image/png;base64,([^\"]+)", html_report(compare(arms)))[1]
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (63, 64)


def test_no_drift_is_shown_without_a_sign_of_its_own(tmp_path):
    table = cost_table(compare({"a": [write_run(tmp_path / "a", {5: decay()}, metric={"noise_norm_drift": -4e-8})]}))
    shown = dict(zip(table.columns, table.rows[0], strict=True))
    assert shown["noise norm drift"] == "+0.0000" and shown["noise variance drift"] == "+0.0100"


def test_two_arms_of_one_method_have_the_same_curves(script, tmp_path):
    changes = {"eval_steps": 1, "eval_samples": 70, "eval_inference_steps": [1], "eval_features": "pixels", "noise_coupling": "assignment"}
    arms = {name: [tmp_path / f"{name}-seed0"] for name in ("one", "other")}
    for (folder,) in arms.values():
        assert script(tiny(folder, **changes, max_train_steps=2)).code == 0
    comparison = compare(arms)
    assert comparison.ratios("other", 1) == {0: exactly(1.0)} and comparison.verdict("other", 1) == NO_EFFECT
    one, other = (comparison.arms[name].runs[0].curve(1) for name in arms)
    assert one == other and [step for step, _ in one] == [1, 2] and all(math.isfinite(value) for _, value in one)


def test_report_is_self_contained(arms):
    page = html_report(compare(arms))
    assert "http" not in page and "<script" not in page and "<link" not in page and "@import" not in page
    sources = re.findall(r'(?:src|href)="([^"]{1,5})', page)
    assert sources and all(source.startswith(("data:", "#")) for source in sources)
    assert "url(" not in re.sub(r"url\(#\w+\)", "", page)


def test_names_are_escaped(tmp_path):
    arms = {"<b>&": [write_run(tmp_path / "a", {5: decay()})], "x|y": [write_run(tmp_path / "b", {5: decay(speed=2)})]}
    comparison = compare(arms)
    assert "<b>&" not in html_report(comparison) and "&lt;b&gt;&amp;" in html_report(comparison)
    text = markdown_report(comparison)
    assert "x\\|y" in text and not re.search(r"(?<!\\)<b>", re.sub(r"```.*?```", "", text, flags=re.DOTALL))


def test_names_from_a_hostile_folder_stay_text_and_its_commands_stay_code(tmp_path):
    name = "<script>alert(1)</script> [a](http://e) $\\frac{x$"
    arms = {"baseline": [write_run(tmp_path / "a", {5: decay()})], name: [write_run(tmp_path / "b", {5: decay(speed=2)})]}
    comparison = compare(
        arms, commands={tmp_path / "b": "python t.py --output_dir 'x\n```\n# y'"}, problems={tmp_path / "a": "<img src=x>"}
    )
    page, text = html_report(comparison), markdown_report(comparison)
    assert "<script" not in page and "<img src=x" not in page and page.count("$\\frac{x$") > 5
    assert not re.search(r"(?<!\\)(<script|<img|\[a)", text) and "\n````\npython t.py" in text and "# y'\n````\n" in text


def test_the_same_runs_give_the_same_report(arms):
    assert html_report(compare(arms)) == html_report(compare(arms))


def test_report_survives_missing_and_unfinished_arms(arms, tmp_path):
    killed = write_run(tmp_path / "killed-seed0", {5: decay(stop=200), 20: decay(stop=200)}, finished=False)
    absent = tmp_path / "absent-seed0"
    comparison = compare(
        {**arms, "killed": [killed], "absent": [absent]},
        commands={absent: "python t.py --seed 0"},
        problems={absent: "failed with exit code 1: boom", killed: "killed by signal 9 (SIGKILL)"},
    )
    for report in (words(html_report(comparison)), markdown_report(comparison)):
        assert "absent-seed0: failed with exit code 1: boom" in report and "python t.py --seed 0" in report
        assert "killed-seed0: killed by signal 9 (SIGKILL) (last measured at step 200 of 500; drawn, not counted)" in report
    assert comparison.ratios("killed", 5) == {} and comparison.verdict("killed", 5) == "–"
    assert "Not counted: 2 runs" in " ".join(headline(comparison))
    unfinished = compare({**arms, "killed": [killed]})  # nobody said what happened to it
    assert "killed-seed0: not finished" in markdown_report(unfinished)


def test_report_without_a_finished_baseline(arms, tmp_path):
    comparison = compare({"gone": [tmp_path / "gone-seed0"], **arms}, problems={tmp_path / "gone-seed0": "failed"})
    write_report(comparison, tmp_path)
    assert headline(comparison)[0].startswith("Nothing can be said yet")
    assert any("No run of the baseline, gone" in note for note in comparison.notes)


def test_diverged_runs(tmp_path):
    broken = [*decay(stop=300), (400.0, math.nan), (500.0, math.nan)]
    arms = {
        "baseline": [write_run(tmp_path / f"a{seed}", {5: curve}, seed=seed) for seed, curve in enumerate((decay(), broken))],
        "coupled": [write_run(tmp_path / "b", {5: broken})],
    }
    comparison = compare(arms)
    assert comparison.threshold(5) == decay()[-1][1] and comparison.verdict("coupled", 5) == HARM
    assert any("not finite" in note for note in comparison.notes)
    assert "a1: diverged" in markdown_report(comparison)
    html_report(comparison)


def test_one_number_of_inference_steps_and_no_metrics(tmp_path):
    folder = write_run(tmp_path / "a", {4: decay()}, line={"validation_loss": None})
    (folder / "metrics.jsonl").unlink()
    comparison = compare({"a": [folder]})
    assert "Quality against inference steps" not in html_report(comparison)
    assert "| –" in markdown_report(comparison) and "Held-out" not in markdown_report(comparison)


def test_a_resumed_run_may_have_measured_a_step_twice_and_not_in_order(tmp_path):
    folder = write_run(tmp_path / "a", {5: decay()})
    lines = (folder / "evaluation.jsonl").read_text().splitlines(keepends=True)
    stale = lines[2].replace('"samples": 1500', '"samples": 1')
    (folder / "evaluation.jsonl").write_text("".join([*lines[3:], stale, *lines[:3], '{"step": 600, "tr']))
    run = read_run(folder)
    assert run.curve(5) == decay() and {line["samples"] for line in run.evaluations} == {1500}


def test_extended_runs_are_finished_when_their_new_last_step_is_reached(tmp_path):
    assert read_run(write_run(tmp_path / "a", {5: decay()})).finished
    assert not read_run(write_run(tmp_path / "b", {5: decay()}, max_train_steps=1000)).finished


def test_arms_by_the_flags_that_differ(tmp_path):
    first = [write_run(tmp_path / f"a{seed}", {5: decay()}, seed=seed, logging_steps=5 + seed) for seed in range(2)]
    second = write_run(tmp_path / "b", {5: decay()}, noise_coupling="assignment", loss_weighting="change_aware")
    third = write_run(tmp_path / "c", {5: decay()}, noise_coupling="nearest", coupling_candidates=16, prediction_type="epsilon")
    assert group_runs([*first, second, third]) == {
        "prediction_type=v_prediction": first,
        "prediction_type=v_prediction + assignment + change_aware": [second],
        "nearest + coupling_candidates=16": [third],
    }
    assert group_runs([*first, second]) == {"baseline": first, "assignment + change_aware": [second]}


def test_command_names_every_flag_that_is_not_the_default():
    config = {"bundled_data": "digits", "use_ema": True, "seed": 3, "resolution": 64, "some_new_list": [5, 20], "output_dir": "a b"}
    assert command_of(config) == (
        "python train_unconditional.py --bundled_data digits --use_ema --seed 3 --some_new_list 5 20 --output_dir 'a b'"
    )
    assert "False" not in command_of({"use_ema": False}) and "hf_" not in command_of({"hub_token": "hf_secret"})


@pytest.mark.parametrize(
    "line, message",
    [
        ({"data": "other"}, r"different data \(data abc and other\)"),
        ({"feature": "FD-pixels-8x8"}, "different features"),
        ({"samples": 100}, "different numbers of samples"),
        ({"reference_images": 10}, "different numbers of reference images"),
        ({"weights": "raw"}, "different weights"),
    ],
)
def test_runs_that_cannot_be_compared(arms, tmp_path, line, message):
    other = write_run(tmp_path / "other", {5: decay(), 20: decay()}, line=line)
    with pytest.raises(UserError, match=f"baseline-seed0 and .*other cannot be compared: {message}") as caught:
        compare({**arms, "other": [other]})
    assert caught.value.exit_code == 2


# Runs that are told something


def test_a_report_says_what_samples_were_told(tmp_path):
    prompts = ["a <cat>", "a dog"]
    for name, changes in {"baseline": {}, "coupled": {"noise_coupling": "assignment"}}.items():
        write_run(tmp_path / name, {5: decay()}, text=True, validation_prompts=prompts, **changes)
    arms = {name: [tmp_path / name] for name in ("baseline", "coupled")}
    comparison = compare(arms)
    for report in (words(html_report(comparison)), markdown_report(comparison)):
        assert "1500 samples (the captions of column text, without guidance) against 1797 reference images" in report
        assert "checkpoint sd" in report
    assert words(html_report(comparison)).count("Guidance 7.5; row by row: a <cat>; a dog.") == 1
    write_run(tmp_path / "other", {5: decay()}, text=True, validation_prompts=["a dog"], noise_coupling="nearest", guidance_scale=3)
    page = words(html_report(compare({**arms, "other": [tmp_path / "other"]})))
    assert "other, step 500. Guidance 3; row by row: a dog" in page
    assert "coupled, step 500. Guidance 7.5; row by row: a <cat>; a dog" in page
    classes = words(html_report(compare({"a": [write_run(tmp_path / "classes", {5: decay()}, class_conditional=True)]})))
    assert "(every class equally often)" in classes and "In the order of classes." in classes


def test_grids_of_prompts_are_kept_apart(tmp_path):
    arms = {"baseline": [write_run(tmp_path / "a", {5: decay()}, text=True, validation_prompts=["a", "b"])]}
    grid = Image.new("RGB", (64, 32), "black")
    grid.paste("red", (32, 0, 64, 32))
    grid.save(tmp_path / "a" / "samples" / "step-0000500.png")
    data = re.search(r"data:image/png;base64,([^\"]+)", html_report(compare(arms)))[1]
    shown = Image.open(io.BytesIO(base64.b64decode(data)))
    assert shown.size == (66, 32) and sorted(shown.getcolors()) == [(64, (255, 255, 255)), (1024, (0, 0, 0)), (1024, (255, 0, 0))]


@pytest.mark.parametrize(
    "one, other, wanted",
    [
        ({}, {"class_conditional": True}, "their samples were told nothing and every class equally often"),
        ({"text": True}, {"text": True, "caption_column": "long"}, "the captions of column text, .* and the captions of column long"),
    ],
)
def test_samples_that_were_told_different_things_are_not_compared(tmp_path, one, other, wanted):
    arms = {name: [write_run(tmp_path / name, {5: decay()}, **changes)] for name, changes in (("one", one), ("other", other))}
    with pytest.raises(UserError, match=f"one and .*other cannot be compared: .*{wanted}"):
        compare(arms)


def leave_checkpoint(folder, from_scratch):
    (folder / "checkpoint-500").mkdir()
    state = {"step": 500, "identity": {"network": {"from_scratch": from_scratch}}, "files": {}}
    (folder / "checkpoint-500" / "training_state.json").write_text(json.dumps(state))


@pytest.mark.parametrize("from_scratch, script", [(True, "train_text_to_image.py"), (False, "finetune_sd.py")])
def test_the_command_of_a_text_run_is_of_its_own_script(tmp_path, from_scratch, script):
    folder = write_run(tmp_path / "a", {5: decay()}, text=True, resolution=64)  # the other script's default
    leave_checkpoint(folder, from_scratch)
    [command] = compare({"a": [folder]}).arms["a"].commands
    assert command.startswith(f"python {script} ") and "--pretrained_model_name_or_path sd" in command and "--resolution 64" in command
    assert "--train_batch_size" not in command and "--lr_scheduler" not in command


def test_text_runs_that_differ_in_what_they_show_alone_are_one_arm(tmp_path):
    changes = ({"report_to": "none"}, {"validation_prompts": ["a cat"], "latent_cache_dir": "elsewhere", "guidance_scale": 3.0})
    folders = [write_run(tmp_path / str(seed), {5: decay()}, seed=seed, text=True, **more) for seed, more in enumerate(changes)]
    assert len(group_runs(folders)) == 1
    leave_checkpoint(folders[0], from_scratch=True)
    assert group_runs(folders) == {"script=train_text_to_image.py": folders[:1], "script=finetune_sd.py": folders[1:]}


def test_bad_folders(arms, tmp_path):
    def message(folder):
        with pytest.raises(UserError) as caught:
            compare({**arms, "other": [folder]})
        assert "\n" not in str(caught.value)
        return str(caught.value), caught.value.exit_code

    assert message(tmp_path / "nowhere") == (f"{tmp_path / 'nowhere'}: no such folder", 2)
    (tmp_path / "empty").mkdir()
    assert message(tmp_path / "empty") == (f"{tmp_path / 'empty'}: not a run's folder: it holds no config.yaml", 2)
    unmeasured = write_run(tmp_path / "unmeasured", {5: decay(), 20: decay()})
    (unmeasured / "evaluation.jsonl").unlink()
    assert "evaluation.jsonl is missing or empty" in message(unmeasured)[0] and "--eval_steps" in message(unmeasured)[0]
    another = write_run(tmp_path / "another", {5: decay(), 20: decay()}, noise_coupling="nearest")
    (another / "evaluation.jsonl").write_text("")
    with pytest.raises(
        UserError, match=f"^{unmeasured}, {another}: evaluation.jsonl is missing or empty.* train each of them again"
    ) as caught:
        group_runs([*arms["baseline"], unmeasured, another])  # before any is read
    assert caught.value.exit_code == 1 and f"--config {unmeasured}/config.yaml --output_dir ANOTHER_FOLDER" in str(caught.value)
    (unmeasured / "evaluation.jsonl").write_text('{"step": 100, "frechet_distance": {"5": 1.0}}\n')
    assert "lines without data, feature, reference_images, samples, train_seconds" in message(unmeasured)[0]
    (unmeasured / "evaluation.jsonl").write_text("[1]\n")
    assert "cannot be read" in message(unmeasured)[0] and message(unmeasured)[1] == 1
    for text in ("a: [", "just words", "\x00", "seed: x", "max_train_steps: many"):
        (unmeasured / "config.yaml").write_text(text)
        assert message(unmeasured)[1] == 1
    assert message(tmp_path)[0].startswith(f"{tmp_path}: not a run's folder: it holds no config.yaml, but runs; name them, as ")
    assert "in common" in message(write_run(tmp_path / "seven", {7: decay()}))[0]
    with pytest.raises(UserError, match="end at different steps"):
        compare({"a": [arms["baseline"][0], write_run(tmp_path / "short", {5: decay(stop=400), 20: decay(stop=400)}, seed=9)]})
    with pytest.raises(UserError, match="are both seed 0 of a; give them different names"):
        compare({"a": [arms["baseline"][0], arms["copy"][0]]})
    with pytest.raises(UserError, match="nothing to compare"):
        compare({"a": [tmp_path / "nowhere"]}, problems={tmp_path / "nowhere": "failed"})
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        write_report(compare(arms), tmp_path / "file")


@pytest.mark.parametrize(
    "change",
    [
        {"frechet_distance": None},
        {"frechet_distance": {"a": 1.0}},
        {"frechet_distance": {"5": "x"}},
        {"train_seconds": None},
        {"step": None},
        {"samples": "many"},
    ],
)
def test_damaged_evaluations_are_one_line(tmp_path, change):
    folder = write_run(tmp_path / "a", {5: decay()})
    lines = [json.loads(line) for line in (folder / "evaluation.jsonl").read_text().splitlines()]
    lines[2] |= change
    (folder / "evaluation.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(UserError, match=r"a/evaluation.jsonl: cannot be read \(.+\)$") as caught:
        read_run(folder)
    assert caught.value.exit_code == 1


def test_other_damaged_files_are_one_line(tmp_path):
    folder = write_run(tmp_path / "a", {5: decay()})
    for name in ("metrics.jsonl", "summary.json"):
        before = (folder / name).read_bytes()
        for content in (b"[1]\n", b"\xff\xfe\n"):
            (folder / name).write_bytes(content)
            with pytest.raises(UserError, match=f"a/{name}: cannot be read"):
                read_run(folder)
        (folder / name).write_bytes(before)
    (folder / "samples" / "step-0000500.png").write_bytes(b"half a pict")
    with pytest.raises(UserError, match=r"step-0000500.png: no picture that can be read"):
        write_report(compare({"a": [folder]}), tmp_path / "out")


def test_too_few_samples_warn_with_the_number_needed(tmp_path, caplog):
    few = write_run(tmp_path / "a", {5: decay()}, line={"samples": 64})
    comparison = compare({"a": [few]})
    note = "64 samples are too few for the 64 dimensions of FD-digits: their covariance is singular; at least 65 are needed"
    assert any(note in text for text in comparison.notes) and note in caplog.text
    assert note in html_report(comparison) and note in markdown_report(comparison)
    wide = write_run(tmp_path / "b", {5: decay()}, dimension=2048, line={"feature": "FD-mine"})
    assert [text.split(" are")[0] for text in compare({"b": [wide]}).notes] == ["1500 samples", "1797 reference images"]
    assert compare({"c": [write_run(tmp_path / "c", {5: decay()})]}).notes == []


def test_tables_read_in_a_terminal(arms):
    shown = summary(compare(arms))
    lines = [line for line in shown.splitlines() if line.startswith("|")]
    assert len({len(line) for line in lines[:5]}) == 1
    table = summary_table(compare(arms), 5)
    coupled = dict(zip(table.columns, table.rows[1], strict=True))
    assert coupled["verdict"] == GAIN and coupled["sooner in steps"].startswith("2.00x") and coupled["seeds"] == "3"
    baseline = dict(zip(table.columns, table.rows[0], strict=True))
    assert baseline["sooner in steps"] == "1.00x" and baseline["final FD-digits"] == "0.3369 (0.3032 to 0.3874)"
