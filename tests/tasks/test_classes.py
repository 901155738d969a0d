"""Networks that are told classes: how they are built, sampled, drawn into grids and handed to plain diffusers."""

import json
import re
from types import SimpleNamespace

import numpy
import pytest
import torch
from diffusers import UNet2DModel
from launch import tiny
from PIL import Image
from safetensors.torch import load_file

from immiscible.configs import UnconditionalConfig
from immiscible.errors import UserError
from immiscible.evaluation.features import PixelFeatures
from immiscible.evaluation.frechet import Evaluation
from immiscible.networks.unet import build_unet, unet_config
from immiscible.randomness import seeded_generator
from immiscible.sampling.pipelines import build_pipeline, sample_images, sample_labels, told_classes
from immiscible.schedulers import build_scheduler
from immiscible.method import build_objective
from immiscible.tasks.pixels import UnconditionalTask
from immiscible.training.task import TrainingData

CPU = torch.device("cpu")
CLASSES = 4


def config_of(num_classes=CLASSES, path=None):
    preset = None if path else "unet-tiny"
    return unet_config(config_name_or_path=path, preset=preset, resolution=8, channels=1, dropout=None, num_classes=num_classes)


def tiny_unet(num_classes=CLASSES, **changes):
    torch.manual_seed(0)
    return build_unet({**config_of(num_classes), **changes}).eval()


class Painter(UNet2DModel):
    """Predicts a blank image whose gray is its class."""

    def forward(self, sample, timestep, class_labels=None):
        gray = 2 * class_labels / (CLASSES - 1) - 1
        return SimpleNamespace(sample=gray.view(-1, 1, 1, 1).expand_as(sample))


def pipeline_of(unet, sampler="ddim", prediction_type="epsilon"):
    return build_pipeline(unet, build_scheduler("ddpm", prediction_type=prediction_type), sampler=sampler, spacing="trailing")


def painted(count, **options):
    """The classes of samples of `Painter`, read off their grays."""
    pipeline = pipeline_of(Painter.from_config(config_of()), prediction_type="sample")
    images = sample_images(pipeline, count, steps=2, seed=0, device=CPU, **options)
    assert all(len(numpy.unique(image)) == 1 for image in images)
    return (images[:, 0, 0, 0] / 255 * (CLASSES - 1)).round().astype(int).tolist()


# The network


def test_without_classes_the_configuration_is_what_it_was():
    assert "num_class_embeds" not in config_of(None)
    assert build_unet(config_of(None)).class_embedding is None


@pytest.mark.parametrize("kind", [None, "timestep"])
def test_a_network_is_built_for_the_classes_of_the_data(tmp_path, kind):
    path = tmp_path / "network.json"
    path.write_text(json.dumps({**config_of(None), "class_embed_type": kind}))
    unet = build_unet(config_of(CLASSES, str(path)))
    assert unet.config.num_class_embeds == CLASSES and unet.config.class_embed_type == kind
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([5, 5])
    a, b = unet(x[:1].expand(2, -1, -1, -1), t, class_labels=torch.tensor([0, CLASSES - 1])).sample
    assert not torch.equal(a, b)


@pytest.mark.parametrize(
    ("settings", "num_classes", "message"),
    [
        ({"num_class_embeds": 7}, CLASSES, "num_class_embeds is 7, but the data has 4 classes"),
        ({"num_class_embeds": 7}, None, "expects class labels; give --class_conditional"),
        ({"class_embed_type": "timestep"}, None, "expects class labels; give --class_conditional"),
        ({"class_embed_type": "identity"}, CLASSES, "class_embed_type 'identity' does not take class numbers"),
    ],
)
def test_configurations_that_disagree_with_the_data(tmp_path, settings, num_classes, message):
    path = tmp_path / "network.json"
    path.write_text(json.dumps({**config_of(None), **settings}))
    with pytest.raises(UserError, match=f"--model_config_name_or_path .*{message}"):
        config_of(num_classes, str(path))


# Sampling


@pytest.mark.parametrize("kind", [None, "timestep"])
def test_being_told_classes_is_being_called_with_them(kind):
    unet = tiny_unet(class_embed_type=kind)
    x, t, labels = torch.randn(3, 1, 8, 8), torch.tensor([1, 500, 999]), torch.tensor([0, 3, 1])
    with torch.no_grad():
        with told_classes(unet, labels):
            told = unet(x, t).sample
        assert torch.equal(told, unet(x, t, class_labels=labels).sample)
        assert not torch.equal(told, unet(x, t, class_labels=labels.flip(0)).sample)
    with pytest.raises(ZeroDivisionError), told_classes(unet, labels):
        raise ZeroDivisionError
    with pytest.raises(ValueError, match="class_labels should be provided"):
        unet(x, t)  # nothing is left behind


def test_an_unconditional_network_is_told_nothing():
    unet = tiny_unet(None)
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([3, 4])
    assert sample_labels(unet, 5) is None
    with torch.no_grad(), told_classes(unet, None):
        told = unet(x, t).sample
        assert torch.equal(told, unet(x, t).sample)


def test_samples_are_balanced_whatever_the_batches():
    expected = [number % CLASSES for number in range(11)]
    assert sample_labels(tiny_unet(), 11).tolist() == expected
    for batch_size in (1, 3, 4, 11):
        assert painted(11, batch_size=batch_size) == expected
    assert painted(2, batch_size=2) + painted(9, batch_size=5, first=2) == expected


@pytest.mark.parametrize(("sampler", "prediction_type"), [("ddim", "epsilon"), ("ddpm", "v_prediction")])
def test_samples_are_those_of_a_loop_that_passes_the_labels(sampler, prediction_type):
    unet = tiny_unet()
    pipeline = pipeline_of(unet, sampler, prediction_type)
    images = sample_images(pipeline, 6, steps=3, seed=7, batch_size=4, device=CPU)
    generators = [seeded_generator(7, "sample", number) for number in range(6)]
    x = torch.cat([torch.randn(1, 1, 8, 8, generator=generator) for generator in generators])
    pipeline.scheduler.set_timesteps(3)
    with torch.no_grad():
        for t in pipeline.scheduler.timesteps:
            output = unet(x, t, class_labels=torch.arange(6) % CLASSES).sample
            x = pipeline.scheduler.step(output, t, x, generator=generators).prev_sample
    reference = ((x / 2 + 0.5).clamp(0, 1) * 255).round().permute(0, 2, 3, 1).numpy()
    assert images.std() > 10 and numpy.abs(images - reference).max() <= 1  # other batches round otherwise


def test_evaluation_samples_every_class_equally():
    grays = torch.linspace(0, 255, CLASSES).round().to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 8, 8)
    evaluation = Evaluation(PixelFeatures(1, 8), [grays.repeat(5, 1, 1, 1)], samples=20, inference_steps=[2], batch_size=7)
    pipeline = pipeline_of(Painter.from_config(config_of()), prediction_type="sample")
    assert evaluation(pipeline)["frechet_distance"]["2"] == pytest.approx(0, abs=1e-6)
    uneven = Evaluation(PixelFeatures(1, 8), [grays.repeat(5, 1, 1, 1)[:-1]], samples=20, inference_steps=[2], batch_size=7)
    assert uneven(pipeline)["frechet_distance"]["2"] > 1e-3


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
