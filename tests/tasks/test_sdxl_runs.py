"""SDXL in ``finetune_sd.py`` and ``train_text_to_image.py``: its step, what it leaves, and what goes on from there."""

import hashlib
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from bucketed import BUCKETS, SHAPES, mixed_folder
from kills import finish, kill, lines, start
from latent_caches import PRECOMPUTE
from launch import flags, run_command
from safetensors.torch import load_file
from tiny_text import ADAPTERS, FINETUNE, SCRATCH, WEIGHTS, data_folder, model_folder, reach, tiny_text

from immiscible.errors import UserError

SAMPLE = """
import json, sys
import torch
from diffusers import StableDiffusionXLPipeline
torch.set_num_threads(1)
base, adapters, whole = sys.argv[1:]
def sample(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline("a cat", num_inference_steps=3, generator=torch.Generator().manual_seed(0), output_type="np").images[0]
pipeline = StableDiffusionXLPipeline.from_pretrained(whole)
parts = (pipeline.unet, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2)
found = {"shape": list(sample(pipeline).shape), "dtypes": sorted({str(part.dtype) for part in parts})}
found["zeros"] = pipeline.config.force_zeros_for_empty_prompt
pipeline = StableDiffusionXLPipeline.from_pretrained(base)
before = sample(pipeline)
pipeline.load_lora_weights(adapters)
found["adapters"] = float(abs(sample(pipeline) - before).max())
assert "immiscible" not in sys.modules
print(json.dumps(found))
"""


def xl(output_dir, **changes):
    return tiny_text(output_dir, **{"pretrained_model_name_or_path": model_folder("xl"), **changes})


def trained(script, folder: Path, program: str = FINETUNE, **changes) -> Path:
    result = script(xl(folder, **changes), program=program)
    assert result.code == 0, result.stderr
    return folder


def hashes(folder: Path, step: int) -> dict[str, str]:
    files = sorted((folder / f"checkpoint-{step}").rglob("*.safetensors"))
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# One step


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_with_every_method_off_a_step_is_diffusers_sdxl_script(monkeypatch, tmp_path, prediction_type):
    """On the latents, noises, timesteps, text states and sizes of the run's first step, in the order of that script's sums."""
    from diffusers import DDPMScheduler, UNet2DConditionModel

    reached = reach(monkeypatch, xl(tmp_path / "run", prediction_type=prediction_type), steps=1)
    (pairs,) = reached.pairs
    unet = UNet2DConditionModel.from_pretrained(model_folder("xl"), subfolder="unet").train()
    scheduler = DDPMScheduler.from_pretrained(model_folder("xl"), subfolder="scheduler")
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-3, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8)
    added = {"time_ids": pairs.condition["time_ids"], "text_embeds": pairs.condition["text_embeds"]}
    noisy = scheduler.add_noise(pairs.x0, pairs.noise, pairs.timesteps)
    states = pairs.condition["encoder_hidden_states"]
    output = unet(noisy, pairs.timesteps, states, added_cond_kwargs=added, return_dict=False)[0]
    velocity = prediction_type == "v_prediction"
    target = scheduler.get_velocity(pairs.x0, pairs.noise, pairs.timesteps) if velocity else pairs.noise
    loss = torch.nn.functional.mse_loss(output.float(), target.float(), reduction="mean")
    loss.backward()
    torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
    optimizer.step()
    assert reached.losses[0] == pytest.approx(float(loss.detach()), rel=1e-6)
    for name, value in unet.state_dict().items():
        torch.testing.assert_close(reached.after[name], value, rtol=0, atol=1e-6)


def test_the_sizes_are_those_of_the_scripts_crop(monkeypatch, tmp_path):
    """Images of 40 x 48, of which the short side becomes 32: what that leaves of the long one is cut off above or below."""
    (pairs,) = reach(monkeypatch, xl(tmp_path / "run"), steps=1).pairs
    ids = pairs.condition["time_ids"]
    assert ids.dtype == torch.float32 and ids[:, :2].tolist() == [[48, 40]] * 4 and ids[:, 4:].tolist() == [[32, 32]] * 4
    assert len(set(ids[:, 2].tolist())) > 1 and set(ids[:, 2].tolist()) <= set(range(7)) and not ids[:, 3].any()
    (middle,) = reach(monkeypatch, xl(tmp_path / "run", center_crop=True), steps=1).pairs
    assert middle.condition["time_ids"].tolist() == [[48, 40, 3, 0, 32, 32]] * 4


def test_in_buckets_the_network_is_told_the_size_of_each(monkeypatch, tmp_path):
    reached = reach(monkeypatch, xl(tmp_path / "run", train_data_dir=mixed_folder(), **BUCKETS), steps=2)
    shapes = {tuple(8 * side for side in pairs.x0.shape[2:]) for pairs in reached.pairs}
    assert len(shapes) > 1
    for pairs in reached.pairs:
        ids = pairs.condition["time_ids"].int()
        assert ids[:, 4:].tolist() == [[8 * side for side in pairs.x0.shape[2:]]] * 2
        assert all(tuple(size) in SHAPES for size in ids[:, :2].tolist())


def test_adapters_are_of_the_attention_and_change_nothing_at_first(monkeypatch, tmp_path):
    reached = reach(monkeypatch, xl(tmp_path / "run", use_lora=True, rank=2, mixed_precision="bf16"), steps=1)
    full = reach(monkeypatch, xl(tmp_path / "run", mixed_precision="bf16"), steps=1)
    trained_names = {name for name, value in reached.after.items() if not torch.equal(value, reached.before[name])}
    assert trained_names and all("lora" in name and re.search(r"\.to_(q|k|v|out\.0)\.", name) for name in trained_names)
    assert reached.losses[0] == pytest.approx(full.losses[0], rel=2e-2)  # bf16 weights against fp32 ones
    assert reached.encode.parts.vae.dtype == torch.float32


# What a run leaves


@pytest.fixture(scope="module")
def runs(script, tmp_path_factory):
    """A fine-tuned run with an average, and adapters, each in bf16; both are of four steps, the second of which left a checkpoint."""
    folder = tmp_path_factory.mktemp("xl")
    common = {"checkpointing_steps": 2, "mixed_precision": "bf16", "noise_coupling": "assignment", "proportion_empty_prompts": 0.2}
    common["validation_prompts"] = ["a cat"]
    trained(script, folder / "full", **common, use_ema=True, learning_rate=1e-2)
    trained(script, folder / "adapters", **common, use_lora=True, learning_rate=1.0)
    return folder


@pytest.mark.slow
def test_plain_diffusers_samples_what_is_left(runs):
    result = run_command([sys.executable, "-c", SAMPLE, model_folder("xl"), runs / "adapters", runs / "full"], PYTHONSAFEPATH="1")
    assert result.code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found == {"shape": [32, 32, 3], "dtypes": ["torch.float32"], "zeros": True, "adapters": found["adapters"]}
    assert found["adapters"] > 1e-3
    for part in ("vae", "text_encoder", "text_encoder_2"):  # exactly the checkpoint's, after a run in bf16
        (one,), (other,) = ([*(folder / part).glob("*.safetensors")] for folder in (model_folder("xl"), runs / "full"))
        one, other = load_file(one), load_file(other)
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    card = (runs / "full" / "README.md").read_text()
    assert "StableDiffusionXLPipeline.from_pretrained" in card and "- stable-diffusion-xl\n" in card
    assert "pipeline.load_lora_weights" in (runs / "adapters" / "README.md").read_text()
    assert [path.name for path in (runs / "adapters").glob("*.safetensors")] == [ADAPTERS]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["full", "adapters"])
def test_a_run_and_its_checkpoints_are_sampled_again(runs, name):
    from immiscible.sampling.pipelines import sample_images
    from immiscible.tasks.from_run import load_model

    options = {"steps": 2, "seed": 0, "batch_size": 2, "device": torch.device("cpu"), "prompts": ["a cat"], "guidance_scale": 7.5}
    finished, last, earlier = (
        sample_images(load_model(str(runs / name / place)).pipeline, 2, **options) for place in (".", "checkpoint-4", "checkpoint-2")
    )
    assert finished.shape == (2, 32, 32, 3) and (finished == last).all() and (finished != earlier).any()


def test_stopped_and_resumed_is_never_stopped(script, tmp_path, runs):
    common = {"checkpointing_steps": 2, "mixed_precision": "bf16", "noise_coupling": "assignment", "proportion_empty_prompts": 0.2}
    common |= {"use_lora": True, "learning_rate": 1.0, "resume_from_checkpoint": runs / "adapters" / "checkpoint-2"}
    trained(script, tmp_path / "run", **common, validation_prompts=["a cat"])
    assert hashes(tmp_path / "run", 4) == hashes(runs / "adapters", 4) != {}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "processes", "cached"),
    [
        ({"use_ema": True}, 1, False),
        ({"use_lora": True}, 1, False),
        ({"use_lora": True}, 2, False),
        ({"use_lora": True, **BUCKETS}, 1, True),
    ],
    ids=["full", "adapters", "two", "buckets"],
)
def test_an_sdxl_run_that_is_killed_and_resumed_is_never_killed(script, tmp_path, changes, processes, cached):
    common = {
        "checkpointing_steps": 2,
        "max_train_steps": 12,
        "gradient_accumulation_steps": 2,
        "random_flip": True,
        "proportion_empty_prompts": 0.2,
        "noise_coupling": "assignment",
        "coupling_window": 3,
        "resume_from_checkpoint": "latest",
        "mixed_precision": "bf16",
        "train_data_dir": mixed_folder(),
        **changes,
    }
    if cached:
        common |= {"cache_latents": True, "latent_cache_dir": tmp_path / "cache", "center_crop": True}
        finish([script.start([*xl(tmp_path / "x", **common), "--rows_per_shard", 4], program=PRECOMPUTE)])
    finish(start(script, xl(tmp_path / "whole", **common), processes, program=FINETUNE))
    begun = start(script, xl(tmp_path / "run", **common), processes, program=FINETUNE)
    begun[0].wait_until(lambda: lines(tmp_path / "run") >= 5)
    kill(begun)
    assert not (tmp_path / "run" / "summary.json").exists()
    finish(start(script, xl(tmp_path / "run", **common), processes, program=FINETUNE))
    whole = hashes(tmp_path / "whole", 12)
    assert hashes(tmp_path / "run", 12) == whole and len(whole) == (2 if "use_ema" in changes else 1)


@pytest.mark.slow
def test_from_random_weights_samples_are_guided_away_from_the_empty_caption(script, tmp_path):
    folder = trained(script, tmp_path / "run", SCRATCH, max_train_steps=1, prediction_type="v_prediction")
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionXLPipeline" and index["force_zeros_for_empty_prompt"] is False
    fresh, own = (load_file(path / "unet" / WEIGHTS) for path in (folder, model_folder("xl")))
    assert fresh.keys() == own.keys() and not torch.equal(fresh["conv_in.weight"], own["conv_in.weight"])
    assert json.loads((folder / "scheduler" / "scheduler_config.json").read_text())["prediction_type"] == "v_prediction"


# The cache


def test_cached_latents_texts_and_sizes_are_those_of_the_uncached_run(monkeypatch, tmp_path, capsys, caplog):
    from precompute_latents import main as precompute

    common = {"center_crop": True, "random_flip": True}
    cache = {"latent_cache_dir": tmp_path / "cache", "resolution": 32, **common}
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    precompute(flags({"pretrained_model_name_or_path": model_folder("xl"), "train_data_dir": data_folder(), **cache}))
    assert "33 captions x 12.1 KiB" in caplog.text + capsys.readouterr().err  # 77 x 80 numbers and 40, of two bytes
    plain, cached = (
        reach(monkeypatch, xl(tmp_path / "run", **common, **more), steps=2)
        for more in ({}, {"cache_latents": True, "latent_cache_dir": tmp_path / "cache"})
    )
    for one, other in zip(plain.pairs, cached.pairs, strict=True):
        assert one.condition.keys() == other.condition.keys()
        assert torch.equal(one.condition["time_ids"], other.condition["time_ids"])
        for name in ("encoder_hidden_states", "text_embeds"):
            torch.testing.assert_close(one.condition[name], other.condition[name], rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(one.x0, other.x0, rtol=5e-3, atol=5e-3)


# What is refused or said


def test_adapters_of_another_family_are_one_line(monkeypatch, tmp_path, runs):
    changes = {"use_lora": True, "learning_rate": 1.0, "mixed_precision": "bf16", "noise_coupling": "assignment"}
    changes["resume_from_checkpoint"] = runs / "adapters" / "checkpoint-2"
    with pytest.raises(UserError, match=r"belongs to another run.*addition_embed_type"):
        reach(monkeypatch, tiny_text(tmp_path / "run", **changes, proportion_empty_prompts=0.2))


def test_the_default_resolution_is_told_to_be_another_familys(monkeypatch, tmp_path, caplog):
    with pytest.raises(UserError, match="16 images do not fill"):
        reach(monkeypatch, xl(tmp_path / "run", resolution=None, train_batch_size=17, noise_coupling="assignment"))
    assert "diffusers' scripts for a Stable Diffusion XL checkpoint take 1024" in caplog.text
