"""Each flag of diffusers' text-to-image examples: the same default, and something that it changes."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from launch import ROOT, flags
from tiny_text import Reached, class_folder, data_folder, model_folder, reach, tiny_text

from immiscible.configs import TextToImageConfig
from immiscible.errors import UserError
from immiscible.flags import parse_config
from immiscible.training.log import RunLog

THEIRS = json.loads((ROOT / "tests/diffusers_text_flags.json").read_text())
SCRIPTS = {"train_text_to_image.py": [], "train_text_to_image_lora.py": ["--use_lora"]}
REQUIRED = ["--pretrained_model_name_or_path", "a/model", "--dataset_name", "some/data"]


def parse(*words) -> TextToImageConfig:
    return parse_config(TextToImageConfig, [*REQUIRED, *map(str, words)], program="finetune_sd.py", description="")


# Parsing


@pytest.mark.parametrize(("script", "words"), SCRIPTS.items())
def test_every_flag_has_its_default_and_type(script, words):
    assert len(THEIRS[script]) == (57 if not words else 51)
    ours = parse(*words)
    for name, facts in THEIRS[script].items():
        if name not in ("pretrained_model_name_or_path", "dataset_name"):
            assert getattr(ours, name) == facts["default"], name
    numbers = {"int": ("7", 7), "float": ("0.5", 0.5)}
    for name, facts in THEIRS[script].items():
        if facts["type"] in numbers:
            text, value = numbers[facts["type"]]
            needed = {"dream_detail_preservation": ["--dream_training"]}.get(name, [])
            found = getattr(parse(*words, *needed, f"--{name}", text), name)
            assert found == value and type(found) is type(value), name
            with pytest.raises(UserError, match=name):
                parse(*words, f"--{name}", "many")


@pytest.mark.parametrize(("script", "words"), SCRIPTS.items())
def test_switches_need_no_value_and_choices_are_taken(script, words):
    switches = [f"--{name}" for name, facts in THEIRS[script].items() if facts.get("action") == "store_true"]
    assert len(switches) == (12 if not words else 8)
    config = parse(*words, *switches)
    assert all(getattr(config, switch.removeprefix("--")) is True for switch in switches)
    for name, facts in THEIRS[script].items():
        for choice in facts.get("choices", []):
            assert getattr(parse(*words, f"--{name}", choice), name) == choice


def test_the_checkpoint_and_data_are_required():
    for words, name in ((REQUIRED[:2], "dataset_name"), (REQUIRED[2:], "pretrained_model_name_or_path")):
        with pytest.raises(UserError, match=f"{name}.* required"):
            parse_config(TextToImageConfig, words, program="", description="")


def test_several_prompts_follow_one_flag():
    assert parse("--validation_prompts", "a cat", "two dogs").prompts == ["a cat", "two dogs"]
    assert parse("--validation_prompt", "a cat", "--num_validation_images", 3).prompts == ["a cat"] * 3


@pytest.mark.parametrize(
    "words", [["--validation_steps", 0], ["--validation_inference_steps", 0], ["--eval_steps", 1, "--eval_inference_steps", 0]]
)
def test_counts_begin_at_one(words):
    with pytest.raises(UserError, match=f"{words[-2]}.* at least 1"):
        parse(*words)


# Effects


def losses(reached: Reached) -> Any:
    return reached.losses


def pixels_or_latents(reached: Reached) -> Any:
    return reached.pairs[0].x0.tolist()


def rates(reached: Reached) -> Any:
    return [reached.learning_rate(step) for step in range(8)]


def adam(name: str) -> Callable[[Reached], Any]:
    return lambda reached: reached.optimizer.param_groups[0][name]


def option(name: str) -> Callable[[Reached], Any]:
    return lambda reached: reached.options[name]


def average(what: Callable[[Any], Any]) -> Callable[[Reached], Any]:
    return lambda reached: None if reached.ema is None else what(reached.ema)


def network(what: Callable[[Any], Any]) -> Callable[[Reached], Any]:
    return lambda reached: what(reached.accelerator.unwrap_model(reached.model))


@dataclass(frozen=True)
class Row:
    """``value`` for the flag, with ``needed`` others, changes what ``seen`` returns, after ``steps`` optimizer steps.

    Flags that show in one attribute each are set ``together`` in one run.
    """

    value: Any
    seen: Callable[[Reached], Any]
    needed: tuple[tuple[str, Any], ...] = ()
    steps: int = 0
    wanted: Any = None
    together: bool = False


def attribute(value: Any, seen: Callable[[Reached], Any], wanted: Any) -> Row:
    return Row(value, seen, wanted=wanted, steps=1, together=True)


def rank(reached: Reached) -> int:
    unet = reached.accelerator.unwrap_model(reached.model)
    return next(value for name, value in unet.named_parameters() if "lora_A" in name).shape[0]


# What the training loop is given, or what its first steps do.
ROWS = {
    "input_perturbation": Row(0.5, losses, steps=1),
    "noise_offset": Row(0.5, losses, steps=1),
    "snr_gamma": Row(1.0, losses, steps=1),
    "dream_training": Row(True, losses, steps=1),
    "dream_detail_preservation": Row(3.0, losses, (("dream_training", True),), steps=1),
    "prediction_type": Row("v_prediction", losses, steps=1),
    "mixed_precision": Row("bf16", losses, steps=1),
    "seed": Row(1, losses, steps=1),
    "center_crop": Row(True, pixels_or_latents, steps=1),
    "random_flip": Row(True, pixels_or_latents, steps=1),
    "image_interpolation_mode": Row("nearest", pixels_or_latents, steps=1),
    "resolution": attribute(16, lambda reached: reached.pairs[0].x0.shape[-1], 2),
    "train_batch_size": attribute(2, lambda reached: len(reached.pairs[0].x0), 2),
    "gradient_accumulation_steps": attribute(2, lambda reached: len(reached.pairs), 2),
    "learning_rate": Row(0.5, rates, wanted=[0.5] * 8),
    "scale_lr": Row(True, rates, wanted=[4e-3] * 8),
    "lr_scheduler": Row("linear", rates, wanted=[1e-3 * max(0, 1 - step / 4) for step in range(8)]),
    "lr_warmup_steps": Row(8, rates, (("lr_scheduler", "constant_with_warmup"),), wanted=[1e-3 * step / 8 for step in range(8)]),
    "max_grad_norm": attribute(0.1, lambda reached: round(reached.grad_norms[0], 5), 0.1),
    "max_train_steps": attribute(7, option("max_steps"), 7),
    "num_train_epochs": Row(3, option("max_steps"), (("max_train_steps", None),), wanted=12),
    "max_train_samples": Row(8, option("max_steps"), (("max_train_steps", None), ("num_train_epochs", 1)), wanted=2),
    "adam_beta1": attribute(0.5, lambda reached: adam("betas")(reached)[0], 0.5),
    "adam_beta2": attribute(0.25, lambda reached: adam("betas")(reached)[1], 0.25),
    "adam_weight_decay": attribute(0.5, adam("weight_decay"), 0.5),
    "adam_epsilon": attribute(0.5, adam("eps"), 0.5),
    "use_ema": attribute(True, lambda reached: reached.ema is not None, True),
    "foreach_ema": attribute(True, average(lambda ema: ema.foreach), True),
    "offload_ema": attribute(True, average(lambda ema: type(ema).__name__), "OffloadedEMA"),
    "gradient_checkpointing": attribute(True, network(lambda unet: unet.is_gradient_checkpointing), True),
    "rank": Row(2, rank, (("use_lora", True),), wanted=2),
}
# Flags whose effect is a file, a message or a call, and the test that shows it; the last two say what they would take.
ELSEWHERE = {
    "pretrained_model_name_or_path": "test_where_models_and_data_come_from",
    "revision": "test_revisions_and_cache_reach_the_hub",
    "non_ema_revision": "test_revisions_and_cache_reach_the_hub",
    "cache_dir": "test_revisions_and_cache_reach_the_hub",
    "variant": "test_variant",
    "dataset_name": "test_where_models_and_data_come_from",
    "dataset_config_name": "test_where_models_and_data_come_from",
    "train_data_dir": "test_where_models_and_data_come_from",
    "image_column": "test_columns",
    "caption_column": "test_columns",
    "dataloader_num_workers": "test_loader_processes",
    "allow_tf32": "test_session_flags",
    "local_rank": "test_session_flags",
    "output_dir": "test_files_of_a_run",
    "logging_dir": "test_files_of_a_run",
    "report_to": "test_files_of_a_run",
    "tracker_project_name": "test_files_of_a_run",
    "checkpointing_steps": "test_files_of_a_run",
    "checkpoints_total_limit": "test_files_of_a_run",
    "resume_from_checkpoint": "test_files_of_a_run",
    "validation_prompts": "test_files_of_a_run",
    "validation_prompt": "test_several_prompts_follow_one_flag",
    "num_validation_images": "test_several_prompts_follow_one_flag",
    "validation_epochs": "test_files_of_a_run",
    "push_to_hub": "test_push_without_a_network",  # what is sent: tests/test_text_runs.py
    "hub_model_id": "test_push_without_a_network",
    "hub_token": "test_push_without_a_network",
    "use_8bit_adam": "test_8bit_adam",  # would take bitsandbytes and a GPU; here its optimizer is a stand-in
    "enable_xformers_memory_efficient_attention": "test_xformers",  # would take xformers and a GPU; here its absence is one line
}


def test_every_flag_has_a_row():
    theirs = {name for flags_of in THEIRS.values() for name in flags_of}
    assert theirs == ROWS.keys() | ELSEWHERE.keys() and not ROWS.keys() & ELSEWHERE.keys()
    assert all(test in globals() for test in ELSEWHERE.values())


_RUNS: dict[Any, Reached] = {}


@pytest.mark.parametrize(("name", "row"), ROWS.items(), ids=ROWS.keys())
def test_a_flag_changes_what_it_should(monkeypatch, tmp_path, name, row):
    def run(changes: dict[str, Any]) -> Reached:
        key = (*changes.items(), row.steps)
        if key not in _RUNS:
            _RUNS[key] = reach(monkeypatch, tiny_text(tmp_path / "run", **changes), steps=row.steps)
        return _RUNS[key]

    values = {other: same.value for other, same in ROWS.items() if same.together} if row.together else {name: row.value}
    changed = row.seen(run({**dict(row.needed), **values}))
    assert changed != row.seen(run(dict(row.needed)))
    if row.wanted is not None:
        assert changed == pytest.approx(row.wanted) if isinstance(row.wanted, list) else changed == row.wanted
    assert not (tmp_path / "run").exists()


def test_where_models_and_data_come_from(monkeypatch, tmp_path):
    first = reach(monkeypatch, tiny_text(tmp_path / "run"))
    other = reach(monkeypatch, tiny_text(tmp_path / "run", pretrained_model_name_or_path=model_folder(2)))
    assert first.objective.prediction_type == "epsilon" and other.objective.prediction_type == "v_prediction"
    by_name = tiny_text(
        tmp_path / "run", dataset_name=data_folder(8), dataset_config_name="default", max_train_steps=None, num_train_epochs=1
    )
    assert reach(monkeypatch, by_name).max_steps == 2
    folder = tiny_text(tmp_path / "run", train_data_dir=data_folder(8), max_train_steps=None, num_train_epochs=1)
    assert reach(monkeypatch, folder).max_steps == 2


def test_the_configuration_of_a_data_set_is_asked_for(monkeypatch, tmp_path):
    import datasets

    calls = []

    def load(*words, **options):
        calls.append(words)
        raise FileNotFoundError("no network")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(UserError, match="some/data"):
        reach(monkeypatch, tiny_text(tmp_path / "run", dataset_name="some/data", dataset_config_name="large"))
    assert calls == [("some/data", "large")]


def test_revisions_and_cache_reach_the_hub(monkeypatch, tmp_path):
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    calls = {}
    for part in (AutoencoderKL, DDPMScheduler, UNet2DConditionModel, CLIPTextModel, CLIPTokenizer):

        def load(name, *, _part=part.__name__, _load=part.from_pretrained, **options):
            calls[_part] = options
            return _load(name, **options)

        monkeypatch.setattr(part, "from_pretrained", load)
    data = {"train_data_dir": class_folder(tmp_path / "parquet", ["a", "b"]), "caption_column": "kind"}  # its table is kept in the cache
    common = {"revision": "first", "non_ema_revision": "second", "cache_dir": tmp_path / "cache"}
    reach(monkeypatch, tiny_text(tmp_path / "run", **common, **data))
    assert len(calls) == 5
    assert {part: options["revision"] for part, options in calls.items()} == {
        part: "second" if part == "UNet2DConditionModel" else "first" for part in calls
    }
    assert all(options["cache_dir"] == str(tmp_path / "cache") for options in calls.values())
    assert (tmp_path / "cache").is_dir()  # the table of images


def test_variant(monkeypatch, tmp_path):
    """A checkpoint that has its weights as a variant only loads with the flag, the U-Net too (diffusers' script forgets it)."""
    copy = shutil.copytree(model_folder(), tmp_path / "model")
    for path in [*copy.rglob("*.safetensors")]:
        path.rename(path.with_name(path.name.replace(".safetensors", ".fp16.safetensors")))
    with pytest.raises(UserError, match="cannot be loaded"):
        reach(monkeypatch, tiny_text(tmp_path / "run", pretrained_model_name_or_path=copy))
    reached = reach(monkeypatch, tiny_text(tmp_path / "run", pretrained_model_name_or_path=copy, variant="fp16"))
    plain = reach(monkeypatch, tiny_text(tmp_path / "run"))
    assert all(torch.equal(value, plain.before[name]) for name, value in reached.before.items())


def test_columns(monkeypatch, tmp_path):
    import datasets
    from PIL import Image

    table = {"picture": [Image.new("RGB", (32, 32), (n * 10, 0, 0)) for n in range(8)], "says": [f"number {n}" for n in range(8)]}
    (tmp_path / "data").mkdir()
    features = datasets.Features({"picture": datasets.Image(), "says": datasets.Value("string")})
    datasets.Dataset.from_dict(table, features=features).to_parquet(tmp_path / "data" / "train-0.parquet")
    common = {"train_data_dir": tmp_path / "data"}
    for given, missing in ({}, "image_column 'image'"), ({"image_column": "picture"}, "caption_column 'text'"):
        with pytest.raises(UserError, match=f"{missing}.*picture"):
            reach(monkeypatch, tiny_text(tmp_path / "run", **common, **given))
    reach(monkeypatch, tiny_text(tmp_path / "run", **common, image_column="picture", caption_column="says"), steps=1)


def test_loader_processes(monkeypatch, tmp_path):
    import immiscible.training.run as life

    loaders, build = [], life.build_loader
    monkeypatch.setattr(life, "build_loader", lambda *arguments: loaders.append(build(*arguments)) or loaders[-1])
    for count in (0, 3):
        reach(monkeypatch, tiny_text(tmp_path / "run", dataloader_num_workers=count))
    assert [loader.num_workers for loader in loaders] == [0, 3]


def test_session_flags(monkeypatch):
    import accelerate

    from immiscible.training.session import session

    class Enough(Exception):
        pass

    def accelerator(**options):
        raise Enough

    monkeypatch.setattr(accelerate, "Accelerator", accelerator)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "taken out in the next line and put back as it was at the end")
    monkeypatch.delenv("LOCAL_RANK")
    backends = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [backend.allow_tf32 for backend in backends]
    try:
        for backend in backends:
            backend.allow_tf32 = False
        for words, tf32, local_rank in (([], False, None), (["--allow_tf32", "--local_rank", 1], True, "1")):
            with pytest.raises(Enough), session(parse(*words)):
                pass
            assert [backend.allow_tf32 for backend in backends] == [tf32, tf32]
            assert os.environ.get("LOCAL_RANK") == local_rank
    finally:
        for backend, value in zip(backends, before, strict=True):
            backend.allow_tf32 = value


def test_files_of_a_run(script, tmp_path):
    """Checkpoints, logs and samples are where and as many as the flags say, and a run goes on from the step it is told."""
    common = {
        "checkpointing_steps": 2,
        "checkpoints_total_limit": 2,
        "logging_dir": "mine",
        "report_to": "tensorboard",
        "tracker_project_name": "project",
        "validation_prompts": ["a cat", "two dogs"],
        "validation_epochs": 2,  # of two steps each
        "train_data_dir": data_folder(8),
    }
    folder = tmp_path / "run"
    result = script(tiny_text(folder, **common, max_train_steps=7), program="finetune_sd.py")
    assert result.code == 0, result.stderr
    assert {path.name for path in folder.glob("checkpoint-*")} == {"checkpoint-6", "checkpoint-7"}
    assert list((folder / "mine" / "project").rglob("events.out.tfevents.*")) and not (folder / "logs").exists()
    assert sorted(path.name for path in (folder / "samples").iterdir()) == ["step-0000004.png", "step-0000007.png"]
    assert shown_images(folder / "mine" / "project") == {4: 2, 7: 2}
    again = {**common, "resume_from_checkpoint": "checkpoint-7", "checkpoints_total_limit": None, "validation_steps": 3}
    result = script(tiny_text(folder, **again, max_train_steps=10), program="finetune_sd.py")
    assert result.code == 0 and "7 to 10" in result.stderr, result.stderr
    assert {path.name for path in folder.glob("checkpoint-*")} == {f"checkpoint-{step}" for step in (6, 7, 8, 10)}
    assert {path.name for path in (folder / "samples").iterdir()} == {f"step-{step:07}.png" for step in (4, 7, 9, 10)}


def shown_images(folder: Path) -> dict[int, int]:
    """How many images tensorboard shows of which step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"images": 0}).Reload()
    return {event.step: event.height // 32 * (event.width // 32) for event in events.Images("validation")}


def test_wandb_is_given_the_samples():
    shown = []
    wandb = SimpleNamespace(name="wandb", log_images=lambda values, step: shown.append((values, step)))
    other = SimpleNamespace(name="mlflow")
    log = SimpleNamespace(_accelerator=SimpleNamespace(trackers=[other, wandb]))
    RunLog.add_images(log, "validation", numpy.zeros((2, 32, 32, 3), numpy.uint8), 7)
    ((values, step),) = shown
    assert step == 7 and [image.shape for image in values["validation"]] == [(32, 32, 3)] * 2


@pytest.mark.parametrize("tracker", ["all", "none"])
def test_trackers(script, tmp_path, tracker):
    result = script(tiny_text(tmp_path / "run", report_to=tracker, max_train_steps=1), program="train_text_to_image.py")
    assert result.code == 0, result.stderr
    assert (tmp_path / "run" / "metrics.jsonl").exists() and (tmp_path / "run" / "logs").exists() == (tracker == "all")


def test_trackers_that_are_not_there(monkeypatch, tmp_path):
    from accelerate import tracking

    with pytest.raises(UserError, match=r"--report_to 'paper' is unknown; known: all, .*tensorboard.*none"):
        reach(monkeypatch, tiny_text(tmp_path / "run", report_to="paper"))
    monkeypatch.setattr(tracking, "_available_trackers", [])
    with pytest.raises(UserError, match="--report_to wandb is not installed"):
        reach(monkeypatch, tiny_text(tmp_path / "run", report_to="wandb"))


def test_push_without_a_network(script, tmp_path):
    words = tiny_text(tmp_path / "run", push_to_hub=True, hub_token="hf_secret", hub_model_id="someone/thing", max_train_steps=1)
    result = script(words, program="finetune_sd.py")
    assert result.code == 1 and "--push_to_hub" in result.error and not (tmp_path / "run").exists()  # before the training, as diffusers
    assert "hf_secret" not in result.stderr + result.stdout
    assert parse(*flags({"push_to_hub": True, "hub_model_id": "someone/thing"})).hub_model_id == "someone/thing"


def test_8bit_adam(monkeypatch, tmp_path):
    import importlib.util

    words = tiny_text(tmp_path / "run", use_8bit_adam=True)
    if importlib.util.find_spec("bitsandbytes") is None:
        with pytest.raises(UserError, match="--use_8bit_adam needs bitsandbytes"):
            reach(monkeypatch, words)
    (tmp_path / "bitsandbytes").mkdir()
    stand_in = "import torch\nclass optim:\n    class AdamW8bit(torch.optim.AdamW):\n        pass\n"
    (tmp_path / "bitsandbytes" / "__init__.py").write_text(stand_in)
    monkeypatch.syspath_prepend(tmp_path)
    try:
        assert type(reach(monkeypatch, words).optimizer.optimizer).__name__ == "AdamW8bit"
    finally:
        sys.modules.pop("bitsandbytes", None)  # which other tests would take for the real one


def test_xformers(monkeypatch, tmp_path):
    import importlib.util

    if importlib.util.find_spec("xformers") is not None:
        pytest.skip("xformers is installed")
    with pytest.raises(UserError, match="xformers is not installed"):
        reach(monkeypatch, tiny_text(tmp_path / "run", enable_xformers_memory_efficient_attention=True))
