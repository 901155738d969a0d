"""``train_text_to_image.py`` and ``finetune_sd.py``: the objective against diffusers', and what the scripts leave."""

import hashlib
import json
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
import yaml
from launch import run_command
from PIL import Image
from safetensors.torch import load_file
from tiny_text import Reached, class_folder, data_folder, model_folder, reach, tiny_text

from immiscible.errors import UserError

SCRATCH, FINETUNE = "train_text_to_image.py", "finetune_sd.py"
WEIGHTS, ADAPTERS = "diffusion_pytorch_model.safetensors", "pytorch_lora_weights.safetensors"


def unet_of(reached: Reached):
    return reached.accelerator.unwrap_model(reached.model)


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def trained(script, folder: Path, program: str = FINETUNE, **changes) -> Path:
    result = script(tiny_text(folder, **changes), program=program)
    assert result.code == 0, result.stderr
    return folder


# The weights that training starts from


def test_finetuning_starts_from_the_pretrained_network(monkeypatch, tmp_path):
    from diffusers import UNet2DConditionModel

    pretrained = UNet2DConditionModel.from_pretrained(model_folder(), subfolder="unet")
    reached = reach(monkeypatch, tiny_text(tmp_path / "run"))
    assert unet_of(reached).training and all(weight.requires_grad for weight in unet_of(reached).parameters())
    found, expected = reached.before, pretrained.state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    same = {name: value for name, value in pretrained.config.items() if not name.startswith("_")}
    assert {name: unet_of(reached).config[name] for name in same} == {**same, "sample_size": 4}  # that of the run's resolution


def test_from_scratch_has_the_configuration_and_fresh_weights_of_the_seed(monkeypatch, tmp_path):
    reached = [reach(monkeypatch, tiny_text(tmp_path / "run", seed=seed), from_scratch=True).before for seed in (0, 0, 1)]
    pretrained = load_file(model_folder() / "unet" / WEIGHTS)
    assert {name: value.shape for name, value in reached[0].items()} == {name: value.shape for name, value in pretrained.items()}
    first = "conv_in.weight"
    assert torch.equal(reached[0][first], reached[1][first])
    assert not torch.equal(reached[0][first], reached[2][first]) and not torch.equal(reached[0][first], pretrained[first])


def test_adapters_are_of_the_rank_and_change_nothing_at_first(monkeypatch, tmp_path):
    reached = reach(monkeypatch, tiny_text(tmp_path / "run", use_lora=True, rank=2))
    pretrained = load_file(model_folder() / "unet" / WEIGHTS)
    weights = dict(unet_of(reached).named_parameters())
    adapters = {name: weight for name, weight in weights.items() if "lora" in name}
    assert all(weight.requires_grad == (name in adapters) for name, weight in weights.items())
    assert all(min(weight.shape) == 2 for weight in adapters.values())
    assert all(not weight.any() for name, weight in adapters.items() if "lora_B" in name)
    assert all(torch.equal(weight, pretrained[name.replace(".base_layer", "")]) for name, weight in weights.items() if name not in adapters)


# One step, written directly against diffusers


def plain_step(reached: Reached, scheduler, unet) -> float:
    """One step of diffusers' train_text_to_image.py on the latents, noises, timesteps and captions of the run's first."""
    (pairs,) = reached.pairs
    noisy = scheduler.add_noise(pairs.x0, pairs.noise, pairs.timesteps)
    target = pairs.noise
    if scheduler.config.prediction_type == "v_prediction":
        target = scheduler.get_velocity(pairs.x0, pairs.noise, pairs.timesteps)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-3, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8)
    output = unet(noisy, pairs.timesteps, pairs.condition["encoder_hidden_states"], return_dict=False)[0]
    loss = torch.nn.functional.mse_loss(output.float(), target.float(), reduction="mean")
    loss.backward()
    torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
    optimizer.step()
    return float(loss)


@pytest.mark.parametrize("version", [1, 2])
def test_with_every_method_off_a_step_is_the_diffusers_example(monkeypatch, tmp_path, version):
    from diffusers import DDPMScheduler, UNet2DConditionModel

    words = tiny_text(tmp_path / "run", pretrained_model_name_or_path=model_folder(version))
    reached = reach(monkeypatch, words, steps=1)
    unet = UNet2DConditionModel.from_pretrained(model_folder(version), subfolder="unet").train()
    scheduler = DDPMScheduler.from_pretrained(model_folder(version), subfolder="scheduler")
    assert scheduler.config.prediction_type == ("epsilon" if version == 1 else "v_prediction")
    loss = plain_step(reached, scheduler, unet)
    assert reached.losses[0] == pytest.approx(loss, rel=1e-6)
    for name, value in unet.state_dict().items():
        torch.testing.assert_close(reached.after[name], value, rtol=0, atol=1e-6)
        assert not torch.equal(value, reached.before[name]) or not value.is_floating_point(), name


def test_latents_and_text_states_are_the_checkpoints(monkeypatch, tmp_path):
    from diffusers import AutoencoderKL
    from transformers import CLIPTextModel, CLIPTokenizer

    from immiscible.data import Images
    from immiscible.randomness import Draws

    reached, draws = reach(monkeypatch, tiny_text(tmp_path / "run")), Draws(3, 5, 0, torch.device("cpu"))
    images, captions = torch.rand(4, 3, 32, 32) * 2 - 1, ["a cat", "", "many " * 40, "two dogs"]
    encoded = reached.encode(Images(images, captions=captions), draws)
    vae = AutoencoderKL.from_pretrained(model_folder(), subfolder="vae")
    tokenizer = CLIPTokenizer.from_pretrained(model_folder(), subfolder="tokenizer")
    words = tokenizer(captions, max_length=tokenizer.model_max_length, padding="max_length", truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        posterior = vae.encode(images).latent_dist
        states = CLIPTextModel.from_pretrained(model_folder(), subfolder="text_encoder")(words, return_dict=False)[0]
    x0 = (posterior.mean + posterior.std * draws.normal("latent", 4, 4, 4, 4)) * vae.config.scaling_factor
    torch.testing.assert_close(encoded.x0, x0)
    torch.testing.assert_close(encoded.condition["encoder_hidden_states"], states)
    assert encoded.x0.dtype == torch.float32 and not encoded.x0.requires_grad


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_snr_gamma_is_the_diffusers_formula(monkeypatch, tmp_path, prediction_type):
    from diffusers import DDPMScheduler
    from diffusers.training_utils import compute_snr

    reached = reach(monkeypatch, tiny_text(tmp_path / "run", snr_gamma=5, prediction_type=prediction_type))
    scheduler = DDPMScheduler.from_pretrained(model_folder(), subfolder="scheduler")
    snr = compute_snr(scheduler, torch.arange(1000))
    expected = snr.clamp(max=5) / (snr if prediction_type == "epsilon" else snr + 1)
    torch.testing.assert_close(reached.objective.weights, expected, rtol=2e-4, atol=0)  # diffusers' fp32 against float64


def test_snr_gamma_and_another_weighting_is_an_error(monkeypatch, tmp_path):
    with pytest.raises(UserError, match="--snr_gamma belongs to --loss_weighting min_snr, not to p2"):
        reach(monkeypatch, tiny_text(tmp_path / "run", snr_gamma=5, loss_weighting="p2"))


@pytest.mark.parametrize("power", [1.0, 2.5])
def test_dream_is_diffusers(monkeypatch, tmp_path, power):
    from diffusers import DDPMScheduler, UNet2DConditionModel
    from diffusers.training_utils import compute_dream_and_update_latents

    words = tiny_text(tmp_path / "run", dream_training=True, dream_detail_preservation=power)
    reached = reach(monkeypatch, words, steps=1)
    (pairs,) = reached.pairs
    unet = UNet2DConditionModel.from_pretrained(model_folder(), subfolder="unet").train()
    scheduler = DDPMScheduler.from_pretrained(model_folder(), subfolder="scheduler")
    states, noisy = pairs.condition["encoder_hidden_states"], scheduler.add_noise(pairs.x0, pairs.noise, pairs.timesteps)
    noisy, target = compute_dream_and_update_latents(unet, scheduler, pairs.timesteps, pairs.noise, noisy, pairs.noise, states, power)
    loss = torch.nn.functional.mse_loss(unet(noisy, pairs.timesteps, states).sample, target)
    assert reached.losses[0] == pytest.approx(float(loss), rel=1e-6)
    with pytest.raises(UserError, match="--dream_training needs epsilon-prediction"):
        reach(monkeypatch, tiny_text(tmp_path / "run", dream_training=True, pretrained_model_name_or_path=model_folder(2)))


def test_offset_and_perturbation_are_the_examples(monkeypatch, tmp_path):
    """The offset is in the noise and so in the target; the perturbation is in what the network sees alone."""
    from diffusers import DDPMScheduler, UNet2DConditionModel

    from immiscible.randomness import Draws

    reached = reach(monkeypatch, tiny_text(tmp_path / "run", noise_offset=0.5, input_perturbation=0.25), steps=1)
    (pairs,) = reached.pairs
    draws = Draws(0, 0, 0, torch.device("cpu"))
    noise = pairs.noise + 0.5 * draws.normal("noise_offset", 4, 4, 1, 1)
    perturbed = noise + 0.25 * draws.normal("input_perturbation", *noise.shape)
    unet = UNet2DConditionModel.from_pretrained(model_folder(), subfolder="unet")
    noisy = DDPMScheduler.from_pretrained(model_folder(), subfolder="scheduler").add_noise(pairs.x0, perturbed, pairs.timesteps)
    output = unet(noisy, pairs.timesteps, pairs.condition["encoder_hidden_states"]).sample
    assert reached.losses[0] == pytest.approx(float(torch.nn.functional.mse_loss(output, noise)), rel=1e-6)


# Averages and adapters


def test_offloaded_and_foreach_averages_are_the_plain_one(monkeypatch, tmp_path):
    kinds = [{}, {"offload_ema": True}, {"foreach_ema": True}, {"offload_ema": True, "foreach_ema": True}]
    averages = []
    for kind in kinds:
        reached = reach(monkeypatch, tiny_text(tmp_path / "run", use_ema=True, **kind), steps=3)
        averages.append(reached.ema.shadow_params)
        assert reached.ema.foreach == ("foreach_ema" in kind) and all(weight.device.type == "cpu" for weight in reached.ema.shadow_params)
    for average in averages[1:]:
        for one, other in zip(averages[0], average, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-7)
    assert any(not torch.equal(one, other) for one, other in zip(averages[0], reached.after.values(), strict=True))


def test_adapters_stay_fp32_under_bf16_and_alone_are_trained(monkeypatch, tmp_path):
    words = tiny_text(tmp_path / "run", use_lora=True, mixed_precision="bf16", max_grad_norm=1e-3)
    reached = reach(monkeypatch, words, steps=2)
    adapters = {name for name in reached.after if "lora" in name}
    assert {reached.after[name].dtype for name in adapters} == {torch.float32}
    assert {value.dtype for name, value in reached.after.items() if name not in adapters} == {torch.bfloat16}
    states = [value for state in reached.optimizer.state.values() for value in state.values()]
    assert {value.dtype for value in states} == {torch.float32}
    changed = {name for name, value in reached.after.items() if not torch.equal(value, reached.before[name])}
    assert changed == adapters
    assert reached.grad_norms == pytest.approx([1e-3, 1e-3], rel=1e-3)  # diffusers' example clips nothing
    free = reach(monkeypatch, tiny_text(tmp_path / "run", use_lora=True, mixed_precision="bf16"), steps=1)
    assert free.grad_norms[0] > 1e-2


# Captions


def test_captions_are_drawn_and_dropped(monkeypatch, tmp_path):
    """Each epoch takes one of an image's captions, and the wanted share of them is left out."""
    from immiscible.data import Images
    from immiscible.randomness import Draws

    reached = reach(monkeypatch, tiny_text(tmp_path / "run", proportion_empty_prompts=0.25))
    seen = [caption for batch in reached.batches for caption in batch.captions]
    assert len(seen) == 16 and len(set(seen)) == 16 and {caption.split()[0] for caption in seen} == {"thing", "a"}
    assert sorted(int(caption.split()[1]) for caption in seen) == list(range(16))
    images, captions = torch.zeros(64, 3, 32, 32), ["a cat"] * 64
    batch = Images(images, captions=captions)
    steps = [reached.encode(batch, Draws(0, step, 0, torch.device("cpu"))) for step in range(8)]
    states = torch.cat([encoded.condition["encoder_hidden_states"] for encoded in steps])
    full, empty = (reached.encode.texts([caption])[0] for caption in ("a cat", ""))
    is_empty, is_full = ((states - kind).abs().flatten(1).amax(1) < 1e-5 for kind in (empty, full))
    assert bool((is_empty ^ is_full).all())
    assert float(is_empty.float().mean()) == pytest.approx(0.25, abs=0.08)  # 4 standard deviations of 512 draws


NAMES = ["crane", "dog", "crane, machine", "maillot"]


def notices(script, folder: Path, **changes) -> str:
    """What a run says before its first step."""
    result = script(tiny_text(folder, **changes, plan=True, max_train_steps=1), program=FINETUNE)
    assert result.code == 0, result.stderr
    return result.stderr


def test_class_names_become_prompts_by_number(script, monkeypatch, tmp_path):
    data = class_folder(tmp_path / "data", NAMES)
    common = {"train_data_dir": data, "caption_column": "kind", "noise_coupling": "assignment"}
    said = notices(script, tmp_path / "run", **common)
    assert "which of 4 classes is wanted" in said and "each caption counts" not in said
    reached = reach(monkeypatch, tiny_text(tmp_path / "run", **common))
    for batch in reached.batches:
        greys = ((batch.x0.mean((1, 2, 3)) + 1) / 2 * len(NAMES)).round().int()
        assert batch.captions == [NAMES[grey] for grey in greys]
    assert "classes is wanted" not in notices(script, tmp_path / "run", **common, coupling_condition="within")
    reached = reach(monkeypatch, tiny_text(tmp_path / "run", **common, coupling_condition="within"), steps=4)
    assert {int(label) for pairs in reached.pairs for label in pairs.labels} == {0, 1, 2, 3}


def test_coupling_conditions_look_at_captions(script, monkeypatch, tmp_path):
    common = {"noise_coupling": "assignment", "train_batch_size": 8}
    assert "each caption counts as a class" in notices(script, tmp_path / "run", **common)
    assert "counts as a class" not in notices(script, tmp_path / "run", **common, coupling_condition="centered")
    assert "counts as a class" not in notices(script, tmp_path / "run")
    plain = reach(monkeypatch, tiny_text(tmp_path / "run", **common), steps=2)
    assert plain.pairs[0].labels is None
    for condition in ("centered", "penalty"):
        words = tiny_text(tmp_path / "run", **common, coupling_condition=condition, coupling_condition_ratio=0.0)
        reached = reach(monkeypatch, words, steps=2)
        assert reached.pairs[0].labels.shape == (8, reached.pairs[0].condition["encoder_hidden_states"].shape[-1])
        assert any(not torch.equal(one.noise, other.noise) for one, other in zip(plain.pairs, reached.pairs, strict=True)), condition
    with pytest.raises(UserError, match="--label_column 'text' is not a column of classes"):
        reach(monkeypatch, tiny_text(tmp_path / "run", **common, coupling_condition="within"))


# What a run leaves


SAMPLE = """
import json, sys, warnings
import torch
from diffusers import StableDiffusionPipeline
torch.set_num_threads(1)
base, adapters, *folders = sys.argv[1:]
found = {}
def sample(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipeline("a cat", num_inference_steps=3, generator=generator, output_type="np", height=32, width=32).images[0]
for folder in folders:
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    dtypes = {str(part.dtype) for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder)}
    trained = [pipeline.scheduler.config.prediction_type, pipeline.unet.config.sample_size]
    found[folder] = [list(sample(pipeline).shape), sorted(dtypes), *trained]
pipeline = StableDiffusionPipeline.from_pretrained(base)
before = sample(pipeline)
pipeline.load_lora_weights(adapters)
found["adapters"] = float(abs(sample(pipeline) - before).max())
assert "immiscible" not in sys.modules
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def runs(script, tmp_path_factory):
    """A run of each kind: from scratch with an average, fine-tuned in bf16 to predict v or x0, and adapters in bf16."""
    folder = tmp_path_factory.mktemp("text")
    common = {"checkpointing_steps": 2, "max_train_steps": 3, "validation_prompts": ["a cat", "a dog", "two dogs"]}
    trained(script, folder / "scratch", SCRATCH, **common, use_ema=True, noise_coupling="assignment")
    bf16 = {**common, "mixed_precision": "bf16"}
    trained(script, folder / "tuned", **bf16, prediction_type="v_prediction", learning_rate=1e-2)
    trained(script, folder / "images", max_train_steps=1, prediction_type="sample", validation_prompts=["a cat"])
    trained(script, folder / "adapters", **bf16, use_lora=True, learning_rate=1.0)
    return folder


def test_plain_diffusers_samples_what_is_left(runs):
    folders = [runs / name for name in ("scratch", "tuned", "images")]
    result = run_command([sys.executable, "-c", SAMPLE, model_folder(), runs / "adapters", *folders], PYTHONSAFEPATH="1")
    assert result.code == 0, result.stderr
    found = json.loads(result.stdout)
    for folder, prediction_type in zip(folders, ("epsilon", "v_prediction", "sample"), strict=True):
        assert found[str(folder)] == [[32, 32, 3], ["torch.float32"], prediction_type, 4]
    assert found["adapters"] > 1e-3


def test_a_run_leaves_checkpoints_grids_and_its_pipeline(runs):
    for name in ("scratch", "tuned", "adapters"):
        assert {path.name for path in (runs / name).glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-3"}
        with Image.open(runs / name / "samples" / "step-0000003.png") as grid:
            assert grid.size == (128, 128)  # three samples of 32 pixels, enlarged to 64, in two rows
        assert json.loads((runs / name / "summary.json").read_text())["step"] == 3
    average, last = (load_file(runs / "scratch" / "checkpoint-3" / kind / WEIGHTS) for kind in ("unet_ema", "unet"))
    saved = load_file(runs / "scratch" / "unet" / WEIGHTS)
    assert all(torch.equal(saved[name], average[name]) for name in saved)
    assert any(not torch.equal(saved[name], last[name]) for name in saved)
    for part in ("vae", "text_encoder"):  # exactly the checkpoint's, also after a run in bf16
        (one,), (other,) = ([*(folder / part).glob("*.safetensors")] for folder in (model_folder(), runs / "tuned"))
        one, other = load_file(one), load_file(other)
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert {path.name for path in (runs / "adapters").glob("*.safetensors")} == {ADAPTERS}
    assert {path.name for path in (runs / "adapters" / "checkpoint-3").glob("*.safetensors")} == {ADAPTERS}
    adapters = load_file(runs / "adapters" / ADAPTERS)
    assert {value.dtype for value in adapters.values()} == {torch.float32} and all(name.startswith("unet.") for name in adapters)
    assert "load_lora_weights" in (runs / "adapters" / "README.md").read_text()
    assert not (runs / "adapters" / "model_index.json").exists()


def test_config_yaml_restarts_the_run(script, runs, tmp_path):
    for name, program in (("scratch", SCRATCH), ("adapters", FINETUNE)):
        result = script(["--config", runs / name / "config.yaml", "--output_dir", tmp_path / name], program=program)
        assert result.code == 0, result.stderr
        assert final_hashes(tmp_path / name, 3) == final_hashes(runs / name, 3)
    assert yaml.safe_load((runs / "tuned" / "config.yaml").read_text())["validation_prompts"] == ["a cat", "a dog", "two dogs"]


def final_hashes(folder: Path, step: int) -> dict[str, str]:
    files = sorted((folder / f"checkpoint-{step}").rglob("*.safetensors"))
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("changes", [{"use_ema": True, "offload_ema": True}, {"use_lora": True}], ids=["full", "adapters"])
def test_killed_and_resumed_is_never_killed(script, tmp_path, changes):
    common = {
        **changes,
        "checkpointing_steps": 2,
        "max_train_steps": 9,
        "gradient_accumulation_steps": 2,
        "random_flip": True,
        "proportion_empty_prompts": 0.2,
        "noise_coupling": "assignment",
        "lr_scheduler": "cosine",
        "resume_from_checkpoint": "latest",
        "mixed_precision": "bf16",
    }
    trained(script, tmp_path / "whole", **common)
    run = script.start(tiny_text(tmp_path / "run", **common), program=FINETUNE)
    lines = tmp_path / "run" / "metrics.jsonl"
    run.wait_until(lambda: lines.exists() and lines.read_text().count("\n") >= 5)
    run.send_group(signal.SIGKILL)
    assert run.wait().code == 128 + signal.SIGKILL and not (tmp_path / "run" / "summary.json").exists()
    trained(script, tmp_path / "run", **common)
    whole = final_hashes(tmp_path / "whole", 9)
    assert final_hashes(tmp_path / "run", 9) == whole and len(whole) == (2 if "use_ema" in changes else 1)
    assert [line["step"] for line in metrics(tmp_path / "run")] == list(range(1, 10))
    assert [line["loss"] for line in metrics(tmp_path / "run")] == [line["loss"] for line in metrics(tmp_path / "whole")]


def test_resume_from_elsewhere_and_never_beyond_the_last_step(script, runs, tmp_path):
    """A path outside the run's folder goes on, foreign names are left alone, and a finished run takes no step."""
    folder = tmp_path / "run"
    for name in ("checkpoint-foo", "checkpoint-2-backup", "checkpoint"):
        (folder / name).mkdir(parents=True)
    common = {"checkpointing_steps": 2, "checkpoints_total_limit": 1, "use_lora": True, "mixed_precision": "bf16", "learning_rate": 1.0}
    trained(script, folder, **common, max_train_steps=5, resume_from_checkpoint=runs / "adapters" / "checkpoint-2")
    assert {path.name for path in folder.glob("checkpoint*")} == {"checkpoint-foo", "checkpoint-2-backup", "checkpoint", "checkpoint-5"}
    assert [line["step"] for line in metrics(folder)] == [3, 4, 5]
    assert metrics(folder)[0]["loss"] == metrics(runs / "adapters")[2]["loss"]
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    result = script(tiny_text(folder, **common, max_train_steps=5, resume_from_checkpoint="latest"), program=FINETUNE)
    assert result.code == 0 and "no step taken" in result.stderr
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_two_processes_with_half_the_batch_give_the_losses_of_one(script, tmp_path):
    common = {"max_train_steps": 10, "proportion_empty_prompts": 0.2, "random_flip": True, "train_data_dir": data_folder(32)}
    trained(script, tmp_path / "one", **common, train_batch_size=8)
    ranks = script.start_ranks(tiny_text(tmp_path / "two", **common, train_batch_size=4), program=FINETUNE)
    results = [run.wait() for run in ranks]
    assert [result.code for result in results] == [0, 0], results
    one, two = ([line["loss"] for line in metrics(tmp_path / name)] for name in ("one", "two"))
    assert len(one) == 10 and two == pytest.approx(one, rel=1e-5) and len(set(one)) == 10
    assert "4 images x 2 processes" in results[0].stderr


# Hub


@pytest.mark.parametrize(("name", "private"), [("scratch", True), ("adapters", False)])
def test_push_to_hub(runs, monkeypatch, tmp_path, name, private):
    """With prompts and without, private stays private, and no checkpoint is sent."""
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    from immiscible.run import push_pipeline
    from immiscible.text_config import TextToImageConfig

    folder = shutil.copytree(runs / name, tmp_path / "model")
    if name == "adapters":
        shutil.rmtree(folder / "samples")
    calls = {}

    def create_repo(repository, **options):
        calls["create"] = (repository, options)
        return huggingface_hub.RepoUrl("https://huggingface.co/someone/model")

    monkeypatch.setattr(huggingface_hub, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub, "upload_folder", lambda **options: calls.update(upload=options))
    push_pipeline(TextToImageConfig(output_dir=str(folder), hub_token="hf_x", hub_private_repo=private), 3)
    repository, options = calls["create"]
    # None leaves it to the owner's settings, which may be private; it never makes a repository public.
    assert repository == "model" and options["private"] is (True if private else None) and options["token"] == "hf_x"
    files = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    sent = set(filter_repo_objects(files, allow_patterns=calls["upload"]["allow_patterns"]))
    weights = {f"unet/{WEIGHTS}", f"vae/{WEIGHTS}", "text_encoder/model.safetensors", "model_index.json", "tokenizer/tokenizer_config.json"}
    assert sent >= ({ADAPTERS} if name == "adapters" else weights) | {"README.md", "config.yaml"}
    assert not any(file.startswith(("checkpoint", "logs", ".")) for file in sent)
    assert (name == "scratch") == any(file.startswith("samples/") for file in sent)


# What the scripts refuse


def edited(folder: Path, part: str = "", **changes) -> Path:
    """A copy of the checkpoint with other entries in a part's configuration, or in the pipeline's."""
    shutil.copytree(model_folder(), folder)
    path = folder / part / "config.json" if part else folder / "model_index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


FOREIGN = {
    "StableDiffusionXLPipeline": {"text_encoder_2": ["transformers", "CLIPTextModelWithProjection"]},
    "StableDiffusion3Pipeline": {"transformer": ["diffusers", "SD3Transformer2DModel"], "unet": None},
    "FluxPipeline": {"transformer": ["diffusers", "FluxTransformer2DModel"], "unet": None},
}


@pytest.mark.parametrize(("name", "parts"), FOREIGN.items(), ids=FOREIGN.keys())
def test_other_families_are_one_line(monkeypatch, tmp_path, name, parts):
    model = edited(tmp_path / "model", _class_name=name, **parts)
    with pytest.raises(UserError, match=f"model is a {name}: these scripts train Stable Diffusion 1.x and 2.x .* not SDXL, SD3 or Flux"):
        reach(monkeypatch, tiny_text(tmp_path / "run", pretrained_model_name_or_path=model))


@pytest.mark.parametrize("part", ["unet", "vae", "tokenizer", "text_encoder", "scheduler"])
def test_a_checkpoint_without_a_part_is_one_line(monkeypatch, tmp_path, part):
    unnamed, incomplete = edited(tmp_path / "unnamed", **{part: [None, None]}), edited(tmp_path / "incomplete")
    shutil.rmtree(incomplete / part)
    for model in (unnamed, incomplete):
        with pytest.raises(UserError, match=f"without {part}"):
            reach(monkeypatch, tiny_text(tmp_path / "run", pretrained_model_name_or_path=model))


BAD = {
    "adapters from scratch": ({"use_lora": True}, True, "--use_lora adapts pretrained weights.*finetune_sd.py"),
    "size": ({"resolution": 36}, False, "--resolution 36 must be a multiple of 8"),
    "both prompts": ({"validation_prompt": "a", "validation_prompts": ["b"]}, False, "choose one"),
    "average of adapters": ({"use_lora": True, "use_ema": True}, False, "--use_ema averages the whole U-Net"),
    "few images": ({"train_batch_size": 17, "noise_coupling": "assignment"}, False, "16 images do not fill a batch of 17"),
    "no model": ({"pretrained_model_name_or_path": "some/where"}, False, "no diffusers checkpoint found"),
}


@pytest.mark.parametrize(("changes", "from_scratch", "wanted"), BAD.values(), ids=BAD.keys())
def test_bad_flags_are_one_line(script, tmp_path, changes, from_scratch, wanted):
    import re

    result = script(tiny_text(tmp_path / "run", **changes), program=SCRATCH if from_scratch else FINETUNE)
    assert result.code in (1, 2) and re.search(wanted, result.error), result.stderr
    assert not (tmp_path / "run").exists()


def test_other_networks_are_one_line(monkeypatch, tmp_path):
    from diffusers import UNet2DConditionModel

    for number, change in enumerate(({"in_channels": 9}, {"num_class_embeds": 10})):
        model = shutil.copytree(model_folder(), tmp_path / f"model-{number}")
        settings = UNet2DConditionModel.load_config(model, subfolder="unet")
        UNet2DConditionModel.from_config({**settings, **change}).save_pretrained(model / "unet")
        with pytest.raises(UserError, match="not inpainting, upscaling or depth models"):
            reach(monkeypatch, tiny_text(tmp_path / "run", pretrained_model_name_or_path=model))


def test_a_checkpoint_of_another_kind_is_refused(script, runs, tmp_path):
    same = {"max_train_steps": 5, "learning_rate": 1.0, "mixed_precision": "bf16"}
    for name, changes, wanted in (
        ("adapters", {}, "--use_lora was True, is now False"),
        ("tuned", {"use_lora": True, "prediction_type": "v_prediction"}, "--use_lora was False, is now True"),
        ("adapters", {"use_lora": True, "pretrained_model_name_or_path": other_weights(tmp_path / "other")}, "frozen"),
    ):
        words = tiny_text(tmp_path / "run", **same, **changes, resume_from_checkpoint=runs / name / "checkpoint-3")
        result = script(words, program=FINETUNE)
        assert result.code == 2 and "belongs to another run" in result.error and wanted in result.error
    result = script(tiny_text(tmp_path / "run", pretrained_model_name_or_path=runs / "adapters"), program=FINETUNE)
    assert result.code == 1 and "no diffusers checkpoint found" in result.error


def other_weights(folder: Path) -> Path:
    """The checkpoint with one number of its U-Net changed."""
    from safetensors.torch import save_file

    if not folder.exists():
        shutil.copytree(model_folder(), folder)
        weights = load_file(folder / "unet" / WEIGHTS)
        weights["conv_in.weight"] += 1e-3
        save_file(weights, folder / "unet" / WEIGHTS, metadata={"format": "pt"})
    return folder


def test_a_precision_from_accelerates_settings(monkeypatch, tmp_path):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    reached = reach(monkeypatch, tiny_text(tmp_path / "run"))
    assert reached.encode.parts.vae.dtype == torch.bfloat16
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(UserError, match="--mixed_precision fp16 needs a GPU"):
        reach(monkeypatch, tiny_text(tmp_path / "run"))
