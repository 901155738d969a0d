"""A few cases of the fuzzer in the ordinary tests, some hundreds in the slow ones, and faults that it must find."""

from __future__ import annotations

import random

import pytest
from launch import Result

from fuzz import parsing
from fuzz.cases import KINDS, fuzz
from fuzz.runs import verdict
from fuzz.values import targets
from immiscible import config_files, flags
from immiscible.errors import UserError

READING = ("flag", "pair", "yaml")


def share(*kinds: str) -> dict[str, int]:
    return {kind: KINDS[kind] for kind in kinds}


def test_flags_that_nobody_would_give(script, tmp_path):
    tried, problems = fuzz(share(*READING), 240, 11, script, tmp_path)
    assert sum(tried.values()) >= 240 and problems == []


@pytest.mark.slow
def test_some_cases_through_whole_scripts(script, tmp_path):
    tried, problems = fuzz(share("data", "checkpoint"), 4, 5, script, tmp_path)
    assert sum(tried.values()) >= 4 and problems == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_hundreds(script, tmp_path, kind):
    tried, problems = fuzz(share(kind), 200 if kind in READING else 30, 3, script, tmp_path)
    assert tried[kind] >= 30 and problems == []


def planted(monkeypatch, tmp_path, kind: str = "flag", cases: int = 80) -> str:
    """What the fuzzer says of the fault that is in place."""
    problems = fuzz({kind: 1}, cases, 7, None, tmp_path)[1]
    monkeypatch.undo()
    assert fuzz({kind: 1}, cases, 7, None, tmp_path)[1] == []
    return "\n".join(problems)


def test_it_finds_a_number_that_is_not_checked(monkeypatch, tmp_path):
    monkeypatch.setattr(flags.Range, "problem", lambda self, value: None)
    assert "silent" in planted(monkeypatch, tmp_path)


def test_it_finds_a_line_that_does_not_name_the_flag(monkeypatch, tmp_path):
    monkeypatch.setattr(flags.Parser, "error", lambda self, message: (_ for _ in ()).throw(UserError("something is wrong")))
    assert "unnamed: something is wrong" in planted(monkeypatch, tmp_path)


def test_it_finds_a_traceback_and_a_duplicate_key(monkeypatch, tmp_path):
    monkeypatch.setattr(config_files, "_check_key", lambda path, key, lines: None)
    monkeypatch.setattr(config_files, "_is_number", lambda text: int(text) > 0)
    assert "traceback: ValueError" in planted(monkeypatch, tmp_path, "yaml", 40)


def test_it_finds_a_case_that_does_not_end(monkeypatch, tmp_path):
    def wait(path):
        while True:
            pass

    monkeypatch.setattr(parsing, "SECONDS", 0.2)
    monkeypatch.setattr(flags, "file_words", wait)
    draw = random.Random(0)
    label, judge = parsing.yaml_case(draw, targets()[0], tmp_path)
    assert judge() == "hang" and "train_unconditional.py" in label


@pytest.mark.parametrize(
    ("code", "stderr", "is_untouched", "fine", "found"),
    [
        (0, "", True, None, None),
        (0, "", False, "silent: no summary", "silent: no summary"),
        (1, "a.py: error: --seed is wrong\n", False, None, None),
        (2, "a.py: error: --seed is wrong\n", True, None, None),
        (2, "a.py: error: --seed is wrong\n", False, None, "touched"),
        (2, "a.py: error: wrong\n", True, None, "unnamed"),
        (1, "Traceback (most recent call last):\nKeyError: 3\n", True, None, "traceback: KeyError: 3"),
        (1, "a.py: error: --seed\na.py: error: --seed\n", True, None, "2 lines"),
        (1, "", True, None, "0 lines"),
        (139, "", True, None, "exit code 139"),
    ],
)
def test_verdicts_on_whole_scripts(code, stderr, is_untouched, fine, found):
    said = verdict(Result(code, "", stderr, "a.py"), ["--seed"], is_untouched, lambda: fine)
    assert said == found or (found and said.startswith(found))
