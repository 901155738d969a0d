"""A network of the latents of the tiny VAE."""

from __future__ import annotations

import torch

from immiscible.networks.unet import build_unet, unet_config


def network(side: int = 4, **changes):
    torch.manual_seed(0)
    options = {"config_name_or_path": None, "preset": "unet-tiny", "dropout": None, "downsampling": 8, **changes}
    return build_unet(unet_config(resolution=8 * side, channels=4, **options)).eval()
