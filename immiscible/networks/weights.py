"""A network's weights: saved and loaded, whole or as adapters; their average, their precision, and what tells them from others."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from immiscible.errors import UserError
from immiscible.networks.adapters import adapted, load_adapters, save_adapters

# What diffusers, transformers and torch raise on folders that hold no such network, a broken one, or a pickle that is more than tensors.
LOAD_ERRORS = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError, UnpicklingError)

if TYPE_CHECKING:
    from accelerate import Accelerator
    from diffusers import ModelMixin
    from diffusers.training_utils import EMAModel

PRECISIONS: dict[str, torch.dtype] = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def unwrapped(accelerator: Accelerator, model: nn.Module) -> ModelMixin:
    """The diffusers model below the wrappers of DDP and torch.compile. Without ``keep_fp32_wrapper`` it would lose its autocast."""
    return accelerator.unwrap_model(model, keep_fp32_wrapper=True, keep_torch_compile=False)


def weights_digest(network: nn.Module) -> str:
    """A short line that tells these weights from others, to the last bit."""
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


@contextmanager
def evaluation_weights(model: nn.Module, ema: EMAModel | None) -> Iterator[None]:
    """Inside the block ``model`` is in evaluation mode and holds the EMA weights, if there are any."""
    was_training = model.training
    model.eval()
    if ema is not None:
        ema.store(model.parameters())
        ema.copy_to(model.parameters())
    try:
        yield
    finally:
        if ema is not None:
            ema.restore(model.parameters())
        model.train(was_training)


def non_finite(network: nn.Module, ema: EMAModel | None, state: Mapping[str, Tensor]) -> str:
    """Which part of a checkpoint would hold NaN or infinite values: trained weights, their average, the coupling's state; or nothing."""
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    groups = {"the weights": trained, "their average": [] if ema is None else ema.shadow_params, "the coupling's state": state.values()}
    for name, tensors in groups.items():
        tests = [torch.isfinite(_held(tensor.detach())).all() for tensor in tensors if tensor.is_floating_point()]
        if tests and not torch.stack([test.to(tests[0].device) for test in tests]).all():
            return name
    return ""


def _held(tensor: Tensor) -> Tensor:
    """What this process has of a tensor, which may be split over several."""
    part: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part


def check_keys(network: nn.Module, folder: Path) -> None:
    """Looks whether the weights in ``folder`` are those of a network like this one; diffusers would give fresh values to what is missing.

    Raises:
        UserError: (exit code 1) a tensor is missing, surplus or of another shape; naming the folder.
    """
    from safetensors import safe_open

    found: dict[str, list[int]] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 (not a dict)
    wanted = {name: list(tensor.shape) for name, tensor in network.state_dict().items()}
    if different := [name for name in sorted({**found, **wanted}) if found.get(name) != wanted.get(name)]:
        shapes = [f"{found.get(different[0], 'missing')} there, {wanted.get(different[0], 'missing')} in the network"]
        raise UserError(f"{folder} holds other weights than this network's: {different[0]} is {shapes[0]}", exit_code=1)


def save_network(network: ModelMixin, folder: Path, part: str) -> None:
    """Writes what is trained of a network: all of it into the subfolder ``part`` as diffusers loads it, or its adapters into ``folder``."""
    if adapted(network):
        save_adapters(network, folder)
    else:
        network.save_pretrained(folder / part)


def saved_network(folder: Path) -> ModelMixin:
    """The network in a folder of `save_network` or of a pipeline, of the class that its configuration names: of diffusers, or ours."""
    import diffusers

    from immiscible.networks import diffusion_transformers

    name: str = json.loads((folder / "config.json").read_text())["_class_name"]
    network: ModelMixin = getattr(diffusers if hasattr(diffusers, name) else diffusion_transformers, name).from_pretrained(folder)
    return network


def load_network(network: ModelMixin, folder: Path, part: str) -> None:
    """Puts what `save_network` wrote of a network of the same shapes into this one, which keeps its device and precision."""
    if adapted(network):
        load_adapters(network, folder)
    else:
        check_keys(network, folder / part)
        network.load_state_dict(type(network).from_pretrained(folder, subfolder=part).state_dict())


def add_metadata(path: Path, facts: dict[str, str]) -> None:
    """Adds ``facts`` to the metadata of a safetensors file, each as ``immiscible.{name}``."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(path, framework="pt") as file:
        metadata = {**(file.metadata() or {}), **{f"immiscible.{name}": value for name, value in facts.items()}}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    save_file(tensors, path, metadata=metadata)
