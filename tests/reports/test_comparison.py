import math
import random

import pytest
from compared import INF, decay, exactly, near, write_run
from launch import tiny

from immiscible.errors import UserError
from immiscible.reports.clock import CPU, WALL, clock
from immiscible.reports.comparison import compare
from immiscible.reports.overview import look_over, loss_curves, totals_table
from immiscible.reports.page import html_report, markdown_report, write_report
from immiscible.reports.ratios import GAIN, HARM, NO_EFFECT, NOTHING, Interval
from immiscible.reports.sentences import headline
from immiscible.reports.tables import guidance_table


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
        "(medians of 3 seeds)."
    )
    assert sentences[1] == "Harm, slower than baseline with every seed: coupled at 20 inference steps."
    assert "No clear effect: copy at 5 and 20 inference steps." in sentences


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


@pytest.mark.slow
def test_two_arms_of_one_method_have_the_same_curves(script, tmp_path):
    changes = {"eval_steps": 1, "eval_samples": 70, "eval_inference_steps": [1], "eval_features": "pixels", "noise_coupling": "assignment"}
    arms = {name: [tmp_path / f"{name}-seed0"] for name in ("one", "other")}
    for (folder,) in arms.values():
        assert script(tiny(folder, **changes, max_train_steps=2)).code == 0
    comparison = compare(arms)
    assert comparison.ratios("other", 1) == {0: exactly(1.0)} and comparison.verdict("other", 1) == NO_EFFECT
    assert {run.processes for run in comparison.runs} == {1}  # a true run's checkpoint says so
    assert comparison.clock is WALL and clock(comparison.runs * 2) is CPU  # one after the other, and as if side by side
    for run in comparison.runs:
        assert run.evaluations[-1]["train_cpu_seconds"] == pytest.approx(sum(run.logged("step_cpu_seconds")), rel=1e-6)
    one, other = (comparison.arms[name].runs[0].curve(1) for name in arms)
    assert one == other and [step for step, _ in one] == [1, 2] and all(math.isfinite(value) for _, value in one)
    for run in comparison.runs:
        (run.folder / "evaluation.jsonl").unlink()
    report = look_over(arms)  # of what true runs leave
    assert report.notes == [] and {name: len(curves[0]) for name, curves in loss_curves(report).items()} == {"one": 2, "other": 2}
    batch = comparison.runs[0].config["train_batch_size"]
    assert all(row[1:4] == ["1", "2", str(2 * batch)] and NOTHING not in row for row in totals_table(report).rows)


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


def guided_arms(tmp_path, **changes):
    """Two arms of two seeds: the other is twice as fast without guidance, and half as fast with it."""
    arms = {"baseline": [], "other": []}
    for name, speed in (("baseline", 1.0), ("other", 2.0)):
        for seed in range(2):
            guided = {1.5: {5: decay(speed=1 / speed)}, 3.0: {5: decay(scale=2)}}
            more = {"class_conditional": True, "class_dropout_prob": 0.1, **changes}
            arms[name].append(write_run(tmp_path / f"{name}-{seed}", {5: decay(speed=speed)}, guided=guided, seed=seed, **more))
    return arms


def test_a_comparison_is_of_one_guidance_scale_and_shows_them_all(tmp_path):
    arms = guided_arms(tmp_path)
    assert compare(arms).verdict("other", 5) == GAIN and compare(arms, guidance_scale=1.5).verdict("other", 5) == HARM
    assert compare(arms, guidance_scale=3).verdict("other", 5) == NO_EFFECT
    comparison = compare(arms, guidance_scale=1.5)
    for page in (html_report(comparison), markdown_report(comparison)):
        assert "other against baseline at guidance scale 1.5" in page and "(every class equally often, guidance 1.5)" in page
        assert "Quality against guidance" in page and "w 3, 5 steps" in page
    table = guidance_table(comparison)
    assert table.columns == ["arm", "w 1, 5 steps", "w 1.5, 5 steps", "w 3, 5 steps"]
    last = 50 * math.exp(-5)
    assert [float(cell) for cell in table.rows[1][1:]] == pytest.approx([50 * math.exp(-10), 50 * math.exp(-2.5), 2 * last], rel=0.05)
    assert guidance_table(compare({"a": [write_run(tmp_path / "a", {5: decay()})]})) is None


def test_a_scale_that_was_not_measured_names_those_that_were(tmp_path):
    arms = guided_arms(tmp_path)
    with pytest.raises(UserError, match=r"baseline-0 was not measured at guidance scale 2; --guidance_scale takes one that was: 1, 1.5, 3"):
        compare(arms, guidance_scale=2)
    guided_alone = write_run(tmp_path / "alone", {}, guided={3.0: {5: decay()}}, steps=decay(), class_conditional=True)
    with pytest.raises(UserError, match=r"alone was not measured at guidance scale 1; .*: 3$"):
        compare({"a": [guided_alone]})
    assert compare({"a": [guided_alone]}, guidance_scale=3).inference_steps == [5]


def test_samples_guided_at_other_noise_levels_are_not_compared(tmp_path):
    arms = guided_arms(tmp_path) | {"late": guided_arms(tmp_path / "late", guidance_interval=[0.0, 0.5])["other"]}
    assert compare(arms).inference_steps == [5]
    with pytest.raises(
        UserError, match="told every class equally often, guidance 3 and every class equally often, guidance 3 at noise levels"
    ):
        compare(arms, guidance_scale=3)


def test_too_few_samples_warn_with_the_number_needed(tmp_path, caplog):
    few = write_run(tmp_path / "a", {5: decay()}, line={"samples": 64})
    comparison = compare({"a": [few]})
    note = "64 samples are too few for the 64 dimensions of FD-digits: their covariance is singular; at least 65 are needed"
    assert any(note in text for text in comparison.notes) and note in caplog.text
    assert note in html_report(comparison) and note in markdown_report(comparison)
    wide = write_run(tmp_path / "b", {5: decay()}, dimension=2048, line={"feature": "FD-mine"})
    assert [text.split(" are")[0] for text in compare({"b": [wide]}).notes] == ["1500 samples", "1797 reference images"]
    assert compare({"c": [write_run(tmp_path / "c", {5: decay()})]}).notes == []
