"""Metrics of a network's samples: what they are of, what they need, and that they leave no trace in training."""

from __future__ import annotations

import itertools
import logging
import random
import types

import numpy
import pytest
import torch
from class_networks import CLASSES, Painter, config_of, pipeline_of
from class_networks import tiny_unet as class_unet
from diffusers.training_utils import EMAModel
from measured import DIGITS, random_state, reference_distance

from immiscible.errors import UserError
from immiscible.evaluation import sampled as module
from immiscible.evaluation.copies import NearestNeighborRatio
from immiscible.evaluation.features import PixelFeatures, PrincipalDirections
from immiscible.evaluation.image_sets import ImageSet
from immiscible.evaluation.metrics import METRICS, compute
from immiscible.evaluation.sampled import FIELDS, Evaluation
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


CLASSED = ["kid", "precision", "coverage", "per_class_frechet_distance", "within_class_distance", "uniformity"]
LABELS = torch.arange(len(DIGITS)) % CLASSES


def test_each_metric_is_of_the_samples_at_each_scale_and_number_of_steps():
    features, pipeline = Passed(64), pipeline_of(class_unet(null_class=True), prediction_type="v_prediction")
    options = {"samples": 30, "inference_steps": [1, 2], "guidance_scales": [1, 3], "batch_size": 30}
    reference = zip(DIGITS[:900].split(400), LABELS[:900].split(400), strict=True)
    evaluation = Evaluation(features, reference, **options, metrics=["frechet_distance", *CLASSED], num_classes=CLASSES)
    result = evaluation(pipeline)
    assert features.seen == 900 + 4 * 30
    real = ImageSet(features=DIGITS[:900].flatten(1), labels=LABELS[:900])
    for scale in (1, 3):
        of = {"guidance_scale": scale, "seed": EVALUATION_SEED, "batch_size": 30, "device": torch.device("cpu")}
        samples = torch.from_numpy(sample_images(pipeline, 30, steps=2, **of)).flatten(1)
        expected = compute(CLASSED, ImageSet(features=samples, labels=torch.arange(30) % CLASSES), real).values
        found = {name: result["metrics"][name] if scale == 1 else result["metrics"][f"{name}_guided"]["3"] for name in CLASSED}
        assert {name: values["2"] for name, values in found.items()} == pytest.approx(expected, rel=1e-9)
        assert all(list(values) == ["1", "2"] for values in found.values())
    alike = ["within_class_distance", "uniformity"]
    assert result["metrics_real"] == compute(alike, real).values
    plain = Evaluation(features, [DIGITS[:900]], **options)(pipeline)
    assert plain == {key: value for key, value in result.items() if not key.startswith("metrics")}


def test_metrics_along_principal_directions():
    unet, features = tiny_unet().eval(), PixelFeatures(1, 8)
    _, pipeline = evaluation_of(unet)
    options = {"samples": 30, "inference_steps": [2], "batch_size": 30, "directions": 5}
    result = Evaluation(features, [DIGITS], **options, metrics=["precision", "kid"])(pipeline)
    known = features(DIGITS)
    along = PrincipalDirections(features, known, 5)
    expected = compute(["precision", "kid"], ImageSet(along(sampled(pipeline, 30, 2))), ImageSet(along.along(known))).values
    assert {name: result["metrics"][name]["2"] for name in expected} == pytest.approx(expected, rel=1e-9)


class Knowing(Passed):
    """A network that says more of an image than its features, in the manner of Inception and CLIP at once."""

    def outputs(self, images):
        found = self(images)
        return {"features": found, "spatial": found[:, :3], "probabilities": found[:, :4].softmax(1), "image_embeddings": -found}

    def texts(self, texts):
        return torch.tensor([[len(text), *[1.0] * 63] for text in texts], dtype=torch.float64)


def blank(monkeypatch):
    """Samples that are drawn without a network: image i is digit i."""

    def draw(pipeline, count, *, first, prompts, **options):
        assert list(prompts) == ["a", "bcd"]
        return DIGITS[first : first + count].permute(0, 2, 3, 1).numpy()

    monkeypatch.setattr(module, "sample_images", draw)
    return types.SimpleNamespace(unet=tiny_unet())


def test_what_a_network_says_beside_features_is_scored_too(monkeypatch):
    pipeline, features, names = blank(monkeypatch), Knowing(64), ["sfid", "cmmd", "inception_score", "clip_score"]
    options = {"samples": 20, "inference_steps": [2], "batch_size": 7, "prompts": ["a", "bcd"]}
    result = Evaluation(features, DIGITS.split(900), **options, metrics=names)(pipeline)
    assert features.seen == len(DIGITS) + 20
    texts = features.texts(["a", "bcd"] * 10)
    samples, reference = ImageSet(**features.outputs(DIGITS[:20]), text_embeddings=texts), ImageSet(**features.outputs(DIGITS))
    expected = compute(names, samples, reference).values
    assert {name: result["metrics"][name]["2"] for name in names} == pytest.approx(expected, rel=1e-9)
    assert result["metrics_real"] == pytest.approx(compute(["inception_score"], reference).values)


@pytest.mark.parametrize(
    "metric, options, message",
    [
        ("sfid", {}, "sfid needs features before they are pooled, which FD-passed does not know; --eval_features inception does"),
        ("cmmd", {}, "cmmd needs embeddings of CLIP, which FD-passed does not know; --eval_features clip or clip-l14-336 does"),
        ("inception_score", {}, "needs probabilities of classes, which FD-passed does not know; --eval_features inception does"),
        ("clip_score", {}, "clip_score needs samples of captions, which the text-to-image scripts train with"),
        ("alignment", {}, "alignment needs samples of known classes: train with --class_conditional"),
        ("alignment", {"num_classes": 20}, "--eval_samples 20 is too small: alignment needs at least 2 of some class, of 20"),
        ("nearest_neighbor_ratio", {}, "needs images held out: give --validation_split or --eval_data_dir"),
        ("density", {"samples": 5}, "--eval_samples 5 is too small: density needs at least 6"),
        ("recall", {"reference": [DIGITS[:4]]}, "recall needs at least 6 reference images, not 4"),
        ("fid", {}, "metric 'fid' is unknown; known: frechet_distance, sfid"),
    ],
)
def test_a_metric_that_lacks_what_it_needs_is_refused_before_anything_is_sampled(metric, options, message):
    given = {"reference": [DIGITS], "samples": 20, "inference_steps": [1], **options}
    with pytest.raises(UserError, match=message) as caught:
        Evaluation(Passed(64), given.pop("reference"), **given, metrics=["kid", metric])
    assert caught.value.exit_code == 2 and len(str(caught.value).splitlines()) == 1


def test_what_metrics_need_is_known():
    fields = {need.split(".")[1] for metric in METRICS.values() for need in metric.needs}
    assert fields - FIELDS.keys() == {"features", "labels", "text_embeddings"}  # which have checks of their own


def test_too_few_images_of_a_metric_are_told_once(caplog):
    caplog.set_level(logging.WARNING)
    evaluation, pipeline = evaluation_of(tiny_unet(), metrics=["kid"])
    evaluation(pipeline)
    assert caplog.text.count("kid: its subsets are of 20 images") == 1  # at two numbers of inference steps
