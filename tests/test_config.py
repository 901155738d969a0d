"""Flags, config files, and how the two come together."""

import json
import re
import subprocess
import sys
from dataclasses import asdict, fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from launch import ENVIRONMENT, ROOT

from immiscible.config_files import save_config
from immiscible.configs import UnconditionalConfig
from immiscible.errors import UserError
from immiscible.flags import flag_value, parse_config
from immiscible.method import build_objective, chosen_coupling, chosen_sampler, chosen_weights
from immiscible.networks.presets import network_config
from immiscible.networks.unet import build_unet, unet_config
from immiscible.objective_choice import training_scheduler
from immiscible.process import NoiseProcess

# Those of Stable Diffusion: test_recipes.py. `classes` goes beside another.
PARTS = ("classes", "consistency", "dit_tiny", "edm")  # added to another task
FILES = sorted(
    path for path in (ROOT / "configs/tasks").glob("*.yaml") if not path.stem.startswith(("sd", "mscoco")) and path.stem not in PARTS
)
TASKS = [path for path in FILES if "objective:" not in path.read_text()]  # those go with some methods: tests/test_method.py
METHODS = sorted((ROOT / "configs/methods").glob("*.yaml"))
DEFAULTS = {item.name: item.default for item in fields(UnconditionalConfig)}
DIGITS = ROOT / "configs/tasks/digits.yaml"


def parse(*words) -> UnconditionalConfig:
    argv = [str(word) for word in words]
    return parse_config(UnconditionalConfig, argv, program="train_unconditional.py", description="", no_data_config=DIGITS)


def parse_file(tmp_path: Path, text: str, *words) -> UnconditionalConfig:
    (tmp_path / "mine.yaml").write_text(text)
    return parse("--bundled_data", "digits", *words, "--config", tmp_path / "mine.yaml")


# Flags


def test_every_flag_of_the_diffusers_example_has_its_default():
    theirs = json.loads((ROOT / "tests/diffusers_unconditional_flags.json").read_text())
    assert len(theirs) == 45
    ours = parse("--bundled_data", "photo_crops")
    for flag, facts in theirs.items():
        assert getattr(ours, flag.removeprefix("--")) == facts["default"], flag


def test_diffusers_choices_are_all_taken():
    theirs = json.loads((ROOT / "tests/diffusers_unconditional_flags.json").read_text())
    for flag, choice in ((flag, choice) for flag, facts in theirs.items() for choice in facts.get("choices", [])):
        assert getattr(parse("--bundled_data", "digits", flag, choice), flag.removeprefix("--")) == choice


def test_switches_of_the_diffusers_example_need_no_value():
    theirs = json.loads((ROOT / "tests/diffusers_unconditional_flags.json").read_text())
    switches = [flag for flag, facts in theirs.items() if facts.get("action") == "store_true"]
    assert len(switches) == 8
    config = parse("--bundled_data", "digits", *switches)
    assert all(getattr(config, flag.removeprefix("--")) is True for flag in switches)


@pytest.mark.parametrize("words", [["--resol", "32"], ["--noise_coup", "assignment"], ["--conf", "a.yaml"], ["surplus"]])
def test_no_abbreviations_and_no_surplus(words):
    with pytest.raises(UserError, match=words[0]):
        parse("--bundled_data", "digits", *words)


def test_help_and_usage_errors_come_without_diffusers():
    code = """
import sys
from immiscible.errors import run_script
import train_unconditional
for words, wanted in ((["--help"], 0), (["--noise_coupling", "magic"], 2), (["--dropout", "2"], 2)):
    sys.argv = ["train_unconditional.py", *words]
    try:
        found = run_script(train_unconditional.main)
    except SystemExit as end:
        found = end.code
    assert found == wanted, (words, found)
assert not {"diffusers", "accelerate", "datasets"} & sys.modules.keys()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={**ENVIRONMENT, "PATH": ""}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--noise_coupling" in done.stdout and "--asymmetric_tau" in done.stdout and "--config" in done.stdout
    assert all(f"--{name}" in done.stdout for name in DEFAULTS)


# Files


def test_without_data_the_digits_come_first():
    config, file = parse(), yaml.safe_load(DIGITS.read_text())
    assert (config.bundled_data, config.model_preset, config.train_batch_size) == ("digits", "unet-tiny", file["train_batch_size"])
    assert file["train_batch_size"] > 16 and parse("--train_batch_size", 8).train_batch_size == 8
    assert parse("--bundled_data", "digits").train_batch_size == 16
    assert parse("--train_data_dir", "photos").bundled_data is None
    both = parse("--config", ROOT / "configs/methods/immiscible.yaml", "--resolution", 16)
    assert (both.bundled_data, both.noise_coupling, both.resolution) == ("digits", "assignment", 16)


def test_files_apply_left_to_right_and_the_command_line_wins(tmp_path):
    (tmp_path / "a.yaml").write_text("resolution: 16\ntrain_batch_size: 4\nseed: 1\n")
    (tmp_path / "b.yaml").write_text("resolution: 32\nseed: 2\n")
    files = [tmp_path / "a.yaml", tmp_path / "b.yaml"]
    for words in (["--seed", 3, "--config", *files], ["--config", *files, "--seed", 3]):
        config = parse("--bundled_data", "digits", *words)
        assert (config.resolution, config.train_batch_size, config.seed) == (32, 4, 3)
    assert parse("--bundled_data", "digits", "--config", *reversed(files)).resolution == 16


def test_yaml_values_are_read_as_written(tmp_path):
    config = parse_file(
        tmp_path,
        "mixed_precision: no\nlearning_rate: 1e-4\nseed:\nhub_model_id: 007\nimage_scale: 2\nadam_epsilon: .5\nloss_weighting: none\n",
    )
    assert (config.mixed_precision, config.learning_rate, config.seed, config.hub_model_id) == ("no", 1e-4, None, "007")
    assert (config.image_scale, config.adam_epsilon, config.loss_weighting) == (2.0, 0.5, "none")


@pytest.mark.parametrize(
    ("word", "value"),
    [("true", True), ("True", True), ("yes", True), ("1", True), ("false", False), ("False", False), ("no", False), ("0", False)],
)
def test_spellings_of_booleans(tmp_path, word, value):
    assert parse_file(tmp_path, f"use_ema: {word}\n").use_ema is value
    assert parse("--bundled_data", "digits", "--use_ema", word).use_ema is value


def test_a_file_can_switch_on_what_the_command_line_switches_off(tmp_path):
    assert parse_file(tmp_path, "random_flip: true\n").random_flip is True
    assert parse_file(tmp_path, "random_flip: true\n", "--random_flip", "false").random_flip is False


def test_values_that_begin_with_a_dash(tmp_path):
    assert parse_file(tmp_path, "timestep_sampling: logit_normal\nlogit_mean: -0.5\n").logit_mean == -0.5
    assert parse_file(tmp_path, "timestep_sampling: logit_normal\nlogit_mean: -1e-3\n").logit_mean == -1e-3
    assert parse_file(tmp_path, "output_dir: -odd\n").output_dir == "-odd"


def test_one_flag_is_found_whatever_the_others_are(tmp_path):
    (tmp_path / "a.yaml").write_text("dropout: 0.1\nsurplus: 1\n")
    (tmp_path / "b.yaml").write_text("dropout:\nresolution: 8\n")
    words = ["--strange", "1", "--config", str(tmp_path / "a.yaml"), str(tmp_path / "b.yaml"), "--help"]
    assert flag_value(words, "dropout") == "0.1" and flag_value([*words, "--dropout=0.2"], "dropout") == "0.2"
    assert flag_value(words, "seed") is None
    with pytest.raises(UserError, match=r"none\.yaml"):
        flag_value(["--config", "none.yaml"], "dropout")


def test_empty_files_and_lists(tmp_path):
    assert parse_file(tmp_path, "# nothing\n").seed is None
    assert parse_file(tmp_path, "seed: [4]\n").seed == 4
    with pytest.raises(UserError, match=r"mine\.yaml"):
        parse_file(tmp_path, "seed: [4, 5]\n")


def test_saved_config_reads_back_as_equal(tmp_path):
    config = parse(
        *("--bundled_data", "photo_crops", "--use_ema", "--learning_rate", "3e-05", "--adam_epsilon", "1e-20", "--logit_mean=-1e-07"),
        *("--output_dir", "a folder: with # signs", "--hub_model_id", "null", "--logging_dir", "007", "--mixed_precision", "no"),
        *("--timestep_sampling", "logit_normal", "--snr_gamma", "4", "--loss_weighting", "min_snr"),
    )
    save_config(config, tmp_path / "config.yaml")
    again = parse("--config", tmp_path / "config.yaml")
    assert again == config
    assert asdict(again)["hub_model_id"] == "null" and again.adam_epsilon == 1e-20


def test_the_token_is_not_written_into_the_run(tmp_path):
    config = parse("--bundled_data", "digits", "--hub_token", "hf_secret")
    save_config(config, tmp_path / "config.yaml")
    assert "hf_secret" not in (tmp_path / "config.yaml").read_text()


# The files that come with the suite


def parts(config: UnconditionalConfig) -> None:
    """Builds everything that a run builds, without data, and the network without memory."""
    process = NoiseProcess.from_scheduler(training_scheduler(config))
    sampler = chosen_sampler(config, process)
    assert sampler(4, generator=torch.Generator().manual_seed(0)).shape == (4,)
    x0, labels = torch.zeros(3, 1, 2, 2), torch.zeros(3, dtype=torch.int64)
    assert chosen_coupling(config)(x0, labels=labels, generator=torch.Generator().manual_seed(0)).shape == x0.shape
    weights = chosen_weights(config, process, config.prediction_type)
    assert len(weights) == config.ddpm_num_steps and bool((weights.vector >= 0).all())
    latents = {"channels": 4, "downsampling": 8} if config.vae_model_name_or_path else {"channels": 3}
    size = {"preset": config.model_preset, "resolution": config.resolution, "dropout": config.dropout}
    network_config(config_name_or_path=config.model_config_name_or_path, **size, **latents)


@pytest.mark.parametrize("path", [*TASKS, *METHODS], ids=lambda path: path.stem)
def test_every_file_parses_and_builds(path):
    parts(parse("--config", path))
    assert path.read_text().startswith("# ")


@pytest.mark.parametrize(
    ("name", "batch", "kind"),
    [
        ("cifar10_consistency", 512, "ConsistencyObjective"),
        ("celeba64_consistency", 1024, "ConsistencyObjective"),
        ("tiny_imagenet_consistency", 2048, "ConsistencyObjective"),
        ("cifar10_edm", 512, "MomentumObjective"),
    ],
)
def test_recipes_of_objectives_are_the_papers(name, batch, kind):
    path = ROOT / f"configs/tasks/{name}.yaml"
    assert {path.stem for path in FILES} - {path.stem for path in TASKS} == {
        *("cifar10_consistency", "celeba64_consistency", "tiny_imagenet_consistency", "cifar10_edm")
    }
    (processes,) = re.findall(r"--num_processes (\d+)", path.read_text())
    config = parse("--config", path)
    assert config.train_batch_size * int(processes) * config.gradient_accumulation_steps == batch
    kept = []
    accelerator = SimpleNamespace(device=torch.device("cpu"), unwrap_model=None, register_for_checkpointing=kept.append)
    if config.consistency_distance == "lpips":
        config = parse("--config", path, "--consistency_distance", "l2")
    objective = build_objective(config, training_scheduler(config), accelerator)
    assert type(objective).__name__ == kind and len(kept) == (config.teacher == "ema")
    unet_config(config_name_or_path=None, preset=config.model_preset, resolution=config.resolution, channels=3, dropout=config.dropout)


@pytest.mark.slow
def test_tasks_and_methods_compose():
    assert len(TASKS) >= 3 and len(METHODS) >= 10
    plain = parse("--bundled_data", "digits")
    for method in METHODS:
        alone = parse("--bundled_data", "digits", "--config", method)
        changed = [name for name in DEFAULTS if getattr(alone, name) != getattr(plain, name)]
        for task in TASKS:
            config = parse("--config", task, method)
            assert config.bundled_data or config.dataset_name or config.train_data_dir
            assert all(getattr(config, name) == getattr(alone, name) for name in changed), (task, method)
            parts(config)


def test_cifar10_is_the_papers_experiment():
    config = parse("--config", ROOT / "configs/tasks/cifar10_ddim.yaml")
    assert (config.train_batch_size, config.sampling_scheduler, config.ddpm_beta_schedule) == (256, "ddim", "linear")
    network = unet_config(config_name_or_path=None, preset=config.model_preset, resolution=config.resolution, channels=3, dropout=None)
    with torch.device("meta"):
        unet = build_unet(network)
    assert 35e6 < sum(parameter.numel() for parameter in unet.parameters()) < 37e6
    assert network["dropout"] == 0.1 and unet.config.sample_size == 32


@pytest.mark.parametrize(("name", "steps"), [("metfaces", 50_000), ("ffhq", 100_000), ("imagenet", 400_000)])
def test_recipes_of_transformers_are_the_papers(name, steps):
    """Tables 7 and 8 of SpeeD, on the eight processes of the header's launch line."""
    path = ROOT / f"configs/tasks/{name}_dit.yaml"
    config, method = parse("--config", path), ROOT / "configs/methods/flow.yaml"
    assert "configs/accelerate/8xa800.yaml" in path.read_text() and f"configs/tasks/{path.name}" in path.read_text()
    assert (8 * config.train_batch_size * config.gradient_accumulation_steps, config.max_train_steps) == (256, steps)
    assert (config.learning_rate, config.adam_weight_decay, config.ema_max_decay, config.random_flip) == (1e-4, 0, 0.9999, True)
    assert (config.model_preset, config.resolution, config.ddpm_num_inference_steps) == ("dit-xl-2", 256, 250)
    assert config.class_conditional == (name == "imagenet")
    assert parse("--config", path, method).noise_process == "flow"
    assert parse("--config", path, "--learned_sigma", "--timestep_spacing", "linspace").learned_sigma
    masked = parse("--config", ROOT / "configs/tasks/imagenet_mdt.yaml")
    assert (masked.model_preset, masked.max_train_steps) == ("mdt-s-2", 1_000_000)
    assert masked.mask_ratio is None  # 0.3 by default; named, the other arm of its header, --model_preset dit-s-2, would refuse it


def test_recipes_of_the_papers_unet_and_of_its_larger_images_are_the_papers():
    """Tables 3, 6 and 9 of SpeeD, by the launch lines of the headers."""
    learned = ("--learned_sigma", "--timestep_spacing", "linspace")
    for name, (batch, steps, resolution) in {"ffhq_unet": (256, 50_000, 256), "metfaces512_dit": (32, 100_000, 512)}.items():
        path = ROOT / f"configs/tasks/{name}.yaml"
        config = parse("--config", path, ROOT / "configs/methods/speed.yaml", *learned)
        assert "configs/accelerate/8xa800.yaml" in path.read_text() and f"configs/tasks/{path.name}" in path.read_text()
        assert (8 * config.train_batch_size, config.max_train_steps, config.resolution) == (batch, steps, resolution)
        assert (config.learning_rate, config.adam_weight_decay, config.ema_max_decay, config.random_flip) == (1e-4, 0, 0.9999, True)
        assert parse("--config", path, ROOT / "configs/methods/flow.yaml").noise_process == "flow"
    config = parse("--config", ROOT / "configs/tasks/ffhq_unet.yaml")
    settings = unet_config(config_name_or_path=None, preset=config.model_preset, resolution=256, channels=4, dropout=None, downsampling=8)
    with torch.device("meta"):
        unet = build_unet(settings)
        seen = []
        for name, module in unet.named_modules():
            if name.endswith("attentions.0"):
                module.register_forward_hook(lambda module, given, _, name=name: seen.append((name, given[0].shape[-1], module.heads)))
        assert unet(torch.empty(1, 4, 32, 32), 0).sample.shape == (1, 4, 32, 32)
    assert seen == [
        (name, side, 1)
        for name, side in (("down_blocks.1.attentions.0", 16), ("mid_block.attentions.0", 4), ("up_blocks.2.attentions.0", 16))
    ]
    assert unet.config.time_embedding_type == "positional" and len(unet.down_blocks[0].resnets) == 3


def test_every_flag_is_used_by_some_test_or_file():
    files = [*ROOT.glob("tests/**/*.py"), *ROOT.glob("configs/**/*.yaml")]
    words = set(re.findall(r"\w+", "\n".join(path.read_text() for path in files)))
    assert sorted(set(DEFAULTS) - words) == []


def test_raw_weights_are_measured_beside_an_average_alone():
    for words, says in ((["--use_ema"], "give --eval_steps too"), (["--eval_steps", "2"], "without --use_ema they are what is measured")):
        with pytest.raises(UserError, match=f"--eval_raw_weights .*{says}"):
            parse("--bundled_data", "digits", "--eval_raw_weights", *words)
    assert parse("--bundled_data", "digits", "--eval_raw_weights", "--use_ema", "--eval_steps", "2").eval_raw_weights
