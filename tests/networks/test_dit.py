"""Diffusion transformers by preset and by configuration: one embedder, labels as given, weights as DiT draws them."""

from __future__ import annotations

import json

import diffusers
import pytest
import torch

from immiscible.errors import UserError
from immiscible.networks import dit, unet
from immiscible.networks.diffusion_transformers import DiTTransformer2DModel
from immiscible.networks.kinds import classes_told, null_class, part_of
from immiscible.networks.presets import PRESETS, build_network, network_config
from immiscible.networks.weights import load_network, save_network
from immiscible.training.summary import parameters_of

CLASSES = 4
X, T = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([0.5, 300.0, 999.0])
LABELS = torch.tensor([2, CLASSES, 0])


def config_of(num_classes=CLASSES, preset="dit-tiny", path=None, resolution=8, channels=1, **options):
    options = {"dropout": None, "null_class": bool(num_classes), **options}
    return network_config(
        config_name_or_path=path, preset=preset, resolution=resolution, channels=channels, num_classes=num_classes, **options
    )


def moved(num_classes=CLASSES, **options):
    """A transformer whose zeros have become numbers."""
    torch.manual_seed(0)
    network = build_network(config_of(num_classes, **options))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return network


def embedders(network):
    return {id(block.norm1.emb) for block in network.transformer_blocks}


def test_the_choices_are_those_of_both_kinds():
    assert list(PRESETS) == [*unet.PRESETS, *dit.PRESETS]
    assert all(configure is (dit.dit_config if name in dit.PRESETS else unet.unet_config) for name, configure in PRESETS.items())


def test_the_papers_sizes():
    """Of table 1 and figure 13 of the paper, latents of 256x256 pixels and 1,000 classes, with its learned variance."""
    for preset, millions in {"dit-b-2": 130, "dit-xl-2": 675}.items():
        settings = config_of(1000, preset, resolution=256, channels=4, downsampling=8, learned_sigma=True)
        with torch.device("meta"):
            network = DiTTransformer2DModel.from_config(settings)
        assert network.config.out_channels == 8
        effective, stored = parameters_of(network)
        assert abs(effective / 1e6 - millions) < 0.01 * millions, preset
        embedder, _ = parameters_of(network.transformer_blocks[0].norm1.emb)
        assert stored - effective == (len(network.transformer_blocks) - 1) * embedder


def test_it_begins_with_zero_and_learns_from_the_first_step():
    network = build_network(config_of())
    output = network(X, T, LABELS).sample
    assert output.shape == X.shape and not output.any()
    (output - 1).square().mean().backward()
    assert network.proj_out_2.weight.grad.abs().sum() > 0


def test_without_labels_it_is_told_no_class():
    network = moved().eval()
    none = torch.full((3,), CLASSES)
    assert torch.equal(network(X, T).sample, network(X, T, none).sample)
    assert not torch.equal(network(X, T, none).sample, network(X, T, LABELS).sample)
    assert (classes_told(network), null_class(network), part_of(network)) == (CLASSES, CLASSES, "transformer")
    alone = moved(None)
    assert alone(X, T).sample.shape == X.shape and alone.transformer_blocks[0].norm1.emb.class_embedder.embedding_table.num_embeddings == 1
    assert (classes_told(alone), null_class(alone)) == (None, None)
    assert null_class(moved(null_class=False)) is None
    assert null_class(diffusers.DiTTransformer2DModel(1, 8, 1, num_layers=1, sample_size=4, num_embeds_ada_norm=7)) == 7


def test_every_block_sees_the_labels_that_it_is_told():
    network = moved().train()
    told, looked_up = [], []
    for block in network.transformer_blocks:
        block.register_forward_pre_hook(lambda _, args, options: told.append(options["class_labels"]), with_kwargs=True)
        block.norm1.emb.class_embedder.embedding_table.register_forward_pre_hook(lambda _, args: looked_up.append(args[0]))
    network(X, T, LABELS)
    assert len(told) == len(network.transformer_blocks) and len(looked_up) > len(told)
    assert all(torch.equal(labels, LABELS) for labels in [*told, *looked_up])


def test_the_embedder_stays_one_in_training_and_after_a_checkpoint(tmp_path):
    network = moved()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    assert len(optimizer.param_groups[0]["params"]) == len({id(each) for each in network.parameters()})
    for _ in range(2):
        network(X, T, LABELS).sample.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    save_network(network, tmp_path, "transformer")
    assert len(embedders(network)) == 1
    other = build_network(config_of())
    load_network(other, tmp_path, "transformer")
    assert len(embedders(other)) == 1
    wanted = network.eval()(X, T, LABELS).sample
    assert torch.equal(other.eval()(X, T, LABELS).sample, wanted)
    plain = diffusers.DiTTransformer2DModel.from_pretrained(tmp_path, subfolder="transformer")
    assert type(plain) is diffusers.DiTTransformer2DModel and len(embedders(plain)) == len(plain.transformer_blocks)
    assert torch.equal(plain(X, T, LABELS).sample, wanted)


def test_recomputed_activations_give_the_same_gradients():
    gradients = []
    for recompute in (False, True):
        network = moved().train()
        if recompute:
            network.enable_gradient_checkpointing()
        network(X, T, LABELS).sample.square().mean().backward()
        gradients.append([parameter.grad for parameter in network.parameters()])
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-7)


def test_a_step_of_the_papers_small_one_on_latents():
    network = build_network(config_of(1000, "dit-s-2", resolution=256, channels=4, downsampling=8))
    output = network(torch.randn(1, 4, 32, 32), torch.tensor([500]), torch.tensor([7])).sample
    (output - 1).square().mean().backward()
    assert output.shape == (1, 4, 32, 32) and all(parameter.grad is not None for parameter in network.parameters())


def written(folder, **settings):
    (folder / "network.json").write_text(json.dumps({"_class_name": "DiTTransformer2DModel", **settings}))
    return str(folder / "network.json")


def test_a_configuration_is_followed(tmp_path):
    path = written(tmp_path, num_layers=1, attention_head_dim=8, num_attention_heads=2, patch_size=4, dropout=0.1)
    network = build_network(config_of(path=path, preset=None, channels=3, resolution=16))
    assert network.config.in_channels == network.config.out_channels == 3 and network.config.dropout == 0.1
    assert (network.config.sample_size, network.config.num_embeds_ada_norm, len(network.transformer_blocks)) == (16, CLASSES, 1)
    network.save_pretrained(tmp_path / "saved")
    again = config_of(path=str(tmp_path / "saved"), preset=None, channels=3, resolution=16, dropout=0.2)
    assert again["dropout"] == 0.2 and again["num_layers"] == 1


@pytest.mark.parametrize(
    ("settings", "options", "message"),
    [
        ({"num_embeds_ada_norm": 7}, {}, "num_embeds_ada_norm, the number of classes, is 7, but the data has 4"),
        ({"num_embeds_ada_norm": 7}, {"num_classes": None}, "is 7, but the network is told none"),
        ({"block_out_channels": [8]}, {}, "block_out_channels is not one of its settings"),
        ({"in_channels": 1, "out_channels": 2}, {}, "only a learned variance takes more"),
        ({"norm_type": "layer_norm"}, {}, "no DiTTransformer2DModel can be built of this"),
        ({"patch_size": 3}, {}, "patches of 3x3: --resolution 8 must be a multiple of 3"),
        ({"in_channels": 3}, {"resolution": 64, "downsampling": 8, "channels": 4}, "has 3 channels, and the VAE's latents have 4"),
        ({}, {"class_embed_type": "timestep"}, "--class_embed_type timestep is of U-Nets"),
    ],
)
def test_configurations_that_do_not_fit(tmp_path, settings, options, message):
    with pytest.raises(UserError, match=message):
        build_network(config_of(path=written(tmp_path, **settings), preset=None, **options))
