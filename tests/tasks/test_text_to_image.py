"""What ``train_text_to_image.py`` and ``finetune_sd.py`` train: weights, step, captions, against plain diffusers."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_text import FINETUNE, WEIGHTS, Reached, class_folder, model_folder, reach, tiny_text

from immiscible.errors import UserError


def unet_of(reached: Reached):
    return reached.accelerator.unwrap_model(reached.model)


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
    return float(loss.detach())


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

    from immiscible.data.batches import Images
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
    torch.testing.assert_close(reached.objective.weights.vector, expected, rtol=2e-4, atol=0)  # diffusers' fp32 against float64


def test_snr_gamma_and_another_weighting_is_an_error(monkeypatch, tmp_path):
    with pytest.raises(UserError, match="--snr_gamma belongs to --loss_weighting min_snr or soft_min_snr, not to p2"):
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
    assert reached.losses[0] == pytest.approx(float(loss.detach()), rel=1e-6)
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
    assert reached.losses[0] == pytest.approx(float(torch.nn.functional.mse_loss(output, noise).detach()), rel=1e-6)


# Averages and adapters


@pytest.mark.slow
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
    from immiscible.data.batches import Images
    from immiscible.randomness import Draws

    reached = reach(monkeypatch, tiny_text(tmp_path / "run", proportion_empty_prompts=0.25))
    seen = [caption for batch in reached.batches for caption in batch.captions]
    assert len(seen) == 16 and len(set(seen)) == 16 and {caption.split()[0] for caption in seen} == {"thing", "a"}
    assert sorted(int(caption.split()[1]) for caption in seen) == list(range(16))
    images, captions = torch.zeros(64, 3, 32, 32), ["a cat"] * 64
    batch = Images(images, captions=captions)
    steps = [reached.encode(batch, Draws(0, step, 0, torch.device("cpu"))) for step in range(8)]
    states = torch.cat([encoded.condition["encoder_hidden_states"] for encoded in steps])
    full, empty = (reached.encode.texts([caption])["states"] for caption in ("a cat", ""))
    is_empty, is_full = ((states - kind).abs().flatten(1).amax(1) < 1e-5 for kind in (empty, full))
    assert bool((is_empty ^ is_full).all())
    assert float(is_empty.float().mean()) == pytest.approx(0.25, abs=0.08)  # 4 standard deviations of 512 draws


NAMES = ["crane", "dog", "crane, machine", "maillot"]


def notices(script, folder: Path, **changes) -> str:
    """What a run says before its first step."""
    result = script(tiny_text(folder, **changes, plan=True, max_train_steps=1), program=FINETUNE)
    assert result.code == 0, result.stderr
    return result.stderr


@pytest.mark.slow
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
    reached = reach(monkeypatch, tiny_text(tmp_path / "run", **common, coupling_condition="within", max_train_samples=15), steps=4)
    assert {int(label) for pairs in reached.pairs for label in pairs.labels} == {0, 1, 2, 3}


@pytest.mark.slow
def test_coupling_conditions_look_at_captions(script, monkeypatch, tmp_path):
    common = {"noise_coupling": "assignment", "train_batch_size": 8}
    assert "captions is wanted" in (said := notices(script, tmp_path / "run", **common)) and "condition within" not in said
    assert "captions is wanted" not in notices(script, tmp_path / "run", **common, coupling_condition="centered")
    assert "captions is wanted" not in notices(script, tmp_path / "run")
    plain = reach(monkeypatch, tiny_text(tmp_path / "run", **common), steps=1)
    assert plain.pairs[0].labels is None
    reached = reach(monkeypatch, tiny_text(tmp_path / "run", **common, coupling_condition="centered"), steps=1)
    width = reached.pairs[0].condition["encoder_hidden_states"].shape[-1]
    assert reached.pairs[0].labels.shape == (8, width)
    assert reached.objective.coupling.state["gram"].shape == (width + 1, width + 1)  # what it has learned of captions
    apart = reach(monkeypatch, tiny_text(tmp_path / "run", **common, coupling_condition="penalty", coupling_condition_ratio=0.0), steps=1)
    distances = [{name: float(value) for name, value in run.pairs[0].statistics.items()} for run in (plain, apart)]
    assert distances[0]["pair_distance"] < distances[0]["pair_distance_drawn"]
    assert distances[1]["pair_distance"] == distances[1]["pair_distance_drawn"]  # all captions differ: no exchange is worth it
    with pytest.raises(UserError, match="--coupling_condition within needs classes, and --caption_column text holds texts"):
        reach(monkeypatch, tiny_text(tmp_path / "run", **common, coupling_condition="within"))
