"""``checkpoint-{step}``: written beside its final name and renamed, checked when read, pruned only after its successor is safe."""

from __future__ import annotations

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

from immiscible.errors import UserError
from immiscible.files import PARTIAL, discard, full_disk, replace
from immiscible.networks.weights import load_network, save_network, unwrapped
from immiscible.processes import on_every_process

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator
    from diffusers.training_utils import EMAModel
    from torch import Tensor


logger = logging.getLogger(__name__)


STATE_FILE = "training_state.json"


NAME = re.compile(r"checkpoint-(\d+)")


def save_checkpoint(
    accelerator: Accelerator,
    folder: Path,
    step: int,
    ema: EMAModel | None,
    identity: Mapping[str, Any],
    limit: int | None,
    coupling_state: Mapping[str, Tensor] | None = None,
    *,
    part: str = "unet",
) -> Path:
    """Writes ``folder/checkpoint-{step}``; every rank calls it.

    The checkpoint holds the network in ``{part}/`` and, with EMA, its average in ``{part}_ema/`` (both load with plain diffusers),
    accelerate's optimizer and scaler state, and `STATE_FILE` with the step, the run's identity and the size of every file.

    Args:
        accelerator: its one prepared model and its optimizer are saved.
        folder: the run's folder.
        step: optimizer steps taken.
        ema: saved if not None.
        identity: what defines the run, compared on resume by `check_identity`.
        limit: this many checkpoints are kept, the newest; None keeps all.
        coupling_state: of this rank; each rank writes a file of its own if there is any.
        part: what the network is in a pipeline.

    Raises:
        UserError: (exit code 1) the disk is full or fails; earlier checkpoints are as they were.
    """
    target = folder / f"checkpoint-{step}"
    partial = folder / f"{PARTIAL}{target.name}"

    def prepare() -> None:
        if accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)

    def write() -> None:
        with full_disk(partial), _network_saved(accelerator, ema, part):
            accelerator.save_state(str(partial))
            if coupling_state:
                save_file(dict(coupling_state), _coupling_file(partial, accelerator))

    def publish() -> None:
        if accelerator.is_main_process:
            _seal(partial, step, identity)
            replace(partial, target)
            _prune(folder, step, limit)

    for work in (prepare, write, publish):
        on_every_process(accelerator, work)
    return target


@contextmanager
def _network_saved(accelerator: Accelerator, ema: EMAModel | None, part: str) -> Iterator[None]:
    """Inside the block `accelerator.save_state` writes the network and its average as diffusers does, in place of its own files."""

    def save(models: list[torch.nn.Module], weights: list[Any], output_dir: str) -> None:
        if accelerator.is_main_process:
            save_network(unwrapped(accelerator, models[0]), Path(output_dir), part)
            if ema is not None:
                ema.save_pretrained(os.path.join(output_dir, f"{part}_ema"))
        weights.clear()

    hook = accelerator.register_save_state_pre_hook(save)
    try:
        yield
    finally:
        hook.remove()


def _prune(folder: Path, step: int, limit: int | None) -> None:
    """Deletes what is older than the newest ``limit`` checkpoints, of which that of ``step`` is one."""
    earlier = [path for path in checkpoints(folder) if step_of(path) < step]
    for old in earlier[: max(0, len(earlier) - limit + 1)] if limit is not None else []:
        discard(old)


def load_checkpoint(accelerator: Accelerator, path: Path, ema: EMAModel | None, *, part: str = "unet") -> tuple[int, dict[str, Tensor]]:
    """Restores model, optimizer, scaler and EMA from a complete checkpoint; every rank calls it.

    Returns:
        the optimizer steps taken, and this rank's coupling state on the CPU, empty for most couplings.
    """
    from diffusers.training_utils import EMAModel

    kind: Any = None

    def load(models: list[torch.nn.Module], input_dir: str) -> None:
        nonlocal kind
        network = unwrapped(accelerator, models.pop())
        kind = type(network)
        load_network(network, Path(input_dir), part)

    hook = accelerator.register_load_state_pre_hook(load)
    try:
        accelerator.load_state(str(path))
    finally:
        hook.remove()
    if ema is not None:
        device = ema.shadow_params[0].device
        ema.load_state_dict(EMAModel.from_pretrained(str(path / f"{part}_ema"), kind).state_dict())
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


def _coupling_file(folder: Path, accelerator: Accelerator) -> Path:
    return folder / f"coupling-{accelerator.process_index}.safetensors"
