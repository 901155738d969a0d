"""Frechet distances: against a float64 reference, of a run, and without a trace in training."""

from __future__ import annotations

import itertools
import logging
import random

import numpy
import pytest
import torch
from class_networks import CLASSES, Painter, config_of, pipeline_of
from class_networks import tiny_unet as class_unet
from diffusers.training_utils import EMAModel
from measured import DIGITS, random_state

from immiscible.errors import UserError
from immiscible.evaluation import frechet
from immiscible.evaluation.copies import NearestNeighborRatio
from immiscible.evaluation.features import PixelFeatures
from immiscible.evaluation.frechet import Evaluation, FrechetDistance
from immiscible.evaluation.validation import EVALUATION_SEED, validation_loss
from immiscible.networks.unet import build_unet, unet_config
from immiscible.process import NoiseProcess
from immiscible.randomness import preserved_randomness
from immiscible.sampling.pipelines import build_pipeline, sample_images
from immiscible.schedulers import build_scheduler


class Passed:
    """Features that are the images' values, counted."""

    name = "FD-passed"

    def __init__(self, num_features):
        self.num_features = num_features
        self.seen = 0

    def __call__(self, images):
        self.seen += len(images)
        return images.flatten(1).double()


def reference_distance(a, b):
    """Float64, by eigenvalues of symmetric matrices alone, and with numpy's covariance."""
    a, b = a.flatten(1).double().numpy(), b.flatten(1).double().numpy()
    cov_a, cov_b = (numpy.atleast_2d(numpy.cov(x, rowvar=False)) for x in (a, b))
    values, vectors = numpy.linalg.eigh(cov_a)
    root = vectors * numpy.sqrt(values.clip(0)) @ vectors.T
    product = numpy.linalg.eigvalsh(root @ cov_b @ root).clip(0)
    means = ((a.mean(0) - b.mean(0)) ** 2).sum()
    return means + numpy.trace(cov_a) + numpy.trace(cov_b) - 2 * numpy.sqrt(product).sum()


@pytest.mark.parametrize(
    "case, count_a, count_b, num_features, rank",
    [
        ("plain", 300, 200, 24, 24),
        ("rank deficient", 300, 200, 24, 7),
        ("fewer images than features", 10, 15, 24, 24),
        ("one feature", 50, 60, 1, 1),
    ],
)
def test_frechet_distance_equals_a_float64_reference(case, count_a, count_b, num_features, rank):
    generator = torch.Generator().manual_seed(0)

    def draw(count, shift):
        mixing = torch.randn(rank, num_features, generator=generator, dtype=torch.float64)
        return torch.randn(count, rank, generator=generator, dtype=torch.float64) @ mixing + shift

    a, b = draw(count_a, 3.0), draw(count_b, 3.5)
    distance = FrechetDistance("FD-passed", a)
    assert distance(b) == pytest.approx(reference_distance(a, b), rel=1e-6)
    scale = float(a.var(0).sum())
    for same in (a, a.flip(0)):
        assert distance(same) == pytest.approx(0, abs=1e-6 * scale)
        assert distance(same) >= 0


def test_nothing_of_one_call_is_left_in_the_next():
    distance = FrechetDistance("FD-passed", torch.randn(100, 3, dtype=torch.float64))
    first, second = (scale * torch.randn(50, 3, dtype=torch.float64) for scale in (1, 4))
    values = [distance(first), distance(second), distance(first)]
    assert values[0] == values[2] < values[1]


def test_features_are_computed_once_for_each_image():
    features, unet = Passed(64), tiny_unet()
    evaluation, pipeline = evaluation_of(unet, features=features, held_out=DIGITS[:100].split(30))
    assert features.seen == 1797 + 100
    evaluation(pipeline)
    assert features.seen == 1797 + 100 + 2 * 20  # at two numbers of inference steps, each with three measures


def test_only_images_that_other_runs_measure_too_are_kept():
    class Slow(Passed):
        asked = 0

        def kept(self, images):
            self.asked += len(images)
            return self(images)

    features, unet = Slow(64), tiny_unet()
    evaluation, pipeline = evaluation_of(unet, features=features, held_out=[DIGITS[:100]])
    evaluation(pipeline)
    assert features.asked == 1797 + 100 and features.seen == 1797 + 100 + 2 * 20


def test_too_few_images_are_refused():
    with pytest.raises(UserError, match="at least 2 reference images, not 1"):
        FrechetDistance("FD-passed", torch.zeros(1, 2))
    with pytest.raises(UserError, match="at least 2 images, not 0"):
        FrechetDistance("FD-passed", torch.randn(5, 2))(torch.zeros(0, 2))


def test_a_broken_torchmetrics_is_one_clear_line(monkeypatch):
    def fail(name):
        raise ModuleNotFoundError("No module named 'torchvision'")

    monkeypatch.setattr(frechet, "import_module", fail)
    with pytest.raises(UserError, match=r"needs torchmetrics, which cannot be imported .*torchvision.*pip install"):
        FrechetDistance("FD-passed", torch.zeros(0, 2))


def tiny_unet():
    torch.manual_seed(0)
    return build_unet(unet_config(config_name_or_path=None, preset="unet-tiny", resolution=8, channels=1, dropout=0.3))


def evaluation_of(unet, samples=20, features=None, **options):
    features = features or PixelFeatures(1, 8)
    evaluation = Evaluation(features, DIGITS.split(600), samples=samples, inference_steps=[3, 2, 3], **options)
    pipeline = build_pipeline(unet, build_scheduler("ddpm", prediction_type="v_prediction"), sampler="ddim", spacing="trailing")
    return evaluation, pipeline


def test_evaluation_is_the_distance_of_the_samples(caplog):
    unet = tiny_unet()
    caplog.set_level(logging.WARNING)
    evaluation, pipeline = evaluation_of(unet, batch_size=7)
    assert "--eval_samples is 20: too few for the 64 features of FD-pixels-8x8, whose covariance needs at least 65" in caplog.text
    result = evaluation(pipeline)
    assert result["feature"] == "FD-pixels-8x8" and result["samples"] == 20 and result["reference_images"] == 1797
    assert list(result["frechet_distance"]) == ["2", "3"]
    unet.eval()
    expected = reference_distance(PixelFeatures(1, 8)(DIGITS), PixelFeatures(1, 8)(sampled(pipeline, 20, 3)))
    assert result["frechet_distance"]["3"] == pytest.approx(expected, rel=1e-2)  # a rounding at 1/2 may go either way
    random.seed(5), torch.manual_seed(5)
    assert evaluation(pipeline) == result  # the same noises, whatever the global state


def test_guided_samples_are_measured_beside_those_without_guidance():
    pipeline = pipeline_of(class_unet(null_class=True), prediction_type="v_prediction")
    options = {"samples": 20, "inference_steps": [2, 1], "guidance_interval": (0.0, 0.6)}
    result = Evaluation(PixelFeatures(1, 8), [DIGITS], guidance_scales=[3, 1, 0.5], **options)(pipeline)
    assert list(result["frechet_distance_guided"]) == ["0.5", "3"]
    assert result["frechet_distance"] == Evaluation(PixelFeatures(1, 8), [DIGITS], **options)(pipeline)["frechet_distance"]
    guided = result["frechet_distance_guided"]["3"]
    assert guided["1"] == result["frechet_distance"]["1"] and guided["2"] != result["frechet_distance"]["2"]  # at levels 0.999 and 0.499
    alone = Evaluation(PixelFeatures(1, 8), [DIGITS], guidance_scales=[3], **options)(pipeline)
    assert alone["frechet_distance"] == {} and alone["frechet_distance_guided"] == {"3": guided}


def sampled(pipeline, count, steps):
    images = sample_images(pipeline, count, steps=steps, seed=EVALUATION_SEED, batch_size=count, device=torch.device("cpu"))
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def test_samples_are_measured_against_images_held_out_too():
    unet, features = tiny_unet().eval(), PixelFeatures(1, 8)
    known, unseen = DIGITS[:1200], DIGITS[1200:]
    _, pipeline = evaluation_of(unet)
    options = {"samples": 30, "inference_steps": [2], "batch_size": 30}
    result = Evaluation(features, [known], **options, held_out=unseen.split(100))(pipeline)
    samples = features(sampled(pipeline, 30, 2))
    assert result["held_out_images"] == 597 and result["num_features"] == 64
    for name, reference in (("frechet_distance", known), ("frechet_distance_held_out", unseen)):
        assert result[name]["2"] == pytest.approx(reference_distance(features(reference), samples), rel=1e-6)
    ratio = NearestNeighborRatio(features(known), features(unseen))(samples)
    assert result["nearest_neighbor_ratio"] == {"2": ratio} and 0.8 < ratio < 1.25  # noise is as far from either
    alone = Evaluation(features, [known], **options)(pipeline)
    assert alone["frechet_distance"] == result["frechet_distance"]
    assert not {"held_out_images", "frechet_distance_held_out", "nearest_neighbor_ratio"} & alone.keys()


def test_distances_along_principal_directions():
    unet, features = tiny_unet().eval(), PixelFeatures(1, 8)
    _, pipeline = evaluation_of(unet)
    options = {"samples": 30, "inference_steps": [2], "batch_size": 30}
    few = Evaluation(features, [DIGITS], **options, directions=5)(pipeline)
    assert few["feature"] == "FD-pixels-8x8-PCA5" and few["num_features"] == 5
    known, samples = features(DIGITS), features(sampled(pipeline, 30, 2))
    axes = torch.linalg.svd(known - known.mean(0), full_matrices=False).Vh[:5].T  # largest first
    assert few["frechet_distance"]["2"] == pytest.approx(reference_distance(known @ axes, samples @ axes), rel=1e-6)
    with pytest.raises(UserError, match=r"--eval_feature_directions 65: FD-pixels-8x8 has 64 features.* give at most 64"):
        Evaluation(features, [DIGITS], **options, directions=65)
    with pytest.raises(UserError, match="9 reference images vary in 8 directions; give at most 8"):
        Evaluation(features, [DIGITS[:9]], **options, directions=9)


def test_evaluation_uses_the_averaged_weights():
    unet = tiny_unet()
    averaged = EMAModel(unet.parameters())
    evaluation, pipeline = evaluation_of(unet)
    before = evaluation(pipeline)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(0.1)
    assert evaluation(pipeline, averaged) == before != evaluation(pipeline)


def train_a_little(measure):
    """Two optimizer steps that draw from every global generator; ``measure`` is called where gradients are pending and after a step."""
    unet = tiny_unet().train()
    averaged = EMAModel(unet.parameters(), decay=0.5)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-3)
    random.seed(1), numpy.random.seed(1), torch.manual_seed(1)
    for _ in range(2):
        x = torch.randn(4, 1, 8, 8) + random.random() + float(numpy.random.rand())
        unet(x, torch.randint(0, 1000, (4,))).sample.square().mean().backward()
        measure(unet, averaged)
        optimizer.step()
        optimizer.zero_grad()
        averaged.step(unet.parameters())
        measure(unet, averaged)
    return [*unet.state_dict().values(), *averaged.shadow_params], random_state()


def test_measuring_changes_nothing_in_training():
    process = NoiseProcess.from_scheduler(build_scheduler("ddpm"))
    calls = itertools.count()

    def measure(unet, averaged):
        def look():
            gradients = [None if parameter.grad is None else parameter.grad.clone() for parameter in unet.parameters()]
            return [*map(torch.clone, unet.state_dict().values()), *map(torch.clone, averaged.shadow_params)], gradients, random_state()

        next(calls)
        weights, gradients, state = look()
        evaluation, pipeline = evaluation_of(unet, samples=4)
        evaluation(pipeline, averaged)
        validation_loss(unet, torch.zeros(4, 1, 8, 8), process, "epsilon", ema=averaged)
        weights_after, gradients_after, state_after = look()
        assert all(map(torch.equal, weights, weights_after)) and state == state_after
        assert all((a is None and b is None) or torch.equal(a, b) for a, b in zip(gradients, gradients_after, strict=True))
        assert all(module.training for module in unet.modules())

    with_it, state_with = train_a_little(measure)
    without, state_without = train_a_little(lambda unet, averaged: None)
    assert next(calls) == 4
    assert all(map(torch.equal, with_it, without)) and state_with == state_without


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_measuring_leaves_the_gpu_generator_alone():
    unet = tiny_unet().to("cuda")
    evaluation, pipeline = evaluation_of(unet, samples=4)
    before = random_state()
    evaluation(pipeline)
    with preserved_randomness(torch.device("cuda")):
        torch.randn(3, device="cuda")
    assert random_state() == before


def test_evaluation_refuses_wrong_numbers():
    for options, message in [
        ({"samples": 1, "inference_steps": [5]}, "--eval_samples 1 is too small.* meaningful one 65"),
        ({"samples": 9, "inference_steps": [5, 0]}, "--eval_inference_steps"),
        ({"samples": 9, "inference_steps": []}, "--eval_inference_steps"),
    ]:
        with pytest.raises(UserError, match=message):
            Evaluation(PixelFeatures(1, 8), [DIGITS], **options)


def test_diverged_weights_are_named():
    unet = tiny_unet()
    evaluation, pipeline = evaluation_of(unet)
    with torch.no_grad():
        unet.conv_in.weight.fill_(float("nan"))
    before = random_state()
    with pytest.raises(UserError, match="NaN"):
        evaluation(pipeline)
    assert random_state() == before and unet.training


def test_evaluation_samples_every_class_equally():
    grays = torch.linspace(0, 255, CLASSES).round().to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 8, 8)
    evaluation = Evaluation(PixelFeatures(1, 8), [grays.repeat(5, 1, 1, 1)], samples=20, inference_steps=[2], batch_size=7)
    pipeline = pipeline_of(Painter.from_config(config_of()), prediction_type="sample")
    assert evaluation(pipeline)["frechet_distance"]["2"] == pytest.approx(0, abs=1e-6)
    uneven = Evaluation(PixelFeatures(1, 8), [grays.repeat(5, 1, 1, 1)[:-1]], samples=20, inference_steps=[2], batch_size=7)
    assert uneven(pipeline)["frechet_distance"]["2"] > 1e-3
