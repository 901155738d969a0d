"""Low-rank adapters: what is trained is what plain diffusers loads, with alpha, DoRA and text encoders; and gone on from."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_text import ADAPTERS, model_folder
from transformers import CLIPTextModel

from immiscible.errors import UserError
from immiscible.networks.adapters import (
    TOKENS,
    adapted_encoders,
    adapters_in_words,
    add_adapters,
    load_adapters,
    save_adapters,
    train_inside,
)
from immiscible.networks.arguments import AdapterArguments
from immiscible.networks.network_weights import go_on_from
from immiscible.networks.weights import weights_digest

pytest.importorskip("peft")
SD = {"pipeline": "StableDiffusionPipeline", "part": "unet"}
IDS = f"{TOKENS}tokenizer"
ATTENTION = ["to_k", "to_q", "to_v", "to_out.0"]


def parts():
    unet = UNet2DConditionModel.from_pretrained(model_folder(), subfolder="unet")
    return unet, CLIPTextModel.from_pretrained(model_folder(), subfolder="text_encoder")


def told(inside, named):
    states = inside["text_encoder"](named[IDS]).last_hidden_state
    return {**{name: value for name, value in named.items() if name != IDS}, "encoder_hidden_states": states}


def with_adapters(seed=0, texts=True, dtype=torch.float32, **flags):
    """A network and its text encoder, with adapters that are not 0."""
    unet, encoder = parts()
    torch.manual_seed(seed)
    encoders = {"text_encoder": encoder} if texts else {}
    add_adapters(unet, AdapterArguments(rank=2, **flags), targets=ATTENTION, dtype=dtype, encoders=encoders)
    train_inside(unet, encoders, told)
    with torch.no_grad():
        for weight in unet.parameters():
            if weight.requires_grad:
                weight += 0.1 * torch.randn(weight.shape)
    return unet, encoder


def call(unet, encoder=None):
    """What is predicted of token ids, which the network takes in training; with its encoder apart, of the text states."""
    draw = torch.Generator().manual_seed(5)
    x, ids = torch.randn(2, 4, 4, 4, generator=draw), torch.randint(3, 90, (2, 12), generator=draw)
    told = {IDS: ids} if encoder is None else {"encoder_hidden_states": encoder(ids).last_hidden_state}
    with torch.no_grad():
        return unet(x, torch.tensor([3, 700]), **told).sample


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"lora_alpha": 5.0},
        {"use_dora": True},
        {"use_dora": True, "lora_alpha": 0.5},
        {"lora_target_modules": ["to_q,ff.net.2", "conv1"]},
    ],
    ids=["plain", "alpha", "DoRA", "DoRA and alpha", "modules"],
)
def test_plain_diffusers_predicts_what_training_did(flags, tmp_path):
    unet, _ = with_adapters(**flags)
    save_adapters(unet, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [ADAPTERS]
    pipeline = StableDiffusionPipeline.from_pretrained(model_folder(), safety_checker=None)
    bare = call(pipeline.unet, pipeline.text_encoder)
    pipeline.load_lora_weights(tmp_path)
    trained = call(unet.eval())
    torch.testing.assert_close(call(pipeline.unet.eval(), pipeline.text_encoder.eval()), trained, rtol=1e-5, atol=1e-5)
    assert (bare - trained).abs().max() > 1e-3


def test_what_needs_no_metadata_has_none_and_two_files_of_one_network_are_equal(tmp_path):
    for number, flags in enumerate([{}, {"lora_alpha": 2.0}, {"lora_alpha": 5.0}, {"lora_alpha": 5.0}]):
        save_adapters(with_adapters(**flags)[0], tmp_path / str(number))
    files = [(tmp_path / str(number) / ADAPTERS) for number in range(4)]
    held = [safe_open(file, framework="pt").metadata() for file in files]
    assert "lora_adapter_metadata" not in held[0] and files[0].read_bytes() == files[1].read_bytes()
    told = json.loads(held[2]["lora_adapter_metadata"])
    assert (told["unet.lora_alpha"], told["text_encoder.lora_alpha"], told["unet.r"]) == (5.0, 5.0, 2)
    assert held[3] == held[2] and all(torch.equal(value, load_file(files[3])[name]) for name, value in load_file(files[2]).items())


@pytest.mark.parametrize("flags", [{}, {"use_dora": True}], ids=["LoRA", "DoRA"])
def test_saved_and_loaded_they_are_equal_to_the_last_bit(flags, tmp_path):
    saved, other = with_adapters(0, **flags)[0], with_adapters(1, **flags)[0]
    save_adapters(saved, tmp_path)
    assert weights_digest(other) != weights_digest(saved)
    load_adapters(other, tmp_path)
    assert weights_digest(other) == weights_digest(saved)
    with pytest.raises(UserError, match=r"holds other adapters than this network's: .*text_encoder|holds other adapters"):
        load_adapters(with_adapters(use_dora=not flags)[0], tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("flags", [{}, {"use_dora": True}], ids=["LoRA", "DoRA"])
def test_with_gradient_checkpointing_all_adapters_have_the_gradients_of_a_run_without(flags, dtype):
    """Also where nothing that goes into the network requires one, and in bf16; of the text encoder, too."""
    found = []
    for checkpointing in (False, True):
        unet, _ = with_adapters(dtype=dtype, **flags)
        unet.train()
        if checkpointing:
            unet.enable_gradient_checkpointing()
        draw = torch.Generator().manual_seed(5)
        ids = torch.randint(3, 90, (2, 12), generator=draw)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            unet(torch.randn(2, 4, 4, 4, generator=draw), torch.tensor([3, 700]), **{IDS: ids}).sample.float().square().mean().backward()
        found.append({name: weight.grad for name, weight in unet.named_parameters() if weight.requires_grad})
    assert any(name.startswith("text_encoder.") for name in found[0])
    for name, gradient in found[0].items():
        assert gradient is not None and gradient.dtype == torch.float32 and gradient.abs().max() > 0, name
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-5, atol=1e-8)


def test_a_text_encoder_inside_is_evaluated_with_its_network_and_pipelines_tell_states():
    unet, encoder = with_adapters(lora_dropout=0.5)
    assert adapted_encoders(unet) == {"text_encoder": encoder} and not adapted_encoders(parts()[0])
    unet.train()
    assert encoder.training and not torch.equal(call(unet), call(unet))
    unet.eval()
    assert not encoder.training and torch.equal(call(unet), call(unet, encoder))


def test_a_copy_of_a_network_learns_from_its_own_text_encoder():
    """As a network is copied that is split over processes."""
    unet, _ = with_adapters()
    copied, before = copy.deepcopy(unet), call(unet)
    with torch.no_grad():
        for name, weight in copied.text_encoder.named_parameters():
            if ".lora_B." in name:
                weight += 1
    assert torch.equal(call(unet), before) and (call(copied) - before).abs().max() > 1e-4


def test_adapters_in_words():
    assert adapters_in_words(with_adapters(texts=False)[0]) == "adapters of rank 2"
    flags = {"lora_alpha": 1.0, "lora_dropout": 0.1, "use_dora": True}
    assert adapters_in_words(with_adapters(**flags)[0]) == "DoRA adapters of rank 2, alpha 1, dropout 0.1, of its text_encoder, too"


@pytest.mark.parametrize(
    ("named", "ends"),
    [
        (["all-linear"], {"to_q", "proj", "linear_1", "time_emb_proj"}),
        ([r".*attn2\.to_[kv]"], {"to_k", "to_v"}),
        (["attn1.to_q"], {"to_q"}),
    ],
)
def test_modules_are_named_as_peft_takes_them(named, ends):
    unet, _ = parts()
    add_adapters(unet, AdapterArguments(rank=1, lora_target_modules=named), targets=ATTENTION, dtype=torch.float32)
    found = {name.split(".lora_A")[0] for name, _ in unet.named_parameters() if "lora_A" in name}
    assert ends <= {name.rpartition(".")[2] for name in found}
    assert named == ["all-linear"] or {name.rpartition(".")[2] for name in found} == ends
    assert named != ["attn1.to_q"] or all("attn1" in name for name in found)


@pytest.mark.parametrize(
    ("named", "says"),
    [
        (["to_q", "to_x"], "--lora_target_modules to_x is no module of the UNet2DConditionModel that can be adapted; there are .*to_out.0"),
        (["attn1"], "--lora_target_modules attn1 is no module"),
        ([".*attn9.*"], r"--lora_target_modules \.\*attn9\.\* is no module"),
        (["(to_q"], r"--lora_target_modules \(to_q: no regular expression"),
    ],
)
def test_modules_that_are_not_there_are_one_line(named, says):
    with pytest.raises(UserError, match=says):
        add_adapters(parts()[0], AdapterArguments(lora_target_modules=named), targets=ATTENTION, dtype=torch.float32)


# An existing file


def gone_on(path, texts=True, **flags):
    unet, encoder = parts()
    torch.manual_seed(9)
    encoders = {"text_encoder": encoder} if texts else {}
    go_on_from(unet, AdapterArguments(network_weights=str(path), **flags), dtype=torch.float32, encoders=encoders, **SD)
    train_inside(unet, encoders, told)
    return unet


@pytest.mark.parametrize(
    "flags",
    [{}, {"lora_alpha": 5.0, "use_dora": True}, {"lora_target_modules": ["to_q", "ff.net.2"]}],
    ids=["plain", "alpha, DoRA", "modules"],
)
def test_training_goes_on_from_a_file_of_diffusers_format(flags, tmp_path):
    before = with_adapters(**flags)[0]
    save_adapters(before, tmp_path)
    after = gone_on(tmp_path / ADAPTERS)
    torch.testing.assert_close(call(after), call(before), rtol=0, atol=1e-6)
    names = [{name for name, weight in each.named_parameters() if weight.requires_grad} for each in (before, after)]
    assert names[0] == names[1] and any(name.startswith("text_encoder") for name in names[0])
    assert all(weight.dtype == torch.float32 for weight in after.parameters() if weight.requires_grad)
    assert adapters_in_words(after) == adapters_in_words(before)
    save_adapters(after, tmp_path / "again")
    found, written = load_file(tmp_path / "again" / ADAPTERS), load_file(tmp_path / ADAPTERS)
    assert found.keys() == written.keys() and all(torch.equal(found[name], written[name]) for name in found)


def kohya(folder, *, texts=False, **changes):
    """Adapters by sd-scripts' names, of rank 2 and alpha 1, of every attention; and what they add to each weight."""
    unet, encoder = parts()
    layers, added = {}, {}
    draw = torch.Generator().manual_seed(3)
    for prefix, module, ends in (("lora_unet", unet, tuple(ATTENTION)), ("lora_te", encoder, ("q_proj", "k_proj", "v_proj", "out_proj"))):
        for name, layer in module.named_modules():
            if name.endswith(tuple(f".{end}" for end in ends)) and (texts or prefix == "lora_unet"):
                own = f"{prefix}_{'text_model_' if prefix == 'lora_te' else ''}{name.replace('.', '_')}"
                down = torch.randn(2, layer.in_features, generator=draw)
                up = torch.randn(layer.out_features, 2, generator=draw)
                layers |= {f"{own}.lora_down.weight": down, f"{own}.lora_up.weight": up, f"{own}.alpha": torch.tensor(1.0)}
                added[layer] = up @ down / 2
    for name, value in changes.items():
        layers[next(iter(layers)).split(".")[0] + f".{name}"] = value
    save_file(layers, folder / "kohya.safetensors")
    with torch.no_grad():
        for layer, weight in added.items():
            layer.weight += weight
    return folder / "kohya.safetensors", unet, encoder


@pytest.mark.parametrize("texts", [False, True], ids=["U-Net", "and text encoder"])
def test_training_goes_on_from_a_file_of_kohyas_format_with_its_alpha(texts, tmp_path):
    """The text encoder, where it is trained and the file says nothing of it, begins with adapters that change nothing."""
    path, unet, encoder = kohya(tmp_path, texts=texts)
    after = gone_on(path)
    torch.testing.assert_close(call(after), call(unet, encoder), rtol=1e-4, atol=1e-4)
    assert adapters_in_words(after) == "adapters of rank 2, alpha 1, of its text_encoder, too"
    save_adapters(after, tmp_path / "again")
    pipeline = StableDiffusionPipeline.from_pretrained(model_folder(), safety_checker=None)
    pipeline.load_lora_weights(tmp_path / "again")
    torch.testing.assert_close(call(pipeline.unet.eval(), pipeline.text_encoder.eval()), call(after.eval()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"rank": 3}, "has --rank 2, not 3; leave --rank out"),
        ({"lora_alpha": 3.0}, "has --lora_alpha 2, not 3; leave --lora_alpha out"),
        ({"use_dora": True}, "is LoRA without DoRA's vectors; leave --use_dora out"),
        ({"texts": False}, "holds adapters of the text_encoder, too: give --train_text_encoder, with --text_encoder_lr 0"),
    ],
)
def test_flags_that_the_file_does_not_fit_are_one_line(flags, says, tmp_path):
    save_adapters(with_adapters()[0], tmp_path)
    with pytest.raises(UserError, match=rf"^--network_weights .*{says}"):
        gone_on(tmp_path, **flags)
    assert gone_on(tmp_path, rank=2, lora_alpha=2.0)


def test_a_file_of_something_else_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"^--network_weights .*nowhere: no such file or folder$"):
        gone_on(tmp_path / "nowhere")
    (tmp_path / "noise.safetensors").write_bytes(b"noise")
    with pytest.raises(UserError, match=r"^--network_weights .*noise.safetensors: no adapters that diffusers reads"):
        gone_on(tmp_path / "noise.safetensors")
    save_file({"conv_in.weight": torch.zeros(2)}, tmp_path / "whole.safetensors")
    with pytest.raises(UserError, match=r"^--network_weights .*whole.safetensors: no adapters that diffusers reads"):
        gone_on(tmp_path / "whole.safetensors")
    path, _, _ = kohya(tmp_path, dora_scale=torch.ones(4))
    with pytest.raises(UserError, match="is a DoRA in kohya's format, whose dora_scale diffusers does not read"):
        gone_on(path)
    layers = {"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": torch.zeros(2, 8)}
    save_file(layers, tmp_path / "sd3.safetensors")
    with pytest.raises(UserError, match="holds adapters of transformer, none of a UNet2DConditionModel"):
        gone_on(tmp_path / "sd3.safetensors")


def test_adapters_of_another_width_are_one_line(tmp_path):
    save_adapters(with_adapters()[0], tmp_path)
    layers = load_file(tmp_path / ADAPTERS)
    save_file({name: torch.cat([value, value], 1) if ".down." in name else value for name, value in layers.items()}, tmp_path / ADAPTERS)
    with pytest.raises(UserError, match=r"^--network_weights .* does not fit this network's unet \(.*state_dict.*: size mismatch for "):
        gone_on(tmp_path)
    save_file({name: value for name, value in layers.items() if "attn2.to_q" not in name or ".up." not in name}, tmp_path / ADAPTERS)
    with pytest.raises(UserError, match=r"^--network_weights .* does not fit this network's unet"):
        gone_on(tmp_path)
