"""Training that goes on from an existing file of adapters, as diffusers reads it: its own format, or kohya's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from immiscible.errors import UserError, first_line
from immiscible.networks.adapters import NAME, TEXT_TARGETS, check_peft, check_shapes, config_of, freeze, inject, own_adapters, read_layers
from immiscible.networks.arguments import AdapterArguments
from immiscible.networks.kinds import PARTS
from immiscible.networks.weights import LOAD_ERRORS

if TYPE_CHECKING:
    from peft import LoraConfig

Held = tuple[dict[str, Tensor], dict[str, float] | None, dict[str, Any] | None]  # tensors, kohya's alphas, diffusers' settings


def go_on_from(
    network: Any, arguments: AdapterArguments, *, dtype: torch.dtype, pipeline: str, part: str, encoders: Mapping[str, Any]
) -> None:
    """As `add_adapters`, with the adapters of ``--network_weights``, whose rank and alpha they keep.

    Args:
        network: of diffusers, bare.
        arguments: rank, alpha and DoRA must be the file's where they are given.
        dtype: of what is frozen.
        pipeline: the class of diffusers' whose adapters they are.
        part: what the network is in it.
        encoders: the text encoders that are trained, too; what the file does not have begins with fresh adapters of the network's rank.

    Raises:
        UserError: peft is not installed; or the file is none of adapters of this network, or of others than the flags say.
    """
    check_peft()
    state, alphas, metadata = _opened(str(arguments.network_weights), pipeline, network)
    flag = f"--network_weights {arguments.network_weights}"
    modules = {part: network, **encoders}
    held = {name.partition(".")[0] for name in state}
    if part not in held:
        raise UserError(f"{flag} holds adapters of {' and '.join(sorted(held))}, none of a {type(network).__name__}", exit_code=1)
    if surplus := sorted(held - modules.keys()):
        raise UserError(
            f"{flag} holds adapters of the {surplus[0]}, too: give --train_text_encoder, with --text_encoder_lr 0 if they are to stay so"
        )
    for name, module in modules.items():
        freeze(module, dtype)
        try:
            found = _load(module, name, (state, alphas, metadata), pipeline, Path(str(arguments.network_weights)))
        except (*LOAD_ERRORS, UserError) as error:
            raise UserError(f"{flag} does not fit this network's {name} ({first_line(error)})", exit_code=1) from None
        if found:
            _check_settings(flag, config_of(module), arguments)
            _make_trainable(module, arguments.lora_dropout)
        else:
            of_network = config_of(network)
            inject(module, replace(arguments, rank=of_network.r, lora_alpha=of_network.lora_alpha), list(TEXT_TARGETS))


def _load(module: Any, part: str, held: Held, pipeline: str, path: Path) -> bool:
    """Gives a part of a pipeline the adapters that a file holds for it; whether there are any."""
    state, alphas, metadata = held
    layers = read_layers(part, module, state)
    if layers and part in PARTS:
        module.load_lora_adapter(state, prefix=part, network_alphas=alphas, metadata=metadata, adapter_name=NAME)
    elif layers:
        _pipeline(pipeline).load_lora_into_text_encoder(state, alphas, module, prefix=part, metadata=metadata, adapter_name=NAME)
    if layers:
        check_shapes(path, layers, own_adapters(module))
    return bool(layers)


def _check_settings(flag: str, config: LoraConfig, arguments: AdapterArguments) -> None:
    both = (config.r, config.rank_pattern), (config.lora_alpha, config.alpha_pattern)
    ranks, alphas = ({first, *(several or {}).values()} for first, several in both)
    for name, given, found in (("rank", arguments.rank, ranks), ("lora_alpha", arguments.lora_alpha, alphas)):
        if given is not None and {given} != found:
            raise UserError(f"{flag} has --{name} {' and '.join(f'{each:g}' for each in sorted(found))}, not {given:g}; leave --{name} out")
    if arguments.use_dora and not config.use_dora:
        raise UserError(f"{flag} is LoRA without DoRA's vectors; leave --use_dora out")


def _make_trainable(module: nn.Module, dropout: float) -> None:
    """Loaded adapters, which are fp32 from then on."""
    from peft.tuners.lora import LoraLayer

    for name, weight in module.named_parameters():
        if ".lora_" in name:
            weight.requires_grad_(True).data = weight.data.float()
    for layer in module.modules():
        if isinstance(layer, LoraLayer) and dropout:
            layer.lora_dropout[NAME] = nn.Dropout(dropout)


def _pipeline(name: str) -> Any:
    import diffusers

    return getattr(diffusers, name)


def _opened(path: str, pipeline: str, network: Any) -> Held:
    """The adapters in a file or folder by diffusers' names, with the alphas of kohya's format, or the settings of its own.

    Raises:
        UserError: there is none that diffusers reads.
    """
    flag = f"--network_weights {path}"
    if not Path(path).exists():
        raise UserError(f"{flag}: no such file or folder")
    _refuse_lost_vectors(flag, Path(path))
    kind = _pipeline(pipeline)
    options = {"unet_config": network.config} if "XL" in pipeline else {}
    try:
        found = kind.lora_state_dict(path, return_lora_metadata=True, **options)
    except LOAD_ERRORS as error:
        raise UserError(f"{flag}: no adapters that diffusers reads ({first_line(error)})", exit_code=1) from None
    state, alphas, metadata = found if len(found) == 3 else (found[0], None, found[1])
    if not state or not all("lora" in name for name in state):
        raise UserError(f"{flag}: no adapters that diffusers reads", exit_code=1)
    return state, alphas, metadata


def _refuse_lost_vectors(flag: str, path: Path) -> None:
    """Kohya's DoRA, of which diffusers would drop the vectors with a word that nobody sees."""
    for file in path.glob("*.safetensors") if path.is_dir() else [path]:
        try:
            with safe_open(file, framework="pt") as opened:
                names = list(opened.keys())
        except (OSError, SafetensorError):
            continue  # which diffusers will tell
        if any("dora_scale" in name for name in names):
            raise UserError(
                f"{flag} is a DoRA in kohya's format, whose dora_scale diffusers does not read; save it as diffusers does", exit_code=1
            )
