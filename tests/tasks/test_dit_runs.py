"""Runs of diffusion transformers, masked ones too, of pixels and of latents: what they leave, how they go on, who samples it."""

import json
import re
import sys
from typing import Any

import pytest
import torch
from kills import final_hashes, finish, kill, lines, start
from launch import run_command, tiny
from tiny_text import model_folder

from immiscible.sampling.pipelines import CLASS_PIPELINE, network_of, sample_images
from immiscible.tasks.from_run import load_model

CPU = torch.device("cpu")
CLASSES = {"class_conditional": True, "class_dropout_prob": 0.2}
LATENTS = {"vae_model_name_or_path": model_folder(), "resolution": 32}
FLOW = {"noise_process": "flow", "prediction_type": "flow_prediction"}
RUNS: dict[str, dict[str, Any]] = {
    "pixels": {**CLASSES, "guidance_scale": 2, "guidance_interval": [0.1, 0.9], "use_ema": True, "noise_coupling": "assignment"},
    "pixels_flow": FLOW,
    "latents": {**CLASSES, **LATENTS, "sampling_scheduler": "ddim", "mixed_precision": "bf16"},
    "latents_learned": {**CLASSES, **LATENTS, "learned_sigma": True, "timestep_spacing": "linspace"},
    "latents_alone": {**LATENTS, "sampling_scheduler": "ddim"},  # which draws nothing: diffusers' own would from the global generator
    "latents_flow": {**CLASSES, **LATENTS, **FLOW},
    "unet_latents_flow": {**LATENTS, **FLOW, "model_preset": "unet-tiny"},
    "masked": {**CLASSES, "model_preset": "mdt-tiny", "use_ema": True, "noise_coupling": "assignment", "timestep_sampling": "asymmetric"},
    "masked_latents": {**LATENTS, "model_preset": "mdt-tiny", "mask_ratio": [0.3, 0.5], "gradient_checkpointing": True},
    "edm": {**CLASSES, "objective": "edm", "momentum": True},
}
PIPELINES = {"latents": "DiTPipeline", "latents_alone": "DiTPipeline"}
PLAIN = """
import json, sys, torch
from diffusers import DiffusionPipeline, DiTPipeline
found = {}
for name in sys.argv[2:]:
    folder = f"{sys.argv[1]}/{name}"
    drawn = lambda: [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    pipeline = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
    told = {"class_labels": [3, 7]} if pipeline.num_classes else {"batch_size": 2}
    images = pipeline(num_inference_steps=2, generator=drawn(), output_type="np", **told).images
    assert type(pipeline.network).__module__.startswith("diffusers")
    found[name] = images.shape
    if name in ("latents", "latents_alone"):
        own = DiTPipeline.from_pretrained(folder)
        labels = own.get_label_ids(["3", "7"]) if pipeline.num_classes else [0, 0]
        theirs = own(labels, 1.0, generator=drawn(), num_inference_steps=2, output_type="np").images
        assert abs(theirs - images).max() < 1e-5, name
assert not any(module.startswith("immiscible") for module in sys.modules)
print(json.dumps(found))
"""


def trained(script, folder, name, **changes):
    done = script(tiny(folder / name, **{"model_preset": "dit-tiny", **RUNS[name], **changes}))
    assert done.code == 0, done.stderr
    return done


FEW = ["pixels", "latents_learned", "masked"]
MORE = [name for name in RUNS if name not in FEW]


@pytest.mark.parametrize("names", [FEW, pytest.param(MORE, marks=pytest.mark.slow)], ids=["few", "more"])
def test_plain_diffusers_samples_what_runs_leave(script, tmp_path, names):
    for name in names:
        trained(script, tmp_path, name)
        folder = tmp_path / name
        assert json.loads((folder / "model_index.json").read_text())["_class_name"] == PIPELINES.get(name, "ClassConditionalPipeline")
        assert (folder / "pipeline.py").read_bytes() == CLASS_PIPELINE.read_bytes()
        assert [(folder / part).exists() for part in ("unet", "transformer")] == [name == "unet_latents_flow", name != "unet_latents_flow"]
        finished, saved = (load_model(str(folder / part)).pipeline for part in ("", "checkpoint-4"))
        assert type(finished.scheduler) is type(saved.scheduler)
        images = [sample_images(pipeline, 2, steps=2, seed=0, batch_size=2, device=CPU) for pipeline in (finished, saved)]
        assert (images[0] == images[1]).all() and images[0].std() > 1
    plain = run_command([sys.executable, "-P", "-c", PLAIN, tmp_path, *names], HF_MODULES_CACHE=str(tmp_path / "modules"))
    assert plain.code == 0, plain.stderr
    found = json.loads(plain.stdout.splitlines()[-1])
    assert found == {name: [2, *((32, 32, 3) if "latents" in name else (8, 8, 1))] for name in names}


@pytest.mark.parametrize("name", ["pixels", pytest.param("masked", marks=pytest.mark.slow)])
@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_killed_and_resumed_it_is_what_it_would_have_been(script, tmp_path, processes, name):
    common = {"model_preset": "dit-tiny", **RUNS[name], "dropout": 0.1, "max_train_steps": 8, "resume_from_checkpoint": "latest"}
    finish(start(script, tiny(tmp_path / "whole", **common, checkpointing_steps=100), processes))
    folder = tmp_path / "killed"
    argv = tiny(folder, **common, checkpointing_steps=3)
    runs = start(script, argv, processes)
    runs[0].wait_until(lambda: lines(folder) > 4)
    kill(runs)
    finish(start(script, argv, processes))
    assert final_hashes(folder, 8) == final_hashes(tmp_path / "whole", 8)


def test_it_is_measured_sampled_guided_and_described(script, tmp_path, monkeypatch):
    from diffusers.utils import dynamic_modules_utils

    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    measured = {"eval_steps": 4, "eval_samples": 8, "eval_inference_steps": 2, "validation_split": 0.2, "eval_guidance_scales": [1, 2]}
    done, folder = trained(script, tmp_path, "pixels", **measured), tmp_path / "pixels"
    assert "0.33 million parameters (0.39 million stored" in done.stderr
    line = json.loads((folder / "evaluation.jsonl").read_text())
    assert line["frechet_distance_guided"]["2"].keys() == {"2"} and len(line["validation_loss"]) == 10
    ema, raw = (network_of(load_model(str(folder), weights=weights).pipeline).state_dict() for weights in ("ema", "raw"))
    assert (folder / "transformer_non_ema").is_dir() and any(not torch.equal(ema[name], raw[name]) for name in ema)
    words = ["--model", folder / "checkpoint-4", "--num_images", 5, "--num_inference_steps", 2, "--output_dir", tmp_path / "samples"]
    words += ["--guidance_scale", 2, "--guidance_interval", 0.2, 0.8, "--scheduler", "euler"]
    sampled = script(words, program="scripts/sample.py")
    assert sampled.code == 0 and len(list((tmp_path / "samples").glob("*.png"))) == 5, sampled.stderr
    card = (folder / "README.md").read_text()
    assert "`DiTTransformer2DModel`: `transformer(x, t, class_labels=...)`" in card and "no pipeline of its own" in card
    (example,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    said: dict[str, Any] = {}
    exec(example.replace("THIS_FOLDER", str(folder)), said)
    assert len(said["images"]) == 8


@pytest.mark.parametrize("training", [{"use_ema": True}, pytest.param({"optimizer": "muon"}, marks=pytest.mark.slow)], ids=str)
def test_a_plan_says_what_is_stored_and_what_is_in_use(script, tmp_path, training):
    words = {"model_preset": "dit-tiny", **training}
    done = script(tiny(tmp_path / "plan", **words, plan=True))
    assert "0.33 million parameters (0.39 million stored, with copies of what is shared)" in done.stderr
    (said,) = re.findall(r"weights 1\.3 MiB, a checkpoint of them and all that goes on ([\d.]+) MiB", done.stdout)
    assert script(tiny(tmp_path / "run", **words)).code == 0
    found = sum(path.stat().st_size for path in (tmp_path / "run" / "checkpoint-4").rglob("*") if path.is_file()) / 2**20
    assert float(said) == pytest.approx(found, rel=0.05)


def test_consistency_training_takes_one(script, tmp_path):
    """Its averaged teacher calls the network with other weights, once for what blocks share."""
    words = {"objective": "consistency", "teacher": "ema", "discretization_s_0": 2, "discretization_s_1": 8, "model_preset": "dit-tiny"}
    done = script(tiny(tmp_path / "run", **words, **CLASSES))
    assert done.code == 0, done.stderr


def test_what_does_not_fit_is_one_line(script, tmp_path):
    for words, wanted in (({"mask_ratio": 0.3}, "--mask_ratio is of masked"), ({"mask_ratio": [0.5, 0.3]}, "--mask_ratio must be one")):
        done = script(tiny(tmp_path / "run", model_preset="dit-tiny", **words))
        assert done.code == 2 and wanted in done.error
    done = script(tiny(tmp_path / "run", model_preset="dit-tiny", resolution=9))
    assert done.code == 2 and "--resolution 9 must be a multiple of 2" in done.error
    done = script(tiny(tmp_path / "run", model_preset="dit-tiny", class_conditional=True, class_embed_type="timestep"))
    assert done.code == 2 and "is of U-Nets" in done.error
