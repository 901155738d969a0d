"""Networks that are trained from random weights, by preset or by configuration: diffusers' U-Nets and transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from immiscible.networks.dit import KINDS, build_dit, dit_config
from immiscible.networks.kinds import ROWS, read_config
from immiscible.networks.unet import build_unet, unet_config

if TYPE_CHECKING:
    from diffusers import ModelMixin

# The choices of --model_preset, each with what makes the network's constructor arguments of it; the sizes are where that is.
PRESETS: dict[str, Callable[..., dict[str, Any]]] = {
    "unet-tiny": unet_config,
    "unet-small": unet_config,
    "unet-cifar10": unet_config,
    "unet-speed": unet_config,
    "unet-diffusers": unet_config,
    "unet-sd": unet_config,
    "dit-tiny": dit_config,
    "dit-s-2": dit_config,
    "dit-b-2": dit_config,
    "dit-l-2": dit_config,
    "dit-xl-2": dit_config,
    "mdt-tiny": dit_config,
    "mdt-s-2": dit_config,
    "mdt-b-2": dit_config,
    "mdt-xl-2": dit_config,
}


def network_config(*, config_name_or_path: str | None, preset: str | None, **options: Any) -> dict[str, Any]:
    """The constructor arguments of the network that the flags mean; see `unet_config` and `dit_config` for the options.

    Raises:
        UserError: as theirs.
    """
    configure = dit_config if config_name_or_path and _is_dit(config_name_or_path) else PRESETS.get(str(preset), unet_config)
    return configure(config_name_or_path=config_name_or_path, preset=preset, **options)


def build_network(settings: dict[str, Any]) -> ModelMixin:
    """A network of `network_config` with fresh weights, drawn from the global generator.

    Raises:
        UserError: diffusers cannot build it.
    """
    return build_dit(settings) if ROWS in settings else build_unet(settings)


def _is_dit(config_name_or_path: str) -> bool:
    config = read_config(config_name_or_path)
    return isinstance(config, dict) and config.get("_class_name") in KINDS
