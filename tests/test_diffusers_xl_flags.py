"""Each flag of diffusers' SDXL examples: the same meaning and default, or one line that says what takes its place."""

import json

import pytest
import torch
from launch import ROOT
from test_diffusers_flags import ELSEWHERE, ROWS, parse

from immiscible.errors import UserError
from immiscible.networks.sdxl_flags import XL_FOREIGN
from immiscible.schedulers import build_scheduler
from immiscible.timesteps import timestep_sampler

THEIRS = json.loads((ROOT / "tests/diffusers_xl_flags.json").read_text())
# One script serves all families, and which one it is stands in the checkpoint, which parsing does not open: the defaults are those of
# diffusers' script for Stable Diffusion 1.x. Of the resolution a line says so (tests/tasks/test_sdxl_runs.py).
SCRIPTS = {
    "train_text_to_image_sdxl.py": ([], {"resolution": 512, "output_dir": "sd-model-finetuned", "validation_epochs": 5}),
    "train_text_to_image_lora_sdxl.py": (["--use_lora"], {"resolution": 512}),
}
OF_XL = {  # flags that the scripts for Stable Diffusion 1.x have not, and the test of what they do
    "pretrained_vae_model_name_or_path": "tests/networks/test_stable_diffusion_xl.py",
    "proportion_empty_prompts": "tests/tasks/test_text_to_image.py",
    "train_text_encoder": "tests/networks/test_low_rank_adapters.py",
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_has_its_default(script):
    words, others = SCRIPTS[script]
    assert len(THEIRS[script]) == (55 if words else 59)
    ours = parse(*words)
    for name in THEIRS[script].keys() - XL_FOREIGN.keys() - {"pretrained_model_name_or_path", "dataset_name"}:
        default = THEIRS[script][name]["default"]
        assert getattr(ours, name) == others.get(name, default) and (name not in others or others[name] != default), name


def test_every_flag_has_a_test_of_what_it_does():
    theirs = {name for flags in THEIRS.values() for name in flags}
    assert theirs <= ROWS.keys() | ELSEWHERE.keys() | OF_XL.keys() | XL_FOREIGN.keys()
    assert all((ROOT / path).exists() for path in OF_XL.values())


@pytest.mark.parametrize("name", XL_FOREIGN)
def test_a_flag_that_has_another_form_here_is_one_line(name):
    with pytest.raises(UserError, match=f"--{name} is not a flag here: .*(--timestep_sampling|--logging_steps|torch's own)"):
        parse(f"--{name}", "1")


@pytest.mark.parametrize(("portion", "multiplier"), [(0.25, 2.0), (0.7, 5.0)])
def test_what_takes_the_place_of_the_earlier_strategy_is_the_same_law(portion, multiplier):
    """The script's: weights of 1, those of the first ``portion`` times the multiplier, divided by their sum."""
    weights = torch.ones(1000, dtype=torch.float64)
    weights[: int(portion * 1000)] *= multiplier
    law = timestep_sampler("asymmetric", build_scheduler("ddpm"), asymmetric_k=multiplier, asymmetric_tau=int(portion * 1000))
    torch.testing.assert_close(law.probabilities, weights / weights.sum(), rtol=1e-12, atol=0)
