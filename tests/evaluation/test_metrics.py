"""The table of metrics: scores of the definitions, each computed once, whatever the order of rows, and what is told of bad input."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import numpy
import pytest
import torch
from scipy.stats import entropy, norm
from torchmetrics.image.inception import InceptionScore

from immiscible.errors import UserError
from immiscible.evaluation import metrics
from immiscible.evaluation.copies import NearestNeighborRatio
from immiscible.evaluation.frechet import FrechetDistance
from immiscible.evaluation.image_sets import ImageSet, shuffled
from immiscible.evaluation.kernels import cmmd, kid, uniformity
from immiscible.evaluation.metrics import METRICS, bootstrap_interval, clip_score, compute, inception_score, metrics_of
from immiscible.evaluation.neighborhoods import neighborhoods
from immiscible.evaluation.within_classes import alignment, per_class_frechet_distance, within_class_distance


def drawn(count, seed, features=6, shift=0.0):
    return torch.randn(count, features, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift


def image_set(count, seed, shift=0.0):
    return ImageSet(
        features=drawn(count, seed, 6, shift),
        spatial=drawn(count, seed + 1, 9, shift),
        probabilities=drawn(count, seed + 2, 4).softmax(1),
        image_embeddings=drawn(count, seed + 3, 5, shift),
        text_embeddings=drawn(count, seed + 4, 5),
        labels=torch.arange(count) % 4,
    )


def reordered(images, seed):
    """The same images as two ranks, and other batches, would have gathered them."""
    order = torch.randperm(len(images.features), generator=torch.Generator().manual_seed(seed))
    return ImageSet(**{field.name: getattr(images, field.name)[order] for field in fields(images)})


SAMPLES, REFERENCE, HELD_OUT = image_set(90, 10, shift=0.3), image_set(70, 20), image_set(50, 30)


def test_each_name_gives_its_metric():
    scores = compute(METRICS, SAMPLES, REFERENCE, HELD_OUT)
    balls = neighborhoods(SAMPLES.features, REFERENCE.features)
    of_classes = per_class_frechet_distance(SAMPLES.features, SAMPLES.labels, REFERENCE.features, REFERENCE.labels)
    chosen = shuffled(REFERENCE.features, "nearest neighbor ratio")[:50]
    expected = {
        "frechet_distance": FrechetDistance("FD", REFERENCE.features)(SAMPLES.features),
        "sfid": FrechetDistance("FD", REFERENCE.spatial)(SAMPLES.spatial),
        "kid": kid(SAMPLES.features, REFERENCE.features),
        "cmmd": cmmd(SAMPLES.image_embeddings, REFERENCE.image_embeddings),
        "precision": float(balls.precision.mean()),
        "recall": float(balls.recall.mean()),
        "density": float(balls.density.mean()),
        "coverage": float(balls.coverage.mean()),
        "inception_score": inception_score(SAMPLES.probabilities),
        "clip_score": float(clip_score(SAMPLES.image_embeddings, SAMPLES.text_embeddings).mean()),
        "per_class_frechet_distance": numpy.mean(list(of_classes.values())),
        "within_class_distance": numpy.mean(list(within_class_distance(SAMPLES.features, SAMPLES.labels).values())),
        "alignment": numpy.mean(list(alignment(SAMPLES.features, SAMPLES.labels).values())),
        "uniformity": uniformity(SAMPLES.features),
        "nearest_neighbor_ratio": NearestNeighborRatio(REFERENCE.features[chosen], HELD_OUT.features)(SAMPLES.features),
    }
    assert scores.values == pytest.approx(expected, rel=1e-12)
    assert all(type(value) is float for value in scores.values.values())
    assert set(scores.intervals) == {"clip_score", "precision", "recall", "density", "coverage"}
    assert all(low <= scores.values[name] <= high for name, (low, high) in scores.intervals.items())


def test_scores_do_not_depend_on_the_order_in_which_batches_and_ranks_gave_the_images():
    whole = compute(METRICS, SAMPLES, REFERENCE, HELD_OUT)
    gathered = compute(METRICS, reordered(SAMPLES, 1), reordered(REFERENCE, 2), reordered(HELD_OUT, 3))
    assert gathered.values == pytest.approx(whole.values, rel=1e-10)
    for name, interval in whole.intervals.items():
        assert gathered.intervals[name] == pytest.approx(interval, rel=1e-10)
    assert gathered.warnings == whole.warnings


def test_equal_sets_have_distances_of_0_and_shares_of_1():
    zero, one = ["frechet_distance", "sfid", "cmmd", "per_class_frechet_distance"], ["precision", "recall", "density", "coverage"]
    values = compute([*zero, *one, "nearest_neighbor_ratio"], REFERENCE, REFERENCE, REFERENCE).values
    assert [values[name] for name in zero] == pytest.approx([0] * 4, abs=1e-6)
    assert [values[name] for name in [*one, "nearest_neighbor_ratio"]] == pytest.approx([1] * 5, rel=1e-12)


def test_what_metrics_share_is_computed_once(monkeypatch):
    calls = []

    def counted(*tensors):
        calls.append(len(tensors))
        return neighborhoods(*tensors)

    four = ("precision", "recall", "density", "coverage")
    monkeypatch.setattr(metrics, "METRICS", METRICS | {name: replace(METRICS[name], measure=counted) for name in four})
    assert compute(four, SAMPLES, REFERENCE).values == pytest.approx(compute([*four, "recall"], SAMPLES, REFERENCE).values)
    assert calls == [2, 2]


@pytest.mark.parametrize("splits", [1, 3, 10])
def test_inception_score_is_the_exponential_of_the_mean_divergence(splits):
    probabilities = drawn(47, 1, 7).mul(3).softmax(1)
    probabilities[:9] = torch.nn.functional.one_hot(torch.arange(9) % 7, 7).double()  # zeros
    parts = numpy.array_split(probabilities[shuffled(probabilities, "inception score")].numpy(), splits)
    expected = numpy.mean([numpy.exp(numpy.mean([entropy(row, part.mean(0)) for row in part])) for part in parts])
    assert inception_score(probabilities, splits=splits) == pytest.approx(expected, rel=1e-12)


@pytest.mark.filterwarnings("ignore::UserWarning")  # torchmetrics', of a buffer and of a deviation that is not asked for
def test_inception_score_is_that_of_torchmetrics_for_one_part():
    logits = drawn(40, 1, 7)
    other = InceptionScore(torch.nn.Identity(), splits=1)
    other.update(logits)
    assert inception_score(logits.softmax(1), splits=1) == pytest.approx(float(other.compute()[0]), rel=1e-10)


def test_inception_score_is_the_number_of_classes_at_best_and_1_where_nothing_is_told():
    sure = torch.nn.functional.one_hot(torch.arange(50) % 5, 5).double()
    assert inception_score(sure, splits=1) == pytest.approx(5, rel=1e-12)
    assert inception_score(torch.full((50, 5), 0.2, dtype=torch.float64)) == pytest.approx(1, rel=1e-12)
    assert inception_score(sure[:10]) == 1  # parts of one image


def test_logits_are_no_probabilities():
    with pytest.raises(UserError, match="which add up to 1, not a network's logits"):
        inception_score(drawn(20, 1))


def test_clip_score_leaves_no_image_below_0():
    images, texts = drawn(30, 1), drawn(30, 2)
    a, b = images.numpy(), texts.numpy()
    cosines = (a * b).sum(1) / numpy.linalg.norm(a, axis=1) / numpy.linalg.norm(b, axis=1)
    assert (cosines < 0).any()
    assert clip_score(images, texts).tolist() == pytest.approx(100 * cosines.clip(0), rel=1e-12)
    assert clip_score(images, images).tolist() == pytest.approx([100] * 30, rel=1e-12)


def test_the_interval_of_a_mean_is_that_of_the_normal_distribution_for_many_images():
    values = drawn(400, 1, 1, shift=3.0)[:, 0]
    low, high = bootstrap_interval(values)
    half = norm.ppf(0.975) * float(values.std()) / 20
    assert (low, high) == pytest.approx((float(values.mean()) - half, float(values.mean()) + half), abs=0.1 * half)
    assert bootstrap_interval(values.flip(0)) == (low, high)
    assert bootstrap_interval(torch.full((9,), 0.5, dtype=torch.float64)) == (0.5, 0.5)


def test_too_few_images_are_told_with_the_number_needed():
    few, enough = ImageSet(features=drawn(6, 1), labels=torch.tensor([0, 0, 0, 1, 1, 2])), ImageSet(features=drawn(7, 2))
    assert compute(["frechet_distance"], few, enough).warnings == [
        "frechet_distance: 6 images are too few for a covariance of 6 features, which needs at least 7 on each side"
    ]
    assert compute(["frechet_distance", "precision"], enough, enough).warnings == []
    assert "of 6 images: as many as others have, 1000, need at least 1000" in compute(["kid"], few, enough).warnings[0]
    classes = compute(["per_class_frechet_distance", "within_class_distance"], few, few).warnings
    assert classes == [
        "per_class_frechet_distance: 1 of 3 classes are left out, having fewer than 2 images on each side",
        "per_class_frechet_distance: a class of 1 images is too small for a covariance of 6 features, which needs at least 7 of each",
        "within_class_distance: 1 of 3 classes are left out, having fewer than 2 images",
    ]


@pytest.mark.parametrize(
    "names, changes, message",
    [
        (["fid"], {}, "metric 'fid' is unknown; known: frechet_distance, sfid, kid, "),
        (["clip_score"], {"image_embeddings": drawn(9, 1)}, "^clip_score needs the text embeddings of the samples$"),
        (["nearest_neighbor_ratio"], {}, "^nearest_neighbor_ratio needs the features of the held-out images$"),
        (["coverage"], {"features": drawn(5, 1)}, "^coverage needs the features of the samples of at least 6 images, not 5$"),
        (["kid"], {"features": drawn(9, 1, 5)}, "^kid: the features of the reference images are 6 an image and those of the samples 5"),
        (
            ["alignment"],
            {"features": drawn(3, 1), "labels": torch.arange(3)},
            "needs a class with at least 2 images; none of 3 has so many",
        ),
        (["within_class_distance"], {"labels": torch.arange(3)}, "rows of different number: 9 features, 3 labels"),
        (["kid"], {"features": torch.full((9, 6), torch.nan)}, "the images' features hold NaN or infinite values"),
    ],
)
def test_what_cannot_be_measured_is_said_in_a_line(names, changes, message):
    given = {"features": drawn(9, 1), "image_embeddings": None, "text_embeddings": None, "labels": None} | changes
    with pytest.raises(UserError, match=message):
        compute(names, ImageSet(**given), REFERENCE)


def test_features_of_any_precision_are_measured_in_double():
    assert ImageSet(features=torch.ones(3, 2, dtype=torch.float16)).features.dtype == torch.float64


def test_metrics_of_keeps_the_order_and_each_once():
    assert list(metrics_of(["recall", "kid", "recall"])) == ["recall", "kid"]


def test_the_page_of_metrics_lists_each_as_the_table_does():
    page = (Path(__file__).parents[2] / "docs" / "SCORES.md").read_text()
    for name, metric in METRICS.items():
        assert f"| `{name}` | {metric.definition} | {metric.source} | {metric.best} | {metric.least} |" in page
