import json
import re

import pytest
from compared import clocked, decay, leave_checkpoint, words, write_run

from immiscible.errors import UserError
from immiscible.reports.comparison import compare
from immiscible.reports.overview import MOST_POINTS, html_report, look_over, loss_curves, markdown_report, totals_table, write_report
from immiscible.reports.runs import all_measured, group_runs, read_run


def unmeasured(folder, *, losses=(0.5, 0.25), every=250, seconds_per_step=0.05, processes=1, **flags):
    """A run that was trained without --eval_steps, with a line of its log every so many steps."""
    write_run(folder, {5: decay()}, **flags)
    (folder / "evaluation.jsonl").unlink()
    steps = [every * (number + 1) for number in range(len(losses))]
    lines = [
        {"step": step, "loss": loss, "step_seconds": seconds_per_step, "train_seconds": step * seconds_per_step, **times}
        for step, loss, times in zip(steps, losses, clocked(steps), strict=True)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    leave_checkpoint(folder, processes=processes)
    return folder


@pytest.fixture
def folders(tmp_path):
    """A baseline of three seeds, and an arm of another coupling that took twice as long."""
    made = {"baseline": [], "coupled": []}
    for seed, last in enumerate((0.25, 0.2, 0.3)):
        made["baseline"].append(unmeasured(tmp_path / f"baseline-seed{seed}", losses=(0.5, last), seed=seed))
        made["coupled"].append(
            unmeasured(tmp_path / f"coupled-seed{seed}", losses=(0.4, 0.1), seed=seed, seconds_per_step=0.1, noise_coupling="assignment")
        )
    return made


def test_runs_that_were_not_measured_are_shown_by_what_they_left(folders, tmp_path):
    path = write_report(look_over(folders), tmp_path / "out")
    page, text = path.read_text(), (tmp_path / "out" / "report.md").read_text()
    for report in (words(page), text.replace("\\_", "_")):
        assert "baseline, coupled: losses, times and samples" in report
        assert "nothing here says which arm is better" in report
        assert f"--config {folders['baseline'][0]}/config.yaml --output_dir ANOTHER_FOLDER --eval_steps N" in report
        assert "not comparable: an assigned noise makes the loss lower without the samples being better" in report
        assert "noise_coupling" in report and report.count("--noise_coupling assignment") == 3 and "seeds 0, 1, 2" in report
        assert "images a step" not in report and "not finished" not in report
    table = totals_table(look_over(folders))
    assert dict(zip(table.columns, table.rows[0], strict=True)) == {
        "arm": "baseline",
        "seeds": "3",
        "steps trained": "500",
        "images seen": "8000",
        "seconds trained": "25.0",
        "ms per step": "50.0",
        "last loss": "0.250 (0.200 to 0.300)",
    }
    assert table.rows[1][-3:] == ["50.0", "100.0", "0.100"]
    assert page.count("<svg") == 1 and page.count("data:image/png") == 4  # losses; rows and whole grids of two arms
    assert re.search(r"\| arm +\| 250 +\| 500 +\|", text) and re.search(r"\| baseline \| 0.5 +\| 0.25 +\|", text)
    assert "http" not in page and "<script" not in page and "<link" not in page and "<title>baseline, coupled: losses" in page


def test_images_seen_are_those_of_all_processes(tmp_path):
    arms = {
        "one": [unmeasured(tmp_path / "a", train_batch_size=8)],
        "four": [unmeasured(tmp_path / "b", train_batch_size=8, processes=4)],
    }
    report = look_over(arms)
    assert [row[2:4] for row in totals_table(report).rows] == [["500", "4000"], ["500", "16000"]]
    assert any("Steps of the arms are of 8 (one), 32 (four) images" in note for note in report.notes)
    assert "images a step" in html_report(report) and "images a step" in markdown_report(report)


def test_runs_that_are_not_finished_count_and_are_named(folders, tmp_path):
    short = unmeasured(tmp_path / "short", losses=(0.5,), seed=3, finished=False)
    silent = unmeasured(tmp_path / "silent", losses=(), seed=4, finished=False)
    report = look_over({**folders, "baseline": [*folders["baseline"], short, silent]})
    assert report.notes == [
        "short is not finished: its log ends at step 250 of 500.",
        "silent is not finished: its log ends before its first line.",
    ]
    assert totals_table(report).rows[0][1:3] == ["5", "500 (250 to 500)"]
    assert [len(curve) for curve in loss_curves(report)["baseline"]] == [2, 2, 2, 1]
    for text in (words(html_report(report)), markdown_report(report)):
        assert all(note in text for note in report.notes)


def test_runs_without_any_log_leave_samples_and_commands(tmp_path):
    folder = unmeasured(tmp_path / "a", losses=())
    (folder / "metrics.jsonl").unlink()
    report = look_over({"a": [folder]})
    assert totals_table(report).rows == [["a", "1", "–", "–", "–", "–", "–"]]
    page = html_report(report)
    assert "<svg" not in page and "data:image/png" in page and "--bundled_data digits" in words(page)
    assert markdown_report(report)


def test_long_logs_are_drawn_in_few_points(tmp_path):
    losses = [1 / (1 + number) for number in range(1001)]
    report = look_over({"a": [unmeasured(tmp_path / "a", losses=losses, every=10, max_train_steps=10010)]})
    [[*curve]] = loss_curves(report)["a"]
    assert len(curve) <= MOST_POINTS and curve[-1][0] == 10010.0
    assert curve[0] == (60.0, pytest.approx(sum(losses[:6]) / 6)) and curve[-1][1] == pytest.approx(sum(losses[996:]) / 5)
    points = re.findall(r'<path d="([^"]*)"[^>]*clip-path', html_report(report))
    assert max(path.count("L") for path in points) <= MOST_POINTS


def test_many_arms_are_drawn_by_their_medians(tmp_path):
    arms = {f"arm{number}": [unmeasured(tmp_path / str(number))] for number in range(5)}
    page = html_report(look_over(arms))
    assert "5 arms: losses" in page and "Medians over seeds." in page and "Thin" not in page


def test_names_are_escaped(tmp_path):
    report = look_over({"<b>&": [unmeasured(tmp_path / "a")], "x|y": [unmeasured(tmp_path / "b")]})
    assert "<b>&" not in html_report(report) and "&lt;b&gt;&amp;" in html_report(report)
    assert "x\\|y" in markdown_report(report) and not re.search(r"(?<!\\)<b>", markdown_report(report))


def test_what_was_measured_and_what_was_not(folders, tmp_path):
    measured = write_run(tmp_path / "measured", {5: decay()})
    every = [folder for of_arm in folders.values() for folder in of_arm]
    assert all_measured([measured]) and not all_measured(every)
    assert read_run(every[0]).evaluations == [] and group_runs(every) == {"baseline": folders["baseline"], "assignment": folders["coupled"]}
    for check in (all_measured, group_runs):
        with pytest.raises(UserError, match=f"^{every[0]}: evaluation.jsonl is missing or empty") as caught:
            check([measured, every[0]])
        assert caught.value.exit_code == 1
    with pytest.raises(UserError, match=r"evaluation\.jsonl is missing or empty"):
        compare(folders)


def test_what_is_wrong_is_one_line(folders, tmp_path):
    with pytest.raises(UserError, match="the baseline 'plain' is not one of the arms: baseline, coupled"):
        look_over(folders, baseline="plain")
    with pytest.raises(UserError, match="are both seed 0 of a; give them different names"):
        look_over({"a": [folders["baseline"][0], folders["coupled"][0]]})
    with pytest.raises(UserError, match="nowhere: no such folder"):
        look_over({"a": [tmp_path / "nowhere"]})
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        write_report(look_over(folders), tmp_path / "file")
