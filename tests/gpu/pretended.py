"""A GPU for machines without one: tensors that say they are on ``cuda:0`` and hold their numbers on the CPU.

Code under `pretended_gpu` takes its branches for GPUs, and what a GPU refuses is refused: an operation on tensors of two devices, NumPy on
a tensor of the device, a generator of the wrong one. So it finds wrong devices, not wrong kernels, and the tests of the GPU's checks have
something to fail on. Streams, events and autograd are not pretended, nor is ``.to("cuda")`` without the index.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch._dynamo  # before anything is replaced: the first tensor that is moved imports it
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

GPU = torch.device("cuda", 0)
COPIES = ("aten::copy_", "aten::_to_copy")  # cross from one device to the other
CPU_INDEX = ("aten::index", "aten::index_put", "aten::index_put_")  # whose indices may be on the CPU
CPU_GENERATOR = torch.Generator
PYTHON_INDEX = (Tensor.__getitem__, Tensor.__setitem__)
GUARDED = (Tensor.nonzero, torch.nonzero, Tensor.__invert__, Tensor.contiguous)  # methods of one tensor that ask for it too
PYTHON_NUMBERS = (Tensor.__float__, Tensor.__int__, Tensor.__bool__, Tensor.__index__, Tensor.item, Tensor.tolist)


class OnGPU(Tensor):
    """A tensor of the pretended device; ``held`` is on the CPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> OnGPU:
        layout = {"strides": inner.stride(), "storage_offset": inner.storage_offset()}
        self: OnGPU = Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=GPU, **layout)  # type: ignore[attr-defined]
        self.held = inner
        return self

    def __repr__(self) -> str:  # type: ignore[override]
        return f"OnGPU({self.held})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """What a tensor of the device does outside of `pretended_gpu` too."""
        return _computed(func, args, kwargs or {})

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Numbers and indices in Python ask for a guard of the device, which a torch without CUDA has not."""
        if func in PYTHON_NUMBERS:
            return func(args[0].held)
        if func in PYTHON_INDEX:
            return _indexed(func, *args)
        with torch._C.DisableTorchFunctionSubclass():  # the default would call what is on the CPU a tensor of this class too
            if func in GUARDED:
                return OnGPU(func(args[0].held))
            return func(*args, **(kwargs or {}))


class GeneratorOnGPU(torch.Generator):
    """A generator that says it is on the pretended device."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """The pretended one."""
        return GPU


class _Generator:
    """In the place of `torch.Generator`."""

    def __new__(cls, device: torch.device | str = "cpu") -> Any:
        return GeneratorOnGPU() if torch.device(device).type == "cuda" else CPU_GENERATOR(device)


@contextmanager
def pretended_gpu() -> Iterator[torch.device]:
    """Inside the block there is the device ``cuda:0`` that it is given."""
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch.cuda, "_lazy_init", lambda: None))
        stack.enter_context(mock.patch.object(torch, "Generator", _Generator))
        stack.enter_context(torch.no_grad())  # autograd's nodes ask for the device too, and end the process
        stack.enter_context(_Factories())
        stack.enter_context(_Functions())
        yield GPU


class _Factories(TorchDispatchMode):
    """Makes tensors on the device where ``device`` says so."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(func, args, kwargs or {})


class _Functions(TorchFunctionMode):
    """What does not come as an operation: `torch.tensor`, which builds its tensor by itself, and which generator is meant."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        on_gpu, generator = _is_for_gpu(args, kwargs), kwargs.get("generator")
        if generator is not None and isinstance(generator, GeneratorOnGPU) is not on_gpu:
            raise RuntimeError(f"Expected a {'cuda' if on_gpu else 'cpu'} device type for generator but found {generator.device.type}")
        if func is torch.tensor and on_gpu:
            return torch.tensor(*args, **{**kwargs, "device": "cpu"}).to(GPU)
        return func(*args, **kwargs)


def _is_for_gpu(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    device = kwargs.get("device")
    if device is not None:
        return torch.device(device).type == "cuda"
    return any(isinstance(leaf, OnGPU) for leaf in tree_leaves((args, kwargs)))


def _computed(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    device, on_gpu = kwargs.get("device"), _is_for_gpu(args, kwargs)
    name = func._schema.name
    if name not in COPIES:
        _check_devices(name, args, leaves)
    changed = {**kwargs, **({"device": torch.device("cpu")} if device is not None else {})}
    if "pin_memory" in changed:
        changed["pin_memory"] = False
    inner_args, inner_kwargs = tree_map_only(OnGPU, lambda tensor: tensor.held, (args, changed))
    result = func(*inner_args, **inner_kwargs)
    if name == "aten::copy_":
        return args[0]
    if not on_gpu or not any(isinstance(leaf, Tensor) for leaf in tree_leaves(result)):
        return result
    wrapped = tree_map_only(Tensor, OnGPU, result)
    return return_and_correct_aliasing(func, args, kwargs, wrapped)


def _check_devices(name: str, args: tuple[Any, ...], leaves: list[Tensor]) -> None:
    """Raises what a GPU raises for tensors of two devices; numbers of no dimension and indices may be on the CPU."""
    if name in CPU_INDEX:
        leaves = [leaf for leaf in tree_leaves((args[0], args[2:])) if isinstance(leaf, Tensor)]
        indices = [leaf for leaf in tree_leaves(args[1]) if isinstance(leaf, Tensor)]
        if not isinstance(args[0], OnGPU) and any(isinstance(index, OnGPU) for index in indices):
            raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
    kinds = {isinstance(leaf, OnGPU) for leaf in leaves if leaf.dim() or isinstance(leaf, OnGPU)}
    if len(kinds) > 1:
        raise RuntimeError(f"{name}: Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!")


def _indexed(func: Callable[..., Any], tensor: Tensor, index: Any, *value: Tensor) -> Any:
    """``tensor[index]`` or ``tensor[index] = value``."""
    if not isinstance(tensor, OnGPU) and any(isinstance(leaf, OnGPU) for leaf in tree_leaves(index)):
        raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
    inner = tree_map_only(OnGPU, lambda leaf: leaf.held, (tensor, index, *value))
    result = func(*inner)
    return OnGPU(result) if isinstance(tensor, OnGPU) and result is not None else result
