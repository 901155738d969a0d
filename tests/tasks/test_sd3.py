"""Stable Diffusion 3 in the text-to-image scripts: the step, against one written directly in diffusers, and what a run leaves."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

import numpy
import pytest
import torch
from bucketed import mixed_folder
from kills import finish, kill, lines, start
from launch import flags, run_command
from safetensors import safe_open
from safetensors.torch import load_file
from test_text_runs import final_hashes, metrics
from tiny_text import ADAPTERS, FINETUNE, SCRATCH, Reached, data_folder, model_folder, reach, tiny_text

from immiscible.errors import UserError
from immiscible.randomness import seeded_generator

WITHOUT_T5 = "3.5-without-t5"
TOLD = ("encoder_hidden_states", "pooled_projections")


def tiny_sd3(output_dir: Path, version: str = WITHOUT_T5, **changes) -> list[str]:
    return tiny_text(output_dir, **{"pretrained_model_name_or_path": model_folder(version), **changes})


# One step, written directly against diffusers


def plain_loss(reached: Reached, transformer, scheme: str, precondition: bool) -> torch.Tensor:
    """The loss of diffusers' train_dreambooth_lora_sd3.py on the latents, noises, levels and captions of the run's first step."""
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.training_utils import compute_loss_weighting_for_sd3

    (pairs,) = reached.pairs
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(model_folder(WITHOUT_T5), subfolder="scheduler")
    assert scheduler.config.shift == 3
    index = len(scheduler.timesteps) - 1 - pairs.timesteps
    timesteps, sigmas = scheduler.timesteps[index], scheduler.sigmas[index].view(-1, 1, 1, 1)
    noisy = (1.0 - sigmas) * pairs.x0 + sigmas * pairs.noise
    told = {name: pairs.condition[name] for name in TOLD}
    output = transformer(hidden_states=noisy, timestep=timesteps, **told, return_dict=False)[0]
    target = pairs.noise - pairs.x0
    if precondition:
        output, target = output * (-sigmas) + noisy, pairs.x0
    weighting = compute_loss_weighting_for_sd3(weighting_scheme=scheme, sigmas=sigmas)
    return torch.mean((weighting.float() * (output.float() - target.float()) ** 2).reshape(target.shape[0], -1), 1).mean()


def test_with_every_method_off_a_step_is_the_diffusers_script(monkeypatch, tmp_path):
    from diffusers import SD3Transformer2DModel

    reached = reach(monkeypatch, tiny_sd3(tmp_path / "run"), steps=1)
    assert (reached.objective.prediction_type, reached.objective.process.kind) == ("flow_prediction", "flow")
    transformer = SD3Transformer2DModel.from_pretrained(model_folder(WITHOUT_T5), subfolder="transformer").train()
    optimizer = torch.optim.AdamW(transformer.parameters(), lr=1e-3, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8)
    loss = plain_loss(reached, transformer, "none", precondition=False)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(transformer.parameters(), 1.0)
    optimizer.step()
    assert reached.losses[0] == pytest.approx(float(loss.detach()), rel=1e-6)
    for name, value in transformer.state_dict().items():
        torch.testing.assert_close(reached.after[name], value, rtol=0, atol=1e-6)
    assert sum(not torch.equal(reached.after[name], reached.before[name]) for name in reached.before) == len(reached.before) - 1
    assert reached.pairs[0].x0.shape == (4, 16, 4, 4)  # but for the positions


@pytest.mark.parametrize("precondition", [1, 0])
@pytest.mark.parametrize("scheme", ["logit_normal", "mode", "sigma_sqrt", "cosmap", "none"])
def test_weighting_schemes_are_the_diffusers_scripts(monkeypatch, tmp_path, scheme, precondition):
    """Of LoRA; that the levels are drawn as there: tests/test_equations.py."""
    from diffusers import SD3Transformer2DModel

    words = tiny_sd3(tmp_path / "run", weighting_scheme=scheme, precondition_outputs=precondition, use_lora=True)
    reached = reach(monkeypatch, words, steps=1)
    transformer = SD3Transformer2DModel.from_pretrained(model_folder(WITHOUT_T5), subfolder="transformer")
    with torch.no_grad():  # adapters change nothing at first
        loss = plain_loss(reached, transformer, scheme, bool(precondition))
    assert reached.losses[0] == pytest.approx(float(loss), rel=1e-5)
    law = {"logit_normal": "sd3_logit_normal", "mode": "sd3_mode"}.get(scheme, "uniform")
    assert reached.task.facts["timestep_sampling"].startswith(law)


def test_latents_are_shifted_and_scaled_and_captions_are_the_pipelines(monkeypatch, tmp_path):
    from diffusers import AutoencoderKL

    from immiscible.data.batches import Images
    from immiscible.randomness import Draws

    reached, draws = reach(monkeypatch, tiny_sd3(tmp_path / "run", "3", max_sequence_length=20)), Draws(3, 5, 0, torch.device("cpu"))
    images, captions = torch.rand(2, 3, 32, 32) * 2 - 1, ["a cat", ""]
    encoded = reached.encode(Images(images, captions=captions), draws)
    vae = AutoencoderKL.from_pretrained(model_folder("3"), subfolder="vae")
    with torch.no_grad():
        posterior = vae.encode(images).latent_dist
        states, _, pooled, _ = reached.task.pipeline().encode_prompt(
            captions, None, None, device=torch.device("cpu"), do_classifier_free_guidance=False, max_sequence_length=20
        )
    assert vae.config.shift_factor
    x0 = (posterior.mean + posterior.std * draws.normal("latent", 2, 16, 4, 4) - vae.config.shift_factor) * vae.config.scaling_factor
    torch.testing.assert_close(encoded.x0, x0)
    assert torch.equal(encoded.condition["encoder_hidden_states"], states) and torch.equal(encoded.condition["pooled_projections"], pooled)
    expected = (posterior.mean - vae.config.shift_factor) * vae.config.scaling_factor
    torch.testing.assert_close(reached.encode.expected(Images(images, captions=captions)), expected)


def test_adapters_are_of_the_scripts_layers(monkeypatch, tmp_path):
    reached = reach(monkeypatch, tiny_sd3(tmp_path / "run", use_lora=True, rank=2, mixed_precision="bf16"), steps=1)
    layers = {name.split(".lora_")[0].split(".attn.")[1] for name in reached.before if "lora_" in name}
    assert layers == {"to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"}
    changed = {name for name, value in reached.after.items() if not torch.equal(value, reached.before[name])}
    assert changed and all("lora_" in name for name in changed)
    parts = reached.task.parts
    assert parts.vae.dtype == torch.float32 and {encoder.dtype for encoder in parts.encoders.values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    "method",
    [
        {
            "noise_coupling": "assignment",
            "coupling_condition": "centered",
            "timestep_sampling": "asymmetric",
            "loss_weighting": "change_aware",
        },
        {"noise_coupling": "nearest", "timestep_sampling": "logit_normal", "timestep_shift": 2.0, "loss_weighting": "cosmap"},
        {"noise_coupling": "reservoir", "timestep_sampling": "mode", "snr_gamma": 5, "gradient_checkpointing": True},
    ],
    ids=lambda method: method["noise_coupling"],
)
def test_couplings_laws_and_weightings_act_on_its_latents(monkeypatch, tmp_path, method):
    reached = reach(monkeypatch, tiny_sd3(tmp_path / "run", **method), steps=2)
    assert all(numpy.isfinite(reached.losses)) and len(reached.pairs) == 2
    statistics = reached.pairs[-1].statistics
    assert float(statistics["pair_distance"]) < float(statistics["pair_distance_drawn"])


def test_a_bucket_of_another_shape_is_the_scripts_step_too(monkeypatch, tmp_path):
    from diffusers import SD3Transformer2DModel

    common = {"train_data_dir": mixed_folder(), "train_batch_size": 2, "use_lora": True}
    reached = reach(monkeypatch, tiny_sd3(tmp_path / "run", **common, buckets="32,64;64,32"), steps=1)
    assert sorted(reached.pairs[0].x0.shape[2:]) == [4, 8]
    transformer = SD3Transformer2DModel.from_pretrained(model_folder(WITHOUT_T5), subfolder="transformer")
    with torch.no_grad():
        loss = plain_loss(reached, transformer, "none", precondition=False)
    assert reached.losses[0] == pytest.approx(float(loss), rel=1e-6)
    for buckets, words in (
        ("32,40;32,32", "multiples? of 16"),
        ("16,512;32,32", "side of 512, and .* no positions beyond 256"),
    ):
        with pytest.raises(UserError, match=words):
            reach(monkeypatch, tiny_sd3(tmp_path / "run", **common, buckets=buckets))


# What is refused


def test_what_does_not_go_with_it_is_one_line(monkeypatch, tmp_path):
    for changes, words in (
        ({"prediction_type": "v_prediction"}, "--prediction_type v_prediction: .* predicts the flow; leave it out"),
        ({"dream_training": True}, "--dream_training needs epsilon-prediction, and .* predicts flow_prediction"),
        ({"model_preset": "dit-tiny"}, "--model_preset dit-tiny takes the place of a U-Net"),
    ):
        with pytest.raises(UserError, match=words):
            reach(monkeypatch, tiny_sd3(tmp_path / "run", **changes), from_scratch=True)


@pytest.mark.parametrize("changes", [{"weighting_scheme": "mode"}, {"max_sequence_length": 120}])
def test_its_flags_are_not_of_other_checkpoints(monkeypatch, tmp_path, changes):
    ((name, value),) = changes.items()
    with pytest.raises(UserError, match=rf"--{name} {value} is of Stable Diffusion 3 checkpoints; .* is a Stable Diffusion 1\.x or 2\.x"):
        reach(monkeypatch, tiny_text(tmp_path / "run", **changes))


# Whole runs


SAMPLE = """
import json, sys
import torch
from diffusers import StableDiffusion3Pipeline
torch.set_num_threads(1)
base, adapters, *folders = sys.argv[1:]
found = {}
def sample(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipeline("a cat", num_inference_steps=3, generator=generator, output_type="np", height=32, width=32).images[0]
absent = {"text_encoder_3": None, "tokenizer_3": None}
for folder in folders:
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder, **absent)
    found[folder] = [list(sample(pipeline).shape), str(pipeline.transformer.dtype), pipeline.scheduler.config.shift]
pipeline = StableDiffusion3Pipeline.from_pretrained(base, **absent)
before = sample(pipeline)
pipeline.load_lora_weights(adapters)
found["adapters"] = float(abs(sample(pipeline) - before).max())
assert "immiscible" not in sys.modules
print(json.dumps(found))
"""


def trained(script, folder: Path, program: str = FINETUNE, **changes) -> Path:
    result = script(tiny_sd3(folder, **changes), program=program)
    assert result.code == 0, result.stderr
    return folder


@pytest.fixture(scope="module")
def runs(script, tmp_path_factory):
    """From scratch with an average and a coupling, fine-tuned in bf16, and adapters of a checkpoint with T5."""
    folder = tmp_path_factory.mktemp("sd3")
    common = {"max_train_steps": 2, "validation_prompts": ["a cat", "two dogs"]}
    measured = {
        "eval_steps": 2,
        "eval_samples": 2,
        "eval_inference_steps": [1, 2],
        "eval_guidance_scales": [1, 3],
        "eval_data_dir": data_folder(8),
    }
    trained(script, folder / "scratch", SCRATCH, **common, **measured, use_ema=True, noise_coupling="assignment")
    trained(script, folder / "tuned", **common, mixed_precision="bf16", weighting_scheme="logit_normal")
    trained(script, folder / "adapters", **common, mixed_precision="bf16", use_lora=True, learning_rate=1.0)
    return folder


@pytest.mark.slow
def test_plain_diffusers_samples_what_is_left(runs):
    folders = [runs / name for name in ("scratch", "tuned")]
    command = [sys.executable, "-c", SAMPLE, model_folder(WITHOUT_T5), runs / "adapters", *folders]
    result = run_command(command, PYTHONSAFEPATH="1")
    assert result.code == 0, result.stderr
    found = json.loads(result.stdout)
    assert all(found[str(folder)] == [[32, 32, 3], "torch.float32", 3.0] for folder in folders)
    assert found["adapters"] > 1e-3


def test_a_run_leaves_what_the_pipeline_samples_as_in_its_grid(runs):
    from diffusers import StableDiffusion3Pipeline
    from PIL import Image

    pipeline = StableDiffusion3Pipeline.from_pretrained(runs / "scratch", text_encoder_3=None, tokenizer_3=None)
    pipeline.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 2, "output_type": "np", "guidance_scale": 7.5, "max_sequence_length": 77}
    image = pipeline("a cat", generator=seeded_generator(0, "sample", 0), **options).images[0]
    with Image.open(runs / "scratch" / "samples" / "step-0000002.png") as grid:
        shown = numpy.asarray(grid)[:64:2, :64:2]
    assert image.shape == shown.shape and numpy.abs(255 * image - shown).max() <= 1
    names = {path.name for path in (runs / "scratch").iterdir()}
    assert {"transformer", "text_encoder", "text_encoder_2", "tokenizer_2", "vae", "scheduler", "model_index.json"} <= names
    assert not names & {"text_encoder_3", "tokenizer_3", "pipeline.py", "unet"}
    saved = load_file(runs / "scratch" / "transformer" / "diffusion_pytorch_model.safetensors")
    average = load_file(runs / "scratch" / "checkpoint-2" / "transformer_ema" / "diffusion_pytorch_model.safetensors")
    base = load_file(model_folder(WITHOUT_T5) / "transformer" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(saved[name], average[name]) for name in saved)
    assert torch.equal(saved["pos_embed.pos_embed"], base["pos_embed.pos_embed"])  # not those of a checkpoint of the run's resolution
    for part in ("vae", "text_encoder_2"):  # exactly the checkpoint's, also after a run in bf16
        (one,), (other,) = ([*(folder / part).glob("*.safetensors")] for folder in (model_folder(WITHOUT_T5), runs / "tuned"))
        assert all(torch.equal(value, load_file(other)[name]) for name, value in load_file(one).items())


def test_adapters_are_saved_as_the_pipeline_loads_them(runs):
    with safe_open(runs / "adapters" / ADAPTERS, framework="pt") as file:
        assert all(name.startswith("transformer.transformer_blocks.") for name in file.keys())  # noqa: SIM118 (not a dict)
    card = (runs / "adapters" / "README.md").read_text()
    assert "StableDiffusion3Pipeline.from_pretrained" in card and "text_encoder_3=None, tokenizer_3=None" in card
    assert 'pipeline("a prompt", height=32, width=32, max_sequence_length=77)' in card
    assert "- sd3" in card


def test_a_run_is_measured_at_several_steps(runs):
    (line,) = [json.loads(text) for text in (runs / "scratch" / "evaluation.jsonl").read_text().splitlines()]
    distances = [line["frechet_distance"], line["frechet_distance_guided"]["3"]]
    assert all(found.keys() == {"1", "2"} and all(map(numpy.isfinite, found.values())) for found in distances)
    assert line["held_out_images"] == 8 and distances[0] != distances[1]


def test_adapters_of_other_networks_are_one_line(script, runs, tmp_path):
    from safetensors.torch import save_file

    (tmp_path / "prompts.txt").write_text("a cat\n")
    (tmp_path / "lora").mkdir()
    layer = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_{}.weight"
    save_file({layer.format("A"): torch.ones(2, 32), layer.format("B"): torch.ones(32, 2)}, tmp_path / "lora" / ADAPTERS)
    words = {"model": runs / "tuned", "prompts": tmp_path / "prompts.txt", "num_images": 1, "num_inference_steps": 1, "guidance_scale": 1}
    result = script(flags({**words, "lora": tmp_path / "lora", "output_dir": tmp_path / "out"}), program="scripts/sample.py")
    assert result.code == 1 and "--lora" in result.error and "adapters for this network" in result.error


@pytest.mark.slow
def test_a_run_says_what_law_it_has(script, runs, tmp_path):
    facts = json.loads((runs / "scratch" / "summary.json").read_text())
    assert facts["timestep_sampling"].startswith("uniform") and facts["noise_process"] == "flow (shift 3, 1000 steps)"
    said = script(tiny_sd3(tmp_path / "run", plan=True, max_train_steps=1), program=FINETUNE).stderr
    assert "--weighting_scheme logit_normal" in said
    for law in ({"weighting_scheme": "none"}, {"timestep_sampling": "logit_normal"}):
        assert "--weighting_scheme" not in script(tiny_sd3(tmp_path / "run", **law, plan=True), program=FINETUNE).stderr


@pytest.mark.slow
def test_runs_are_sampled_at_scale(script, runs, tmp_path):
    """A full run, its checkpoint and a run of adapters by scripts/sample.py."""
    (tmp_path / "prompts.txt").write_text("a cat\ntwo dogs\n")
    for name in ("tuned", "scratch/checkpoint-2", "adapters"):
        words = {"model": runs / name, "prompts": tmp_path / "prompts.txt", "num_images": 2, "num_inference_steps": 2, "guidance_scale": 3}
        result = script(flags({**words, "output_dir": tmp_path / name.replace("/", "-")}), program="scripts/sample.py")
        assert result.code == 0, result.stderr
        assert len([*(tmp_path / name.replace("/", "-")).glob("**/*.png")]) == 2


@pytest.mark.parametrize("changes", [{"use_lora": True}, pytest.param({"use_ema": True}, marks=pytest.mark.slow)], ids=["adapters", "full"])
def test_killed_and_resumed_is_never_killed(script, tmp_path, changes):
    common = {
        **changes,
        "checkpointing_steps": 2,
        "max_train_steps": 6,
        "random_flip": True,
        "proportion_empty_prompts": 0.2,
        "noise_coupling": "assignment",
        "coupling_window": 3,
        "weighting_scheme": "logit_normal",
        "resume_from_checkpoint": "latest",
        "mixed_precision": "bf16",
    }
    trained(script, tmp_path / "whole", **common)
    run = script.start(tiny_sd3(tmp_path / "run", **common), program=FINETUNE)
    lines = tmp_path / "run" / "metrics.jsonl"
    run.wait_until(lambda: lines.exists() and lines.read_text().count("\n") >= 3)
    run.send_group(signal.SIGKILL)
    assert run.wait().code == 128 + signal.SIGKILL
    trained(script, tmp_path / "run", **common)
    whole = final_hashes(tmp_path / "whole", 6)
    assert whole and final_hashes(tmp_path / "run", 6) == whole
    assert [line["loss"] for line in metrics(tmp_path / "run")] == [line["loss"] for line in metrics(tmp_path / "whole")]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_adapters_on_cached_buckets_are_killed_and_resumed(script, tmp_path, processes):
    common = {
        "use_lora": True,
        "train_data_dir": mixed_folder(),
        "buckets": "16,32;32,32;32,16",
        "center_crop": True,
        "cache_latents": True,
        "latent_cache_dir": tmp_path / "cache",
        "train_batch_size": 2 // processes,
        "noise_coupling": "assignment",
        "coupling_scope": "global",
        "weighting_scheme": "logit_normal",
        "checkpointing_steps": 2,
        "max_train_steps": 16,
        "resume_from_checkpoint": "latest",
    }
    finish([script.start(tiny_sd3(tmp_path / "x", **common), program="scripts/precompute_latents.py")])

    def begin(name: str):
        return start(script, tiny_sd3(tmp_path / name, **common), processes, program=FINETUNE)

    finish(begin("whole"))
    runs = begin("killed")
    runs[0].wait_until(lambda: lines(tmp_path / "killed") > 6)
    kill(runs)
    assert not (tmp_path / "killed" / "checkpoint-16").exists()
    finish(begin("killed"))
    whole = final_hashes(tmp_path / "whole", 16)
    assert whole and final_hashes(tmp_path / "killed", 16) == whole
    assert [line["loss"] for line in metrics(tmp_path / "killed")] == [line["loss"] for line in metrics(tmp_path / "whole")]


@pytest.mark.slow
def test_two_processes_with_half_the_batch_give_the_losses_of_one(script, tmp_path):
    common = {"max_train_steps": 4, "use_lora": True, "weighting_scheme": "mode", "train_data_dir": data_folder(32)}
    trained(script, tmp_path / "one", **common, train_batch_size=8)
    ranks = script.start_ranks(tiny_sd3(tmp_path / "two", **common, train_batch_size=4), program=FINETUNE)
    results = [run.wait() for run in ranks]
    assert [result.code for result in results] == [0, 0], results
    one, two = ([line["loss"] for line in metrics(tmp_path / name)] for name in ("one", "two"))
    assert len(one) == 4 and two == pytest.approx(one, rel=1e-5)


@pytest.mark.slow
def test_the_cache_gives_the_same_run_and_tells_lengths_apart(script, tmp_path):
    common = {"center_crop": True, "max_train_steps": 2, "noise_coupling": "assignment", "proportion_empty_prompts": 0.5}
    cached = {"cache_latents": True, "latent_cache_dir": tmp_path / "cache"}
    words = {name: value for name, value in common.items() if name != "max_train_steps"}
    result = script(tiny_sd3(tmp_path / "unused", **words, latent_cache_dir=tmp_path / "cache"), program="scripts/precompute_latents.py")
    assert result.code == 0, result.stderr
    assert "33 captions x 29.0 KiB" in result.stderr  # 154 states of 96 numbers and a pooled one of 80, in 16 bits
    trained(script, tmp_path / "cached", **common, **cached)
    trained(script, tmp_path / "plain", **common)
    losses = [[line["loss"] for line in metrics(tmp_path / name)] for name in ("cached", "plain")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    result = script(tiny_sd3(tmp_path / "other", **common, **cached, max_sequence_length=100), program=FINETUNE)
    assert result.code == 2 and "100 tokens of T5" in result.error
