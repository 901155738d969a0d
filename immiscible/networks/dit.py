"""Diffusion transformers by preset or by configuration, of pixels and of latents, with or without classes: DiT (Peebles and Xie 2023), and
MDT, which is trained masked as well (Gao et al. 2023).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from immiscible.errors import UserError, first_line
from immiscible.networks.kinds import DECODER, NULL_CLASS, ROWS, TEXT_WIDTH, channels_out, read_config, settings_of

if TYPE_CHECKING:
    from diffusers import DiTTransformer2DModel

KINDS = ("DiTTransformer2DModel", "MDTTransformer2DModel")

# The numbers of parameters are those of latents of four channels and 1,000 classes, the embedder counted once.
PRESETS: dict[str, dict[str, Any]] = {
    # 330 thousand: the bundled 8x8 digits, emoji of 16x16.
    "dit-tiny": {"num_layers": 4, "num_attention_heads": 4, "attention_head_dim": 16, "patch_size": 2},
    # The paper's table 1, in its smallest patches: 33, 130, 458 and 675 million.
    "dit-s-2": {"num_layers": 12, "num_attention_heads": 6, "attention_head_dim": 64, "patch_size": 2},
    "dit-b-2": {"num_layers": 12, "num_attention_heads": 12, "attention_head_dim": 64, "patch_size": 2},
    "dit-l-2": {"num_layers": 24, "num_attention_heads": 16, "attention_head_dim": 64, "patch_size": 2},
    "dit-xl-2": {"num_layers": 28, "num_attention_heads": 16, "attention_head_dim": 72, "patch_size": 2},
    # The same with masked training; its side-interpolater, one block more, is not in use when it is sampled.
    "mdt-tiny": {"num_layers": 4, "num_attention_heads": 4, "attention_head_dim": 16, "patch_size": 2, "num_decoder_layers": 2},
    "mdt-s-2": {"num_layers": 12, "num_attention_heads": 6, "attention_head_dim": 64, "patch_size": 2, "num_decoder_layers": 2},
    "mdt-b-2": {"num_layers": 12, "num_attention_heads": 12, "attention_head_dim": 64, "patch_size": 2, "num_decoder_layers": 2},
    "mdt-xl-2": {"num_layers": 28, "num_attention_heads": 16, "attention_head_dim": 72, "patch_size": 2, "num_decoder_layers": 2},
}

TEXT_PRESETS = ("dit-tiny", "dit-s-2", "dit-b-2", "dit-l-2", "dit-xl-2")  # of `PRESETS`, those that can be told prompts


def dit_config(
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
    """The constructor arguments of the transformer that these flags mean; the arguments are those of `unet_config`.

    Its embedding has a row for each class and one for none, which alone it is told without classes.

    Raises:
        UserError: the configuration is not such a transformer's, the image or latent is not made of whole patches, classes are to be
            embedded in another way, or the configuration has another number of classes or of channels.
    """
    if config_name_or_path:
        from immiscible.networks import diffusion_transformers

        flag, config = f"--model_config_name_or_path {config_name_or_path}", read_config(config_name_or_path)
        masked = {DECODER: 2} if config["_class_name"] == KINDS[1] else {}  # its default, by which the kind is known
        kind = getattr(diffusion_transformers, config["_class_name"])
        config = settings_of({"in_channels": channels, **masked, **config}, kind, flag)
    else:
        flag = f"--model_preset {preset}"
        config = {**PRESETS[str(preset)], "in_channels": channels, "out_channels": channels}
    patch = config.get("patch_size", 2)
    if resolution % (patch * downsampling):
        what = "image" if downsampling == 1 else f"latent (1/{downsampling} of the image)"
        raise UserError(
            f"{flag} cuts the {what} into patches of {patch}x{patch}: --resolution {resolution} must be a multiple of "
            f"{patch * downsampling}"
        )
    if downsampling > 1 and config["in_channels"] != channels:
        raise UserError(f"{flag} has {config['in_channels']} channels, and the VAE's latents have {channels}; make them equal")
    config["out_channels"] = channels_out(config, learned_sigma, flag)
    if class_embed_type is not None:
        raise UserError(f"--class_embed_type {class_embed_type} is of U-Nets; {flag} learns its embedding: leave it out")
    classes = num_classes or 0
    if config_name_or_path and config.get(ROWS, classes) != classes:
        what = f"the data has {classes}" if classes else "the network is told none; give --class_conditional"
        raise UserError(f"{flag}: {ROWS}, the number of classes, is {config[ROWS]}, but {what}, make them equal, or leave it out")
    if dropout is not None:
        config["dropout"] = dropout
    own = {ROWS: classes, NULL_CLASS: classes if null_class else None, "sample_size": resolution // downsampling}
    return {**config, **own}


def text_dit_config(preset: str, *, resolution: int, channels: int, downsampling: int, width: int) -> dict[str, Any]:
    """The constructor arguments of a transformer of latents that is told prompts, one of `TEXT_PRESETS`.

    Args:
        preset: which.
        resolution: of the images.
        channels: of their latents.
        downsampling: the side of an image divided by that of its latent.
        width: of the text encoder's pooled states.

    Raises:
        UserError: the latent is not made of whole patches.
    """
    common: dict[str, Any] = {"config_name_or_path": None, "dropout": None}
    config = dit_config(preset=preset, resolution=resolution, channels=channels, downsampling=downsampling, **common)
    return {**config, TEXT_WIDTH: width}


def build_dit(config: dict[str, Any]) -> DiTTransformer2DModel:
    """A transformer with fresh weights, drawn from the global generator as DiT draws them.

    Raises:
        UserError: diffusers cannot build a network of this configuration.
    """
    from immiscible.networks import diffusion_transformers as ours

    kind: Any = ours.MDTTransformer2DModel if DECODER in config else ours.DiTTransformer2DModel
    kind = ours.TextDiTTransformer2DModel if TEXT_WIDTH in config else kind
    try:
        network: DiTTransformer2DModel = kind.from_config(config)
    except (ValueError, TypeError, KeyError, AttributeError, NotImplementedError, RuntimeError) as error:
        raise UserError(f"--model_config_name_or_path: no {kind.__name__} can be built of this ({first_line(error)})") from error
    network.draw_weights()
    return network
