"""Scores of samples by name: what they need, whether it is there, the numbers, and how they are told."""

from __future__ import annotations

import platform
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from immiscible import __version__
from immiscible.errors import UserError
from immiscible.evaluation.features import FeatureNetwork
from immiscible.evaluation.image_files import ImageFiles
from immiscible.evaluation.inception import InceptionFeatures
from immiscible.evaluation.kept_features import MeasuredImages
from immiscible.evaluation.metrics import METRICS, Scores, compute, metrics_of
from immiscible.evaluation.protocols import Protocol
from immiscible.evaluation.statistics import distance_of_statistics

BY_MOMENTS = {"frechet_distance": "features", "sfid": "spatial"}  # metrics of means and covariances alone, and of which field
SETS = {"samples": "--samples", "reference": "--reference", "held_out": "--held_out"}
FID = "fid"  # what frechet_distance may be called on the network of FID, and nowhere else


@dataclass(frozen=True)
class Available:
    """What a set of images has.

    Attributes:
        named: the flag and what it names.
        fields: of `ImageSet`, of each image; none where there are statistics alone.
        moments: the fields with mean and covariance.
    """

    named: str
    fields: Collection[str]
    moments: Collection[str]


def chosen_metrics(asked: Sequence[str] | None, protocol: Protocol) -> list[str]:
    """The names of what is measured, each once; those of the protocol where none is asked for.

    Raises:
        UserError: one is unknown.
    """
    names = ["frechet_distance" if name == FID else name for name in asked or protocol.metrics]
    try:
        return list(metrics_of(names))
    except UserError as error:
        raise UserError(f"--metrics: {error}, and {FID} on --features inception") from None


def check_fid(asked: Sequence[str] | None, features: FeatureNetwork) -> None:
    """Whether what is called FID is it.

    Raises:
        UserError: it is of another network.
    """
    if FID in (asked or ()) and not isinstance(features, InceptionFeatures):
        raise UserError(f"--metrics fid is of --features inception alone; frechet_distance is that of any, here {features.name}")


def fields_needed(names: Iterable[str], of: str) -> set[str]:
    """The fields of `ImageSet` that metrics need of one of `SETS`."""
    needs = (need.split(".") for metric in metrics_of(names).values() for need in metric.needs)
    return {field for whose, field in needs if whose == of}


def rows_needed(names: Iterable[str], of: str) -> set[str]:
    """Those of which they need each image."""
    return fields_needed([name for name in names if name not in BY_MOMENTS], of)


def moments_needed(names: Iterable[str], of: str) -> set[str]:
    """Those of which they need mean and covariance."""
    return fields_needed([name for name in names if name in BY_MOMENTS], of)


def check_available(names: Iterable[str], sets: Mapping[str, Available], features: FeatureNetwork) -> None:
    """Whether all is there that metrics need, before anything is sampled or measured.

    Raises:
        UserError: something is not; the line says what, and which flag gives it.
    """
    for name, metric in metrics_of(names).items():
        for whose, field in (need.split(".") for need in metric.needs):
            if whose not in sets:
                raise UserError(f"--metrics {name} needs {SETS[whose]}")
            found = sets[whose]
            if field in (found.moments if name in BY_MOMENTS else found.fields):
                continue
            if field == "labels":
                raise UserError(f"--metrics {name} needs the class of each image, and {found.named} has none")
            if field in found.moments and not found.fields:
                raise UserError(f"--metrics {name} needs the images themselves, and {found.named} holds statistics alone")
            if field == "text_embeddings" and "image_embeddings" in found.fields:
                raise UserError(f"--metrics {name} needs the caption of each sample, and {found.named} has none")
            what = f"the features are {features.name}" if found.fields else f"{found.named} does not hold them"
            raise UserError(f"--metrics {name} needs {field.replace('_', ' ')}, and {what}; docs/SCORES.md says which have them")


def score(names: Sequence[str], samples: MeasuredImages, reference: MeasuredImages, held_out: MeasuredImages) -> Scores:
    """The metrics, in their order; those that need the same come from one reading of it, and no more is in memory than these need.

    Args:
        names: of `METRICS`.
        samples: what is scored.
        reference: the images, or their statistics, that it is held against.
        held_out: more of their kind.

    Raises:
        UserError: a metric needs more images, or a class of 2; or sets are of different networks.
    """
    scores, metrics = Scores({}, {}, []), metrics_of(names)
    groups = dict[tuple[str, ...], list[str]]()
    for name, metric in metrics.items():
        if field := BY_MOMENTS.get(name):
            ours, theirs = samples.moments(field), reference.moments(field)
            scores.values[name] = distance_of_statistics(ours, theirs)
            # without their values: how many there are is all that is looked at
            shapes = [torch.empty(of.count or ours.count or 0, len(of.mean), device="meta") for of in (ours, theirs)]
            scores.warnings.extend(f"{name}: {lack}" for lack in [metric.lacks(*shapes)] if lack)
        else:
            groups.setdefault(metric.needs, []).append(name)
    for group in groups.values():
        sets = (
            each.rows(fields) if (fields := fields_needed(group, of)) else None
            for of, each in zip(SETS, (samples, reference, held_out), strict=True)
        )
        found = compute(group, *sets)  # type: ignore[arg-type]
        scores.values.update(found.values)
        scores.intervals.update(found.intervals)
        scores.warnings.extend(found.warnings)
    return Scores({name: scores.values[name] for name in metrics}, scores.intervals, scores.warnings)


def available(named: str, given: Collection[str], *, labels: bool, captions: bool) -> Available:
    """What images have, of which a network gives some fields, which may have classes and captions."""
    fields = set(given) - (set() if captions else {"text_embeddings"})
    return Available(named, fields | ({"labels"} if labels else set()), fields)


def check_classes(samples: Sequence[str] | None, reference: ImageFiles) -> None:
    """Whether the classes of the samples are those of the reference, where both have names; else their numbers are taken to be.

    Raises:
        UserError: they are not.
    """
    if samples is not None and reference.class_names is not None and list(samples) != list(reference.class_names):
        theirs, ours = (", ".join(names[:5]) for names in (reference.class_names, samples))
        raise UserError(f"{reference.named} has other classes ({theirs}) than the samples ({ours})")


def versions() -> dict[str, str]:
    """Of what numbers may depend on."""
    import diffusers

    return {"python": platform.python_version(), "torch": torch.__version__, "diffusers": diffusers.__version__, "immiscible": __version__}


def facts_of(features: FeatureNetwork, name: str) -> dict[str, Any]:
    """What says which network looked, for the JSON."""
    return {
        "features": name,
        "distance": features.name,
        "num_features": features.num_features,
        "weights_sha256": getattr(features, "weights_sha256", None),
        "resize": getattr(features, "resize", "own"),
    }


def values_of(scores: Scores) -> dict[str, dict[str, Any]]:
    """``{"precision": {"value": 0.7, "interval": [0.6, 0.8]}}``: of each metric its value, and an interval where `compute` gives one."""
    return {
        name: {"value": value, **({"interval": list(scores.intervals[name])} if name in scores.intervals else {})}
        for name, value in scores.values.items()
    }


def table(scores: Scores, distance: str) -> str:
    """The scores in Markdown, and the warnings below.

    Args:
        scores: which.
        distance: what the distance of these features is called.
    """
    lines = ["| metric | value | 95 % by these images | best |", "|---|---|---|---|"]
    for name, value in scores.values.items():
        low, high = scores.intervals.get(name, (None, None))
        called = f"{name} ({distance})" if name == "frechet_distance" else name
        lines.append(f"| {called} | {value:.6g} | {'' if low is None else f'{low:.4g} to {high:.4g}'} | {METRICS[name].best} |")
    return "\n".join([*lines, *(f"warning: {warning}" for warning in scores.warnings)])
