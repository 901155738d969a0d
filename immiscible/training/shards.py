"""What each process holds of a network that is split over several, written and read by torch's distributed checkpointing.

A tensor's parts go into one safetensors file per process, each with its place in the whole, so that any number of processes reads them
again, also a single one. (torch's own format has a pickle beside them, which runs what it says when it is read.)
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from immiscible.errors import UserError, first_line
from immiscible.networks.weights import unwrapped
from immiscible.training.zero2 import by_zero2, put_state, whole_state

if TYPE_CHECKING:
    from accelerate import Accelerator
    from diffusers.training_utils import EMAModel

SHARDS = "shards"  # the folder in a checkpoint
AVERAGED = "average.updates"


def save_shards(accelerator: Accelerator, folder: Path, ema: EMAModel | None) -> None:
    """Writes what is trained, its average and the optimizer's state of the accelerator's one model; every rank calls it.

    Raises:
        OSError: a rank cannot write; on every rank.
    """
    from torch.distributed.checkpoint import HuggingFaceStorageWriter, save

    (model,), (optimizer,) = accelerator._models, accelerator._optimizers
    trained = _trained(accelerator)
    split = by_zero2(accelerator)
    state: Any = dict(zip(trained.values(), whole_state(model, trained.values()), strict=True)) if split else optimizer.optimizer.state
    entries = _weights(accelerator, ema) | _named_state(trained, state)
    with _of_any_rank(folder):
        save(entries, storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))


def load_shards(accelerator: Accelerator, folder: Path, step: int, ema: EMAModel | None) -> None:
    """Puts what `save_shards` wrote after ``step`` into a model that is split over any number of processes or none; every rank calls it.

    Raises:
        OSError: a rank cannot read it; on every rank.
        UserError: (exit code 1) it is of another network, or lacks something; on every rank.
    """
    from torch.distributed.checkpoint import HuggingFaceStorageReader, load

    (model,), (optimizer,) = accelerator._models, accelerator._optimizers
    trained = _trained(accelerator)
    split = by_zero2(accelerator)
    state: Any = defaultdict(dict) if split else optimizer.optimizer.state
    reader = HuggingFaceStorageReader(str(folder))
    with _of_any_rank(folder):
        _make_room(trained, state, reader.read_metadata().state_dict_metadata, "cpu" if split else None)
        entries = _weights(accelerator, ema) | _named_state(trained, state)
        if step and not any(map(state.get, trained.values())):
            raise UserError(f"{folder} holds no state of an optimizer that has taken {step} steps", exit_code=1)
        load(entries, storage_reader=reader, no_dist=accelerator.num_processes == 1)
    if split:
        put_state(model, state)
    if ema is not None:
        ema.optimization_step = int(entries[AVERAGED])


@contextmanager
def _of_any_rank(folder: Path) -> Iterator[None]:
    """What fails on one rank is raised by torch on all of them, as something that is no `Exception`."""
    from torch.distributed.checkpoint import CheckpointException

    try:
        yield
    except CheckpointException as met:
        error, _ = next(iter(met.failures.values()))
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror or str(error), str(folder)) from met
        raise UserError(f"{folder} cannot be read or written ({first_line(error)[:200]})", exit_code=1) from met


def _trained(accelerator: Accelerator) -> Mapping[str, nn.Parameter]:
    (model,) = accelerator._models
    return {name: weight for name, weight in unwrapped(accelerator, model).named_parameters() if weight.requires_grad}


def _weights(accelerator: Accelerator, ema: EMAModel | None) -> dict[str, Tensor]:
    """By the names that they have in the files; they are read in place."""
    (model,) = accelerator._models
    trained = _trained(accelerator)
    found = {f"weights.{name}": weight.data for name, weight in trained.items()}
    if ema is not None:
        names = [name for name, _ in unwrapped(accelerator, model).named_parameters()]
        found |= {f"average.weights.{name}": tensor for name, tensor in zip(names, ema.shadow_params, strict=True)}
        found[AVERAGED] = torch.tensor([ema.optimization_step], device="cpu")
    return found


def _named_state(trained: Mapping[str, nn.Parameter], state: Any) -> dict[str, Tensor]:
    """The optimizer's, by the names that it has in the files."""
    named = ((name, state.get(weight, {})) for name, weight in trained.items())
    return {f"optimizer.{kind}.{name}": value for name, of_weight in named for kind, value in of_weight.items()}


def _make_room(trained: Mapping[str, nn.Parameter], state: Any, saved: Mapping[str, Any], device: str | None) -> None:
    """Gives an optimizer that has taken no step the state that the files hold, of any values: what is like its weight, and counts."""
    for key, facts in saved.items():
        part, _, rest = key.partition(".")
        kind, _, name = rest.partition(".")
        weight = trained.get(name) if part == "optimizer" else None
        if weight is not None:
            like = weight.shape == facts.size and facts.size
            room = torch.zeros_like(weight, device=device) if like else torch.zeros(facts.size, dtype=facts.properties.dtype, device="cpu")
            state[weight][kind] = room.detach()
