"""What kind of network one is, by its configuration: its place in a pipeline, and what it is told of classes."""

from __future__ import annotations

import json
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

from immiscible.errors import UserError, first_line

if TYPE_CHECKING:
    from diffusers import ModelMixin

PARTS = ("unet", "transformer")  # what a network can be in a pipeline: the names of its folders

# In a network's configuration: the class number by which it is told that there is none. Diffusers keeps a key with such a name and passes
# it over, so that the number is where the weights are, in every pipeline and checkpoint. A transformer has such a number always; None in
# this place says that it was not trained.
NULL_CLASS = "_null_class"
ROWS = "num_embeds_ada_norm"  # a transformer's number of classes, which no U-Net has; its embedding has a row more, for no class

DECODER = "num_decoder_layers"  # a setting of masked transformers (MDT) alone
JOINT_WIDTH = "joint_attention_dim"  # a setting of transformers alone that read the states of a prompt's tokens beside the image
# In its configuration, as `NULL_CLASS` is: how many tokens of a prompt T5 read in training, so that its samples are told as many.
TOKENS_READ = "_max_sequence_length"
TEXT_WIDTH = "text_width"  # a setting of transformers alone that are told a prompt by one vector


def part_of(network: ModelMixin) -> str:
    """Which of `PARTS` a network is."""
    return "transformer" if {ROWS, JOINT_WIDTH} & set(network.config) else "unet"


def is_foreign(network: ModelMixin) -> bool:
    """Whether diffusers has not this class of network, so that its code goes with its weights."""
    return DECODER in network.config or told_pooled(network)


def told_pooled(network: ModelMixin) -> bool:
    """Whether a network is told a prompt by the text encoder's pooled state, and not by the states of its tokens."""
    return TEXT_WIDTH in network.config


def classes_told(network: ModelMixin) -> int | None:
    """How many classes a network is told, the null class not counted; None of one that is told none."""
    config = network.config
    if JOINT_WIDTH in config:
        return None
    count: int | None = (config[ROWS] or None) if ROWS in config else config.get(NULL_CLASS, config.num_class_embeds)
    return count


def null_class(network: ModelMixin) -> int | None:
    """The class number by which a network was told in training that there is none, by which it can be guided; None if it never was."""
    number: int | None = network.config.get(NULL_CLASS, network.config.get(ROWS))
    return number


def read_config(name_or_path: str) -> Any:
    """The JSON of ``--model_config_name_or_path``: a folder with ``config.json``, a file, or a name on the hub.

    Raises:
        UserError: there is none.
    """
    from diffusers import UNet2DModel

    flag = f"--model_config_name_or_path {name_or_path}"
    try:
        path = Path(name_or_path)
        return json.loads(path.read_text()) if path.is_file() else UNet2DModel.load_config(name_or_path)
    except (OSError, ValueError) as error:
        raise UserError(f"{flag}: no network's configuration found there ({first_line(error)})") from None


def settings_of(config: dict[str, Any], kind: type[ModelMixin], flag: str) -> dict[str, Any]:
    """The settings in a configuration, without what diffusers notes beside them.

    Raises:
        UserError: one is not of this class of diffusers.
    """
    known = set(signature(kind.__init__).parameters)
    if unknown := [key for key in config if not key.startswith("_") and key not in known]:
        raise UserError(f"{flag}: not a {kind.__name__} configuration: {', '.join(unknown)} is not one of its settings")
    given = config.get("in_channels", signature(kind.__init__).parameters["in_channels"].default)
    return {"in_channels": given, "out_channels": given} | {key: value for key, value in config.items() if not key.startswith("_")}


def channels_out(config: dict[str, Any], learned_sigma: bool, flag: str) -> int:
    """How many channels come out of a network: as many as go in, or twice as many, of which a configuration need not say it yet.

    Raises:
        UserError: it says another number.
    """
    given = config["in_channels"]
    if (config["out_channels"] or given) not in (given, 2 * given if learned_sigma else given):
        raise UserError(f"{flag}: in_channels and out_channels differ; only a learned variance takes more, and then twice as many")
    return 2 * given if learned_sigma else given
