"""Many samples of a trained model: which weights, of which prompts or classes, and exactly how many, in one folder.

Image i is a function of (seed, i) and what the model was told of it, whatever the number of processes: they share batches of consecutive
images, so that each image is computed in the same company, and a folder that was cut short is completed to the same bytes. Another batch
size gives the same images up to rounding.
"""

from __future__ import annotations

import json
import logging
import os
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from dataclasses import replace as replace_fields
from functools import partial
from inspect import signature
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import torch
from PIL import Image
from torch import nn
from tqdm import tqdm

from immiscible.configs import AnyConfig, TextToImageConfig
from immiscible.errors import UserError
from immiscible.flags import UnconditionalConfig, parse_config
from immiscible.networks.unet import latent_downsampling, load_vae, weights_digest
from immiscible.sampling.pipelines import build_pipeline, sample_images
from immiscible.training.checkpoints import NAME, PARTIAL, checkpoints, clean_up, is_complete, read_state, replace
from immiscible.training.folder import MARKER
from immiscible.training.run import training_scheduler

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from immiscible.networks.stable_diffusion import StableDiffusion

logger = logging.getLogger(__name__)

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
WEIGHTS = {"ema": "unet_ema", "raw": "unet"}  # the choices of --weights -> a checkpoint's folder
ADAPTERS = "pytorch_lora_weights.safetensors"
MANIFEST, TABLE, METADATA = "manifest.json", "samples.npz", "metadata.jsonl"
# What may differ where a folder is completed; the networks are compared by their weights, not by where these lie.
FREE = ("command", "complete", "num_images", "batch_size", "processes", "versions", "model", "lora")


@dataclass
class Loaded:
    """A pipeline to sample.

    Args:
        pipeline: of diffusers; its network is its ``unet``.
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
        return self.pipeline.unet.config.num_class_embeds


def load_model(name: str, *, weights: str | None = None, lora: str | None = None, base: str | None = None) -> Loaded:
    """The pipeline of a run's folder, of a ``checkpoint-N`` in one, or of plain diffusers, in a folder or on the hub.

    Args:
        name: which.
        weights: of a run, "ema" or "raw"; None for the average if the run kept one.
        lora: a folder with adapters, or their name on the hub.
        base: where the VAE or the checkpoint that a run was trained with is now; None for the run's own folder or what its flags say.

    Raises:
        UserError: it cannot be loaded, does not hold the weights that are asked for, or is no pipeline around a U-Net.
    """
    path = Path(name)
    if NAME.fullmatch(path.resolve().name) and path.is_dir():
        loaded = _from_checkpoint(path, weights, base)
    elif (path / MARKER).exists():
        loaded = _from_run(path, weights, base)
    elif weights:
        raise UserError(f"--weights {weights} chooses among the weights of a run or its checkpoint; --model {name} is neither")
    else:
        _refuse_base(base, name)
        loaded = Loaded(_from_diffusers(name))
    if lora:
        _add_adapters(loaded.pipeline, lora)
    _freeze(loaded.pipeline)
    return loaded


def _from_run(folder: Path, weights: str | None, base: str | None) -> Loaded:
    config, unfinished = _run_config(folder), not (folder / "model_index.json").exists()
    if isinstance(config, TextToImageConfig) and config.use_lora and (folder / ADAPTERS).exists():
        return _adapted(folder, config, weights, base)
    _refuse_base(base, folder)
    if unfinished:
        saved = checkpoints(folder)
        raise UserError(
            f"--model {folder} holds no finished pipeline; "
            + (f"sample its newest checkpoint: --model {saved[-1]}" if saved else "it has no checkpoints either")
        )
    weights = _chosen(weights, [kind for kind in WEIGHTS if config.use_ema or kind == "raw"], folder)
    pipeline = _from_diffusers(str(folder))
    if weights == "raw" and config.use_ema:
        if not (folder / "unet_non_ema").is_dir():
            raise UserError(f"--weights raw: {folder} holds the average alone; give its checkpoint-N for the weights themselves")
        pipeline.unet = type(pipeline.unet).from_pretrained(folder, subfolder="unet_non_ema")
    return Loaded(pipeline, weights, config.resolution)


def _from_checkpoint(path: Path, weights: str | None, base: str | None) -> Loaded:
    if not is_complete(path):
        raise UserError(f"--model {path} is not a complete checkpoint of this suite")
    folder = path.resolve().parent
    config = _run_config(folder)
    if isinstance(config, TextToImageConfig) and config.use_lora:
        return _adapted(path, config, weights, base)
    weights = _chosen(weights, [kind for kind, part in WEIGHTS.items() if (path / part).is_dir()], path)
    if isinstance(config, TextToImageConfig):
        from immiscible.networks.stable_diffusion import build_text_pipeline

        own = str(folder) if (folder / "model_index.json").exists() else None
        parts = _started_from(path, config, base or own, from_scratch=True)  # its fresh U-Net makes room for the checkpoint's
        parts.unet = type(parts.unet).from_pretrained(path, subfolder=WEIGHTS[weights])
        return Loaded(build_text_pipeline(parts), weights, config.resolution)
    from diffusers import UNet2DModel

    unet, vae = UNet2DModel.from_pretrained(path, subfolder=WEIGHTS[weights]), None
    if config.vae_model_name_or_path:
        own = str(folder / "vqvae") if (folder / "vqvae").is_dir() else None
        with _named(path):
            vae = load_vae(base or own or config.vae_model_name_or_path, resolution=config.resolution, cache_dir=config.cache_dir)
        _check_same(path, read_state(path)["identity"]["network"]["vae"]["weights"], weights_digest(vae))
    else:
        _refuse_base(base, path)
    sampler, spacing = config.sampling_scheduler, config.timestep_spacing
    return Loaded(build_pipeline(unet, training_scheduler(config), sampler=sampler, spacing=spacing, vae=vae), weights, config.resolution)


def _adapted(folder: Path, config: TextToImageConfig, weights: str | None, base: str | None) -> Loaded:
    """The checkpoint that a LoRA run started from, with the adapters in ``folder``, which is the run's or a checkpoint's."""
    from immiscible.networks.stable_diffusion import build_text_pipeline

    weights = _chosen(weights, ["raw"], folder)
    pipeline = build_text_pipeline(_started_from(folder, config, base, from_scratch=False))
    _add_adapters(pipeline, str(folder))
    return Loaded(pipeline, weights, config.resolution)


def _started_from(path: Path, config: TextToImageConfig, base: str | None, *, from_scratch: bool) -> StableDiffusion:
    """The checkpoint that a run started from, at ``base`` or where its flags say."""
    from immiscible.networks.stable_diffusion import load_stable_diffusion

    if base:
        config = replace_fields(config, pretrained_model_name_or_path=base, revision=None, variant=None, non_ema_revision=None)
    with _named(path):
        parts = load_stable_diffusion(config, from_scratch=from_scratch)
    states = [path] if NAME.fullmatch(path.resolve().name) else list(filter(is_complete, checkpoints(path)))[-1:]
    for state in states:
        _check_same(path, read_state(state)["identity"]["network"]["frozen"], parts.digest)
    return parts


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Says of what is missing whose it is, and how to say where it is now; a relative path means another place elsewhere."""
    try:
        yield
    except UserError as error:
        raise UserError(f"--model {path} needs what it was trained with: {error}. --base says where it is now", exit_code=1) from None


def _check_same(path: Path, trained_with: str, found: str) -> None:
    if trained_with != found:
        raise UserError(f"--model {path} was trained with other weights than these; --base says where the right ones are", exit_code=1)


def _refuse_base(base: str | None, name: str | Path) -> None:
    if base:
        raise UserError(f"--base {base}: --model {name} has all that it needs; leave it out")


def _from_diffusers(name: str) -> DiffusionPipeline:
    from diffusers import DiffusionPipeline

    try:
        parts = DiffusionPipeline.load_config(name)
        if "unet" not in parts:
            raise UserError(
                f"--model {name} is a {parts.get('_class_name')}, which has no U-Net; only pipelines around a U-Net are sampled"
            )
        # A safety checker would put black images among the samples.
        unchecked = {"safety_checker": None, "requires_safety_checker": False} if "safety_checker" in parts else {}
        return DiffusionPipeline.from_pretrained(name, **unchecked)
    except UserError:
        raise
    except (OSError, ValueError, AttributeError) as error:
        line = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"--model {name}: neither a run, nor a checkpoint of one, nor a diffusers pipeline ({line})", exit_code=1) from None


def _add_adapters(pipeline: DiffusionPipeline, name: str) -> None:
    if not hasattr(pipeline, "load_lora_weights"):
        raise UserError(f"--lora is for text-to-image pipelines; this one is a {type(pipeline).__name__}")
    if getattr(pipeline.unet, "peft_config", None):
        raise UserError("--lora: the model is a run of adapters, which are loaded already; leave it out")
    try:
        pipeline.load_lora_weights(name)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        line = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"--lora {name}: no adapters for this network found there ({line})", exit_code=1) from None
    if not getattr(pipeline.unet, "peft_config", None):  # diffusers only warns
        raise UserError(f"--lora {name} has no adapters for this network", exit_code=1)


def _run_config(folder: Path) -> AnyConfig:
    path = folder / "config.yaml"
    if not path.exists():
        raise UserError(f"{folder} has no config.yaml, which says what its weights belong to; a checkpoint must stay in its run's folder")
    text = re.search(r"^pretrained_model_name_or_path:", path.read_text(errors="replace"), re.MULTILINE)
    kind: Any = TextToImageConfig if text else UnconditionalConfig
    return parse_config(kind, ["--config", str(path)], program=path.name, description="")


def _chosen(wanted: str | None, kept: Sequence[str], folder: Path) -> str:
    if wanted and wanted not in kept:
        raise UserError(f"--weights {wanted}: {folder} holds {' and '.join(kept)} weights only")
    return wanted or kept[0]


def take_scheduler(pipeline: DiffusionPipeline, name: str) -> DiffusionPipeline:
    """The pipeline with another sampler of its noise process, one of `SCHEDULERS`.

    Raises:
        UserError: the sampler cannot sample this process, or diffusers' pipeline cannot use it.
    """
    import diffusers

    if "Flow" in type(pipeline.scheduler).__name__:
        raise UserError(f"--scheduler {name}: a flow is sampled by its own {type(pipeline.scheduler).__name__}; leave the flag out")
    kind = getattr(diffusers, SCHEDULERS[name])
    pixels = type(pipeline).__name__ in PIXEL_PIPELINES.values()
    # Its default is to clip, and the schedulers of text-to-image checkpoints say nothing of it if they cannot.
    unclipped = {"clip_sample": False} if not pixels and "clip_sample" in signature(kind.__init__).parameters else {}
    scheduler = kind.from_config(pipeline.scheduler.config, **unclipped)
    if not pixels:
        pipeline.scheduler = scheduler
        return pipeline
    if name not in PIXEL_PIPELINES:
        raise UserError(f"--scheduler {name}: diffusers samples pixels with {', '.join(PIXEL_PIPELINES)} only")
    return getattr(diffusers, PIXEL_PIPELINES[name])(pipeline.unet, scheduler)


def read_lines(path: Path, flag: str) -> list[str]:
    """The prompts or class names of a text file, one a line. Lines end as files' lines do, not at every character that Unicode ends one at.

    Raises:
        UserError: the file cannot be read, is empty, or has an empty line, which would shift the numbers of what follows.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")]
    except OSError as error:
        raise UserError(f"{flag} {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{flag} {path} is not a text file in UTF-8") from None
    if not any(lines):
        raise UserError(f"{flag} {path} is empty: it must have one line or more")
    if not all(lines):
        raise UserError(f"{flag} {path}: line {lines.index('') + 1} is empty; remove it")
    return lines


def cut_short(pipeline: DiffusionPipeline, prompts: Sequence[str]) -> list[int]:
    """The numbers of the prompts of which the text encoder sees the beginning alone; diffusers cuts them off."""
    tokens = pipeline.tokenizer(list(prompts), verbose=False).input_ids
    return [number for number, ids in enumerate(tokens) if len(ids) > pipeline.tokenizer.model_max_length]


@dataclass(frozen=True)
class Request:
    """What to sample.

    Args:
        num_images: N; images 0 to N - 1.
        steps: inference steps.
        seed: of the images' generators.
        batch_size: images sampled together.
        prompts: image i is of prompt i modulo their number; empty for a pipeline without prompts.
        guidance_scale: with prompts.
        side: of the images with prompts, in pixels; None for what the network says.
    """

    num_images: int
    steps: int
    seed: int = 0
    batch_size: int = 16
    prompts: Sequence[str] = ()
    guidance_scale: float = 1.0
    side: int | None = None

    def batches(self, rank: int = 0, ranks: int = 1) -> Iterator[range]:
        """The numbers of the images that a process samples together; the batches do not depend on how many processes share them."""
        starts = range(0, self.num_images, self.batch_size)
        for first in islice(starts, rank, None, ranks):
            yield range(first, min(first + self.batch_size, self.num_images))


class SampleFolder:
    """A folder of exactly the images ``000000.png`` to N - 1, with a manifest that says what they are.

    Args:
        path: the folder.
        size: width and height of an image in pixels.
    """

    def __init__(self, path: Path, size: tuple[int, int]) -> None:
        self.path, self._size = path, size

    def prepare(self, manifest: Mapping[str, Any]) -> None:
        """Creates the folder or checks that it holds a part of these samples; writes the manifest. One process calls it.

        Raises:
            UserError: it holds samples of something else, more of them than are wanted, or other files.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        present = sorted(path.name for path in self.path.iterdir() if path.name != f"{PARTIAL}{MANIFEST}")
        if present and MANIFEST not in present:
            raise UserError(f"--output_dir {self.path} holds {present[0]} and no {MANIFEST}: give a new folder")
        clean_up(self.path)  # not before it is known whose folder this is
        present = sorted(path.name for path in self.path.iterdir())
        old = self._manifest() if present else {}
        manifest = json.loads(json.dumps(manifest))  # as it will be read
        keys = [key for key in {**old, **manifest} if old and key not in FREE and old.get(key) != manifest.get(key)]
        if keys:
            changes = "; ".join(f"{key} was {_short(old.get(key))}, is now {_short(manifest.get(key))}" for key in keys)
            raise UserError(f"--output_dir {self.path} holds other samples: {changes}. Give these settings again, or a new folder")
        allowed = {MANIFEST, TABLE, METADATA, *(file_name(number) for number in range(manifest["num_images"]))}
        if foreign := [name for name in present if name not in allowed]:
            surplus = re.fullmatch(r"\d{6,}\.png", foreign[0])
            why = f"beyond --num_images {manifest['num_images']}" if surplus else "which is no sample"
            raise UserError(
                f"--output_dir {self.path} holds {foreign[0]}, {why} ({len(foreign)} such files): remove it, or give a new folder"
            )
        if old.get("num_images") != manifest["num_images"]:  # what was written of all images is not of all images any more
            for name in (TABLE, METADATA):
                (self.path / name).unlink(missing_ok=True)
        self.write_manifest(manifest)

    def missing(self, numbers: Sequence[int]) -> list[int]:
        """Those of the images that are not there, or not whole."""
        return [number for number in numbers if not self._is_good(self.path / file_name(number))]

    def write(self, number: int, image: numpy.ndarray) -> None:
        """Saves one image, uint8 [H, W, C]; a process that is killed leaves no half of it under its name."""
        partial = self.path / f"{PARTIAL}{file_name(number)}"
        Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(partial, format="PNG")
        os.replace(partial, self.path / file_name(number))

    def write_manifest(self, manifest: Mapping[str, Any]) -> None:
        """Replaces the manifest."""
        partial = self.path / f"{PARTIAL}{MANIFEST}"
        partial.write_text(json.dumps(manifest, indent=1))
        replace(partial, self.path / MANIFEST)

    def write_table(self, num_images: int, labels: int | None) -> None:
        """Saves all images in one file as the ADM evaluation reads them: ``arr_0`` uint8 [N, H, W, C], and the class of each as ``arr_1``.

        Args:
            num_images: N.
            labels: the number of classes, of which image i has class i modulo that number; None leaves ``arr_1`` out.
        """
        first = numpy.asarray(Image.open(self.path / file_name(0)))
        shape = (num_images, *first.shape, *([1] if first.ndim == 2 else []))
        partial = self.path / f"{PARTIAL}{TABLE}"
        with zipfile.ZipFile(partial, "w") as archive:  # written image by image: fifty thousand of them do not fit every memory
            with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as file:
                header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                numpy.lib.format.write_array_header_1_0(file, header)
                for number in tqdm(range(num_images), desc=TABLE, unit="image", delay=2, leave=False, disable=None):
                    with Image.open(self.path / file_name(number)) as image:
                        file.write(numpy.asarray(image).tobytes())
            if labels:
                with archive.open(zipfile.ZipInfo("arr_1.npy"), "w") as file:
                    numpy.lib.format.write_array(file, numpy.arange(num_images) % labels)
        replace(partial, self.path / TABLE)

    def write_metadata(self, num_images: int, prompts: Sequence[str], labels: int | None) -> None:
        """Writes what each image was told, a line for each: its ``file_name``, ``text`` where there are prompts, ``label`` where classes.

        Args:
            num_images: N.
            prompts: image i is of prompt i modulo their number; may be empty.
            labels: the number of classes, as for `write_table`.
        """
        partial = self.path / f"{PARTIAL}{METADATA}"
        with partial.open("w") as file:
            for number in range(num_images):
                text = {"text": prompts[number % len(prompts)]} if prompts else {}
                label = {"label": number % labels} if labels else {}
                file.write(json.dumps({"file_name": file_name(number), **text, **label}) + "\n")
        replace(partial, self.path / METADATA)

    def _manifest(self) -> dict[str, Any]:
        try:
            return json.loads((self.path / MANIFEST).read_text())
        except ValueError:
            raise UserError(f"--output_dir {self.path}: its {MANIFEST} is broken; give a new folder") from None

    def _is_good(self, path: Path) -> bool:
        if not path.exists():
            return False
        try:
            with Image.open(path) as image:
                size = image.size
                image.verify()  # every chunk's checksum, up to the last chunk
        except (OSError, SyntaxError, ValueError):
            return False
        return size == self._size


def file_name(number: int) -> str:
    """Of an image."""
    return f"{number:06}.png"


def image_size(loaded: Loaded, side: int | None) -> tuple[int, int]:
    """Width and height of the pipeline's images, in pixels."""
    pipeline = loaded.pipeline
    size = pipeline.unet.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    if loaded.prompted:
        factor = pipeline.vae_scale_factor
        if side is not None and side % factor:
            raise UserError(f"--resolution {side} must be a multiple of {factor}, by which the VAE divides it")
        return (side, side) if side is not None else (width * factor, height * factor)
    if side is not None:
        raise UserError("--resolution is for text-to-image pipelines; this network has one size")
    factor = latent_downsampling(pipeline.vqvae) if hasattr(pipeline, "vqvae") else 1
    return width * factor, height * factor


def _freeze(pipeline: DiffusionPipeline) -> None:
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


def draw(
    pipeline: DiffusionPipeline,
    request: Request,
    folder: SampleFolder,
    *,
    device: torch.device,
    rank: int = 0,
    ranks: int = 1,
    progress: Callable[[int], Any] = lambda images: None,
) -> int:
    """Samples this process's images that are not in the folder yet.

    Args:
        pipeline: what samples them.
        request: which.
        folder: where they go.
        device: where the networks run.
        rank: this process.
        ranks: how many processes share the images.
        progress: called with the number of images done, or found done, after each batch.

    Returns:
        how many images were written.

    Raises:
        UserError: (exit code 1) the samples hold NaN values.
    """
    written = 0
    sample = partial(
        sample_images,
        pipeline,
        steps=request.steps,
        seed=request.seed,
        device=device,
        prompts=request.prompts,
        guidance_scale=request.guidance_scale,
        side=request.side,
        bar=False,
    )
    for numbers in request.batches(rank, ranks):
        missing = folder.missing(numbers)
        if missing:
            images = sample(len(numbers), batch_size=len(numbers), first=numbers[0])
            for number in missing:
                folder.write(number, images[number - numbers[0]])
        written += len(missing)
        progress(len(numbers))
    return written


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
