"""Frechet distances of samples at several numbers of inference steps."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor, nn
from tqdm import tqdm

from immiscible.errors import UserError, first_line
from immiscible.evaluation.copies import NearestNeighborRatio
from immiscible.evaluation.features import FeatureNetwork, PrincipalDirections, features_of
from immiscible.evaluation.validation import BATCH_SIZE, EVALUATION_SEED
from immiscible.networks.weights import evaluation_weights
from immiscible.randomness import preserved_randomness
from immiscible.sampling.pipelines import WHOLE, network_of, sample_images

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from diffusers.training_utils import EMAModel


logger = logging.getLogger(__name__)


class FrechetDistance:
    """The squared Frechet distance between the Gaussians that fit reference features and other features.

    ``|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))`` (Heusel et al. 2017, eq. 6), by torchmetrics, in float64. It falls with the number
    of images on either side: compare only distances of equal numbers.

    Args:
        name: of the distance, for errors.
        reference: features of reference images, float64 [N, F].

    Raises:
        UserError: torchmetrics cannot be imported, or there are fewer than 2 images.
    """

    def __init__(self, name: str, reference: Tensor) -> None:
        self.name = name
        # Not summed over processes: one of them may measure while the others wait elsewhere.
        self._metric = _torchmetrics_fid()(_Given(reference.shape[1]), reset_real_features=False, sync_on_compute=False)
        if len(reference) < 2:
            raise UserError(f"{name} needs at least 2 reference images, not {len(reference)}")
        self._metric.update(reference, real=True)

    def __call__(self, features: Tensor) -> float:
        """The distance of these features, float64 [M, F], from the reference; exactly 0 where rounding goes below.

        Raises:
            UserError: there are fewer than 2 images.
        """
        if len(features) < 2:
            raise UserError(f"{self.name} needs at least 2 images, not {len(features)}")
        self._metric.reset()
        self._metric.update(features, real=False)
        return max(0.0, float(self._metric.compute()))


class _Given(nn.Module):
    """What torchmetrics takes for a feature network, where features are what it is given."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def _torchmetrics_fid() -> Callable[..., Any]:
    try:
        return import_module("torchmetrics.image.fid").FrechetInceptionDistance  # its own module needs no torch-fidelity
    except Exception as error:  # torch-fidelity without torchvision, or with one for another torch, fails in several types
        raise UserError(
            f"the Frechet distance needs torchmetrics, which cannot be imported ({first_line(error)}): "
            "`pip install torchmetrics`; where torch-fidelity is installed it needs a torchvision that fits torch",
            exit_code=1,
        ) from error


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
    """

    held_out_images: int
    frechet_distance_held_out: dict[str, float]
    nearest_neighbor_ratio: dict[str, float]
    frechet_distance_held_out_guided: dict[str, dict[str, float]]
    nearest_neighbor_ratio_guided: dict[str, dict[str, float]]


class Evaluation:
    """Frechet distances of a pipeline's samples at several numbers of inference steps, always from the same noises.

    It samples in the calling process alone; in a run of several ranks rank 0 evaluates and the others wait. A class-conditional
    network is sampled with every class equally often, also where the reference's classes are not.

    Args:
        features: from `build_features`, or any `FeatureNetwork`.
        reference: batches of reference images, uint8 [B, C, H, W], usually `fixed_images` through `to_uint8`; read once, here.
        held_out: batches of images like those that were not trained on, likewise; none to measure against the reference alone.
        directions: measure along so many `PrincipalDirections` of the reference; None for the features as they are.
        samples: images to sample per number of inference steps; at least 2, and more than the features are many.
        inference_steps: the numbers of inference steps, each at least 1.
        batch_size: images sampled together.
        prompts: sample i is of prompt i modulo their number, for a text-to-image pipeline.
        guidance_scales: at each of which there are so many samples; 1 is without guidance.
        guidance_interval: the noise levels at which classes are guided.

    Raises:
        UserError: a number is out of range, or what `FrechetDistance` raises.
    """

    def __init__(
        self,
        features: FeatureNetwork,
        reference: Iterable[Tensor],
        *,
        samples: int,
        inference_steps: Iterable[int],
        batch_size: int = BATCH_SIZE,
        prompts: Sequence[str] = (),
        guidance_scales: Iterable[float] = (1.0,),
        guidance_interval: tuple[float, float] = WHOLE,
        held_out: Iterable[Tensor] = (),
        directions: int | None = None,
    ) -> None:
        self.prompts, self.guidance_scales, self.guidance_interval = prompts, sorted(set(guidance_scales)), guidance_interval
        self.samples, self.inference_steps, self.batch_size = samples, sorted(set(inference_steps)), batch_size
        if samples < 2:
            raise UserError(f"--eval_samples {samples} is too small: a covariance needs 2, a meaningful one {features.num_features + 1}")
        if not self.inference_steps or self.inference_steps[0] < 1:
            raise UserError("--eval_inference_steps needs numbers of at least 1")
        with preserved_randomness():
            known = features_of(features, reference, keep=True)
            unseen = features_of(features, held_out, keep=True)
            if directions is not None:
                features = along = PrincipalDirections(features, known, directions)
                known, unseen = along.along(known), along.along(unseen)
            self.features, self.reference_images = features, len(known)
            self._measures: dict[str, Callable[[Tensor], float]] = {"frechet_distance": FrechetDistance(features.name, known)}
            self.held_out_images = len(unseen)
            if self.held_out_images:
                self._measures["frechet_distance_held_out"] = FrechetDistance(f"{features.name} of held-out images", unseen)
                self._measures["nearest_neighbor_ratio"] = NearestNeighborRatio(known, unseen)
        self._tell_too_few()

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
            measured = {
                scale: {str(steps): self._measure(self._sample(pipeline, steps, scale, bar)) for steps in self.inference_steps}
                for scale in self.guidance_scales
            }

        def told(name: str) -> dict[str, Any]:
            """A measure without guidance, and at each other scale."""
            values = {scale: {steps: found[name] for steps, found in of_scale.items()} for scale, of_scale in measured.items()}
            return {name: values.pop(1.0, {}), f"{name}_guided": {f"{scale:g}": of_scale for scale, of_scale in values.items()}}

        result: Any = {
            "feature": self.features.name,
            "num_features": self.features.num_features,
            "samples": self.samples,
            "reference_images": self.reference_images,
            **({"held_out_images": self.held_out_images} if self.held_out_images else {}),
            **{key: values for name in self._measures for key, values in told(name).items()},
        }
        return result

    def _measure(self, images: Iterable[Tensor]) -> dict[str, float]:
        """What is asked of one set of samples, by name; their features are computed once."""
        found = features_of(self.features, images)
        return {name: measure(found) for name, measure in self._measures.items()}

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
