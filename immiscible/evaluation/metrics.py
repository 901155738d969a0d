"""The metrics by name: what each is, what it needs and how many images, and their computation, each part of it once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from immiscible.errors import UserError
from immiscible.evaluation.copies import NearestNeighborRatio
from immiscible.evaluation.frechet import FrechetDistance
from immiscible.evaluation.image_sets import ImageSet, shuffled
from immiscible.evaluation.kernels import cmmd, kid, uniformity
from immiscible.evaluation.neighborhoods import DENSITY_NEIGHBOR, neighborhoods
from immiscible.evaluation.within_classes import alignment, per_class_frechet_distance, within_class_distance
from immiscible.randomness import seeded_generator

SPLITS = 10  # of an Inception score
PROBABILITY_SUM = 1e-3  # how far from 1 the probabilities of an image may add up, by the rounding of half precision


def frechet_distance(samples: Tensor, reference: Tensor) -> float:
    """`FrechetDistance` of two sets of features, float64 [N, F] and [M, F]."""
    return FrechetDistance("a Frechet distance", reference)(samples)


def inception_score(probabilities: Tensor, *, splits: int = SPLITS) -> float:
    """The mean over ``splits`` parts of the samples of ``exp(mean_i KL(p(y | x_i) || p(y)))``, p(y) being the part's mean.

    Salimans et al. 2016, "Improved Techniques for Training GANs". The parts are a fixed random choice. Between 1 and the number of classes.

    Args:
        probabilities: float64 [N, K], N at least ``splits``.
        splits: how many parts.

    Raises:
        UserError: they are not probabilities.
    """
    if bool((probabilities < 0).any()) or bool(((probabilities.sum(1) - 1).abs() > PROBABILITY_SUM).any()):
        raise UserError("an Inception score needs the probabilities of classes, which add up to 1, not a network's logits")
    scores = [
        (torch.special.xlogy(part, part) - torch.special.xlogy(part, part.mean(0))).sum(1).mean().exp()
        for part in probabilities[shuffled(probabilities, "inception score")].tensor_split(splits)
    ]
    return float(torch.stack(scores).mean())


def clip_score(image_embeddings: Tensor, text_embeddings: Tensor) -> Tensor:
    """``100 max(cos(image, caption), 0)`` of each image, float64 [N] of [N, E] and [N, E]: the CLIP score is their mean.

    Hessel et al. 2021, "CLIPScore", with 100 for their 2.5. Papers that print 0.24 mean 24 here.
    """
    return 100 * cosine_similarity(image_embeddings, text_embeddings).clamp(min=0)


def nearest_neighbor_ratio(samples: Tensor, training: Tensor, held_out: Tensor) -> float:
    """`NearestNeighborRatio` of three sets of features, float64 [N, F], whatever the order of their rows."""
    images = min(len(training), len(held_out))
    known, unseen = (
        rows if len(rows) == images else rows[shuffled(rows, "nearest neighbor ratio")[:images]] for rows in (training, held_out)
    )
    return NearestNeighborRatio(known, unseen)(samples)


def _covariance_lacks(samples: Tensor, reference: Tensor) -> str:
    count, features = min(len(samples), len(reference)), samples.shape[1]
    if count > features:
        return ""
    return f"{count} images are too few for a covariance of {features} features, which needs at least {features + 1} on each side"


def _classes_lack(samples: Tensor, labels: Tensor, reference: Tensor, reference_labels: Tensor) -> str:
    count, features = min(int(each.unique(return_counts=True)[1].min()) for each in (labels, reference_labels)), samples.shape[1]
    if count > features:
        return ""
    return f"a class of {count} images is too small for a covariance of {features} features, which needs at least {features + 1} of each"


def _subsets_lack(samples: Tensor, reference: Tensor) -> str:
    count = min(len(samples), len(reference))
    return "" if count >= 1000 else f"its subsets are of {count} images: as many as others have, 1000, need at least 1000 on each side"


@dataclass(frozen=True)
class Metric:
    """One entry of `METRICS`.

    Args:
        measure: of the tensors that it needs, in their order. A float is the score; a tensor holds a value of each image and a dict one of
            each class, whose mean it is.
        needs: what, as ``set.field``: of the sets ``samples``, ``reference`` and ``held_out`` the fields of `ImageSet`.
        definition: in a line, for tables.
        source: who defined it.
        best: what the best samples have.
        least: images of each set, without which it is not defined.
        part: the attribute of what ``measure`` returns, where several metrics come from one computation.
        lacks: of the same tensors, what is wrong with few images of them and how many would do; empty where they suffice.
    """

    measure: Callable[..., Any]
    needs: tuple[str, ...]
    definition: str
    source: str
    best: str
    least: int = 2
    part: str | None = None
    lacks: Callable[..., str] = lambda *tensors: ""


_BOTH = ("samples.features", "reference.features")
_LABELLED = ("samples.features", "samples.labels")
_AS_REAL = "as real images"


def _of_neighborhoods(part: str, definition: str, source: str, best: str) -> Metric:
    return Metric(neighborhoods, _BOTH, definition, source, best, least=DENSITY_NEIGHBOR + 1, part=part)


METRICS: dict[str, Metric] = {
    "frechet_distance": Metric(
        frechet_distance,
        _BOTH,
        "squared Frechet distance of the Gaussians that fit the features; FID on Inception's",
        "Heusel et al. 2017",
        best="0",
        lacks=_covariance_lacks,
    ),
    "sfid": Metric(
        frechet_distance,
        ("samples.spatial", "reference.spatial"),
        "the same of features before they are pooled, which see the layout",
        "Nash et al. 2021",
        best="0",
        lacks=_covariance_lacks,
    ),
    "kid": Metric(
        kid,
        _BOTH,
        "unbiased squared MMD with a cubic kernel, mean over 100 subsets of 1000",
        "Binkowski et al. 2018",
        best="0",
        lacks=_subsets_lack,
    ),
    "cmmd": Metric(
        cmmd,
        ("samples.image_embeddings", "reference.image_embeddings"),
        "1000 times the squared MMD of CLIP's embeddings with a Gaussian kernel of sigma 10 (V-statistic)",
        "Jayasumana et al. 2024",
        best="0",
    ),
    "precision": _of_neighborhoods(
        "precision", "share of samples in the ball of a reference image (k = 3)", "Kynkaanniemi et al. 2019", _AS_REAL
    ),
    "recall": _of_neighborhoods(
        "recall", "share of reference images in the ball of a sample (k = 3)", "Kynkaanniemi et al. 2019", _AS_REAL
    ),
    "density": _of_neighborhoods("density", "how many reference images' balls a sample is in, over 5 (k = 5)", "Naeem et al. 2020", "1"),
    "coverage": _of_neighborhoods(
        "coverage", "share of reference images with a sample in their ball (k = 5)", "Naeem et al. 2020", "0.97, as real images"
    ),
    "inception_score": Metric(
        inception_score,
        ("samples.probabilities",),
        "how sure a classifier is of each sample and how evenly classes occur, in 10 parts",
        "Salimans et al. 2016",
        best="as many as classes",
        least=SPLITS,
    ),
    "clip_score": Metric(
        clip_score,
        ("samples.image_embeddings", "samples.text_embeddings"),
        "100 times the cosine of a sample's and its caption's embeddings, not below 0",
        "Hessel et al. 2021",
        best=_AS_REAL,
        least=1,
    ),
    "per_class_frechet_distance": Metric(
        per_class_frechet_distance,
        (*_LABELLED, "reference.features", "reference.labels"),
        "mean over classes of the Frechet distance of a class from itself",
        "as frechet_distance, by class",
        best="0",
        lacks=_classes_lack,
    ),
    "within_class_distance": Metric(
        within_class_distance,
        _LABELLED,
        "mean distance between two samples of a class, of 100 of each",
        "a review of Immiscible Diffusion, 2024",
        best=_AS_REAL,
    ),
    "alignment": Metric(
        alignment,
        _LABELLED,
        "mean squared distance between two samples of a class, of features of length 1",
        "Wang and Isola 2020",
        best=_AS_REAL,
    ),
    "uniformity": Metric(
        uniformity,
        ("samples.features",),
        "log mean of exp(-2 d^2) between two samples, of features of length 1",
        "Wang and Isola 2020",
        best=_AS_REAL,
    ),
    "nearest_neighbor_ratio": Metric(
        nearest_neighbor_ratio,
        (*_BOTH, "held_out.features"),
        "distance of samples from the nearest image trained on, over that from the nearest held out",
        "see `NearestNeighborRatio`",
        best="1",
        least=1,
    ),
}


class Scores(NamedTuple):
    """What `compute` gives, by the names of metrics.

    Args:
        values: the scores.
        intervals: `bootstrap_interval` of those that are means over images; others have none that is honest (see there).
        warnings: a line each where images are too few, or classes were left out.
    """

    values: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    warnings: list[str]


def metrics_of(names: Iterable[str]) -> dict[str, Metric]:
    """The entries of `METRICS`, in the order asked, each once; their ``needs`` say what to compute beforehand.

    Raises:
        UserError: one is unknown.
    """
    chosen = {}
    for name in names:
        if name not in METRICS:
            raise UserError(f"metric {name!r} is unknown; known: {', '.join(METRICS)}")
        chosen[name] = METRICS[name]
    return chosen


def compute(names: Iterable[str], samples: ImageSet, reference: ImageSet | None = None, held_out: ImageSet | None = None) -> Scores:
    """The metrics asked for, what several share once. What is given is checked before anything is computed.

    Args:
        names: of `METRICS`.
        samples: all samples, of all batches and ranks.
        reference: the images that they are held against; those that were trained on.
        held_out: images of the same kind that were not.

    Raises:
        UserError: a name is unknown, a metric needs what is not given, or more images, or a class of 2, or sets have features of different
            networks.
    """
    metrics, sets = metrics_of(names), {"samples": samples, "reference": reference, "held_out": held_out}
    given = {name: _given(name, metric, sets) for name, metric in metrics.items()}
    scores, found = Scores({}, {}, []), {}
    for name, metric in metrics.items():
        what = (metric.measure, metric.needs)
        if what not in found:
            found[what] = metric.measure(*given[name])
        value = found[what] if metric.part is None else getattr(found[what], metric.part)
        if isinstance(value, Tensor):
            scores.intervals[name] = bootstrap_interval(value)
            value = float(value.mean())
        elif isinstance(value, dict):
            scores.warnings.extend(_left_out(name, given[name], value))
            value = sum(value.values()) / len(value)
        scores.values[name] = value
        if lack := metric.lacks(*given[name]):
            scores.warnings.append(f"{name}: {lack}")
    return scores


def bootstrap_interval(values: Tensor, *, level: float = 0.95, draws: int = 1000) -> tuple[float, float]:
    """Where the mean of such values lies in ``level`` of new sets of as many images, by drawing from these with repetition (fixed seed).

    This is for means over images alone: clip_score, and, the balls of the other set taken as given, precision, recall, density and
    coverage. A set drawn with repetition holds a third fewer different images. That makes a Frechet distance, which falls with their
    number, larger on average than the one to be judged, and so with all that compares pairs of images: KID, CMMD, an Inception score,
    distances within classes. Measure those on several sets of samples, from several seeds.

    Args:
        values: float64 [N], one an image.
        level: of confidence.
        draws: how many sets.
    """
    values, generator = values.sort().values, seeded_generator("bootstrap")
    means = torch.stack([values[torch.randint(len(values), (len(values),), generator=generator)].mean() for _ in range(draws)])
    low, high = means.quantile(torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=means.dtype)).tolist()
    return low, high


def _given(name: str, metric: Metric, sets: Mapping[str, ImageSet | None]) -> list[Tensor]:
    """The tensors that a metric needs."""
    tensors: list[Tensor] = []
    widths: dict[str, int] = {}
    for need in metric.needs:
        whose, field = need.split(".")
        tensor = getattr(sets[whose], field, None)
        if tensor is None:
            raise UserError(f"{name} needs {_words(need)}")
        if len(tensor) < metric.least:
            raise UserError(f"{name} needs {_words(need)} of at least {metric.least} images, not {len(tensor)}")
        width = 1 if field == "labels" else tensor.shape[1]
        if widths.setdefault(field, width) != width:
            raise UserError(f"{name}: {_words(need)} are {width} an image and those of the samples {widths[field]}: of one network?")
        tensors.append(tensor)
    return tensors


def _words(need: str) -> str:
    whose, field = need.split(".")
    owner = "the samples" if whose == "samples" else f"the {whose.replace('_', '-')} images"
    return f"the {field.replace('_', ' ')} of {owner}"


def _left_out(name: str, tensors: list[Tensor], of_class: dict[int, float]) -> list[str]:
    """A line on the classes without a number, if there are any.

    Raises:
        UserError: no class has one.
    """
    labels = [tensor for tensor in tensors if not tensor.is_floating_point()]
    classes, sides = len(torch.cat(labels).unique()), " on each side" if len(labels) > 1 else ""
    if not of_class:
        raise UserError(f"{name} needs a class with at least 2 images{sides}; none of {classes} has so many")
    left_out = classes - len(of_class)
    return [f"{name}: {left_out} of {classes} classes are left out, having fewer than 2 images{sides}"] if left_out else []
