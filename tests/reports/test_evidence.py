import itertools
import math
import random

import numpy
import pytest
from compared import decay, words, write_run
from scipy import stats

from immiscible.reports.comparison import compare
from immiscible.reports.evidence import bootstrap_interval, evidence_table
from immiscible.reports.page import html_report, markdown_report


def rows(arms, steps=5):
    table = evidence_table(compare(arms), steps)
    return {row[0]: dict(zip(table.columns, row, strict=True)) for row in table.rows}


@pytest.mark.parametrize("values", [[0.3], [0.1, 0.4], [-0.2, 0.1, 0.5], [0.0, 0.0, 1.0, 2.0]])
def test_the_interval_of_few_values_is_over_all_their_resamples(values):
    means = sorted(sum(chosen) / len(values) for chosen in itertools.product(values, repeat=len(values)))
    low, high = bootstrap_interval(values)
    assert low == pytest.approx(means[math.ceil(0.025 * len(means)) - 1]) and high == pytest.approx(
        means[math.ceil(0.975 * len(means)) - 1]
    )


def test_the_interval_of_many_values_is_the_normal_one_and_always_the_same():
    values = numpy.random.default_rng(1).normal(3, 2, 400).tolist()
    low, high = bootstrap_interval(values)
    error = 1.96 * numpy.std(values) / 20
    assert low == pytest.approx(numpy.mean(values) - error, abs=0.03) and high == pytest.approx(numpy.mean(values) + error, abs=0.03)
    assert bootstrap_interval(values) == (low, high)


def test_final_distances_are_tested_seed_by_seed(tmp_path):
    generator, arms = random.Random(3), {"baseline": [], "other": []}
    scales = {name: [generator.uniform(0.5, 2) for _ in range(4)] for name in arms}
    for name, of_seeds in scales.items():
        for seed, scale in enumerate(of_seeds):
            arms[name].append(write_run(tmp_path / f"{name}{seed}", {5: decay(scale=scale)}, seed=seed))
    row = rows(arms)["other"]
    logs = [math.log(b / a) for a, b in zip(*scales.values(), strict=True)]
    assert row["final over baseline's"] == f"{math.exp(sum(logs) / 4):.3g}x"
    assert float(row["p"]) == pytest.approx(stats.ttest_rel(numpy.log(scales["other"]), numpy.log(scales["baseline"])).pvalue, rel=0.05)
    low, high = map(math.exp, bootstrap_interval(logs))
    assert row["95 % interval"] == f"{low:.3g} to {high:.3g}"


def test_the_baseline_and_a_copy_of_it_say_nothing(arms):
    found = rows(arms)
    assert set(list(found["baseline"].values())[1:5]) == {"–"}
    assert (
        found["copy"]["final over baseline's"] == "1x"
        and found["copy"]["p"] == "–"
        and found["copy"]["highest ratio of steps"].startswith("1.00x")
    )
    assert {row["images seen"] for row in found.values()} == {"8,000"}


def test_a_diverged_run_has_no_ratio(tmp_path):
    ends = [(step, value) for step, value in decay()[:-1]] + [(500.0, math.inf)]
    arms = {"baseline": [write_run(tmp_path / "a", {5: decay()})], "other": [write_run(tmp_path / "b", {5: ends})]}
    assert rows(arms)["other"]["final over baseline's"] == "–"


def test_both_pages_show_it(arms):
    comparison = compare(arms)
    assert "95 % interval" in markdown_report(comparison) and "95 % interval" in words(html_report(comparison))
