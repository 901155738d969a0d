"""Weights: saved and loaded again, told from others, averaged for the time of a block, and with facts in their metadata."""

from __future__ import annotations

import pytest
import torch
from class_networks import tiny_unet
from diffusers import UNet2DConditionModel, UNet2DModel
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_text import ADAPTERS, WEIGHTS, model_folder

from immiscible.networks.adapters import adapted, add_adapters
from immiscible.networks.arguments import AdapterArguments
from immiscible.networks.stable_diffusion import StableDiffusion
from immiscible.networks.weights import add_metadata, load_network, save_network, weights_digest


def changed(network):
    """Its trained weights are others."""
    with torch.no_grad():
        for weight in network.parameters():
            if weight.requires_grad:
                weight += torch.randn(weight.shape, generator=torch.Generator().manual_seed(7))
    return network


def test_a_network_is_saved_as_diffusers_loads_it_and_loaded_to_the_last_bit(tmp_path):
    saved, other = changed(tiny_unet()), tiny_unet()
    save_network(saved, tmp_path, "unet")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["unet"] and (tmp_path / "unet" / WEIGHTS).exists()
    assert weights_digest(UNet2DModel.from_pretrained(tmp_path, subfolder="unet")) == weights_digest(saved)
    assert weights_digest(other) != weights_digest(saved)
    load_network(other, tmp_path, "unet")
    assert weights_digest(other) == weights_digest(saved)


def with_adapters(seed):
    network = UNet2DConditionModel.from_pretrained(model_folder(), subfolder="unet")
    torch.manual_seed(seed)
    add_adapters(network, AdapterArguments(rank=2), targets=StableDiffusion.lora_targets, dtype=torch.float32)
    return network


def test_of_a_network_with_adapters_they_alone_are_saved(tmp_path):
    pytest.importorskip("peft")
    saved, other = changed(with_adapters(0)), with_adapters(1)
    assert adapted(saved) and not adapted(tiny_unet())
    save_network(saved, tmp_path, "unet")
    assert [path.name for path in tmp_path.iterdir()] == [ADAPTERS]
    assert len(load_file(tmp_path / ADAPTERS)) == sum("lora" in name for name in saved.state_dict())
    assert weights_digest(other) != weights_digest(saved)
    load_network(other, tmp_path, "unet")
    assert weights_digest(other) == weights_digest(saved)


def test_a_digest_sees_a_bit_a_name_and_no_device_or_order():
    network = tiny_unet()
    before = weights_digest(network)
    assert weights_digest(tiny_unet()) == before and len(before) == 16
    with torch.no_grad():
        network.conv_in.bias.view(torch.int32)[0] ^= 1
    assert weights_digest(network) != before


def test_facts_stand_beside_what_the_metadata_held(tmp_path):
    tiny_unet().save_pretrained(tmp_path)
    path = tmp_path / WEIGHTS
    before, tensors = safe_open(path, framework="pt").metadata(), load_file(path)
    add_metadata(path, {"noise_coupling": "assignment (l2)", "seed": "3"})
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {**before, "immiscible.noise_coupling": "assignment (l2)", "immiscible.seed": "3"}
    after = load_file(path)
    assert after.keys() == tensors.keys() and all(torch.equal(after[name], tensors[name]) for name in tensors)
