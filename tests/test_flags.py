"""What flags take, whatever the script: finite numbers in a range that each flag states, names that file systems take."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import MISSING, dataclass, fields
from typing import get_type_hints

import pytest
from launch import ROOT
from test_config import parse

from immiscible.configs import TextToImageConfig, UnconditionalConfig
from immiscible.errors import UserError
from immiscible.flags import MOST, Parser, Range, _kind, check_ranges, flag, parse_config, range_of

CONFIGS = (UnconditionalConfig, TextToImageConfig)


GUIDABLE = ("--class_conditional", "--class_dropout_prob", "0.1")


def parse_text(*words) -> TextToImageConfig:
    needed = ("--pretrained_model_name_or_path", "model", "--train_data_dir", "photos")
    argv = [str(word) for word in (*needed, *words)]
    return parse_config(TextToImageConfig, argv, program="finetune_sd.py", description="")


HINTS = {config: get_type_hints(config) for config in CONFIGS}


def numbers(config: type) -> dict[str, tuple[type, Range]]:
    """The flags that are numbers, with their type and range."""
    kinds = {item.name: (_kind(HINTS[config][item.name])[0], range_of(item)) for item in fields(config)}
    return {name: (kind, allowed) for name, (kind, allowed) in kinds.items() if kind in (int, float)}


def parser_of(config: type) -> Parser:
    parser = Parser(allow_abbrev=False)
    parser.add_flags(config)
    return parser


PARSERS = {config: parser_of(config) for config in CONFIGS}  # parsing takes a thousandth of the time of making one
NUMBERS = [(config, name) for config in CONFIGS for name in numbers(config)]


def one_refused(config: type, word: str) -> str:
    with pytest.raises(UserError) as caught:
        PARSERS[config].parse_args([word])
    assert "\n" not in str(caught.value)
    return str(caught.value)


def refused(config: type, *words) -> str:
    with pytest.raises(UserError) as caught:
        parse("--bundled_data", "digits", *words) if config is UnconditionalConfig else parse_text(*words)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_there_are_numbers():
    assert len(numbers(UnconditionalConfig)) > 40 and len(numbers(TextToImageConfig)) > 40


@pytest.mark.parametrize(("config", "name"), NUMBERS)
def test_what_is_no_number_or_absurd_is_refused_by_the_flags_name(config, name):
    for value in ("inf", "-inf", "nan", "1e999", "1" + "0" * 30, "-1" + "0" * 30, "9" * 5000, "1e30", "ten", "", "0x10"):
        message = one_refused(config, f"--{name}={value}")
        assert f"--{name}" in message and len(message) < 250
        assert "must be" in message or f"{value[:60]}" in message


@pytest.mark.parametrize(("config", "name"), NUMBERS)
def test_every_number_has_two_ends_and_its_default_between_them(config, name):
    kind, allowed = numbers(config)[name]
    low, high = (allowed.above if allowed.least is None else allowed.least), (allowed.below if allowed.most is None else allowed.most)
    assert low is not None and (high is not None or kind is int)
    (item,) = (each for each in fields(config) if each.name == name)
    default = item.default if item.default is not MISSING else item.default_factory()
    for value in default if isinstance(default, list) else [default]:
        assert value is None or allowed.problem(value) is None
    for end, inside in ((allowed.least, True), (allowed.above, False), (allowed.most, True), (allowed.below, False)):
        assert end is None or (allowed.problem(kind(end)) is None) is inside
    for beyond in (low - 1, MOST + 1 if high is None else high + 1):
        assert f"--{name} must be" in one_refused(config, f"--{name}={kind(beyond)}")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--num_train_epochs", "0"], "--num_train_epochs must be at least 1, not 0"),
        (["--adam_epsilon", "inf"], "--adam_epsilon must be finite, not inf"),
        (["--adam_epsilon", "1e30"], "--adam_epsilon must be from 0 to 1, not 1e+30"),
        (["--guidance_scale", "nan"], "--guidance_scale must be finite, not nan"),
        (["--guidance-scale=-inf"], "--guidance_scale must be finite, not -inf"),
        (["--rank", "9999999"], "--rank must be at most 4096, not 9999999"),
        (["--coupling_condition_ratio", "1.5"], "--coupling_condition_ratio must be from 0 to 1, not 1.5"),
        (["--adam_beta2", "1"], "--adam_beta2 must be at least 0 and below 1, not 1.0"),
        (["--eval_inference_steps", "5", "0"], "--eval_inference_steps must be at least 1, not 0"),
        (["--use_lora", "--adam_epsilon", "0"], "--adam_epsilon must be at least 1.2e-38 with --use_lora, whose first gradients are 0"),
        (["--use_lora", "--adam_epsilon", "1e-50"], "--adam_epsilon must be at least 1.2e-38 with --use_lora"),
        (["--eval_guidance_scales", "3", "0.5"], "--eval_guidance_scales must be at least 1 for prompts, not 0.5"),
    ],
)
def test_one_line_names_the_flag_as_it_is_called(words, line):
    assert refused(TextToImageConfig, *words).startswith(line)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--ema_inv_gamma", "inf"], "--ema_inv_gamma"),
        (["--image_scale", "1e30"], "--image_scale"),
        (["--learning_rate", "1e38"], "--learning_rate"),
        (["--noise_offset", "inf"], "--noise_offset"),
        (["--loss_weighting", "p2", "--p2_gamma", "1e30"], "--p2_gamma"),
        (["--loss_weighting", "p2", "--p2_k", "1e30"], "--p2_k"),
        (["--noise_process", "flow", "--prediction_type", "flow_prediction", "--sampling_scheduler", "ddim"], "--sampling_scheduler ddim"),
        (["--class_conditional", "--adam_epsilon", "0"], "--adam_epsilon must be at least 1.2e-38 with --class_conditional"),
        (["--logging_dir", "checkpoint-1"], "--logging_dir checkpoint-1"),
        (["--class_dropout_prob", "0.1"], "--class_dropout_prob 0.1 needs --class_conditional"),
        (["--class_conditional", "--guidance_scale", "1.5"], "--guidance_scale 1.5 guides samples by those of no class: train with"),
        (["--class_conditional", "--eval_guidance_scales", "1", "0"], "--eval_guidance_scales 0 guides samples by those of no class"),
        ([*GUIDABLE, "--guidance_interval", "0.2", "0.8"], "--guidance_interval is for guided samples: give --guidance_scale or"),
        (
            [*GUIDABLE, "--guidance_scale", "2", "--guidance_interval", "0.2"],
            "must be two numbers, the lower one first, such as 0.2 0.8, not 0.2",
        ),
        ([*GUIDABLE, "--guidance_scale", "2", "--guidance_interval", "0.8", "0.2"], "such as 0.2 0.8, not 0.8 0.2"),
    ],
)
def test_what_would_train_nothing_is_refused(words, named):
    assert named in refused(UnconditionalConfig, *words)


def test_guidance_of_a_run_and_of_its_evaluations():
    config = parse("--bundled_data", "digits", *GUIDABLE, "--eval_guidance_scales", "1", "1.5", "--guidance_interval", "0.25", "0.75")
    assert (config.eval_guidance_scales, config.interval) == ([1.0, 1.5], (0.25, 0.75)) and parse(*GUIDABLE).interval == (0.0, 1.0)
    assert parse_text("--eval_guidance_scales", "1", "7.5").interval == (0.0, 1.0)
    config = parse(*GUIDABLE, "--guidance_scale", "3", "--eval_batch_size", "2", "--ddpm_num_inference_steps", "10")
    assert config.grid_calls == 40


def test_what_people_mean_is_taken():
    words = {
        "learning_rate": 10,
        "adam_epsilon": 1,
        "max_grad_norm": 1e9,
        "adam_weight_decay": 0,
        "ema_inv_gamma": 1000,
        "ema_max_decay": 1,
        "seed": 2**63 - 1,
        "max_train_steps": 10**9,
        "resolution": 4096,
        "train_batch_size": 8192,
        "gradient_accumulation_steps": 1024,
        "ddpm_num_steps": 4000,
        "image_scale": 0.1,
        "noise_offset": 0.1,
        "input_perturbation": 0.5,
        "max_train_samples": 5 * 10**9,
        "eval_samples": 50_000,
        "eval_steps": 1,
        "dataloader_num_workers": 64,
        "num_epochs": 10**6,
    }
    config = parse("--bundled_data", "digits", *[word for name, value in words.items() for word in (f"--{name}", value)])
    assert {name: getattr(config, name) for name in words} == words
    assert parse_text("--guidance_scale", 30, "--use_lora", "--rank", 1024, "--validation_prompt", "").validation_prompt == ""


def test_an_alias_is_the_flag_and_errors_name_what_was_written(tmp_path):
    assert "--num_train_epochs must be at least 1, not 0" in refused(UnconditionalConfig, "--num_train_epochs", "0")
    assert "--num-train-epochs" not in refused(UnconditionalConfig, "--num_epochs", "0")
    assert refused(UnconditionalConfig, "--num_train_epoch", "3").endswith("did you mean --num_train_epochs?")
    assert parse("--bundled_data", "digits", "--num_epochs", 3, "--num_train_epochs", 4).num_epochs == 4  # the last one counts, as always
    (tmp_path / "mine.yaml").write_text("num_epochs: 3\nnum_train_epochs: 4\n")
    assert "mine.yaml: --num_epochs and --num_train_epochs are one flag" in refused(UnconditionalConfig, "--config", tmp_path / "mine.yaml")
    assert "also --num_train_epochs" in " ".join(PARSERS[UnconditionalConfig].format_help().split())


def test_ranges_of_arguments_that_nobody_has_parsed():
    @dataclass
    class Numbers:
        share: float = flag(0.5, "", least=0, most=1)
        count: int | None = flag(None, "", above=1)
        on: bool = flag(True, "")
        name: str = flag("x", "")

    check_ranges(Numbers())
    check_ranges(Numbers(share=1, count=2))
    for wrong, line in (({"share": float("nan")}, "--share must be finite"), ({"share": -1}, "--share must be from 0 to 1, not -1")):
        with pytest.raises(UserError, match=line):
            check_ranges(Numbers(**wrong))
    with pytest.raises(UserError, match=f"--count must be at most {MOST}, not {MOST + 1}"):
        check_ranges(Numbers(count=MOST + 1))


@pytest.mark.parametrize("word", ["--noise_coupling=" + "x" * 5000, "--" + "x" * 5000, "x" * 5000])
def test_a_long_word_does_not_make_a_long_line(word):
    assert "x" * 40 in (line := refused(UnconditionalConfig, word)) and len(line) < 400


def test_two_dashes_are_no_value(tmp_path):
    assert refused(UnconditionalConfig, "--output_dir=--") == "--output_dir must have a value, not --"
    (tmp_path / "mine.yaml").write_text("seed: --\n")
    assert "--seed must have a value, not --" in refused(UnconditionalConfig, "--config", tmp_path / "mine.yaml")


TEXTS = [
    (config, item.name)
    for config in CONFIGS
    for item in fields(config)
    if _kind(HINTS[config][item.name])[0] is str and not item.metadata.get("prose")
]


@pytest.mark.parametrize(("config", "name"), TEXTS)
def test_an_unset_variable_of_the_shell_is_an_error(config, name):
    for value in ("", "  "):
        assert f"--{name} must not be empty" in one_refused(config, f"--{name}={value}")


def test_the_users_folder_in_words_that_no_shell_has_read(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.yaml").write_text("output_dir: ~/runs/a\n")
    found = parse_config(UnconditionalConfig, ["--config", str(tmp_path / "a.yaml"), "--cache_dir=~/cache"], program="x", description="")
    assert (found.output_dir, found.cache_dir) == (f"{tmp_path}/runs/a", f"{tmp_path}/cache")


@pytest.mark.parametrize(
    "name", ["output_dir", "train_data_dir", "latent_cache_dir", "model_config_name_or_path", "resume_from_checkpoint"]
)
def test_names_that_no_file_system_takes(tmp_path, name):
    for value in ("x" * 300, "ü" * 200, "a/" + "b" * 256, "/".join(["y" * 200] * 30)):
        assert f"--{name} must not hold a name of more than 255 bytes" in refused(UnconditionalConfig, f"--{name}={value}")
    (tmp_path / "nul.yaml").write_text(f'{name}: "a\\0b"\n')
    assert "must not hold a NUL" in refused(UnconditionalConfig, "--config", tmp_path / "nul.yaml")


def test_bytes_that_are_no_text():
    for name in ("output_dir", "validation_prompt", "validation_prompts"):
        assert refused(TextToImageConfig, f"--{name}=a\udcff") == f"--{name} must be text in UTF-8, not 'a\\udcff'"
    assert parse_text("--output_dir", "größe 🎲").output_dir == "größe 🎲"


@pytest.mark.parametrize("name", ["../x", "a/../../b", "/tmp/x"])
def test_a_project_is_inside_the_folder_of_logs(name):
    assert f"--tracker_project_name {name} must be a name" in refused(TextToImageConfig, "--tracker_project_name", name)


# The other scripts


def script(name: str):
    path = next(path for folder in ("immiscible/commands", "scripts") if (path := ROOT / folder / name).exists())
    spec = importlib.util.spec_from_file_location(f"flags_of_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


SAMPLE = {"model": "m", "output_dir": "o", "num_images": 1, "num_inference_steps": 1}


@pytest.mark.parametrize("name", ["num_images", "num_inference_steps", "guidance_scale", "resolution", "seed", "batch_size"])
@pytest.mark.parametrize("value", ["nan", "inf", "1" + "0" * 30, "-1", "", "one"])
def test_numbers_of_sample(name, value):
    words = [f"--{flag}={given}" for flag, given in {**SAMPLE, name: value}.items()]
    with pytest.raises(UserError, match=f"--{name}"):
        script("sample.py").parser().parse_args(words)


@pytest.mark.parametrize("name", ["model", "output_dir", "lora", "base", "prompts", "class_names"])
@pytest.mark.parametrize("value", ["", "x" * 300])
def test_paths_of_sample(name, value):
    words = [f"--{flag}={given}" for flag, given in {**SAMPLE, name: value}.items()]
    with pytest.raises(UserError, match=f"--{name} must not"):
        script("sample.py").parser().parse_args(words)


@pytest.mark.parametrize(
    "words",
    [["--guidance_scale", "-1"], ["--jobs", "1e3"], ["--jobs", "9" * 30], ["--seeds", "1", "-1"], ["--seeds", "9" * 30], ["--output_dir="]],
)
def test_flags_of_compare(words):
    with pytest.raises(UserError, match=words[0].rstrip("=")):
        script("compare.py").parse(["--task", "digits", "--methods", "baseline", *words])


@pytest.mark.parametrize("name", ["encode_batch_size", "rows_per_shard"])
@pytest.mark.parametrize("value", ["0", "inf", "1" + "0" * 30, "x"])
def test_numbers_of_precompute_latents(name, value):
    with pytest.raises(UserError, match=f"--{name}"):
        script("precompute_latents.py").main(["--latent_cache_dir", "c", f"--{name}={value}"])
