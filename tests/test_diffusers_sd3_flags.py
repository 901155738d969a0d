"""Each flag of diffusers' SD3 LoRA script: the same meaning and default, another default that is meant, or one line that says what takes
its place.
"""

import json
from dataclasses import fields

import pytest
from launch import ROOT
from test_diffusers_flags import ELSEWHERE, ROWS, parse

from immiscible.configs import TextToImageConfig
from immiscible.errors import UserError
from immiscible.networks.sd3_arguments import LAWS, SD3_FOREIGN, WEIGHTINGS

THEIRS = json.loads((ROOT / "tests/diffusers_sd3_flags.json").read_text())["train_dreambooth_lora_sd3.py"]
REQUIRED = {"pretrained_model_name_or_path", "dataset_name", "instance_prompt"}
ADAPTERS = {  # flags that are tested with those of adapters
    "lora_dropout",
    "lora_layers",
    "train_text_encoder",
    "text_encoder_lr",
    "adam_weight_decay_text_encoder",
}
# One script serves all families, and which one it is stands in the checkpoint, which parsing does not open: the defaults are those of
# diffusers' scripts for Stable Diffusion 1.x, and every run's folder is named by its script.
OTHER_DEFAULTS = {
    "adam_weight_decay": 1e-2,
    "caption_column": "text",
    "num_train_epochs": 100,
    "optimizer": "adamw",  # in small letters
    "output_dir": "sd-model-finetuned-lora",
    "train_batch_size": 16,
    "validation_epochs": 1,
    "weighting_scheme": None,  # every method is off by default, on every checkpoint; a run says so at its start
}
OTHER_MEANING = {"cache_latents": "a cache on disk, by --latent_cache_dir"}
OF_SD3 = {  # flags that the scripts for Stable Diffusion 1.x have not, and the test of what they do
    "weighting_scheme": "tests/tasks/test_sd3.py",
    "precondition_outputs": "tests/tasks/test_sd3.py",
    "max_sequence_length": "tests/networks/test_stable_diffusion_3.py",
    "logit_mean": "tests/test_equations.py",
    "logit_std": "tests/test_equations.py",
    "mode_scale": "tests/test_equations.py",
    "optimizer": "tests/networks/test_optimizers.py",
}


def known(name: str) -> bool:
    return name in {item.name for item in fields(TextToImageConfig)}


def test_every_flag_has_its_default():
    assert len(THEIRS) == 75
    ours = parse("--use_lora")
    for name in THEIRS.keys() - REQUIRED - SD3_FOREIGN.keys() - ADAPTERS:
        default, other = THEIRS[name]["default"], OTHER_DEFAULTS.get(name)
        assert getattr(ours, name) == (other if name in OTHER_DEFAULTS else default), name
        assert name not in OTHER_DEFAULTS or other != default, name


def test_every_flag_has_a_test_of_what_it_does_or_a_line_that_says_why_not():
    tested = ROWS.keys() | ELSEWHERE.keys() | OF_SD3.keys()
    assert THEIRS.keys() <= tested | SD3_FOREIGN.keys() | OTHER_MEANING.keys() | ADAPTERS
    assert not any(map(known, SD3_FOREIGN)) and SD3_FOREIGN.keys() <= THEIRS.keys()
    assert all((ROOT / path).exists() for path in OF_SD3.values())


@pytest.mark.parametrize("name", SD3_FOREIGN)
def test_a_flag_that_has_another_form_here_is_one_line(name):
    with pytest.raises(UserError, match=f"^--{name} is not a flag here: [a-zA-Z-]"):
        parse(f"--{name}", "1")


def test_a_cache_in_memory_is_one_line():
    with pytest.raises(UserError, match="--cache_latents needs --latent_cache_dir"):
        parse("--cache_latents")


@pytest.mark.parametrize("precondition", [0, 1])
@pytest.mark.parametrize("scheme", LAWS)
def test_a_scheme_is_a_law_and_a_weighting_by_their_names_here(scheme, precondition):
    words = ["--weighting_scheme", scheme, "--precondition_outputs", precondition]
    config = parse(*words)
    law, weighting = LAWS[scheme], WEIGHTINGS[scheme, precondition]
    assert (config.timestep_sampling, config.loss_weighting) == (law, weighting)
    again = parse(*words, "--timestep_sampling", law, "--loss_weighting", weighting)  # as a run's config.yaml has them
    assert (again.timestep_sampling, again.loss_weighting) == (law, weighting)
    for other in (["--timestep_sampling", "beta"], ["--loss_weighting", "p2"], ["--snr_gamma", "5"]):
        with pytest.raises(UserError, match=rf"--weighting_scheme {scheme} is --timestep_sampling {law} --loss_weighting {weighting}"):
            parse(*words, *other)


def test_its_choices_are_diffusers_and_that_of_their_other_scripts():
    assert {*THEIRS["weighting_scheme"]["choices"], "none"} == LAWS.keys()
    with pytest.raises(UserError, match="--precondition_outputs 0 is of --weighting_scheme"):
        parse("--precondition_outputs", "0")
