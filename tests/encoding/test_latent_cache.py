"""The latent and text cache: what is in it, what a run from it sees, what it refuses, and how it is made."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from latent_caches import PRECOMPUTE, close, hashes, module, precompute
from launch import flags
from PIL import Image
from safetensors import SafetensorError
from tars import write_tar

from immiscible.configs import TextToImageConfig
from immiscible.data.batches import GlobalBatchOrder, ImageDataset
from immiscible.data.loading import build_loader, captioned_source, images_of
from immiscible.data.transforms import ImageTransform
from immiscible.encoding import cache_manifest, cache_shards, cache_writing
from immiscible.encoding.cache import open_cache
from immiscible.encoding.cache_manifest import fingerprint, read_manifest, settings_that_differ
from immiscible.encoding.captions import CaptionRules
from immiscible.errors import UserError
from immiscible.files import file_facts
from immiscible.flags import parse_config
from immiscible.randomness import Draws

IMAGES = 12
CPU = torch.device("cpu")


def write_images(folder: Path, count: int = IMAGES, text=lambda i: [f"picture {i}", f"number {i}", "one of them"]) -> Path:
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (count, 72, 64, 3), dtype=np.uint8)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{i:02}.png")
    rows = [{"file_name": f"{i:02}.png", "text": text(i)} for i in range(count)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def tiny_sd(tmp_path_factory) -> dict[str, Path]:
    """A model, captioned images and their cache."""
    root = tmp_path_factory.mktemp("latents")
    module("scripts/make_tiny_sd.py").make_model(root / "model")
    write_images(root / "images")
    found = {"model": root / "model", "images": root / "images", "cache": root / "cache", "root": root}
    precompute(argv(found))
    return found


def argv(sd: dict[str, Path], **changes) -> list[str]:
    values = {
        "pretrained_model_name_or_path": sd["model"],
        "train_data_dir": sd["images"],
        "cache_dir": sd["root"] / "tables",
        "latent_cache_dir": sd["cache"],
        "resolution": 64,
        "center_crop": True,
        "random_flip": True,
        "report_to": "none",
        **changes,
    }
    return flags(values)


def run_flags(sd: dict[str, Path], folder: Path, **changes) -> list[str]:
    values = {
        "cache_latents": True,
        "output_dir": folder,
        "train_batch_size": 4,
        "max_train_steps": 6,
        "learning_rate": 1e-3,
        "lr_warmup_steps": 0,
        "logging_steps": 1,
        "seed": 0,
        **changes,
    }
    return argv(sd, **values)


def parts_of(sd: dict[str, Path], *extra: str):
    """A run's flags, its source, model and opened cache."""
    config = parsed(sd, *extra)
    source, parts = captioned_source(config, None), load_parts(config)
    return config, source, parts, open_cache(sd["cache"], config, parts, source, precision=config.mixed_precision)


def load_parts(config):
    from immiscible.networks.families import load_checkpoint

    return load_checkpoint(config, resolution=config.resolution, cache_dir=config.cache_dir, from_scratch=True)


def parsed(sd: dict[str, Path], *extra: str):
    return parse_config(TextToImageConfig, [*argv(sd), "--cache_latents", *extra], program="x", description="")


def encoders(parts, cache, **options):
    from immiscible.encoding.texts import TextToImageEncoder

    plain = TextToImageEncoder(parts, CPU, **options)
    return plain, cache.encoder(plain)


def test_moments_are_the_posterior_of_the_image_and_of_its_mirror_image(tiny_sd):
    _, source, parts, cache = parts_of(tiny_sd)
    transform = ImageTransform(64, center_crop=True, interpolation="lanczos")
    for index in (0, 4, 5, 11):
        pixels = transform(source.load(index), 0, index)
        with torch.no_grad():
            wanted = [parts.vae.encode(x[None]).latent_dist for x in (pixels, pixels.flip(-1))]
        moments = torch.from_numpy(cache.moments(index))
        assert moments.shape == (2, 2, 4, 8, 8) and moments.dtype == torch.float16
        for found, posterior in zip(moments, wanted, strict=True):
            assert close(found[0], posterior.mean[0]) and close(found[1], posterior.logvar[0])
        assert not close(moments[0], moments[1])


def test_every_caption_and_the_empty_one_are_there_once(tiny_sd):
    _, source, parts, cache = parts_of(tiny_sd)
    wanted = {text for index in range(IMAGES) for text in source.captions(index)} | {""}
    assert cache.manifest["captions"] == len(wanted) == 2 * IMAGES + 2
    captions = sorted(wanted)
    with torch.no_grad():
        expected = parts.texts(captions, CPU)
    assert expected.keys() == {"states", "pooled"} and all(close(cache.texts(captions, name), each) for name, each in expected.items())
    assert len(set(cache.rows_of(captions))) == len(wanted)
    with pytest.raises(ValueError, match="'unheard of' is not in the latent cache"):
        cache.texts(["picture 1", "unheard of"], "states")


def test_class_names_are_captions_too(tiny_sd, tmp_path):
    """By number, each of the three once."""
    from datasets import ClassLabel, Dataset, Features
    from datasets import Image as ImageFeature

    cells = [{"bytes": (tiny_sd["images"] / f"{i:02}.png").read_bytes(), "path": None} for i in range(6)]
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=["crane, a bird", "snail", "crane"])})
    folder = tmp_path / "classes"
    folder.mkdir()
    Dataset.from_dict({"image": cells, "label": [i % 3 for i in range(6)]}, features).to_parquet(folder / "train.parquet")
    sd = {**tiny_sd, "images": folder, "cache": tmp_path / "cache"}
    precompute(argv(sd, caption_column="label"))
    _, source, _, cache = parts_of(sd, "--caption_column", "label")
    assert cache.manifest["captions"] == 4
    assert [list(cache.images(source).captions(index)) for index in range(3)] == [["crane, a bird"], ["snail"], ["crane"]]


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_batches_are_those_of_the_uncached_run(tiny_sd, dropout):
    _, source, parts, cache = parts_of(tiny_sd)
    transform = ImageTransform(64, center_crop=True, random_flip=True, seed=3, interpolation="lanczos")
    order = GlobalBatchOrder(IMAGES, 4, seed=3, stop=6)  # two epochs
    plain, cached = encoders(parts, cache, rules=CaptionRules(dropout), pooled_labels=True)
    runs, geometries = [], []
    for images, augment, encode in ((source, transform, plain), (cache.images(source), cache.transform(transform), cached)):
        dataset = ImageDataset(images, augment, with_captions=True, with_geometry=True)
        batches = list(images_of(build_loader(dataset, order, 0, CPU), skip_bad_images=False))
        runs.append([(batch.captions, encode(batch, Draws(3, step, 0, CPU))) for step, batch in enumerate(batches)])
        geometries.append(torch.cat([batch.geometry for batch in batches]))
    assert len(runs[0]) == 6 and torch.equal(*geometries)
    assert geometries[0].dtype == torch.int64 and geometries[0].unique(dim=0).tolist() == [[72, 64, 4, 0, 64, 64]]
    for (captions, wanted), (same_captions, found) in zip(*runs, strict=True):
        assert captions == same_captions
        assert close(found.x0, wanted.x0) and found.x0.dtype == torch.float32 and found.x0.shape == (4, 4, 8, 8)
        assert close(found.labels, wanted.labels) and found.labels.dtype == torch.float32
        states = [each.condition["encoder_hidden_states"] for each in (found, wanted)]
        assert close(*states) and states[0].dtype == torch.float32
    assert not close(runs[1][0][1].x0, runs[1][3][1].x0)


def test_a_network_that_is_told_pooled_states_is_given_those_alone(tiny_sd):
    from immiscible.data.batches import Images

    _, source, parts, cache = parts_of(tiny_sd, "--model_preset", "dit-tiny")
    plain, cached = encoders(parts, cache, rules=CaptionRules(0.5))
    captions, draws = ["picture 1", "number 2", "one of them", "picture 3"], Draws(3, 0, 0, CPU)
    moments = torch.from_numpy(np.stack([cache.moments(index)[0] for index in range(4)]))
    images = ImageTransform(64, center_crop=True, interpolation="lanczos")
    pixels = torch.stack([images(source.load(index), 0, index) for index in range(4)])
    found, wanted = cached(Images(moments, None, captions), draws), plain(Images(pixels, None, captions), draws)
    assert found.condition.keys() == wanted.condition.keys() == {"pooled_projections"}
    assert close(found.condition["pooled_projections"], wanted.condition["pooled_projections"]) and cached.texts(captions).keys() == {
        "pooled"
    }
    assert wanted.condition["pooled_projections"].shape == (4, parts.text_encoder.config.hidden_size)


def test_latents_are_distributed_as_the_vae_says(tiny_sd):
    """Mean and variance of 4,096 draws, each within five standard errors at every one of 256 places."""
    _, source, parts, cache = parts_of(tiny_sd)
    _, encode = encoders(parts, cache)
    transform = ImageTransform(64, center_crop=True, interpolation="lanczos")
    with torch.no_grad():
        posterior = parts.vae.encode(transform(source.load(2), 0, 2)[None]).latent_dist
    count, scale = 4096, parts.vae.config.scaling_factor
    batch = next(iter(build_loader(ImageDataset(cache.images(source), cache.transform(transform), with_captions=True), [[(0, 2)]], 0, CPU)))
    moments = batch["pixel_values"].expand(count, -1, -1, -1, -1)
    x0 = encode(replace_captions(moments), Draws(0, 0, 0, CPU)).x0.double() / scale
    mean, variance = posterior.mean[0].double(), posterior.var[0].double()
    assert ((x0.mean(0) - mean).abs() < 5 * (variance / count).sqrt() + 2**-10 * mean.abs() + 1e-4).all()
    assert ((x0.var(0) / variance - 1).abs() < 5 * (2 / count) ** 0.5 + 2**-9).all()


def replace_captions(moments):
    from immiscible.data.batches import Images

    return Images(moments, None, [""] * len(moments))


def test_neither_vae_nor_text_encoder_is_called(tiny_sd, tmp_path, monkeypatch):
    from diffusers import AutoencoderKL
    from transformers import CLIPTextModel

    def called(*args, **kwargs):
        raise AssertionError("a frozen network was called")

    for kind, name in ((AutoencoderKL, "encode"), (AutoencoderKL, "decode"), (AutoencoderKL, "forward"), (CLIPTextModel, "forward")):
        monkeypatch.setattr(kind, name, called)
    train = module("train_text_to_image.py")
    more = {"noise_coupling": "assignment", "coupling_condition": "centered", "proportion_empty_prompts": 0.2}
    train.main(run_flags(tiny_sd, tmp_path / "cached", **more, max_train_steps=4))
    assert (tmp_path / "cached" / "model_index.json").exists()
    with pytest.raises(AssertionError, match="was called"):
        train.main(run_flags(tiny_sd, tmp_path / "uncached", **more, cache_latents=None, latent_cache_dir=None))


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_losses_are_those_of_the_uncached_run(tiny_sd, tmp_path):
    """Also with a cache of all images for a run on some of them, with held-out images, and with flips in the cache that are not used."""
    train = module("train_text_to_image.py").main
    more = {"max_train_samples": 10, "validation_split": 0.2, "eval_steps": 100, "eval_samples": 4, "eval_inference_steps": 2}
    plain = {"cache_latents": None, "latent_cache_dir": None}
    for folder, options in ((tmp_path / "cached", {}), (tmp_path / "plain", plain)):
        train(run_flags(tiny_sd, folder, **more, random_flip=None, **options))
    found = losses(tmp_path / "cached")
    assert len(found) == 6 and found == pytest.approx(losses(tmp_path / "plain"), rel=1e-3)


def test_bad_images_are_skipped_as_in_the_uncached_run(tiny_sd, tmp_path):
    folder = write_images(tmp_path / "images")
    (folder / "03.png").write_bytes((folder / "03.png").read_bytes()[:3000])
    (folder / "06.png").write_text("no image")
    sd = {**tiny_sd, "images": folder, "cache": tmp_path / "cache"}
    with pytest.raises(UserError, match=r"03\.png.*--skip_bad_images"):
        precompute(argv(sd))
    precompute(argv(sd, skip_bad_images=True))
    _, source, parts, cache = parts_of(sd, "--skip_bad_images")
    assert sorted(cache.manifest["bad"]) == ["3", "6"]
    transform = ImageTransform(64, center_crop=True, random_flip=True, seed=1, interpolation="lanczos")
    order = GlobalBatchOrder(IMAGES, 6, seed=1, stop=4)
    plain, cached = encoders(parts, cache)
    for images, augment, encode in ((source, transform, plain), (cache.images(source), cache.transform(transform), cached)):
        dataset = ImageDataset(images, augment, skip_bad_images=True, with_captions=True)
        batches = list(images_of(build_loader(dataset, order, 0, CPU), skip_bad_images=True))
        result = [encode(batch, Draws(1, step, 0, CPU)).x0 for step, batch in enumerate(batches)]
        if images is source:
            wanted, captions = result, [batch.captions for batch in batches]
    assert captions == [batch.captions for batch in batches] and all(map(close, result, wanted))
    dataset = ImageDataset(cache.images(source), cache.transform(transform), with_captions=True)
    with pytest.raises(UserError, match=r"06\.png: not an image format"):
        list(images_of(build_loader(dataset, [[(0, 6)]], 0, CPU), skip_bad_images=False))


def test_transparent_images_are_counted_again_when_their_shards_are_kept(tiny_sd, tmp_path, capsys):
    folder = write_images(tmp_path / "images")
    for number in (1, 4, 9):
        Image.open(folder / f"{number:02}.png").convert("RGBA").save(folder / f"{number:02}.png")
    for number in (1, 9):
        Image.new("RGBA", (64, 72), (0, 255, 0, 100)).save(folder / f"{number:02}.png")
    for state in ("9 files made, 0 there already", "0 files made, 9 there already"):
        precompute(argv({**tiny_sd, "images": folder, "cache": tmp_path / "cache"}))
        said = capsys.readouterr().out
        assert "\n2 images have transparent pixels, which are laid upon --alpha_color" in said and state in said
    precompute(argv(tiny_sd))
    assert "transparent" not in capsys.readouterr().out


def test_captions_in_shards_that_changed_make_a_bad_image(tiny_sd, tmp_path):
    members = {name: content for name, content in shard_members(tiny_sd).items() if name < "06"}
    write_tar(tmp_path / "tars" / "0.tar", members)
    sd = {**tiny_sd, "images": tmp_path / "tars", "cache": tmp_path / "cache"}
    precompute(argv(sd))
    members["03.txt"] = b"another one"
    write_tar(tmp_path / "tars" / "0.tar", members)
    _, source, _, cache = parts_of(sd)
    with pytest.raises(ValueError, match="'another one' is not in the latent cache"):
        cache.images(source).captions(3)


def test_of_two_samples_of_one_name_the_bad_one_is_skipped(tiny_sd, tmp_path):
    members = [(name, content) for name, content in shard_members(tiny_sd).items() if name < "03"]
    members += [("02.png", b"no image"), ("02.txt", b"one of them"), members[0], members[1]]
    write_tar(tmp_path / "tars" / "0.tar", members)
    sd = {**tiny_sd, "images": tmp_path / "tars", "cache": tmp_path / "cache"}
    precompute(argv(sd, skip_bad_images=True))
    _, _, _, cache = parts_of(sd)
    _, _, _, whole = parts_of(tiny_sd)
    assert list(cache.manifest["bad"]) == ["3"]
    for found, wanted in ((0, 0), (1, 1), (2, 2), (4, 0)):
        assert np.allclose(cache.moments(found), whole.moments(wanted), atol=2**-9, rtol=2**-9)


def shard_members(sd: dict[str, Path]) -> dict[str, bytes]:
    names = [f"{i:02}" for i in range(IMAGES)]
    return {
        member: content
        for i, name in enumerate(names)
        for member, content in ((f"{name}.png", (sd["images"] / f"{name}.png").read_bytes()), (f"{name}.txt", f"picture {i}".encode()))
    }


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True])
def test_killed_and_resumed_is_never_killed(script, tiny_sd, tmp_path, lora):
    changes = {"use_lora": lora, "checkpointing_steps": 2, "proportion_empty_prompts": 0.3, "noise_coupling": "assignment"}
    changes |= {"resume_from_checkpoint": "latest", "max_train_steps": 14}

    def weights(folder: Path) -> str:
        (path,) = (folder / "checkpoint-14").glob("**/*lora_weights.safetensors" if lora else "unet/*.safetensors")
        return hashlib.sha256(path.read_bytes()).hexdigest()

    def start(name: str):
        return script.start(run_flags(tiny_sd, tmp_path / name, **changes), program="finetune_sd.py")

    assert start("whole").wait().code == 0
    run = start("killed")
    run.wait_until(lambda: (tmp_path / "killed" / "checkpoint-4").exists())
    run.kill_all()
    assert not (tmp_path / "killed" / "checkpoint-14").exists()
    result = start("killed").wait()
    assert result.code == 0, result
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")


def test_texts_of_a_cache_are_told_with_its_trigger_word_and_of_that_alone(tiny_sd, tmp_path):
    """The rows are those of the captions as they stand in the data; the empty one, for dropped captions, stays empty."""
    write_images(tmp_path / "images", 4)
    sd = {**tiny_sd, "images": tmp_path / "images", "cache": tmp_path / "cache"}
    words = argv(sd, trigger_word="sks", random_flip=False)
    precompute(words)
    config = parse_config(TextToImageConfig, [*words, "--cache_latents"], program="x", description="")
    source, parts = captioned_source(config, None), load_parts(config)
    cache = open_cache(sd["cache"], config, parts, source, precision=None, trigger="sks")
    plain, cached = encoders(parts, cache, rules=CaptionRules(trigger="sks"))
    with torch.no_grad():
        wanted = parts.texts(["sks, picture 1", "sks, number 2", ""], CPU)["states"]
        for encoder in (plain, cached):
            assert close(encoder.texts(["picture 1", "number 2", ""])["states"], wanted)
    line = refused(sd, random_flip=False)
    assert "--trigger_word was sks in the cache and is None here" in line


def refused(sd: dict[str, Path], **changes) -> str:
    words = argv(sd, **{"cache_latents": True, **changes})
    with pytest.raises(UserError) as caught:
        config = parse_config(TextToImageConfig, words, program="x", description="")
        source = captioned_source(config, None)
        open_cache(Path(config.latent_cache_dir), config, load_parts(config), source, precision=config.mixed_precision)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_cache_of_other_settings_is_refused_with_the_reason(tiny_sd, tmp_path):
    assert "--resolution was 64 in the cache and is 32 here" in refused(tiny_sd, resolution=32)
    adm = refused(tiny_sd, crop="adm")
    crop = "the crop (--crop, --center_crop, --alpha_color) was center in the cache and is"
    assert f"{crop} adm here" in adm and "scripts/precompute_latents.py" in adm
    assert f"{crop} center, transparent images upon black here" in refused(tiny_sd, alpha_color="black")
    assert "--image_interpolation_mode was lanczos" in refused(tiny_sd, image_interpolation_mode="box")
    other = write_images(tmp_path / "other", count=11)
    assert "the data was a folder of 12 images" in refused({**tiny_sd, "images": other})
    flipless = {**tiny_sd, "cache": tmp_path / "flipless"}
    precompute(argv(flipless, random_flip=None))
    assert "--random_flip is off in the cache and on here" in refused(flipless)


def test_a_cache_of_another_model_is_refused(tiny_sd, tmp_path):
    """The VAE's decoder may be another, as that of sd-vae-ft-mse is."""
    from diffusers import AutoencoderKL
    from transformers import CLIPTextModel

    model = shutil.copytree(tiny_sd["model"], tmp_path / "model")
    sd = {**tiny_sd, "model": model}
    vae, text = AutoencoderKL.from_pretrained(model, subfolder="vae"), CLIPTextModel.from_pretrained(model, subfolder="text_encoder")
    for change, network, weight in (
        ("", vae, vae.decoder.conv_out.weight),
        ("the VAE's encoder", vae, vae.encoder.conv_out.weight),
        ("the text encoder or tokenizer", text, text.get_input_embeddings().weight),
    ):
        before = weight.detach().clone()
        with torch.no_grad():
            weight.view(-1)[-1] += 1e-3
        network.save_pretrained(model / ("vae" if network is vae else "text_encoder"))
        if change:
            assert f"{change} " in refused(sd)
        else:
            parts_of(sd)
        with torch.no_grad():
            weight.copy_(before)
        network.save_pretrained(model / ("vae" if network is vae else "text_encoder"))
    parts_of(sd)


def test_a_cache_of_less_precision_is_refused(tiny_sd, tmp_path):
    parts_of(tiny_sd, "--mixed_precision", "bf16")
    sd = {**tiny_sd, "cache": shutil.copytree(tiny_sd["cache"], tmp_path / "cache")}
    manifest = json.loads((sd["cache"] / "manifest.json").read_text())
    (sd["cache"] / "manifest.json").write_text(json.dumps({**manifest, "precision": "bfloat16"}))
    parts_of(sd, "--mixed_precision", "bf16")
    assert "encoded in bfloat16 and this run would encode in float32 (--mixed_precision)" in refused(sd)


def test_edited_images_and_captions_are_refused_and_encoded_anew(tiny_sd, tmp_path, capsys):
    folder = shutil.copytree(tiny_sd["images"], tmp_path / "images")
    sd = {**tiny_sd, "images": folder, "cache": tmp_path / "cache"}
    precompute(argv(sd))
    before = hashes(sd["cache"])
    Image.open(folder / "07.png").rotate(90).save(folder / "07.png")
    message = refused(sd)
    assert "1 of its images have been edited since, the first " in message and "07.png" in message and message.endswith("to mend it")
    capsys.readouterr()
    precompute(argv(sd))
    assert "1 files made, 8 there already" in capsys.readouterr().out
    changed = {name for name, found in hashes(sd["cache"]).items() if found != before[name]}
    assert changed == {"index.safetensors", "latents-00001.safetensors", "manifest.json"}
    parts_of(sd)
    text = (folder / "metadata.jsonl").read_text().replace("picture 7", "picture of seven")
    (folder / "metadata.jsonl").write_text(text)
    assert "its caption 'picture of seven' is not in the latent cache" in refused(sd)
    precompute(argv(sd))
    _, source, _, cache = parts_of(sd)
    assert "picture of seven" in cache.images(source).captions(7)


def test_a_missing_broken_or_unfinished_cache_is_refused(tiny_sd, tmp_path):
    assert "holds no latent cache" in refused({**tiny_sd, "cache": tmp_path / "none"})
    sd = {**tiny_sd, "cache": shutil.copytree(tiny_sd["cache"], tmp_path / "cache")}
    manifest = json.loads((sd["cache"] / "manifest.json").read_text())
    (sd["cache"] / "manifest.json").write_text(json.dumps({**manifest, "files": {}}))
    assert "is not finished" in refused(sd)
    (sd["cache"] / "manifest.json").write_text("{")
    assert "is not the manifest of a latent cache" in refused(sd)
    (sd["cache"] / "manifest.json").write_text(json.dumps(manifest))
    shard = sd["cache"] / "latents-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-2])
    assert "latents-00001.safetensors has" in refused(sd)
    shard.unlink()
    assert "latents-00001.safetensors is missing" in refused(sd)


def test_a_damaged_shard_is_named_and_no_image(tiny_sd, tmp_path):
    """Also with equal size, where it is the index, or another shard of this cache."""
    sd = {**tiny_sd, "cache": shutil.copytree(tiny_sd["cache"], tmp_path / "cache")}
    for name, content in (
        ("latents-00001.safetensors", lambda old: old[:-9] + bytes([old[-9] ^ 1]) + old[-8:]),
        ("latents-00000.safetensors", lambda old: bytes(len(old))),
        ("latents-00001.safetensors", lambda old: (sd["cache"] / "latents-00000.safetensors").read_bytes()),
        ("texts-00000.safetensors", lambda old: b"x" * len(old)),
        ("index.safetensors", lambda old: old[:8] + bytes(len(old) - 8)),
    ):
        old = (sd["cache"] / name).read_bytes()
        (sd["cache"] / name).write_bytes(content(old))
        assert f"{name} is damaged, it is not what was written; run scripts/precompute_latents.py" in refused(sd)
        (sd["cache"] / name).write_bytes(old)


def test_of_a_large_cache_a_part_is_hashed_and_every_header_looked_at(tiny_sd, tmp_path, monkeypatch):
    sd = {**tiny_sd, "cache": shutil.copytree(tiny_sd["cache"], tmp_path / "cache")}
    hashed = []
    monkeypatch.setattr(cache_manifest, "file_facts", lambda path: hashed.append(path.name) or file_facts(path))
    parts_of(sd)
    assert sorted(hashed) == sorted(path.name for path in sd["cache"].glob("*.safetensors"))
    hashed.clear()
    monkeypatch.setattr(cache_manifest, "HASHED_BYTES", 0)
    parts_of(sd)
    assert hashed == ["index.safetensors"]
    shard = sd["cache"] / "latents-00001.safetensors"
    shard.write_bytes(bytes(shard.stat().st_size))
    assert "latents-00001.safetensors is damaged" in refused(sd)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)


def change(**values):
    """An edit of a file of JSON; None takes a key out."""

    def edit(path: Path) -> None:
        content = {**json.loads(path.read_text()), **values}
        path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))

    return edit


@pytest.mark.parametrize(
    ("name", "edit", "named"),
    [
        ("latents-00001.safetensors", flip, "latents-00001.safetensors is damaged"),
        ("latents-00000.safetensors", lambda path: path.write_bytes(bytes(path.stat().st_size)), "latents-00000.safetensors is damaged"),
        ("manifest.json", change(bad=[1]), "its bad is [1]"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("index.safetensors", lambda path: path.write_bytes(b"x" * path.stat().st_size), "index.safetensors is damaged"),
                ("manifest.json", change(rows_per_shard="x"), 'its rows_per_shard is "x"'),
                ("manifest.json", change(bad=None), "its bad is null"),
                ("manifest.json", change(fingerprint=None), "its fingerprint is null"),
                ("manifest.json", change(files=["a"]), 'its files is ["a"]'),
                ("manifest.json", change(files={"index.safetensors": None}), 'its files hold {"index.safetensors": null}'),
            )
        ),
    ],
    ids=lambda item: item if isinstance(item, str) else "",
)
def test_a_run_on_a_damaged_cache_names_its_file_and_never_an_image(script, tiny_sd, tmp_path, name, edit, named):
    """Though bad images are skipped."""
    sd = {**tiny_sd, "cache": shutil.copytree(tiny_sd["cache"], tmp_path / "cache")}
    edit(sd["cache"] / name)
    result = script(run_flags(sd, tmp_path / "run", skip_bad_images=True), program="train_text_to_image.py")
    assert result.code in (1, 2) and name in result.error and named in result.error and ".png" not in result.error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"rows_per_shard": "x"}, 'its rows_per_shard is "x"'),
        ({"rows_per_shard": True}, "its rows_per_shard is true"),
        ({"rows_per_shard": 0}, "its rows_per_shard is 0"),
        ({"rows_per_shard": 1}, "files are not the"),
        ({"images": 10**15}, "files are not the"),
        ({"bad": [1]}, "its bad is [1]"),
        ({"bad": {"x": "y"}}, 'its bad images hold {"x": "y"}'),
        ({"bad": None}, "its bad is null"),
        ({"fingerprint": None}, "its fingerprint is null"),
        ({"fingerprint": "0" * 16}, "its fingerprint is not that of its settings and files"),
        ({"files": ["a"]}, 'its files is ["a"]'),
        ({"files": {"index.safetensors": None}}, 'its files hold {"index.safetensors": null}'),
        ({"files": {"../a": {"bytes": 1, "sha256": ""}}}, "files are not the"),
        ({"settings": {}}, "its settings lack"),
        ({"settings": None}, "its settings is null"),
        ({"precision": 3}, "its precision is 3"),
    ],
    ids=str,
)
def test_the_manifest_is_checked_once_and_says_what_is_wrong_with_it(tiny_sd, tmp_path, change, named):
    content = json.loads((tiny_sd["cache"] / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps({**content, **change}))
    with pytest.raises(UserError) as caught:
        read_manifest(tmp_path)
    assert str(tmp_path / "manifest.json") in str(caught.value) and named in str(caught.value)


def test_a_cache_of_before_there_were_buckets_and_trigger_words_serves(tiny_sd, tmp_path):
    content = json.loads((tiny_sd["cache"] / "manifest.json").read_text())
    settings = {name: value for name, value in content["settings"].items() if name not in ("buckets", "trigger_word")}
    older = {**content, "settings": settings, "fingerprint": fingerprint(settings, content["files"])}
    (tmp_path / "manifest.json").write_text(json.dumps(older))
    assert read_manifest(tmp_path) == older and not settings_that_differ(settings, content["settings"])


@pytest.mark.parametrize("text", ["[]", "null", "3", "[" * 5000, "", "{"])
def test_a_manifest_that_is_none(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(UserError, match=r"manifest\.json is not the manifest of a latent cache"):
        read_manifest(tmp_path)


def test_flags_that_do_not_go_together(tiny_sd):
    assert "--cache_latents needs --center_crop or --crop adm" in refused(tiny_sd, center_crop=None)
    assert "--cache_latents needs --latent_cache_dir" in refused(tiny_sd, latent_cache_dir=None)
    assert "add --cache_latents" in refused(tiny_sd, cache_latents=None)
    assert "--streaming" in refused(tiny_sd, streaming=True, max_train_steps=1)


def test_a_checkpoint_of_cached_latents_is_not_continued_from_images(tiny_sd, tmp_path):
    train = module("train_text_to_image.py").main
    train(run_flags(tiny_sd, tmp_path / "run", max_train_steps=1))
    with pytest.raises(UserError, match="--cache_latents was True, is now False"):
        train(run_flags(tiny_sd, tmp_path / "run", cache_latents=None, latent_cache_dir=None, resume_from_checkpoint="latest"))
    moved = {**tiny_sd, "cache": shutil.copytree(tiny_sd["cache"], tmp_path / "moved")}
    train(run_flags(moved, tmp_path / "run", max_train_steps=2, resume_from_checkpoint="latest"))


def test_an_interrupted_call_goes_on_and_ends_with_the_same_bytes(tiny_sd, tmp_path, monkeypatch):
    sd, made = {**tiny_sd, "cache": tmp_path / "cache"}, []
    make = cache_writing._Writer._make

    def interrupted(self, name, *rest):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(name)
        make(self, name, *rest)

    monkeypatch.setattr(cache_writing._Writer, "_make", interrupted)
    with pytest.raises(KeyboardInterrupt):
        precompute(argv(sd))
    assert "is not finished" in refused(sd)
    (sd["cache"] / ".partial-latents-00002.safetensors").write_text("half")
    before = {name: (sd["cache"] / name).stat().st_ino for name in made}
    monkeypatch.setattr(cache_writing._Writer, "_make", make)
    precompute(argv(sd))
    assert len(before) == 2 and all((sd["cache"] / name).stat().st_ino == inode for name, inode in before.items())
    assert hashes(sd["cache"]) == hashes(tiny_sd["cache"])


def test_a_cache_is_not_whole_while_it_is_mended(tiny_sd, tmp_path, monkeypatch):
    """The first of its texts are of the new captions then, the others and their index of the old ones."""
    folder = shutil.copytree(tiny_sd["images"], tmp_path / "images")
    sd = {**tiny_sd, "images": folder, "cache": tmp_path / "cache"}
    precompute(argv(sd))
    (folder / "metadata.jsonl").write_text((folder / "metadata.jsonl").read_text().replace("picture", "photograph"))
    make = cache_writing._Writer._make

    def interrupted(self, name, *rest):
        if name == "texts-00001.safetensors":
            raise KeyboardInterrupt
        make(self, name, *rest)

    monkeypatch.setattr(cache_writing._Writer, "_make", interrupted)
    with pytest.raises(KeyboardInterrupt):
        precompute(argv(sd))
    (folder / "metadata.jsonl").write_text((tiny_sd["images"] / "metadata.jsonl").read_text())
    assert "is not finished" in refused(sd)
    monkeypatch.setattr(cache_writing._Writer, "_make", make)
    precompute(argv(sd))
    assert hashes(sd["cache"]) == hashes(tiny_sd["cache"])


def test_what_a_kill_leaves_before_the_manifest_is_no_obstacle(tiny_sd, tmp_path):
    sd = {**tiny_sd, "cache": tmp_path / "cache"}
    sd["cache"].mkdir()
    (sd["cache"] / ".lock").touch()
    (sd["cache"] / ".partial-manifest.json").write_text("{")
    precompute(argv(sd))
    assert hashes(sd["cache"]) == hashes(tiny_sd["cache"])


def test_two_calls_do_not_fill_one_folder(tiny_sd, tmp_path):
    with FileLock(tiny_sd["cache"] / ".lock"), pytest.raises(UserError, match="is being filled by another call") as caught:
        precompute(argv(tiny_sd))
    assert caught.value.exit_code == 1
    precompute(argv(tiny_sd))


def test_a_disk_that_fills_up_is_one_line(tiny_sd, tmp_path, monkeypatch):
    def fail(tensors, path, **options):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    sd = {**tiny_sd, "cache": tmp_path / "cache"}
    with monkeypatch.context() as full:
        full.setattr(cache_writing, "save_file", fail)
        with pytest.raises(UserError, match=r"cannot write .*latents-00000\.safetensors: .*No space left on device") as caught:
            precompute(argv(sd))
    assert caught.value.exit_code == 1
    precompute(argv(sd))
    assert hashes(sd["cache"]) == hashes(tiny_sd["cache"])


def test_flags_of_the_training_command_that_a_cache_cannot_serve(tiny_sd, tmp_path):
    with pytest.raises(UserError, match=r"--streaming reads data in passing.*leave it out"):
        precompute(argv(tiny_sd, streaming=True))
    with pytest.raises(UserError, match="--latent_cache_dir is required: the folder to fill"):
        precompute(argv(tiny_sd, latent_cache_dir=None))


def test_a_finished_cache_is_checked_and_mended(tiny_sd, tmp_path, capsys):
    sd = {**tiny_sd, "cache": shutil.copytree(tiny_sd["cache"], tmp_path / "cache")}
    shard = sd["cache"] / "texts-00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    precompute(argv(sd))
    assert "1 files made, 8 there already" in capsys.readouterr().out
    assert hashes(sd["cache"]) == hashes(tiny_sd["cache"])


def test_a_folder_of_something_else_is_left_alone(tiny_sd, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match="holds something else"):
        precompute(argv({**tiny_sd, "cache": folder}))
    assert [path.name for path in folder.iterdir()] == ["thesis.txt"]
    before = hashes(tiny_sd["cache"])
    with pytest.raises(UserError, match=r"holds another cache: .*interpolation.*rows per shard was 5 and is 6"):
        precompute(argv(tiny_sd, image_interpolation_mode="box"), rows_per_shard=6)
    assert hashes(tiny_sd["cache"]) == before


def test_a_disk_that_is_too_small_is_noticed_before_the_work(tiny_sd, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100_000))
    with pytest.raises(UserError, match=r"GiB are needed and 0\.0 GiB free"):
        precompute(argv({**tiny_sd, "cache": tmp_path / "cache"}))


def test_two_captions_of_one_digest_are_an_error(tiny_sd, tmp_path, monkeypatch):
    monkeypatch.setattr(cache_shards, "caption_digest", lambda caption: len(caption))
    with pytest.raises(UserError, match="have one digest"):
        precompute(argv({**tiny_sd, "cache": tmp_path / "cache"}))


def test_two_processes_make_the_same_bytes_and_both_learn_of_a_failure(script, tiny_sd, tmp_path):
    words = [*argv({**tiny_sd, "cache": tmp_path / "cache"}), "--rows_per_shard", "5", "--encode_batch_size", "4"]
    results = [run.wait() for run in script.start_ranks(words, program=PRECOMPUTE)]
    assert [result.code for result in results] == [0, 0], results
    assert "12 images (0 of them unreadable) and 26 captions" in results[0].stdout and results[1].stdout == ""
    assert hashes(tmp_path / "cache") == hashes(tiny_sd["cache"])
    folder = write_images(tmp_path / "images")
    (folder / "06.png").write_text("no image")  # the second process's
    words = [*argv({**tiny_sd, "images": folder, "cache": tmp_path / "broken"}), "--rows_per_shard", "5"]
    results = [run.wait() for run in script.start_ranks(words, program=PRECOMPUTE)]
    assert [result.code for result in results] == [1, 1] and "06.png" in results[0].error, results
