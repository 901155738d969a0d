"""Whole checkpoints in one file, as they are passed around: read once into a folder of parts, and written beside a pipeline."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from immiscible.errors import UserError, first_line
from immiscible.files import PARTIAL, cache_folder, full_disk, replace
from immiscible.networks.latents import SINGLE_FILES
from immiscible.networks.single_file_names import (
    CLIP_RULES,
    OPEN_CLIP_RULES,
    SD3_RULES,
    T5_RULES,
    Rules,
    in_original_order,
    renamed,
    unet_rules,
    vae_rules,
)
from immiscible.networks.weights import LOAD_ERRORS

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from immiscible.networks.checkpoint_parts import CheckpointParts

logger = logging.getLogger(__name__)

FLAG = "--pretrained_model_name_or_path"
NAME = "model.safetensors"
NETWORK = "model.diffusion_model."  # what the names of the network's tensors begin with
NETWORKS = (NETWORK, "joint_blocks.")  # Stable Diffusion 3's alone may go without
VAE = ("first_stage_model.", "vae.")
TRAINED = ("v1", "v2", "xl_base", "sd3", "sd35_medium", "sd35_large")  # of what diffusers says that a file is
UNUSED = ("safety_checker", "feature_extractor", "image_encoder")  # of a pipeline's parts
FILE_ERRORS = (*LOAD_ERRORS, ImportError, IndexError, NotImplementedError)


def in_a_folder(name: str, config: str | None, families: Mapping[str, type[CheckpointParts]], *, cache_dir: str | None) -> str:
    """Where the parts of a checkpoint are: ``name`` itself, or what was made of it if it is a file, or a folder with one file of weights.

    A file is converted once, by diffusers' `from_single_file`, into a folder that is kept in `cache_folder`, without a loss of digits. One
    process does it, and the others of this machine wait.

    Args:
        name: of ``--pretrained_model_name_or_path``.
        config: of ``--single_file_config``; None for what diffusers takes for a file of that kind, which comes from the hub.
        families: by the class of their pipeline, those that are trained.
        cache_dir: where configurations of the hub are kept.

    Raises:
        UserError: the file is not there, cannot be read, is none of these, or lacks what its family needs.
    """
    path = _file(name)
    if path is None:
        return name
    from filelock import FileLock

    folder = cache_folder() / "checkpoints" / f"{path.stem}-{_digest(path, config)}"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f".{folder.name}.lock")):
            if not (folder / "model_index.json").is_file():
                _convert(path, folder, lambda: _read(path, config, families, cache_dir))
    except OSError as error:
        raise UserError(f"{FLAG} {name}: {folder} cannot be written: {error.strerror or error}", exit_code=1) from None
    return str(folder)


def is_single_file(name: str) -> bool:
    """Whether a checkpoint's name is that of a file, there or not, or of a folder that holds one file of weights and no pipeline.

    Raises:
        UserError: it is a folder of several.
    """
    path = Path(name).expanduser()
    if path.is_file() or (path.suffix in SINGLE_FILES and not path.is_dir()):
        return True
    return path.is_dir() and not (path / "model_index.json").exists() and any(path.glob("*.safetensors"))


def _file(name: str) -> Path | None:
    if not is_single_file(name):
        return None
    path = Path(name).expanduser()
    if path.is_dir():
        files = sorted(path.glob("*.safetensors"))
        if len(files) > 1:
            raise UserError(f"{FLAG} {name} holds no pipeline and several files ({', '.join(file.name for file in files)}); give one")
        path = files[0]
    if not path.is_file():
        raise UserError(f"{FLAG} {name}: there is no such file")
    return path.resolve()


def _digest(path: Path, config: str | None) -> str:
    """Of what would change the folder: which file, and the files that say how it is read. Nothing large is read for it."""
    local = Path(config).expanduser() if config else None
    seen = [path] + (sorted(file for file in local.rglob("*") if file.is_file()) if local and local.is_dir() else [])
    facts = [config, *((str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in seen)]
    return hashlib.blake2b(json.dumps(facts).encode(), digest_size=8).hexdigest()


def _convert(path: Path, folder: Path, read: Callable[[], DiffusionPipeline]) -> None:
    partial = folder.with_name(f"{PARTIAL}{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with tqdm(total=2, desc=f"converting {path.name}", unit="half", delay=2, leave=False, disable=None) as bar:
            pipeline = read()
            bar.update()
            with full_disk(folder.parent):
                pipeline.save_pretrained(partial)
            bar.update()
        replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    logger.warning("%s was converted into %s (%.1f GB), which is kept for later runs and may be deleted", path, folder, size / 1e9)


def _read(path: Path, config: str | None, families: Mapping[str, type[CheckpointParts]], cache_dir: str | None) -> DiffusionPipeline:
    """The pipeline in a file, on the CPU, in the file's precision if that is one."""
    import diffusers
    from diffusers.loaders.single_file_utils import load_single_file_checkpoint

    try:
        state: Mapping[str, Tensor] = load_single_file_checkpoint(str(path))
        names = [name for name, tensor in state.items() if isinstance(tensor, Tensor)]
    except FILE_ERRORS as error:
        raise UserError(
            f"{FLAG} {path}: not a file of weights ({first_line(error)}); a pickle is read if it holds tensors alone, else save it as "
            f".safetensors first",
            exit_code=1,
        ) from None
    _check_whole(path, names)
    name = config or _usual_configuration(path, state)
    index = _index(path, name, cache_dir, given=config is not None)
    family = families.get(index["_class_name"])
    if family is None:
        kinds = ", ".join(families)
        raise UserError(f"--single_file_config {name} is a {index['_class_name']}; {FLAG} {path} is read as one of {kinds}")
    settings = {"requires_safety_checker": False} if "safety_checker" in index else {}
    try:
        given = {part: None for part in UNUSED if part in index} | _absent(path, names, name, family, index)
        options: dict[str, Any] = {"config": name, "cache_dir": cache_dir, "torch_dtype": _precision(state, family), **given, **settings}
        pipeline: DiffusionPipeline = getattr(diffusers, family.pipeline_class).from_single_file(str(path), **options)
        _check_filled(pipeline)
    except UserError:
        raise
    except FILE_ERRORS as error:
        raise UserError(
            f"{FLAG} {path} does not go with the configuration of {name} ({first_line(error)}); --single_file_config names a diffusers "
            f"checkpoint of the same kind and sizes",
            exit_code=1,
        ) from None
    return pipeline


def _precision(state: Mapping[str, Tensor], family: type[CheckpointParts]) -> torch.dtype:
    """That of all parts in a file, or fp32 where they differ."""
    starts = (*NETWORKS, *VAE, *family.in_single_file.values())
    found = {tensor.dtype for name, tensor in state.items() if name.startswith(starts) and tensor.is_floating_point()}
    return next(iter(found)) if found in ({torch.float16}, {torch.bfloat16}) else torch.float32


def _check_whole(path: Path, names: Sequence[str]) -> None:
    """Whether a file holds more than adapters or one part; diffusers takes all that it does not know for Stable Diffusion 1.x."""
    if any(name.startswith(NETWORKS) for name in names):
        return
    if any("lora" in name.lower() for name in names):
        raise UserError(f"{FLAG} {path} holds adapters; give the checkpoint that they are of, and these by --use_lora --network_weights")
    raise UserError(
        f"{FLAG} {path} is no whole checkpoint: it has no {NETWORK}*, as files of Stable Diffusion have; one part of a pipeline is read "
        f"from the pipeline's folder"
    )


def _usual_configuration(path: Path, state: Mapping[str, Tensor]) -> str:
    """The name on the hub of what diffusers takes the file for."""
    from diffusers.loaders.single_file_utils import DIFFUSERS_DEFAULT_PIPELINE_PATHS, infer_diffusers_model_type

    try:
        kind = infer_diffusers_model_type(state)
    except FILE_ERRORS:
        kind = "unknown"
    if kind not in TRAINED:
        raise UserError(
            f"{FLAG} {path} is of the kind {kind}; trained here are {', '.join(TRAINED)}. If it is one of them, --single_file_config names "
            f"a diffusers checkpoint of its family"
        )
    return str(DIFFUSERS_DEFAULT_PIPELINE_PATHS[kind]["pretrained_model_name_or_path"])


def _index(path: Path, name: str, cache_dir: str | None, *, given: bool) -> dict[str, Any]:
    """What a configuration says of itself."""
    import diffusers

    try:
        found: dict[str, Any] = diffusers.DiffusionPipeline.load_config(name, cache_dir=cache_dir)
        found["_class_name"]
    except FILE_ERRORS as error:
        where = f"--single_file_config {name}" if given else f"{FLAG} {path} is read by the configuration of {name}, which"
        raise UserError(
            f"{where} is not to be found ({first_line(error)}); give --single_file_config, a diffusers checkpoint of the same kind, of "
            f"which all but the weights is taken: a folder, or a name on the hub",
            exit_code=1,
        ) from None
    return found


def _absent(path: Path, names: Sequence[str], config: str, family: type[CheckpointParts], index: Mapping[str, Any]) -> dict[str, Any]:
    """The parts that the file lacks: from the configuration's folder, where that has weights; what a family can do without is None."""
    import diffusers
    import transformers

    wanted: dict[str, tuple[str, ...]] = {"vae": VAE, **{part: (start,) for part, start in family.in_single_file.items()}}
    found: dict[str, Any] = {}
    for part, starts in wanted.items():
        if any(name.startswith(starts) for name in names):
            continue
        folder = Path(config, part)
        if any(folder.glob("*.safetensors")):
            kind: Any = diffusers.AutoencoderKL if part == "vae" else getattr(transformers, family.encoder_classes[part])
            found[part] = kind.from_pretrained(folder)
        elif part in family.optional:
            after = part.removeprefix("text_encoder")
            found |= dict.fromkeys(each for each in (part, f"tokenizer{after}") if each in index)
        else:
            raise UserError(
                f"{FLAG} {path} has no {part} ({starts[0]}*): give a file that has it, or --single_file_config, a folder with its weights"
            )
    return found


def _check_filled(pipeline: DiffusionPipeline) -> None:
    """Whether each weight was in the file; diffusers leaves others empty.

    Raises:
        ValueError: one was not.
    """
    for part, module in pipeline.components.items():
        if isinstance(module, torch.nn.Module):
            empty = [name for name, tensor in module.state_dict().items() if tensor.is_meta]
            if empty:
                raise ValueError(f"{len(empty)} weights of its {part} are missing, such as {empty[0]}")


def save_single_file(parts: CheckpointParts, folder: Path) -> None:
    """Writes `NAME`: network, VAE and text encoders of a checkpoint, in the layout that they were first published in.

    Args:
        parts: as they shall be, on any device.
        folder: that gets the file.

    Raises:
        UserError: what `check_single_file` raises.
    """
    whole: dict[str, Tensor] = {}
    for module, start, names in _layout(parts):
        whole |= {f"{start}{name}": tensor for name, tensor in in_original_order(module.state_dict(), names).items()}
    save_tensors(whole, folder / NAME)


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Writes tensors by name; one of two names, as T5's embeddings have, is written twice."""
    from safetensors.torch import save_file

    held = {name: tensor.cpu() for name, tensor in tensors.items()}
    seen: set[int] = set()
    for name, tensor in held.items():
        held[name] = tensor.clone() if tensor.data_ptr() in seen else tensor
        seen.add(tensor.data_ptr())
    save_file(held, path, metadata={"format": "pt"})


def check_single_file(parts: CheckpointParts) -> None:
    """Whether `save_single_file` can write these parts so that they are the same when they are read.

    Raises:
        UserError: a network has layers that the layout has not, or weights that readers take to be others.
    """
    _layout(parts)
    first = parts.encoders["text_encoder"]
    if parts.network_part == "transformer" and hasattr(first, "text_projection"):
        weight = first.text_projection.weight
        if not torch.equal(weight, torch.eye(*weight.shape, dtype=weight.dtype, device=weight.device)):
            raise UserError(
                f"--save_single_file: the first text encoder of {parts.name} has a projection, and files of this family have none; "
                f"leave it out"
            )


def _layout(parts: CheckpointParts) -> list[tuple[torch.nn.Module, str, dict[str, str]]]:
    """Each network of a checkpoint, what its tensors' names begin with, and how they go on."""
    found: list[tuple[torch.nn.Module, str, dict[str, str]]] = []
    modules: dict[str, Any] = {parts.network_part: parts.network, **parts.frozen}
    for part, module in modules.items():
        try:
            start, rules = _rules(parts, part, module)
            found.append((module, start, renamed(module.state_dict(), rules)))
        except UserError as error:
            raise UserError(f"--save_single_file: the {part} of {parts.name} has {error}; leave it out") from None
    return found


def _rules(parts: CheckpointParts, part: str, module: Any) -> tuple[str, Rules]:
    if part == "transformer":
        return NETWORK, SD3_RULES
    if part == "unet":
        layers = module.config.layers_per_block
        if not isinstance(layers, int):
            raise UserError(f"layers_per_block {list(layers)}, and in that layout blocks are of one depth")
        return NETWORK, unet_rules(module.state_dict(), layers)
    if part == "vae":
        return VAE[0], vae_rules(len(module.config.block_out_channels))
    start = parts.in_single_file[part]
    if part == "text_encoder_3":
        return f"{start}transformer.", T5_RULES
    if parts.network_part == "transformer" or module.config.hidden_act == "quick_gelu":  # OpenAI's CLIP; OpenCLIP's models have GELU
        return f"{start}transformer.", CLIP_RULES
    return f"{start}model.", OPEN_CLIP_RULES
