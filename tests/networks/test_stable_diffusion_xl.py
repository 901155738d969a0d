"""The parts of an SDXL checkpoint: what captions become, and what its network is told."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from tiny_text import model_folder

from immiscible.errors import UserError
from immiscible.networks.arguments import TextModelArguments
from immiscible.networks.families import load_checkpoint
from immiscible.networks.placing import place
from immiscible.networks.weights import weights_digest

CPU = torch.device("cpu")
CAPTIONS = ["a cat", "", "many " * 40, "two dogs"]


class Accelerator:
    """As much of accelerate's as placing takes."""

    def __init__(self, precision="no"):
        self.device, self.mixed_precision = CPU, precision


def loaded(model=None, *, resolution=32, from_scratch=False, **changes):
    arguments = TextModelArguments(pretrained_model_name_or_path=str(model or model_folder("xl")), **changes)
    return load_checkpoint(arguments, resolution=resolution, cache_dir=None, from_scratch=from_scratch)


def edited(folder, part="", source="xl", **changes):
    """A copy of the checkpoint with other entries in a part's configuration, or in the pipeline's."""
    shutil.copytree(model_folder(source), folder)
    path = folder / part / "config.json" if part else folder / "model_index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


@torch.no_grad()
def test_captions_become_what_diffusers_pipeline_makes_of_them():
    from diffusers import StableDiffusionXLPipeline

    parts = loaded()
    found = parts.texts(CAPTIONS, CPU)
    pipeline = StableDiffusionXLPipeline.from_pretrained(model_folder("xl"))
    states, _, pooled, _ = pipeline.encode_prompt(CAPTIONS, device=CPU, do_classifier_free_guidance=False)
    assert torch.equal(found["states"], states) and torch.equal(found["pooled"], pooled)
    assert {name: (4, *shape) for name, shape in parts.text_shapes.items()} == {name: each.shape for name, each in found.items()}
    assert parts.states_told == ("states", "pooled") and found["states"][1].abs().min() > 0  # the empty caption is one, as in the script


def test_the_network_is_told_sizes_and_called_as_any_other():
    parts = loaded()
    texts = parts.texts(CAPTIONS, CPU)
    crops = torch.tensor([[640, 480, 3, 0, 32, 32]] * 4)
    whole = parts.told(texts, None)["time_ids"]
    assert whole.dtype == torch.float32 and whole.tolist() == [[32, 32, 0, 0, 32, 32]] * 4
    told = parts.told(texts, crops)
    assert all(len(value) == 4 for value in told.values()) and told["time_ids"].tolist() == crops.tolist()
    x, t = torch.randn(4, 4, 4, 4, generator=torch.Generator().manual_seed(0)), torch.arange(4)
    added = {"text_embeds": texts["pooled"], "time_ids": crops.float()}
    with torch.no_grad():
        expected = parts.network(x, t, encoder_hidden_states=texts["states"], added_cond_kwargs=added).sample  # as a pipeline calls it
        assert torch.equal(parts.network(x, t, **told).sample, expected)
        assert not torch.equal(parts.network(x, t, **parts.told(texts, None)).sample, expected)


@pytest.mark.parametrize("named", [False, True])
def test_the_own_vae_keeps_its_precision_and_a_named_one_has_the_runs(named):
    vae = str(model_folder("xl") / "vae") if named else None
    parts = loaded(pretrained_vae_model_name_or_path=vae)
    place(parts, Accelerator("bf16"), adapters=None, idle=True)
    assert {parts.text_encoder.dtype, parts.encoders["text_encoder_2"].dtype} == {torch.bfloat16}
    assert parts.vae.dtype == (torch.bfloat16 if named else torch.float32) and parts.network.dtype == torch.float32
    whole = parts.in_full_precision()
    assert {part.dtype for part in whole.frozen.values()} == {torch.float32} and whole.digest_of(network=False) == parts.digest


def test_another_vae_is_encoded_with_and_told_apart(tmp_path):
    from diffusers import AutoencoderKL

    other = AutoencoderKL.from_pretrained(model_folder("xl"), subfolder="vae")
    with torch.no_grad():
        other.encoder.conv_in.bias += 1
    other.save_pretrained(tmp_path / "other")
    parts, own = loaded(pretrained_vae_model_name_or_path=str(tmp_path / "other")), loaded()
    assert weights_digest(parts.vae) == weights_digest(other) != weights_digest(own.vae) and parts.digest != own.digest
    for setting, value in (("scaling_factor", 0.18215), ("shift_factor", 0.1)):
        other.register_to_config(**{"scaling_factor": own.vae.config.scaling_factor, "shift_factor": None, setting: value})
        other.save_pretrained(tmp_path / setting)
        with pytest.raises(UserError, match=f"--pretrained_vae_model_name_or_path .* does not fit .*: its {setting} is {value}"):
            loaded(pretrained_vae_model_name_or_path=str(tmp_path / setting))
    with pytest.raises(UserError, match=r"--pretrained_vae_model_name_or_path .*no AutoencoderKL found there"):
        loaded(pretrained_vae_model_name_or_path=str(tmp_path / "nothing"))


def test_samples_are_guided_away_from_what_the_network_was_told(tmp_path):
    """Zeros where the checkpoint says so; the empty caption where it says so, or where the network never saw zeros."""
    assert loaded().pipeline_settings["force_zeros_for_empty_prompt"] is True
    assert loaded(from_scratch=True).pipeline_settings["force_zeros_for_empty_prompt"] is False
    other = edited(tmp_path / "model", force_zeros_for_empty_prompt=False)
    assert loaded(other).pipeline_settings["force_zeros_for_empty_prompt"] is False


def test_parts_that_do_not_go_together_are_one_line(tmp_path):
    second = edited(tmp_path / "second", text_encoder_2=[None, None])
    with pytest.raises(UserError, match="is a StableDiffusionXLPipeline without text_encoder_2; a Stable Diffusion XL checkpoint has unet"):
        loaded(second)
    for folder, (part, changes), wanted in (
        ("wide", ("unet", {"cross_attention_dim": 64}), "takes text states of width 64, its text encoder gives 80"),
        ("sizes", ("unet", {"addition_time_embed_dim": 4}), "88 numbers of pooled text and sizes, .* 6 sizes make 64; a refiner"),
    ):
        with pytest.raises(UserError, match=wanted):
            loaded(edited(tmp_path / folder, part, **changes), from_scratch=True)
    with pytest.raises(UserError, match=r"--model_preset dit-tiny takes the place of a U-Net of Stable Diffusion 1.x and 2.x"):
        loaded(model_preset="dit-tiny")
