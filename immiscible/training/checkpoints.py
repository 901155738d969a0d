"""``checkpoint-{step}``: written beside its final name and renamed, checked when read, pruned only after its successor is safe."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file, save_file

from immiscible.errors import UserError, on_every_process

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator
    from diffusers import UNet2DModel
    from diffusers.training_utils import EMAModel
    from torch import Tensor

logger = logging.getLogger(__name__)

STATE_FILE = "training_state.json"
PARTIAL, DISCARDED = ".partial-", ".discarded-"
SPARE = 2**20  # bytes; a disk with less is full
NAME = re.compile(r"checkpoint-(\d+)")


def save_checkpoint(
    accelerator: Accelerator,
    folder: Path,
    step: int,
    ema: EMAModel | None,
    identity: Mapping[str, Any],
    limit: int | None,
    coupling_state: Mapping[str, Tensor] | None = None,
) -> Path:
    """Writes ``folder/checkpoint-{step}``; every rank calls it.

    The checkpoint holds ``unet/`` and, with EMA, ``unet_ema/`` (both load with plain diffusers), accelerate's optimizer and scaler
    state, and `STATE_FILE` with the step, the run's identity and the size of every file.

    Args:
        accelerator: its one prepared model and its optimizer are saved.
        folder: the run's folder.
        step: optimizer steps taken.
        ema: saved if not None.
        identity: what defines the run, compared on resume by `check_identity`.
        limit: this many checkpoints are kept, the newest; None keeps all.
        coupling_state: of this rank; each rank writes a file of its own if there is any.

    Raises:
        UserError: (exit code 1) the disk is full or fails; earlier checkpoints are as they were.
    """
    target = folder / f"checkpoint-{step}"
    partial = folder / f"{PARTIAL}{target.name}"

    def prepare() -> None:
        if accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)

    def save_models(models: list[torch.nn.Module], weights: list[Any], output_dir: str) -> None:
        if accelerator.is_main_process:
            network = unwrapped(accelerator, models[0])
            if adapted(network):
                save_adapters(network, Path(output_dir))
            else:
                network.save_pretrained(os.path.join(output_dir, "unet"))
            if ema is not None:
                ema.save_pretrained(os.path.join(output_dir, "unet_ema"))
        weights.clear()

    def write() -> None:
        hook = accelerator.register_save_state_pre_hook(save_models)
        try:
            with _full_disk(partial):
                accelerator.save_state(str(partial))
                if coupling_state:
                    save_file(dict(coupling_state), _coupling_file(partial, accelerator))
        finally:
            hook.remove()

    def publish() -> None:
        if accelerator.is_main_process:
            _seal(partial, step, identity)
            replace(partial, target)
            earlier = [path for path in checkpoints(folder) if step_of(path) < step]
            for old in earlier[: max(0, len(earlier) - limit + 1)] if limit is not None else []:
                discard(old)

    for work in (prepare, write, publish):
        on_every_process(accelerator, work)
    return target


@contextmanager
def _full_disk(path: Path) -> Iterator[None]:
    """Inside the block torch's way of failing on a full disk, a `RuntimeError` that does not say why, is an `OSError` that does."""
    try:
        yield
    except RuntimeError:
        if shutil.disk_usage(path).free > SPARE:
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from None


def load_checkpoint(accelerator: Accelerator, path: Path, ema: EMAModel | None) -> tuple[int, dict[str, Tensor]]:
    """Restores model, optimizer, scaler and EMA from a complete checkpoint; every rank calls it.

    Returns:
        the optimizer steps taken, and this rank's coupling state on the CPU, empty for most couplings.
    """
    from diffusers.training_utils import EMAModel

    kind: Any = None

    def load_models(models: list[torch.nn.Module], input_dir: str) -> None:
        nonlocal kind
        network = unwrapped(accelerator, models.pop())
        kind = type(network)
        if adapted(network):
            load_adapters(network, Path(input_dir))
        else:
            network.load_state_dict(kind.from_pretrained(input_dir, subfolder="unet").state_dict())

    hook = accelerator.register_load_state_pre_hook(load_models)
    try:
        accelerator.load_state(str(path))
    finally:
        hook.remove()
    if ema is not None:
        device = ema.shadow_params[0].device
        ema.load_state_dict(EMAModel.from_pretrained(str(path / "unet_ema"), kind).state_dict())
        ema.to(device)
    file = _coupling_file(path, accelerator)
    state = load_file(file) if file.exists() else {}
    return int(read_state(path)["step"]), state


def resolve_checkpoint(folder: Path, request: str | None) -> Path | None:
    """The checkpoint that ``--resume_from_checkpoint`` means: ``latest`` is the newest complete one in ``folder``, or None.

    Raises:
        UserError: an explicit path, absolute or inside ``folder``, that does not exist or is incomplete.
    """
    if request is None:
        return None
    if request == "latest":
        for path in reversed(checkpoints(folder)):
            problem = _incompleteness(path)
            if not problem:
                return path
            logger.warning("%s is incomplete (%s); looking for an older one", path, problem)
        return None
    found_at = [candidate for candidate in (Path(request), folder / request) if candidate.is_dir()]
    if not found_at:
        known = ", ".join(found.name for found in checkpoints(folder)) or "none"
        raise UserError(f"--resume_from_checkpoint {request}: no such folder; checkpoints in {folder}: {known}")
    problem = _incompleteness(found_at[0])
    if problem:
        raise UserError(f"--resume_from_checkpoint {request}: incomplete ({problem}); `latest` takes the newest complete checkpoint")
    return found_at[0]


def read_state(path: Path) -> dict[str, Any]:
    """The `STATE_FILE` of a checkpoint: ``step``, ``identity`` and ``files``."""
    return json.loads((path / STATE_FILE).read_text())


def check_identity(path: Path, identity: Mapping[str, Any]) -> None:
    """Refuses to continue a checkpoint as another run.

    Raises:
        UserError: naming everything that differs, with both values.
    """
    saved, now = _differing(read_state(path)["identity"], identity)
    if saved:
        differences = "; ".join(f"{key} was {value}, is now {now[key]}" for key, value in saved.items())
        raise UserError(f"{path} belongs to another run: {differences}. Give its settings again, or another --output_dir")


def _differing(one: Any, other: Any) -> tuple[Any, Any]:
    """Both as they are or, of two mappings, those entries alone that differ, at every depth."""
    if not (isinstance(one, Mapping) and isinstance(other, Mapping)):
        return one, other
    keys = [key for key in {**one, **other} if one.get(key) != other.get(key)]
    pairs = {key: _differing(one.get(key), other.get(key)) for key in keys}
    return {key: pair[0] for key, pair in pairs.items()}, {key: pair[1] for key, pair in pairs.items()}


def checkpoints(folder: Path) -> list[Path]:
    """The folders named ``checkpoint-{number}`` in ``folder``, oldest first; foreign names are left out and left alone."""
    found = [(int(match[1]), path) for path in folder.glob("checkpoint-*") if (match := NAME.fullmatch(path.name)) and path.is_dir()]
    return [path for _, path in sorted(found)]


def step_of(path: Path) -> int:
    """The number in ``checkpoint-{number}``."""
    return int(path.name.removeprefix("checkpoint-"))


def clean_up(folder: Path) -> None:
    """Removes what a killed process left half written or half deleted."""
    for path in [*folder.glob(f"{PARTIAL}*"), *folder.glob(f"{DISCARDED}*")]:
        _delete(path)


def discard(path: Path) -> None:
    """Deletes a file or folder so that a kill in between cannot leave half of it under its name."""
    doomed = path.with_name(f"{DISCARDED}{path.name}")
    if doomed.exists():
        clean_up(path.parent)
    path.rename(doomed)
    _delete(doomed)


def replace(new: Path, target: Path) -> None:
    """Renames ``new`` to ``target``, whose old content is discarded only when the new stands complete beside it."""
    flush(new)
    if target.is_dir() or target.is_symlink():
        discard(target)
    os.replace(new, target)
    _flush_one(target.parent)


def flush(path: Path) -> None:
    """Forces a file, or all files of a folder, to the disk, readable as the umask says (safetensors makes its files private)."""
    umask = os.umask(0)
    os.umask(umask)
    for item in [path, *path.rglob("*")]:
        if item.is_file():
            item.chmod(0o666 & ~umask)
        _flush_one(item)


def unwrapped(accelerator: Accelerator, model: torch.nn.Module) -> UNet2DModel:
    """The diffusers model below the wrappers of DDP and torch.compile. Without ``keep_fp32_wrapper`` it would lose its autocast."""
    return accelerator.unwrap_model(model, keep_fp32_wrapper=True, keep_torch_compile=False)


def _seal(partial: Path, step: int, identity: Mapping[str, Any]) -> None:
    files = {str(path.relative_to(partial)): path.stat().st_size for path in sorted(partial.rglob("*")) if path.is_file()}
    (partial / STATE_FILE).write_text(json.dumps({"step": step, "identity": identity, "files": files}, indent=1))


def is_complete(path: Path) -> bool:
    """Whether every file that the checkpoint was sealed with is there with its size."""
    return not _incompleteness(path)


def _incompleteness(path: Path) -> str:
    """What is missing from a checkpoint, or an empty string."""
    try:
        files = read_state(path)["files"]
    except (OSError, ValueError, KeyError):
        return f"{STATE_FILE} is missing or broken"
    for name, size in files.items():
        if not (path / name).is_file():
            return f"{name} is missing"
        if (path / name).stat().st_size != size:
            return f"{name} has {(path / name).stat().st_size} bytes instead of {size}"
    return ""


def adapted(network: torch.nn.Module) -> bool:
    """Whether the network has low-rank adapters, which alone are trained then."""
    return bool(getattr(network, "peft_config", None))


def save_adapters(network: torch.nn.Module, folder: Path) -> None:
    """Writes the adapters as diffusers' ``load_lora_weights`` reads them: ``pytorch_lora_weights.safetensors``, fp32."""
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft.utils import get_peft_model_state_dict

    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(network))
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=layers)


def load_adapters(network: torch.nn.Module, folder: Path) -> None:
    """Puts saved adapters into a network that has some of the same shapes."""
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import convert_unet_state_dict_to_peft
    from peft.utils import set_peft_model_state_dict

    state, _ = StableDiffusionPipeline.lora_state_dict(folder)
    layers = {name.removeprefix("unet."): value for name, value in state.items() if name.startswith("unet.")}
    set_peft_model_state_dict(network, convert_unet_state_dict_to_peft(layers), adapter_name="default")


def _coupling_file(folder: Path, accelerator: Accelerator) -> Path:
    return folder / f"coupling-{accelerator.process_index}.safetensors"


def _delete(path: Path) -> None:
    """A link is removed, never what it points to."""
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _flush_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
