"""What a run measures while it trains."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch

from immiscible.data.batches import Images
from immiscible.data.transforms import ImageTransform
from immiscible.encoding.encoders import Encoded
from immiscible.evaluation.features import build_features
from immiscible.evaluation.metrics import metrics_of
from immiscible.evaluation.sampled import Evaluation
from immiscible.evaluation.validation import fixed_images, images_together, to_uint8, validation_loss
from immiscible.files import append_line, drop_later_lines
from immiscible.randomness import Draws
from immiscible.sampling.pipelines import told
from immiscible.training.task import Task

if TYPE_CHECKING:
    from diffusers.training_utils import EMAModel

    from immiscible.training.arguments import RunConfig

logger = logging.getLogger(__name__)

LOSS_IMAGES = 1000  # held out, at most: each takes as many calls of the network as there are ranges of noise levels
MEASURED = {  # what a line of evaluation.jsonl may have, and what the log calls it
    "frechet_distance": "{}",
    "frechet_distance_held_out": "{} of the images held out",
    "nearest_neighbor_ratio": "distance from the nearest training image over that from the nearest image held out",
}


class RunEvaluation:
    """``evaluation.jsonl``: what the flags ask to measure every ``--eval_steps``, on rank 0, without disturbing training.

    Reference images are cut from the middle and not flipped.

    Args:
        config: the run's flags; ``eval_steps`` is given.
        task: what is trained.
    """

    def __init__(self, config: RunConfig, task: Task) -> None:
        self._config, self._task = config, task
        self._path = config.folder / "evaluation.jsonl"

    def prepare(self, start_step: int) -> None:
        """Reads the reference images; drops lines of steps after ``start_step``, which a killed run left behind."""
        config, data = self._config, self._task.data
        transform: ImageTransform = data.transform
        device = self._task.objective.process.signal.device
        features = build_features(
            config.eval_features or self._task.features, channels=transform.channels, resolution=transform.resolution, device=device
        )
        source: Any = data.source  # no stream: those are not evaluated
        by_class = any(need.endswith(".labels") for metric in metrics_of(config.eval_metrics).values() for need in metric.needs)
        images = fixed_images(source, transform, skip_bad_images=config.skip_bad_images, with_labels=by_class)
        prompts = self._task.prompts(config.eval_samples)
        self._evaluation = Evaluation(
            features,
            (to_uint8(batch.x0) if batch.labels is None else (to_uint8(batch.x0), batch.labels) for batch in images),
            samples=config.eval_samples,
            inference_steps=config.eval_inference_steps,
            batch_size=images_together(transform.resolution),
            prompts=prompts,
            guidance_scales=config.eval_guidance_scales,
            guidance_interval=config.interval,
            held_out=(to_uint8(batch.x0) for batch in self._held_out_images()),
            directions=config.eval_feature_directions,
            metrics=config.eval_metrics,
            num_classes=self._task.num_classes,
        )
        parts = {"with_captions": data.with_captions, "with_geometry": data.with_geometry}
        options = {"with_labels": config.labels_for is not None, **parts, "limit": LOSS_IMAGES}
        batches = enumerate(self._held_out_images(**options))
        self._held_out: list[Encoded] = [self._task.encode_held_out(batch, Draws(0, 0, number, device)) for number, batch in batches]
        self._steps = {line["step"] for line in drop_later_lines(self._path, start_step)}

    def has_measured(self, step: int) -> bool:
        """Whether the weights at ``step`` have their line."""
        return step in self._steps

    def _held_out_images(self, **options: Any) -> Iterator[Images]:
        """Those of `fixed_images`; none where none are held out."""
        data = self._task.data
        if data.held_out is not None:
            yield from fixed_images(data.held_out, data.transform, skip_bad_images=self._config.skip_bad_images, **options)

    def __call__(self, ema: EMAModel | None, step: int, times: Mapping[str, float]) -> None:
        """Measures the weights at ``step`` and appends a line, with the ``times`` that the run has spent in steps."""
        task = self._task
        line: dict[str, Any] = {"step": step, **times, "data": task.data.source.fingerprint, **self._measured(ema)}
        if self._held_out:
            line["held_out"] = task.data.held_out.fingerprint  # type: ignore[union-attr]
        if self._config.eval_raw_weights:
            line["raw"] = self._measured(None)
        append_line(self._path, {**line, "weights": "raw" if ema is None else "ema", "told": told(asdict(self._config))})
        found_of = {**line, **line.get("metrics", {})}
        for name, what in {**dict.fromkeys(self._config.eval_metrics), **MEASURED}.items():
            guided = {f" with guidance {w}": of for w, of in found_of.get(f"{name}_guided", {}).items()}
            by_guidance = {"": found_of.get(name, {}), **guided}
            found = [f"{value:.3f} at {steps} steps{how}" for how, of in by_guidance.items() for steps, value in of.items()]
            if found:
                logger.info("step %d: %s %s", step, (what or name).format(line["feature"]), ", ".join(found))

    def _measured(self, ema: EMAModel | None) -> dict[str, Any]:
        """Of the average, or of the weights themselves."""
        task = self._task
        found: dict[str, Any] = {**self._evaluation(task.pipeline(), ema)}
        if self._held_out:
            x0 = torch.cat([batch.x0 for batch in self._held_out])
            condition = {name: torch.cat([batch.condition[name] for batch in self._held_out]) for name in self._held_out[0].condition}
            process, prediction_type = task.objective.process, task.objective.prediction_type
            together = images_together(task.data.transform.resolution)
            options: dict[str, Any] = {"condition": condition, "ema": ema, "batch_size": together}
            found["validation_loss"] = validation_loss(task.network, x0, process, prediction_type, **options)
        return found
