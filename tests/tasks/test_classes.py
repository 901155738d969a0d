"""Tasks whose network is told classes: grids, model cards for plain diffusers, and runs."""

import json
import re
import sys
from types import SimpleNamespace

import numpy
import pytest
import torch
from class_networks import CLASSES, Painter, config_of, telling, tiny_unet
from launch import run_command, tiny
from safetensors.torch import load_file

from immiscible.configs import UnconditionalConfig
from immiscible.method import build_objective
from immiscible.sampling.pipelines import build_pipeline
from immiscible.schedulers import build_scheduler
from immiscible.tasks.pixels import UnconditionalTask
from immiscible.training.task import TrainingData

CPU = torch.device("cpu")


# What a run leaves


def task_of(unet, prediction_type="epsilon", names=(), **changes):
    """A task around a network, whose images have these classes."""
    flags = {"eval_batch_size": 9, "ddpm_num_inference_steps": 2, "seed": 0, "class_conditional": True, **changes}
    flags["prediction_type"] = prediction_type
    config, scheduler = UnconditionalConfig(**flags), build_scheduler("ddpm", prediction_type=prediction_type)
    objective = build_objective(config, scheduler, SimpleNamespace(device=CPU))
    data = TrainingData(SimpleNamespace(class_names=names), None, None)
    return UnconditionalTask(config, objective, data, unet, {}, None, None)


def test_grids_are_in_the_order_of_classes():
    images = task_of(Painter.from_config(config_of()), prediction_type="sample").samples(None)
    assert (images[:, 4, 4, 0] / 255 * (CLASSES - 1)).round().tolist() == [0, 0, 0, 1, 1, 2, 2, 3, 3]


def example_of(card, folder):
    """What a card says to run; diffusers copies pipeline.py to its cache, and imports it there."""
    (example,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert "immiscible" not in example and len(example.splitlines()) == 3
    return example.replace("THIS_FOLDER", str(folder))


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_the_three_lines_of_the_model_card_sample_classes(tmp_path, monkeypatch, sampler):
    from diffusers.utils import dynamic_modules_utils

    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    unet, scheduler = tiny_unet(), build_scheduler("ddpm")
    names = ["crane", "dog", "crane", "a | b"]
    task = task_of(unet, names=names, sampling_scheduler=sampler)
    task.save(tmp_path, None)
    card = str(task.card("title", {"inference_steps": "3"}, None))
    assert "\nClasses:\n\n0. crane\n1. dog\n2. crane\n3. a | b\n" in card
    assert json.loads((tmp_path / "unet" / "config.json").read_text())["num_class_embeds"] == CLASSES
    found = {}
    torch.manual_seed(1)
    exec(example_of(card, tmp_path), found)
    torch.manual_seed(1)
    with telling(unet, torch.arange(CLASSES)):
        pipeline = build_pipeline(unet, scheduler, sampler=sampler, spacing="leading")
        expected = pipeline(batch_size=CLASSES, num_inference_steps=3).images
    assert [numpy.array(image).tolist() for image in found["images"]] == [numpy.array(image).tolist() for image in expected]


def test_the_model_card_of_an_unconditional_run_names_no_classes():
    task = task_of(tiny_unet(None), names=["a", "b"])
    card = str(task.card("title", {"inference_steps": "3"}, None))
    assert "Classes" not in card and "class_labels" not in card


def test_the_grid_and_the_card_are_of_the_runs_guidance():
    unet, settings = tiny_unet(null_class=True), ((1, None), (3, None), (3, [0.9, 1.0]))
    plain, strong, weak = (
        task_of(unet, guidance_scale=scale, guidance_interval=interval, timestep_spacing="trailing") for scale, interval in settings
    )
    grids = [task.samples(None).astype(int) for task in (plain, strong, weak)]
    assert all(numpy.abs(one - other).max() > 3 for one, other in ((grids[0], grids[1]), (grids[1], grids[2]), (grids[0], grids[2])))
    cards = [str(task.card("title", {"inference_steps": "3"}, None)) for task in (plain, weak)]
    assert "class_labels=[0, 1, 2, 3], guidance_scale=1, num_inference_steps=3)" in cards[0] and plain.num_classes == CLASSES
    assert "guidance_scale=3, guidance_interval=(0.9, 1), num_inference_steps=3)" in cards[1]
    assert "the class in training, so there is no guidance" in str(task_of(tiny_unet()).card("title", {"inference_steps": "3"}, None))


def test_a_class_conditional_run_is_evaluated_saved_and_resumed_exactly(script, tmp_path):
    options = {
        "class_conditional": True,
        "class_dropout_prob": 0.4,
        "eval_guidance_scales": [2, 1],
        "checkpointing_steps": 2,
        "eval_steps": 2,
        "validation_split": 0.1,
        "eval_features": "pixels",
        "eval_samples": 20,
        "eval_inference_steps": 2,
        "dataloader_num_workers": 1,
    }
    for folder, changes in (("whole", {}), ("parts", {"max_train_steps": 2}), ("parts", {"resume_from_checkpoint": "latest"})):
        result = script(tiny(tmp_path / folder, **options, **changes))
        assert result.code == 0 and "1x8x8, 10 classes" in result.stderr, result.stderr
    whole, parts = (load_file(tmp_path / folder / "unet" / "diffusion_pytorch_model.safetensors") for folder in ("whole", "parts"))
    assert whole["class_embedding.weight"].shape[0] == 11 and all(torch.equal(whole[name], parts[name]) for name in whole)
    lines = [[json.loads(line) for line in (tmp_path / folder / "evaluation.jsonl").open()] for folder in ("whole", "parts")]
    for name in ("validation_loss", "frechet_distance", "frechet_distance_guided"):
        assert [line[name] for line in lines[0]] == [line[name] for line in lines[1]] and len(lines[0]) == 2
    assert lines[0][1]["frechet_distance_guided"].keys() == {"2"}
    assert lines[0][1]["frechet_distance_guided"]["2"].keys() == lines[0][1]["frechet_distance"].keys() == {"2"}
    assert lines[0][1]["frechet_distance_guided"]["2"] != lines[0][1]["frechet_distance"]
    assert "\n9. 9\n" in (tmp_path / "whole" / "README.md").read_text() and "10. " not in (tmp_path / "whole" / "README.md").read_text()


ALONE = """
import sys
sys.modules["immiscible"] = None  # it cannot be imported
import torch
torch.manual_seed(0)
"""


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"noise_process": "flow", "prediction_type": "flow_prediction"}])
def test_a_run_is_sampled_by_its_card_in_a_fresh_interpreter_without_this_package(script, tmp_path, changes):
    folder = tmp_path / "run"
    result = script(tiny(folder, class_conditional=True, class_dropout_prob=0.2, guidance_scale=1.5, **changes))
    assert result.code == 0, result.stderr
    said = "print([image.size for image in images])"
    (tmp_path / "sample.py").write_text(ALONE + example_of((folder / "README.md").read_text(), folder) + said)
    result = run_command([sys.executable, "-P", tmp_path / "sample.py"], HF_MODULES_CACHE=str(tmp_path / "modules"))
    assert result.code == 0 and result.stdout.strip() == str([(8, 8)] * 8), result.stderr
    assert "expected" not in result.stderr and "ignored" not in result.stderr


def test_classes_that_are_not_there_are_one_line(script, tmp_path):
    result = script(tiny(tmp_path / "run", bundled_data="photo_crops", class_conditional=True))
    assert result.code == 2 and "--class_conditional needs classes" in result.error and "photo_crops" in result.error
    assert not (tmp_path / "run").exists()
