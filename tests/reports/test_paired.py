"""Tables of last distances, tested over seeds: values written out, and scipy's paired test beside ours."""

import json
import math
from pathlib import Path

import pytest
from scipy import stats

from immiscible.errors import UserError
from immiscible.evaluation.metrics import METRICS
from immiscible.reports.paired import MEASURES, difference, paired_tables, read_grid

PLAIN = {0: 8.0, 1: 9.0, 2: 10.0}
BETTER = {0: 4.0, 1: 4.4, 2: 5.2}


def kept(folder: Path, arm: str, seed: int, line: dict[str, object], before: str = "") -> None:
    folder.mkdir(exist_ok=True)
    (folder / f"{arm}-seed{seed}.jsonl").write_text(before + json.dumps(line) + "\n")


def grid(folder: Path) -> Path:
    for arm, values in {
        "baseline": PLAIN,
        "better": BETTER,
        "same+b": {seed: value + (-1) ** seed * 0.01 for seed, value in PLAIN.items()},
    }.items():
        for seed, value in values.items():
            line = {"frechet_distance": {"5": value, "20": value / 2}, "frechet_distance_guided": {"1.5": {"5": 2 * value, "20": 7.0}}}
            kept(folder, arm, seed, line, before='{"frechet_distance": {"5": 99}}\n')
    return folder


def test_the_last_line_counts_at_each_scale(tmp_path):
    arms = read_grid(grid(tmp_path / "kept"))
    assert arms["better"] == {
        seed: {(1.0, 5): value, (1.0, 20): value / 2, (1.5, 5): 2 * value, (1.5, 20): 7.0} for seed, value in BETTER.items()
    }
    assert set(arms) == {"baseline", "better", "same+b"}


def test_folders_of_runs_are_read_too(tmp_path):
    run = tmp_path / "arm-seed3"
    run.mkdir()
    (run / "evaluation.jsonl").write_text('{"frechet_distance": {"5": 1.5}}\n')
    assert read_grid(tmp_path) == {"arm": {3: {(1.0, 5): 1.5}}}


def test_the_test_is_scipys_paired_one_of_logarithms():
    arm, other = ({seed: {(1.0, 5): value} for seed, value in values.items()} for values in (BETTER, PLAIN))
    found = difference(arm, other, (1.0, 5))
    expected = stats.ttest_rel([math.log(value) for value in BETTER.values()], [math.log(value) for value in PLAIN.values()])
    assert found.p == pytest.approx(expected.pvalue) and found.seeds == 3
    assert found.change == pytest.approx((4 / 8 * 4.4 / 9 * 5.2 / 10) ** (1 / 3))
    assert found.mark == "▲" and difference(other, arm, (1.0, 5)).mark == "▼"


def test_one_seed_in_common_tests_nothing():
    found = difference({0: {(1.0, 5): 1.0}, 1: {(1.0, 5): 1.0}}, {0: {(1.0, 5): 9.0}, 2: {(1.0, 5): 9.0}}, (1.0, 5))
    assert found.seeds == 1 and math.isnan(found.p) and found.mark == "" and found.change == pytest.approx(1 / 9)
    assert difference({}, {}, (1.0, 5)).seeds == 0


def test_tables(tmp_path):
    told = paired_tables(read_grid(grid(tmp_path / "kept")), "baseline")
    assert "**Guidance 1, none**" in told and "**Guidance 1.5**" in told
    assert "| baseline | 9 | 4.5 |" in told
    assert "| better | 4.4 (0.50x ▲) | 2.2 (0.50x ▲) |" in told
    assert "| same+b | 8.99 (1.00x) | 4.5 (1.00x) |" in told
    # equal values differ by nothing: no test, no mark
    assert "| better | 8.8 (0.50x ▲) | 7 (1.00x) |" in told
    assert "Medians over 3 seeds" in told and "8 comparisons, 3 marked; chance alone would mark some 0." in told


@pytest.mark.parametrize(
    "measure, mark", [("precision", "▼"), ("inception_score", "▼"), ("kid", "▲"), ("within_class_distance", "↓"), ("uniformity", "↓")]
)
def test_a_mark_says_which_way_is_better(measure, mark):
    more = {"▲": "▼", "▼": "▲", "↓": "↑"}[mark]
    low, high = ({seed: {(1.0, 5): value * (1 + 0.1 * seed)} for seed in range(3)} for value in (0.2, 0.6))
    high[1] = {(1.0, 5): 0.7}
    assert difference(low, high, (1.0, 5), measure).mark == mark and difference(high, low, (1.0, 5), measure).mark == more


def test_values_that_may_be_below_0_are_compared_by_their_differences(tmp_path):
    values = {"baseline": (-0.2, 0.1, 0.0), "better": (-0.41, -0.1, -0.22), "same": (-0.2, 0.1, 0.0)}
    for arm, of_seeds in values.items():
        for seed, value in enumerate(of_seeds):
            metrics = {"kid": {"5": value}, "kid_guided": {"1.5": {"5": value}}, "precision": {"5": 0.5}}
            kept(tmp_path / "kept", arm, seed, {"frechet_distance": {"5": 9.0}, "metrics": metrics})
    arms = read_grid(tmp_path / "kept", "kid")
    assert arms["better"][1] == {(1.0, 5): -0.1, (1.5, 5): -0.1}
    found = difference(arms["better"], arms["baseline"], (1.5, 5), "kid")
    assert found.change == pytest.approx(-0.21) and found.p == pytest.approx(stats.ttest_rel(values["better"], values["baseline"]).pvalue)
    told = paired_tables(arms, "baseline", "kid")
    assert "| better | -0.22 (-0.21 ▲) |" in told and "| same | 0 (+0) |" in told
    assert "in brackets the mean difference from baseline, ▲ less and ▼ more where a paired t-test of the\nvalues gives p < 0.05" in told
    precision = paired_tables(read_grid(tmp_path / "kept", "precision"), "baseline", "precision")
    assert "▲ more and ▼ less" in precision and "| better | 0.5 (+0) |" in precision
    assert "Neither less nor more of it is better by itself." in paired_tables(arms, "baseline", "uniformity")
    with pytest.raises(UserError, match=r"baseline-seed0\.jsonl: its last line holds no recall"):
        read_grid(tmp_path / "kept", "recall")


def test_every_metric_can_be_told_and_which_way_is_better_fits_its_best_value():
    assert MEASURES.keys() == METRICS.keys() | {"frechet_distance_held_out"}
    assert all(MEASURES[name].better == "less" for name, metric in METRICS.items() if metric.best == "0")


def test_what_cannot_be_read_is_named(tmp_path):
    with pytest.raises(UserError, match="holds no evaluations of runs called ARM-seedN"):
        read_grid(tmp_path)
    kept(tmp_path, "arm", 0, {"loss": 1.0})
    with pytest.raises(UserError, match=r"arm-seed0\.jsonl: its last line holds no frechet_distance"):
        read_grid(tmp_path)
    with pytest.raises(UserError, match="--baseline plain is not one of the arms: arm"):
        paired_tables({"arm": {0: {(1.0, 5): 1.0}}}, "plain")
