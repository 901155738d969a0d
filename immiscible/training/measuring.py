"""What a run measures while it trains."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from immiscible.data.sources import ImageSource
from immiscible.data.transforms import ImageTransform
from immiscible.encoding.encoders import Encoded, Encoder
from immiscible.evaluation.features import build_features
from immiscible.evaluation.frechet import Evaluation
from immiscible.evaluation.validation import fixed_images, images_together, to_uint8, validation_loss
from immiscible.files import _append_line, _drop_later_lines
from immiscible.objectives import DenoisingObjective
from immiscible.randomness import Draws
from immiscible.sampling.pipelines import told

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from diffusers.training_utils import EMAModel

    from immiscible.configs import AnyConfig


logger = logging.getLogger(__name__)


class RunEvaluation:
    """``evaluation.jsonl``: what the flags ask to measure every ``--eval_steps``, on rank 0, without disturbing training.

    Args:
        config: the run's flags; ``eval_steps`` is given.
        source: the training images, the reference of the Frechet distance.
        held_out: images for the loss per noise level, or None.
        transform: training's; reference images are cut from the middle and not flipped.
        objective: gives process and prediction type.
        encode: turns held-out images into what is diffused and what the network is told.
        pipeline: what samples the network in training.
        features: the name of the feature network where the flags give none.
        prompts: how many of the data's captions are sampled in turn; 0 for a pipeline without prompts.
    """

    def __init__(
        self,
        config: AnyConfig,
        source: ImageSource,
        held_out: ImageSource | None,
        transform: ImageTransform,
        objective: DenoisingObjective,
        encode: Encoder,
        pipeline: Callable[[], DiffusionPipeline],
        *,
        features: str = "pixels",
        prompts: int = 0,
    ) -> None:
        self._config, self._objective, self._encode, self._pipeline = config, objective, encode, pipeline
        self._source, self._held_out_source, self._transform = source, held_out, transform
        self._features, self._prompts = config.eval_features or features, prompts
        self._path = Path(config.output_dir or "") / "evaluation.jsonl"

    def prepare(self, start_step: int) -> None:
        """Reads the reference images; drops lines of steps after ``start_step``, which a killed run left behind."""
        config, transform = self._config, self._transform
        features = build_features(self._features, channels=transform.channels, resolution=transform.resolution)
        images = fixed_images(self._source, transform, skip_bad_images=config.skip_bad_images)
        reference = (to_uint8(batch.x0) for batch in images)
        prompts = [self._source.captions(index)[0] for index in range(min(self._prompts, len(self._source)))]
        self._evaluation = Evaluation(
            features,
            reference,
            samples=config.eval_samples,
            inference_steps=config.eval_inference_steps,
            batch_size=images_together(transform.resolution),
            prompts=prompts,
        )
        self._held_out: list[Encoded] = []
        if self._held_out_source is not None:
            options = {"with_labels": config.labels_for is not None, "with_captions": self._prompts > 0}
            batches = fixed_images(self._held_out_source, transform, skip_bad_images=config.skip_bad_images, **options)
            device = self._objective.process.signal.device
            self._held_out = [self._encode(batch, Draws(0, 0, number, device)) for number, batch in enumerate(batches)]
        _drop_later_lines(self._path, start_step)

    def __call__(self, unet: nn.Module, ema: EMAModel | None, step: int, train_seconds: float) -> None:
        """Measures the weights at ``step`` and appends a line."""
        line: dict[str, Any] = {
            "step": step,
            "train_seconds": train_seconds,
            "data": self._source.fingerprint,
            **self._evaluation(self._pipeline(), ema),
        }
        line["num_features"] = self._evaluation.distance.features.num_features
        if self._held_out:
            x0 = torch.cat([batch.x0 for batch in self._held_out])
            condition = {name: torch.cat([batch.condition[name] for batch in self._held_out]) for name in self._held_out[0].condition}
            process, prediction_type = self._objective.process, self._objective.prediction_type
            together = images_together(self._transform.resolution)
            line["validation_loss"] = validation_loss(unet, x0, process, prediction_type, condition=condition, ema=ema, batch_size=together)
        _append_line(self._path, {**line, "weights": "raw" if ema is None else "ema", "told": told(asdict(self._config))})
        distances = ", ".join(f"{value:.3f} at {steps} steps" for steps, value in line["frechet_distance"].items())
        logger.info("step %d: %s %s", step, line["feature"], distances)
