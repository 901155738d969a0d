import math
import re

import pytest
from compared import decay, write_run

from immiscible.reports.comparison import compare
from immiscible.reports.figures import looks
from immiscible.reports.page import html_report


@pytest.mark.slow
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


def test_long_names_do_not_push_the_label_of_an_axis_out_of_the_figure(tmp_path):
    arms = {name: [write_run(tmp_path / name, {5: decay()})] for name in ("baseline", "window_speed_sampling")}
    page = html_report(compare(arms))
    figure = next(figure for figure in re.findall(r"<svg.*?</svg>", page, re.S) if "times sooner" in figure)
    label = re.search(r'text-anchor: end[^>]* x="([\d.]+)"[^>]*>times sooner', figure)
    assert label and float(label[1]) <= float(re.search(r'viewBox="0 0 ([\d.]+)', figure)[1])


@pytest.mark.parametrize(
    "value", [math.nan, *(pytest.param(value, marks=pytest.mark.slow) for value in (math.inf, -math.inf, 1e308, -1e308, -1.0, 0.0))]
)
def test_one_diverged_run_does_not_cost_the_report(tmp_path, value):
    """Wherever in a curve the value is, and whichever arm's curve it is."""
    good = {5: decay()}
    for name, where in (("all", range(5)), ("last", [4]), ("middle", [2]), ("first", [0])):
        bad = {5: [(step, value if number in where else distance) for number, (step, distance) in enumerate(decay())]}
        for baseline, other in ((bad, good), (good, bad), (bad, bad)):
            folder = tmp_path / f"{name}-{baseline is bad}-{other is bad}"
            arms = {
                "baseline": [write_run(folder / "a", baseline), write_run(folder / "b", good, seed=1)],
                "other": [write_run(folder / "c", other)],
            }
            page = html_report(compare(arms))
            assert page.count("<svg") >= 2 and "nan" not in "".join(re.findall(r' d="[^"]*"', page)).lower()
            if not abs(value) < 1e30:
                assert "Some distances are not finite" in page
    assert "<svg" in html_report(compare({"only": [write_run(tmp_path / "only", {5: [(100.0, value)]})]}))
