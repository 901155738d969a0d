"""Pipelines of what is trained, what they are told, samples and grids."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial, wraps
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import torch
from PIL import Image
from torch import Tensor, nn

from immiscible import networks
from immiscible.errors import UserError
from immiscible.networks.checkpoint_parts import CheckpointParts
from immiscible.networks.kinds import JOINT_WIDTH, PARTS, TOKENS_READ, classes_told, is_foreign, part_of, told_pooled
from immiscible.randomness import derive_seed, seeded_generator

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, DiffusionPipeline, ModelMixin, SchedulerMixin

CLASS_PIPELINE = Path(__file__).with_name("class_pipeline.py")  # which imports diffusers, and so is imported where it is used
TEXT_PIPELINE = Path(__file__).with_name("text_pipeline.py")  # likewise
EDM_SCHEDULER = Path(__file__).with_name("edm_scheduler.py")
TRANSFORMERS = Path(networks.__file__).with_name("diffusion_transformers.py")
WHOLE = (0.0, 1.0)  # the interval of all noise levels


def in_turn(number: int, kinds: int) -> int:
    """Of which of its prompts or classes image ``number`` is where each comes equally often."""
    return number % kinds


def at_random(seed: int) -> Callable[[int, int], int]:
    """As `in_turn`, each image by itself with equal chances, by (seed, number)."""
    return lambda number, kinds: derive_seed(seed, "label", number) % kinds


def network_of(pipeline: DiffusionPipeline) -> ModelMixin:
    """What a pipeline samples, its U-Net or its transformer."""
    found: ModelMixin = next(network for part in PARTS if (network := getattr(pipeline, part, None)) is not None)
    return found


def build_pipeline(
    network: ModelMixin,
    training_scheduler: SchedulerMixin,
    *,
    sampler: str,
    spacing: str,
    vae: AutoencoderKL | None = None,
    heun: bool = True,
    momentum: bool = False,
) -> DiffusionPipeline:
    """A pipeline that plain diffusers loads: its own for this network, or ours where it has none: see `class_pipeline`.

    Args:
        network: a U-Net or a transformer.
        training_scheduler: what it was trained with; its schedule and prediction type are taken over.
        sampler: ``ddpm`` or ``ddim`` for a ddpm process. A flow process is sampled by its own Euler scheduler inside a
            `DDPMPipeline`, since `DDIMPipeline` would silently read it as an epsilon model. EDM and consistency networks have samplers of
            their own inside a `ConsistencyModelPipeline`, which scales the network's input and takes classes.
        spacing: ``timestep_spacing`` of the sampler.
        vae: decodes what the network samples: what a U-Net does in an `LDMPipeline`, which diffusers wrote for a VQ model and which takes
            this one as well, and a transformer in a `DiTPipeline`; neither samples flows, nor the latter by a variance that is
            learned. Pixels are clipped to their range at every step, latents have none.
        heun: sample an EDM network by Heun's steps.
        momentum: it is one of FDM.
    """
    from diffusers import ConsistencyModelPipeline, DDIMPipeline, DDPMPipeline, DiTPipeline, LDMPipeline

    scheduler = _sampler(training_scheduler, sampler, spacing, clipped=vae is None, heun=heun, momentum=momentum)
    kind, part = type(scheduler).__name__, part_of(network)
    flow, learned = kind == "FlowMatchEulerDiscreteScheduler", str(scheduler.config.get("variance_type")).startswith("learned")
    transformer = part == "transformer"
    if transformer if vae is None else flow or (transformer and (learned or is_foreign(network))):
        from immiscible.sampling.class_pipeline import ClassConditionalPipeline

        return ClassConditionalPipeline(scheduler, **{part: network, "vae" if transformer else "vqvae": vae})
    if vae is not None:
        return DiTPipeline(network, vae, scheduler) if transformer else LDMPipeline(vqvae=vae, unet=network, scheduler=scheduler)
    if kind in ("EDMScheduler", "CMStochasticIterativeScheduler"):
        return ConsistencyModelPipeline(network, scheduler)
    return (DDIMPipeline if kind == "DDIMScheduler" else DDPMPipeline)(network, scheduler)


def _sampler(
    training_scheduler: SchedulerMixin, sampler: str, spacing: str, *, clipped: bool, heun: bool, momentum: bool
) -> SchedulerMixin:
    """The scheduler that samples what was trained with another; see `build_pipeline`."""
    from diffusers import DDIMScheduler, DDPMScheduler, EDMEulerScheduler

    if isinstance(training_scheduler, EDMEulerScheduler):
        from immiscible.sampling.edm_scheduler import EDMScheduler

        ends = {name: training_scheduler.config[name] for name in ("sigma_min", "sigma_max", "sigma_data", "rho")}
        return EDMScheduler(**ends, heun=heun, momentum=momentum)
    if type(training_scheduler).__name__ in ("CMStochasticIterativeScheduler", "FlowMatchEulerDiscreteScheduler"):
        return type(training_scheduler).from_config(training_scheduler.config)
    config = {**training_scheduler.config, "timestep_spacing": spacing, "clip_sample": clipped, "clip_sample_range": 1.0}
    kind = {"ddpm": DDPMScheduler, "ddim": DDIMScheduler}[sampler]
    return kind.from_config({key: value for key, value in config.items() if not key.startswith("_")})


def is_plain(pipeline: DiffusionPipeline) -> bool:
    """Whether diffusers' own pipeline samples this network, and so ours is not needed."""
    network = network_of(pipeline)
    known = part_of(network) == "unet" or JOINT_WIDTH in network.config
    return known and classes_told(network) is None and type(pipeline).__name__ != "ClassConditionalPipeline"


def class_pipeline(pipeline: DiffusionPipeline) -> DiffusionPipeline:
    """Our pipeline of the same parts if diffusers' own knows nothing of classes, or less of them; else ``pipeline`` itself."""
    if is_plain(pipeline) or told_pooled(network_of(pipeline)):
        return pipeline
    from immiscible.sampling.class_pipeline import ClassConditionalPipeline

    return ClassConditionalPipeline(**pipeline.components)


def save_pipeline(pipeline: DiffusionPipeline, folder: Path, class_names: Sequence[str] = ()) -> None:
    """Leaves a pipeline that was built here in a folder, with the file of ours by which diffusers samples it where its own does not.

    An EDM network's sampler becomes diffusers' own, by Euler's steps. FDM's stays, with the file that it stands in beside it; so does the
    code of a network that diffusers has not. A `DiTPipeline` keeps the names of the classes, by which diffusers' finds their numbers.
    """
    scheduler, network = pipeline.scheduler, network_of(pipeline)
    if type(scheduler).__name__ == "EDMScheduler" and not scheduler.config.momentum:
        from diffusers import EDMEulerScheduler

        ends = {name: scheduler.config[name] for name in ("sigma_min", "sigma_max", "sigma_data", "rho")}
        pipeline = type(pipeline)(**{**pipeline.components, "scheduler": EDMEulerScheduler(**ends)})
    if type(pipeline.scheduler).__name__ == "EDMScheduler":
        pipeline.register_to_config(scheduler=(EDM_SCHEDULER.stem, "EDMScheduler"))
    if part_of(network) == "transformer":  # ours of a DiT is saved as diffusers' own
        pipeline.register_to_config(transformer=(TRANSFORMERS.stem if is_foreign(network) else "diffusers", type(network).__name__))
    if type(pipeline).__name__ == "DiTPipeline" and class_names and classes_told(network):
        pipeline.register_to_config(id2label=dict(enumerate(class_names)))
    pipeline.save_pretrained(folder)
    if type(pipeline.scheduler).__name__ == "EDMScheduler":
        shutil.copyfile(EDM_SCHEDULER, folder / "scheduler" / EDM_SCHEDULER.name)
    if is_foreign(network):
        shutil.copyfile(TRANSFORMERS, folder / "transformer" / TRANSFORMERS.name)
    if not is_plain(pipeline):
        shutil.copyfile(TEXT_PIPELINE if told_pooled(network) else CLASS_PIPELINE, folder / "pipeline.py")


def build_text_pipeline(parts: CheckpointParts) -> DiffusionPipeline:
    """The checkpoint's own pipeline with the network in training, and its own sampler told the prediction type that is trained; ours of a
    transformer in a U-Net's place.
    """
    import diffusers

    components = {**parts.components, "scheduler": parts.sampler(parts.index["scheduler"][1])}
    if told_pooled(parts.network):
        from immiscible.sampling.text_pipeline import PooledTextPipeline

        return PooledTextPipeline(**components)
    side = parts.network.config.sample_size
    pipeline: DiffusionPipeline = getattr(diffusers, parts.pipeline_class)(**components, **parts.pipeline_settings)
    # Where a checkpoint is as old as Stable Diffusion 1.4, diffusers takes any size below 64 (512 pixels) for a mistake and puts 64 there.
    parts.network.register_to_config(sample_size=side)
    return pipeline


def sample_images(
    pipeline: DiffusionPipeline,
    count: int,
    *,
    steps: int,
    seed: int,
    batch_size: int,
    device: torch.device,
    first: int = 0,
    prompts: Sequence[str] = (),
    guidance_scale: float = 1.0,
    guidance_interval: tuple[float, float] = WHOLE,
    side: int | None = None,
    turn: Callable[[int, int], int] = in_turn,
    bar: bool = True,
) -> numpy.ndarray:
    """Samples with one generator per image, so that image i is the same for every batch size and device.

    A class-conditional network is told the classes of `sample_labels` by our `ClassConditionalPipeline`, whatever pipeline holds it.

    Args:
        pipeline: from `build_pipeline` or loaded by diffusers.
        count: number of images.
        steps: inference steps.
        seed: of the images' generators.
        batch_size: images sampled together.
        device: where the network runs.
        first: the number of the first image; samples 0..n may be taken in several calls.
        prompts: of a text-to-image pipeline.
        guidance_scale: of a text-to-image pipeline, or of a network that is told classes and knows a null class; 1 is without guidance.
        guidance_interval: the noise levels at which classes are guided; see `ClassConditionalPipeline`.
        side: of a text-to-image pipeline's images, in pixels; None for what its network says.
        turn: of which of the prompts or classes an image is, by its number and theirs.
        bar: show the steps of each batch, where there is a terminal.

    Returns:
        uint8 [count, H, W, C].
    """
    pipeline = class_pipeline(pipeline).to(device)
    pipeline.set_progress_bar_config(leave=False, desc="sampling", disable=None if bar else True)
    # Where some parts are in half precision, a sampler may hand fp32 latents to a VAE that would refuse them.
    dtypes = [part.dtype for part in pipeline.components.values() if isinstance(part, nn.Module)]
    half: Any = next((dtype for dtype in dtypes if dtype in (torch.float16, torch.bfloat16)), None)
    autocast = torch.autocast(device.type, dtype=half, enabled=half is not None)
    if type(pipeline).__name__ == "LDMPipeline":  # it scales its noise by the sampler's sigmas before it sets them
        pipeline.scheduler.set_timesteps(steps)
    batches = []
    for start in range(first, first + count, batch_size):
        numbers = range(start, min(start + batch_size, first + count))
        generators = [seeded_generator(seed, "sample", number) for number in numbers]
        wanted = _told(pipeline, numbers, prompts, guidance_scale, guidance_interval, side, turn)
        with told_generators(pipeline, generators), vae_at_its_precision(pipeline), autocast:
            batches.append(pipeline(**wanted, generator=generators, num_inference_steps=steps, output_type="np").images)
    images = numpy.concatenate(batches)
    if not numpy.isfinite(images).all():
        raise UserError(
            "samples hold NaN values: the network has diverged; train with a lower --learning_rate, or an --image_scale nearer 1",
            exit_code=1,
        )
    return (images * 255).round().astype(numpy.uint8)


def _told(
    pipeline: DiffusionPipeline,
    numbers: range,
    prompts: Sequence[str],
    scale: float,
    interval: tuple[float, float],
    side: int | None,
    turn: Callable[[int, int], int],
) -> dict[str, Any]:
    """What the pipeline is told of the images with these numbers."""
    if prompts:
        network = network_of(pipeline)
        sizes = {} if told_pooled(network) else {"height": side, "width": side}  # a transformer of one vector has one
        told = [prompts[turn(number, len(prompts))] for number in numbers]
        return {"prompt": told, "guidance_scale": scale, **sizes, **prompt_options(network)}
    labels = sample_labels(network_of(pipeline), len(numbers), first=numbers[0], turn=turn)
    if labels is None:
        return {"batch_size": len(numbers)}
    return {"class_labels": labels, "guidance_scale": scale, "guidance_interval": interval}


def prompt_options(network: ModelMixin) -> dict[str, Any]:
    """What a pipeline is told beside the prompt, so that it tells the network what training did."""
    return {"max_sequence_length": network.config[TOKENS_READ]} if TOKENS_READ in network.config else {}


def sample_labels(network: ModelMixin, count: int, *, first: int = 0, turn: Callable[[int, int], int] = in_turn) -> Tensor | None:
    """The classes of samples ``first`` to ``first + count - 1``, int64 [count], by default each equally often. None for an unconditional
    network. The null class is none of them.
    """
    num_classes = classes_told(network)
    return None if num_classes is None else torch.tensor([turn(number, num_classes) for number in range(first, first + count)])


def told(config: Mapping[str, Any], guidance_scale: float = 1.0) -> str:
    """What a run's samples are told while they are measured, in words, by the run's flags; empty for an unconditional network."""
    guidance = guided(config, guidance_scale)
    if "pretrained_model_name_or_path" in config:
        return f"the captions of column {config.get('caption_column')}, {guidance or 'without guidance'}"
    return ", ".join(filter(None, ["every class equally often", guidance])) if config.get("class_conditional") else ""


def guided(config: Mapping[str, Any], guidance_scale: float) -> str:
    """How a run's samples are guided at this scale, in words, by the run's flags; empty at 1, which is no guidance."""
    if guidance_scale == 1:
        return ""
    interval = config.get("guidance_interval")
    return f"guidance {guidance_scale:g}" + (f" at noise levels {interval[0]:g} to {interval[1]:g}" if interval else "")


@contextmanager
def told_generators(pipeline: DiffusionPipeline, generators: list[torch.Generator]) -> Iterator[None]:
    """Inside the block the sampler of an `LDMPipeline` draws its noise from these generators, one per image; the pipeline keeps them to
    the first noise, and would leave a stochastic sampler to the global generator. Other pipelines pass them on themselves.
    """
    scheduler = pipeline.scheduler
    if type(pipeline).__name__ != "LDMPipeline" or "generator" not in signature(scheduler.step).parameters:
        yield
        return
    scheduler.step = wraps(scheduler.step)(partial(scheduler.step, generator=generators))
    try:
        yield
    finally:
        del scheduler.step


@contextmanager
def vae_at_its_precision(pipeline: DiffusionPipeline) -> Iterator[None]:
    """Inside the block a VAE with fp32 weights decodes in fp32 under autocast too: SDXL's, which keeps them, overflows in fp16."""
    vae = getattr(pipeline, "vae", None)
    if vae is None:
        yield
        return
    decode = vae.decode

    @wraps(decode)
    def exactly(latents: Tensor, *arguments: Any, **options: Any) -> Any:
        if vae.dtype != torch.float32:
            return decode(latents, *arguments, **options)
        with torch.autocast(latents.device.type, enabled=False):
            return decode(latents.float(), *arguments, **options)

    vae.decode = exactly
    try:
        yield
    finally:
        del vae.decode


def image_grid(images: numpy.ndarray, *, least_side: int = 64) -> Image.Image:
    """A grid as square as possible; small images are enlarged by whole factors to ``least_side`` pixels so that they can be seen.

    Args:
        images: uint8 [N, H, W, C].
        least_side: the least side of a cell in pixels.
    """
    from diffusers.utils import make_image_grid

    columns = math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    cells = [Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).convert("RGB") for image in images]
    factor = max(1, math.ceil(least_side / max(cells[0].size)))
    cells = [cell.resize((cell.width * factor, cell.height * factor), Image.Resampling.NEAREST) for cell in cells]
    cells += [Image.new("RGB", cells[0].size, "white")] * (rows * columns - len(cells))
    return make_image_grid(cells, rows=rows, cols=columns)
