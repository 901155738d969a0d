"""The run's folder belongs to one run, nobody else's files are touched, and what a checkpoint does not change stays as it is."""

import hashlib
import json
import shutil

import pytest
from launch import tiny
from pictures import colored

from immiscible.data.bundled import load_digits
from immiscible.data.sources import Subset


def weights(folder, step):
    return hashlib.sha256((folder / f"checkpoint-{step}" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def finished(script, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert script(tiny(folder, checkpointing_steps=2)).code == 0
    return folder


@pytest.fixture
def run(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize("precision", [pytest.param("bf16", marks=pytest.mark.slow), "no"])
def test_a_checkpoint_changes_nothing_in_the_training_that_goes_on(script, tmp_path, precision):
    for name, every in (("often", 2), ("once", 4)):
        assert script(tiny(tmp_path / name, mixed_precision=precision, checkpointing_steps=every)).code == 0
    assert weights(tmp_path / "often", 4) == weights(tmp_path / "once", 4)
    shutil.rmtree(tmp_path / "often" / "checkpoint-4")
    (tmp_path / "often" / "summary.json").unlink()
    resumed = tiny(tmp_path / "often", mixed_precision=precision, checkpointing_steps=2, resume_from_checkpoint="latest")
    assert script(resumed).code == 0
    assert weights(tmp_path / "often", 4) == weights(tmp_path / "once", 4)


@pytest.mark.parametrize("flag", [{}, {"overwrite_output_dir": True}, {"resume_from_checkpoint": "latest"}])
@pytest.mark.parametrize("name", ["README.md", "config.yaml", "samples/mine.png", "unet/code.py", "logs/mine.txt"])
def test_a_folder_of_something_else_is_refused_untouched(script, tmp_path, name, flag):
    mine = tmp_path / name
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("mine")
    result = script(tiny(tmp_path, **flag))
    assert result.code == 2
    assert name.split("/")[0] in result.error
    assert mine.read_text() == "mine" and len(list(tmp_path.rglob("*"))) == (2 if "/" in name else 1)


@pytest.mark.parametrize("folder", [".", "..", "../other", "/elsewhere", "samples"])
def test_logs_have_a_folder_of_their_own(script, tmp_path, folder):
    result = script(tiny(tmp_path / "run", logging_dir=folder))
    assert result.code == 2 and f"--logging_dir {folder}" in result.error


def test_links_are_removed_and_what_they_point_to_stays(script, run, tmp_path):
    target = tmp_path / "album"
    target.mkdir()
    (target / "photo.png").write_text("photo")
    shutil.rmtree(run / "samples")
    (run / "samples").symlink_to(target)
    assert script(tiny(run, overwrite_output_dir=True)).code == 0
    assert (target / "photo.png").read_text() == "photo" and not (run / "samples").is_symlink()


def test_branching_off_an_older_checkpoint_needs_another_folder(script, run, tmp_path):
    result = script(tiny(run, resume_from_checkpoint="checkpoint-2", learning_rate=5e-3))
    assert result.code == 2 and "later checkpoints (checkpoint-4)" in result.error
    branch = tiny(tmp_path / "branch", resume_from_checkpoint=run / "checkpoint-2", learning_rate=5e-3, checkpointing_steps=100)
    assert script(branch).code == 0
    assert (tmp_path / "branch" / "checkpoint-2" / "training_state.json").exists()  # its beginning, should it be killed
    assert weights(tmp_path / "branch", 4) != weights(run, 4)


def test_latest_does_not_start_a_finished_run_anew(script, run):
    for checkpoint in run.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    before = (run / "model_index.json").read_bytes()
    result = script(tiny(run, resume_from_checkpoint="latest", prediction_type="v_prediction"))
    assert result.code == 2 and "has no complete checkpoint left" in result.error
    assert (run / "model_index.json").read_bytes() == before


def test_the_saved_config_neither_deletes_nor_resumes(script, run, tmp_path):
    assert script(tiny(run, overwrite_output_dir=True)).code == 0
    result = script(["--config", run / "config.yaml"])
    assert result.code == 2 and "holds a finished run" in result.error
    assert script(["--config", run / "config.yaml", "--output_dir", tmp_path / "other"]).code == 0
    assert weights(tmp_path / "other", 4) == weights(run, 4)


def test_few_noise_levels_need_no_evaluation_flag(script, tmp_path):
    assert script(tiny(tmp_path / "run", ddpm_num_steps=10)).code == 0


def test_subsets_of_one_size_are_different_data():
    source = load_digits()
    assert Subset(source, [0, 1, 2]).fingerprint != Subset(source, [0, 1, 3]).fingerprint


@pytest.mark.slow
def test_metrics_after_a_kill_are_those_of_the_whole_run(script, tmp_path):
    flags = {"max_train_steps": 8, "logging_steps": 4, "checkpointing_steps": 3}
    for name in ("whole", "cut"):
        assert script(tiny(tmp_path / name, **flags)).code == 0
    cut = tmp_path / "cut"
    for step in (6, 8):
        shutil.rmtree(cut / f"checkpoint-{step}")
    (cut / "summary.json").unlink()
    assert script(tiny(cut, **flags, resume_from_checkpoint="latest")).code == 0
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()] for name in ("whole", "cut")
    ]
    assert losses[0] == losses[1]


def test_a_mistake_that_only_the_first_process_meets_ends_both_with_one_line(script, tmp_path):
    argv = tiny(tmp_path / "run", resolution=16, eval_steps=2, eval_features="digits", eval_samples=4, eval_inference_steps=[1])
    results = [process.wait(120) for process in script.start_ranks(argv, 2)]
    assert [result.code != 0 for result in results] == [True, True]
    assert "8x8" in results[0].error and results[1].stderr.count("error:") == 0


def test_images_of_an_absurd_scale_are_one_line(script, tmp_path):
    import numpy
    from PIL import Image

    images = tmp_path / "images"
    images.mkdir()
    for number in range(16):
        Image.fromarray(numpy.full((8, 8), 1e30, numpy.float32)).save(images / f"{number}.tiff")
    result = script(tiny(tmp_path / "run", train_data_dir=images, preserve_input_precision=True, noise_coupling="assignment"))
    assert result.code == 1 and "1e+30" in result.error and "not from 0 to 1" in result.error  # bad images, before they are paired


def test_evaluation_changes_no_bit_of_training(script, tmp_path):
    evaluation = {"eval_steps": 2, "eval_samples": 70, "eval_inference_steps": [1, 2]}
    assert script(tiny(tmp_path / "without", use_ema=True, dropout=0.1)).code == 0
    assert script(tiny(tmp_path / "with", use_ema=True, dropout=0.1, **evaluation)).code == 0
    assert weights(tmp_path / "with", 4) == weights(tmp_path / "without", 4)
    lines = [json.loads(line) for line in (tmp_path / "with" / "evaluation.jsonl").read_text().splitlines()]
    assert [(line["step"], sorted(line["frechet_distance"])) for line in lines] == [(2, ["1", "2"]), (4, ["1", "2"])]
    assert script(tiny(tmp_path / "again", use_ema=True, dropout=0.1, **evaluation)).code == 0
    again = [json.loads(line) for line in (tmp_path / "again" / "evaluation.jsonl").read_text().splitlines()]
    assert [line["frechet_distance"] for line in again] == [line["frechet_distance"] for line in lines]


def test_held_out_images_give_a_loss_per_noise_level(script, tmp_path):
    flags = {"eval_steps": 4, "eval_samples": 70, "eval_inference_steps": [1], "validation_split": 0.05, "eval_features": "pixels"}
    assert script(tiny(tmp_path / "run", **flags)).code == 0
    (line,) = [json.loads(text) for text in (tmp_path / "run" / "evaluation.jsonl").read_text().splitlines()]
    assert next(iter(line["validation_loss"])) == "0-99" and len(line["validation_loss"]) == 10
    assert line["reference_images"] == 1797 - 90 and line["feature"] == "FD-pixels-8x8"
    assert line["held_out_images"] == 90 and line["frechet_distance_held_out"]["1"] > 0 and 0.5 < line["nearest_neighbor_ratio"]["1"] < 2


@pytest.mark.slow
def test_the_weights_are_measured_beside_their_average(script, tmp_path):
    """As the run without an average measures them; the average, of constant decay from its second update on, is elsewhere."""
    flags = {"eval_steps": 4, "eval_samples": 70, "eval_inference_steps": [1], "validation_split": 0.05, "eval_features": "pixels"}
    average = {"use_ema": True, "ema_min_decay": 0.9999, "eval_raw_weights": True}
    for name, changes in (("plain", {}), ("averaged", average)):
        assert script(tiny(tmp_path / name, **flags, **changes)).code == 0
    plain, averaged = (json.loads((tmp_path / name / "evaluation.jsonl").read_text()) for name in ("plain", "averaged"))
    for measure in ("frechet_distance", "frechet_distance_held_out", "validation_loss"):
        assert averaged["raw"][measure] == plain[measure] != averaged[measure]
    assert (plain["weights"], averaged["weights"]) == ("raw", "ema") and "raw" not in plain


@pytest.mark.slow
def test_images_of_another_folder_are_measured_against(script, tmp_path):
    colored(tmp_path / "bright", count=12)
    flags = {"eval_steps": 4, "eval_samples": 6, "eval_inference_steps": [1], "eval_feature_directions": 3, "eval_features": "pixels"}
    result = script(tiny(tmp_path / "run", **flags, eval_data_dir=tmp_path / "bright"))
    assert result.code == 0, result.stderr
    (line,) = [json.loads(text) for text in (tmp_path / "run" / "evaluation.jsonl").read_text().splitlines()]
    assert line["feature"] == "FD-pixels-8x8-PCA3" and line["num_features"] == 3 and len(line["validation_loss"]) == 10
    assert line["held_out_images"] == 12 and line["reference_images"] == 1797 and "12 images" in line["held_out"]
    assert line["frechet_distance_held_out"]["1"] != line["frechet_distance"]["1"] and line["nearest_neighbor_ratio"]["1"] > 0
    assert "distance from the nearest training image over that from the nearest image held out" in result.stderr
