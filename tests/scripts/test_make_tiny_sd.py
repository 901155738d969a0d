import importlib.util
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from launch import ROOT
from PIL import Image

from immiscible.errors import UserError, run_script

SCRIPT = ROOT / "scripts" / "make_tiny_sd.py"
sys.path[:0] = [str(SCRIPT.parent)]  # as where it is run
_spec = importlib.util.spec_from_file_location("make_tiny_sd", SCRIPT)
assert _spec and _spec.loader
script = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(script)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The checkpoint of each version, its VAE untrained, and its VAE's PSNR."""
    folders = {version: tmp_path_factory.mktemp("models") / str(version) for version in (1, 2)}
    return {version: (folder, script.make_model(folder, version)) for version, folder in folders.items()}


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "classes"
    script.make_classes(folder)
    return folder


@pytest.fixture(scope="module")
def captions(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "captions"
    script.make_captions(folder)
    return folder


@pytest.mark.parametrize("version", [1, 2])
def test_diffusers_loads_and_samples_it(models, version):
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(models[version][0])
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.safety_checker is None and pipeline.vae_scale_factor == 8 and pipeline.unet.config.sample_size == 8
    generator = torch.Generator().manual_seed(0)
    images = pipeline(["a cat", "a rocket"], num_inference_steps=2, generator=generator, output_type="np").images
    assert images.shape == (2, 64, 64, 3) and np.isfinite(images).all() and images.std() > 0
    assert 5e5 < sum(parameter.numel() for parameter in pipeline.unet.parameters()) < 1e6
    scheduler = pipeline.scheduler.config
    assert (scheduler.beta_schedule, scheduler.beta_start, scheduler.beta_end) == ("scaled_linear", 0.00085, 0.012)
    assert (scheduler.steps_offset, scheduler.set_alpha_to_one) == (1, False)


def test_the_versions_differ_as_those_of_stable_diffusion(models):
    from diffusers import StableDiffusionPipeline

    one, two = (StableDiffusionPipeline.from_pretrained(models[version][0]) for version in (1, 2))
    assert (one.scheduler.config.prediction_type, two.scheduler.config.prediction_type) == ("epsilon", "v_prediction")
    assert (one.unet.config.use_linear_projection, two.unet.config.use_linear_projection) == (False, True)
    assert (one.unet.config.attention_head_dim, two.unet.config.attention_head_dim) == (8, [2, 4])
    sizes = [pipeline.text_encoder.config.hidden_size for pipeline in (one, two)]
    assert sizes[0] != sizes[1] and sizes == [pipeline.unet.config.cross_attention_dim for pipeline in (one, two)]
    assert (one.tokenizer.pad_token, two.tokenizer.pad_token, two.tokenizer.pad_token_id) == ("<|endoftext|>", "!", 0)


@pytest.mark.parametrize("version, with_t5", [pytest.param("3", True, marks=pytest.mark.slow), ("3.5", False)])
def test_diffusers_loads_and_samples_stable_diffusion_3(tmp_path, version, with_t5):
    from diffusers import StableDiffusion3Pipeline

    script.make_model(tmp_path, version, with_t5=with_t5)
    absent = {} if with_t5 else {"text_encoder_3": None, "tokenizer_3": None}
    pipeline = StableDiffusion3Pipeline.from_pretrained(tmp_path, **absent)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(["a cat", "a rocket"], num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np").images
    assert images.shape == (2, 64, 64, 3) and np.isfinite(images).all() and images.std() > 0
    newer = pipeline.transformer.config
    assert (newer.qk_norm, tuple(newer.dual_attention_layers)) == ((None, ()) if version == "3" else ("rms_norm", (0,)))
    assert pipeline.scheduler.config.shift == 3 and pipeline.vae.config.latent_channels == 16 and pipeline.vae.config.shift_factor
    if with_t5:
        words = pipeline.tokenizer_3("a cat, Zebra").input_ids
        assert words[-1] == pipeline.tokenizer_3.eos_token_id and pipeline.tokenizer_3.unk_token_id not in words


def test_diffusers_loads_and_samples_stable_diffusion_xl(tmp_path):
    from diffusers import StableDiffusionXLPipeline

    script.make_model(tmp_path, "xl")
    pipeline = StableDiffusionXLPipeline.from_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(["a cat", "a rocket"], num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np").images
    assert images.shape == (2, 64, 64, 3) and np.isfinite(images).all() and images.std() > 0
    assert (pipeline.tokenizer.pad_token, pipeline.tokenizer_2.pad_token) == ("<|endoftext|>", "!")
    assert pipeline.config.force_zeros_for_empty_prompt and pipeline.scheduler.config.prediction_type == "epsilon"


@pytest.mark.slow
def test_the_same_bytes_every_time(models, captions, classes, tmp_path):
    for name in ("first", "second"):
        torch.manual_seed(len(name))
        state = torch.get_rng_state()
        script.make_model(tmp_path / name, vae_steps=2)
        assert torch.equal(torch.get_rng_state(), state)
    script.make_captions(tmp_path / "captions")
    script.make_classes(tmp_path / "classes")
    hashes = {name: script.content_hash(tmp_path / name) for name in ("first", "second", "captions", "classes")}
    assert hashes["first"] == hashes["second"] != script.content_hash(models[1][0])
    assert hashes["captions"] == script.content_hash(captions) and hashes["classes"] == script.content_hash(classes)
    (tmp_path / "captions" / "000.png").rename(tmp_path / "captions" / "256.png")
    assert hashes["captions"] != script.content_hash(tmp_path / "captions")


@pytest.mark.slow
def test_training_improves_the_reconstruction(models, tmp_path):
    from diffusers import AutoencoderKL

    _, untrained = models[1]
    trained = script.make_model(tmp_path / "trained", vae_steps=20)
    assert trained > untrained + 1
    vae = AutoencoderKL.from_pretrained(tmp_path / "trained", subfolder="vae")
    transform, crops = script.ImageTransform(64), script.PhotoCrops(64)
    images = torch.stack([transform(crops.load(i), 0, i) for i in range(script.HELD_OUT_CROPS)])
    with torch.no_grad():
        latents = vae.encode(images).latent_dist.mode()
        output = vae.decode(latents).sample.clamp(-1, 1).numpy().astype(np.float64)
    errors = ((output - images.numpy()) ** 2).reshape(len(images), -1).mean(1)
    assert trained == pytest.approx((10 * np.log10(4 / errors)).mean(), abs=1e-3)
    assert latents.shape == (len(images), 4, 8, 8)
    assert (latents * vae.config.scaling_factor).std().item() == pytest.approx(1, abs=1e-3)


@pytest.mark.slow
def test_the_vae_of_the_default(tmp_path):
    assert script.make_model(tmp_path, vae_steps=script.VAE_STEPS) > 18


@pytest.mark.parametrize("version", [1, 2])
def test_texts_to_77_tokens_and_back(models, version):
    from transformers import CLIPTextModel, CLIPTokenizer

    folder, _ = models[version]
    tokenizer = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer")
    texts = sorted({caption for i in range(script.CAPTIONED_IMAGES) for caption in script.captioned_image(i)[1]})
    tokens = tokenizer(texts, padding="max_length", truncation=True, max_length=tokenizer.model_max_length, return_tensors="pt").input_ids
    assert tokens.shape == (len(texts), 77) and tokens.max() < len(tokenizer)
    assert (tokens[:, 0] == tokenizer.bos_token_id).all() and (tokens[:, -1] == tokenizer.pad_token_id).all()
    decoded = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    assert [text.replace(" ,", ",") for text in decoded] == texts
    words = len(texts[0].replace(",", " ,").split())
    assert (tokens[0] != tokenizer.pad_token_id).sum() <= words + 2  # a word of the captions is one token
    other = tokenizer("Zebra & 7 xylophones", return_tensors="pt").input_ids[0]
    assert tokenizer.unk_token_id not in other[1:-1] and tokenizer.decode(other, skip_special_tokens=True) == "zebra & 7 xylophones"

    encoder = CLIPTextModel.from_pretrained(folder, subfolder="text_encoder")
    with torch.no_grad():
        states = encoder(tokens)[0]
    assert states.shape == (len(texts), 77, encoder.config.hidden_size)
    distances = torch.cdist(states.flatten(1), states.flatten(1)).fill_diagonal_(torch.inf)
    assert distances.min() > 0.05 * states.flatten(1).norm(dim=1).mean()


def test_datasets_reads_the_captioned_images(captions, tmp_path):
    import datasets

    table = datasets.load_dataset("imagefolder", data_dir=str(captions), split="train", cache_dir=str(tmp_path))
    assert len(table) == script.CAPTIONED_IMAGES and table.column_names == ["image", "text", "captions"]
    assert Counter(map(len, table["captions"])) == {1: 192, 3: 64}
    assert all(row["captions"][0] == row["text"] for row in table.remove_columns("image"))
    for i in (0, 5, 100):
        image, texts = script.captioned_image(i)
        assert table[i]["image"].size == (64, 64) and table[i]["text"] == texts[0]
        assert np.array_equal(np.asarray(table[i]["image"]), np.asarray(image))
    by_brightness = {word: [] for word in script.BRIGHTNESS}
    for row in table:
        by_brightness[row["text"].split(", ")[1]].append(np.asarray(row["image"].convert("L")).mean())
    dark, moderate, bright = by_brightness.values()
    assert max(dark) < min(moderate) < max(moderate) < min(bright)


def test_dominant_color():
    halves = Image.new("RGB", (4, 4), (250, 10, 10))
    halves.paste((0, 0, 255), (0, 0, 4, 1))
    assert script.dominant_color(halves) == "red"
    for rgb, name in {(5, 5, 5): "black", (250, 250, 245): "white", (128, 128, 120): "gray", (255, 255, 40): "yellow"}.items():
        assert script.dominant_color(Image.new("RGB", (2, 2), rgb)) == name


def test_datasets_reads_the_classes(classes, tmp_path):
    import datasets

    table = datasets.load_dataset("parquet", data_files=str(classes / "*.parquet"), split="train", cache_dir=str(tmp_path))
    label = table.features["label"]
    assert isinstance(label, datasets.ClassLabel) and label.num_classes == 1000 and label.names == script.class_names()
    assert Counter(table["label"]) == dict.fromkeys(range(1000), 2)
    first_names = Counter(name.split(",")[0] for name in label.names)
    assert {name: count for name, count in first_names.items() if count > 1} == {"crane": 2, "maillot": 2}
    assert [i for i, name in enumerate(label.names) if name.split(",")[0] in ("crane", "maillot")] == [134, 517, 638, 639]
    assert [label.names[i] for i in (0, 1, 999)] == ["red astronaut widest left", "red astronaut widest right", "pink flower closest right"]


def test_the_images_of_a_class_are_alike(classes):
    """The nearest image among the other 1,000 is of the same class, for most."""
    first, second = (
        torch.tensor(np.stack([np.asarray(script.class_image(label, copy).resize((8, 8))) for label in range(1000)])).float().flatten(1)
        for copy in (0, 1)
    )
    assert (torch.cdist(first, second).argmin(1) == torch.arange(1000)).float().mean() > 0.5
    assert (first != second).any(1).sum() >= 990  # but hardly two are equal


def test_what_was_not_written_here_is_left_alone(tmp_path, monkeypatch, capsys):
    def write(folder):
        folder.mkdir()
        (folder / "0.png").write_bytes(b"new")

    monkeypatch.setattr(script, "make_captions", write)
    words = [str(tmp_path / "out"), "--what", "captions"]
    script.main(words)
    script.main(words)  # its own output is replaced
    captions = tmp_path / "out" / "captions"
    assert capsys.readouterr().out.count(f"{captions}: 256 captioned images; ") == 2
    (captions / "mine.txt").write_text("kept")
    monkeypatch.setattr(sys, "argv", ["make_tiny_sd.py", *words])
    assert run_script(script.main) == 2
    assert capsys.readouterr().err == (
        f"make_tiny_sd.py: error: {captions} is there and is not what this script wrote; remove it or choose another folder\n"
    )
    (captions / "mine.txt").unlink()
    (captions / "0.png").write_bytes(b"mine")
    with pytest.raises(UserError, match="is not what this script wrote"):
        script.main(words)
    assert (captions / "0.png").read_bytes() == b"mine" and [path.name for path in (tmp_path / "out").iterdir()] == ["captions"]


def test_command_line(tmp_path, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(script, "make_model", lambda folder, version, steps: calls.append((version, steps)) or folder.mkdir() or 12.34)
    script.main([str(tmp_path), "--what", "model", "--version", "2", "--vae_steps", "3"])
    assert calls == [(2, 3)] and "Stable Diffusion 2, VAE of 12.3 dB after 3 steps" in capsys.readouterr().out
    with pytest.raises(UserError, match="--vae_steps must be at least 0, not -1"):
        script.main([str(tmp_path), "--vae_steps", "-1"])
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write .*file/captions: ") as caught:
        script.main([str(tmp_path / "file"), "--what", "captions"])
    assert caught.value.exit_code == 1
