"""Frechet distances and other metrics of samples at several numbers of inference steps and guidance scales."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor
from tqdm import tqdm

from immiscible.errors import UserError
from immiscible.evaluation.copies import NearestNeighborRatio
from immiscible.evaluation.features import FeatureNetwork, PrincipalDirections, features_of
from immiscible.evaluation.frechet import FrechetDistance
from immiscible.evaluation.image_sets import ImageSet
from immiscible.evaluation.metrics import compute, metrics_of
from immiscible.evaluation.validation import BATCH_SIZE, EVALUATION_SEED
from immiscible.networks.weights import evaluation_weights
from immiscible.randomness import preserved_randomness
from immiscible.sampling.pipelines import WHOLE, network_of, sample_images, sample_labels

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from diffusers.training_utils import EMAModel


logger = logging.getLogger(__name__)

OWN_KEYS = ("frechet_distance", "nearest_neighbor_ratio")  # of metrics that are measured unasked, and stand outside ``metrics``
FIELDS = {  # what some networks say of images beside their features, and which entries of `FEATURES` do
    "spatial": ("features before they are pooled", "inception"),
    "probabilities": ("probabilities of classes", "inception"),
    "image_embeddings": ("embeddings of CLIP", "clip or clip-l14-336"),
}


class _Measured(TypedDict):
    feature: str
    num_features: int
    samples: int
    reference_images: int
    frechet_distance: dict[str, float]
    frechet_distance_guided: dict[str, dict[str, float]]


class EvaluationResult(_Measured, total=False):
    """One evaluation, ready for JSON.

    ``feature`` is the distance's name and ``num_features`` its dimension, ``samples`` and ``reference_images`` are the numbers of images
    that it compares, and ``frechet_distance`` is its value for each number of inference steps, as text: ``{"5": 12.3, "20": 4.5}``,
    without guidance; ``frechet_distance_guided`` holds the same for each other guidance scale: ``{"1.5": {"5": 10.2, "20": 4.1}}``.
    Where images are held out, ``frechet_distance_held_out`` is the distance of the same samples from ``held_out_images`` of them, and
    ``nearest_neighbor_ratio`` what `NearestNeighborRatio` says of them, each with its ``_guided``, too.

    Where other metrics are asked for, ``metrics`` holds each by name in the same way, ``{"kid": {"5": 0.3}, "kid_guided": {}}``, and
    ``metrics_real`` what those that look at samples alone say of the reference images.
    """

    held_out_images: int
    frechet_distance_held_out: dict[str, float]
    nearest_neighbor_ratio: dict[str, float]
    frechet_distance_held_out_guided: dict[str, dict[str, float]]
    nearest_neighbor_ratio_guided: dict[str, dict[str, float]]
    metrics: dict[str, Any]
    metrics_real: dict[str, float]


class Evaluation:
    """Metrics of a pipeline's samples at several numbers of inference steps, always from the same noises.

    It samples in the calling process alone; in a run of several ranks rank 0 evaluates and the others wait. A class-conditional
    network is sampled with every class equally often, also where the reference's classes are not.

    Args:
        features: from `build_features`, or any `FeatureNetwork`.
        reference: batches of reference images, uint8 [B, C, H, W], usually `fixed_images` through `to_uint8`; or pairs of such a batch and
            its classes, int64 [B], for metrics that need them; read once, here.
        metrics: names of `METRICS`; the Frechet distance is always measured, and the nearest neighbor ratio where images are held out.
        num_classes: how many classes the samples are of, see `sample_labels`; None without.
        held_out: batches of images like those that were not trained on; none to measure against the reference alone.
        directions: measure along so many `PrincipalDirections` of the reference; None for the features as they are.
        samples: images to sample per number of inference steps; at least 2, and more than the features are many.
        inference_steps: the numbers of inference steps, each at least 1.
        batch_size: images sampled together.
        prompts: sample i is of prompt i modulo their number, for a text-to-image pipeline.
        guidance_scales: at each of which there are so many samples; 1 is without guidance.
        guidance_interval: the noise levels at which classes are guided.

    Raises:
        UserError: a number is out of range, a metric needs what is not there, or what `FrechetDistance` raises.
    """

    def __init__(
        self,
        features: FeatureNetwork,
        reference: Iterable[Tensor | tuple[Tensor, Tensor]],
        *,
        samples: int,
        inference_steps: Iterable[int],
        batch_size: int = BATCH_SIZE,
        prompts: Sequence[str] = (),
        guidance_scales: Iterable[float] = (1.0,),
        guidance_interval: tuple[float, float] = WHOLE,
        held_out: Iterable[Tensor] = (),
        directions: int | None = None,
        metrics: Iterable[str] = (),
        num_classes: int | None = None,
    ) -> None:
        self.prompts, self.guidance_scales, self.guidance_interval = prompts, sorted(set(guidance_scales)), guidance_interval
        self.samples, self.inference_steps, self.batch_size = samples, sorted(set(inference_steps)), batch_size
        if samples < 2:
            raise UserError(f"--eval_samples {samples} is too small: a covariance needs 2, a meaningful one {features.num_features + 1}")
        if not self.inference_steps or self.inference_steps[0] < 1:
            raise UserError("--eval_inference_steps needs numbers of at least 1")
        asked = metrics_of(metrics)
        self._metrics = {name: metric for name, metric in asked.items() if name not in OWN_KEYS}
        self._network, self._warned = features, set[str]()
        self._along: PrincipalDirections | None = None
        self._check_samples(num_classes)
        with preserved_randomness():
            unseen = features_of(features, held_out, keep=True)
            if "nearest_neighbor_ratio" in asked and not len(unseen):
                raise UserError("--eval_metrics nearest_neighbor_ratio needs images held out: give --validation_split or --eval_data_dir")
            rows, known = self._seen(reference, keep=True)
            if directions is not None:
                self._along = PrincipalDirections(features, rows, directions)
                rows, unseen = self._along.along(rows), self._along.along(unseen)
                known = replace(known, features=rows)
            self.features, self.reference_images, self.held_out_images = self._along or features, len(rows), len(unseen)
            self._measure_against(rows, known, unseen)
        self._tell_too_few()

    def _check_samples(self, num_classes: int | None) -> None:
        """Whether the samples will have what the metrics need, before any image is read."""
        for name, metric in self._metrics.items():
            given = f"--eval_samples {self.samples} is too small: {name} needs"
            if self.samples < metric.least:
                raise UserError(f"{given} at least {metric.least}")
            if "samples.text_embeddings" in metric.needs and not self.prompts:
                raise UserError(f"--eval_metrics {name} needs samples of captions, which the text-to-image scripts train with")
            if "samples.labels" in metric.needs and num_classes is None:
                raise UserError(f"--eval_metrics {name} needs samples of known classes: train with --class_conditional")
            if "samples.labels" in metric.needs and num_classes is not None and self.samples <= num_classes:
                raise UserError(f"{given} at least 2 of some class, of {num_classes} that are sampled equally often")

    def _measure_against(self, rows: Tensor, known: ImageSet, unseen: Tensor) -> None:
        """Keeps what samples are held against: the reference's features and all else of it, and the features of images held out."""
        self._measures: dict[str, Callable[[Tensor], float]] = {"frechet_distance": FrechetDistance(self.features.name, rows)}
        if len(unseen):
            self._measures["frechet_distance_held_out"] = FrechetDistance(f"{self.features.name} of held-out images", unseen)
            self._measures["nearest_neighbor_ratio"] = NearestNeighborRatio(rows, unseen)
        for name, metric in self._metrics.items():
            if self.reference_images < metric.least:
                raise UserError(f"--eval_metrics {name} needs at least {metric.least} reference images, not {self.reference_images}")
        of_samples = [
            name
            for name, metric in self._metrics.items()
            if all(whose == "samples" and getattr(known, field) is not None for whose, field in (need.split(".") for need in metric.needs))
        ]
        self._reference = known if self._metrics else None  # else its features need not be held
        self._real = compute(of_samples, known).values

    def _tell_too_few(self) -> None:
        counts = {"--eval_samples": self.samples, "the number of reference images": self.reference_images}
        if self.held_out_images:
            counts["the number of held-out images"] = self.held_out_images
        for what, count in counts.items():
            if count <= self.features.num_features:
                logger.warning(
                    "%s is %d: too few for the %d features of %s, whose covariance needs at least %d (and says more with ten times that)",
                    what,
                    count,
                    self.features.num_features,
                    self.features.name,
                    self.features.num_features + 1,
                )

    def __call__(self, pipeline: DiffusionPipeline, ema: EMAModel | None = None) -> EvaluationResult:
        """Samples and measures; image i starts from the same noise at every call, for every run, scale and number of inference steps.

        Args:
            pipeline: from `build_pipeline`; its network may be the one in training.
            ema: the averaged weights to sample with, swapped in for the time of the call.

        Raises:
            UserError: (exit code 1) the samples hold NaN values.
        """
        network = network_of(pipeline)
        total = self.samples * len(self.inference_steps) * len(self.guidance_scales)
        with (
            preserved_randomness(network.device),
            evaluation_weights(network, ema),
            tqdm(total=total, desc="evaluating", unit="sample", delay=2, leave=False, disable=None) as bar,
        ):
            labels = sample_labels(network, self.samples)
            measured = {
                scale: {str(steps): self._measure(self._sample(pipeline, steps, scale, bar), labels) for steps in self.inference_steps}
                for scale in self.guidance_scales
            }

        def told(names: Iterable[str]) -> dict[str, Any]:
            """Measures without guidance, and at each other scale."""
            found: dict[str, Any] = {}
            for name in names:
                values = {scale: {steps: of[name] for steps, of in of_scale.items()} for scale, of_scale in measured.items()}
                found[name] = values.pop(1.0, {})
                found[f"{name}_guided"] = {f"{scale:g}": of_scale for scale, of_scale in values.items()}
            return found

        result: Any = {
            "feature": self.features.name,
            "num_features": self.features.num_features,
            "samples": self.samples,
            "reference_images": self.reference_images,
            **({"held_out_images": self.held_out_images} if self.held_out_images else {}),
            **told(self._measures),
            **({"metrics": told(self._metrics), "metrics_real": self._real} if self._metrics else {}),
        }
        return result

    def _measure(self, images: Iterable[Tensor], labels: Tensor | None) -> dict[str, float]:
        """What is asked of one set of samples, by name; their features are computed once."""
        rows, found = self._seen(images)
        values = {name: measure(rows) for name, measure in self._measures.items()}
        if not self._metrics:
            return values
        scores = compute(self._metrics, replace(found, labels=labels, text_embeddings=self._texts()), self._reference)
        for warning in scores.warnings:
            if warning not in self._warned:
                self._warned.add(warning)
                logger.warning("%s", warning)
        return values | scores.values

    def _texts(self) -> Tensor | None:
        """The embedding of each sample's caption, where they are asked for."""
        if not any("samples.text_embeddings" in metric.needs for metric in self._metrics.values()):
            return None
        network: Any = self._network  # of CLIP, as it gave embeddings of the reference images
        found = network.texts(self.prompts)
        return found[torch.arange(self.samples) % len(found)]

    def _seen(self, batches: Iterable[Tensor | tuple[Tensor, Tensor]], *, keep: bool = False) -> tuple[Tensor, ImageSet]:
        """The features of images, and all that is known of them, classes too where batches are pairs; ``keep`` as in `features_of`."""
        said: list[dict[str, Tensor]] = []
        for batch in batches:
            images, labels = batch if isinstance(batch, tuple) else (batch, None)
            said.append(self._said(images, keep) | ({} if labels is None else {"labels": labels}))
        if not said:
            said = [{"features": features_of(self._network, ())}]
        found = {field: torch.cat([part[field] for part in said]) for field in said[0]}
        rows = self._along.along(found["features"]) if self._along else found["features"]
        return rows, ImageSet(**{**found, "features": rows})

    def _said(self, images: Tensor, keep: bool) -> dict[str, Tensor]:
        """What the network says of a batch that the metrics need, in rows.

        Raises:
            UserError: it does not say all of it.
        """
        wanted = {name: {need.split(".")[1] for need in metric.needs} & FIELDS.keys() for name, metric in self._metrics.items()}
        fields = set().union(*wanted.values())
        if not fields:
            return {"features": features_of(self._network, [images], keep=keep)}
        network: Any = self._network
        found: dict[str, Tensor] = network.outputs(images) if hasattr(network, "outputs") else {}
        for name, needed in wanted.items():
            for field in needed - found.keys():
                what, whose = FIELDS[field]
                raise UserError(f"--eval_metrics {name} needs {what}, which {network.name} does not know; --eval_features {whose} does")
        return {field: found[field] for field in ("features", *sorted(fields))}

    def _sample(self, pipeline: DiffusionPipeline, steps: int, guidance_scale: float, bar: tqdm) -> Iterator[Tensor]:
        for first in range(0, self.samples, self.batch_size):
            count = min(self.batch_size, self.samples - first)
            images = sample_images(
                pipeline,
                count,
                steps=steps,
                seed=EVALUATION_SEED,
                batch_size=count,
                device=network_of(pipeline).device,
                first=first,
                prompts=self.prompts,
                guidance_scale=guidance_scale,
                guidance_interval=self.guidance_interval,
            )
            yield torch.from_numpy(images).permute(0, 3, 1, 2)
            bar.update(count)
