"""``scripts/sample.py``: exactly the images that were asked for, the same ones however the work is shared and interrupted."""

import json
import shutil
import signal
from pathlib import Path

import numpy
import pytest
import torch
from class_networks import telling
from kills import finish
from launch import entry, flags, free_port, tiny
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_text import WEIGHTS, model_folder, tiny_text

from immiscible.errors import UserError
from immiscible.files import LOCK
from immiscible.randomness import derive_seed, seeded_generator
from immiscible.sampling.folder import read_lines

PROGRAM = "scripts/sample.py"
PYTORCH = {"format": "pt"}  # what diffusers asks of a file's metadata
COMMON = {"num_inference_steps": 2, "num_images": 6, "batch_size": 4}


def words(model: Path, output_dir: Path, **changes) -> list[str]:
    return flags({**COMMON, "model": model, "output_dir": output_dir, **changes})


def sampled(script, model: Path, output_dir: Path, **changes) -> dict[str, bytes]:
    """The folder's images by name."""
    result = script(words(model, output_dir, **changes), program=PROGRAM)
    assert result.code == 0, result.stderr
    return images(output_dir)


def images(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("[0-9]*.png")}


def pixels(folder: Path) -> numpy.ndarray:
    return numpy.stack([numpy.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))])


def refused(script, model: Path, output_dir: Path, **changes) -> str:
    result = script(words(model, output_dir, **changes), program=PROGRAM)
    assert result.code in (1, 2)
    return result.error


def trained(script, folder: Path, **changes) -> Path:
    result = script(tiny(folder, **changes))
    assert result.code == 0, result.stderr
    return folder


def generators(numbers: range, seed: int = 0) -> list[torch.Generator]:
    return [seeded_generator(seed, "sample", number) for number in numbers]


def told(folder: Path) -> list[dict]:
    """What ``metadata.jsonl`` says of each image."""
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]


def equal(found: numpy.ndarray, wanted: numpy.ndarray) -> bool:
    """Whether these pixels are what diffusers gave, in [0, 1], up to rounding."""
    levels = (255 * wanted).round().squeeze(-1 if wanted.shape[-1] == 1 else ())
    return found.shape == levels.shape and numpy.abs(found - levels).max() <= 1


@pytest.fixture(scope="module")
def run(script, tmp_path_factory) -> Path:
    """A run with an average that differs from the weights."""
    options = {"use_ema": True, "ema_power": 0.1, "learning_rate": 1e-2, "checkpointing_steps": 2}
    return trained(script, tmp_path_factory.mktemp("run") / "run", **options)


@pytest.fixture(scope="module")
def conditional(script, tmp_path_factory) -> Path:
    return trained(script, tmp_path_factory.mktemp("conditional") / "run", class_conditional=True)


@pytest.fixture(scope="module")
def guidable(script, tmp_path_factory) -> Path:
    """A run whose network was told classes, and sometimes none; it has learned enough for them to differ."""
    options = {"class_conditional": True, "class_dropout_prob": 0.3, "learning_rate": 1e-2, "max_train_steps": 20}
    return trained(script, tmp_path_factory.mktemp("guidable") / "run", **options)


@pytest.fixture(scope="module")
def adapters(script, tmp_path_factory) -> Path:
    """A finished LoRA run whose adapters do something."""
    folder = tmp_path_factory.mktemp("adapters") / "run"
    options = {"use_lora": True, "rank": 2, "max_train_steps": 3, "learning_rate": 0.1}
    result = script(tiny_text(folder, **options), program="finetune_sd.py")
    assert result.code == 0, result.stderr
    return folder


@pytest.fixture(scope="module")
def names(tmp_path_factory) -> Path:
    """Three classes, two of one name."""
    path = tmp_path_factory.mktemp("names") / "classes.txt"
    path.write_text("crane\nowl\ncrane\n")
    return path


# Exactly N, the same ones


def test_1003_samples_are_1003_files_on_one_and_on_two_processes(script, run, tmp_path):
    options = {"num_images": 1003, "batch_size": 100}
    one = sampled(script, run, tmp_path / "one", **options)
    results = finish(script.start_ranks(words(run, tmp_path / "two", **options), program=PROGRAM))
    assert sorted(one) == [f"{number:06}.png" for number in range(1003)]
    assert images(tmp_path / "two") == one
    assert sorted(path.name for path in (tmp_path / "two").iterdir() if path.suffix != ".png") == [LOCK, "manifest.json"]
    assert "1003 images of 8x8" in results[0].stdout and "1003 sampled" in results[0].stdout and not results[1].stdout


def test_a_folder_that_was_cut_short_is_completed_to_the_same_bytes(script, run, tmp_path):
    folder = tmp_path / "out"
    whole = sampled(script, run, folder, num_images=11)
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.png")}
    (folder / "000002.png").unlink()
    (folder / "000007.png").write_bytes(whole["000007.png"][:-20])
    Image.new("L", (4, 4)).save(folder / "000010.png")
    (folder / ".partial-000002.png").write_bytes(b"half")
    result = script(words(run, folder, num_images=11), program=PROGRAM)
    assert result.code == 0 and "3 sampled" in result.stdout and "8 were there" in result.stdout
    assert images(folder) == whole
    after = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.png")}
    assert {name for name in before if before[name] != after[name]} == {"000002.png", "000007.png", "000010.png"}
    assert not (folder / ".partial-000002.png").exists()


def test_two_processes_complete_what_one_began(script, run, tmp_path):
    whole = sampled(script, run, tmp_path / "out", num_images=11)
    for number in (0, 5, 9, 10):
        (tmp_path / "out" / f"{number:06}.png").unlink()
    finish(script.start_ranks(words(run, tmp_path / "out", num_images=11), program=PROGRAM))
    assert images(tmp_path / "out") == whole


def test_a_stopped_call_leaves_whole_images_and_is_completed(script, run, tmp_path):
    options = {"num_images": 600, "batch_size": 10}
    call = script.start(words(run, tmp_path / "out", **options), program=PROGRAM)
    call.wait_until((tmp_path / "out" / "000000.png").exists)
    call.send(signal.SIGTERM)
    assert call.wait().code == 128 + signal.SIGTERM
    stopped = images(tmp_path / "out")
    assert 0 < len(stopped) < 600 and not json.loads((tmp_path / "out" / "manifest.json").read_text())["complete"]
    whole = sampled(script, run, tmp_path / "out", **options)
    assert len(whole) == 600 and stopped.items() <= whole.items()
    assert whole == sampled(script, run, tmp_path / "whole", **options)


def test_two_calls_do_not_fill_one_folder(script, run, tmp_path):
    """Whichever comes first samples, as if it were alone; the other says so in one line."""
    options = {"num_images": 400, "batch_size": 10}
    first = script.start(words(run, tmp_path / "out", **options), program=PROGRAM)
    first.wait_until((tmp_path / "out" / "000000.png").exists)
    before = images(tmp_path / "out")
    assert "in use by another process" in refused(script, run, tmp_path / "out", **options)
    assert before.items() <= images(tmp_path / "out").items()
    assert first.wait().code == 0 and len(images(tmp_path / "out")) == 400


def test_a_killed_process_ends_the_other_with_one_line_once_its_share_is_done(script, run, tmp_path):
    options = {"num_images": 400, "batch_size": 10}
    first, second = script.start_ranks(words(run, tmp_path / "out", **options), program=PROGRAM)
    second.wait_until((tmp_path / "out" / "000010.png").exists)
    second.kill_all()
    result = first.wait()
    assert result.code == 1 and "another process of this launch has ended" in result.error
    assert len(sampled(script, run, tmp_path / "out", **options)) == 400


def test_a_process_without_images_waits_for_those_that_have_some(script, run, tmp_path):
    one = sampled(script, run, tmp_path / "one", num_images=3)
    results = finish(script.start_ranks(words(run, tmp_path / "three", num_images=3), 3, program=PROGRAM))
    assert images(tmp_path / "three") == one and "3 sampled" in results[0].stdout


def test_a_process_that_fails_does_not_wait_for_the_others(script, run, tmp_path):
    """They would not come: they wait elsewhere. A launcher ends them."""
    broken = shutil.copytree(run, tmp_path / "broken")
    settings = json.loads((broken / "unet" / "config.json").read_text())
    (broken / "unet" / "config.json").write_text(json.dumps({**settings, "sample_size": "8"}))
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    calls = [
        script.start(
            words(model, tmp_path / "out", num_images=100_000), program=PROGRAM, env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        )
        for rank, model in enumerate((run, broken))
    ]
    try:
        result = calls[1].wait()
        assert result.code == 1 and "ValueError" in result.stderr
    finally:
        calls[0].kill_all()


def test_more_images_may_be_asked_for_and_fewer_are_refused(script, run, tmp_path):
    few = sampled(script, run, tmp_path / "out", num_images=8)
    more = sampled(script, run, tmp_path / "out", num_images=12)
    assert len(more) == 12 and few.items() <= more.items()
    error = refused(script, run, tmp_path / "out", num_images=8)
    assert "000008.png" in error and "beyond --num_images 8" in error and len(images(tmp_path / "out")) == 12


def test_what_is_written_of_all_images_is_of_all_of_them(script, conditional, tmp_path):
    sampled(script, conditional, tmp_path / "out", num_images=8, npz=True)
    table = (tmp_path / "out" / "samples.npz").read_bytes()
    sampled(script, conditional, tmp_path / "out", num_images=8)
    assert (tmp_path / "out" / "samples.npz").read_bytes() == table
    sampled(script, conditional, tmp_path / "out", num_images=12)
    assert not (tmp_path / "out" / "samples.npz").exists() and len(told(tmp_path / "out")) == 12


def test_the_batch_size_and_the_seed(script, run, tmp_path):
    sampled(script, run, tmp_path / "four", num_images=9)
    sampled(script, run, tmp_path / "nine", num_images=9, batch_size=9)
    sampled(script, run, tmp_path / "other", num_images=9, seed=1)
    assert numpy.abs(pixels(tmp_path / "four").astype(int) - pixels(tmp_path / "nine")).max() <= 1
    assert numpy.abs(pixels(tmp_path / "four").astype(int) - pixels(tmp_path / "other")).max() > 50


# Whose images


def test_samples_are_those_of_plain_diffusers(script, run, tmp_path):
    from diffusers import DDPMPipeline

    sampled(script, run, tmp_path / "run", num_images=4)
    sampled(script, run, tmp_path / "plain", num_images=4, scheduler="ddpm")
    pipeline = DDPMPipeline.from_pretrained(run)
    wanted = pipeline(batch_size=4, generator=generators(range(4)), num_inference_steps=2, output_type="np").images
    assert equal(pixels(tmp_path / "run"), wanted) and images(tmp_path / "plain") == images(tmp_path / "run")


def test_weights_of_runs_and_checkpoints(script, run, tmp_path):
    average = sampled(script, run, tmp_path / "average")
    raw = sampled(script, run, tmp_path / "raw", weights="raw")
    last = run / "checkpoint-4"
    assert average != raw
    assert sampled(script, run, tmp_path / "ema", weights="ema") == average
    assert sampled(script, last, tmp_path / "last") == average
    assert sampled(script, last, tmp_path / "last_raw", weights="raw") == raw
    assert sampled(script, run / "checkpoint-2", tmp_path / "earlier", weights="raw") not in (average, raw)
    manifest = json.loads((tmp_path / "last_raw" / "manifest.json").read_text())
    assert manifest["weights"] == "raw" and manifest["complete"] and manifest["num_images"] == 6
    assert "checkpoint-4" in manifest["command"] and manifest["networks"].keys() == {"unet"}


def test_a_run_without_average_and_an_unfinished_one(script, conditional, run, tmp_path):
    assert "raw weights only" in refused(script, conditional, tmp_path / "out", weights="ema")
    unfinished = tmp_path / "unfinished"
    (unfinished / "checkpoint-3").mkdir(parents=True)
    (unfinished / ".immiscible-run").touch()
    (unfinished / "config.yaml").write_bytes((run / "config.yaml").read_bytes())
    assert "no finished pipeline" in (error := refused(script, unfinished, tmp_path / "out")) and "checkpoint-3" in error
    assert "not a complete checkpoint" in refused(script, unfinished / "checkpoint-3", tmp_path / "out")


def test_classes_in_turn(script, conditional, tmp_path):
    from diffusers import DDPMPipeline

    sampled(script, conditional, tmp_path / "out", num_images=12, npz=True)
    labels = torch.arange(12) % 10
    with numpy.load(tmp_path / "out" / "samples.npz") as table:
        assert table["arr_1"].tolist() == labels.tolist()
        assert table["arr_0"].shape == (12, 8, 8, 1) and (table["arr_0"][..., 0] == pixels(tmp_path / "out")).all()
    assert told(tmp_path / "out") == [{"file_name": f"{number:06}.png", "label": number % 10} for number in range(12)]
    pipeline = DDPMPipeline.from_pretrained(conditional)
    with telling(pipeline.unet, labels[8:12]):
        wanted = pipeline(batch_size=4, generator=generators(range(8, 12)), num_inference_steps=2, output_type="np").images
    assert equal(pixels(tmp_path / "out")[8:12], wanted)


def test_classes_drawn_at_random_and_in_turn_are_the_same_images_where_they_agree(script, conditional, run, tmp_path):
    changes = {"num_images": 60, "batch_size": 30}
    drawn = sampled(script, conditional, tmp_path / "drawn", labels="random", npz=True, **changes)
    turns = sampled(script, conditional, tmp_path / "turns", **changes)
    classes = [derive_seed(0, "label", number) % 10 for number in range(60)]
    assert [line["label"] for line in told(tmp_path / "drawn")] == classes != [line["label"] for line in told(tmp_path / "turns")]
    assert numpy.load(tmp_path / "drawn" / "samples.npz")["arr_1"].tolist() == classes
    apart = numpy.abs(pixels(tmp_path / "drawn").astype(int) - pixels(tmp_path / "turns")).max((1, 2))
    assert all(apart[number] <= 1 for number in range(60) if classes[number] == number % 10) and apart.max() > 1
    assert sorted(drawn) == sorted(turns)
    assert "labels was" in refused(script, conditional, tmp_path / "turns", labels="random", **changes)
    assert "is told neither" in refused(script, run, tmp_path / "none", labels="equal")


def test_a_run_of_before_is_sampled_as_it_was(script, conditional, tmp_path):
    """Without the file for diffusers, and with a configuration that knows nothing of guidance."""
    before = shutil.copytree(conditional, tmp_path / "run")
    (before / "pipeline.py").unlink()
    flags = ("class_dropout_prob", "guidance_scale", "guidance_interval", "eval_guidance_scales", "- 1.0")
    lines = (before / "config.yaml").read_text().splitlines(keepends=True)
    (before / "config.yaml").write_text("".join(line for line in lines if not line.startswith(flags)))
    now = sampled(script, conditional, tmp_path / "now")
    for model in (before, before / "checkpoint-4"):
        assert sampled(script, model, tmp_path / model.name / "out") == now


@pytest.mark.slow
def test_guidance_of_classes(script, guidable, tmp_path):
    options = {"num_images": 12, "scheduler": "ddim"}
    plain, one, strong, none, early = (
        sampled(script, guidable, tmp_path / name, **options, **changes)
        for name, changes in {
            "plain": {},
            "one": {"guidance_scale": 1},
            "strong": {"guidance_scale": 3, "npz": True},
            "none": {"guidance_scale": 0},
            "early": {"guidance_scale": 3, "guidance_interval": [0.4, 1]},
        }.items()
    )
    assert plain == one and len({tuple(sorted(images.items())) for images in (plain, strong, none, early)}) == 4
    with numpy.load(tmp_path / "strong" / "samples.npz") as table:
        assert table["arr_1"].tolist() == [*range(10), 0, 1]
    assert sampled(script, guidable / "checkpoint-20", tmp_path / "checkpoint", guidance_scale=3, **options) == strong
    manifests = [json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("plain", "early")]
    assert [(each["guidance_scale"], each["guidance_interval"]) for each in manifests] == [(None, None), (3, [0.4, 1])]
    assert "guidance_scale was 3.0, is now 2.0" in refused(script, guidable, tmp_path / "strong", guidance_scale=2, **options)
    for changes, wanted in (
        ({"guidance_interval": [0.2, 0.8]}, "and --guidance_scale other than 1"),
        ({"guidance_scale": 2, "guidance_interval": [0.8, 0.2]}, "must have the lower number first, not 0.8 0.2"),
        ({"guidance_scale": -1}, "--guidance_scale must be at least 0, not -1"),
    ):
        assert wanted in refused(script, guidable, tmp_path / "out", **changes)


def test_a_network_that_was_always_told_the_class_is_not_guided(script, conditional, tmp_path):
    assert "models trained with --class_dropout_prob" in refused(script, conditional, tmp_path / "out", guidance_scale=0)


def test_class_names_by_their_line(script, names, tmp_path):
    """Images of two classes of one name differ, since they have numbers and so generators of their own."""
    from diffusers import StableDiffusionPipeline

    options = {"class_names": names, "guidance_scale": 3, "resolution": 32, "num_images": 7}
    result = script(words(model_folder(), tmp_path / "out", npz=True, **options), program=PROGRAM)
    assert result.code == 0, result.stderr
    assert "classes 0 to 0 get one image more" in result.stdout
    with numpy.load(tmp_path / "out" / "samples.npz") as table:
        assert table["arr_1"].tolist() == [0, 1, 2, 0, 1, 2, 0] and table["arr_0"].shape == (7, 32, 32, 3)
    pipeline = StableDiffusionPipeline.from_pretrained(model_folder())
    asked = {"prompt": ["crane", "owl", "crane", "crane"], "guidance_scale": 3, "height": 32, "width": 32}
    wanted = pipeline(**asked, generator=generators(range(4)), num_inference_steps=2, output_type="np").images
    found = pixels(tmp_path / "out")
    assert equal(found[:4], wanted) and (found[0] != found[2]).any()
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["prompts"] == ["crane", "owl", "crane"] and manifest["labels"] == "class names"
    assert [(line["text"], line["label"]) for line in told(tmp_path / "out")][1:4] == [("owl", 1), ("crane", 2), ("crane", 0)]


def test_guidance_and_the_order_of_prompts(script, tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    options = {"prompts": tmp_path / "prompts.txt", "resolution": 32, "num_images": 4}
    weak = sampled(script, model_folder(), tmp_path / "weak", guidance_scale=1, **options)
    strong = sampled(script, model_folder(), tmp_path / "strong", guidance_scale=9, **options)
    assert weak.keys() == strong.keys() and all(weak[name] != strong[name] for name in weak)
    (tmp_path / "prompts.txt").write_text("a dog\na cat\n")
    assert "prompts was" in refused(script, model_folder(), tmp_path / "weak", guidance_scale=1, **options)
    turned = sampled(script, model_folder(), tmp_path / "turned", guidance_scale=9, **options)
    assert all(turned[name] != strong[name] for name in strong)


@pytest.mark.slow
def test_adapters_of_a_run_its_checkpoint_and_by_hand(script, adapters, names, tmp_path):
    options = {"class_names": names, "guidance_scale": 1, "num_images": 3}
    of_run = sampled(script, adapters, tmp_path / "run", **options)
    assert pixels(tmp_path / "run").shape == (3, 32, 32, 3)  # the run's resolution
    assert sampled(script, adapters / "checkpoint-3", tmp_path / "checkpoint", **options) == of_run
    assert sampled(script, model_folder(), tmp_path / "by_hand", lora=adapters, resolution=32, **options) == of_run
    assert sampled(script, model_folder(), tmp_path / "without", resolution=32, **options) != of_run
    assert "loaded already" in refused(script, adapters, tmp_path / "twice", lora=adapters, **options)


def test_prompts_that_are_cut_off_are_counted(script, tmp_path):
    (tmp_path / "prompts.txt").write_text(f"a cat\n{'a very long caption ' * 40}\n")
    options = {"prompts": tmp_path / "prompts.txt", "guidance_scale": 1, "resolution": 32, "num_images": 3}
    result = script(words(model_folder(), tmp_path / "out", **options), program=PROGRAM)
    assert result.code == 0 and "1 of 2 prompts, first line 2, are cut off after the text encoder's 77 tokens" in result.stdout
    assert [line["text"][:6] for line in told(tmp_path / "out")] == ["a cat", "a very", "a cat"]


@pytest.mark.slow
def test_the_checkpoint_that_a_run_started_from_may_have_moved(script, adapters, names, tmp_path):
    """The path in the run's flags may be relative, or gone; other weights in its place are not taken for the right ones."""
    options = {"class_names": names, "guidance_scale": 1, "num_images": 3}
    there = sampled(script, adapters, tmp_path / "there", **options)
    moved = shutil.copytree(adapters, tmp_path / "run")
    config = (moved / "config.yaml").read_text()
    (moved / "config.yaml").write_text(config.replace(str(model_folder()), "models/tiny"))
    for model in (moved, moved / "checkpoint-3"):
        error = refused(script, model, tmp_path / "out", **options)
        assert "needs what it was trained with" in error and "models/tiny" in error and "--base says where it is now" in error
        assert sampled(script, model, tmp_path / f"{model.name} moved", base=model_folder(), **options) == there
        assert "trained with other weights" in refused(script, model, tmp_path / "out", base=model_folder(2), **options)


@pytest.mark.slow
def test_a_text_checkpoint_of_an_unfinished_run(script, names, tmp_path):
    folder = tmp_path / "run"
    assert script(tiny_text(folder, use_ema=True, max_train_steps=2), program="train_text_to_image.py").code == 0
    options = {"class_names": names, "guidance_scale": 1, "num_images": 3}
    finished = sampled(script, folder, tmp_path / "finished", **options)
    assert sampled(script, folder / "checkpoint-2", tmp_path / "ema", weights="ema", **options) == finished
    raw = sampled(script, folder / "checkpoint-2", tmp_path / "raw", weights="raw", **options)
    assert raw != finished
    assert "holds the average alone" in refused(script, folder, tmp_path / "out", weights="raw", **options)


# Samplers


@pytest.mark.parametrize("scheduler", ["ddpm", "ddim", "dpm_solver", "euler", "euler_ancestral", "heun", "pndm", "unipc"])
def test_every_sampler_samples_latents(script, scheduler, names, tmp_path):
    options = {"class_names": names, "guidance_scale": 1, "num_images": 2, "resolution": 32, "num_inference_steps": 3}
    sampled(script, model_folder(), tmp_path / "out", scheduler=scheduler, **options)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert not manifest["scheduler_settings"].get("clip_sample")
    assert manifest["scheduler"].lower().startswith(scheduler.replace("_", "")[:4])


def test_samplers_of_pixels(script, run, tmp_path):
    from diffusers import DDIMPipeline

    sampled(script, run, tmp_path / "ddim", scheduler="ddim", num_images=4)
    sampled(script, run, tmp_path / "dpm", scheduler="dpm_solver", num_images=4)
    wanted = DDIMPipeline.from_pretrained(run)(batch_size=4, generator=generators(range(4)), num_inference_steps=2, output_type="np")
    assert equal(pixels(tmp_path / "ddim"), wanted.images)
    assert (pixels(tmp_path / "ddim") != pixels(tmp_path / "dpm")).any()
    assert "ddpm, ddim, dpm_solver only" in refused(script, run, tmp_path / "out", scheduler="euler")


def test_a_flow_keeps_its_sampler(script, tmp_path):
    flow = trained(script, tmp_path / "run", noise_process="flow", prediction_type="flow_prediction")
    assert len(sampled(script, flow, tmp_path / "out")) == 6
    assert "sampled by its own" in refused(script, flow, tmp_path / "other", scheduler="ddim")


def test_half_precision_is_another_sample_of_its_own(script, run, tmp_path):
    sampled(script, run, tmp_path / "full")
    sampled(script, run, tmp_path / "half", mixed_precision="bf16")
    difference = numpy.abs(pixels(tmp_path / "full").astype(int) - pixels(tmp_path / "half"))
    assert 0 < difference.mean() < 8
    assert "needs a GPU" in refused(script, run, tmp_path / "out", mixed_precision="fp16")


# Mistakes


@pytest.mark.parametrize("change", ["--num_images=0", "--num_inference_steps=0", "--batch_size=0", "--seed=-1", "--resolution=0"])
def test_numbers_out_of_range(run, tmp_path, change):
    with pytest.raises(UserError, match=f"{change.partition('=')[0]} must be at least"):
        entry(PROGRAM)([*words(run, tmp_path / "out"), change])


def test_files_of_prompts(run, tmp_path):
    path = tmp_path / "prompts.txt"
    for content, wanted in (
        (b"", "is empty"),
        (b"\n \n", "is empty"),
        (b"a\n\nb\n", "line 2 is empty"),
        (b"\xff\xfe\x00", "not a text file"),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=wanted):
            read_lines(path, "--prompts")
    with pytest.raises(UserError, match=r"--prompts .*No such file"):
        read_lines(tmp_path / "nowhere", "--prompts")
    path.write_bytes("\ufeffgrün\r\n b \nc\u2028d\x85e\x0cf\n".encode())  # these are within a line
    assert read_lines(path, "--prompts") == ["grün", "b", "c\u2028d\x85e\x0cf"]
    with pytest.raises(UserError, match="choose one"):
        entry(PROGRAM)(words(run, tmp_path / "out", prompts=path, class_names=path))


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"num_inference_steps": 1001}, "exceeds the 1000 steps"),
        ({"num_images": "many"}, "argument --num_images: invalid int value"),
        ({"base": "x"}, "has all that it needs; leave it out"),
        ({"guidance_scale": 2}, "--guidance_scale is for text-to-image"),
        ({"resolution": 16}, "--resolution is for text-to-image"),
        ({"lora": "nowhere"}, "--lora is for text-to-image"),
        ({"model": "/nowhere"}, "neither a run, nor a checkpoint of one, nor a diffusers pipeline"),
    ],
)
def test_mistakes_are_one_line(script, run, tmp_path, changes, wanted):
    assert wanted in refused(script, changes.pop("model", run), tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({}, "give --prompts or --class_names"),
        ({"prompts": "good"}, "--guidance_scale is needed"),
        ({"prompts": "good", "guidance_scale": 0.5}, "--guidance_scale must be at least 1 with prompts, not 0.5"),
        ({"prompts": "good", "guidance_scale": 2, "guidance_interval": [0, 1]}, "--guidance_interval is for a model that is told classes"),
        ({"prompts": "good", "guidance_scale": "nan"}, "--guidance_scale must be finite, not nan"),
        ({"prompts": "good", "guidance_scale": 1, "num_inference_steps": 1000}, "would begin beyond the model's last step, 999"),
        ({"prompts": "good", "guidance_scale": 1, "base": "good"}, "has all that it needs"),
        ({"prompts": "empty", "guidance_scale": 1}, "is empty"),
        ({"prompts": "good", "guidance_scale": 1, "resolution": 30}, "--resolution 30 must be a multiple of 8"),
        ({"prompts": "good", "guidance_scale": 1, "weights": "ema"}, "is neither"),
        ({"prompts": "good", "guidance_scale": 1, "lora": "nowhere"}, "no adapters for this network"),
    ],
)
def test_mistakes_with_prompts_are_one_line(script, tmp_path, changes, wanted):
    (tmp_path / "good").write_text("a cat\n")
    (tmp_path / "empty").write_text("\n\n")
    changes = {name: tmp_path / value if name in ("prompts", "class_names", "lora", "base") else value for name, value in changes.items()}
    assert wanted in refused(script, model_folder(), tmp_path / "out", **changes)


def test_damaged_weights_are_not_sampled(script, run, tmp_path):
    shutil.copytree(run, tmp_path / "copy")
    checkpoint = max((tmp_path / "copy").glob("checkpoint-*"))
    weights = load_file(tmp_path / "copy" / "unet" / WEIGHTS)
    save_file({name: each for name, each in weights.items() if name != "conv_out.bias"}, tmp_path / "copy" / "unet" / WEIGHTS, PYTORCH)
    path = checkpoint / "unet" / WEIGHTS
    path.write_bytes(path.read_bytes()[:-8] + b"\0" * 8)
    for model, told in (
        (tmp_path / "copy", "is damaged: 1 weights are not in its files, the first conv_out.bias of unet"),
        (checkpoint, f"is not a complete checkpoint of this suite (unet/{WEIGHTS} is not what was saved"),
    ):
        assert told in refused(script, model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_of_something_else_is_left_alone(script, run, tmp_path):
    (tmp_path / "out").mkdir()
    for name in ("mine.txt", ".partial-mine"):
        (tmp_path / "out" / name).write_text("mine")
    assert "holds .partial-mine and no manifest.json" in refused(script, run, tmp_path / "out")
    assert len(list((tmp_path / "out").iterdir())) == 2
    sampled(script, run, tmp_path / "samples")
    (tmp_path / "samples" / "mine.png").write_bytes(b"mine")
    assert "mine.png" in refused(script, run, tmp_path / "samples")
    (tmp_path / "samples" / "mine.png").unlink()
    error = refused(script, run, tmp_path / "samples", num_inference_steps=3, seed=5)
    assert "num_inference_steps was 2, is now 3" in error and "seed was 0, is now 5" in error
    assert "networks was" in refused(script, run, tmp_path / "samples", weights="raw")
    for content in ("{", "[]", "null", "{}", "3"):
        (tmp_path / "samples" / "manifest.json").write_text(content)
        assert "its manifest.json is broken; give a new folder" in refused(script, run, tmp_path / "samples")


def test_a_colored_image_among_grey_ones_is_sampled_again(script, run, tmp_path):
    sampled(script, run, tmp_path / "out")
    before = (tmp_path / "out" / "000001.png").read_bytes()
    Image.new("RGB", Image.open(tmp_path / "out" / "000001.png").size, "red").save(tmp_path / "out" / "000001.png")
    sampled(script, run, tmp_path / "out", npz=True)
    assert (tmp_path / "out" / "000001.png").read_bytes() == before


def test_a_model_that_diverged_is_one_line_on_two_processes(script, run, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(run, tmp_path / "run")
    weights = tmp_path / "run" / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["conv_out.bias"].fill_(float("nan"))
    save_file(tensors, weights)
    results = [one.wait() for one in script.start_ranks(words(tmp_path / "run", tmp_path / "out"), program=PROGRAM)]
    assert [result.code for result in results] == [1, 1] and "NaN" in results[0].error and "Traceback" not in results[1].stderr
