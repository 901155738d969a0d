"""Adapters of each family, text encoders among them: what is trained is what plain diffusers loads, and what training goes on from."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_text import ADAPTERS, model_folder

from immiscible.networks.adapters import TEXT_TARGETS, adapted_encoders, adapters_in_words, save_adapters
from immiscible.networks.arguments import AdapterArguments, TextModelArguments
from immiscible.networks.families import load_checkpoint
from immiscible.networks.placing import place, told_tokens
from immiscible.sampling.pipelines import build_text_pipeline

pytest.importorskip("peft")
CPU = torch.device("cpu")
CAPTIONS = ["a cat", "two dogs and a lamp"]
TRAINED = {1: {"text_encoder"}, "xl": {"text_encoder", "text_encoder_2"}, "3.5": {"text_encoder", "text_encoder_2"}}


class Accelerator:
    """As much of accelerate's as placing takes."""

    device, mixed_precision = CPU, "no"


def loaded(version, adapters=None):
    arguments = TextModelArguments(pretrained_model_name_or_path=str(model_folder(version)))
    parts = load_checkpoint(arguments, resolution=32, cache_dir=None, from_scratch=False)
    if adapters is not None:
        torch.manual_seed(0)
        place(parts, Accelerator(), adapters=adapters, idle=False)
    return parts


def predicted(parts, *, inside):
    """What the network makes of the captions, of token ids as in training or of text states as in sampling."""
    draw = torch.Generator().manual_seed(5)
    side = parts.network.config.sample_size
    x = torch.randn(2, parts.network.config.in_channels, side, side, generator=draw)
    geometry = torch.tensor([[48, 40, 3, 0, 32, 32]] * 2)
    with torch.no_grad():
        told = told_tokens(parts, CAPTIONS, geometry, CPU) if inside else parts.told(parts.texts(CAPTIONS, CPU), geometry)
        return parts.network(x, torch.tensor([3.0, 700.0]), **told).sample


def moved(network):
    """Adapters that are not 0."""
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if ".lora_" in name:
                weight += 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(name)))


@pytest.mark.parametrize(
    "flags", [pytest.param({}, marks=pytest.mark.slow), {"lora_alpha": 5.0, "use_dora": True}], ids=["plain", "alpha and DoRA"]
)
@pytest.mark.parametrize("version", TRAINED)
def test_plain_diffusers_and_a_run_that_goes_on_predict_what_training_did(version, flags, tmp_path):
    parts = loaded(version, AdapterArguments(rank=2, train_text_encoder=True, **flags))
    moved(parts.network)
    assert adapted_encoders(parts.network).keys() == TRAINED[version]
    save_adapters(parts.network, tmp_path)
    parts.network.eval()
    trained = predicted(parts, inside=True)
    torch.testing.assert_close(predicted(parts, inside=False), trained, rtol=0, atol=0)
    assert {name.partition(".")[0] for name in load_file(tmp_path / ADAPTERS)} == {parts.network_part, *TRAINED[version]}

    plain = loaded(version)
    before = predicted(plain, inside=False)
    build_text_pipeline(plain).load_lora_weights(tmp_path)
    plain.network.eval()
    torch.testing.assert_close(predicted(plain, inside=False), trained, rtol=1e-5, atol=1e-5)
    assert (before - trained).abs().max() > 1e-3

    again = loaded(version, AdapterArguments(train_text_encoder=True, network_weights=str(tmp_path)))
    again.network.eval()
    torch.testing.assert_close(predicted(again, inside=True), trained, rtol=1e-5, atol=1e-5)
    assert adapters_in_words(again.network) == adapters_in_words(parts.network)


@pytest.mark.parametrize("version", TRAINED)
def test_every_adapter_that_is_trained_has_a_gradient(version):
    """Without one a step over several processes would wait for it: SDXL reads its first text encoder up to the last layer but one."""
    parts = loaded(version, AdapterArguments(rank=2, train_text_encoder=True))
    moved(parts.network)
    told = told_tokens(parts, CAPTIONS, None, CPU)
    side = parts.network.config.sample_size
    x = torch.randn(2, parts.network.config.in_channels, side, side)
    parts.network(x, torch.tensor([3.0, 700.0]), **told).sample.square().sum().backward()
    without = {name for name, weight in parts.network.named_parameters() if weight.requires_grad and weight.grad is None}
    unreached = {name for name, weight in parts.network.named_parameters() if ".lora_" in name and not weight.requires_grad}
    assert not without and bool(unreached) == (version == "xl")
    assert all(name.startswith("text_encoder.") for name in unreached)


def test_sdxl_goes_on_from_kohyas_names(tmp_path):
    """The second text encoder, of which the file has nothing, begins with adapters that change nothing."""
    parts = loaded("xl")
    layers = {}
    for prefix, module, ends in (("lora_unet", parts.network, ["to_q"]), ("lora_te1", parts.encoders["text_encoder"], TEXT_TARGETS)):
        for name, layer in module.named_modules():
            if name.rpartition(".")[2] in ends:
                own = f"{prefix}_{'text_model_' if prefix == 'lora_te1' else ''}{name.replace('.', '_')}"
                layers |= {f"{own}.lora_down.weight": torch.ones(3, layer.in_features), f"{own}.alpha": torch.tensor(1.5)}
                layers |= {f"{own}.lora_up.weight": torch.ones(layer.out_features, 3)}
    save_file(layers, tmp_path / "kohya.safetensors")
    again = loaded("xl", AdapterArguments(train_text_encoder=True, network_weights=str(tmp_path / "kohya.safetensors")))
    assert adapters_in_words(again.network) == "adapters of rank 3, alpha 1.5, of its text_encoder, too, of its text_encoder_2, too"
    scales = {module.scaling["default"] for module in again.network.modules() if hasattr(module, "lora_A")}
    assert scales == {0.5}
