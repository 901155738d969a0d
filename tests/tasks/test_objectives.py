"""Runs of EDM, FDM and consistency training: what they leave, how they go on, what they refuse."""

import json
import re
import sys
from typing import Any

import pytest
import torch
from kills import final_hashes, finish, kill, lines, start
from launch import run_command, tiny
from PIL import Image

from immiscible.configs import FREE_ON_RESUME, UnconditionalConfig
from immiscible.errors import UserError
from immiscible.flags import parse_config
from immiscible.objective_choice import objective_facts
from immiscible.tasks.from_run import load_model

RUNS = {
    "edm": {"objective": "edm", "timestep_sampling": "asymmetric", "loss_weighting": "p2"},
    "momentum": {"objective": "edm", "momentum": True, "momentum_warmup_steps": 3, "edm_sampler": "euler"},
    "momentum_classes": {"objective": "edm", "momentum": True, "class_conditional": True, "class_dropout_prob": 0.2},
    "consistency": {"objective": "consistency", "class_conditional": True, "class_dropout_prob": 0.1, "noise_coupling": "assignment"},
}
SCHEDULERS = {"edm": "EDMEulerScheduler", "momentum": "EDMScheduler", "consistency": "CMStochasticIterativeScheduler"}
PLAIN = """
import json, sys, torch
from diffusers import DiffusionPipeline
found = {}
for name in sys.argv[2:]:
    pipeline = DiffusionPipeline.from_pretrained(f"{sys.argv[1]}/{name}", trust_remote_code=name == "momentum")
    labels = {"class_labels": [3, 7]} if name == "consistency" else {}
    for steps in (1, 2):
        drawn = torch.Generator().manual_seed(0)
        images = pipeline(batch_size=2, num_inference_steps=steps, generator=drawn, output_type="np", **labels).images
        assert images.shape == (2, 8, 8, 1) and 0 <= images.min() <= images.max() <= 1
    found[name] = [type(pipeline).__name__, type(pipeline.scheduler).__name__, float(images.mean())]
assert not any(module.startswith("immiscible") for module in sys.modules)
print(json.dumps(found))
"""


@pytest.mark.slow
def test_plain_diffusers_samples_what_runs_leave(script, tmp_path):
    for name in SCHEDULERS:
        done = script(tiny(tmp_path / name, **RUNS[name]))
        assert done.code == 0, done.stderr
    plain = run_command([sys.executable, "-c", PLAIN, tmp_path, *SCHEDULERS], HF_MODULES_CACHE=str(tmp_path / "modules"))
    assert plain.code == 0, plain.stderr
    found = json.loads(plain.stdout.splitlines()[-1])
    for name, scheduler in SCHEDULERS.items():
        assert found[name][:2] == ["ConsistencyModelPipeline", scheduler]
        finished, saved = (load_model(str(tmp_path / name / part)).pipeline for part in ("", "checkpoint-4"))
        assert type(finished.scheduler) is type(saved.scheduler)
        kept, built = ({key: of.scheduler.config[key] for key in of.scheduler.config if key[0] != "_"} for of in (finished, saved))
        assert kept == built
        if name == "momentum":  # by the same steps as the saved one
            images = saved(batch_size=2, num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np").images
            assert float(images.mean()) == pytest.approx(found[name][2], abs=1e-6)


def test_measured_while_it_trains(script, tmp_path):
    folder = tmp_path / "run"
    words = tiny(
        folder, **RUNS["edm"], eval_steps=4, eval_samples=16, eval_inference_steps=[1, 2], validation_split=0.2, eval_features="pixels"
    )
    assert script(words).code == 0
    line = json.loads((folder / "evaluation.jsonl").read_text())
    assert line["frechet_distance"].keys() == {"1", "2"} and len(line["validation_loss"]) == 10


def test_the_card_says_how_fdm_with_classes_is_sampled(script, tmp_path, monkeypatch):
    from diffusers.utils import dynamic_modules_utils

    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    folder = tmp_path / "run"
    assert script(tiny(folder, **RUNS["momentum_classes"])).code == 0
    card = (folder / "README.md").read_text()
    assert "which diffusers' samplers do not know" in card and "with `class_labels` and without guidance" in card
    (example,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    said: dict[str, Any] = {}
    exec(example.replace("THIS_FOLDER", str(folder)), said)
    assert type(said["pipeline"].scheduler).__name__ == "EDMScheduler" and said["pipeline"].scheduler.config.momentum
    guided = said["pipeline"](class_labels=[1, 2], guidance_scale=2.0, guidance_interval=(0.2, 0.8), num_inference_steps=3).images
    assert len(said["images"]) == 8 and len(guided) == 2


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_killed_and_resumed_through_the_curriculum(script, tmp_path, processes):
    """The number of levels changes at steps 2, 4 and 6, and the averaged teacher is in the checkpoint."""
    levels = {"objective": "consistency", "discretization_s_0": 2, "discretization_s_1": 16, "teacher": "ema"}
    changes = {**levels, "dropout": 0.2, "use_ema": True, "noise_coupling": "assignment", "max_train_steps": 8}
    changes["resume_from_checkpoint"] = "latest"
    finish(start(script, tiny(tmp_path / "whole", **changes, checkpointing_steps=100), processes))
    expected = final_hashes(tmp_path / "whole", 8)
    folder = tmp_path / "killed"
    argv = tiny(folder, **changes, checkpointing_steps=3)
    runs = start(script, argv, processes)
    runs[0].wait_until(lambda: lines(folder) > 4)
    kill(runs)
    assert (folder / "checkpoint-3").exists() and not (folder / "checkpoint-8").exists()
    finish(start(script, argv, processes))
    assert final_hashes(folder, 8) == expected
    finish(start(script, tiny(tmp_path / "student", **{**changes, "teacher": "student"}), processes))
    assert final_hashes(tmp_path / "student", 8) != expected


def test_another_length_needs_the_curriculums_own(script, tmp_path):
    folder, changes = tmp_path / "run", {"objective": "consistency", "resume_from_checkpoint": "latest"}
    assert script(tiny(folder, **changes)).code == 0
    assert "curriculum_steps" in script(tiny(folder, **changes, max_train_steps=6)).error
    assert script(tiny(folder, **changes, max_train_steps=6, curriculum_steps=4)).code == 0


@pytest.mark.slow
@pytest.mark.parametrize(("objective", "steps", "within"), [("consistency", (1, 2), 0.03), ("edm", (5, 18), 0.02)])
def test_images_of_one_colour(script, tmp_path, objective, steps, within):
    from diffusers import DiffusionPipeline

    colour, images = (205, 90, 40), tmp_path / "images"
    images.mkdir()
    for number in range(16):
        Image.new("RGB", (8, 8), colour).save(images / f"{number}.png")
    changes = {"train_data_dir": images, "max_train_steps": 1500, "train_batch_size": 64, "learning_rate": 2e-3, "lr_scheduler": "cosine"}
    changes |= {"use_ema": True, "ema_max_decay": 0.99}
    assert script(tiny(tmp_path / "run", **changes, objective=objective), timeout=600).code == 0
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "run")
    for count in steps:
        drawn = torch.Generator().manual_seed(0)
        found = torch.tensor(pipeline(batch_size=16, num_inference_steps=count, generator=drawn, output_type="np").images)
        assert (found.mean((1, 2)) - torch.tensor(colour) / 255).abs().max() < within


def parse(**values):
    words = [str(word) for name, value in values.items() for word in ([f"--{name}"] if value is True else [f"--{name}", value])]
    return parse_config(UnconditionalConfig, ["--bundled_data", "digits", *words], program="train_unconditional.py", description="")


def test_defaults_depend_on_the_objective():
    found = [parse(objective=name, max_train_steps=7) for name in ("denoising", "edm", "consistency")]
    assert [(each.p_mean, each.p_std, each.curriculum_steps) for each in found] == [(None, None, None), (-1.2, 1.2, None), (-1.1, 2.0, 7)]


def test_steps_of_samples():
    """By default as many as the objective's networks are sampled in, and no more than the sampler has levels: EDM's lays out any number."""
    assert [parse(objective=name, max_train_steps=7).sampling_steps for name in ("denoising", "edm", "consistency")] == [1000, 18, 1]
    many = {"ddpm_num_steps": 10, "ddpm_num_inference_steps": 40, "eval_inference_steps": 40, "eval_steps": 1, "max_train_steps": 7}
    assert {"edm_sampler", "sampling_scheduler", "ddpm_num_inference_steps"} <= FREE_ON_RESUME  # nothing of the training
    assert {parse(objective=name, **many).sampling_steps for name in ("edm", "consistency")} == {40}
    for name in ("ddpm_num_inference_steps", "eval_inference_steps"):
        with pytest.raises(UserError, match=rf"--{name} \[?41.* 40, the levels of a consistency model's sampler"):
            parse(objective="consistency", **{**many, name: 41})
        with pytest.raises(UserError, match=rf"--{name} .*10.* --ddpm_num_steps 5"):
            parse(**{**many, "ddpm_num_steps": 5, "ddpm_num_inference_steps": 5, "eval_inference_steps": 5, name: 10})


@pytest.mark.parametrize(
    ("flags", "levels"),
    [
        (
            {"discretization": "square_root", "discretization_s_0": 2, "discretization_s_1": 150},
            "2 to 151 levels over 7 steps (square_root)",
        ),
        ({"discretization_s_1": 80}, "11 to 81 levels over 7 steps (doubling)"),
        ({"constant_discretization_steps": True, "discretization_s_0": 2000}, "2001 levels (constant)"),
    ],
)
def test_the_levels_that_are_told_are_the_curriculums(flags, levels):
    assert levels in objective_facts(parse(objective="consistency", max_train_steps=7, **flags))["objective"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"objective": "flows"}, "--objective.*denoising.*edm.*consistency"),
        ({"sigma_min": 0.1}, "--sigma_min belongs to --objective edm or consistency, not to denoising"),
        ({"objective": "edm", "huber_c": 0.1}, "--huber_c belongs to --objective consistency, not to edm"),
        ({"objective": "consistency", "momentum": True, "max_train_steps": 4}, "--momentum belongs to --objective edm"),
        ({"objective": "edm", "noise_process": "flow"}, "--noise_process is of --objective denoising"),
        ({"objective": "edm", "image_scale": 0.5}, "--image_scale is of --objective denoising"),
        ({"objective": "edm", "sigma_min": 1, "sigma_max": 0.5}, "--sigma_min 1 must be below --sigma_max 0.5"),
        ({"objective": "edm", "momentum_warmup_steps": 5}, "--momentum_warmup_steps is of --momentum"),
        ({"objective": "edm", "vae_model_name_or_path": "x"}, "trained on pixels"),
        ({"objective": "consistency"}, "needs --max_train_steps, or --curriculum_steps"),
        ({"discretization_s_0": 20, "discretization_s_1": 10}, "--discretization_s_1 10 must be at least --discretization_s_0 20"),
        ({"constant_discretization_steps": True, "discretization": "square_root"}, "contradict each other"),
        ({"skip_steps": 11}, "--skip_steps 11 must be at most 10: --discretization_s_0 10 begins with 11 levels"),
        ({"discretization": "square_root", "skip_steps": 10}, "--skip_steps 10 must be at most 9: .* begins with 10 levels"),
        ({"discretization": "square_root", "discretization_s_0": 1}, "--discretization_s_0 1 .* one level, which has no neighbor: give 2"),
        ({"consistency_distance": "l2", "huber_c": 1}, "--huber_c is of --consistency_distance pseudo_huber"),
        ({"teacher_decay": 0.5}, "--teacher_decay is of --teacher ema"),
        ({"level_sampling": "uniform", "p_std": 1}, "--p_mean and --p_std are of --level_sampling log_normal"),
        ({"loss_weighting": "p2"}, "--loss_weighting p2 weighs an error of the noise"),
        ({"noise_offset": 0.1}, "--noise_offset is of --objective denoising and edm"),
        ({"noise_precond_type": "edm"}, "--noise_precond_type.*cm"),
    ],
)
def test_what_does_not_go_together(flags, said):
    own = {} if {"objective", "sigma_min"} & flags.keys() else {"objective": "consistency", "max_train_steps": 4}
    with pytest.raises(UserError, match=said):
        parse(**own, **flags)
