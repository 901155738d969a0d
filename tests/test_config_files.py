"""Config files that are wrong in themselves: one line each, with the file's name."""

from __future__ import annotations

import pytest
from test_config import parse
from test_flags import refused

from immiscible.config_files import LARGEST_FILE
from immiscible.configs import UnconditionalConfig


def file_refused(tmp_path, text: str | bytes) -> str:
    path = tmp_path / "mine.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    message = refused(UnconditionalConfig, "--config", path)
    assert message.startswith(f"--config {path}: ")
    return message.removeprefix(f"--config {path}: ")


@pytest.mark.parametrize("item", ["--overwrite_output_dir", "--output_dir=elsewhere", "-h", "--", "-x"])
def test_an_item_that_looks_like_a_flag(tmp_path, item):
    message = file_refused(tmp_path, f"eval_inference_steps: [5, {item}]\n")
    assert message.startswith(f"eval_inference_steps holds {item!r}, which looks like a flag")


def test_numbers_below_zero_are_items(tmp_path):
    assert file_refused(tmp_path, "eval_inference_steps: [5, -1]\n").startswith("--eval_inference_steps must be at least 1, not -1")


def test_a_key_that_is_given_twice(tmp_path):
    message = file_refused(tmp_path, "learning_rate: 1e-3\n# as above\nseed: 1\nlearning_rate: 5e-2\n")
    assert message == "learning_rate is given twice, in lines 1 and 4; leave one of them"
    message = file_refused(tmp_path, "learning_rate: 1e-3\nlearning-rate: 5e-2\n")
    assert message == "learning-rate is given twice, in lines 1 and 2; leave one of them"
    assert "seed is given twice, in lines 1 and 1" in file_refused(tmp_path, "{seed: 1, seed: 1}")


def test_files_that_are_too_large(tmp_path):
    assert file_refused(tmp_path, b"#" * (LARGEST_FILE + 1)) == "larger than 1 MiB, which no file of flags is"
    (tmp_path / "large.yaml").write_bytes(b"#" * (LARGEST_FILE - 20) + b"\nseed: 3\n")
    assert parse("--bundled_data", "digits", "--config", tmp_path / "large.yaml").seed == 3
    assert "larger than 1 MiB" in refused(UnconditionalConfig, "--config", "/dev/zero")


def test_deep_nesting(tmp_path):
    laughs = "k: &k [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("klmnopqr", "lmnopqrs", strict=True))
    assert "holds a list or a mapping inside a list" in file_refused(tmp_path, laughs)
    assert "not valid YAML: found unconstructable" in file_refused(tmp_path, "seed: &a [*a]\n")
    assert "nested too deeply" in file_refused(tmp_path, "".join("x:\n" + " " * depth for depth in range(1, 1400)) + "y")
    assert "nested too deeply" in file_refused(tmp_path, "seed: " + "[" * 5000 + "]" * 5000)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('"seed=1 --output_dir": x\n', "line 1 begins with what is no flag's name"),
        ("seed: 1\n? [a]\n: b\n", "line 2 begins with what is no flag's name"),
        ('"": x\n', "line 1 begins with what is no flag's name"),
        ("seed: 1\n---\nseed: 2\n", "not valid YAML"),
        ("seed: \x07\n", "not valid YAML"),
        (b"\xff\xfe\x00", "not a text file in UTF-8"),
        ("learning_rate: .inf\n", "argument --learning_rate: invalid float value: '.inf'"),
        ("learning_rate: inf\n", "--learning_rate must be finite"),
        ("resolution: 1000000000000000000000000000000\n", "--resolution must be at most 16384"),
    ],
)
def test_one_line_for_what_is_wrong_with_a_file(tmp_path, text, line):
    assert file_refused(tmp_path, text).startswith(line)
