"""What a training step needs, told before it is taken: memory by what it is for, and floating-point operations.

The network's own passes run on tensors that have shapes, types and a device but no data, so that nothing is allocated and nothing
computed, and what lives at each moment is counted: torch's `FakeTensorMode`, and a mode that sees every tensor which an operation makes.
What a kernel needs inside, and what an allocator keeps for later, is not seen.
"""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

from immiscible.networks.arguments import TrainingArguments
from immiscible.networks.optimization import hidden_matrices

if TYPE_CHECKING:
    from accelerate import Accelerator

MOMENTS = {"adamw": 2, "radam": 2, "prodigy": 4, "schedule_free": 2}  # what these optimizers keep of each weight, as large as it
SMALL_8BIT, BLOCK_8BIT = 4096, 256  # weights below the first keep fp32 moments under bitsandbytes; numbers that share a scale
_ATEN = torch.ops.aten
FLOPS: dict[Any, Any] = {  # of one call, by what is called; the CPU's attention does what the GPU's does
    **flop_registry,
    _ATEN._scaled_dot_product_flash_attention_for_cpu: flop_registry[_ATEN._scaled_dot_product_flash_attention],
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[_ATEN._scaled_dot_product_flash_attention_backward],
}
DEPTH = 4  # dataclasses, lists and mappings inside each other in which networks are looked for


@dataclass(frozen=True)
class Passes:
    """A forward and a backward pass.

    Args:
        activations: bytes that the forward pass leaves for the backward pass.
        peak: the most bytes that live at once in both, beside the weights and what was there before; with the gradients.
        largest: bytes of the largest tensor that is made.
        flops: floating-point operations of matrix products, convolutions and attention.
    """

    activations: int
    peak: int
    largest: int
    flops: int


@dataclass(frozen=True)
class StepMemory:
    """Bytes of a step, by what they are for."""

    weights: int
    frozen: int
    gradients: int
    optimizer: int
    average: int
    passes: Passes
    update: int  # while the optimizer takes its step, beside all the above but the passes

    @property
    def peak(self) -> int:
        """The most that is needed at once."""
        return self.weights + self.frozen + self.optimizer + self.average + max(self.passes.peak, self.gradients + self.update)


class _Living(TorchDispatchMode):
    """Counts the bytes of the storages that operations make, as long as they live, and the operations of the costly ones.

    torch's own `FlopCounterMode` would hold on to tensors of blocks that are computed again.

    Args:
        known: tensors that were there before, which views of them do not make anew.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self._sizes = {tensor.untyped_storage()._cdata: 0 for tensor in known}
        self.now = self.peak = self.largest = self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        made = func(*args, **kwargs)
        if (count := FLOPS.get(func._overloadpacket)) is not None:
            self.flops += count(*args, **kwargs, out_val=made)
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return made

    def _count(self, storage: Any) -> None:
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = size = storage.nbytes()
        weakref.finalize(storage, self._forget, key)
        self.now += size
        self.peak, self.largest = max(self.peak, self.now), max(self.largest, size)

    def _forget(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


def step_passes(
    network: nn.Module,
    arguments: Sequence[Any],
    options: Mapping[str, Any],
    *,
    device: torch.device | str,
    checkpointing: bool | None = None,
    precision: torch.dtype | None = None,
    accumulation: int = 1,
    beside: Sequence[nn.Module] = (),
) -> Passes:
    """What a forward pass of a mean square and its backward pass need; the network is neither run nor changed.

    Args:
        network: of diffusers, on any device, also ``meta``; its weights and whether it checkpoints stay as they are.
        arguments: by which it is called; of tensors, the shape and dtype count.
        options: the same by name.
        device: on which it is thought to be, whose kernels' rules hold.
        checkpointing: whether activations are computed again in the backward pass; None as the network is set.
        precision: of autocast, where ``network.forward`` does not bring its own.
        accumulation: micro-batches of a step: from the second on, gradients are there before.
        beside: networks on that device which the passes call, too, as hooks do; they are there before.
    """
    kind = torch.device(device).type
    place = torch.device("cpu") if kind == "cpu" else device  # of several processes each has cpu:0, which to these tensors is another
    with torch.enable_grad(), FakeTensorMode(allow_non_fake_inputs=bool(beside)) as mode:

        def empty(tensor: Tensor) -> Tensor:
            made = torch.empty(tensor.shape, dtype=tensor.dtype, device=place)
            return made.contiguous(memory_format=torch.channels_last) if _channels_last(tensor) else made

        blank, given, named = _blank(network, empty), *(tree_map_only(Tensor, empty, each) for each in (tuple(arguments), dict(options)))
        if checkpointing is not None:
            (blank.enable_gradient_checkpointing if checkpointing else blank.disable_gradient_checkpointing)()
        there = [mode.from_tensor(tensor) for each in beside for tensor in (*each.parameters(), *each.buffers())]
        told = [leaf for leaf in tree_leaves((given, named)) if isinstance(leaf, Tensor)]
        living = _Living([*blank.parameters(), *blank.buffers(), *told, *there])
        with living:
            for _ in range(min(accumulation, 2)):
                before = living.now
                with torch.autocast(kind, precision, enabled=precision is not None):
                    output = blank(*given, **named)
                loss = (output.sample if hasattr(output, "sample") else output[0]).float().square().mean()
                activations = living.now - before
                del output
                loss.backward()
                del loss
    flops = living.flops * accumulation // min(accumulation, 2)
    return Passes(activations, living.peak, living.largest, flops)


def _channels_last(tensor: Tensor) -> bool:
    return tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()


def _blank(network: nn.Module, empty: Callable[[Tensor], Tensor]) -> Any:
    """A copy of the network, with its hooks and wrapped calls, in which ``empty`` made every tensor."""
    made: dict[int, Any] = {}
    for module in network.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None and id(tensor) not in made:
                weight = isinstance(tensor, nn.Parameter)
                made[id(tensor)] = nn.Parameter(empty(tensor), tensor.requires_grad) if weight else empty(tensor)
    return copy.deepcopy(network, made)  # which takes what it has for a copy already


def optimizer_bytes(name: str, network: nn.Module) -> int:
    """What an optimizer, by its name in `OPTIMIZERS`, keeps of the weights that are trained."""
    hidden = {id(weight) for weight in hidden_matrices(network)} if name == "muon" else set()

    def kept(weight: Tensor) -> float:
        size, count = weight.element_size(), weight.numel()
        if name == "adafactor":  # a mean of squares a row and a column
            numbers = count if weight.dim() < 2 else count // weight.shape[-1] + count // weight.shape[-2]
            return numbers * size
        if name == "adamw_8bit":
            return 2 * (4 * count if count < SMALL_8BIT else count + 4 * math.ceil(count / BLOCK_8BIT))
        return MOMENTS.get(name, 1 if id(weight) in hidden else 2) * count * size

    return round(sum(map(kept, _trained(network))))


def _trained(network: nn.Module) -> list[nn.Parameter]:
    return [weight for weight in network.parameters() if weight.requires_grad]


def step_memory(
    network: nn.Module,
    passes: Passes,
    *,
    optimizer: str,
    device: torch.device | str,
    averaged: bool = False,
    frozen: int = 0,
    processes: int = 1,
) -> StepMemory:
    """Puts together what a step needs.

    Args:
        network: as in `step_passes`.
        passes: of `step_passes`.
        optimizer: its name in `OPTIMIZERS`.
        device: where it trains: on a GPU the optimizer updates all weights at once.
        averaged: whether an average is kept on the device.
        frozen: bytes of other networks there.
        processes: of DDP, which sends gradients from buckets of its own.
    """
    trained = [weight.nbytes for weight in _trained(network)]
    gradients = sum(trained)
    together = torch.device(device).type == "cuda" and optimizer in ("adamw", "radam", "schedule_free", "adafactor")
    return StepMemory(
        weights=tensor_bytes([network]) + (gradients if processes > 1 else 0),
        frozen=frozen,
        gradients=gradients,
        optimizer=optimizer_bytes(optimizer, network),
        average=sum(weight.nbytes for weight in network.parameters()) if averaged else 0,
        passes=passes,
        update=gradients if together else max(trained, default=0),
    )


def tensor_bytes(networks: Iterable[nn.Module], device: torch.device | None = None) -> int:
    """Bytes of the weights and buffers of networks, each counted once; on one kind of device, or on any."""
    tensors = {id(tensor): tensor for network in networks for tensor in (*network.parameters(), *network.buffers())}
    return sum(tensor.nbytes for tensor in tensors.values() if device is None or tensor.device.type == device.type)


def other_networks(task: Any) -> list[nn.Module]:
    """The networks of a task beside the one that it trains and what that has inside: frozen ones, and targets."""
    found: dict[int, nn.Module] = {}

    def look(value: Any, depth: int) -> None:
        if isinstance(value, nn.Module):
            found[id(value)] = value
        elif depth and is_dataclass(value) and not isinstance(value, type):
            for item in fields(value):
                look(getattr(value, item.name, None), depth - 1)
        elif depth and isinstance(value, list | tuple | dict):
            for item in value.values() if isinstance(value, dict) else value:
                look(item, depth - 1)

    look(task, DEPTH)
    inside = {id(module) for module in task.network.modules()}
    return [network for key, network in found.items() if key not in inside]


@contextmanager
def at_first_call(network: nn.Module, tell: Callable[[Sequence[Any], Mapping[str, Any]], None]) -> Iterator[None]:
    """Inside the block the network's first call has ``tell`` called with its arguments before it, and before all hooks."""

    def hook(_: nn.Module, arguments: Any, options: Any) -> None:
        handle.remove()
        tell(arguments, options)

    handle = network.register_forward_pre_hook(hook, prepend=True, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def table(as_set: StepMemory, other: StepMemory | None, switched: str) -> str:
    """The rows of a plan, in MiB.

    Args:
        as_set: as the run's flags are.
        other: with activation checkpointing switched; None where the network has none.
        switched: what the other is called.
    """
    columns = [as_set] if other is None else [as_set, other]
    rows: list[tuple[str, Callable[[StepMemory], int]]] = [
        ("weights", lambda memory: memory.weights),
        ("frozen networks", lambda memory: memory.frozen),
        ("gradients", lambda memory: memory.gradients),
        ("optimizer", lambda memory: memory.optimizer),
        ("average", lambda memory: memory.average),
        ("activations", lambda memory: memory.passes.activations),
        ("largest tensor", lambda memory: memory.passes.largest),
        ("peak", lambda memory: memory.peak),
    ]
    lines = [f"Plan: memory of a step as predicted, in MiB{'' if other is None else f'; to the right {switched}'}"]
    lines += [f"  {name:<16}" + "".join(f"{value(memory) / 2**20:>12,.1f}" for memory in columns) for name, value in rows]
    return "\n".join(lines)


def plan_table(
    config: TrainingArguments, accelerator: Accelerator, task: Any, arguments: Sequence[Any], options: Mapping[str, Any]
) -> tuple[str, int]:
    """What the steps of a run need, from its network's first call.

    Args:
        config: how it is trained.
        accelerator: of the run.
        task: what is trained (`Task`), its network prepared.
        arguments: of the call.
        options: the same by name.

    Returns:
        the rows, and the floating-point operations of a step.
    """
    network, device, is_on = task.network, accelerator.device, config.gradient_checkpointing
    others, accumulation = other_networks(task), config.gradient_accumulation_steps
    frozen = tensor_bytes(others, device)

    def needed(checkpointing: bool | None) -> StepMemory:
        settings = {"device": device, "checkpointing": checkpointing, "accumulation": accumulation, "beside": others}
        return step_memory(
            network,
            step_passes(network, arguments, options, **settings),
            optimizer="adamw_8bit" if config.use_8bit_adam else config.optimizer,
            device=device,
            averaged=config.use_ema and not config.offload_ema,
            frozen=frozen,
            processes=accelerator.num_processes,
        )

    as_set = needed(None)
    other = needed(not is_on) if getattr(network, "_supports_gradient_checkpointing", False) else None
    return table(as_set, other, f"{'without' if is_on else 'with'} --gradient_checkpointing"), as_set.passes.flops
