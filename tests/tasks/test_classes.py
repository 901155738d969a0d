"""Tasks whose network is told classes: grids, model cards for plain diffusers, and runs."""

import json
import re
from types import SimpleNamespace

import numpy
import pytest
import torch
from class_networks import CLASSES, Painter, config_of, tiny_unet
from launch import tiny
from safetensors.torch import load_file

from immiscible.configs import UnconditionalConfig
from immiscible.method import build_objective
from immiscible.sampling.pipelines import build_pipeline, told_classes
from immiscible.schedulers import build_scheduler
from immiscible.tasks.pixels import UnconditionalTask
from immiscible.training.task import TrainingData

CPU = torch.device("cpu")


# What a run leaves


def task_of(unet, prediction_type="epsilon", names=(), **changes):
    """A task around a network, whose images have these classes."""
    flags = {"eval_batch_size": 9, "ddpm_num_inference_steps": 2, "seed": 0, "class_conditional": True, **changes}
    config, scheduler = UnconditionalConfig(**flags), build_scheduler("ddpm", prediction_type=prediction_type)
    objective = build_objective(config, scheduler, SimpleNamespace(device=CPU))
    data = TrainingData(SimpleNamespace(class_names=names), None, None)
    return UnconditionalTask(config, scheduler, objective, data, unet, {}, None, None)


def test_grids_are_in_the_order_of_classes():
    images = task_of(Painter.from_config(config_of()), prediction_type="sample").samples(None)
    assert (images[:, 4, 4, 0] / 255 * (CLASSES - 1)).round().tolist() == [0, 0, 0, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_the_example_of_the_model_card_samples_classes_by_diffusers_alone(tmp_path, sampler):
    unet, scheduler = tiny_unet(), build_scheduler("ddpm")
    names = ["crane", "dog", "crane", "a | b"]
    task = task_of(unet, names=names, sampling_scheduler=sampler)
    task.save(tmp_path, None)
    card = str(task.card("title", {"inference_steps": "3"}, None))
    assert "\nClasses:\n\n0. crane\n1. dog\n2. crane\n3. a | b\n" in card
    assert json.loads((tmp_path / "unet" / "config.json").read_text())["num_class_embeds"] == CLASSES
    (example,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert "immiscible" not in example
    found = {}
    torch.manual_seed(1)
    exec(example.replace("THIS_FOLDER", str(tmp_path)), found)
    torch.manual_seed(1)
    with told_classes(unet, torch.arange(CLASSES)):
        pipeline = build_pipeline(unet, scheduler, sampler=sampler, spacing="leading")
        expected = pipeline(batch_size=CLASSES, num_inference_steps=3).images
    assert [numpy.array(image).tolist() for image in found["images"]] == [numpy.array(image).tolist() for image in expected]


def test_the_model_card_of_an_unconditional_run_names_no_classes():
    card = str(task_of(tiny_unet(None), names=["a", "b"]).card("title", {"inference_steps": "3"}, None))
    assert "Classes" not in card and "class_labels" not in card


def test_a_class_conditional_run_is_evaluated_saved_and_resumed_exactly(script, tmp_path):
    options = {
        "class_conditional": True,
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
    assert whole["class_embedding.weight"].shape[0] == 10 and all(torch.equal(whole[name], parts[name]) for name in whole)
    lines = [[json.loads(line) for line in (tmp_path / folder / "evaluation.jsonl").open()] for folder in ("whole", "parts")]
    assert [line["validation_loss"] for line in lines[0]] == [line["validation_loss"] for line in lines[1]] and len(lines[0]) == 2
    assert "\n9. 9\n" in (tmp_path / "whole" / "README.md").read_text()


def test_classes_that_are_not_there_are_one_line(script, tmp_path):
    result = script(tiny(tmp_path / "run", bundled_data="photo_crops", class_conditional=True))
    assert result.code == 2 and "--class_conditional needs classes" in result.error and "photo_crops" in result.error
    assert not (tmp_path / "run").exists()
