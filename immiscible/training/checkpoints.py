"""``checkpoint-{step}``: written beside its final name and renamed, checked when read, pruned only after its successor is safe."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from immiscible.errors import UserError, first_line
from immiscible.files import PARTIAL, discard, file_facts, full_disk, replace
from immiscible.networks.weights import check_keys, load_network, non_finite, save_network, unwrapped
from immiscible.processes import on_every_process
from immiscible.training.sharding import is_sharded
from immiscible.training.shards import SHARDS, load_shards, save_shards

if TYPE_CHECKING:
    from accelerate import Accelerator
    from diffusers.training_utils import EMAModel
    from torch import Tensor

logger = logging.getLogger(__name__)

STATE_FILE = "training_state.json"
NAME = re.compile(r"checkpoint-(\d+)")
SPLIT = ("processes", "--train_batch_size", "--gradient_accumulation_steps")  # whose product is a step's images
BY_PROCESS = {"--streaming": True, "--coupling_window": "epoch"}  # with these, which images a run has left depends on the processes
COUPLING = "coupling"  # what its files are called, and which of them a checkpoint holds in its `STATE_FILE`


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
    accelerate's optimizer and scaler state, and `STATE_FILE` with the step, the run's identity and the size of every file. Under FSDP2
    and DeepSpeed it holds every process's part of all these in ``shards/`` instead.

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
        UserError: (exit code 1) what would be saved is not finite, or the disk is full or fails; earlier checkpoints are as they were.
    """
    check_finite(accelerator, ema, coupling_state or {}, step)
    target = folder / f"checkpoint-{step}"
    partial = folder / f"{PARTIAL}{target.name}"

    def prepare() -> None:
        if accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)

    def write() -> None:
        with full_disk(partial):
            _save_trained(accelerator, partial, ema, part)
            if coupling_state:
                save_file(dict(coupling_state), _coupling_file(partial, accelerator))

    def publish() -> None:
        if accelerator.is_main_process:
            _publish(partial, target, step, identity)
            _prune(folder, step, limit)

    try:
        for work in (prepare, write, publish):
            on_every_process(accelerator, work, partial)
    except UserError:
        if accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)  # it may be what fills the disk
        raise
    return target


def _save_trained(accelerator: Accelerator, folder: Path, ema: EMAModel | None, part: str) -> None:
    """Network, average and optimizer: each process's part, or all of them as diffusers and accelerate do."""
    if is_sharded(accelerator):
        save_shards(accelerator, folder / SHARDS, ema)
        return
    with _network_saved(accelerator, ema, part):
        accelerator.save_state(str(folder))


def check_finite(accelerator: Accelerator, ema: EMAModel | None, coupling_state: Mapping[str, Tensor], step: int) -> None:
    """Looks whether what a checkpoint would hold is finite: one reduced number. The loss and the gradient are of the weights before.

    Raises:
        UserError: (exit code 1) it is not; on every rank.
    """
    (model,) = accelerator._models
    what = non_finite(unwrapped(accelerator, model), ema, coupling_state)
    bad = accelerator.reduce(torch.tensor(float(bool(what)), device=accelerator.device), reduction="sum")
    if bad.item():
        raise UserError(
            f"NaN or infinity after step {step} in {what or 'what another process holds'}: nothing was saved of it, checkpoints before are "
            f"kept; try a lower --learning_rate, more --lr_warmup_steps, a larger --adam_epsilon or --mixed_precision no",
            exit_code=1,
        )


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


def _publish(partial: Path, target: Path, step: int, identity: Mapping[str, Any]) -> None:
    _seal(partial, step, identity)
    if target.exists() and not is_ours(target):
        raise UserError(f"{target} is no checkpoint of this suite: move it away, and resume", exit_code=1)
    replace(partial, target)


def _prune(folder: Path, step: int, limit: int | None) -> None:
    """Deletes what is older than the newest ``limit`` checkpoints, of which that of ``step`` is one."""
    earlier = [path for path in checkpoints(folder) if step_of(path) < step and is_ours(path)]
    for old in earlier[: max(0, len(earlier) - limit + 1)] if limit is not None else []:
        discard(old)


def load_checkpoint(accelerator: Accelerator, path: Path, ema: EMAModel | None, *, part: str = "unet") -> tuple[int, dict[str, Tensor]]:
    """Restores model, optimizer, scaler and EMA from a complete checkpoint; every rank calls it.

    Returns:
        the optimizer steps taken, and this rank's coupling state on the CPU, empty for most couplings.

    Raises:
        UserError: (exit code 1) a file cannot be read, or holds something else than this run's.
    """
    step = int(read_state(path)["step"])
    if holds_shards(path):
        with _named(path / SHARDS):
            load_shards(accelerator, path / SHARDS, step, ema)
    elif is_sharded(accelerator):
        raise UserError(
            f"{path} holds the whole network, as DDP and one process save it: resume it without FSDP2 and DeepSpeed, or begin anew (what "
            f"these save is resumed by any launch)"
        )
    else:
        _load_whole(accelerator, path, ema, step, part)
    file = _coupling_file(path, accelerator)
    with _named(file):
        state = load_file(file) if file.exists() else {}
    if file.exists() and not state:  # such a file is written where there is a state alone
        raise UserError(f"{file} holds no state of a coupling", exit_code=1)
    return step, state


def _load_whole(accelerator: Accelerator, path: Path, ema: EMAModel | None, step: int, part: str) -> None:
    """What DDP and one process save: the network as diffusers does, the optimizer as accelerate does."""
    kind = None

    def load(models: list[torch.nn.Module], input_dir: str) -> None:
        nonlocal kind
        network = unwrapped(accelerator, models.pop())
        kind = type(network)
        with _named(path / part):
            load_network(network, Path(input_dir), part)
            if ema is not None:
                check_keys(network, path / f"{part}_ema")

    hook = accelerator.register_load_state_pre_hook(load)
    try:
        with _named(path / "optimizer.bin"):
            accelerator.load_state(str(path))
    finally:
        hook.remove()
    (optimizer,) = accelerator._optimizers
    if step and not optimizer.state_dict()["state"] and accelerator.scaler is None:  # whose scale may have let no step happen yet
        raise UserError(f"{path / 'optimizer.bin'} holds no state of an optimizer that has taken {step} steps", exit_code=1)
    if ema is not None:
        with _named(path / f"{part}_ema"):
            _load_average(ema, path / f"{part}_ema", kind)


def _load_average(ema: EMAModel, folder: Path, kind: Any) -> None:
    from diffusers.training_utils import EMAModel

    device = ema.shadow_params[0].device
    ema.load_state_dict(EMAModel.from_pretrained(str(folder), kind).state_dict())
    ema.to(device)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Inside the block what fails, in whatever library, is one line that names the file or folder that was being read."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # of torch, pickle, safetensors, diffusers, accelerate: nearly any type
        raise UserError(f"{path} cannot be loaded ({first_line(error)}); resume an older checkpoint by its path", exit_code=1) from error


def resolve_checkpoint(folder: Path, request: str | None) -> Path | None:
    """The checkpoint that ``--resume_from_checkpoint`` means: ``latest`` is the newest complete one in ``folder``, or None.

    Raises:
        UserError: an explicit path, absolute or inside ``folder``, that does not exist or is incomplete.
    """
    if request is None:
        return None
    if request == "latest":
        problems: dict[Path, str] = {}
        for path in reversed([each for each in checkpoints(folder) if is_ours(each)]):
            problems[path] = damage(path)
            if not problems[path]:
                return path
            logger.warning("%s is damaged (%s); looking for an older one", path, problems[path])
        for newest, problem in problems.items():
            raise UserError(
                f"--resume_from_checkpoint latest: no checkpoint in {folder} is whole (of {newest.name} {problem}); delete the run with "
                f"--overwrite_output_dir, or choose another --output_dir",
                exit_code=1,
            )
        return None
    found_at = [candidate for candidate in (Path(request), folder / request) if candidate.is_dir()]
    if not found_at:
        known = ", ".join(found.name for found in checkpoints(folder)) or "none"
        raise UserError(f"--resume_from_checkpoint {request}: no such folder; checkpoints in {folder}: {known}")
    problem = damage(found_at[0])
    if problem:
        raise UserError(f"--resume_from_checkpoint {request}: incomplete ({problem}); `latest` takes the newest complete checkpoint")
    return found_at[0]


def read_state(path: Path) -> dict[str, Any]:
    """The `STATE_FILE` of a checkpoint: ``step``, ``identity`` and ``files``."""
    return json.loads((path / STATE_FILE).read_text())


def check_identity(path: Path, identity: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Refuses to continue a checkpoint as another run.

    Args:
        path: the checkpoint.
        identity: the run's.
        defaults: the values of flags that a checkpoint may be too old to know, by which it was trained.

    Raises:
        UserError: naming everything that differs, with both values.
    """
    known = {key: value for key, value in defaults.items() if key in identity}
    before = {**known, **read_state(path)["identity"]}
    if holds_shards(path):
        _check_split(path, before, identity)
        before |= {key: identity[key] for key in SPLIT}
    saved, now = _differing(before, identity)
    if saved:
        differences = "; ".join(f"{key} was {value}, is now {now[key]}" for key, value in saved.items())
        raise UserError(f"{path} belongs to another run: {differences}. Give its settings again, or another --output_dir")


def _check_split(path: Path, before: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    """Whether a run may go on with another split of a step's images over processes and micro-batches: it draws what it would have drawn.

    Raises:
        UserError: a step would have another number of images, or the processes have done what others cannot go on with.
    """
    if all(before[key] == identity[key] for key in SPLIT):
        return
    how = " x ".join(SPLIT)
    images, now = (prod(int(of[key]) for key in SPLIT) for of in (before, identity))
    if images != now:
        raise UserError(f"{path} was saved by steps of {images} images ({how}), and these are of {now}: choose numbers of this product")
    bound = [f"{flag} {value}" for flag, value in BY_PROCESS.items() if identity.get(flag) == value]
    bound += ["what its coupling remembers"] if read_state(path).get(COUPLING) else []
    if bound:
        raise UserError(f"{path}: {bound[0]} is of each process by itself: resume it with the same {how}")


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


def holds_shards(path: Path) -> bool:
    """Whether a checkpoint was saved under FSDP2 or DeepSpeed, by as many processes as there were; it is resumed by any number."""
    return (path / SHARDS).is_dir()


def is_ours(path: Path) -> bool:
    """Whether a folder called ``checkpoint-{number}`` is one of this suite's, whole or damaged; others are never touched."""
    return (path / STATE_FILE).is_file()


def _seal(partial: Path, step: int, identity: Mapping[str, Any]) -> None:
    files = {str(path.relative_to(partial)): file_facts(path) for path in sorted(partial.rglob("*")) if path.is_file()}
    held = [name for name in files if name.startswith(COUPLING)]
    (partial / STATE_FILE).write_text(json.dumps({"step": step, "identity": identity, COUPLING: held, "files": files}, indent=1))


def is_complete(path: Path) -> bool:
    """Whether every file that the checkpoint was sealed with is there with its size; `damage` reads them too."""
    return not _incompleteness(path)


def damage(path: Path) -> str:
    """What is wrong with a checkpoint, or an empty string: a file that is missing or not what was saved, or values that are not finite."""
    problem = _incompleteness(path)
    if problem:
        return problem
    files: dict[str, Any] = read_state(path)["files"]
    for name, facts in tqdm(files.items(), desc=f"checking {path.name}", unit="file", delay=2, leave=False, disable=None):
        if isinstance(facts, dict) and file_facts(path / name) != facts:  # older checkpoints hold sizes alone
            return f"{name} is not what was saved (its SHA-256 differs)"
        if name.endswith(".safetensors") and not _is_finite(path / name):
            return f"{name} holds NaN or infinite values, or cannot be read"
    return ""


def _is_finite(path: Path) -> bool:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = (file.get_tensor(name) for name in file.keys())  # noqa: SIM118 (not a dict)
            return all(bool(torch.isfinite(tensor).all()) for tensor in tensors if tensor.is_floating_point())
    except (OSError, SafetensorError):
        return False


def _incompleteness(path: Path) -> str:
    """What is missing from a checkpoint, or an empty string."""
    try:
        state = read_state(path)
        step, files = state["step"], state["files"]
        sound = isinstance(files, dict) and isinstance(state["identity"], dict) and isinstance(step, int) and step >= 0
        lost = [name for name in state.get(COUPLING, []) if name not in files]  # older checkpoints do not say which they hold
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        sound = False
    if not sound:
        return f"{STATE_FILE} is missing or broken"
    if lost:
        return f"{lost[0]} is missing"
    if NAME.fullmatch(path.name) and step_of(path) != step:
        return f"it is of step {step}, whatever it is called"
    for name, facts in files.items():
        size = facts.get("bytes") if isinstance(facts, dict) else facts
        if not (path / name).is_file():
            return f"{name} is missing"
        if (path / name).stat().st_size != size:
            return f"{name} has {(path / name).stat().st_size} bytes instead of {size}"
    return ""


def _coupling_file(folder: Path, accelerator: Accelerator) -> Path:
    return folder / f"{COUPLING}-{accelerator.process_index}.safetensors"
