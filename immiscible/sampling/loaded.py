"""A pipeline that is loaded to be sampled: its sampler, its size, and what tells its weights from others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from inspect import signature
from typing import TYPE_CHECKING

from torch import nn

from immiscible.errors import UserError
from immiscible.networks.kinds import classes_told, null_class, told_pooled
from immiscible.networks.latents import latent_downsampling
from immiscible.networks.weights import weights_digest
from immiscible.sampling.pipelines import network_of

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, DiffusionPipeline

# The choices of --scheduler. Diffusers' pipelines of pixels do not scale what a sampler with sigmas expects scaled, so they take three.
SCHEDULERS = {
    "ddpm": "DDPMScheduler",
    "ddim": "DDIMScheduler",
    "dpm_solver": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_ancestral": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "pndm": "PNDMScheduler",
    "unipc": "UniPCMultistepScheduler",
}
PIXEL_PIPELINES = {"ddpm": "DDPMPipeline", "ddim": "DDIMPipeline", "dpm_solver": "DDPMPipeline"}


@dataclass
class Loaded:
    """A pipeline to sample.

    Args:
        pipeline: of diffusers; its network is its ``unet`` or ``transformer``.
        weights: "ema" or "raw" of a run, or "as saved".
        side: of the images it was trained on, in pixels, where a run says so; None for what the network says.
    """

    pipeline: DiffusionPipeline
    weights: str = "as saved"
    side: int | None = None

    @property
    def prompted(self) -> bool:
        """Whether it samples prompts."""
        return "prompt" in signature(type(self.pipeline).__call__).parameters

    @property
    def num_classes(self) -> int | None:
        """How many classes the network is told by number; None if it is not."""
        return classes_told(network_of(self.pipeline))

    @property
    def guidable(self) -> bool:
        """Whether its samples can be guided: by prompts, or by a class that means none."""
        return self.prompted or null_class(network_of(self.pipeline)) is not None

    @property
    def least_guidance(self) -> float:
        """The least scale that its pipeline takes; diffusers' own of prompts takes what is below 1 for 1."""
        return 1 if self.prompted and not told_pooled(network_of(self.pipeline)) else 0


def take_scheduler(pipeline: DiffusionPipeline, name: str) -> DiffusionPipeline:
    """The pipeline with another sampler of its noise process, one of `SCHEDULERS`.

    Raises:
        UserError: the sampler cannot sample this process, or diffusers' pipeline cannot use it.
    """
    import diffusers

    if "Flow" in type(pipeline.scheduler).__name__:
        raise UserError(f"--scheduler {name}: a flow is sampled by its own {type(pipeline.scheduler).__name__}; leave the flag out")
    if "sigma_data" in pipeline.scheduler.config:  # the others would scale input and output of its network as no axis of sigma does
        own = type(pipeline.scheduler).__name__
        raise UserError(f"--scheduler {name}: EDM and consistency networks are sampled by their own {own}; leave the flag out")
    if str(pipeline.scheduler.config.get("variance_type")).startswith("learned") and name != "ddpm":
        raise UserError(f"--scheduler {name}: the network learned the variance of ddpm's steps; leave the flag out")
    kind = getattr(diffusers, SCHEDULERS[name])
    pixels = _decoder(pipeline) is None
    # Its default is to clip, and the schedulers of text-to-image checkpoints say nothing of it if they cannot.
    unclipped = {"clip_sample": False} if not pixels and "clip_sample" in signature(kind.__init__).parameters else {}
    scheduler = kind.from_config(pipeline.scheduler.config, **unclipped)
    if not pixels or type(pipeline).__name__ == "ClassConditionalPipeline":
        pipeline.scheduler = scheduler
        return pipeline
    if name not in PIXEL_PIPELINES:
        raise UserError(f"--scheduler {name}: diffusers samples pixels with {', '.join(PIXEL_PIPELINES)} only")
    return getattr(diffusers, PIXEL_PIPELINES[name])(pipeline.unet, scheduler)


def cut_short(pipeline: DiffusionPipeline, prompts: Sequence[str]) -> list[int]:
    """The numbers of the prompts of which the text encoder sees the beginning alone; diffusers cuts them off."""
    tokens = pipeline.tokenizer(list(prompts), verbose=False).input_ids
    return [number for number, ids in enumerate(tokens) if len(ids) > pipeline.tokenizer.model_max_length]


def image_size(loaded: Loaded, side: int | None) -> tuple[int, int]:
    """Width and height of the pipeline's images, in pixels."""
    pipeline = loaded.pipeline
    size = network_of(pipeline).config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    if loaded.prompted:
        factor = pipeline.vae_scale_factor
        step = factor * getattr(pipeline, "patch_size", 1)
        if side is not None and side % step:
            raise UserError(f"--resolution {side} must be a multiple of {step}, by which the VAE divides it")
        own = (width * factor, height * factor)
        if told_pooled(network_of(pipeline)) and side not in (None, own[0]):
            raise UserError(f"--resolution {side}: this network has one size, {own[0]}; leave it out")
        return own if side is None else (side, side)
    if side is not None:
        raise UserError("--resolution is for text-to-image pipelines; this network has one size")
    decoder = _decoder(pipeline)
    factor = 1 if decoder is None else latent_downsampling(decoder)
    return width * factor, height * factor


def image_mode(loaded: Loaded) -> str:
    """Pillow's name for the kind of the pipeline's pixels: "L" of one channel, "RGB" of three."""
    decoder = _decoder(loaded.pipeline) or network_of(loaded.pipeline)
    return {1: "L", 4: "RGBA"}.get(getattr(decoder.config, "out_channels", decoder.config.in_channels), "RGB")


def _decoder(pipeline: DiffusionPipeline) -> AutoencoderKL | None:
    return getattr(pipeline, "vae", None) or getattr(pipeline, "vqvae", None)


def freeze(pipeline: DiffusionPipeline) -> None:
    """Makes the arithmetic the same wherever the weights came from: a CPU's last bits depend on the alignment of weights that are mapped
    from a file, and on whether they could be trained.
    """
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            part.requires_grad_(False)
            for tensor in [*part.parameters(), *part.buffers()]:
                tensor.data = tensor.data.clone()


def networks(pipeline: DiffusionPipeline) -> dict[str, str]:
    """A digest of each network's weights."""
    parts = pipeline.components.items()
    return {name: weights_digest(part) for name, part in sorted(parts) if isinstance(part, nn.Module)}
