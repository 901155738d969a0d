"""Every line of "Bad input": one clear line, the right exit code, nothing lost."""

import hashlib
import json
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy
import pytest
from launch import SCRIPT, accelerate_launch, run_command, tiny
from PIL import Image
from tiny_text import FINETUNE, tiny_text

METHODS = {
    "noise_coupling": ["independent", "assignment", "nearest", "flipped_assignment"],
    "timestep_sampling": ["uniform", "asymmetric", "asymmetric_released", "logit_normal"],
    "loss_weighting": ["none", "change_aware", "change_aware_released", "min_snr", "snr", "p2", "velocity"],
}


def photos(folder: Path, count: int = 4) -> Path:
    folder.mkdir()
    draw = numpy.random.default_rng(0)
    for number in range(count):
        Image.fromarray(draw.integers(0, 256, (8, 8, 3), dtype=numpy.uint8)).save(folder / f"photo-{number}.png")
    return folder


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-60])


def snapshot(folder: Path) -> dict[str, tuple[str, int]]:
    """Content and modification time of every file."""
    return {
        str(path.relative_to(folder)): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def finished_run(script, tmp_path_factory):
    """A finished run of four steps with checkpoints 2 and 4. Tests that change it work on a `copy`."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert script(tiny(folder, checkpointing_steps=2, use_ema=True)).code == 0
    return folder


@pytest.fixture
def copy(finished_run, tmp_path):
    return Path(shutil.copytree(finished_run, tmp_path / "run"))


def resumed(folder, request="latest", **changes):
    return tiny(folder, **{"checkpointing_steps": 2, "use_ema": True, "resume_from_checkpoint": request, **changes})


# Data


def test_missing_data_folder(script, tmp_path):
    result = script(tiny(tmp_path / "run", train_data_dir=tmp_path / "nowhere"))
    assert result.code == 2
    assert result.error == f"--train_data_dir {tmp_path / 'nowhere'}: no such folder"
    assert not (tmp_path / "run").exists()


def test_empty_data_folder(script, tmp_path):
    (tmp_path / "empty").mkdir()
    result = script(tiny(tmp_path / "run", train_data_dir=tmp_path / "empty"))
    assert result.code == 2
    assert f"--train_data_dir {tmp_path / 'empty'}: no training images found" in result.error
    assert not (tmp_path / "run").exists()


def test_two_sources(script, tmp_path):
    result = script([*tiny(tmp_path / "run"), "--train_data_dir", photos(tmp_path / "photos")])
    assert result.code == 2
    assert "--train_data_dir and --bundled_data are given together" in result.error


@pytest.mark.parametrize("workers", [0, 2])
def test_truncated_image_is_named(script, tmp_path, workers):
    truncate(photos(tmp_path / "photos") / "photo-2.png")
    result = script(tiny(tmp_path / "run", train_data_dir=tmp_path / "photos", train_batch_size=4, dataloader_num_workers=workers))
    assert result.code == 1
    assert "photo-2.png" in result.error and "truncated" in result.error and "--skip_bad_images" in result.error
    assert not (tmp_path / "run" / "model_index.json").exists()


def test_file_that_is_no_image_is_named(script, tmp_path):
    (photos(tmp_path / "photos") / "photo-9.png").write_text("not a picture")
    result = script(tiny(tmp_path / "run", train_data_dir=tmp_path / "photos", train_batch_size=5))
    assert result.code == 1
    assert "photo-9.png" in result.error and "not an image format" in result.error


def test_skip_bad_images_counts_them(script, tmp_path):
    folder = photos(tmp_path / "photos")
    truncate(folder / "photo-0.png")
    truncate(folder / "photo-2.png")
    result = script(tiny(tmp_path / "run", train_data_dir=folder, train_batch_size=4, skip_bad_images=True))
    assert result.code == 0
    notices = [line for line in result.stderr.splitlines() if "skipped image" in line]
    assert len(notices) == 2  # once each, though every epoch meets them again
    assert {name for name in ("photo-0", "photo-1", "photo-2", "photo-3") if any(name in line for line in notices)} == {
        "photo-0",
        "photo-2",
    }
    assert "(1 skipped so far)" in notices[0] and "(2 skipped so far)" in notices[1]
    assert (tmp_path / "run" / "model_index.json").exists()


def test_skip_bad_images_when_all_are_bad(script, tmp_path):
    for path in photos(tmp_path / "photos").iterdir():
        truncate(path)
    result = script(tiny(tmp_path / "run", train_data_dir=tmp_path / "photos", train_batch_size=4, skip_bad_images=True))
    assert result.code == 1
    assert "none of the images can be read" in result.error


@pytest.mark.parametrize("preserve", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_image_with_nan_or_infinite_pixels(script, tmp_path, value, preserve):
    pixels = numpy.full((8, 8), 0.5, numpy.float32)
    pixels[3, 4] = value
    Image.fromarray(pixels).save(photos(tmp_path / "photos") / "measured.tiff")
    result = script(tiny(tmp_path / "run", train_data_dir=tmp_path / "photos", train_batch_size=5, preserve_input_precision=preserve))
    assert result.code == 1
    assert "measured.tiff" in result.error and "NaN or infinite" in result.error


def test_fewer_images_than_a_batch_with_assignment(script, tmp_path):
    result = script(tiny(tmp_path / "run", train_data_dir=photos(tmp_path / "photos"), train_batch_size=5, noise_coupling="assignment"))
    assert result.code == 2
    assert "4 images" in result.error and "batch of 5" in result.error and "--noise_coupling assignment" in result.error
    assert "--train_batch_size to at most 4" in result.error
    assert not (tmp_path / "run").exists()


def test_fewer_images_than_a_batch_without_pairing_is_a_warning(script, tmp_path):
    result = script(tiny(tmp_path / "run", train_data_dir=photos(tmp_path / "photos"), train_batch_size=6, max_train_steps=2))
    assert result.code == 0
    assert "4 images do not fill a batch of 6" in result.stderr and "images repeat" in result.stderr


def test_batch_of_one_with_assignment_works_and_warns_once(script, tmp_path):
    result = script(tiny(tmp_path / "run", train_batch_size=1, noise_coupling="assignment"))
    assert result.code == 0
    assert result.stderr.count("is the identity") == 1
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 4 and all(line["pair_distance"] == line["pair_distance_drawn"] for line in lines)


# Flags


@pytest.mark.parametrize("flag", METHODS)
def test_unknown_method_name_lists_the_known_ones(script, tmp_path, flag):
    result = script(tiny(tmp_path / "run", **{flag: "magic"}))
    assert result.code == 2
    assert f"--{flag}" in result.error and "magic" in result.error
    assert all(name in result.error for name in METHODS[flag])


HUGE = "1" + "0" * 30
OUT_OF_RANGE = [
    ({"timestep_sampling": "asymmetric", "asymmetric_k": 0.5}, "--asymmetric_k", "0.5"),
    ({"timestep_sampling": "asymmetric", "asymmetric_k": "nan"}, "--asymmetric_k", "nan"),
    ({"timestep_sampling": "asymmetric_released", "asymmetric_k": 0}, "--asymmetric_k", "0"),
    ({"loss_weighting": "change_aware", "change_aware_lambda": 0.4}, "--change_aware_lambda", "0.4"),
    ({"loss_weighting": "change_aware_released", "change_aware_lambda": 1.2}, "--change_aware_lambda", "1.2"),
    ({"timestep_sampling": "asymmetric", "asymmetric_tau": 0}, "--asymmetric_tau", "0"),
    ({"timestep_sampling": "asymmetric", "asymmetric_tau": 1001}, "--asymmetric_tau", "1001"),
    ({"timestep_sampling": "asymmetric", "asymmetric_r": -3}, "--asymmetric_r", "-3"),
    ({"timestep_sampling": "asymmetric", "asymmetric_r": 10, "asymmetric_tau": 700}, "--asymmetric_r", "--asymmetric_tau"),
    ({"timestep_sampling": "logit_normal", "logit_std": 0}, "--logit_std", "0"),
    ({"loss_weighting": "min_snr", "snr_gamma": -1}, "--snr_gamma", "-1"),
    ({"snr_gamma": 5}, "--snr_gamma", "min_snr"),
    ({"loss_weighting": "p2", "p2_k": -1}, "--p2_k", "-1"),
    ({"loss_weighting": "p2", "p2_gamma": -1}, "--p2_gamma", "-1"),
    ({"noise_coupling": "nearest", "coupling_candidates": 0}, "--coupling_candidates", "0"),
    ({"noise_coupling": "assignment", "coupling_min_timestep": 1000}, "--coupling_min_timestep", "1000"),
    ({"coupling_solver": "magic"}, "--coupling_solver", "auction"),
    ({"coupling_start_step": -1}, "--coupling_start_step", "-1"),
    ({"noise_process": "flow"}, "--prediction_type", "flow_prediction"),
    ({"prediction_type": "flow_prediction"}, "flow_prediction", "flow"),
    ({"ddpm_beta_start": 0.5}, "--ddpm_beta_start", "0.5"),
    ({"image_scale": 0}, "--image_scale", "0"),
    ({"resolution": 9}, "--resolution", "9"),
    ({"train_batch_size": 0}, "--train_batch_size", "0"),
    ({"max_train_steps": 0}, "--max_train_steps", "0"),
    ({"learning_rate": -1}, "--learning_rate", "-1"),
    ({"learning_rate": "nan"}, "--learning_rate", "nan"),
    ({"adam_beta2": 1}, "--adam_beta2", "1"),
    ({"dropout": 1.5}, "--dropout", "1.5"),
    ({"ddpm_num_inference_steps": 2000}, "--ddpm_num_inference_steps", "2000"),
    ({"ddpm_num_steps": 0}, "--ddpm_num_steps", "0"),
    ({"seed": -1}, "--seed", "-1"),
    ({"mixed_precision": "fp16"}, "--mixed_precision fp16", ""),
    ({"model_preset": "unet-huge"}, "--model_preset", "unet-tiny"),
    ({"model_preset": None, "model_config_name_or_path": "no/such-model"}, "--model_config_name_or_path no/such-model", ""),
    ({"eval_features": "magic"}, "--eval_features", "pixels"),
    ({"eval_data_dir": "photos"}, "--eval_data_dir", "--eval_steps"),
    ({"eval_data_dir": "photos", "eval_steps": 1, "validation_split": 0.1}, "--validation_split and --eval_data_dir", "one of them"),
    ({"eval_data_dir": "nowhere", "eval_steps": 1}, "--eval_data_dir nowhere", "no such folder"),
    ({"max_train_samples": 0}, "--max_train_samples", "0"),
    ({"checkpoints_total_limit": 0}, "--checkpoints_total_limit", "0"),
    ({"resolution": "big"}, "--resolution", "big"),
    ({"dataset_name": "no-such/data"}, "--dataset_name no-such/data", ""),
    ({"overwrite_output_dir": True, "resume_from_checkpoint": "latest"}, "--resume_from_checkpoint", "--overwrite_output_dir"),
    # Beyond what a machine or a number holds
    *(({name: HUGE}, f"--{name} must be at most", HUGE) for name in ("resolution", "ddpm_num_steps", "coupling_reservoir")),
    *(({name: HUGE}, f"--{name} must be at most", HUGE) for name in ("coupling_candidates", "train_batch_size", "coupling_window")),
    *(({name: HUGE}, f"--{name} must be at most", HUGE) for name in ("eval_batch_size", "eval_samples", "eval_inference_steps")),
    *(({name: "inf"}, f"--{name} must be finite", "inf") for name in ("learning_rate", "adam_weight_decay", "adam_epsilon")),
    *(({name: "inf"}, f"--{name} must be finite", "inf") for name in ("noise_offset", "input_perturbation", "ema_inv_gamma")),
    ({"learning_rate": "1e38"}, "--learning_rate must be at most", "1e+38"),
    ({"adam_epsilon": "1e30"}, "--adam_epsilon must be from 0 to 1", "1e+30"),
    ({"image_scale": "1e30"}, "--image_scale must be at most", "1e+30"),
    ({"loss_weighting": "p2", "p2_gamma": "1e30"}, "--p2_gamma must be at most", "1e+30"),
    ({"loss_weighting": "p2", "p2_k": "1e30"}, "--p2_k must be at most", "1e+30"),
    ({"eval_batch_size": 10_000_000}, "--eval_batch_size must be at most", "10000000"),
    ({"noise_process": "flow", "prediction_type": "flow_prediction", "sampling_scheduler": "ddim"}, "--sampling_scheduler ddim", "flow"),
    ({"logging_dir": "checkpoint-1", "logger": "tensorboard"}, "--logging_dir checkpoint-1", "a folder of its own"),
    ({"train_data_dir": ""}, "--train_data_dir must not be empty", ""),
]
TEXT_OUT_OF_RANGE = [
    ({"use_lora": True, "adam_epsilon": 0}, "--adam_epsilon must be at least 1.2e-38 with --use_lora"),
    ({"adam_weight_decay": "inf", "use_ema": True}, "--adam_weight_decay must be finite, not inf"),
    ({"max_train_steps": None, "num_train_epochs": 0}, "--num_train_epochs must be at least 1, not 0"),
    ({"use_lora": True, "rank": HUGE}, f"--rank must be at most 4096, not {HUGE}"),
    ({"validation_inference_steps": HUGE}, f"--validation_inference_steps must be at most 100000, not {HUGE}"),
    ({"eval_inference_steps": HUGE}, f"--eval_inference_steps must be at most 100000, not {HUGE}"),
    ({"guidance_scale": "nan"}, "--guidance_scale must be finite, not nan"),
    ({"guidance_scale": "1e30"}, "--guidance_scale must be at most 100, not 1e+30"),
]


@pytest.mark.parametrize(("changes", "names", "value"), OUT_OF_RANGE, ids=lambda item: str(item) if isinstance(item, dict) else "")
def test_out_of_range(script, tmp_path, changes, names, value):
    result = script(tiny(tmp_path / "run", **changes))
    assert result.code == (1 if "dataset_name" in changes else 2), result.stderr
    assert names in result.error and value in result.error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("changes", "line"), TEXT_OUT_OF_RANGE, ids=lambda item: str(item) if isinstance(item, dict) else "")
def test_out_of_range_for_prompts(script, tmp_path, changes, line):
    result = script(tiny_text(tmp_path / "run", pretrained_model_name_or_path="x", train_data_dir="y", **changes), program=FINETUNE)
    assert result.code == 2 and result.error.startswith(line) and not (tmp_path / "run").exists()


def test_names_that_are_none(script, tmp_path):
    """An unset variable of the shell, and a name that no file system takes; the working folder stays as it was."""
    for name, line in (("", "--output_dir must not be empty"), ("x" * 300, "--output_dir must not hold a name of more than 255 bytes")):
        result = script(tiny(name), cwd=tmp_path)
        assert result.code == 2 and result.error.startswith(line) and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("package", "changes"), [("wandb", {"logger": "wandb"}), ("xformers", {"enable_xformers_memory_efficient_attention": True})]
)
def test_missing_optional_package(script, tmp_path, package, changes):
    if find_spec(package):
        pytest.skip(f"{package} is installed")
    result = script(tiny(tmp_path / "run", **changes))
    assert result.code == 2
    assert f"--{next(iter(changes))}" in result.error and f"`pip install {package}`" in result.error
    assert not (tmp_path / "run").exists()


# Configuration files


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("no_such_flag: 1\n", ["no_such_flag"]),
        ("resolution: big\n", ["--resolution", "big"]),
        ("resolution: 2.5\n", ["--resolution", "2.5"]),
        ("use_ema: maybe\n", ["--use_ema", "maybe"]),
        ("noise_coupling: magic\n", ["--noise_coupling", "magic", "assignment"]),
        ("resolution: [8\n", ["not valid YAML"]),
        ("resolution: {x: 8}\n", ["resolution", "mapping"]),
        ("- resolution\n", ["flag: value"]),
        ("just words\n", ["flag: value"]),
        ("1: 2\n", ["1"]),
        ("resolution: [[8]]\n", ["resolution"]),
        ("config: other.yaml\n", ["config"]),
        ("help: 1\n", ["help"]),
        ("eval_inference_steps: [5, --overwrite_output_dir]\n", ["eval_inference_steps", "looks like a flag"]),
        ("learning_rate: 1e-3\nlearning_rate: 5e-2\n", ["learning_rate is given twice", "lines 1 and 2"]),
        ("seed: " + "[" * 5000 + "]" * 5000, ["nested too deeply"]),
        ("".join(f"{' ' * depth}x:\n" for depth in range(1000)), ["nested too deeply"]),
        (
            "k: &k [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("klmnopqr", "lmnopqrs", strict=True)),
            ["a list or a mapping"],
        ),
        ("#" * 2**21, ["larger than 1 MiB"]),
    ],
    ids=lambda text: text[:20] if isinstance(text, str) else "",
)
def test_bad_config_file_is_named(script, tmp_path, text, wanted):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    result = script([*tiny(tmp_path / "run"), "--config", path])
    assert result.code == 2, result.stdout
    assert str(path) in result.error and all(word in result.error for word in wanted)
    assert not (tmp_path / "run").exists()


def test_missing_config_file(script, tmp_path):
    result = script([*tiny(tmp_path / "run"), "--config", tmp_path / "absent.yaml"])
    assert result.code == 2
    assert str(tmp_path / "absent.yaml") in result.error and "No such file" in result.error
    result = script([*tiny(tmp_path / "run"), "--config", tmp_path])
    assert result.code == 2 and str(tmp_path) in result.error
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x80")
    result = script([*tiny(tmp_path / "run"), "--config", tmp_path / "binary.yaml"])
    assert result.code == 2 and "binary.yaml" in result.error


# Resuming


def test_resume_path_that_does_not_exist(script, copy):
    before = snapshot(copy)
    result = script(resumed(copy, "checkpoint-7"))
    assert result.code == 2
    assert "--resume_from_checkpoint checkpoint-7" in result.error and "checkpoint-2, checkpoint-4" in result.error
    assert snapshot(copy) == before


@pytest.mark.parametrize(
    "file", ["unet/diffusion_pytorch_model.safetensors", "optimizer.bin", "training_state.json", "unet_ema/config.json"]
)
@pytest.mark.parametrize("how", ["deleted", "shortened"])
def test_resume_from_incomplete_checkpoint(script, copy, file, how):
    path = copy / "checkpoint-4" / file
    path.unlink() if how == "deleted" else path.write_bytes(path.read_bytes()[:-10])
    before = snapshot(copy)
    result = script(resumed(copy, "checkpoint-4", max_train_steps=6))
    assert result.code == 2
    assert "checkpoint-4" in result.error and "incomplete" in result.error and Path(file).name in result.error
    assert snapshot(copy) == before


@pytest.mark.parametrize(
    ("content", "line"),
    [(None, "cannot be read"), (b"\xff\xfe\x00\x01\n" * 3, "line 1 is no JSON object"), (b'{"loss": 1}\n' * 2, "line 1 has no `step`")],
)
def test_metrics_that_are_none(script, copy, content, line):
    (copy / "metrics.jsonl").unlink()
    (copy / "metrics.jsonl").mkdir() if content is None else (copy / "metrics.jsonl").write_bytes(content)
    result = script(resumed(copy, max_train_steps=6))
    assert result.code == 1 and f"{copy / 'metrics.jsonl'} " in result.error and line in result.error


def test_what_is_left_of_another_programs_checkpoint_is_told(script, copy):
    (copy / "checkpoint-4" / "custom_checkpoint_0.pkl").write_bytes(b"x")
    result = script(resumed(copy, max_train_steps=6))
    assert result.code == 1 and "checkpoint-4" in result.error and "custom checkpoints" in result.error


def test_latest_skips_an_incomplete_checkpoint(script, copy):
    (copy / "checkpoint-4" / "optimizer.bin").unlink()
    result = script(resumed(copy, max_train_steps=5))
    assert result.code == 0
    assert "checkpoint-4 is damaged (optimizer.bin is missing)" in result.stderr and "2 to 5" in result.stderr
    assert (copy / "checkpoint-4" / "optimizer.bin").exists()  # written anew


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_preset": "unet-small", "resolution": 8}, "network"),
        ({"dropout": 0.3}, "dropout"),
        ({"bundled_data": "photo_crops"}, "data"),
        ({"max_train_samples": 100}, "data"),
        ({"noise_coupling": "assignment"}, "--noise_coupling was independent, is now assignment"),
        ({"timestep_sampling": "asymmetric"}, "--timestep_sampling"),
        ({"loss_weighting": "p2"}, "--loss_weighting"),
        ({"prediction_type": "v_prediction"}, "--prediction_type"),
        ({"train_batch_size": 8}, "--train_batch_size"),
        ({"seed": 1}, "--seed was 0, is now 1"),
        ({"use_ema": False}, "--use_ema"),
    ],
    ids=lambda item: str(item) if isinstance(item, dict) else "",
)
def test_resume_as_another_run(script, finished_run, changes, named):
    before = snapshot(finished_run)
    result = script(resumed(finished_run, **changes))
    assert result.code == 2
    assert "checkpoint-4 belongs to another run" in result.error and named in result.error
    assert snapshot(finished_run) == before


def test_resume_on_another_image_folder(script, tmp_path):
    photos(tmp_path / "photos")
    folder = tmp_path / "run"
    assert script(tiny(folder, train_data_dir=tmp_path / "photos", train_batch_size=4, max_train_steps=2)).code == 0
    Image.new("RGB", (8, 8)).save(tmp_path / "photos" / "one-more.png")
    result = script(tiny(folder, train_data_dir=tmp_path / "photos", train_batch_size=4, resume_from_checkpoint="latest"))
    assert result.code == 2 and "data was" in result.error


def test_harmless_changes_may_resume(script, copy):
    changes = {
        "max_train_steps": 6,
        "learning_rate": 5e-4,
        "lr_scheduler": "linear",
        "checkpointing_steps": 3,
        "checkpoints_total_limit": 2,
        "logging_steps": 2,
        "logger": "tensorboard",
        "eval_batch_size": 3,
        "seed": None,
    }
    result = script(resumed(copy, **changes))
    assert result.code == 0, result.stderr
    assert "4 to 6" in result.stderr and "(the resumed run's)" in result.stderr
    assert sorted(path.name for path in copy.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]
    steps = [json.loads(line)["step"] for line in (copy / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 6]
    assert list((copy / "logs").rglob("events.out.tfevents.*"))


@pytest.mark.parametrize("request_", ["latest", "checkpoint-4"])
def test_resuming_a_finished_run_changes_nothing(script, finished_run, request_):
    before = snapshot(finished_run)
    result = script(resumed(finished_run, request_))
    assert result.code == 0
    assert "no step taken" in result.stderr
    assert snapshot(finished_run) == before


def test_resuming_below_the_steps_taken_changes_nothing(script, finished_run):
    before = snapshot(finished_run)
    result = script(resumed(finished_run, max_train_steps=3))
    assert result.code == 0
    assert "no step taken" in result.stderr
    assert snapshot(finished_run) == before


def test_latest_with_nothing_there_is_a_fresh_start(script, tmp_path):
    result = script(resumed(tmp_path / "run"))
    assert result.code == 0
    assert "--resume_from_checkpoint latest" in result.stderr and "starting anew" in result.stderr
    assert (tmp_path / "run" / "checkpoint-4").is_dir() and (tmp_path / "run" / "model_index.json").exists()


# Output folders


def test_output_folder_with_a_finished_run_is_refused(script, finished_run):
    before = snapshot(finished_run)
    result = script(tiny(finished_run))
    assert result.code == 2
    assert f"--output_dir {finished_run} holds a finished run" in result.error
    assert "--overwrite_output_dir" in result.error and "--resume_from_checkpoint latest" in result.error
    assert snapshot(finished_run) == before


def test_output_folder_with_an_unfinished_run_is_refused(script, copy):
    (copy / "summary.json").unlink()
    before = snapshot(copy)
    result = script(tiny(copy, noise_coupling="assignment"))
    assert result.code == 2 and "holds an unfinished run" in result.error
    assert snapshot(copy) == before


def test_resuming_into_the_folder_of_another_run_is_refused(script, finished_run, copy):
    before = snapshot(copy)
    result = script(resumed(copy, finished_run / "checkpoint-2"))
    assert result.code == 2
    assert f"--output_dir {copy} holds a finished run of its own" in result.error
    assert snapshot(copy) == before


def test_overwriting_deletes_the_run_and_nothing_else(script, copy):
    foreign = ["notes.txt", "checkpoint-foo/kept", "checkpoint-5-backup/kept", "my-samples/kept"]
    for name in foreign:
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).write_text("mine")
    result = script(tiny(copy, overwrite_output_dir=True, max_train_steps=3, seed=5))
    assert result.code == 0
    assert all((copy / name).read_text() == "mine" for name in foreign)
    assert sorted(path.name for path in copy.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-5-backup", "checkpoint-foo"]
    steps = [json.loads(line)["step"] for line in (copy / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3]
    assert [path.name for path in (copy / "samples").iterdir()] == ["step-0000003.png"]
    assert sorted(path.name for path in copy.glob(".*")) == [".immiscible-lock", ".immiscible-run"]


def test_overwriting_waits_until_all_else_is_known_to_fit(script, finished_run, tmp_path):
    before = snapshot(finished_run)
    for changes in ({"train_data_dir": tmp_path / "nowhere"}, {"noise_coupling": "nearest", "coupling_candidates": 0}, {"logger": "wandb"}):
        assert script(tiny(finished_run, overwrite_output_dir=True, **changes)).code == 2
    assert snapshot(finished_run) == before


def test_output_dir_that_is_a_file(script, tmp_path):
    (tmp_path / "run").write_text("mine")
    result = script(tiny(tmp_path / "run"))
    assert result.code == 2
    assert "is a file" in result.error and (tmp_path / "run").read_text() == "mine"


def test_output_dir_that_cannot_be_made(script, tmp_path):
    (tmp_path / "file").write_text("mine")
    result = script(tiny(tmp_path / "file" / "run"))
    assert result.code == 1
    assert f"--output_dir {tmp_path / 'file' / 'run'} cannot be written" in result.error


# Divergence


def test_nan_loss_keeps_the_checkpoint(script, copy):
    before = snapshot(copy / "checkpoint-4")
    result = script(resumed(copy, max_train_steps=50, learning_rate=1000, checkpointing_steps=100))
    assert result.code == 1
    assert "loss is" in result.error or "grad_norm is" in result.error
    assert "--learning_rate" in result.error
    assert snapshot(copy / "checkpoint-4") == before
    assert sorted(path.name for path in copy.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    after = script(resumed(copy, max_train_steps=6))  # and it can be continued
    assert after.code == 0 and "4 to 6" in after.stderr


def test_samples_that_are_no_numbers_do_not_cost_the_pipeline(script, tmp_path):
    result = script(tiny(tmp_path / "run", learning_rate=1000, max_train_steps=1))
    assert result.code == 1 and "samples hold NaN" in result.error
    assert (tmp_path / "run" / "model_index.json").exists() and not (tmp_path / "run" / "summary.json").exists()


# As the user's shell sees it, in interpreters of their own


def test_unknown_flag_from_a_shell(tmp_path):
    result = run_command([sys.executable, SCRIPT, "--no_such_flag", "1"])
    assert result.code == 2
    assert "--no_such_flag" in result.error
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.slow
def test_missing_folder_from_a_shell(tmp_path):
    result = run_command([sys.executable, SCRIPT, *tiny(tmp_path / "run", train_data_dir="nowhere")])
    assert result.code == 2
    assert result.error == "--train_data_dir nowhere: no such folder"


def test_our_line_comes_first_under_accelerate_launch(tmp_path):
    launch = accelerate_launch("--num_processes", 1, "--num_machines", 1, "--mixed_precision", "no", "--dynamo_backend", "no", "--cpu")
    result = run_command([*launch, *tiny(tmp_path / "run", noise_coupling="magic")])
    assert result.code == 1  # the launcher's
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert lines[0].startswith("train_unconditional.py: error: ") and "magic" in lines[0] and "assignment" in lines[0]
    assert len(lines) > 1  # the launcher's own lines follow
