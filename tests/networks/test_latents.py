"""VAEs that are loaded, and those that are refused."""

from __future__ import annotations

import json

import pytest
from latent_networks import network
from tiny_text import model_folder

from immiscible.errors import UserError
from immiscible.networks.latents import latent_downsampling, load_vae
from immiscible.networks.unet import unet_config


@pytest.fixture(scope="module")
def vae():
    return load_vae(str(model_folder()), resolution=32)


def test_a_vae_without_weights_of_shifted_latents_and_a_network_of_pixels(vae, tmp_path):
    vae.save_pretrained(tmp_path / "vae")
    config = json.loads((tmp_path / "vae" / "config.json").read_text())
    (tmp_path / "vae" / "config.json").write_text(json.dumps({**config, "shift_factor": 0.1}))
    with pytest.raises(UserError, match="shifts its latents"):
        load_vae(str(tmp_path / "vae"), resolution=32)
    (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(UserError, match="no AutoencoderKL found"):
        load_vae(str(tmp_path / "vae"), resolution=32)
    assert latent_downsampling(vae) == 8
    network().save_config(tmp_path / "unet")
    options = {"config_name_or_path": str(tmp_path / "unet"), "preset": None, "dropout": None, "resolution": 32}
    assert unet_config(**options, channels=4, downsampling=8)["sample_size"] == 4
    with pytest.raises(UserError, match="has 4 channels, and the VAE's latents have 8"):
        unet_config(**options, channels=8, downsampling=8)
