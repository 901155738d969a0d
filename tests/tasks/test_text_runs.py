"""What ``train_text_to_image.py`` and ``finetune_sd.py`` leave behind, run as a user runs them, and what they refuse."""

import hashlib
import json
import re
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch
import yaml
from launch import run_command
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_text import ADAPTERS, FINETUNE, SCRATCH, WEIGHTS, data_folder, model_folder, reach, tiny_text

from immiscible.configs import TextToImageConfig
from immiscible.errors import UserError
from immiscible.randomness import seeded_generator
from immiscible.training.folder import run_identity


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def trained(script, folder: Path, program: str = FINETUNE, **changes) -> Path:
    result = script(tiny_text(folder, **changes), program=program)
    assert result.code == 0, result.stderr
    return folder


# What a run leaves


SAMPLE = """
import json, sys, warnings
import torch
from diffusers import StableDiffusionPipeline
torch.set_num_threads(1)
base, adapters, *folders = sys.argv[1:]
found = {}
def sample(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipeline("a cat", num_inference_steps=3, generator=generator, output_type="np").images[0]  # at its own size
for folder in folders:
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    dtypes = {str(part.dtype) for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder)}
    trained = [pipeline.scheduler.config.prediction_type, pipeline.unet.config.sample_size]
    found[folder] = [list(sample(pipeline).shape), sorted(dtypes), *trained]
pipeline = StableDiffusionPipeline.from_pretrained(base)
before = sample(pipeline)
pipeline.load_lora_weights(adapters)
found["adapters"] = float(abs(sample(pipeline) - before).max())
assert "immiscible" not in sys.modules
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def runs(script, tmp_path_factory):
    """A run of each kind: from scratch with an average, and in bf16 to predict x0; fine-tuned in bf16 to predict v; adapters in bf16."""
    folder = tmp_path_factory.mktemp("text")
    common = {"checkpointing_steps": 2, "max_train_steps": 3, "validation_prompts": ["a cat", "a dog", "two dogs"]}
    trained(script, folder / "scratch", SCRATCH, **common, use_ema=True, noise_coupling="assignment")
    bf16 = {**common, "mixed_precision": "bf16"}
    trained(script, folder / "tuned", **bf16, prediction_type="v_prediction", learning_rate=1e-2)
    sample = {"max_train_steps": 1, "prediction_type": "sample", "mixed_precision": "bf16", "validation_prompts": ["a cat"]}
    trained(script, folder / "images", SCRATCH, **sample)
    trained(script, folder / "adapters", **bf16, use_lora=True, learning_rate=1.0)
    return folder


@pytest.mark.slow
def test_plain_diffusers_samples_what_is_left(runs):
    folders = [runs / name for name in ("scratch", "tuned", "images")]
    result = run_command([sys.executable, "-c", SAMPLE, model_folder(), runs / "adapters", *folders], PYTHONSAFEPATH="1")
    assert result.code == 0, result.stderr
    found = json.loads(result.stdout)
    for folder, prediction_type in zip(folders, ("epsilon", "v_prediction", "sample"), strict=True):
        assert found[str(folder)] == [[32, 32, 3], ["torch.float32"], prediction_type, 4]
    assert found["adapters"] > 1e-3


def test_a_run_leaves_checkpoints_grids_and_its_pipeline(runs):
    for name in ("scratch", "tuned", "adapters"):
        assert {path.name for path in (runs / name).glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-3"}
        with Image.open(runs / name / "samples" / "step-0000003.png") as grid:
            assert grid.size == (128, 128)  # three samples of 32 pixels, enlarged to 64, in two rows
            pixels = numpy.asarray(grid)
            assert (pixels[::2, ::2] == pixels[1::2, 1::2]).all()  # not of 64 pixels, which is the checkpoint's own size
        summary = json.loads((runs / name / "summary.json").read_text())
        assert summary["step"] == 3 and summary["initial_weights"].startswith("random" if name == "scratch" else "those of ")
        card = (runs / name / "README.md").read_text().replace("\\", "")  # a folder's random name may hold what Markdown escapes
        assert summary["initial_weights"] in card
    average, last = (load_file(runs / "scratch" / "checkpoint-3" / kind / WEIGHTS) for kind in ("unet_ema", "unet"))
    saved = load_file(runs / "scratch" / "unet" / WEIGHTS)
    assert all(torch.equal(saved[name], average[name]) for name in saved)
    assert any(not torch.equal(saved[name], last[name]) for name in saved)
    for part in ("vae", "text_encoder"):  # exactly the checkpoint's, also after a run in bf16
        (one,), (other,) = ([*(folder / part).glob("*.safetensors")] for folder in (model_folder(), runs / "tuned"))
        one, other = load_file(one), load_file(other)
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert {path.name for path in (runs / "adapters").glob("*.safetensors")} == {ADAPTERS}
    assert {path.name for path in (runs / "adapters" / "checkpoint-3").glob("*.safetensors")} == {ADAPTERS}
    adapters = load_file(runs / "adapters" / ADAPTERS)
    assert {value.dtype for value in adapters.values()} == {torch.float32} and all(name.startswith("unet.") for name in adapters)
    card = (runs / "adapters" / "README.md").read_text()
    assert "load_lora_weights" in card and "height=32, width=32" in card and "](samples/step-0000003.png)" in card
    assert "base_model" not in card  # a folder here is no name on the hub, which would refuse the card
    for file, coupling in (
        (runs / "adapters" / ADAPTERS, "independent"),
        (runs / "scratch" / "unet" / WEIGHTS, "assignment (l2, cost in auto)"),
    ):
        with safe_open(file, framework="pt") as weights:
            assert weights.metadata()["immiscible.noise_coupling"] == coupling
    assert not (runs / "adapters" / "model_index.json").exists()


def test_the_saved_pipeline_samples_what_the_grid_shows(runs):
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(runs / "scratch")
    image = pipeline("a cat", generator=seeded_generator(0, "sample", 0), num_inference_steps=2, output_type="np").images[0]
    with Image.open(runs / "scratch" / "samples" / "step-0000003.png") as grid:
        shown = numpy.asarray(grid)[:64:2, :64:2]
    assert image.shape == shown.shape and numpy.abs(255 * image - shown).max() <= 1


def test_the_card_says_how_to_sample(monkeypatch, tmp_path):
    task = reach(monkeypatch, tiny_text(tmp_path / "run", use_lora=True)).task
    card = str(replace(task, parts=replace(task.parts, name="some/model")).card("title", {}, None))
    assert "base_model: some/model\n" in card and "register_to_config" not in card
    other = reach(monkeypatch, tiny_text(tmp_path / "run", use_lora=True, prediction_type="v_prediction")).task
    assert 'pipeline.scheduler.register_to_config(prediction_type="v_prediction")' in str(other.card("title", {}, None))


@pytest.mark.slow
def test_config_yaml_restarts_the_run(script, runs, tmp_path):
    for name, program in (("scratch", SCRATCH), ("adapters", FINETUNE)):
        result = script(["--config", runs / name / "config.yaml", "--output_dir", tmp_path / name], program=program)
        assert result.code == 0, result.stderr
        assert final_hashes(tmp_path / name, 3) == final_hashes(runs / name, 3)
    assert yaml.safe_load((runs / "tuned" / "config.yaml").read_text())["validation_prompts"] == ["a cat", "a dog", "two dogs"]


def final_hashes(folder: Path, step: int) -> dict[str, str]:
    files = sorted((folder / f"checkpoint-{step}").rglob("*.safetensors"))
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"use_ema": True, "offload_ema": True}, {"use_lora": True}], ids=["full", "adapters"])
def test_killed_and_resumed_is_never_killed(script, tmp_path, changes):
    common = {
        **changes,
        "checkpointing_steps": 2,
        "max_train_steps": 9,
        "gradient_accumulation_steps": 2,
        "random_flip": True,
        "proportion_empty_prompts": 0.2,
        "noise_coupling": "assignment",
        "coupling_window": 3,  # the checkpoints of steps 2 and 4 lie within one
        "lr_scheduler": "cosine",
        "resume_from_checkpoint": "latest",
        "mixed_precision": "bf16",
    }
    trained(script, tmp_path / "whole", **common)
    run = script.start(tiny_text(tmp_path / "run", **common), program=FINETUNE)
    lines = tmp_path / "run" / "metrics.jsonl"
    run.wait_until(lambda: lines.exists() and lines.read_text().count("\n") >= 5)
    run.send_group(signal.SIGKILL)
    assert run.wait().code == 128 + signal.SIGKILL and not (tmp_path / "run" / "summary.json").exists()
    trained(script, tmp_path / "run", **common)
    whole = final_hashes(tmp_path / "whole", 9)
    assert final_hashes(tmp_path / "run", 9) == whole and len(whole) == (2 if "use_ema" in changes else 1)
    assert [line["step"] for line in metrics(tmp_path / "run")] == list(range(1, 10))
    assert [line["loss"] for line in metrics(tmp_path / "run")] == [line["loss"] for line in metrics(tmp_path / "whole")]


@pytest.mark.slow
def test_resume_from_elsewhere_and_never_beyond_the_last_step(script, runs, tmp_path):
    """A path outside the run's folder goes on, foreign names are left alone, and a finished run takes no step."""
    folder = tmp_path / "run"
    for name in ("checkpoint-foo", "checkpoint-2-backup", "checkpoint"):
        (folder / name).mkdir(parents=True)
    common = {"checkpointing_steps": 2, "checkpoints_total_limit": 1, "use_lora": True, "mixed_precision": "bf16", "learning_rate": 1.0}
    trained(script, folder, **common, max_train_steps=5, resume_from_checkpoint=runs / "adapters" / "checkpoint-2")
    assert {path.name for path in folder.glob("checkpoint*")} == {"checkpoint-foo", "checkpoint-2-backup", "checkpoint", "checkpoint-5"}
    assert [line["step"] for line in metrics(folder)] == [3, 4, 5]
    assert metrics(folder)[0]["loss"] == metrics(runs / "adapters")[2]["loss"]
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    result = script(tiny_text(folder, **common, max_train_steps=5, resume_from_checkpoint="latest"), program=FINETUNE)
    assert result.code == 0 and "no step taken" in result.stderr
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


@pytest.mark.slow
def test_two_processes_with_half_the_batch_give_the_losses_of_one(script, tmp_path):
    common = {"max_train_steps": 10, "proportion_empty_prompts": 0.2, "random_flip": True, "train_data_dir": data_folder(32)}
    trained(script, tmp_path / "one", **common, train_batch_size=8)
    ranks = script.start_ranks(tiny_text(tmp_path / "two", **common, train_batch_size=4), program=FINETUNE)
    results = [run.wait() for run in ranks]
    assert [result.code for result in results] == [0, 0], results
    one, two = ([line["loss"] for line in metrics(tmp_path / name)] for name in ("one", "two"))
    assert len(one) == 10 and two == pytest.approx(one, rel=1e-5) and len(set(one)) == 10
    assert "4 images x 2 processes" in results[0].stderr


@pytest.mark.slow
def test_samples_have_the_runs_resolution_however_old_the_checkpoint_is(script, tmp_path):
    """diffusers takes sizes below 512 pixels for a mistake in configurations as old as Stable Diffusion 1.4's."""
    model = edited(tmp_path / "model", "unet", _diffusers_version="0.2.2")
    measured = {"validation_prompts": ["a cat"], "eval_steps": 1, "eval_samples": 2, "eval_inference_steps": 1}
    measured["eval_guidance_scales"] = [1, 7.5]
    measured["eval_data_dir"] = data_folder(8)
    folder = trained(script, tmp_path / "run", pretrained_model_name_or_path=model, max_train_steps=1, **measured)
    with Image.open(folder / "samples" / "step-0000001.png") as grid:
        assert grid.size == (64, 64)  # a sample of 32 pixels, enlarged
    assert json.loads((folder / "unet" / "config.json").read_text())["sample_size"] == 4
    [line] = [json.loads(text) for text in (folder / "evaluation.jsonl").read_text().splitlines()]
    assert line["told"] == "the captions of column text, without guidance" and line["held_out_images"] == 8
    assert line["frechet_distance"].keys() == line["frechet_distance_guided"]["7.5"].keys() == {"1"}
    assert line["frechet_distance"] != line["frechet_distance_guided"]["7.5"]


# Hub


@pytest.mark.parametrize(("name", "private"), [("scratch", True), ("adapters", False)])
def test_push_to_hub(runs, monkeypatch, tmp_path, name, private):
    """With prompts and without, private stays private, and no checkpoint is sent."""
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    from immiscible.configs import TextToImageConfig
    from immiscible.training.cards import push_pipeline

    folder = shutil.copytree(runs / name, tmp_path / "model")
    if name == "adapters":
        shutil.rmtree(folder / "samples")
    calls = {}

    def create_repo(repository, **options):
        calls["create"] = (repository, options)
        return huggingface_hub.RepoUrl("https://huggingface.co/someone/model")

    monkeypatch.setattr(huggingface_hub, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub, "upload_folder", lambda **options: calls.update(upload=options))
    push_pipeline(TextToImageConfig(output_dir=str(folder), hub_token="hf_x", hub_private_repo=private), 3)
    repository, options = calls["create"]
    # None leaves it to the owner's settings, which may be private; it never makes a repository public.
    assert repository == "model" and options["private"] is (True if private else None) and options["token"] == "hf_x"
    files = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    sent = set(filter_repo_objects(files, allow_patterns=calls["upload"]["allow_patterns"]))
    weights = {f"unet/{WEIGHTS}", f"vae/{WEIGHTS}", "text_encoder/model.safetensors", "model_index.json", "tokenizer/tokenizer_config.json"}
    assert sent >= ({ADAPTERS} if name == "adapters" else weights) | {"README.md", "config.yaml"}
    assert not any(file.startswith(("checkpoint", "logs", ".")) for file in sent)
    assert (name == "scratch") == any(file.startswith("samples/") for file in sent)


# What the scripts refuse


def edited(folder: Path, part: str = "", **changes) -> Path:
    """A copy of the checkpoint with other entries in a part's configuration, or in the pipeline's."""
    shutil.copytree(model_folder(), folder)
    path = folder / part / "config.json" if part else folder / "model_index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


FOREIGN = {
    "KolorsPipeline": {"text_encoder_2": ["transformers", "CLIPTextModelWithProjection"]},
    "FluxPipeline": {"transformer": ["diffusers", "FluxTransformer2DModel"], "unet": None},
}


@pytest.mark.parametrize(("name", "parts"), FOREIGN.items(), ids=FOREIGN.keys())
def test_other_families_are_one_line(monkeypatch, tmp_path, name, parts):
    model = edited(tmp_path / "model", _class_name=name, **parts)
    with pytest.raises(UserError, match=f"model is a {name}; trained here are StableDiffusionPipeline.* needs a class of its own"):
        reach(monkeypatch, tiny_text(tmp_path / "run", pretrained_model_name_or_path=model))


@pytest.mark.parametrize("part", ["unet", "vae", "tokenizer", "text_encoder", "scheduler"])
def test_a_checkpoint_without_a_part_is_one_line(monkeypatch, tmp_path, part):
    unnamed, incomplete = edited(tmp_path / "unnamed", **{part: [None, None]}), edited(tmp_path / "incomplete")
    shutil.rmtree(incomplete / part)
    for model in (unnamed, incomplete):
        with pytest.raises(UserError, match=f"without {part}"):
            reach(monkeypatch, tiny_text(tmp_path / "run", pretrained_model_name_or_path=model))


@pytest.mark.parametrize(("part", "width"), [("unet", "cross_attention_dim"), ("vae", "latent_channels"), ("text_encoder", "hidden_size")])
def test_broken_weights_are_one_line(monkeypatch, tmp_path, part, width):
    """A file cut short by a download, and weights that are not of the configuration beside them."""
    short, other = edited(tmp_path / "short"), edited(tmp_path / "other", part, **{width: 16})
    (weights,) = (short / part).glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:1000])
    for model in (short, other):
        with pytest.raises(UserError, match="cannot be loaded"):
            reach(monkeypatch, tiny_text(tmp_path / "run", pretrained_model_name_or_path=model))


BAD = {
    "adapters from scratch": ({"use_lora": True}, True, "--use_lora adapts pretrained weights.*finetune_sd.py"),
    "adapters of a transformer": ({"use_lora": True, "model_preset": "dit-tiny"}, False, "--use_lora adapts pretrained weights"),
    "tuned transformer": ({"model_preset": "dit-tiny"}, False, "--model_preset dit-tiny begins with random weights; use train_text"),
    "revision of no unet": ({"model_preset": "dit-tiny", "non_ema_revision": "a"}, True, "--non_ema_revision is of the checkpoint's U-Net"),
    "patches": ({"model_preset": "dit-tiny", "resolution": 40}, True, "--resolution 40 must be a multiple of 16"),
    "size": ({"resolution": 36}, False, "--resolution 36 must be a multiple of 8"),
    "both prompts": ({"validation_prompt": "a", "validation_prompts": ["b"]}, False, "choose one"),
    "average of adapters": ({"use_lora": True, "use_ema": True}, False, "--use_ema averages the whole U-Net"),
    "few images": ({"train_batch_size": 17, "noise_coupling": "assignment"}, False, "16 images do not fill a batch of 17"),
    "no model": ({"pretrained_model_name_or_path": "some/where"}, False, "no diffusers checkpoint found"),
}


@pytest.mark.parametrize(("changes", "from_scratch", "wanted"), BAD.values(), ids=BAD.keys())
def test_bad_flags_are_one_line(script, tmp_path, changes, from_scratch, wanted):
    result = script(tiny_text(tmp_path / "run", **changes), program=SCRATCH if from_scratch else FINETUNE)
    assert result.code in (1, 2) and re.search(wanted, result.error), result.stderr
    assert not (tmp_path / "run").exists()


def test_parts_that_cannot_work_together_are_one_line(monkeypatch, tmp_path):
    wide = edited(tmp_path / "wide", "unet", cross_attention_dim=48)
    wordless = edited(tmp_path / "wordless")
    (wordless / "tokenizer" / "tokenizer.json").unlink()
    sampler = edited(tmp_path / "sampler", scheduler=["mine", "MyScheduler"])
    for model, wanted in ((wide, "takes text states of width 48"), (wordless, "knows no words"), (sampler, "diffusers has no MyScheduler")):
        with pytest.raises(UserError, match=wanted):
            reach(monkeypatch, tiny_text(tmp_path / "run", pretrained_model_name_or_path=model), from_scratch=True)


def test_other_networks_are_one_line(monkeypatch, tmp_path):
    from diffusers import UNet2DConditionModel

    for number, change in enumerate(({"in_channels": 9}, {"num_class_embeds": 10})):
        model = shutil.copytree(model_folder(), tmp_path / f"model-{number}")
        settings = UNet2DConditionModel.load_config(model, subfolder="unet")
        UNet2DConditionModel.from_config({**settings, **change}).save_pretrained(model / "unet")
        with pytest.raises(UserError, match="not inpainting, upscaling or depth models"):
            reach(monkeypatch, tiny_text(tmp_path / "run", pretrained_model_name_or_path=model))


def test_a_checkpoint_of_another_kind_is_refused(script, runs, tmp_path):
    same = {"max_train_steps": 5, "learning_rate": 1.0, "mixed_precision": "bf16"}
    for name, changes, wanted in (
        ("adapters", {}, "--use_lora was True, is now False"),
        ("tuned", {"use_lora": True, "prediction_type": "v_prediction"}, "--use_lora was False, is now True"),
        ("adapters", {"use_lora": True, "pretrained_model_name_or_path": other_weights(tmp_path / "other")}, "frozen"),
    ):
        words = tiny_text(tmp_path / "run", **same, **changes, resume_from_checkpoint=runs / name / "checkpoint-3")
        result = script(words, program=FINETUNE)
        assert result.code == 2 and "belongs to another run" in result.error and wanted in result.error
        assert "block_out_channels" not in result.error  # what is the same is left out
    result = script(tiny_text(tmp_path / "run", pretrained_model_name_or_path=runs / "adapters"), program=FINETUNE)
    assert result.code == 2 and "pytorch_lora_weights.safetensors holds adapters" in result.error


def test_a_checkpoint_goes_on_from_wherever_its_model_is_but_with_the_same_schedule(monkeypatch, runs, tmp_path):
    copy = shutil.copytree(model_folder(), tmp_path / "copy")
    common = {"max_train_steps": 5, "learning_rate": 1.0, "mixed_precision": "bf16", "use_lora": True}
    words = tiny_text(
        tmp_path / "run", **common, pretrained_model_name_or_path=copy, resume_from_checkpoint=runs / "adapters" / "checkpoint-3"
    )
    assert reach(monkeypatch, words).start_step == 3
    path = copy / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "prediction_type": "v_prediction"}))
    with pytest.raises(UserError, match=r"'prediction_type': 'epsilon'.* is now .*'prediction_type': 'v_prediction'"):
        reach(monkeypatch, words)


def test_another_column_of_captions_is_another_run():
    configs = [TextToImageConfig(caption_column=column) for column in ("text", "captions")]
    one, other = (run_identity(config, data="", network={}, processes=1) for config in configs)
    assert one != other


def other_weights(folder: Path) -> Path:
    """The checkpoint with one number of its U-Net changed."""
    if not folder.exists():
        shutil.copytree(model_folder(), folder)
        weights = load_file(folder / "unet" / WEIGHTS)
        weights["conv_in.weight"] += 1e-3
        save_file(weights, folder / "unet" / WEIGHTS, metadata={"format": "pt"})
    return folder


def test_a_precision_from_accelerates_settings(monkeypatch, tmp_path):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    reached = reach(monkeypatch, tiny_text(tmp_path / "run"))
    assert reached.encode.parts.vae.dtype == torch.bfloat16
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(UserError, match="--mixed_precision fp16 needs a GPU"):
        reach(monkeypatch, tiny_text(tmp_path / "run"))
