"""Whose seconds a report shows: wall time of runs that were alone, else CPU time, else none."""

import json

import pytest
from compared import clocked, decay, words, write_run

from immiscible.reports import overview
from immiscible.reports.clock import CPU, OLD, OVERLAPPED, SECONDS_RULE, WALL, clock
from immiscible.reports.comparison import compare
from immiscible.reports.page import html_report, markdown_report, summary
from immiscible.reports.runs import read_run
from immiscible.reports.sentences import headline
from immiscible.reports.tables import cost_table, seed_table, summary_table

# The baseline takes 50 ms a step and 40 of them on a core, the other 100 and 20; it gets to the goal in half as many steps.
BASELINE, OTHER = {"seconds_per_step": 0.05, "cpu_seconds_per_step": 0.04}, {"seconds_per_step": 0.1, "cpu_seconds_per_step": 0.02}
ALONE, BESIDE, SOON = (1000.0, 2000.0), (1999.0, 3000.0), (2000.0, 3000.0)  # BESIDE overlaps ALONE, SOON only touches it
NO_CPU = {"cpu_seconds_per_step": None}  # as on a GPU


def two_arms(folder, baseline, other):
    return {
        "baseline": [write_run(folder / "baseline", {5: decay()}, **BASELINE | baseline)],
        "other": [write_run(folder / "other", {5: decay(speed=2)}, **OTHER | other)],
    }


def row(table, number=1):
    return dict(zip(table.columns, table.rows[number], strict=True))


@pytest.mark.parametrize(
    "baseline, other, wanted, columns, gain",
    [
        ({"session": ALONE}, {"session": SOON}, WALL, ["1.00x", "25.00", "50.00", "100.0", "+100.0 %"], " (1.00 in seconds)"),
        ({"session": ALONE}, {"session": BESIDE}, CPU, ["4.00x", "5.00", "10.00", "20.0", "-50.0 %"], " (4.00 in CPU seconds)"),
        ({"session": None} | NO_CPU, {"session": SOON}, OLD, ["–", "–", "–", "–", "–"], ""),
        (
            {"session": ALONE} | NO_CPU,
            {"session": SOON} | NO_CPU,
            WALL,
            ["1.00x", "25.00", "50.00", "100.0", "+100.0 %"],
            " (1.00 in seconds)",
        ),
        ({"session": ALONE} | NO_CPU, {"session": BESIDE} | NO_CPU, OVERLAPPED, ["–", "–", "–", "–", "–"], ""),
        ({"session": ALONE}, {"session": BESIDE} | NO_CPU, OVERLAPPED, ["–", "–", "–", "–", "–"], ""),
    ],
    ids=["alone", "overlapped", "old", "alone on a GPU", "overlapped on a GPU", "on a GPU and on a CPU"],
)
def test_seconds_are_those_that_can_be_compared(tmp_path, baseline, other, wanted, columns, gain):
    comparison = compare(two_arms(tmp_path, baseline, other))
    assert comparison.clock is wanted
    unit = {"": "seconds", "CPU ": "CPU seconds"}[wanted.prefix]
    reached, seed, cost = row(summary_table(comparison, 5)), row(seed_table(comparison, 5)), row(cost_table(comparison))
    assert reached["sooner in steps"] == "2.00x"
    shown = [reached[f"sooner in {unit}"], reached[f"{unit} to it"], seed[f"{unit} trained"]]
    assert [*shown, cost[f"{wanted.prefix}ms per step"], cost["against baseline"]] == columns
    assert [seed[f"{unit} to goal"], seed[f"sooner in {unit}, x"]] == [
        shown[1],
        shown[0].replace("1.00x", "1.000").replace("4.00x", "4.000"),
    ]
    assert cost.get("of it coupling, ms") == ("5.00" if wanted is WALL else None)
    assert f"other reached baseline's final FD-digits 2.00 times sooner in training steps{gain} at 5" in headline(comparison)[0]
    for text in (words(html_report(comparison)), markdown_report(comparison).replace("\\", ""), summary(comparison)):
        assert text.count(wanted.why) == 1
    assert SECONDS_RULE in markdown_report(comparison)


def test_reports_of_unmeasured_runs_have_the_same_rule(tmp_path):
    def totals(name, **sessions):
        arms = two_arms(tmp_path / name, *({"session": session} for session in sessions.values()))
        for (folder,) in arms.values():
            (folder / "evaluation.jsonl").unlink()
        report = overview.look_over(arms)
        for text in (words(overview.html_report(report)), overview.summary(report)):
            assert text.count(report.clock.why) == 1
        return row(overview.totals_table(report))

    apart, beside, old = totals("apart", a=ALONE, b=SOON), totals("beside", a=ALONE, b=BESIDE), totals("old", a=None, b=SOON)
    assert (apart["seconds trained"], apart["ms per step"]) == ("2.00", "100.0")  # the logs end at step 20
    assert (beside["CPU seconds trained"], beside["CPU ms per step"]) == ("0.400", "20.0")
    assert (old["seconds trained"], old["ms per step"]) == ("–", "–")


def test_a_run_is_under_way_from_session_to_session_and_until_its_summary(tmp_path):
    def run(name, *lines, ended=None):
        folder = write_run(tmp_path / name, {5: decay()})
        text = "".join(json.dumps({"step": step, "loss": 0.1, **line}) + "\n" for step, line in enumerate(lines))
        (folder / "metrics.jsonl").write_text(text)
        (folder / "summary.json").write_text(json.dumps({"step": 500} | ({"ended": ended} if ended else {})))
        return read_run(folder)

    def lines(*sessions):
        return [line for session in sessions for line in clocked((10, 20), session=session)]

    paused = run("paused", *lines((1000, 2000), (4000, 5000)), ended=5100)
    assert clock([paused]) is WALL
    assert clock([run("between", *lines((2000, 3000)), ended=4000), paused]) is WALL
    assert clock([paused, run("within", *lines((1100, 1200)))]) is OVERLAPPED  # neither logged CPU time
    assert clock([run("after", *lines((5100, 6000))), paused]) is WALL
    assert clock([run("during the last samples", *lines((5050, 6000))), paused]) is OVERLAPPED
    assert clock([run("samples", *lines((2000, 3000)), ended=4500), paused]) is OVERLAPPED
    assert clock([run("silent"), paused]) is WALL
    assert clock([run("resumed an old one", {}, *lines((9000, 9500))), paused]) is OLD
    assert clock([run("edited", {"began": "x", "ended": 3})]) is OLD


def test_cpu_time_counts_where_every_line_has_it(tmp_path):
    arms = two_arms(tmp_path, {"session": ALONE}, {"session": BESIDE})
    assert compare(arms).clock is CPU
    path = arms["other"][0] / "evaluation.jsonl"
    text = path.read_text()
    for damaged in ("null", '"x"', "NaN"):
        path.write_text(text.replace('"train_cpu_seconds": 2.0', f'"train_cpu_seconds": {damaged}', 1))
        assert compare(arms).clock is OVERLAPPED
