"""Text-to-image: the network of a checkpoint trained on captions, from random weights, from its own, or by adapters; or a transformer in
the place of its U-Net.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy
from torch import Tensor

from immiscible.configs import TextToImageConfig
from immiscible.data.loading import captioned_source, prompt_classes, with_held_out, with_prompt_classes
from immiscible.data.sources import ImageSource
from immiscible.data.transforms import image_transform
from immiscible.encoding.cache import buckets_of, open_cache
from immiscible.encoding.captions import CaptionRules
from immiscible.encoding.clusters import caption_clusters
from immiscible.encoding.encoders import Encoder
from immiscible.encoding.texts import TextToImageEncoder, tell_long_captions
from immiscible.errors import UserError
from immiscible.method import build_objective
from immiscible.networks.adapters import adapted, adapter_settings, adapters_in_words, save_adapters
from immiscible.networks.checkpoint_parts import CheckpointParts
from immiscible.networks.families import initial_weights, load_checkpoint, with_folder
from immiscible.networks.kinds import part_of, told_pooled
from immiscible.networks.placing import place
from immiscible.networks.single_file import check_single_file, save_single_file
from immiscible.networks.weights import evaluation_weights
from immiscible.objectives import DenoisingObjective
from immiscible.processes import from_main_process
from immiscible.randomness import reseed_globally
from immiscible.sampling.pipelines import build_text_pipeline, prompt_options, sample_images, save_pipeline
from immiscible.training.cards import text_to_image_card
from immiscible.training.planning import classes_of
from immiscible.training.summary import method_facts
from immiscible.training.task import TrainingData

if TYPE_CHECKING:
    from accelerate import Accelerator
    from diffusers import DiffusionPipeline, ModelMixin
    from diffusers.training_utils import EMAModel
    from huggingface_hub import ModelCard


logger = logging.getLogger(__name__)


@dataclass
class TextToImageTask:
    """A network that is told captions; see `immiscible.training.task.Task`.

    Args:
        config: the run's flags.
        parts: of the checkpoint, placed, with the network.
        objective: the loss.
        data: the images.
        from_scratch: whether the network began with random weights.
        encode: of a loaded batch.
        encode_held_out: of images that are measured on.
    """

    config: TextToImageConfig
    parts: CheckpointParts
    objective: DenoisingObjective
    data: TrainingData
    from_scratch: bool
    encode: Encoder
    encode_held_out: Encoder
    facts: dict[str, str] = field(init=False)
    grid_name: ClassVar[str] = "validation"
    features: ClassVar[str] = "pixels"
    num_classes: ClassVar[None] = None

    def __post_init__(self) -> None:
        config, schedule = self.config, self.parts.schedule
        adapters = adapters_in_words(self.network) if config.use_lora else None
        begins = initial_weights(self.parts.name, from_scratch=self.from_scratch, adapters=adapters, preset=config.model_preset)
        self.facts = {
            "initial_weights": begins + (f", those of {config.network_weights}" if config.network_weights else ""),
            **method_facts(config, self.objective, schedule=schedule, inference_steps=config.validation_inference_steps),
        }

    @property
    def network(self) -> ModelMixin:
        """See `Task`."""
        return self.parts.network

    @property
    def part(self) -> str:
        """See `Task`."""
        return part_of(self.network)

    @property
    def identity(self) -> Mapping[str, Any]:
        """See `Task`."""
        adapters = {"adapters": adapter_settings(self.network)} if self.config.network_weights else {}
        return {"from_scratch": self.from_scratch, **self.parts.identity, **adapters}

    @property
    def shape(self) -> tuple[int, int, int]:
        """See `Task`."""
        side = self.network.config.sample_size
        return self.network.config.in_channels, side, side

    def told_apart(self, images: float) -> tuple[int, bool]:
        """See `Task`; every caption is taken for one of its own."""
        classes = prompt_classes(self.data.source, self.config.caption_column)
        return (len(classes), False) if classes else (int(images), True)

    def prompts(self, count: int) -> Sequence[str]:
        """The data's captions, from the first image on, with their trigger word."""
        source: Any = self.data.source
        return CaptionRules.of(self.config).told([source.captions(index)[0] for index in range(min(count, len(source)))])

    def pipeline(self) -> DiffusionPipeline:
        """See `Task`."""
        return build_text_pipeline(self.parts)

    def samples(self, ema: EMAModel | None) -> numpy.ndarray | None:
        """See `Task`: of the validation prompts."""
        config = self.config
        if not config.prompts:
            return None
        with evaluation_weights(self.network, ema):
            return sample_images(
                self.pipeline(),
                len(config.prompts),
                steps=config.validation_inference_steps,
                seed=int(config.seed or 0),
                batch_size=config.eval_batch_size,
                device=self.network.device,
                prompts=config.prompts,
                guidance_scale=config.guidance_scale,
            )

    def save(self, folder: Path, ema: EMAModel | None) -> None:
        """The whole pipeline, with EMA of the averaged weights, in one file too if that is asked for, or the adapters alone.

        All parts are saved in fp32, those that this run rounded anew from the checkpoint.
        """
        parts = self.parts
        if adapted(parts.network):
            save_adapters(parts.network, folder)
            return
        with evaluation_weights(parts.network, ema):
            whole = parts.in_full_precision()
            save_pipeline(build_text_pipeline(whole), folder)
            if self.config.save_single_file:
                save_single_file(whole, folder)

    def card(self, title: str, facts: Mapping[str, str], grid: Path | None) -> ModelCard:
        """See `Task`."""
        parts = self.parts
        prediction_type = parts.prediction_type
        return text_to_image_card(
            title=title,
            facts=facts,
            base_model=parts.name,
            adapters=adapted(parts.network),
            own=told_pooled(parts.network),
            pipeline=parts.pipeline_class,
            tag=parts.tag,
            absent=[part for part in parts.optional if part not in parts.encoders | parts.tokenizers],
            told=prompt_options(parts.network),
            resolution=parts.resolution,
            prediction_type=prediction_type if prediction_type != parts.pretrained_prediction else None,
            grid=grid,
        )


def text_to_image_task(config: TextToImageConfig, accelerator: Accelerator, seed: int, *, from_scratch: bool) -> TextToImageTask:
    """The network of ``--pretrained_model_name_or_path``, or ``--model_preset`` in its place, on the captioned images that the flags name.

    Args:
        config: the run's flags; its precision becomes accelerate's own where the flag is not given.
        accelerator: of the session.
        seed: the run's.
        from_scratch: random weights in the place of the checkpoint's.

    Raises:
        UserError: what does not fit together.
    """
    config.mixed_precision = accelerator.mixed_precision
    share, folder = config.validation_split, config.eval_data_dir
    source, held_out = with_held_out(captioned_source, config, config.labels_for, share=share, folder=folder)
    reseed_globally(seed, "network")
    # A checkpoint in one file is converted by rank 0, which says so; the others find it there.
    from_main_process(accelerator, lambda: with_folder(config, config.cache_dir).pretrained_model_name_or_path)
    parts = load_checkpoint(config, resolution=config.resolution, cache_dir=config.cache_dir, from_scratch=from_scratch)
    if config.save_single_file:
        check_single_file(parts)
    _check_dream(config, parts)
    _tell_resolution(config, parts)
    _check_steps(config, parts)
    if not config.streaming:
        tell_long_captions(source, parts)
    transform = image_transform(config, 3, seed)
    data, cache = TrainingData(source, held_out, transform, with_captions=True, with_geometry=parts.told_geometry), None
    if config.cache_latents:
        cache = open_cache(
            Path(str(config.latent_cache_dir)), config, parts, source, precision=config.mixed_precision, trigger=config.trigger_word
        )
        data = replace(data, loaded=cache.images(source), augment=cache.transform(transform))
    if config.buckets:
        images: Any = data.images  # the flags refuse a stream
        data = replace(data, buckets=from_main_process(accelerator, lambda: buckets_of(images, config, parts)))
    idle = config.cache_latents and held_out is None
    place(parts, accelerator, adapters=config if config.use_lora else None, idle=idle)
    objective = build_objective(config, parts.scheduler, accelerator, dream_detail_preservation=config.dream_power)
    encode = TextToImageEncoder(
        parts,
        accelerator.device,
        CaptionRules.of(config),
        pooled_labels=config.coupling_condition in ("centered", "penalty"),
        tokens=config.train_text_encoder,
    )
    encode_loaded: Any = cache.encoder(encode) if cache else encode
    if config.by_epoch and config.coupling_condition == "within":
        data = replace(data, groups=from_main_process(accelerator, lambda: _groups(config, source, encode_loaded)))
    return TextToImageTask(config, parts, objective, data, from_scratch, encode_loaded, replace(encode, rules=encode.rules.still))


def _groups(config: TextToImageConfig, source: ImageSource, encode: TextToImageEncoder) -> Tensor:
    """The class of each image, or the cluster of its caption, inside which an epoch is planned."""
    classed = with_prompt_classes(source, config.caption_column)
    if classed is not None:
        return classes_of(classed)
    told = replace(encode, pooled_labels=True)

    return caption_clusters(source, lambda captions: told.texts(captions)["pooled"])


def _tell_resolution(config: TextToImageConfig, parts: CheckpointParts) -> None:
    """The flag's default is that of diffusers' script for Stable Diffusion 1.x, also where a family's own is another."""
    default = TextToImageConfig.resolution
    if config.resolution == default != parts.default_resolution:
        logger.warning(
            "--resolution is %d, its default; diffusers' scripts for %s take %d: give --resolution %d for that",
            default,
            parts.family,
            parts.default_resolution,
            parts.default_resolution,
        )


def _check_steps(config: TextToImageConfig, parts: CheckpointParts) -> None:
    steps = parts.scheduler.config.num_train_timesteps
    asked = [("validation_inference_steps", config.validation_inference_steps if config.prompts else 1)]
    asked += [("eval_inference_steps", each) for each in config.eval_inference_steps if config.eval_steps]
    for name, value in asked:
        if value >= steps:  # at all of them Stable Diffusion's samplers begin a step beyond the last
            raise UserError(f"--{name} {value} must be below {steps}, the steps of the noise process of {parts.name}")


def _check_dream(config: TextToImageConfig, parts: CheckpointParts) -> None:
    if config.dream_training and parts.prediction_type != "epsilon":
        raise UserError(f"--dream_training needs epsilon-prediction, and {parts.name} predicts {parts.prediction_type}")
