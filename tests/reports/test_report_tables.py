import json

import pytest
from compared import INF, decay, exactly, words, write_run

from immiscible.errors import UserError
from immiscible.reports.comparison import compare
from immiscible.reports.page import html_report, markdown_report, summary
from immiscible.reports.ratios import GAIN, HARM, NOTHING, Interval
from immiscible.reports.sentences import headline
from immiscible.reports.tables import cost_table, held_out_table, metric_table, seed_table, spread, summary_table


def test_every_baseline_reaches_its_goal(arms):
    for seed in range(3):
        assert compare(arms).times("baseline", 5)[seed].high <= 500
    table = summary_table(compare(arms), 5)
    baseline = dict(zip(table.columns, table.rows[0], strict=True))
    assert baseline["steps to it"] == "498" and "of 0.343, its mean over seeds" in table.caption


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
        ([exactly(1.331), exactly(1.333), exactly(1.334)], "1.33x"),
    ],
)
def test_what_is_known_of_a_spread(values, shown):
    assert spread(dict(enumerate(values)), 2, "x") == shown


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


def test_no_drift_is_shown_without_a_sign_of_its_own(tmp_path):
    table = cost_table(compare({"a": [write_run(tmp_path / "a", {5: decay()}, metric={"noise_norm_drift": -4e-8})]}))
    shown = dict(zip(table.columns, table.rows[0], strict=True))
    assert shown["noise norm drift"] == "+0.0000" and shown["noise variance drift"] == "+0.0100"


def test_tables_read_in_a_terminal(arms):
    shown = summary(compare(arms))
    lines = [line for line in shown.splitlines() if line.startswith("|")]
    assert len({len(line) for line in lines[:5]}) == 1
    table = summary_table(compare(arms), 5)
    coupled = dict(zip(table.columns, table.rows[1], strict=True))
    assert coupled["verdict"] == GAIN and coupled["sooner in steps"].startswith("2.00x") and coupled["seeds"] == "3"
    baseline = dict(zip(table.columns, table.rows[0], strict=True))
    assert baseline["sooner in steps"] == "1.00x" and baseline["final FD-digits"] == "0.3369 (0.3032 to 0.3874)"


def test_what_is_measured_against_images_held_out(arms, tmp_path):
    assert held_out_table(compare(arms)) is None
    for number, folder in enumerate(folder for folders in (arms["baseline"], arms["coupled"]) for folder in folders):
        lines = [json.loads(line) for line in (folder / "evaluation.jsonl").open()]
        for line in lines:
            distances = {steps: 2 * value for steps, value in line["frechet_distance"].items()}
            ratios = {"5": 0.9 + number / 100, "20": None}
            line |= {"held_out": "others", "frechet_distance_held_out": distances, "nearest_neighbor_ratio": ratios}
        (folder / "evaluation.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    table = held_out_table(compare(arms))
    rows = [dict(zip(table.columns, row, strict=True)) for row in table.rows]
    assert [(row["arm"], row["inference steps"]) for row in rows] == [(arm, steps) for arm in arms for steps in ("5", "20")]
    first = rows[0]
    assert first["nearest-neighbor ratio"] == "0.91" and rows[2]["nearest-neighbor ratio"] == "0.94"  # medians over seeds at the last step
    assert float(first["from images held out"]) == pytest.approx(2 * float(first["from images trained on"]), rel=1e-3)
    assert rows[1]["nearest-neighbor ratio"] == "nan"  # not finite where it was measured
    assert all(rows[-1][name] == NOTHING for name in ("from images held out", "nearest-neighbor ratio"))  # not measured
    for report in (words(html_report(compare(arms))), markdown_report(compare(arms))):
        assert "Whether samples are copies" in report and "0.94" in report


def test_other_metrics_of_the_last_samples(tmp_path):
    def line(number):
        metrics = {"kid": {"5": 0.1 * number, "20": None}, "kid_guided": {"2": {"5": 7.0}}, "of_later": {"5": 3.0}}
        return {"metrics": {**metrics, "alignment": {"5": 0.2}}, "metrics_real": {"alignment": 0.125}}

    guided = {2: {5: decay(), 20: decay()}}
    curves = {5: decay(), 20: decay()}
    arms = {"a": [write_run(tmp_path / f"a{n}", curves, guided=guided, seed=n, line=line(n)) for n in (1, 2, 4)]}
    arms["plain"] = [write_run(tmp_path / "plain", curves, guided=guided)]
    table = metric_table(compare(arms), 5)
    assert table.columns == ["arm", "kid (best 0)", "of_later", "alignment (real images 0.125)"]
    assert table.rows == [["a", "0.2", "3", "0.2"], ["plain", NOTHING, NOTHING, NOTHING]]
    assert metric_table(compare(arms), 20).rows[0] == ["a", "nan"]  # not finite where it was measured
    assert metric_table(compare(arms, guidance_scale=2), 5).rows == [["a", "7"], ["plain", NOTHING]]
    assert metric_table(compare({"plain": arms["plain"]}), 5) is None
    for report in (words(html_report(compare(arms))), markdown_report(compare(arms))):
        assert "Other metrics" in report and "kid (best 0)" in report and "real images 0.125" in report


def test_runs_measured_against_different_images_are_not_compared(tmp_path):
    arms = {name: [write_run(tmp_path / name, {5: decay()}, line={"held_out": name})] for name in ("one", "other")}
    with pytest.raises(UserError, match=r"one and .*other cannot be compared: different held-out images \(one and other\)"):
        compare(arms)
