"""Pixels of images, with or without classes, diffused as they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy

from immiscible.configs import UnconditionalConfig
from immiscible.data.loading import training_source, with_held_out
from immiscible.data.sources import ImageSource
from immiscible.data.streaming import Stream
from immiscible.data.transforms import image_transform
from immiscible.encoding.encoders import Encoder, PixelEncoder
from immiscible.errors import UserError
from immiscible.masked import MaskedObjective
from immiscible.method import build_objective
from immiscible.networks.kinds import DECODER, NULL_CLASS, classes_told, null_class, part_of
from immiscible.networks.presets import build_network, network_config
from immiscible.networks.weights import evaluation_weights
from immiscible.objective_choice import objective_facts, training_scheduler
from immiscible.objectives import DenoisingObjective, Objective
from immiscible.randomness import reseed_globally
from immiscible.sampling.pipelines import build_pipeline, is_plain, sample_images, sample_labels, save_pipeline
from immiscible.training.cards import unconditional_card
from immiscible.training.summary import method_facts
from immiscible.training.task import TrainingData

if TYPE_CHECKING:
    from accelerate import Accelerator
    from diffusers import AutoencoderKL, DiffusionPipeline, ModelMixin
    from diffusers.training_utils import EMAModel
    from huggingface_hub import ModelCard


@dataclass
class UnconditionalTask:
    """A network without prompts; see `immiscible.training.task.Task`.

    Args:
        config: the run's flags.
        objective: the loss.
        data: the images.
        network: what is trained.
        identity: its configuration, and the VAE's.
        encode: of a loaded batch.
        encode_held_out: of images that are measured on.
        vae: decodes what the network samples; None for pixels.
    """

    config: UnconditionalConfig
    objective: Objective
    data: TrainingData
    network: ModelMixin
    identity: Mapping[str, Any]
    encode: Encoder
    encode_held_out: Encoder
    vae: AutoencoderKL | None = None
    facts: dict[str, str] = field(init=False)
    grid_name: ClassVar[str] = "test_samples"

    def __post_init__(self) -> None:
        config = self.config
        schedule = config.ddpm_beta_schedule if self.objective.process.kind == "ddpm" else ""
        self.facts = objective_facts(config) | method_facts(
            config, self.objective, schedule=schedule, inference_steps=config.sampling_steps
        )
        if self.vae:
            self.facts["latents"] = f"of {config.vae_model_name_or_path}, scaled by {self.vae.config.scaling_factor:g}"
        if isinstance(self.objective, MaskedObjective):
            shares = " to ".join(f"{each:g}" for each in dict.fromkeys((self.objective.least, self.objective.greatest)))
            self.facts["masked"] = f"a second pass of each image without {shares} of its {self.objective.tokens} tokens"
        if config.class_dropout_prob:
            self.facts["class_dropout"] = f"{config.class_dropout_prob:g} of the images are trained without their class"

    @property
    def part(self) -> str:
        """See `Task`."""
        return part_of(self.network)

    @property
    def shape(self) -> tuple[int, int, int]:
        """See `Task`."""
        side = self.network.config.sample_size
        return self.network.config.in_channels, side, side

    @property
    def num_classes(self) -> int | None:
        """See `Task`."""
        return classes_told(self.network)

    @property
    def features(self) -> str:
        """See `Task`."""
        return "digits" if self.config.bundled_data == "digits" and not self.vae else "pixels"

    def told_apart(self, images: float) -> tuple[int, bool]:
        """See `Task`."""
        return self.num_classes or 0, False

    def prompts(self, count: int) -> Sequence[str]:
        """None."""
        return ()

    def pipeline(self) -> DiffusionPipeline:
        """See `Task`."""
        return pipeline_of(self.config, self.network, self.vae)

    def samples(self, ema: EMAModel | None) -> numpy.ndarray:
        """See `Task`; a class-conditional network's are in the order of classes."""
        config, count = self.config, self.config.eval_batch_size
        with evaluation_weights(self.network, ema):
            images = sample_images(
                self.pipeline(),
                count,
                steps=config.sampling_steps,
                seed=int(config.seed or 0),
                batch_size=count,
                device=self.network.device,
                guidance_scale=config.guidance_scale,
                guidance_interval=config.interval,
            )
        labels = sample_labels(self.network, count)
        return images if labels is None else images[labels.argsort(stable=True).numpy()]

    def save(self, folder: Path, ema: EMAModel | None) -> None:
        """See `Task`; with EMA the pipeline holds the averaged weights, and e.g. ``unet_non_ema`` beside it the others."""
        if ema is not None:
            self.network.save_pretrained(folder / f"{self.part}_non_ema")
        with evaluation_weights(self.network, ema):
            save_pipeline(self.pipeline(), folder, self.data.source.class_names or ())

    def card(self, title: str, facts: Mapping[str, str], grid: Path | None) -> ModelCard:
        """See `Task`."""
        pipeline, names = self.pipeline(), self.data.source.class_names or ()
        guidance = (self.config.guidance_scale, self.config.guidance_interval) if null_class(self.network) is not None else None
        return unconditional_card(
            title=title,
            pipeline=type(pipeline).__name__,
            facts=facts,
            network=type(self.network).__name__,
            own=not is_plain(pipeline),
            num_classes=self.num_classes,
            class_names=names,
            guidance=guidance,
        )


def pixels_task(config: UnconditionalConfig, accelerator: Accelerator, seed: int) -> UnconditionalTask:
    """The network that the flags name, with fresh weights, on the images that they name.

    Raises:
        UserError: what does not fit together.
    """
    plain = build_objective(config, training_scheduler(config), accelerator, image_scale=config.image_scale)
    source, held_out = images_of_flags(config)
    settings = network_settings(config, source, channels=source.channels)
    objective, network = with_masks(config, plain, settings), fresh_network(settings, seed)
    transform = image_transform(config, settings["in_channels"], seed)
    encode = PixelEncoder(accelerator.device, config.class_conditional, config.class_dropout_prob, settings.get(NULL_CLASS) or 0)
    data = TrainingData(source, held_out, transform)
    return UnconditionalTask(config, objective, data, network, settings, encode, replace(encode, class_dropout=0.0))


def pipeline_of(config: UnconditionalConfig, network: ModelMixin, vae: AutoencoderKL | None = None) -> DiffusionPipeline:
    """The pipeline by which a run of these flags samples its network."""
    return build_pipeline(
        network,
        training_scheduler(config),
        sampler=config.sampling_scheduler,
        spacing=config.timestep_spacing,
        vae=vae,
        heun=config.edm_sampler == "heun",
        momentum=config.momentum,
    )


def images_of_flags(config: UnconditionalConfig) -> tuple[ImageSource | Stream, ImageSource | None]:
    """The images to train on, and those held out."""
    return with_held_out(training_source, config, config.labels_for, share=config.validation_split, folder=config.eval_data_dir)


def network_settings(config: UnconditionalConfig, source: ImageSource | Stream, *, channels: int, downsampling: int = 1) -> dict[str, Any]:
    """The network's constructor arguments; see `network_config`."""
    classes = len(source.class_names or ()) if config.class_conditional else None
    if config.num_classes not in (None, classes):
        raise UserError(f"--num_classes {config.num_classes}, but the data has {classes} classes; make them equal or leave it out")
    return network_config(
        config_name_or_path=config.model_config_name_or_path,
        preset=config.model_preset,
        resolution=config.resolution,
        channels=channels,
        dropout=config.dropout,
        num_classes=classes,
        null_class=config.class_dropout_prob > 0,
        class_embed_type=config.class_embed_type,
        downsampling=downsampling,
        learned_sigma=config.learned_sigma,
    )


def with_masks(config: UnconditionalConfig, objective: DenoisingObjective, settings: Mapping[str, Any]) -> Objective:
    """The objective for a network of these settings, whose second pass is masked if it is an MDT.

    Raises:
        UserError: a mask is asked for, and it is another.
    """
    if DECODER not in settings:
        if config.mask_ratio is not None:
            raise UserError("--mask_ratio is of masked transformers: give it with --model_preset mdt-s-2, say, or leave it out")
        return objective
    share = config.mask_ratio or [0.3]
    tokens = (settings["sample_size"] // settings.get("patch_size", 2)) ** 2
    return MaskedObjective(objective, tokens, share[0], share[-1])


def fresh_network(settings: dict[str, Any], seed: int) -> ModelMixin:
    """Its weights are a function of the run's seed."""
    reseed_globally(seed, "network")
    return build_network(settings)
