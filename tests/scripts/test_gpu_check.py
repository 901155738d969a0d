"""`make gpu-check` without a GPU: what it would run, and what it makes of checks that pass, fail, are skipped or die."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from launch import ENVIRONMENT, ROOT

sys.path.insert(0, str(ROOT / "scripts"))
import gpu_check
from gpu_check import BENCHMARKS, CHECKS, PARTS, Benchmark, Check, main

from immiscible.errors import UserError

FACTS = {"device": "Imagined GPU (80 GB)", "memory": "80.0 GiB", "driver": "1.2.3", "packages": "torch 2"}
HELD = Path("gpu-imagined-gpu-80-gb")

TESTS = {
    "passing": "def test_a(): pass",
    "failing": "def test_a(): pass\ndef test_b():\n    assert 1 + 1 == 3, 'sum is wrong | here'",
    "skipped": "import pytest\n@pytest.mark.skip(reason='no such library')\ndef test_a(): pass",
    "partly": "import pytest\n@pytest.mark.skip(reason='no such library')\ndef test_a(): pass\ndef test_b(): pass",
    "broken": "import nothing_of_this_name",
    "empty": "",
    "crashing": "import os, signal\ndef test_a(): os.kill(os.getpid(), signal.SIGKILL)",
}


class FileCheck(Check):
    """A check whose tests are a file anywhere, without a marker."""

    def command(self, report: Path) -> list[str]:
        """As a check's."""
        return [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-c", os.devnull, f"--junitxml={report}", *self.tests]


class FileBenchmark(Benchmark):
    """A benchmark that is a line of Python."""

    def command(self, output_dir: Path) -> list[str]:
        """As a benchmark's."""
        return [sys.executable, "-c", self.script, str(output_dir)]


@pytest.fixture
def imagined(monkeypatch, tmp_path):
    """A device, and a part for each kind of outcome."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # a second a start
    parts = {}
    for name, text in TESTS.items():
        path = tmp_path / f"test_{name}.py"
        path.write_text(text)
        parts[name] = FileCheck(f"about {name}", (str(path),), 1)
    parts["timing"] = FileBenchmark("a time", "print('half', end='\\r'); print('whole: 3 ms')", (), 1)
    parts["stopping"] = FileBenchmark("a time", "raise SystemExit(3)", (), 1)
    monkeypatch.setattr(gpu_check, "PARTS", parts)
    monkeypatch.setattr(gpu_check, "BENCHMARKS", {name: parts[name] for name in ("timing", "stopping")})
    monkeypatch.setattr(gpu_check, "device_facts", lambda: FACTS)
    return tmp_path / "out"


def test_without_a_device_it_says_what_it_would_run():
    done = subprocess.run(
        [sys.executable, "scripts/gpu_check.py"], cwd=ROOT, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for name, part in PARTS.items():
        assert name in done.stdout and part.about in done.stdout
    assert "min" in done.stdout and "guess" in done.stdout
    assert "nothing was run" in done.stdout


def test_without_a_device_nothing_is_written(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu_check, "device_facts", lambda: None)
    main(["--only", "solve", "--output_dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
    told = capsys.readouterr().out
    assert "solve" in told and "look_ahead" not in told


@pytest.mark.slow
def test_each_outcome(imagined, capsys):
    with pytest.raises(
        UserError, match=r"5 of 9 parts failed on Imagined GPU \(80 GB\): failing, broken, empty, crashing, stopping"
    ) as raised:
        main(["--output_dir", str(imagined)])
    assert raised.value.exit_code == 1
    with (imagined / f"{HELD}.csv").open() as file:
        rows = {row["part"]: (row["result"], row["why"]) for row in csv.DictReader(file)}
    assert rows["passing"] == ("passed", "1 passed")
    assert rows["failing"][0] == "failed" and "1 passed, 1 failed" in rows["failing"][1] and "test_b" in rows["failing"][1]
    assert "sum is wrong" in rows["failing"][1]
    assert rows["skipped"] == ("skipped", "1 skipped; no such library")
    assert rows["partly"][0] == "passed" and "no such library" in rows["partly"][1]
    assert rows["broken"][0] == rows["empty"][0] == "failed" and "exit code" in rows["empty"][1]
    assert rows["crashing"] == ("failed", "pytest ended with killed by signal 9 and left no report")
    assert rows["timing"] == ("passed", "") and rows["stopping"] == ("failed", "exit code 3")
    text, page = ((imagined / f"{HELD}{ending}").read_text() for ending in (".txt", ".md"))
    told = capsys.readouterr().out
    assert "half\r" in told and "half" not in text.split("== timing")[1].split("== stopping")[0].split("$ ")[1].partition("\n")[2]
    for part in (text, told):
        assert "whole: 3 ms" in part and "test_b FAILED" in part and "about passing" in part
    for value in FACTS.values():
        assert value in text and value in page
    assert "sum is wrong \\| here" in page


def test_success_is_no_error(imagined):
    main(["--only", "passing", "skipped", "timing", "--output_dir", str(imagined)])
    assert (imagined / f"{HELD}.md").read_text().count("| passed |") == 2


def test_benchmarks_are_left_out(imagined):
    main(["--only", "passing", "stopping", "--skip-benchmarks", "--output_dir", str(imagined)])
    assert "stopping" not in (imagined / f"{HELD}.csv").read_text()


def test_what_hangs_is_ended(imagined, monkeypatch):
    monkeypatch.setitem(gpu_check.PARTS, "timing", FileBenchmark("a time", "import time; time.sleep(100)", (), 1))
    monkeypatch.setattr(gpu_check, "HOURS", 1 / 3600)
    with pytest.raises(UserError, match="timing"):
        main(["--only", "timing", "--output_dir", str(imagined)])
    assert "exit code -9" in (imagined / f"{HELD}.csv").read_text()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--only", "asignment"], "--only 'asignment' is unknown; known: assignment, solve"),
        (["--only", "step_ratio", "--skip_benchmarks"], "nothing is left to run"),
    ],
)
def test_names(words, line):
    with pytest.raises(UserError, match=line):
        main(words)


COLLECT = """
import io, json, sys
from contextlib import redirect_stdout
import pytest
found = []
for expression in json.loads(sys.argv[1]):
    with redirect_stdout(io.StringIO()) as out:
        code = pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", "-m", expression, "tests/gpu"])
    assert code == 0, out.getvalue()
    found.append([line for line in out.getvalue().splitlines() if "::" in line])
print(json.dumps(found))
"""


@pytest.mark.slow
def test_every_gpu_test_belongs_to_one_check():
    """And none of them is run by the ordinary commands."""
    expressions = ["gpu", "", "not slow"]
    command = [sys.executable, "-c", COLLECT, json.dumps(expressions)]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    everything, unasked, ordinary = json.loads(done.stdout.splitlines()[-1])
    assert everything and all("cuda" in name for name in everything)
    assert unasked and ordinary and not {*everything} & {*unasked, *ordinary}

    def tests(check: Check) -> list[str]:
        starts = tuple(f"tests/gpu/{test}{end}" for test in check.tests for end in ("[", "::"))
        return [name for name in everything if name.startswith(starts)]

    assert all(tests(check) for check in CHECKS.values())
    assert sorted(name for check in CHECKS.values() for name in tests(check)) == sorted(everything)


@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKS)
def test_checks_run_pytest_on_the_gpu_tests(tmp_path, name):
    """The very command, without a GPU: pytest finds the tests and skips each with the reason."""
    report = tmp_path / "report.xml"
    command = CHECKS[name].command(report)
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True)
    outcome = gpu_check.judged(name, report, done.returncode, 0.0)
    assert outcome.result == "skipped", done.stdout + done.stderr
    assert "no CUDA device is visible to torch" in outcome.why


SMALLEST = {
    "assignment_time": ("--sizes", "64", "--dimensions", "3072", "--seeds", "1", "--repeats", "1"),
    "exposed_time": ("--sizes", "64", "--milliseconds", "2", "--steps", "1", "--turns", "1", "--seeds", "1"),
    "step_ratio": ("--batch", "2", "--preset", "unet-tiny", "--pairs", "2", "--resolution", "8"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BENCHMARKS)
def test_benchmarks_run_on_a_cpu(tmp_path, name):
    """Each of them, with the flags that the real command takes too, at its smallest."""
    benchmark = BENCHMARKS[name]
    assert {word for word in benchmark.words if word.startswith("--")} <= {word for word in SMALLEST[name] if word.startswith("--")}
    command = ["cpu" if word == "cuda" else word for word in replace(benchmark, words=SMALLEST[name]).command(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert " ms" in done.stdout
    assert bool(list(tmp_path.glob("*.csv"))) is benchmark.writes
