"""``train_unconditional.py --vae_model_name_or_path``: latents are diffused and pixels come out; and the share of images that is used."""

import json
import re
import shutil
import sys
from pathlib import Path

import numpy
import pytest
import torch
from kills import final_hashes, metrics
from latent_caches import PRECOMPUTE, close, hashes, module, precompute
from launch import ROOT, flags, run_command, tiny
from PIL import Image
from tiny_text import data_folder, model_folder, tiny_text

from immiscible.configs import UnconditionalConfig
from immiscible.data.batches import GlobalBatchOrder
from immiscible.data.loading import build_loader, images_of, load_images, training_images, training_source
from immiscible.data.transforms import image_transform
from immiscible.encoding.encoders import LatentEncoder
from immiscible.errors import UserError
from immiscible.flags import parse_config
from immiscible.networks.latents import load_vae, vae_identity
from immiscible.networks.weights import PRECISIONS
from immiscible.randomness import Draws
from immiscible.sampling.pipelines import CLASS_PIPELINE, sample_images

CPU = torch.device("cpu")
DRAWS = Draws(0, 0, 0, CPU)


def latent(output_dir: Path, **changes) -> list[str]:
    """A run of four steps on 4x4 latents of 32x32 photo crops."""
    common = {"bundled_data": "photo_crops", "resolution": 32, "train_batch_size": 8, "train_subset_fraction": 0.01}
    return tiny(output_dir, **{**common, "vae_model_name_or_path": model_folder(), **changes})


@pytest.fixture(scope="module")
def vae():
    return load_vae(str(model_folder()), resolution=32)


@pytest.fixture(scope="module")
def run(script, tmp_path_factory) -> Path:
    """With everything that looks at images."""
    folder = tmp_path_factory.mktemp("latent") / "run"
    evaluation = {"eval_steps": 4, "eval_samples": 8, "eval_inference_steps": 2, "validation_split": 0.1}
    result = script(latent(folder, noise_coupling="assignment", use_ema=True, **evaluation))
    assert result.code == 0, result.stderr
    return folder


# Sampling


@pytest.mark.slow
def test_the_saved_pipeline_samples_in_a_process_of_plain_diffusers(run, tmp_path):
    code = """
import sys
import torch
from diffusers import DiffusionPipeline, LDMPipeline
pipeline = DiffusionPipeline.from_pretrained(sys.argv[1])
assert type(pipeline) is LDMPipeline and not pipeline.scheduler.config.clip_sample
torch.manual_seed(0)
images = pipeline(batch_size=2, num_inference_steps=3).images
assert [image.size for image in images] == [(32, 32)] * 2
assert not [name for name in sys.modules if name.startswith("immiscible")]
"""
    (tmp_path / "sample.py").write_text(code)
    result = run_command([sys.executable, "-P", tmp_path / "sample.py", run])
    assert result.code == 0, result.stderr
    card = (run / "README.md").read_text()
    assert 'LDMPipeline.from_pretrained("THIS_FOLDER")' in card and "| latents | of " in card


def test_a_run_trains_on_latents_and_measures_pixels(run, vae):
    config = json.loads((run / "unet" / "config.json").read_text())
    assert (config["in_channels"], config["sample_size"]) == (4, 4)
    assert json.loads((run / "model_index.json").read_text())["vqvae"] == ["diffusers", "AutoencoderKL"]
    [line] = [json.loads(text) for text in (run / "evaluation.jsonl").read_text().splitlines()]
    assert line["num_features"] == 3 * 8 * 8 and line["samples"] == 8 and len(line["validation_loss"]) == 10
    with Image.open(run / "samples" / "step-0000004.png") as grid:
        assert grid.size == (128, 64)  # two samples of 32x32, enlarged
    assert metrics(run)[-1]["distance_reduction_percent"] > 0
    saved = load_vae(str(run / "vqvae"), resolution=32)
    assert vae_identity(saved) == vae_identity(vae)


def test_the_grid_is_of_the_saved_pipeline(run):
    from diffusers import LDMPipeline

    images = sample_images(LDMPipeline.from_pretrained(run), 2, steps=2, seed=0, batch_size=2, device=CPU)
    grid = numpy.asarray(Image.open(run / "samples" / "step-0000004.png"))
    assert (grid[:, :64][::2, ::2] == images[0]).all() and (grid[:, 64:][::2, ::2] == images[1]).all()


# Runs


@pytest.mark.parametrize("cached", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_cut_run_of_latents_goes_on_as_it_was(script, tmp_path, cached):
    common = {"use_ema": True, "noise_coupling": "assignment", "timestep_sampling": "asymmetric", "random_flip": True, "dropout": 0.1}
    if cached:
        common |= {"center_crop": True, "cache_latents": True, "latent_cache_dir": tmp_path / "cache"}
        precompute(latent(tmp_path, **common))
    assert script(latent(tmp_path / "whole", max_train_steps=5, **common)).code == 0
    assert script(latent(tmp_path / "cut", max_train_steps=2, **common)).code == 0
    result = script(latent(tmp_path / "cut", max_train_steps=5, resume_from_checkpoint="latest", **common))
    assert result.code == 0, result.stderr
    assert final_hashes(tmp_path / "cut", 5) == final_hashes(tmp_path / "whole", 5)
    other = latent(tmp_path / "cut", max_train_steps=6, resume_from_checkpoint="latest", **common, vae_model_name_or_path=model_folder(2))
    result = script(other)
    assert result.code == 2 and ("the VAE's encoder" if cached else "belongs to another run: network was") in result.error


def test_classes_and_half_precision(script, tmp_path):
    from immiscible.sampling.class_pipeline import ClassConditionalPipeline

    more = {"class_conditional": True, "class_dropout_prob": 0.5, "guidance_scale": 2, "mixed_precision": "bf16", "use_ema": True}
    result = script(latent(tmp_path / "run", bundled_data="digits", **more))
    assert result.code == 0, result.stderr
    assert "4x4x4, 10 classes" in result.stderr
    assert (tmp_path / "run" / "samples" / "step-0000004.png").exists()
    assert (tmp_path / "run" / "pipeline.py").read_bytes() == CLASS_PIPELINE.read_bytes()
    images = ClassConditionalPipeline.from_pretrained(tmp_path / "run")(class_labels=[0, 9], guidance_scale=2, num_inference_steps=2).images
    assert [image.size for image in images] == [(32, 32)] * 2


@pytest.mark.slow
def test_two_processes_train_the_latents_that_one_trains(script, tmp_path):
    assert script(latent(tmp_path / "one")).code == 0
    results = [run.wait() for run in script.start_ranks(latent(tmp_path / "two", train_batch_size=4))]
    assert [result.code for result in results] == [0, 0], results[0].stderr
    for one, two in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"resolution": 36}, "halves the image 3 times: --resolution 36 must be a multiple of 8"),
        ({"resolution": 40}, "halves the latent (1/8 of the image) 1 times: --resolution 40 must be a multiple of 16"),
        ({"vae_model_name_or_path": model_folder() / "unet"}, "is a UNet2DConditionModel, not an AutoencoderKL"),
        ({"vae_model_name_or_path": model_folder() / "tokenizer"}, "no AutoencoderKL found there"),
        ({"vae_model_name_or_path": "/nowhere"}, "no AutoencoderKL found there"),
        ({"train_subset_fraction": 1.5}, "--train_subset_fraction must be above 0 and at most 1"),
        ({"max_train_samples": 9}, "give one of them"),
        ({"train_subset_fraction": 1e-9}, "leaves none"),
    ],
)
def test_mistakes_are_one_line(script, tmp_path, changes, wanted):
    result = script(latent(tmp_path / "run", **changes))
    assert result.code == 2 and wanted in result.error
    assert not (tmp_path / "run").exists()


# From a cache


def from_cache(root: Path, output_dir: Path | None = None, **changes) -> list[str]:
    """A run on what `cached` has made."""
    common = {"bundled_data": None, "train_subset_fraction": None, "train_data_dir": root / "images", "cache_dir": root / "tables"}
    common |= {"train_batch_size": 4, "center_crop": True, "random_flip": True, "class_conditional": True}
    return latent(output_dir or root / "run", **{**common, "cache_latents": True, "latent_cache_dir": root / "cache", **changes})


@pytest.fixture(scope="module")
def cached(tmp_path_factory) -> Path:
    """Twelve images of two classes, and their cache."""
    root = tmp_path_factory.mktemp("cached")
    draw = numpy.random.default_rng(0)
    for number in range(12):
        path = root / "images" / ("cat", "dog")[number % 2] / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (48, 40, 3), dtype=numpy.uint8)).save(path)
    precompute(from_cache(root))
    return root


def opened(words: list[str]):
    """A run's flags, images and opened cache."""
    from immiscible.encoding.cache import open_cache

    config = parse_config(UnconditionalConfig, words, program="x", description="")
    source = training_source(config, config.labels_for)
    vae = load_vae(str(config.vae_model_name_or_path), resolution=config.resolution)
    return config, source, open_cache(Path(config.latent_cache_dir), config, vae, source, precision=config.mixed_precision)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_latents_from_a_cache_are_those_of_the_vae(script, vae, cached, tmp_path, precision):
    changes = {"mixed_precision": precision, "latent_cache_dir": tmp_path / "cache"}
    result = script(from_cache(cached, **changes), program=PRECOMPUTE)
    assert result.code == 0, result.stderr
    config, source, cache = opened(from_cache(cached, **changes))
    assert cache.manifest["captions"] == 0 and not list(cache.folder.glob("texts-*")) and "text" not in str(cache.manifest["files"])
    transform, order = image_transform(config, 3, seed=3), GlobalBatchOrder(12, 4, seed=3, stop=6)  # two epochs
    plain = LatentEncoder(vae, CPU, class_conditional=True, class_dropout=0.3, null_class=2, precision=PRECISIONS[precision])
    runs = []
    for images, augment, encode in ((source, transform, plain), (cache.images(source), cache.transform(transform), cache.encoder(plain))):
        batches = images_of(build_loader(training_images(images, augment, with_labels=True), order, 0, CPU), skip_bad_images=False)
        runs.append([encode(batch, Draws(3, step, 0, CPU)) for step, batch in enumerate(batches)])
    for wanted, found in zip(*runs, strict=True):
        assert close(found.x0, wanted.x0) and found.x0.dtype == torch.float32 and found.x0.shape == (4, 4, 4, 4)
        assert torch.equal(found.labels, wanted.labels) and torch.equal(found.condition["class_labels"], wanted.condition["class_labels"])
    told = torch.cat([batch.condition["class_labels"] for batch in runs[1]])
    assert set(told.tolist()) == {0, 1, 2} and set(torch.cat([batch.labels for batch in runs[1]]).tolist()) == {0, 1}
    assert len(runs[0]) == 6 and not close(runs[1][0].x0, runs[1][3].x0)


def test_training_from_a_cache_does_not_encode(cached, tmp_path, monkeypatch):
    from diffusers import AutoencoderKL

    def encode(*args, **kwargs):
        raise AssertionError("the VAE was called")

    monkeypatch.setattr(AutoencoderKL, "encode", encode)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    train = module("train_unconditional.py").main
    train(from_cache(cached, tmp_path / "cached", noise_coupling="assignment"))
    assert (tmp_path / "cached" / "model_index.json").exists()
    with pytest.raises(AssertionError, match="the VAE was called"):
        train(from_cache(cached, tmp_path / "plain", cache_latents=None, latent_cache_dir=None))


@pytest.mark.slow
def test_losses_from_a_cache_are_those_of_the_uncached_run(script, cached, tmp_path):
    """Also with a cache of all images for a run on some of them, and with held-out images, which are encoded."""
    more = {"max_train_samples": 10, "validation_split": 0.2, "eval_steps": 4, "eval_samples": 4, "eval_inference_steps": 2}
    plain = {"cache_latents": None, "latent_cache_dir": None}
    for folder, options in ((tmp_path / "cached", {}), (tmp_path / "plain", plain)):
        result = script(from_cache(cached, folder, **more, **options))
        assert result.code == 0, result.stderr
    found, wanted = ([line["loss"] for line in metrics(tmp_path / name)] for name in ("cached", "plain"))
    assert len(found) == 4 and found == pytest.approx(wanted, rel=1e-3)
    evaluations = [json.loads((tmp_path / name / "evaluation.jsonl").read_text()) for name in ("cached", "plain")]
    assert evaluations[0]["validation_loss"] == pytest.approx(evaluations[1]["validation_loss"], rel=1e-2)
    more |= plain | {"resume_from_checkpoint": "latest", "max_train_steps": 5}
    result = script(from_cache(cached, tmp_path / "cached", **more))
    assert result.code == 2 and "--cache_latents was True, is now False" in result.error


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"resolution": 64}, "--resolution was 32 in the cache and is 64 here"),
        ({"crop": "adm"}, "the crop (--crop, --center_crop, --alpha_color) was center in the cache and is adm here"),
        ({"preserve_input_precision": True}, "was bilinear in the cache and is bilinear at the images' precision here"),
        ({"vae_model_name_or_path": model_folder(2)}, "the VAE's encoder "),
        ({"bundled_data": "digits", "train_data_dir": None}, "the data was a folder of 12 images"),
        ({"center_crop": False}, "--cache_latents needs --center_crop or --crop adm"),
        ({"vae_model_name_or_path": None}, "--cache_latents needs --vae_model_name_or_path"),
        ({"latent_cache_dir": None}, "--cache_latents needs --latent_cache_dir"),
        ({"cache_latents": False}, "add --cache_latents"),
        ({"streaming": True}, "--streaming"),
    ],
)
def test_a_cache_of_something_else_is_refused(cached, changes, reason):
    with pytest.raises(UserError) as caught:
        opened(from_cache(cached, **changes))
    assert reason in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.slow
def test_caches_with_and_without_texts_flips_and_precision(script, tmp_path):
    root = tmp_path
    shutil.copytree(data_folder(), root / "images")
    text = tiny_text(root / "run", train_data_dir=root / "images", latent_cache_dir=root / "texts", center_crop=True)
    common = {"class_conditional": False, "random_flip": False}
    images = from_cache(root, **common, mixed_precision="bf16")
    assert [script(words, program=PRECOMPUTE).code for words in (text, images)] == [0, 0]
    for words, reason in (
        (from_cache(root, **common, latent_cache_dir=root / "texts"), "is None here"),
        (from_cache(root, class_conditional=False), "--random_flip is off in the cache and on here"),
        (from_cache(root, **common), "encoded in bfloat16 and this run would encode in float32"),
    ):
        with pytest.raises(UserError, match=reason):
            opened(words)
    opened(images)
    for words, folder in ((text, root / "cache"), (images, root / "texts")):
        result = script([*words, "--latent_cache_dir", folder], program=PRECOMPUTE)
        assert result.code == 2 and re.search("holds another cache: .*the text encoder", result.error)
    result = script([*text, "--cache_latents", "--latent_cache_dir", root / "cache"], program="finetune_sd.py")
    assert result.code == 2 and re.search("not made for this run: .*the text encoder or tokenizer .* was None in the cache", result.error)


def test_an_edited_image_is_noticed_and_encoded_anew(cached, tmp_path, capsys):
    root = Path(shutil.copytree(cached, tmp_path / "root"))
    path = root / "images" / "dog" / "07.png"
    Image.open(path).rotate(90).save(path)
    with pytest.raises(UserError, match=r"1 of its images have been edited since, the first .*07\.png.*to mend it"):
        opened(from_cache(root))
    precompute(from_cache(root))
    assert "12 images (0 of them unreadable), " in (said := capsys.readouterr().out) and "1 files made, 2 there already" in said
    opened(from_cache(root))


def test_two_processes_fill_a_cache_with_the_same_bytes(script, cached, tmp_path):
    words = [*from_cache(cached, latent_cache_dir=tmp_path / "cache"), "--rows_per_shard", "5", "--encode_batch_size", "4"]
    results = [run.wait() for run in script.start_ranks(words, program=PRECOMPUTE)]
    assert [result.code for result in results] == [0, 0], results
    assert hashes(tmp_path / "cache") == hashes(cached / "cache")


def test_the_recipe_is_cached_by_its_file(script, cached, tmp_path):
    """With small things in place of its own; what says that it is about images alone is in the file."""
    small = {"dataset_name": cached / "images", "train_subset_fraction": 0.5, "resolution": 32, "model_preset": "unet-tiny"}
    small |= {"train_batch_size": 4, "mixed_precision": "no", "dataloader_num_workers": 0, "max_train_steps": 1, "logger": "none"}
    small |= {"ddpm_num_inference_steps": 2, "eval_batch_size": 2, "latent_cache_dir": tmp_path / "cache"}
    path = tmp_path / "recipe.yaml"
    text = (ROOT / "configs/tasks/sd_unconditional_imagenet10.yaml").read_text()
    path.write_text(text.replace("CompVis/stable-diffusion-v1-4", str(model_folder())))
    words = ["--config", str(path), *flags(small)]
    precompute(words)
    result = script([*words, "--cache_latents", "--output_dir", tmp_path / "run"])
    assert result.code == 0, result.stderr
    assert f"latents from {tmp_path / 'cache'}" in result.stderr


# The share of the images


@pytest.mark.slow
def test_a_share_of_the_images_is_the_same_for_every_seed(script, tmp_path):
    all_images = load_images(bundled_data="digits")
    tenth = load_images(bundled_data="digits", train_subset_fraction=0.1)
    assert len(tenth) == 180 == len({tenth.name(index) for index in range(180)})
    assert tenth.fingerprint == load_images(bundled_data="digits", max_train_samples=180).fingerprint
    assert len(load_images(bundled_data="digits", train_subset_fraction=1.0)) == len(all_images)
    result = script(tiny_text(tmp_path / "text", train_subset_fraction=0.5, plan=True), program="finetune_sd.py")
    assert result.code == 0 and "16 images, of which 8 are used" in result.stderr


def test_the_share_continues_only_as_it_was(script, tmp_path):
    assert script(tiny(tmp_path / "run", train_subset_fraction=0.2, seed=3)).code == 0
    common = {"seed": 3, "resume_from_checkpoint": "latest", "max_train_steps": 6}
    result = script(tiny(tmp_path / "run", train_subset_fraction=0.3, **common))
    assert result.code == 2 and "data was" in result.error
    assert script(tiny(tmp_path / "run", max_train_samples=359, **common)).code == 0  # the same images by another name


@pytest.mark.slow
def test_a_run_of_latents_and_its_checkpoint_are_sampled(script, run, tmp_path):
    def sampled(name: str, model: Path, **changes) -> list[bytes]:
        words = {"model": model, "output_dir": tmp_path / name, "num_images": 5, "num_inference_steps": 3, "batch_size": 2, **changes}
        result = script(flags(words), program="scripts/sample.py")
        assert result.code == 0, result.stderr
        return [path.read_bytes() for path in sorted((tmp_path / name).glob("*.png"))]

    of_run = sampled("run", run)
    assert len(set(of_run)) == 5
    assert sampled("checkpoint", run / "checkpoint-4") == of_run
    assert sampled("raw", run, weights="raw") == sampled("checkpoint_raw", run / "checkpoint-4", weights="raw")
    assert sampled("heun", run, scheduler="heun") != of_run


def test_a_checkpoint_whose_vae_has_moved(script, run, tmp_path):
    """The run's own folder has it once its pipeline is saved; before that the run's flags say where it was."""

    def sampled(model: Path, **changes):
        words = {"model": model, "output_dir": tmp_path / "out", "num_images": 3, "num_inference_steps": 2, **changes}
        result = script(flags(words), program="scripts/sample.py")
        pictures = [path.read_bytes() for path in sorted((tmp_path / "out").glob("*.png"))]
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        return pictures if result.code == 0 else result.error

    whole = sampled(run / "checkpoint-4")
    moved = shutil.copytree(run, tmp_path / "moved")
    config = (moved / "config.yaml").read_text()
    (moved / "config.yaml").write_text(config.replace(str(model_folder()), "models/tiny"))
    assert len(whole) == 3 and sampled(moved / "checkpoint-4") == whole
    for path in (moved / "vqvae", moved / "unet"):
        shutil.rmtree(path)
    error = sampled(moved / "checkpoint-4")
    assert "checkpoint-4 needs what it was trained with: --vae_model_name_or_path models/tiny: no AutoencoderKL found" in error
    assert "--base says where it is now" in error
    assert sampled(moved / "checkpoint-4", base=model_folder()) == whole
    assert "trained with other weights than these" in sampled(moved / "checkpoint-4", base=model_folder(2))
