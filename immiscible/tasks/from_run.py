"""A run, one of its checkpoints, or a pipeline of plain diffusers becomes something to sample again."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace as replace_fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from immiscible.configs import TextToImageConfig, UnconditionalConfig
from immiscible.errors import UserError, first_line
from immiscible.flags import parse_config
from immiscible.networks.adapters import ADAPTERS
from immiscible.networks.checkpoint_parts import limit_length
from immiscible.networks.kinds import PARTS
from immiscible.networks.latents import load_vae
from immiscible.networks.single_file import is_single_file
from immiscible.networks.weights import LOAD_ERRORS, adapted, saved_network, weights_digest
from immiscible.sampling.loaded import Loaded, freeze
from immiscible.sampling.pipelines import TRANSFORMERS, network_of
from immiscible.tasks.pixels import pipeline_of
from immiscible.training.checkpoints import NAME, checkpoints, damage, holds_shards, is_complete, read_state, step_of
from immiscible.training.folder import MARKER

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from immiscible.networks.checkpoint_parts import CheckpointParts


WEIGHTS = {"ema": "_ema", "raw": ""}  # the choices of --weights -> how the network's folder in a checkpoint is called after its part


WITHOUT_UNET = ("DiTPipeline", "StableDiffusion3Pipeline")  # pipelines of diffusers around a transformer that are sampled


def load_model(name: str, *, weights: str | None = None, lora: str | None = None, base: str | None = None) -> Loaded:
    """The pipeline of a run's folder, of a ``checkpoint-N`` in one, or of plain diffusers, in a folder or on the hub.

    Args:
        name: which.
        weights: of a run, "ema" or "raw"; None for the average if the run kept one.
        lora: a folder with adapters, or their name on the hub.
        base: where the VAE or the checkpoint that a run was trained with is now; None for the run's own folder or what its flags say.

    Raises:
        UserError: it cannot be loaded, does not hold the weights that are asked for, or is no pipeline that is sampled here.
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
    _check_whole(loaded.pipeline, name)
    freeze(loaded.pipeline)
    return loaded


def _check_whole(pipeline: DiffusionPipeline, name: str) -> None:
    """Whether the files had all weights; of what is missing diffusers says a word that is not shown, and leaves no values."""
    networks = ((part, network) for part, network in pipeline.components.items() if isinstance(network, nn.Module))
    missing = [f"{key} of {part}" for part, network in networks for key, tensor in network.state_dict().items() if tensor.is_meta]
    if missing:
        raise UserError(f"--model {name} is damaged: {len(missing)} weights are not in its files, the first {missing[0]}", exit_code=1)


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
    part = _part(folder)
    if isinstance(config, TextToImageConfig) and config.model_preset:
        pipeline = _told_texts(folder, folder / part, config, str(folder))
    elif isinstance(config, UnconditionalConfig) and (config.objective == "edm" or (folder / part / TRANSFORMERS.name).exists()):
        # Diffusers' sampler is there in the place of the run's, or code that diffusers would have to be trusted with.
        vae = load_vae(str(folder / "vae"), resolution=config.resolution) if config.vae_model_name_or_path else None
        with _readable(str(folder)):
            pipeline = pipeline_of(config, saved_network(folder / part), vae)
    else:
        pipeline = _from_diffusers(str(folder))
    if weights == "raw" and config.use_ema:
        if not (folder / f"{part}_non_ema").is_dir():
            raise UserError(f"--weights raw: {folder} holds the average alone; give its checkpoint-N for the weights themselves")
        setattr(pipeline, part, saved_network(folder / f"{part}_non_ema"))
    return Loaded(pipeline, weights, config.resolution)


def _part(folder: Path) -> str:
    """What of a pipeline was trained in a run, by the folders in its own or in one of its checkpoint's."""
    return next((part for part in PARTS if any(folder.glob(f"{part}*/config.json"))), PARTS[0])


def _from_checkpoint(path: Path, weights: str | None, base: str | None) -> Loaded:
    if problem := damage(path):
        raise UserError(f"--model {path} is not a complete checkpoint of this suite ({problem})")
    if holds_shards(path):
        raise UserError(
            f"--model {path} is of a run split by FSDP2 or DeepSpeed, in parts; resumed with --max_train_steps {step_of(path)}, by any "
            f"number of processes, its run writes the pipeline to sample"
        )
    folder = path.resolve().parent
    config = _run_config(folder)
    if isinstance(config, TextToImageConfig) and config.use_lora:
        return _adapted(path, config, weights, base)
    part = _part(path)
    weights = _chosen(weights, [kind for kind, after in WEIGHTS.items() if (path / f"{part}{after}").is_dir()], path)
    saved = path / f"{part}{WEIGHTS[weights]}"
    if isinstance(config, TextToImageConfig):
        own = str(folder) if (folder / "model_index.json").exists() else None
        return Loaded(_told_texts(path, saved, config, base or own), weights, config.resolution)
    vae = None
    if config.vae_model_name_or_path:
        own = next((str(folder / name) for name in ("vqvae", "vae") if (folder / name).is_dir()), None)
        with _named(path):
            vae = load_vae(base or own or config.vae_model_name_or_path, resolution=config.resolution, cache_dir=config.cache_dir)
        _check_same(path, read_state(path)["identity"]["network"]["vae"]["weights"], weights_digest(vae))
    else:
        _refuse_base(base, path)
    return Loaded(pipeline_of(config, saved_network(saved), vae), weights, config.resolution)


def _told_texts(path: Path, saved: Path, config: TextToImageConfig, base: str | None) -> DiffusionPipeline:
    """The pipeline of a network in the folder ``saved``, and of the checkpoint that its run started from."""
    from immiscible.sampling.pipelines import build_text_pipeline

    parts = _started_from(path, config, base, from_scratch=True)  # its fresh network makes room for the saved one
    with _readable(str(path)):
        parts.network = type(parts.network).from_pretrained(saved)
    return build_text_pipeline(parts)


def _adapted(folder: Path, config: TextToImageConfig, weights: str | None, base: str | None) -> Loaded:
    """The checkpoint that a LoRA run started from, with the adapters in ``folder``, which is the run's or a checkpoint's."""
    from immiscible.sampling.pipelines import build_text_pipeline

    weights = _chosen(weights, ["raw"], folder)
    pipeline = build_text_pipeline(_started_from(folder, config, base, from_scratch=False))
    _add_adapters(pipeline, str(folder))
    return Loaded(pipeline, weights, config.resolution)


def _started_from(path: Path, config: TextToImageConfig, base: str | None, *, from_scratch: bool) -> CheckpointParts:
    """The checkpoint that a run started from, at ``base`` or where its flags say."""
    from immiscible.networks.families import load_checkpoint

    if base:
        single = config.single_file_config if is_single_file(base) else None
        of_name: dict[str, Any] = {"revision": None, "variant": None, "non_ema_revision": None, "single_file_config": single}
        config = replace_fields(config, pretrained_model_name_or_path=base, **of_name)
    with _named(path):
        parts = load_checkpoint(config, resolution=config.resolution, cache_dir=config.cache_dir, from_scratch=from_scratch)
    states = [path] if NAME.fullmatch(path.resolve().name) else list(filter(is_complete, checkpoints(path)))[-1:]
    for state in states:
        trained = read_state(state)["identity"]["network"]
        _check_same(path, trained["frozen"], parts.digest)
        parts.from_scratch = trained["from_scratch"]
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

    with _readable(name):
        parts = DiffusionPipeline.load_config(name)
        kind = parts.get("_class_name")
        if kind == "ClassConditionalPipeline":
            from immiscible.sampling.class_pipeline import ClassConditionalPipeline

            return ClassConditionalPipeline.from_pretrained(name)
        if "unet" not in parts and kind not in WITHOUT_UNET:
            raise UserError(f"--model {name} is a {kind}; only pipelines around a U-Net, {' and '.join(WITHOUT_UNET)} are sampled")
        # A safety checker would put black images among the samples; a text encoder that is absent, diffusers wants to hear.
        unchecked = {"safety_checker": None, "requires_safety_checker": False} if "safety_checker" in parts else {}
        absent = dict.fromkeys(part for part, listed in parts.items() if listed in ([None, None], (None, None)))
        pipeline = DiffusionPipeline.from_pretrained(name, **{**absent, **unchecked})
        for after in ("", "_2", "_3"):
            tokenizer, encoder = (pipeline.components.get(f"{part}{after}") for part in ("tokenizer", "text_encoder"))
            if tokenizer and encoder:
                limit_length(tokenizer, encoder)
        return pipeline


@contextmanager
def _readable(name: str) -> Iterator[None]:
    """Inside the block what cannot be loaded is one line that names the model."""
    try:
        yield
    except UserError:
        raise
    except LOAD_ERRORS as error:
        kinds = "neither a run, nor a checkpoint of one, nor a diffusers pipeline"
        raise UserError(f"--model {name}: {kinds} ({first_line(error)})", exit_code=1) from None


def _add_adapters(pipeline: DiffusionPipeline, name: str) -> None:
    if not hasattr(pipeline, "load_lora_weights"):
        raise UserError(f"--lora is for text-to-image pipelines; this one is a {type(pipeline).__name__}")
    network = network_of(pipeline)
    if adapted(network):
        raise UserError("--lora: the model is a run of adapters, which are loaded already; leave it out")
    try:
        pipeline.load_lora_weights(name)
    except LOAD_ERRORS as error:
        raise UserError(f"--lora {name}: no adapters for this network found there ({first_line(error)})", exit_code=1) from None
    if not adapted(network):  # diffusers only warns
        raise UserError(f"--lora {name} has no adapters for this network", exit_code=1)


def _run_config(folder: Path) -> UnconditionalConfig | TextToImageConfig:
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
