"""The transformer that is told a text by one vector: against a DiT of classes, and as a checkpoint."""

from __future__ import annotations

import pytest
import torch

from immiscible.errors import UserError
from immiscible.networks.diffusion_transformers import TextDiTTransformer2DModel
from immiscible.networks.dit import TEXT_PRESETS, build_dit, dit_config, text_dit_config
from immiscible.networks.kinds import classes_told, is_foreign, null_class, part_of, told_pooled
from immiscible.networks.weights import load_network, save_network, saved_network

WIDTH = 4
X, T = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([0.5, 300.0, 999.0])
TEXTS = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(2))
SIZE = {"resolution": 64, "channels": 4, "downsampling": 8}


def moved(seed=0):
    """A network whose zeros have become numbers."""
    torch.manual_seed(seed)
    network = build_dit(text_dit_config("dit-tiny", **SIZE, width=WIDTH))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return network.eval()


def test_it_is_a_dit_whose_class_is_a_linear_layer_of_the_text():
    """A text that is one of the unit vectors is a class, whose row of the table is the matrix's column and the bias."""
    network = moved()
    settings = dit_config(config_name_or_path=None, preset="dit-tiny", dropout=None, num_classes=WIDTH, **SIZE)
    classes = build_dit(settings).eval()
    told, own = network.embedder.class_embedder, network.state_dict()
    rest = {name: own.get(name, value) for name, value in classes.state_dict().items()}
    classes.load_state_dict(rest)
    with torch.no_grad():
        classes.embedder.class_embedder.embedding_table.weight[:WIDTH] = told.weight.T + told.bias
    labels = torch.tensor([2, 0, 3])
    expected = classes(X, T, labels).sample
    torch.testing.assert_close(network(X, T, pooled_projections=torch.eye(WIDTH)[labels]).sample, expected)
    half = network(X, T, pooled_projections=torch.eye(WIDTH, dtype=torch.bfloat16)[labels]).sample  # as a frozen encoder may give it
    assert torch.equal(half, network(X, T, pooled_projections=torch.eye(WIDTH)[labels]).sample)


@pytest.mark.parametrize("recompute", [False, True])
def test_it_begins_with_zero_and_every_weight_learns(recompute):
    fresh = build_dit(text_dit_config("dit-tiny", **SIZE, width=WIDTH))
    told = fresh.embedder.class_embedder
    assert not fresh(X, T, TEXTS).sample.any() and not told.bias.any() and 0.01 < told.weight.std() < 0.03
    network = moved().train()
    if recompute:
        network.enable_gradient_checkpointing()
    network(X, T, TEXTS).sample.square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in network.parameters() if parameter.requires_grad)


def test_a_checkpoint_is_the_same_network(tmp_path):
    network, other = moved(), moved(1)
    save_network(network, tmp_path, "transformer")
    load_network(other, tmp_path, "transformer")
    for found in (other, saved_network(tmp_path / "transformer")):
        assert type(found) is TextDiTTransformer2DModel and len({id(block.norm1.emb) for block in found.blocks()}) == 1
        assert torch.equal(found.eval()(X, T, TEXTS).sample, network(X, T, TEXTS).sample)
        assert is_foreign(found) and told_pooled(found) and part_of(found) == "transformer" and found.config.text_width == WIDTH
        assert classes_told(found) is None and null_class(found) is None


def test_the_papers_size():
    """DiT-XL/2 of latents of 256x256 pixels: 675 million, where a text of 768 numbers takes the place of 1,000 classes."""
    with torch.device("meta"):
        network = TextDiTTransformer2DModel(**text_dit_config("dit-xl-2", resolution=256, channels=4, downsampling=8, width=768))
    assert abs(sum(parameter.numel() for parameter in network.parameters()) / 1e6 - 675) < 6.75


def test_a_latent_is_made_of_whole_patches():
    assert "dit-xl-2" in TEXT_PRESETS
    with pytest.raises(UserError, match=r"--model_preset dit-s-2 cuts the latent .* --resolution 72 must be a multiple of 16"):
        text_dit_config("dit-s-2", resolution=72, channels=4, downsampling=8, width=WIDTH)
