"""A Stable Diffusion checkpoint, loaded by the flags of networks alone, and where its parts are placed."""

from __future__ import annotations

import sys

import pytest
import torch
from launch import ROOT, run_command
from tiny_text import model_folder

from immiscible.errors import UserError
from immiscible.networks.adapters import adapted
from immiscible.networks.arguments import AdapterArguments, TextModelArguments
from immiscible.networks.families import initial_weights, load_checkpoint
from immiscible.networks.placing import place
from immiscible.networks.stable_diffusion import StableDiffusion
from immiscible.networks.weights import weights_digest

CPU = torch.device("cpu")


class Accelerator:
    """As much of accelerate's as placing takes."""

    def __init__(self, precision="no"):
        self.device, self.mixed_precision = CPU, precision


def loaded(*, resolution=32, from_scratch=False, **changes):
    arguments = TextModelArguments(pretrained_model_name_or_path=str(model_folder()), **changes)
    return load_checkpoint(arguments, resolution=resolution, cache_dir=None, from_scratch=from_scratch)


def test_the_unets_side_is_the_runs_and_its_weights_the_checkpoints_or_fresh():
    parts = loaded()
    assert parts.network.config.sample_size == 4 and loaded(resolution=64).network.config.sample_size == 8
    torch.manual_seed(1)
    fresh = loaded(from_scratch=True)
    assert fresh.identity["unet"] == parts.identity["unet"] and weights_digest(fresh.network) != weights_digest(parts.network)
    with pytest.raises(UserError, match="--resolution 36 must be a multiple of 8"):
        loaded(resolution=36)


def test_the_digest_is_of_what_stays_as_it_is():
    """Of the U-Net only where adapters are trained, not its weights."""
    parts, (vae, encoders) = loaded(), StableDiffusion.load_frozen(str(model_folder()), {})
    assert parts.digest == " ".join(map(weights_digest, (vae, encoders["text_encoder"]))) == loaded(from_scratch=True).digest
    assert loaded(use_lora=True).digest == f"{parts.digest} {weights_digest(parts.network)}"


def test_another_prediction_is_told_to_the_scheduler_and_the_checkpoints_own_is_kept():
    parts = loaded(prediction_type="v_prediction")
    assert (parts.scheduler.config.prediction_type, parts.pretrained_prediction) == ("v_prediction", "epsilon")
    assert parts.identity["scheduler"]["prediction_type"] == "v_prediction" and parts.identity["frozen"] == parts.digest


@pytest.mark.parametrize(("precision", "dtype"), [("no", torch.float32), ("bf16", torch.bfloat16)])
def test_frozen_parts_have_the_runs_precision_and_trained_weights_have_32_bits(precision, dtype):
    parts = loaded()
    place(parts, Accelerator(precision), adapters=None, idle=True)
    assert (parts.vae.dtype, parts.text_encoder.dtype, parts.network.dtype) == (dtype, dtype, torch.float32)
    assert parts.network.training and not adapted(parts.network) and all(weight.requires_grad for weight in parts.network.parameters())
    states, pooled = (parts.texts(["a cat", ""], CPU)[name] for name in ("states", "pooled"))
    assert states.shape == (2, parts.tokenizer.model_max_length, parts.text_encoder.config.hidden_size) and pooled.shape[0] == 2
    assert {name: (2, *shape) for name, shape in parts.text_shapes.items()} == {"states": states.shape, "pooled": pooled.shape}


def test_adapters_of_a_rank_are_all_that_is_trained():
    pytest.importorskip("peft")
    parts = loaded(use_lora=True)
    place(parts, Accelerator("bf16"), adapters=AdapterArguments(rank=3), idle=False)
    trained = {name: weight for name, weight in parts.network.named_parameters() if weight.requires_grad}
    assert trained and all("lora" in name and weight.dtype == torch.float32 and 3 in weight.shape for name, weight in trained.items())
    assert {weight.dtype for weight in parts.network.parameters() if not weight.requires_grad} == {torch.bfloat16}


def test_a_precision_of_other_networks_is_one_line():
    with pytest.raises(UserError, match="--mixed_precision fp8 is not supported here"):
        place(loaded(), Accelerator("fp8"), adapters=None, idle=False)


def test_with_which_weights_a_run_begins_in_words():
    assert initial_weights("sd", from_scratch=True, adapters=None) == "random, not those of sd, with which finetune_sd.py begins"
    assert initial_weights("sd", from_scratch=False, adapters=None) == "those of sd"
    assert initial_weights("sd", from_scratch=False, adapters="adapters of rank 4") == "those of sd, frozen, with adapters of rank 4"


def test_networks_are_imported_without_the_libraries_that_they_are_loaded_with():
    code = """
import pkgutil, sys
import immiscible.networks as wing
for each in pkgutil.iter_modules(wing.__path__):
    if each.name != "diffusion_transformers":  # classes of diffusers', in a file that goes with their weights
        __import__(f"immiscible.networks.{each.name}")
print(sorted({"diffusers", "transformers", "accelerate", "peft"} & set(sys.modules)))
"""
    result = run_command([sys.executable, "-c", code], PYTHONPATH=str(ROOT))
    assert (result.code, result.stdout) == (0, "[]\n"), result.stderr
