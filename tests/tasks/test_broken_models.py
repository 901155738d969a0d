"""Checkpoints of others that cannot be loaded, and sampling steps that they cannot serve: one line, nothing executed, nothing written."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import pytest
from tiny_text import FINETUNE, model_folder, tiny_text


class Executed:
    def __reduce__(self):
        return (print, ("EXECUTED",))


@pytest.mark.parametrize("part", ["text_encoder", "unet", "vae"])
@pytest.mark.parametrize("content", ["pickle", "junk"])
def test_a_part_that_cannot_be_loaded(script, tmp_path, part, content):
    model = Path(shutil.copytree(model_folder(), tmp_path / "model"))
    (weights,) = (model / part).glob("*.safetensors")
    if content == "junk":
        weights.write_bytes(b"x" * 100)
    else:
        weights.unlink()
        name = "pytorch_model.bin" if part == "text_encoder" else "diffusion_pytorch_model.bin"
        (model / part / name).write_bytes(pickle.dumps(Executed()))
    tuned = script(tiny_text(tmp_path / "run", pretrained_model_name_or_path=model, max_train_steps=1), program=FINETUNE)
    (tmp_path / "prompts.txt").write_text("a cat\n")
    common = ["--num_images", 1, "--num_inference_steps", 2, "--prompts", tmp_path / "prompts.txt", "--guidance_scale", 2]
    sampled = script(["--model", model, "--output_dir", tmp_path / "samples", *common], program="scripts/sample.py")
    for result, flag in ((tuned, "--pretrained_model_name_or_path"), (sampled, "--model")):
        assert result.code == 1 and f"{flag} {model}: " in result.error and "EXECUTED" not in result.stdout + result.stderr
    assert not (tmp_path / "run").exists() and not (tmp_path / "samples").exists()


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"validation_prompt": "a cat", "validation_inference_steps": 1000}, "--validation_inference_steps 1000 must be below 1000"),
        ({"eval_steps": 1, "eval_inference_steps": [5, 5000]}, "--eval_inference_steps 5000 must be below 1000"),
    ],
)
def test_more_steps_than_the_process_of_the_checkpoint_has(script, tmp_path, changes, line):
    result = script(tiny_text(tmp_path / "run", max_train_steps=1, **changes), program=FINETUNE)
    assert result.code == 2 and line in result.error and not (tmp_path / "run").exists()
