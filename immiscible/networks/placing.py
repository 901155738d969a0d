"""Where the parts of a checkpoint are placed for training, and which of them get adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from immiscible.errors import UserError
from immiscible.networks.adapters import TOKENS, add_adapters, freeze_unreached, train_inside
from immiscible.networks.arguments import AdapterArguments
from immiscible.networks.checkpoint_parts import CheckpointParts
from immiscible.networks.network_weights import go_on_from
from immiscible.networks.weights import PRECISIONS

if TYPE_CHECKING:
    from accelerate import Accelerator

GEOMETRY = "geometry"  # beside `TOKENS`


def place(parts: CheckpointParts, accelerator: Accelerator, *, adapters: AdapterArguments | None, idle: bool) -> None:
    """Moves the parts to the device: frozen ones in the run's precision, trained weights in fp32.

    Args:
        parts: as loaded.
        accelerator: gives device and precision.
        adapters: which the network gets; None leaves it to be trained whole.
        idle: leave VAE and text encoders in host memory, where nothing is encoded; sampling moves them.

    Raises:
        UserError: accelerate is configured for a precision that these networks are not trained in; or the adapters
            cannot be had.
    """
    if accelerator.mixed_precision not in PRECISIONS:
        raise UserError(f"--mixed_precision {accelerator.mixed_precision} is not supported here; give no, fp16 or bf16")
    dtype = PRECISIONS[accelerator.mixed_precision]
    parts.place_frozen(torch.device("cpu") if idle else accelerator.device, dtype)
    if adapters is not None:
        _adapt(parts, adapters, dtype)
    parts.network.to(accelerator.device).train()


def _adapt(parts: CheckpointParts, arguments: AdapterArguments, dtype: torch.dtype) -> None:
    """Gives the network, and text encoders that shall be trained, adapters; the latter are inside the network from then on."""
    encoders = {name: parts.encoders[name] for name in parts.adapted_texts} if arguments.train_text_encoder else {}
    if arguments.network_weights:
        go_on_from(parts.network, arguments, dtype=dtype, pipeline=parts.pipeline_class, part=parts.network_part, encoders=encoders)
    else:
        add_adapters(parts.network, arguments, targets=parts.lora_targets, dtype=dtype, encoders=encoders)
    if encoders:
        train_inside(parts.network, encoders, partial(_told_of_tokens, parts))
        freeze_unreached(encoders.values(), parts.told(parts.texts([""], parts.text_encoder.device), None).values())


def told_tokens(parts: CheckpointParts, captions: Sequence[str], geometry: Tensor | None, device: torch.device) -> dict[str, Tensor]:
    """As `CheckpointParts.told`, on ``device``, of a network with its text encoders inside: token ids, of which it makes text states."""
    tokens = {f"{TOKENS}{name}": ids.to(device) for name, ids in parts.tokens(captions).items()}
    return tokens if geometry is None else {**tokens, GEOMETRY: geometry}


def _told_of_tokens(parts: CheckpointParts, encoders: Mapping[str, Any], named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a network with these ``encoders`` inside is told, of what `told_tokens` gives and whatever else it is called with."""
    tokens = {name.removeprefix(TOKENS): ids for name, ids in named.items() if name.startswith(TOKENS)}
    states = replace(parts, encoders={**parts.encoders, **encoders}).encode(tokens)
    rest = {name: value for name, value in named.items() if not name.startswith(TOKENS) and name != GEOMETRY}
    return {**rest, **parts.told({name: states[name] for name in parts.states_told}, named.get(GEOMETRY))}
