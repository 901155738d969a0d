import pytest
from compared import decay, leave_checkpoint, words, write_run

from immiscible.reports.comparison import compare
from immiscible.reports.page import html_report, markdown_report
from immiscible.reports.tables import arm_table, summary_table


def pair(tmp_path, processes=(None, None), **flags):
    """A baseline of batches of 16 and an arm of other flags or processes, two seeds each."""
    arms = {"baseline": [], "other": []}
    for (name, folders), number, changes in zip(arms.items(), processes, ({}, flags), strict=True):
        for seed in range(2):
            folders.append(write_run(tmp_path / f"{name}-seed{seed}", {5: decay()}, seed=seed, **{"train_batch_size": 16, **changes}))
            if number:
                leave_checkpoint(folders[-1], processes=number)
    return arms


@pytest.mark.parametrize(
    "processes, flags",
    [
        ((1, 1), {"train_batch_size": 64}),
        ((2, 2), {"train_batch_size": 8, "gradient_accumulation_steps": 8}),
        ((1, 4), {}),
    ],
)
def test_images_stand_beside_steps_where_a_step_is_of_more_images_in_one_arm(tmp_path, processes, flags):
    comparison = compare(pair(tmp_path, processes, **flags))
    one, other = 16 * processes[0], 64 * processes[0]
    note = f"Steps of the arms are of {one} (baseline), {other} (other) images, so equal steps are not equal training"
    summary, arms = summary_table(comparison, 5), arm_table(comparison)
    shown = [dict(zip(summary.columns, row, strict=True)) for row in summary.rows]
    assert [(row["steps to it"], row["images to it"]) for row in shown] == [("500", str(500 * one)), ("500", str(500 * other))]
    assert [row[arms.columns.index("images a step")] for row in arms.rows] == [str(one), str(other)]
    for report in (words(html_report(comparison)), markdown_report(comparison)):
        assert note in report and "images to it" in report and "images a step" in report
        assert "as of one process" not in report


@pytest.mark.parametrize(
    "processes, flags", [((None, None), {}), ((2, 1), {"train_batch_size": 32}), ((2, 1), {"gradient_accumulation_steps": 2})]
)
def test_nothing_is_said_of_images_where_all_steps_are_of_equally_many(tmp_path, processes, flags):
    comparison = compare(pair(tmp_path, processes, **flags))
    assert comparison.notes == []
    for report in (words(html_report(comparison)), markdown_report(comparison)):
        assert "images to it" not in report and "images a step" not in report


def test_a_run_without_checkpoints_is_said_to_be_counted_as_one_process(tmp_path):
    notes = compare(pair(tmp_path, (2, None))).notes
    assert notes[0].startswith("Steps of the arms are of 32 (baseline), 16 (other) images")
    assert notes[1].startswith("Images are counted as of one process for other-seed0, other-seed1, of which no checkpoint is left")


def test_runs_of_one_arm_may_be_unlike(tmp_path):
    arms = pair(tmp_path, (1, 1))
    leave_checkpoint(arms["other"][1], processes=4)
    comparison = compare(arms)
    assert "16 (baseline), 16 and 64 (other) images" in comparison.notes[0]
    row = dict(zip(summary_table(comparison, 5).columns, summary_table(comparison, 5).rows[1], strict=True))
    assert row["images to it"] == str(500 * (16 + 64) // 2) and arm_table(comparison).rows[1][1] == "16, 64"


def test_a_broken_checkpoint_gives_way_to_an_older_one(tmp_path):
    arms = pair(tmp_path, (1, 4))
    broken = arms["other"][0] / "checkpoint-600"
    broken.mkdir()
    (broken / "training_state.json").write_text('{"step": 600, "identity": ')
    assert compare(arms).arms["other"].images_a_step == [64]
