"""Runs that begin at a checkpoint in one file, and leave one."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from launch import run_command
from safetensors import safe_open
from tiny_text import ADAPTERS, FINETUNE, model_folder, tiny_text

from immiscible.configs import TextToImageConfig
from immiscible.errors import UserError
from immiscible.flags import parse_config
from immiscible.networks.arguments import TextModelArguments
from immiscible.networks.families import load_checkpoint
from immiscible.networks.single_file import NAME, save_single_file

COMPARE = """
import json, sys
import torch
from diffusers import StableDiffusionPipeline
folder = sys.argv[1]
whole = StableDiffusionPipeline.from_single_file(f"{folder}/model.safetensors", config=folder)
parts = StableDiffusionPipeline.from_pretrained(folder)
equal = {}
for name in ("unet", "vae", "text_encoder"):
    theirs, ours = (getattr(pipeline, name).state_dict() for pipeline in (whole, parts))
    equal[name] = theirs.keys() == ours.keys() and all(torch.equal(theirs[key], ours[key]) for key in ours)
assert "immiscible" not in sys.modules
print(json.dumps(equal))
"""


@pytest.fixture
def file(tmp_path) -> Path:
    """A checkpoint in one file."""
    arguments = TextModelArguments(pretrained_model_name_or_path=str(model_folder()))
    save_single_file(load_checkpoint(arguments, resolution=32, cache_dir=None, from_scratch=False), tmp_path)
    return (tmp_path / NAME).rename(tmp_path / "from_somewhere.safetensors")


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"save_single_file": True, "use_lora": True}, "--save_single_file is of a whole .*adapters are one file already"),
        ({"save_single_file": True, "model_preset": "dit-s-2"}, "--save_single_file is of a whole .*--model_preset dit-s-2"),
        ({"single_file_config": "some/name"}, "--single_file_config is of a checkpoint in one file"),
    ],
    ids=["adapters", "preset", "folder"],
)
def test_flags_that_do_not_go_together(tmp_path, changes, line):
    (tmp_path / "model_index.json").touch()
    words = tiny_text(tmp_path / "run", pretrained_model_name_or_path=tmp_path, train_data_dir="data", **changes)
    with pytest.raises(UserError, match=line):
        parse_config(TextToImageConfig, [str(word) for word in words], program="a script", description="")


@pytest.mark.slow
def test_a_run_from_a_file_to_a_file(script, tmp_path, file):
    """With an average and half precision, whose frozen parts are loaded anew; it resumes where the kept folder is gone."""
    env = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    words = {"pretrained_model_name_or_path": file, "single_file_config": model_folder(), "save_single_file": True, "use_ema": True}
    words |= {"mixed_precision": "bf16", "checkpointing_steps": 2}
    first = script(tiny_text(tmp_path / "run", **words, max_train_steps=2), program=FINETUNE, env=env)
    assert first.code == 0 and "was converted into" in first.stderr, first.stderr
    again = {"max_train_steps": 3, "resume_from_checkpoint": "latest"}
    other = script(tiny_text(tmp_path / "run", **words, **again), program=FINETUNE, env={"XDG_CACHE_HOME": str(tmp_path / "other")})
    assert other.code == 0, other.stderr
    result = run_command([sys.executable, "-c", COMPARE, tmp_path / "run"])
    assert result.code == 0, result.stderr
    assert json.loads(result.stdout.splitlines()[-1]) == {"unet": True, "vae": True, "text_encoder": True}
    with safe_open(tmp_path / "run" / NAME, framework="pt") as written:
        assert any(name.startswith("immiscible.") for name in written.metadata())


@pytest.mark.slow
def test_two_processes_convert_a_file_once_and_its_adapters_are_sampled(script, tmp_path, file):
    env = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    words = tiny_text(
        tmp_path / "run", pretrained_model_name_or_path=file, single_file_config=model_folder(), use_lora=True, max_train_steps=1
    )
    results = [running.wait(240) for running in script.start_ranks(words, program=FINETUNE, env=env)]
    assert [result.code for result in results] == [0, 0], results[0].stderr
    assert sum(result.stderr.count("was converted into") for result in results) == 1
    assert (tmp_path / "run" / ADAPTERS).exists()
    (tmp_path / "prompts.txt").write_text("a cat\n")
    sampled = ["--model", tmp_path / "run", "--output_dir", tmp_path / "samples", "--prompts", tmp_path / "prompts.txt", "--num_images", 1]
    result = script([*sampled, "--num_inference_steps", 2, "--guidance_scale", 2], program="scripts/sample.py", env=env)
    assert result.code == 0 and "was converted into" not in result.stderr, result.stderr
    sampled[3] = tmp_path / "from_folder"  # the checkpoint's parts, in the place of the file
    result = script(
        [*sampled, "--num_inference_steps", 2, "--guidance_scale", 2, "--base", model_folder()], program="scripts/sample.py", env=env
    )
    assert result.code == 0, result.stderr
