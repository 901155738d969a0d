"""Checkpoints and captions as people have them, through ``finetune_sd.py`` as a user runs it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from launch import tiny
from pictures import noise, save
from tiny_text import FINETUNE, SCRATCH, model_folder, tiny_text

from immiscible.errors import UserError
from immiscible.networks.arguments import TextModelArguments
from immiscible.networks.families import load_checkpoint
from immiscible.networks.latents import refuse_single_file


def run(script, tmp_path: Path, program: str = FINETUNE, **changes):
    changes = {"max_train_steps": 2, "use_lora": program == FINETUNE, **changes}
    return script(tiny_text(changes.pop("output_dir", tmp_path / "run"), **changes), program=program)


def edited(tmp_path: Path, file: str, version: int | str = 1, **changes) -> Path:
    """A copy of the checkpoint with other settings; None takes one out."""
    folder = Path(shutil.copytree(model_folder(version), tmp_path / "model"))
    settings = {**json.loads((folder / file).read_text()), **changes}
    (folder / file).write_text(json.dumps({name: value for name, value in settings.items() if value is not None}))
    return folder


@pytest.mark.parametrize("name", ["model.safetensors", "model.ckpt"])
def test_a_vae_in_a_single_file_names_the_conversion(script, tmp_path, name):
    path = tmp_path / name
    path.write_bytes(b"weights")
    result = script(tiny(tmp_path / "run", vae_model_name_or_path=path, resolution=32))
    command = f"AutoencoderKL.from_single_file('{path}').save_pretrained('{tmp_path / 'model'}')"
    assert result.code == 2 and command in result.error and result.error.endswith(f"give --vae_model_name_or_path {tmp_path / 'model'}")
    assert not (tmp_path / "run").exists()


def test_a_single_file_that_is_not_there_is_told_apart_from_names_of_the_hub(tmp_path):
    with pytest.raises(UserError, match=r"x\.safetensors is a single file \(and is not there\)"):
        refuse_single_file("--flag", str(tmp_path / "x.safetensors"), "Kind")
    refuse_single_file("--flag", "someone/stable-diffusion-v1.5", "Kind")
    refuse_single_file("--flag", str(tmp_path), "Kind")


def test_a_tokenizer_without_a_length_is_cut_at_the_text_encoders(script, tmp_path):
    model = edited(tmp_path, "tokenizer/tokenizer_config.json", model_max_length=None)
    assert run(script, tmp_path, pretrained_model_name_or_path=model, output_dir=tmp_path / "plain").code == 0
    result = run(script, tmp_path, SCRATCH, pretrained_model_name_or_path=model, validation_prompt="a cat", num_validation_images=1)
    assert result.code == 0, result.stderr
    saved = json.loads((tmp_path / "run" / "tokenizer" / "tokenizer_config.json").read_text())
    assert saved["model_max_length"] == json.loads((model / "text_encoder" / "config.json").read_text())["max_position_embeddings"]
    (tmp_path / "prompts.txt").write_text("a cat\n")
    shared = ["--prompts", tmp_path / "prompts.txt", "--num_images", 1, "--num_inference_steps", 2, "--guidance_scale", 2]
    for name in ("plain", "run", "model"):  # with adapters the base checkpoint's own tokenizer is loaded
        words = ["--model", tmp_path / name, "--output_dir", tmp_path / f"{name}-samples", *shared]
        assert script(words, program="scripts/sample.py").code == 0


def test_pure_noise_at_the_end_is_refused_for_epsilon_alone(script, tmp_path):
    model = edited(tmp_path, "scheduler/scheduler_config.json", rescale_betas_zero_snr=True, prediction_type="epsilon")
    for program in (FINETUNE, SCRATCH):
        result = run(script, tmp_path, program, pretrained_model_name_or_path=model)
        assert result.code == 2 and "rescale_betas_zero_snr" in result.error and "--prediction_type v_prediction" in result.error
        assert not (tmp_path / "run").exists()
    assert run(script, tmp_path, pretrained_model_name_or_path=model, prediction_type="v_prediction").code == 0


@pytest.mark.parametrize(("version", "kind"), [(1, "FlowMatchEulerDiscreteScheduler"), ("xl", "EDMEulerScheduler"), ("3", "DDPMScheduler")])
def test_a_scheduler_of_another_kind_of_noise_is_refused(tmp_path, version, kind):
    model = edited(tmp_path, "scheduler/scheduler_config.json", version, _class_name=kind)
    with pytest.raises(UserError, match=f"its scheduler, {kind}, is of .*, and a Stable Diffusion .* is trained with (noise|flows)"):
        load_checkpoint(TextModelArguments(pretrained_model_name_or_path=str(model)), resolution=32, cache_dir=None, from_scratch=False)


def test_long_captions_are_counted(script, tmp_path):
    folder = tmp_path / "photos"
    words = ["a cat", "word " * 100, "x" * 70, "w, " * 90]
    for number in range(4):
        save(folder / f"{number}.png", noise(40, 40, 3))
    lines = (json.dumps({"file_name": f"{number}.png", "text": text}) for number, text in enumerate(words))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    result = run(script, tmp_path, train_data_dir=folder)
    assert result.code == 0
    (line,) = (line for line in result.stderr.splitlines() if "captions are longer" in line)
    assert line.startswith("2 of 4 captions are longer than the 77 tokens that the text encoder reads, and are cut (the longest has ")
    (folder / "metadata.jsonl").unlink()
    (folder / "3.png").unlink()
    for number in range(3):
        (folder / f"{number}.txt").write_text("short")
    result = run(script, tmp_path, train_data_dir=folder, output_dir=tmp_path / "other", train_batch_size=2)
    assert result.code == 0 and "captions are longer" not in result.stderr


def test_no_validation_images(script, tmp_path):
    """As diffusers' own launch tests ask for."""
    result = run(script, tmp_path, validation_prompt="a cat", num_validation_images=0)
    assert result.code == 0, result.stderr
    assert not list((tmp_path / "run").rglob("step-*.png"))
