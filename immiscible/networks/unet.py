"""The U-Nets of diffusers, by preset or by configuration, for pixels and for latents, with or without classes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from immiscible.errors import UserError, first_line
from immiscible.networks.kinds import NULL_CLASS, channels_out, read_config, settings_of

if TYPE_CHECKING:
    from diffusers import UNet2DModel

PRESETS: dict[str, dict[str, Any]] = {
    # 160 thousand parameters: the bundled 8x8 digits.
    "unet-tiny": {
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "down_block_types": ("DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D"),
        "add_attention": False,
    },
    # 6.5 million: 32x32 on a CPU or a small GPU.
    "unet-small": {
        "block_out_channels": (64, 128, 128),
        "layers_per_block": 2,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    },
    # 36 million: DDPM's CIFAR-10 network (128 channels, 1-2-2-2, attention at 16x16, dropout 0.1).
    "unet-cifar10": {
        "block_out_channels": (128, 256, 256, 256),
        "layers_per_block": 2,
        "dropout": 0.1,
        "attention_head_dim": None,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    },
    # 36 million: SpeeD's, of latents (128 channels, one head: its table 7; the rest is its code's: three blocks a level, 1-2-2-1, attention
    # at 16x16).
    "unet-speed": {
        "block_out_channels": (128, 256, 256, 128),
        "layers_per_block": 3,
        "attention_head_dim": None,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    },
    # 114 million: what the diffusers example trains when no configuration is given.
    "unet-diffusers": {
        "block_out_channels": (128, 128, 256, 256, 512, 512),
        "layers_per_block": 2,
        "down_block_types": ("DownBlock2D", "DownBlock2D", "DownBlock2D", "DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D", "UpBlock2D", "UpBlock2D", "UpBlock2D"),
    },
    # 642 million: the levels and widths of Stable Diffusion v1's network, with self-attention alone, for its latents.
    "unet-sd": {
        "block_out_channels": (320, 640, 1280, 1280),
        "layers_per_block": 2,
        "attention_head_dim": 40,
        "down_block_types": ("AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D"),
    },
}


def unet_config(
    *,
    config_name_or_path: str | None,
    preset: str | None,
    resolution: int,
    channels: int,
    dropout: float | None,
    num_classes: int | None = None,
    null_class: bool = False,
    class_embed_type: str | None = None,
    downsampling: int = 1,
    learned_sigma: bool = False,
) -> dict[str, Any]:
    """The constructor arguments of the U-Net that these flags mean.

    Args:
        config_name_or_path: a folder with ``config.json``, a JSON file, or a name on the hub; its channels win over ``channels``.
        preset: a key of `PRESETS`; without both, ``unet-diffusers`` where the resolution divides by 32, else ``unet-small``.
        resolution: of the images; divided by ``downsampling`` it becomes ``sample_size``, at which pipelines sample.
        channels: of the images or latents, where no configuration says otherwise.
        dropout: overrides the configuration's if not None.
        num_classes: of a network that is told the class of each image, by the embedding that the configuration's ``class_embed_type``
            names: diffusers' learned one if it names none. None for an unconditional network.
        null_class: whether there is one class more, numbered ``num_classes``, which says that an image has none.
        class_embed_type: overrides the configuration's if not None.
        downsampling: the side of an image divided by that of its latent; 1 for a network of pixels.
        learned_sigma: whether twice as many channels come out as go in.

    Raises:
        UserError: the configuration cannot be found or is not such a U-Net's, the resolution does not halve often enough, or the
            configuration has another number of classes or, for latents, of channels.
    """
    if config_name_or_path:
        config = _load_config(config_name_or_path)
        flag = f"--model_config_name_or_path {config_name_or_path}"
    else:
        name = preset or ("unet-diffusers" if resolution // downsampling % 32 == 0 else "unet-small")
        config = {**PRESETS[name], "in_channels": channels, "out_channels": channels}
        flag = f"--model_preset {name}"
    factor = 2 ** (len(config["block_out_channels"]) - 1)
    if resolution % (factor * downsampling):
        what = "image" if downsampling == 1 else f"latent (1/{downsampling} of the image)"
        raise UserError(
            f"{flag} halves the {what} {factor.bit_length() - 1} times: --resolution {resolution} must be a multiple of "
            f"{factor * downsampling}"
        )
    if downsampling > 1 and config["in_channels"] != channels:
        raise UserError(f"{flag} has {config['in_channels']} channels, and the VAE's latents have {channels}; make them equal")
    config["out_channels"] = channels_out(config, learned_sigma, flag)
    if dropout is not None:
        config["dropout"] = dropout
    if class_embed_type is not None:
        config["class_embed_type"] = class_embed_type
    classes = _classes(config, num_classes, null_class, flag)
    return {**config, **classes, "sample_size": resolution // downsampling}


def _classes(config: dict[str, Any], num_classes: int | None, null_class: bool, flag: str) -> dict[str, Any]:
    """What a configuration must say of the classes that its network is told; ``flag`` names where it comes from."""
    embeddings, what = (num_classes or 0) + null_class, f"{num_classes} classes{' and that of no class' if null_class else ''}"
    declared, kind = config.get("num_class_embeds"), config.get("class_embed_type")
    if num_classes is None:
        if declared or kind:
            raise UserError(f"{flag}: the network expects class labels; give --class_conditional")
        return {}
    if declared not in (None, embeddings):
        raise UserError(f"{flag}: num_class_embeds is {declared}, but the data has {what}; make them equal or leave it out")
    if kind not in (None, "timestep"):
        raise UserError(f"{flag}: class_embed_type {kind!r} does not take class numbers; leave it out or give 'timestep'")
    return {"num_class_embeds": embeddings, **({NULL_CLASS: num_classes} if null_class else {})}


def build_unet(config: dict[str, Any]) -> UNet2DModel:
    """A U-Net with fresh weights, drawn from the global generator.

    Raises:
        UserError: diffusers cannot build a network of this configuration.
    """
    from diffusers import UNet2DModel

    try:
        return UNet2DModel.from_config(config)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"--model_config_name_or_path: diffusers cannot build this U-Net ({first_line(error)})") from error


def _load_config(name_or_path: str) -> dict[str, Any]:
    from diffusers import UNet2DModel

    flag, config = f"--model_config_name_or_path {name_or_path}", read_config(name_or_path)
    if not isinstance(config, dict) or "block_out_channels" not in config or config.get("_class_name", "UNet2DModel") != "UNet2DModel":
        raise UserError(f"{flag}: neither a UNet2DModel configuration nor one of a DiTTransformer2DModel")
    if not isinstance(config["block_out_channels"], list | tuple):
        raise UserError(f"{flag}: not a UNet2DModel configuration: block_out_channels is not one of its settings")
    return settings_of(config, UNet2DModel, flag)
