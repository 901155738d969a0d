import re

from compared import decay, words, write_run

from immiscible.reports.comparison import compare
from immiscible.reports.page import html_report, markdown_report, write_report
from immiscible.reports.sentences import headline


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
    assert page.count("data:image/png;base64,") == 6  # a row of few samples and a whole grid for each arm
    assert page.count("<svg") == 5  # curves and ratios at two numbers of inference steps, inference steps
    assert not list((tmp_path / "out").glob(".*"))  # nothing half written
    assert "0-499" in page and "0-499" in text


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


def test_one_number_of_inference_steps_and_no_metrics(tmp_path):
    folder = write_run(tmp_path / "a", {4: decay()}, line={"validation_loss": None})
    (folder / "metrics.jsonl").unlink()
    comparison = compare({"a": [folder]})
    assert "Quality against inference steps" not in html_report(comparison)
    assert "| –" in markdown_report(comparison) and "Held-out" not in markdown_report(comparison)
