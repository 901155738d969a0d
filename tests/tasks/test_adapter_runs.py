"""Runs of adapters: text encoders among what is trained, rates by groups, captions by rules; killed and resumed; refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from launch import run_command
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_text import ADAPTERS, FINETUNE, data_folder, model_folder, reach, tiny_text

from immiscible.configs import TextToImageConfig
from immiscible.data.batches import Images
from immiscible.errors import UserError
from immiscible.flags import parse_config
from immiscible.networks.adapters import TOKENS, save_adapters
from immiscible.networks.optimization import rates_in_words
from immiscible.randomness import Draws

pytest.importorskip("peft")
CPU = torch.device("cpu")


def changed(reached):
    return {name for name, value in reached.after.items() if not torch.equal(value, reached.before[name])}


def test_the_text_encoder_learns_inside_the_network_and_from_token_ids(monkeypatch, tmp_path):
    words = tiny_text(tmp_path / "run", use_lora=True, train_text_encoder=True, lora_alpha=8, mixed_precision="bf16", learning_rate=0.1)
    reached = reach(monkeypatch, words, steps=2)
    assert reached.pairs[0].condition.keys() == {f"{TOKENS}tokenizer"}
    trained = {name for name, weight in reached.task.network.named_parameters() if weight.requires_grad}
    assert changed(reached) == trained and {name.partition(".")[0] for name in trained} > {"text_encoder", "down_blocks"}
    assert {weight.dtype for weight in reached.task.network.parameters() if weight.requires_grad} == {torch.float32}
    assert reached.task.facts["initial_weights"].endswith("frozen, with adapters of rank 4, alpha 8, of its text_encoder, too")
    assert reached.losses[0] != reached.losses[1]


def test_before_the_first_step_a_trained_text_encoder_tells_what_a_frozen_one_does(monkeypatch, tmp_path):
    losses = [
        reach(monkeypatch, tiny_text(tmp_path / "run", use_lora=True, train_text_encoder=texts), steps=1).losses for texts in (False, True)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_alpha_of_the_rank_is_what_it_always_was(monkeypatch, tmp_path):
    runs = [reach(monkeypatch, tiny_text(tmp_path / "run", use_lora=True, rank=2, **more), steps=2) for more in ({}, {"lora_alpha": 2})]
    other = reach(monkeypatch, tiny_text(tmp_path / "run", use_lora=True, rank=2, lora_alpha=4), steps=2)
    assert runs[0].losses == runs[1].losses and runs[0].losses[1] != other.losses[1]


def test_rates_by_groups_are_told_logged_and_taken(monkeypatch, tmp_path):
    from immiscible.training.loop import train

    words = {"learning_rate_groups": ["attn2=0"], "text_encoder_lr": 5e-6, "learning_rate": 1e-3}
    lines: list[dict[str, float]] = []

    def inspect(reached):
        names = ("accelerator", "model", "optimizer", "objective", "batches", "encode")
        loop = train(*(reached.options[name] for name in names), **{k: v for k, v in reached.options.items() if k not in (*names, "task")})
        lines.append(next(loop).metrics)
        loop.close()

    reached = reach(monkeypatch, tiny_text(tmp_path / "run", use_lora=True, train_text_encoder=True, **words), inspect=inspect)
    rates = {name: value for name, value in lines[0].items() if name.startswith("learning_rate")}
    assert rates == {"learning_rate": 1e-3, "learning_rate_attn2": 0, "learning_rate_text_encoder": pytest.approx(5e-6)}
    weights = {name: weight for name, weight in reached.task.network.named_parameters() if ".lora_B." in name}
    moved = {name for name, weight in weights.items() if weight.abs().max() > 0}
    assert moved and moved == {name for name in weights if ".attn2." not in name}
    most = {
        part: max(float(weights[name].detach().abs().max()) for name in moved if name.startswith(part))
        for part in ("text_encoder", "down_")
    }
    assert most["text_encoder"] == pytest.approx(5e-6, rel=0.05) and most["down_"] == pytest.approx(1e-3, rel=0.05)
    told = rates_in_words(reached.optimizer.param_groups, reached.task.config)
    assert "others 0.001 (" in told and "attn2 0 (" in told and "text_encoder 5e-06 (" in told


def test_captions_are_shuffled_and_have_their_trigger_word(monkeypatch, tmp_path):
    words = tiny_text(tmp_path / "run", shuffle_captions=True, keep_tokens=1, trigger_word="sks", proportion_empty_prompts=0.3)
    task = reach(monkeypatch, words).task
    told: list[list[str]] = []
    monkeypatch.setattr(type(task.parts), "texts", lambda self, captions, device: told.append(captions) or {"states": torch.zeros(1)})
    batch = Images(torch.zeros(32, 3, 32, 32), captions=["a, b, c, d"] * 32)
    for encode in (task.encode, task.encode, task.encode_held_out):
        encode(batch, Draws(0, 1, 0, CPU))
    assert told[0] == told[1] and set(told[2]) == {"sks, a, b, c, d"}
    orders = set(told[0]) - {""}
    assert "" in told[0] and len(orders) > 3 and all(each.startswith("sks, a, ") for each in orders)
    assert task.prompts(2) == ["sks, thing 0", "sks, thing 1"]


def test_training_goes_on_from_a_file(monkeypatch, tmp_path):
    words = {"use_lora": True, "learning_rate": 0.1}
    reached = reach(monkeypatch, tiny_text(tmp_path / "run", **words, rank=2, lora_alpha=6), steps=2)
    save_adapters(reached.task.network, tmp_path / "held")
    again = reach(monkeypatch, tiny_text(tmp_path / "run", **words, network_weights=tmp_path / "held"), steps=1)
    assert again.losses[0] < reached.losses[0] - 1e-3 or again.losses[0] != reached.losses[0]
    for name, value in reached.after.items():
        torch.testing.assert_close(again.before[name], value, rtol=0, atol=0)
    assert "adapters of rank 2, alpha 6, those of " in again.task.facts["initial_weights"]
    assert again.task.identity["adapters"]["unet"]["lora_alpha"] == 6 and "adapters" not in reached.task.identity


REQUIRED = ["--pretrained_model_name_or_path", "a/model", "--dataset_name", "some/data"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--rank", "8"], "--rank is of adapters: give --use_lora too"),
        (["--lora_alpha", "2"], "--lora_alpha is of adapters: give --use_lora too"),
        (["--train_text_encoder"], "--train_text_encoder is of adapters: give --use_lora too"),
        (["--use_lora", "--text_encoder_lr", "1e-5"], "--text_encoder_lr 1e-05 is of --train_text_encoder"),
        (["--use_lora", "--adam_weight_decay_text_encoder", "0.1"], "--adam_weight_decay_text_encoder 0.1 is of --train_text_encoder"),
        (["--use_lora", "--lora_alpha", "0"], "--lora_alpha.* must be above 0"),
        (["--use_lora", "--lora_dropout", "1"], "--lora_dropout.* below 1"),
        (["--use_lora", "--network_weights", "a", "--lora_target_modules", "to_q"], "--network_weights says which modules are adapted"),
        (
            ["--use_lora", "--train_text_encoder", "--cache_latents", "--latent_cache_dir", "x", "--center_crop"],
            "--train_text_encoder changes the text states, and --cache_latents holds those of before",
        ),
        (
            ["--use_lora", "--train_text_encoder", "--noise_coupling", "assignment", "--coupling_condition", "penalty"],
            "--coupling_condition penalty takes the text states for labels, which --train_text_encoder changes",
        ),
        (
            ["--shuffle_captions", "--cache_latents", "--latent_cache_dir", "x", "--center_crop"],
            "--shuffle_captions tells other captions at each step, and --cache_latents holds text states of one",
        ),
        (["--learning_rate_groups", "attn2"], "--learning_rate_groups 'attn2' must be PATTERN=FACTOR"),
        (
            ["--use_lora", "--train_text_encoder", "--learning_rate", "0", "--text_encoder_lr", "1"],
            "--text_encoder_lr 1 with --learning_rate 0",
        ),
    ],
)
def test_flags_that_do_not_go_together_are_one_line(words, says):
    with pytest.raises(UserError, match=says):
        parse_config(TextToImageConfig, [*REQUIRED, *words], program="finetune_sd.py", description="")


def test_adapters_are_off_and_text_encoders_as_the_network_unless_flags_say_otherwise():
    """The flags of diffusers' SDXL and SD3 scripts; of the latter's defaults two are of text encoders: 5e-6 and 1e-3."""
    config = parse_config(TextToImageConfig, REQUIRED, program="finetune_sd.py", description="")
    assert (config.lora_dropout, config.lora_target_modules, config.train_text_encoder) == (0.0, None, False)
    assert (config.text_encoder_lr, config.adam_weight_decay_text_encoder, config.rank, config.lora_alpha) == (None, None, 4, None)


def test_others_names_of_flags_are_taken():
    words = ["--use_lora", "--lora_layers", "to_q,to_k", "--shuffle_caption"]
    config = parse_config(TextToImageConfig, [*REQUIRED, *words], program="finetune_sd.py", description="")
    assert config.lora_target_modules == ["to_q,to_k"] and config.shuffle_captions and config.rank == 4


# As a user runs them


LOADED = """
import json, sys
import torch
from diffusers import DiffusionPipeline
torch.set_num_threads(1)
pipeline = DiffusionPipeline.from_pretrained(sys.argv[1])
pipeline.set_progress_bar_config(disable=True)
def sample():
    return pipeline("a cat", num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np").images[0]
before = sample()
pipeline.load_lora_weights(sys.argv[2])
def scales(network):
    layers = [module for module in network.modules() if hasattr(module, "lora_A")]
    return sorted({layer.scaling[name] for layer in layers for name in layer.lora_A})
assert "immiscible" not in sys.modules
print(json.dumps([float(abs(sample() - before).max()), scales(pipeline.unet), scales(pipeline.text_encoder)]))
"""


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / ADAPTERS)


@pytest.mark.slow
@pytest.mark.parametrize(("version", "encoders"), [(1, {"text_encoder"}), ("xl", {"text_encoder", "text_encoder_2"})])
def test_resumed_is_never_stopped_and_plain_diffusers_loads_it(script, tmp_path, version, encoders):
    common = {
        "pretrained_model_name_or_path": model_folder(version),
        "use_lora": True,
        "train_text_encoder": True,
        "use_dora": True,
        "rank": 2,
        "lora_alpha": 5,
        "lora_dropout": 0.2,
        "text_encoder_lr": 5e-3,
        "learning_rate": 1e-2,
        "learning_rate_groups": ["lora_B=4"],
        "gradient_checkpointing": True,
        "shuffle_captions": True,
        "trigger_word": "sks",
        "checkpointing_steps": 2,
        "mixed_precision": "bf16",
        "noise_coupling": "assignment",
    }
    for name, steps in (("whole", 4), ("run", 2), ("run", 4)):
        result = script(tiny_text(tmp_path / name, **common, max_train_steps=steps, resume_from_checkpoint="latest"), program=FINETUNE)
        assert result.code == 0, result.stderr
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()] for name in ("whole", "run")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 4 and "learning rates     " in result.stderr
    for part in (".", "checkpoint-4"):
        one, other = tensors(tmp_path / "whole" / part), tensors(tmp_path / "run" / part)
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
        assert {name.partition(".")[0] for name in one} == {"unet", *encoders}
    with safe_open(tmp_path / "run" / ADAPTERS, framework="pt") as file:
        assert json.loads(file.metadata()["lora_adapter_metadata"])["unet.lora_alpha"] == 5
    result = run_command([sys.executable, "-c", LOADED, model_folder(version), tmp_path / "run"], PYTHONSAFEPATH="1")
    assert result.code == 0, result.stderr
    difference, *scales = json.loads(result.stdout)
    assert difference > 1e-3 and scales == [[2.5], [2.5]]


@pytest.mark.slow
def test_two_processes_with_half_the_batch_give_the_losses_of_one(script, tmp_path):
    common = {
        "use_lora": True,
        "train_text_encoder": True,
        "shuffle_captions": True,
        "max_train_steps": 5,
        "learning_rate_groups": ["lora_B=4"],
        "train_data_dir": data_folder(32),
        "random_flip": True,
        "proportion_empty_prompts": 0.2,
    }
    result = script(tiny_text(tmp_path / "one", **common, train_batch_size=8), program=FINETUNE)
    assert result.code == 0, result.stderr
    results = [run.wait() for run in script.start_ranks(tiny_text(tmp_path / "two", **common, train_batch_size=4), program=FINETUNE)]
    assert [each.code for each in results] == [0, 0], results
    one, two = (
        [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()] for name in ("one", "two")
    )
    assert len(one) == 5 and two == pytest.approx(one, rel=1e-5) and len(set(one)) == 5
