"""Transformers that are told prompts: what ``train_text_to_image.py`` trains, leaves, samples and continues."""

import json
import re
import sys

import pytest
import torch
from kills import final_hashes, finish, kill, lines, start
from launch import run_command
from tiny_text import SCRATCH, model_folder, reach, tiny_text

from immiscible.networks.diffusion_transformers import TextDiTTransformer2DModel
from immiscible.randomness import Draws, seeded_generator
from immiscible.sampling.pipelines import TEXT_PIPELINE, TRANSFORMERS, sample_images
from immiscible.tasks.from_run import load_model

CPU = torch.device("cpu")
DIT = {"model_preset": "dit-tiny"}
PROMPTS = ["a cat", "two dogs"]
PLAIN = """
import sys, torch, numpy
from diffusers import DiffusionPipeline
folder, target = sys.argv[1:]
torch.set_num_threads(1)
pipeline = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
draws = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
images = pipeline(["a cat", "two dogs"], guidance_scale=3, num_inference_steps=3, generator=draws, output_type="np").images
numpy.save(target, images)
assert pipeline("a cat", guidance_scale=1, num_inference_steps=1).images[0].size == (32, 32)
assert not any(module.startswith("immiscible") for module in sys.modules)
"""


def test_it_is_told_the_pooled_states_and_the_empty_one_where_a_caption_is_dropped(monkeypatch, tmp_path):
    from transformers import CLIPTextModel, CLIPTokenizer

    from immiscible.data.batches import Images

    words = tiny_text(tmp_path / "run", **DIT, proportion_empty_prompts=0.25, noise_coupling="assignment", coupling_condition="centered")
    reached = reach(monkeypatch, words, from_scratch=True, steps=1)
    network = reached.accelerator.unwrap_model(reached.model)
    assert type(network) is TextDiTTransformer2DModel and network.config.sample_size == 4
    assert reached.task.identity["transformer"]["text_width"] == network.config.text_width and reached.task.part == "transformer"
    captions = ["a cat", "two dogs"] * 32
    encoded = reached.encode(Images(torch.zeros(64, 3, 32, 32), captions=captions), Draws(0, 0, 0, CPU))
    (states,) = encoded.condition.values()
    tokens = CLIPTokenizer.from_pretrained(model_folder(), subfolder="tokenizer")(
        ["a cat", "two dogs", ""], max_length=77, padding="max_length", return_tensors="pt"
    )
    encoder = CLIPTextModel.from_pretrained(model_folder(), subfolder="text_encoder")
    with torch.no_grad():
        own, other, empty = encoder(tokens.input_ids).pooler_output
    expected = torch.stack([own, other] * 32)
    dropped = (states - empty).abs().amax(1) < 1e-5
    assert 4 < dropped.sum() < 30
    torch.testing.assert_close(states, torch.where(dropped[:, None], empty, expected))
    assert torch.equal(encoded.labels, states) and reached.pairs[0].labels.shape == (4, states.shape[1])  # for couplings, too
    changed = [name for name, value in reached.after.items() if not torch.equal(value, reached.before[name])]
    assert changed and reached.losses[0] > 0.5


def trained(script, folder, **changes):
    done = script(tiny_text(folder, **DIT, **changes), program=SCRATCH)
    assert done.code == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def run(script, tmp_path_factory):
    """A run with an average, grids and measurements."""
    folder = tmp_path_factory.mktemp("text-dit") / "run"
    measured = {"eval_steps": 4, "eval_samples": 4, "eval_inference_steps": 2, "validation_split": 0.25, "eval_guidance_scales": [1, 0.75]}
    words = {"use_ema": True, "learning_rate": 1e-2, "validation_prompts": PROMPTS, "checkpointing_steps": 2, "guidance_scale": 3}
    trained(script, folder, **words, **measured, proportion_empty_prompts=0.2)
    return folder


@pytest.mark.slow
def test_plain_diffusers_samples_what_a_run_leaves(run, tmp_path):
    import numpy

    assert (run / "pipeline.py").read_bytes() == TEXT_PIPELINE.read_bytes()
    assert (run / "transformer" / TRANSFORMERS.name).read_bytes() == TRANSFORMERS.read_bytes() and not (run / "unet").exists()
    plain = run_command([sys.executable, "-P", "-c", PLAIN, run, tmp_path / "images.npy"], HF_MODULES_CACHE=str(tmp_path / "modules"))
    assert plain.code == 0, plain.stderr
    pipeline = load_model(str(run)).pipeline
    draws = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    images = pipeline(PROMPTS, guidance_scale=3, num_inference_steps=3, generator=draws, output_type="np").images
    assert abs(images - numpy.load(tmp_path / "images.npy")).max() < 1e-5


def test_a_run_is_measured_sampled_and_described(script, run, tmp_path):
    line = json.loads((run / "evaluation.jsonl").read_text().splitlines()[-1])
    assert line["frechet_distance_guided"]["0.75"].keys() == {"2"} and len(line["validation_loss"]) == 10
    assert len(list((run / "samples").glob("*.png"))) == 1
    for weights in ("ema", "raw"):
        found = load_model(str(run / "checkpoint-4"), weights=weights).pipeline
        images = sample_images(found, 2, steps=2, seed=0, batch_size=2, device=CPU, prompts=PROMPTS, guidance_scale=3)
        assert images.shape == (2, 32, 32, 3) and images.std() > 1
    one, other = (load_model(str(folder)).pipeline.transformer.state_dict() for folder in (run, run / "checkpoint-4"))
    assert all(torch.equal(one[name], other[name]) for name in one)  # the averages
    (tmp_path / "prompts.txt").write_text("a cat\ntwo dogs\n")
    words = ["--model", run, "--num_images", 3, "--num_inference_steps", 2, "--prompts", tmp_path / "prompts.txt", "--scheduler", "ddpm"]
    words += ["--output_dir", tmp_path / "samples", "--guidance_scale", 0.75]
    sampled = script(words, program="scripts/sample.py")
    assert sampled.code == 0 and len(list((tmp_path / "samples").glob("*.png"))) == 3, sampled.stderr
    refused = script([*words[:-3], tmp_path / "other", "--guidance_scale", 2, "--resolution", 64], program="scripts/sample.py")
    assert refused.code == 2 and "--resolution 64: this network has one size, 32" in refused.error
    card = (run / "README.md").read_text()
    assert "pooled_projections" in card and "random, of dit-tiny" in card and "stable-diffusion" not in card.partition("# run")[0]
    (example,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert "custom_pipeline" in example and "](samples/step-0000004.png)" in card


def test_guidance_is_away_from_the_empty_prompt(run):
    """A step of DDIM, by hand."""
    from diffusers import DDIMScheduler

    pipeline = load_model(str(run)).pipeline
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    image = pipeline(
        "a cat", guidance_scale=2.5, num_inference_steps=1, generator=seeded_generator(0, "sample", 0), output_type="pt"
    ).images
    noise = torch.randn(1, 4, 4, 4, generator=seeded_generator(0, "sample", 0))
    told, empty = (pipeline.pooled([text]) for text in ("a cat", ""))
    t = pipeline.scheduler.timesteps
    with torch.no_grad():
        away, towards = (pipeline.transformer(noise, t, pooled_projections=each).sample for each in (empty, told))
        latent = pipeline.scheduler.step(away + 2.5 * (towards - away), t[0], noise).prev_sample
        expected = pipeline.vae.decode(latent / pipeline.vae.config.scaling_factor).sample / 2 + 0.5
    assert (away - towards).abs().max() > 1e-4
    torch.testing.assert_close(image, expected.clamp(0, 1), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="generator holds 1 generators for 2 images"):
        pipeline(PROMPTS, generator=[seeded_generator(0, "sample", 0)])


@pytest.mark.slow
def test_killed_and_resumed_it_is_what_it_would_have_been(script, tmp_path):
    common = {**DIT, "use_ema": True, "proportion_empty_prompts": 0.2, "noise_coupling": "assignment", "max_train_steps": 8}
    common |= {"resume_from_checkpoint": "latest", "mixed_precision": "bf16"}
    options = {"program": SCRATCH}
    finish(start(script, tiny_text(tmp_path / "whole", **common, checkpointing_steps=100), 1, **options))
    folder = tmp_path / "killed"
    argv = tiny_text(folder, **common, checkpointing_steps=3)
    runs = start(script, argv, 1, **options)
    runs[0].wait_until(lambda: lines(folder) > 4)
    kill(runs)
    finish(start(script, argv, 1, **options))
    assert final_hashes(folder, 8) == final_hashes(tmp_path / "whole", 8)
