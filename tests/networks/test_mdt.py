"""The masked diffusion transformer: both passes against direct computations."""

from __future__ import annotations

import ast
import sys

import diffusers
import pytest
import torch

from immiscible.errors import UserError
from immiscible.networks.diffusion_transformers import MDTTransformer2DModel
from immiscible.networks.kinds import is_foreign
from immiscible.networks.presets import build_network, network_config
from immiscible.networks.weights import load_network, save_network
from immiscible.sampling.pipelines import TRANSFORMERS

CLASSES, TOKENS = 4, 16
X, T = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([0.5, 300.0, 999.0])
LABELS = torch.tensor([2, CLASSES, 0])
KEPT = torch.stack([torch.randperm(TOKENS, generator=torch.Generator().manual_seed(seed))[:11] for seed in range(3)])


def config_of(**options):
    options = {"config_name_or_path": None, "preset": "mdt-tiny", "dropout": None, **options}
    return network_config(resolution=8, channels=1, num_classes=CLASSES, null_class=True, **options)


def moved(**changes):
    """A network whose zeros have become numbers."""
    torch.manual_seed(0)
    network = build_network({**config_of(), **changes})
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return network.eval()


def masked_by_hand(network, image, t, label, kept):
    """One image of the masked pass, token by token."""
    told = {"timestep": t[None], "class_labels": label[None]}
    tokens = (network.pos_embed(image[None]) + network.encoder_position)[0]
    seen = torch.stack([tokens[number] for number in kept])[None]
    for block in network.transformer_blocks[:2]:
        seen = block(seen, **told)
    whole = [network.mask_token[0, 0]] * TOKENS
    for place, number in enumerate(kept):
        whole[number] = seen[0, place]
    whole = torch.stack(whole) + network.decoder_position[0]
    guessed = network.side_block(whole[None], **told)[0]
    x = torch.stack([whole[number] if number in kept else guessed[number] for number in range(TOKENS)])[None]
    for block in network.transformer_blocks[2:]:
        x = block(x, **told)
    return last_layer(network, x, t, label)


def last_layer(network, x, t, label):
    conditioning = network.embedder(t[None], label[None], hidden_dtype=x.dtype)
    shift, scale = network.proj_out_1(torch.nn.functional.silu(conditioning)).chunk(2, dim=1)
    patches = network.proj_out_2(network.norm_out(x) * (1 + scale) + shift)[0]
    image = torch.empty(1, 8, 8)
    for number, patch in enumerate(patches):
        row, column = divmod(number, 4)
        image[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2] = patch.view(2, 2)
    return image


@torch.no_grad()
def test_the_masked_pass_is_that_of_a_direct_computation():
    network = moved()
    found = network(X, T, LABELS, kept=KEPT).sample
    for number, image in enumerate(X):
        wanted = masked_by_hand(network, image, T[number], LABELS[number], KEPT[number].tolist())
        torch.testing.assert_close(found[number], wanted, rtol=1e-4, atol=1e-5)
    assert (found - network(X, T, LABELS).sample).abs().max() > 0.01


@torch.no_grad()
def test_what_is_masked_is_not_seen():
    network = moved()
    seen = torch.zeros(3, TOKENS).scatter(1, KEPT, 1).view(3, 1, 4, 4).repeat_interleave(2, 2).repeat_interleave(2, 3).bool()
    other = torch.where(seen, X, torch.randn_like(X))
    assert torch.equal(network(X, T, LABELS, kept=KEPT).sample, network(other, T, LABELS, kept=KEPT).sample)
    assert not torch.equal(network(X, T, LABELS).sample, network(other, T, LABELS).sample)
    everything = torch.arange(TOKENS).expand(3, -1)
    assert torch.equal(network(X, T, LABELS, kept=everything).sample, network(X, T, LABELS).sample)


@torch.no_grad()
def test_the_full_pass_is_diffusers_dit_with_the_decoders_positions():
    network = moved()
    plain = diffusers.DiTTransformer2DModel.from_config(
        {name: value for name, value in network.config.items() if name != "num_decoder_layers"}
    )
    state = network.state_dict()
    plain.load_state_dict({name: state[name] for name in plain.state_dict()})
    plain.pos_embed.pos_embed += network.encoder_position
    add = plain.transformer_blocks[2].register_forward_pre_hook(lambda _, args: (args[0] + network.decoder_position, *args[1:]))
    torch.testing.assert_close(network(X, T, LABELS).sample, plain.eval()(X, T, LABELS).sample, rtol=1e-5, atol=1e-6)
    add.remove()


def test_its_last_layer_is_the_last():
    linear = [name for name, module in moved().named_modules() if isinstance(module, torch.nn.Linear)]
    assert linear[-1] == "proj_out_2" and "side_block.attn1.to_q" in linear


def test_its_positions_and_its_token_begin_as_said_and_its_output_with_zero():
    network = build_network(config_of())
    assert torch.equal(network.decoder_position, network.pos_embed.pos_embed) and not network.encoder_position.any()
    assert 0.01 < network.mask_token.std() < 0.03
    assert not network(X, T, LABELS, kept=KEPT).sample.any() and not network(X, T).sample.any()


@pytest.mark.parametrize("recompute", [False, True])
def test_the_masked_pass_trains_every_weight(recompute):
    network = moved().train()
    if recompute:
        network.enable_gradient_checkpointing()
    network(X, T, LABELS, kept=KEPT).sample.square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in network.parameters())


def test_a_checkpoint_is_the_same_network(tmp_path):
    network = moved()
    save_network(network, tmp_path, "transformer")
    other = build_network(config_of())
    load_network(other, tmp_path, "transformer")
    assert is_foreign(other) and len({id(block.norm1.emb) for block in other.blocks()}) == 1
    for kept in (None, KEPT):
        assert torch.equal(other.eval()(X, T, LABELS, kept=kept).sample, network(X, T, LABELS, kept=kept).sample)
    again = config_of(config_name_or_path=str(tmp_path / "transformer"), preset=None)
    assert again["num_decoder_layers"] == 2 and type(build_network(again)) is MDTTransformer2DModel
    (tmp_path / "short.json").write_text('{"_class_name": "MDTTransformer2DModel", "num_layers": 3, "num_attention_heads": 1}')
    assert is_foreign(build_network(config_of(config_name_or_path=str(tmp_path / "short.json"), preset=None)))


def test_a_decoder_is_a_part_of_the_blocks():
    with pytest.raises(UserError, match="num_decoder_layers must be at least 1 and below num_layers 4, not 4"):
        build_network({**config_of(), "num_decoder_layers": 4})


def test_its_file_needs_torch_and_diffusers_alone():
    nodes = [node for node in ast.walk(ast.parse(TRANSFORMERS.read_text())) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert not any(getattr(node, "level", 0) for node in nodes)
    roots = {(name.name if isinstance(node, ast.Import) else node.module).partition(".")[0] for node in nodes for name in node.names}
    assert roots - sys.stdlib_module_names == {"torch", "diffusers"}
