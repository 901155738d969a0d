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
from immiscible.evaluation.features import FeatureNetwork
from immiscible.evaluation.validation import BATCH_SIZE, EVALUATION_SEED
from immiscible.networks.weights import evaluation_weights
from immiscible.randomness import preserved_randomness
from immiscible.sampling.pipelines import WHOLE, sample_images

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from diffusers.training_utils import EMAModel


logger = logging.getLogger(__name__)


class FrechetDistance:
    """The squared Frechet distance between the Gaussians that fit the features of reference images and of other images.

    ``|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))`` (Heusel et al. 2017, eq. 6), by torchmetrics, in float64. It falls with the number
    of images on either side: compare only distances of equal numbers. The reference's features are computed here and only here.

    Args:
        features: the feature network.
        reference: batches of reference images, uint8 [B, C, H, W].

    Attributes:
        reference_images: how many there were.

    Raises:
        UserError: torchmetrics cannot be imported, or there are fewer than 2 images.
    """

    def __init__(self, features: FeatureNetwork, reference: Iterable[Tensor]) -> None:
        self.features = features
        # Not summed over processes: one of them may measure while the others wait elsewhere.
        self._metric = _torchmetrics_fid()(_Extractor(features), reset_real_features=False, sync_on_compute=False)
        self.reference_images = self._update(reference, real=True)
        if self.reference_images < 2:
            raise UserError(f"{features.name} needs at least 2 reference images, not {self.reference_images}")

    def __call__(self, images: Iterable[Tensor]) -> float:
        """The distance of these images, given as batches uint8 [B, C, H, W], from the reference; exactly 0 where rounding goes below.

        Raises:
            UserError: there are fewer than 2 images.
        """
        self._metric.reset()
        count = self._update(images, real=False)
        if count < 2:
            raise UserError(f"{self.features.name} needs at least 2 images, not {count}")
        return max(0.0, float(self._metric.compute()))

    def _update(self, batches: Iterable[Tensor], *, real: bool) -> int:
        count = 0
        for batch in batches:
            self._metric.update(batch, real=real)
            count += len(batch)
        return count


class _Extractor(nn.Module):
    """A feature network in the shape that torchmetrics wants; torchmetrics calls ``train()`` on it, which a network must not follow."""

    def __init__(self, features: FeatureNetwork) -> None:
        super().__init__()
        self.features = features
        self.num_features = features.num_features

    def forward(self, images: Tensor) -> Tensor:
        return self.features(images)

    def train(self, mode: bool = True) -> _Extractor:
        return self


def _torchmetrics_fid() -> Callable[..., Any]:
    try:
        return import_module("torchmetrics.image.fid").FrechetInceptionDistance  # its own module needs no torch-fidelity
    except Exception as error:  # torch-fidelity without torchvision, or with one for another torch, fails in several types
        raise UserError(
            f"the Frechet distance needs torchmetrics, which cannot be imported ({first_line(error)}): "
            "`pip install torchmetrics`; where torch-fidelity is installed it needs a torchvision that fits torch",
            exit_code=1,
        ) from error


class EvaluationResult(TypedDict):
    """One evaluation, ready for JSON.

    ``feature`` is the distance's name, ``samples`` and ``reference_images`` the numbers of images that it compares, and
    ``frechet_distance`` its value for each number of inference steps, as text, without guidance: ``{"5": 12.3, "20": 4.5}``.
    ``frechet_distance_guided`` holds the same for each other guidance scale, as text: ``{"1.5": {"5": 10.2, "20": 4.1}}``.
    """

    feature: str
    samples: int
    reference_images: int
    frechet_distance: dict[str, float]
    frechet_distance_guided: dict[str, dict[str, float]]


class Evaluation:
    """Frechet distances of a pipeline's samples at several numbers of inference steps, always from the same noises.

    It samples in the calling process alone; in a run of several ranks rank 0 evaluates and the others wait. A class-conditional
    network is sampled with every class equally often, also where the reference's classes are not.

    Args:
        features: from `build_features`, or any `FeatureNetwork`.
        reference: batches of reference images, uint8 [B, C, H, W], usually `fixed_images` through `to_uint8`; read once, here.
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
    ) -> None:
        self.prompts, self.guidance_scales, self.guidance_interval = prompts, sorted(set(guidance_scales)), guidance_interval
        self.samples, self.inference_steps, self.batch_size = samples, sorted(set(inference_steps)), batch_size
        if samples < 2:
            raise UserError(f"--eval_samples {samples} is too small: a covariance needs 2, a meaningful one {features.num_features + 1}")
        if not self.inference_steps or self.inference_steps[0] < 1:
            raise UserError("--eval_inference_steps needs numbers of at least 1")
        with preserved_randomness():
            self.distance = FrechetDistance(features, reference)
        for count, what in ((samples, "--eval_samples"), (self.distance.reference_images, "the number of reference images")):
            if count <= features.num_features:
                logger.warning(
                    "%s is %d: too few for the %d features of %s, whose covariance needs at least %d (and says more with ten times that)",
                    what,
                    count,
                    features.num_features,
                    features.name,
                    features.num_features + 1,
                )

    def __call__(self, pipeline: DiffusionPipeline, ema: EMAModel | None = None) -> EvaluationResult:
        """Samples and measures; image i starts from the same noise at every call, for every run, scale and number of inference steps.

        Args:
            pipeline: from `build_pipeline`; its ``unet`` may be the network in training.
            ema: the averaged weights to sample with, swapped in for the time of the call.

        Raises:
            UserError: (exit code 1) the samples hold NaN values.
        """
        total = self.samples * len(self.inference_steps) * len(self.guidance_scales)
        with (
            preserved_randomness(pipeline.unet.device),
            evaluation_weights(pipeline.unet, ema),
            tqdm(total=total, desc="evaluating", unit="sample", delay=2, leave=False, disable=None) as bar,
        ):
            distances = {
                scale: {str(steps): self.distance(self._sample(pipeline, steps, scale, bar)) for steps in self.inference_steps}
                for scale in self.guidance_scales
            }
        return {
            "feature": self.distance.features.name,
            "samples": self.samples,
            "reference_images": self.distance.reference_images,
            "frechet_distance": distances.pop(1.0, {}),
            "frechet_distance_guided": {f"{scale:g}": of_scale for scale, of_scale in distances.items()},
        }

    def _sample(self, pipeline: DiffusionPipeline, steps: int, guidance_scale: float, bar: tqdm) -> Iterator[Tensor]:
        for first in range(0, self.samples, self.batch_size):
            count = min(self.batch_size, self.samples - first)
            images = sample_images(
                pipeline,
                count,
                steps=steps,
                seed=EVALUATION_SEED,
                batch_size=count,
                device=pipeline.unet.device,
                first=first,
                prompts=self.prompts,
                guidance_scale=guidance_scale,
                guidance_interval=self.guidance_interval,
            )
            yield torch.from_numpy(images).permute(0, 3, 1, 2)
            bar.update(count)
