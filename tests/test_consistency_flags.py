"""Each flag of diffusers' consistency training script with ``--objective consistency``: the same type, the same default or a reason for
another, and something that it changes; what those of the objective change, tests/test_consistency.py and tests/tasks show."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy
import pytest
import torch
from class_networks import config_of, tiny_unet
from kills import final_hashes
from launch import ROOT, tiny
from PIL import Image
from test_config import parse, parse_file
from torch import nn

from immiscible.configs import FREE_ON_RESUME, UnconditionalConfig
from immiscible.data.loading import training_source
from immiscible.data.transforms import image_transform
from immiscible.errors import UserError
from immiscible.networks.optimization import build_ema, build_optimizer, learning_rate
from immiscible.networks.unet import build_unet
from immiscible.tasks.pixels import network_settings

THEIRS = json.loads((ROOT / "tests/diffusers_consistency_flags.json").read_text())
ALIASES = {item.metadata["alias"]: item.name for item in fields(UnconditionalConfig) if "alias" in item.metadata}
CPU = torch.device("cpu")

OF_THE_OBJECTIVE = {
    *("prediction_type", "sigma_min", "sigma_max", "rho", "huber_c", "discretization_s_0", "discretization_s_1"),
    *("constant_discretization_steps", "p_mean", "p_std", "noise_precond_type", "input_precond_type", "skip_steps", "cast_teacher"),
}
# A network that is trained already is none of this script's.
UNKNOWN = {"pretrained_model_name_or_path", "revision", "variant"}
DIFFERENT = {
    "prediction_type": "epsilon",  # not read under this objective
    "dataset_class_label_column_name": None,  # `label`, but only where a flag needs classes: data without them is no error
    "ema_max_decay": 0.9999,  # of diffusers' unconditional script, whose name this one has
    "use_ema_warmup": True,  # likewise: there the average is always warmed up
    "ddpm_num_inference_steps": 1,  # which that script does not read: it samples in one step
    "validation_steps": None,  # --save_images_epochs, which that script does not read: a grid of 1,000 steps costs 200 steps of training
    "tracker_project_name": "immiscible",
}
SHARED = {*json.loads((ROOT / "tests/diffusers_unconditional_flags.json").read_text())}
# Of the dataclasses that all scripts share, where tests/test_diffusers_flags.py shows what they change.
SHARED |= {
    f"--{name}" for name in ("seed", "max_train_steps", "max_train_samples", "max_grad_norm", "allow_tf32", "gradient_checkpointing")
}
EFFECTS = {
    "dataset_image_column_name": "test_columns",
    "dataset_class_label_column_name": "test_columns",
    "interpolation_type": "test_interpolation",
    "num_classes": "test_classes",
    "class_embed_type": "test_classes",
    "class_conditional": "test_classes",
    "num_train_epochs": "test_other_names_are_the_same_flags",
    "scale_lr": "test_a_rate_that_is_scaled",
    "optimizer_type": "test_optimizers",
    "use_8bit_adam": "test_optimizers",
    "ema_min_decay": "test_averages",
    "use_ema_warmup": "test_averages",
    "report_to": "test_a_command_line_of_that_script_runs",
    "tracker_project_name": "test_a_command_line_of_that_script_runs",
    "validation_steps": "test_a_command_line_of_that_script_runs",
}


def digits(*words) -> UnconditionalConfig:
    return parse("--bundled_data", "digits", *words)


# Parsing


def test_every_flag_is_accounted_for():
    assert len(THEIRS) == 79
    ours = {name for name in THEIRS if f"--{name}" in SHARED} | EFFECTS.keys()
    assert THEIRS.keys() == ours | OF_THE_OBJECTIVE | UNKNOWN and not EFFECTS.keys() & {name.removeprefix("--") for name in SHARED}
    assert all(test in globals() for test in EFFECTS.values())
    for name in UNKNOWN:
        with pytest.raises(UserError, match=f"unrecognized arguments: --{name}"):
            digits(f"--{name}", "x")


OURS = {name: facts for name, facts in THEIRS.items() if name not in UNKNOWN}


def consistency(*words) -> UnconditionalConfig:
    return digits("--objective", "consistency", "--curriculum_steps", "9", *words)


def test_every_flag_has_its_default_and_type():
    defaults = consistency()
    for name, facts in OURS.items():
        assert getattr(defaults, ALIASES.get(name, name)) == DIFFERENT.get(name, facts["default"]), name
    numbers = {"int": ("7", 7), "float": ("0.5", 0.5)}
    needed = {
        "num_classes": ["--class_conditional"],
        "discretization_s_1": ["--discretization_s_0", "5"],
    }
    for name, facts in OURS.items():
        if facts["type"] in numbers:
            text, value = ("7.5", 7.5) if name == "rho" else numbers[facts["type"]]
            found = getattr(consistency(*needed.get(name, []), f"--{name}", text), ALIASES.get(name, name))
            assert found == value and type(found) is type(value), name
            with pytest.raises(UserError, match=f"--{name}"):
                consistency(f"--{name}", "many")


def test_switches_need_no_value_and_choices_are_taken():
    switches = [f"--{name}" for name, facts in OURS.items() if facts.get("action") == "store_true"]
    assert len(switches) == 15
    config = consistency(*switches)
    assert all(getattr(config, switch.removeprefix("--")) is True for switch in switches)
    for name, facts in OURS.items():
        for choice in facts.get("choices", []):
            assert getattr(consistency(f"--{name}", choice), name) == choice


def test_other_names_are_the_same_flags(tmp_path):
    assert ALIASES.keys() == OURS.keys() - {item.name for item in fields(UnconditionalConfig)}
    values = {"num_train_epochs": 3, "report_to": "wandb", "interpolation_type": "box", "dataset_image_column_name": "picture"}
    for name, value in values.items():
        for config in (
            digits(f"--{name}", value),
            digits(f"--{name.replace('_', '-')}", value),
            parse_file(tmp_path, f"{name}: {value}\n"),
        ):
            assert getattr(config, ALIASES[name]) == value
            assert config == digits(f"--{ALIASES[name]}", value)
    assert digits("--num_train_epochs", 3).epochs == 3 and digits("--report_to", "none").tracker == "none"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--optimizer_type", "sgd"], "--optimizer_type: invalid choice: 'sgd' .*adamw.*radam"),
        (["--optimizer_type", "radam", "--use_8bit_adam"], "--use_8bit_adam .* --optimizer radam"),
        (["--ema_min_decay", "0.5", "--ema_max_decay", "0.4"], "--ema_min_decay 0.5 must not be above --ema_max_decay 0.4"),
        (["--num_classes", "3"], "--num_classes 3 needs --class_conditional"),
        (["--class_embed_type", "timestep"], "--class_embed_type timestep needs --class_conditional"),
        (["--class_embed_type", "identity"], "--class_embed_type: invalid choice: 'identity' .*timestep"),
        (["--interpolation_type", "box", "--crop", "adm"], "--image_interpolation_mode box: --crop adm resizes in its own way"),
        (
            ["--interpolation_type", "box", "--preserve_input_precision"],
            "--image_interpolation_mode box: --preserve_input_precision resizes",
        ),
        (["--tracker_project_name", "../x"], "--tracker_project_name ../x must be a name"),
        (["--dataset_class_label_column_name", "fine"], "--label_column names a column"),
    ],
)
def test_what_contradicts_is_one_line(words, line):
    with pytest.raises(UserError, match=line) as caught:
        digits(*words)
    assert "\n" not in str(caught.value)


def test_what_may_change_on_resume():
    free = {"scale_lr", "num_classes", "class_embed_type", "validation_steps", "tracker_project_name", "logger", "num_epochs"}
    kept = {"optimizer", "use_8bit_adam", "ema_min_decay", "use_ema_warmup", "image_interpolation_mode", "image_column"}
    assert free <= FREE_ON_RESUME and not kept & FREE_ON_RESUME


# Effects


def pictures(folder: Path, **columns: list[str]) -> Path:
    """Eight 10x12 pictures in a parquet file, with columns of classes."""
    kinds = {name: datasets.ClassLabel(names=sorted(set(values))) for name, values in columns.items()}
    noise = torch.randint(0, 256, (8, 10, 12, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    table = {"picture": [Image.fromarray(pixels) for pixels in noise.numpy()]}
    table |= {name: [kinds[name].str2int(value) for value in values] for name, values in columns.items()}
    folder.mkdir()
    features = datasets.Features({"picture": datasets.Image(), **kinds})
    datasets.Dataset.from_dict(table, features=features).to_parquet(folder / "train-0.parquet")
    return folder


def test_columns(tmp_path):
    folder = pictures(tmp_path / "data", kind=["cat", "dog"] * 4, label=[*"abcd"] * 2)
    needed = ("--train_data_dir", folder, "--cache_dir", tmp_path / "cache", "--resolution", "8", "--class_conditional")
    with pytest.raises(UserError, match=r"image_column 'image'.*picture"):
        training_source(parse(*needed), "--class_conditional")
    needed += ("--dataset_image_column_name", "picture")
    for words, names in (([], [*"abcd"]), (["label"], [*"abcd"]), (["kind"], ["cat", "dog"])):
        named = ("--dataset_class_label_column_name", *words) if words else ()
        assert list(training_source(parse(*needed, *named), "--class_conditional").class_names) == names


def test_the_default_column_of_classes_may_be_named_where_there_is_none(tmp_path):
    """As in that script, which reads it only where the network is told the class; the run is the one of the flag's default."""
    named = ("--dataset_class_label_column_name", "label")
    assert digits(*named, "--class_conditional") == digits("--class_conditional")
    needed = ("--train_data_dir", pictures(tmp_path / "data"), "--image_column", "picture", "--cache_dir", tmp_path / "cache", *named)
    assert len(training_source(parse(*needed), None)) == 8
    with pytest.raises(UserError, match="--class_conditional needs classes"):
        training_source(parse(*needed, "--class_conditional"), "--class_conditional")


def test_interpolation():
    noise = torch.randint(0, 256, (10, 12, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    image = Image.fromarray(noise.numpy())

    def pixels(*words):
        return image_transform(digits("--resolution", "8", "--center_crop", *words), 3, 0)(image, 0, 0)

    assert torch.equal(pixels(), pixels("--interpolation_type", "bilinear"))
    assert not torch.equal(pixels(), pixels("--interpolation_type", "nearest"))
    plain = torch.from_numpy(numpy.array(image.resize((9, 8), Image.Resampling.NEAREST))).permute(2, 0, 1)
    assert torch.allclose(pixels("--interpolation_type", "nearest"), plain[:, :, :8] / 127.5 - 1, atol=1e-6)


def test_classes():
    source = training_source(digits(), "--class_conditional")

    def network(*words):
        config = digits("--resolution", "8", "--model_preset", "unet-tiny", *words)
        return build_unet(network_settings(config, source, channels=1))

    assert network().class_embedding is None
    for words in ([], ["--num_classes", "10"]):
        assert isinstance(network("--class_conditional", *words).class_embedding, nn.Embedding)
    timestep = network("--class_conditional", "--class_embed_type", "timestep")
    assert type(timestep.class_embedding).__name__ == "TimestepEmbedding" and timestep.config.num_class_embeds == 10
    with pytest.raises(UserError, match="--num_classes 11, but the data has 10 classes; make them equal or leave it out"):
        network("--class_conditional", "--num_classes", "11")


def test_the_kind_of_class_embedding_overrides_the_configurations(tmp_path):
    (tmp_path / "network.json").write_text(json.dumps({**config_of(None), "class_embed_type": "identity"}))
    settings = config_of(4, str(tmp_path / "network.json"), class_embed_type="timestep")
    assert settings["class_embed_type"] == "timestep" and "class_embed_type" not in config_of(4)


def test_a_rate_that_is_scaled():
    words = ("--lr_scheduler", "constant", "--learning_rate", "0.5", "--train_batch_size", "3", "--gradient_accumulation_steps", "2")
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))])
    assert learning_rate(digits(*words), optimizer, 10, processes=2)(9) == 0.5
    assert learning_rate(digits(*words, "--scale_lr"), optimizer, 10, processes=2)(9) == 0.5 * 3 * 2 * 2


def test_optimizers(monkeypatch):
    assert type(build_optimizer(nn.Linear(1, 1), digits())) is torch.optim.AdamW
    assert type(build_optimizer(nn.Linear(1, 1), digits("--optimizer_type", "radam"))) is torch.optim.RAdam
    stand_in = SimpleNamespace(optim=SimpleNamespace(AdamW8bit=type("AdamW8bit", (torch.optim.AdamW,), {})))
    monkeypatch.setattr("immiscible.networks.optimization.find_spec", lambda name: name)
    monkeypatch.setattr("immiscible.networks.optimization.import_module", {"bitsandbytes": stand_in}.get)
    assert type(build_optimizer(nn.Linear(1, 1), digits("--use_8bit_adam"))).__name__ == "AdamW8bit"


def test_averages():
    """Warmed up to the maximum by default, whatever the least decay is said to be; without warm-up, (1 + step) / (10 + step)."""
    network = tiny_unet()

    def decays(*words):
        ema = build_ema(network, digits("--use_ema", "--ema_max_decay", "0.8", *words), CPU)
        return [ema.get_decay(step) for step in range(1, 40)]

    warm, steps = decays(), range(1, 39)
    assert warm == pytest.approx([0.0, *(min(1 - (1 + step) ** -0.75, 0.8) for step in steps)])
    assert decays("--use_ema_warmup") == decays("--ema_min_decay", "0") == warm
    assert decays("--ema_min_decay", "0.7") == [0.0, *(max(decay, 0.7) for decay in warm[1:])]
    assert decays("--ema_min_decay", "0.8") == [0.0, *[0.8] * 38]  # constant, but for the copy that the average begins with
    cold = [0.0, *(min((1 + step) / (10 + step), 0.8) for step in steps)]
    assert decays("--no_use_ema_warmup") == decays("--use_ema_warmup", "false") == pytest.approx(cold) and cold != warm


# As people call that script, without what is the objective's.
LINE = {
    "objective": "consistency",
    "discretization_s_1": 20,
    "skip_steps": 2,
    "p_std": 1.9,
    "cast_teacher": True,
    "ddpm_num_inference_steps": None,
    "bundled_data": None,
    "model_preset": None,
    "logger": None,
    "dataset_image_column_name": "picture",
    "dataset_class_label_column_name": "kind",
    "interpolation_type": "bicubic",
    "center_crop": True,
    "random_flip": True,
    "class_conditional": True,
    "num_classes": 2,
    "train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "scale_lr": True,
    "optimizer_type": "radam",
    "use_ema": True,
    "ema_min_decay": 0.5,
    "ema_max_decay": 0.99993,
    "use_ema_warmup": True,
    "max_grad_norm": 1.0,
    "allow_tf32": True,
    "gradient_checkpointing": True,
    "report_to": "tensorboard",
    "tracker_project_name": "consistency-training",
    "max_train_steps": 5,
    "validation_steps": 2,
    "checkpointing_steps": 3,
}


def line(folder: Path, output: Path, **changes) -> list[str]:
    """The command line, with a network in a file and pictures of two classes in ``folder``, made if they are not there."""
    if not folder.exists():
        pictures(folder, kind=["cat", "dog"] * 4)
        (folder.parent / "network.json").write_text(json.dumps({**config_of(None), "in_channels": 3, "out_channels": 3}))
    data = {"train_data_dir": folder, "cache_dir": folder.parent / "cache", "model_config_name_or_path": folder.parent / "network.json"}
    return tiny(output, **{**LINE, **data, **changes})


def test_a_command_line_of_that_script_runs(script, tmp_path):
    result = script(line(tmp_path / "data", tmp_path / "run"))
    assert result.code == 0, result.stderr
    assert sorted(path.name for path in (tmp_path / "run" / "samples").iterdir()) == [f"step-000000{step}.png" for step in (2, 4, 5)]
    assert list((tmp_path / "run" / "logs" / "consistency-training").rglob("events.out.tfevents.*"))
    assert (tmp_path / "run" / "unet_non_ema").is_dir() and "optimizer: radam" in (tmp_path / "run" / "config.yaml").read_text()


@pytest.mark.slow
def test_a_run_with_radam_goes_on_exactly_through_its_rectification(script, tmp_path):
    """Which sets in with the sixth step."""
    options = {"report_to": "none", "validation_steps": None, "checkpointing_steps": 4}
    assert script(line(tmp_path / "data", tmp_path / "whole", **options, max_train_steps=8)).code == 0
    assert script(line(tmp_path / "data", tmp_path / "cut", **options, max_train_steps=4)).code == 0
    again = {**options, "max_train_steps": 8, "resume_from_checkpoint": "latest"}
    refused = script(line(tmp_path / "data", tmp_path / "cut", **{**again, "optimizer_type": "adamw"}))
    assert refused.code != 0 and "--optimizer was radam, is now adamw" in refused.error
    result = script(line(tmp_path / "data", tmp_path / "cut", **again))
    assert result.code == 0, result.stderr
    assert final_hashes(tmp_path / "cut", 8) == final_hashes(tmp_path / "whole", 8)
