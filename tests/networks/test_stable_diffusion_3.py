"""Stable Diffusion 3 and 3.5: what is told of a caption, what a step is, and which checkpoints go together."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from tiny_text import model_folder

from immiscible.errors import UserError
from immiscible.networks.arguments import TextModelArguments
from immiscible.networks.families import load_checkpoint
from immiscible.networks.stable_diffusion_3 import StableDiffusion3

CPU = torch.device("cpu")
CAPTIONS = ["a wide crop of the photograph of a cat", "", "many " * 90, "a rocket"]


def loaded(version="3", *, name=None, resolution=32, from_scratch=False, **changes):
    arguments = TextModelArguments(pretrained_model_name_or_path=str(name or model_folder(version)), **changes)
    return load_checkpoint(arguments, resolution=resolution, cache_dir=None, from_scratch=from_scratch)


def diffusers_pipeline(version):
    from diffusers import StableDiffusion3Pipeline

    absent = {} if version == "3" else {"text_encoder_3": None, "tokenizer_3": None}
    return StableDiffusion3Pipeline.from_pretrained(model_folder(version), **absent)


@pytest.mark.parametrize("length", [77, 120])
@pytest.mark.parametrize("version", ["3", "3.5-without-t5"])
def test_text_states_are_the_pipelines(version, length):
    """Of both CLIP models and T5, or zeros where it is absent; too long captions are cut at the same tokens."""
    parts = loaded(version, max_sequence_length=length)
    assert isinstance(parts, StableDiffusion3) and ("text_encoder_3" in parts.encoders) == (version == "3")
    with torch.no_grad():
        found = parts.texts(CAPTIONS, CPU)
        states, _, pooled, _ = diffusers_pipeline(version).encode_prompt(
            CAPTIONS, None, None, device=CPU, do_classifier_free_guidance=False, max_sequence_length=length
        )
    assert torch.equal(found["states"], states) and torch.equal(found["pooled"], pooled)
    assert {name: (len(CAPTIONS), *shape) for name, shape in parts.text_shapes.items()} == {
        name: value.shape for name, value in found.items()
    }
    told = parts.told(found, None)
    assert torch.equal(told["encoder_hidden_states"], states) and torch.equal(told["pooled_projections"], pooled)
    assert parts.reader.model_max_length == (length if version == "3" else 77)


def test_the_time_may_be_the_networks_second_argument():
    parts = loaded("3.5-without-t5")
    x, time = torch.randn(2, 16, 4, 4), torch.tensor([10.0, 900.0])
    told = {"encoder_hidden_states": torch.randn(2, 154, 96), "pooled_projections": torch.randn(2, 80)}
    with torch.no_grad():
        assert torch.equal(parts.network(x, time, **told).sample, parts.network(hidden_states=x, timestep=time, **told).sample)


def test_its_weights_are_the_checkpoints_or_fresh_and_its_side_the_runs():
    parts = loaded(resolution=64)
    assert parts.network.config.sample_size == 8 and loaded().network.config.sample_size == 4
    assert (parts.prediction_type, parts.schedule) == ("flow_prediction", "shift 3")
    assert parts.latent_shift == parts.vae.config.shift_factor != 0
    torch.manual_seed(1)
    fresh = loaded(from_scratch=True, resolution=64)
    assert fresh.identity == parts.identity
    assert not torch.equal(fresh.network.proj_out.weight, parts.network.proj_out.weight)


def test_resolutions_that_it_cannot_take():
    with pytest.raises(UserError, match="--resolution 40 must be a multiple of 16"):
        loaded(resolution=40)
    with pytest.raises(UserError, match="--resolution 272 must be at most 256"):
        loaded(resolution=272)


def test_it_predicts_the_flow_alone():
    with pytest.raises(
        UserError, match=r"--prediction_type epsilon: .* is a Stable Diffusion 3 or 3.5 checkpoint, which predicts the flow"
    ):
        loaded(prediction_type="epsilon")


@pytest.fixture
def copied(tmp_path):
    """A function that copies a checkpoint and changes the configuration of a part."""

    def copy(part="", **changes):
        folder = shutil.copytree(model_folder("3"), tmp_path / "model")
        path = folder / part / ("config.json" if part else "model_index.json")
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
        return folder

    return copy


def test_missing_encoders_are_one_line(copied):
    folder = copied(text_encoder_2=[None, None])
    with pytest.raises(UserError, match=r"is a StableDiffusion3Pipeline without text_encoder_2; a Stable Diffusion 3 or 3\.5 check"):
        loaded(name=folder)


def test_one_of_t5_and_its_tokenizer_is_one_line(copied):
    folder = copied(tokenizer_3=[None, None])
    with pytest.raises(UserError, match="has text_encoder_3 alone: text_encoder_3 and tokenizer_3 go together"):
        loaded(name=folder)


def test_a_vae_of_other_latents_is_one_line(copied):
    folder = copied()
    shutil.rmtree(folder / "vae")
    shutil.copytree(model_folder() / "vae", folder / "vae")
    with pytest.raises(UserError, match=r"its transformer takes 16 channels .*its VAE has latents of 4"):
        loaded(name=folder)


@pytest.mark.parametrize(
    "part, other, words",
    [
        ("text_encoder_2", "text_encoder", "pooled text states of width 80, its CLIP models give 64"),
        ("text_encoder", "text_encoder_2", "pooled text states of width 80, its CLIP models give 96"),
    ],
)
def test_encoders_of_other_widths_are_one_line(copied, part, other, words):
    folder = copied()
    shutil.rmtree(folder / part)
    shutil.copytree(model_folder("3") / other, folder / part)
    with pytest.raises(UserError, match=words):
        loaded(name=folder)
