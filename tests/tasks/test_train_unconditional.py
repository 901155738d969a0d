"""What the script leaves behind, run as a user runs it."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from collections import Counter
from pathlib import Path

import numpy
import psutil
import pytest
import torch
import yaml
from kills import final_hashes, finish, lines, metrics
from launch import LAUNCH_TWO, SCRIPT, accelerate_launch, flags, free_port, run_command, tiny
from pictures import colored
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from immiscible.training.checkpoints import checkpoints, step_of

WEIGHTS = "diffusion_pytorch_model.safetensors"


def weights(folder: Path, step: int, name: str = "unet") -> dict[str, torch.Tensor]:
    return load_file(folder / f"checkpoint-{step}" / name / WEIGHTS)


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def trained(script, folder: Path, **changes) -> Path:
    result = script(tiny(folder, **changes))
    assert result.code == 0, result.stderr
    return folder


@pytest.fixture(scope="module")
def plain(script, tmp_path_factory):
    """Four steps of `tiny`; other tests compare with it."""
    return trained(script, tmp_path_factory.mktemp("plain") / "run")


@pytest.fixture(scope="module")
def digits(script, tmp_path_factory):
    """A run without any data flag: the bundled digits by their task file, two epochs, with both methods."""
    folder = tmp_path_factory.mktemp("digits") / "run"
    words = {
        "output_dir": folder,
        "train_batch_size": 256,  # 7 steps an epoch
        "max_train_steps": 15,
        "checkpointing_steps": 10,
        "save_images_epochs": 1,
        "save_model_epochs": 1,
        "logging_steps": 5,
        "noise_coupling": "assignment",
        "timestep_sampling": "asymmetric",
        "loss_weighting": "change_aware",
        "ddpm_num_inference_steps": 4,
        "eval_batch_size": 9,
    }
    result = script(flags(words))
    assert result.code == 0, result.stderr
    return folder, result


def test_a_run_without_data_flags_leaves_everything(digits):
    folder, result = digits
    assert sorted(path.name for path in (folder / "samples").iterdir()) == ["step-0000007.png", "step-0000014.png", "step-0000015.png"]
    with Image.open(folder / "samples" / "step-0000015.png") as grid:
        assert grid.size == (192, 192)  # 3 x 3 digits, enlarged to 64 pixels
    assert [line["step"] for line in metrics(folder)] == [5, 10, 15]
    assert all(line["pair_distance"] < line["pair_distance_drawn"] and line["noise_variance_drift"] < 1e-5 for line in metrics(folder))
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-10", "checkpoint-15"]
    for name in ("checkpoint-15/unet", "checkpoint-15/unet_ema", "unet", "unet_non_ema"):
        assert (folder / name / WEIGHTS).is_file() and (folder / name / "config.json").is_file()
    assert equal(weights(folder, 15, "unet_ema"), load_file(folder / "unet" / WEIGHTS))
    assert equal(weights(folder, 15), load_file(folder / "unet_non_ema" / WEIGHTS))
    assert json.loads((folder / "model_index.json").read_text())["_class_name"] == "DDIMPipeline"
    assert list((folder / "logs").rglob("events.out.tfevents.*"))
    assert sorted(path.name for path in folder.glob(".*")) == [".immiscible-lock", ".immiscible-run"]
    assert str(folder) in result.stdout and "step-0000015.png" in result.stdout


def test_a_run_says_and_saves_its_method_and_numbers(digits):
    folder, result = digits
    with safe_open(folder / "unet" / WEIGHTS, "pt") as file:
        metadata = file.metadata()
    card = (folder / "README.md").read_text()
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert metadata["immiscible.noise_coupling"].startswith("assignment") and config["noise_coupling"] == "assignment"
    assert "% reduction" in metadata["immiscible.pair_distance"] and metadata["immiscible.optimizer_steps"] == "15"
    for name in ("noise_coupling", "timestep_sampling", "pair_distance", "noise_marginal_drift", "images_paired_together", "coupling_time"):
        fact = metadata[f"immiscible.{name}"]
        assert fact in card and (result.stderr + result.stdout).count(fact) == 1  # what is known at the start is told there, and no more
    assert "asymmetric, moves 2" in result.stderr  # 22 % of the draws
    assert config["seed"] == int(metadata["immiscible.seed"]) and re.search(rf"^seed +{config['seed']} \(drawn", result.stderr, re.M)
    assert "from diffusers import DDIMPipeline" in card


def test_config_yaml_restarts_the_run(script, digits, tmp_path):
    folder, _ = digits
    result = script(["--config", folder / "config.yaml", "--output_dir", tmp_path / "again", "--look_ahead", "false"])
    assert result.code == 0, result.stderr
    assert final_hashes(tmp_path / "again", 15) == final_hashes(folder, 15)
    names = [
        [
            {name: value for name, value in line.items() if not name.endswith(("seconds", "second", "began", "ended", "mib"))}
            for line in metrics(run)
        ]
        for run in (folder, tmp_path / "again")
    ]
    assert names[0] == names[1]
    images = [(run / "samples" / "step-0000015.png").read_bytes() for run in (folder, tmp_path / "again")]
    assert images[0] == images[1]


ONE_LEVEL = {
    "_class_name": "UNet2DModel",
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": [32],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "down_block_types": ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"],
    "add_attention": False,
}


KNOWN_ANSWERS = {
    "epsilon-ddim": {"prediction_type": "epsilon", "sampling_scheduler": "ddim", "max_train_steps": 220},
    "sample-ddim": {"prediction_type": "sample", "sampling_scheduler": "ddim", "max_train_steps": 60},
    "v-ddim": {"prediction_type": "v_prediction", "sampling_scheduler": "ddim"},
    "v-ddpm": {"prediction_type": "v_prediction"},
    "flow": {"prediction_type": "flow_prediction", "noise_process": "flow"},
    "v-scaled": {"prediction_type": "v_prediction", "image_scale": 2},
    "flow-scaled": {"prediction_type": "flow_prediction", "noise_process": "flow", "image_scale": 2},
}


SAMPLE = """
import json, sys
import diffusers
import torch
found = {}
torch.set_num_threads(1)
for folder in sys.argv[1:]:
    name = json.load(open(folder + "/model_index.json"))["_class_name"]
    pipeline = getattr(diffusers, name).from_pretrained(folder)
    images = pipeline(batch_size=8, generator=torch.Generator().manual_seed(1), num_inference_steps=20, output_type="np").images
    found[folder] = [name, images.mean((0, 1, 2)).tolist(), float(abs(images - [204 / 255, 102 / 255, 51 / 255]).mean())]
assert "immiscible" not in sys.modules
print(json.dumps(found))
"""


@pytest.mark.slow
def test_plain_diffusers_samples_the_known_answer(script, tmp_path):
    """Trained on images of one color, each kind of pipeline must paint that color, in an interpreter that knows diffusers alone."""
    (tmp_path / "network.json").write_text(json.dumps(ONE_LEVEL))
    colored(tmp_path / "photos")
    common = {
        "train_data_dir": tmp_path / "photos",
        "model_preset": None,
        "model_config_name_or_path": tmp_path / "network.json",
        "max_train_steps": 100,
        "checkpointing_steps": 1000,
        "learning_rate": 4e-3,
        "lr_scheduler": "cosine",
        "timestep_spacing": "trailing",
    }
    for name, changes in KNOWN_ANSWERS.items():
        trained(script, tmp_path / name, **{**common, **changes})
    result = run_command([sys.executable, "-c", SAMPLE, *[tmp_path / name for name in KNOWN_ANSWERS]], PYTHONSAFEPATH="1")
    assert result.code == 0, result.stderr
    for folder, (pipeline, mean, error) in json.loads(result.stdout).items():
        name = Path(folder).name
        assert pipeline == ("DDIMPipeline" if "ddim" in name else "DDPMPipeline"), name
        assert numpy.abs(numpy.array(mean) - numpy.array([204, 102, 51]) / 255).max() < 0.1 and error < 0.1, (name, mean, error)


def test_plan_writes_nothing(script, tmp_path):
    result = script(tiny(tmp_path / "run", plan=True, max_train_steps=1000, noise_coupling="assignment"), cwd=tmp_path)
    assert result.code == 0
    assert not list(tmp_path.iterdir())
    assert "Plan: 1000 steps of" in result.stdout and "nothing was written" in result.stdout and "MiB" in result.stdout
    assert "1797 images" in result.stderr and "112 an epoch" in result.stderr and "assignment" in result.stderr


def test_plan_leaves_a_finished_run_alone(script, plain):
    before = {path: path.stat().st_mtime_ns for path in plain.rglob("*")}
    result = script(tiny(plain, plan=True, resume_from_checkpoint="latest"))
    assert result.code == 0 and "nothing is left to train" in result.stdout
    assert {path: path.stat().st_mtime_ns for path in plain.rglob("*")} == before


def test_push_to_hub_uploads_the_pipeline_without_checkpoints(digits, monkeypatch):
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    from immiscible.configs import UnconditionalConfig
    from immiscible.training.cards import push_pipeline

    folder, _ = digits
    calls = {}

    def create_repo(name, **options):
        calls["create"] = (name, options)
        return huggingface_hub.RepoUrl("https://huggingface.co/someone/my-model")

    monkeypatch.setattr(huggingface_hub, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub, "upload_folder", lambda **options: calls.update(upload=options))
    config = UnconditionalConfig(
        output_dir=str(folder), push_to_hub=True, hub_token="hf_x", hub_model_id="someone/my-model", hub_private_repo=True
    )
    push_pipeline(config, 15)
    name, options = calls["create"]
    assert name == "someone/my-model" and options["private"] is True and options["exist_ok"] is True and options["token"] == "hf_x"
    upload = calls["upload"]
    assert upload["repo_id"] == "someone/my-model" and upload["token"] == "hf_x"
    files = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    sent = set(filter_repo_objects(files, allow_patterns=upload["allow_patterns"], ignore_patterns=upload.get("ignore_patterns")))
    assert {"model_index.json", f"unet/{WEIGHTS}", "scheduler/scheduler_config.json", "README.md", "config.yaml", "metrics.jsonl"} <= sent
    assert not any(file.startswith(("checkpoint", "logs", ".")) for file in sent)


def test_push_to_hub_without_a_network_is_one_line_before_the_run(script, tmp_path):
    result = script(tiny(tmp_path / "run", push_to_hub=True, hub_token="hf_secret"))
    assert result.code == 1
    assert "--push_to_hub" in result.error and "hf upload" in result.error and not (tmp_path / "run").exists()
    assert "hf_secret" not in result.stderr + result.stdout


@pytest.mark.parametrize(
    ("changes", "least", "most"),
    [
        ({"gradient_checkpointing": True, "allow_tf32": True, "local_rank": 0, "cache_dir": "cache"}, 0, 0),
        ({"dataloader_num_workers": 2}, 0, 0),
        pytest.param({"torch_compile": True, "torch_compile_backend": "eager"}, 0, 1e-4, marks=pytest.mark.slow),
        ({"channels_last": True}, 0, 2e-3),
        ({"mixed_precision": "bf16"}, 1e-5, 2e-2),
        ({"noise_offset": 0.1}, 1e-4, 2e-2),
        ({"input_perturbation": 0.1}, 1e-4, 2e-2),
        ({"ddpm_beta_end": 0.03}, 1e-4, 2e-2),
        ({"adam_beta1": 0.5, "adam_weight_decay": 0.1, "adam_epsilon": 1e-4}, 1e-5, 2e-2),
        ({"max_grad_norm": 1e-3, "adam_epsilon": 1e-2}, 1e-5, 2e-2),
        ({"loss_weighting": "p2", "p2_k": 0.5, "p2_gamma": 0.5}, 1e-5, 2e-2),
        ({"timestep_sampling": "logit_normal", "logit_mean": -0.5, "logit_std": 0.8}, 1e-5, 2e-2),
    ],
    ids=lambda item: next(iter(item)) if isinstance(item, dict) else "",
)
def test_options_change_what_they_should(script, plain, tmp_path, changes, least, most):
    """Options of speed alone leave the weights (nearly) as they are; the others move them, but only by as much as four steps can."""
    folder = trained(script, tmp_path / "run", **changes)
    assert least <= difference(weights(plain, 4), weights(folder, 4)) <= most
    one, other = (load_file(run / "unet" / WEIGHTS) for run in (plain, folder))
    assert {name: value.shape for name, value in one.items()} == {name: value.shape for name, value in other.items()}
    assert all(value.dtype == torch.float32 for value in other.values())


def test_ema_warm_up(script, tmp_path):
    """With power 0 the decay is 0 from the first step and the average follows the weights; with the defaults it lags."""
    folder = trained(script, tmp_path / "follows", use_ema=True, ema_power=0, ema_inv_gamma=2)
    assert equal(weights(folder, 4, "unet_ema"), weights(folder, 4))
    folder = trained(script, tmp_path / "lags", use_ema=True, ema_max_decay=0.99)
    assert 0 < difference(weights(folder, 4, "unet_ema"), weights(folder, 4)) < 1e-2
    assert equal(weights(folder, 4), weights(tmp_path / "follows", 4))


def test_cropped_and_flipped_photographs(script, tmp_path):
    common = {"bundled_data": "photo_crops", "max_train_samples": 40, "num_epochs": 2, "max_train_steps": None}
    folder = trained(script, tmp_path / "run", **common, random_flip=True, center_crop=True)
    assert [line["step"] for line in metrics(folder)] == [1, 2, 3, 4]  # 40 images make 2 batches of 16
    assert json.loads((folder / "unet" / "config.json").read_text())["in_channels"] == 3
    straight = trained(script, tmp_path / "straight", **common, center_crop=True)
    assert difference(weights(folder, 4), weights(straight, 4)) > 0


def test_coupling_options(script, tmp_path):
    common = {"noise_coupling": "assignment", "train_batch_size": 32}
    full = metrics(trained(script, tmp_path / "full", **common, coupling_metric="l1", coupling_dtype="float16"))
    late = metrics(trained(script, tmp_path / "late", **common, coupling_start_step=2))
    part = metrics(trained(script, tmp_path / "part", **common, coupling_min_timestep=500))
    near = metrics(trained(script, tmp_path / "near", noise_coupling="nearest", coupling_candidates=4, coupling_score="dot"))
    reductions = [[line["distance_reduction_percent"] for line in run] for run in (full, late, part, near)]
    assert min(reductions[0]) > 0
    assert reductions[1][:2] == [0, 0] and min(reductions[1][2:]) > 0
    assert all(0 < some < 32 for some in (line["paired_images"] for line in part)) and 0 < sum(reductions[2]) < sum(reductions[0])
    assert min(reductions[3]) > 0 and all(line["paired_images"] == 1 for line in near)
    assert [line["pair_distance_drawn"] for line in full] == [line["pair_distance_drawn"] for line in late]  # the pool stays


def test_input_precision(script, tmp_path):
    """Sixteen-bit ramps in the lowest eight bits are black unless their precision is kept."""
    (tmp_path / "photos").mkdir()
    for number in range(16):
        Image.fromarray(numpy.arange(64, dtype=numpy.uint16).reshape(8, 8) * 2 + number).save(tmp_path / "photos" / f"{number}.png")
    runs = [
        trained(script, tmp_path / str(keep), train_data_dir=tmp_path / "photos", preserve_input_precision=keep) for keep in (False, True)
    ]
    assert 0 < difference(weights(runs[0], 4), weights(runs[1], 4)) < 2e-2


def test_parquet_folder_and_image_column(script, tmp_path):
    import datasets

    table = {"picture": [Image.new("RGB", (8, 8), (n * 10, 0, 0)) for n in range(16)], "label": list(range(16))}
    features = datasets.Features({"picture": datasets.Image(), "label": datasets.Value("int64")})
    (tmp_path / "data").mkdir()
    datasets.Dataset.from_dict(table, features=features).to_parquet(tmp_path / "data" / "train-0.parquet")
    common = {"train_data_dir": tmp_path / "data", "cache_dir": tmp_path / "cache"}
    result = script(tiny(tmp_path / "run", **common, image_column="picture"))
    assert result.code == 0 and "16 images" in result.stderr and (tmp_path / "cache").is_dir()
    result = script(tiny(tmp_path / "other", **common))
    assert result.code == 2 and "--image_column 'image'" in result.error and "picture" in result.error
    result = script(tiny(tmp_path / "hub", dataset_name=tmp_path / "data", image_column="picture", dataset_config_name="default"))
    assert result.code == 0 and "16 images" in result.stderr


def test_checkpoints_total_limit_and_foreign_folders(script, tmp_path):
    folder = tmp_path / "run"
    for name in ("checkpoint-foo", "checkpoint-5-backup"):
        (folder / name).mkdir(parents=True)
    trained(script, folder, checkpointing_steps=1, checkpoints_total_limit=2, max_train_steps=5)
    assert {path.name for path in folder.glob("checkpoint-*")} == {"checkpoint-foo", "checkpoint-5-backup", "checkpoint-4", "checkpoint-5"}


def processes_of(group: int) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


@pytest.mark.parametrize(
    ("number", "whole_group"),
    [(signal.SIGTERM, True), *(pytest.param(*case, marks=pytest.mark.slow) for case in [(signal.SIGTERM, False), (signal.SIGINT, True)])],
)
def test_a_signal_saves_and_the_run_resumes_exactly(script, tmp_path, number, whole_group):
    common = {"max_train_steps": 60, "checkpointing_steps": 1000, "use_ema": True, "dataloader_num_workers": 2, "lr_scheduler": "cosine"}
    run = script.start(tiny(tmp_path / "run", **common))
    run.wait_until(lambda: lines(tmp_path / "run") >= 3)
    assert len(processes_of(run.pid)) >= 3  # with the loader's workers
    run.send_group(number) if whole_group else run.send(number)
    result = run.wait()
    assert result.code == 128 + number, result.stderr  # a scheduler takes it for unfinished
    assert f"Stopped by {number.name} at step" in result.stdout and "--resume_from_checkpoint latest" in result.stdout
    assert "Traceback" not in result.stderr
    assert not processes_of(run.pid)
    [saved] = (tmp_path / "run").glob("checkpoint-*")
    assert 3 <= int(saved.name.removeprefix("checkpoint-")) < 60 and not (tmp_path / "run" / "summary.json").exists()
    trained(script, tmp_path / "run", **common, resume_from_checkpoint="latest")
    trained(script, tmp_path / "whole", **common)
    assert final_hashes(tmp_path / "run", 60) == final_hashes(tmp_path / "whole", 60)
    assert [line["step"] for line in metrics(tmp_path / "run")] == list(range(1, 61))


@pytest.mark.slow
def test_accelerate_launch_on_two_processes(tmp_path):
    """The real launcher; the other tests of two processes start the ranks themselves, which is what it does."""
    launch = accelerate_launch(*LAUNCH_TWO, free_port())
    result = run_command([*launch, *tiny(tmp_path / "run", train_batch_size=8, noise_coupling="assignment")])
    assert result.code == 0, result.stderr
    assert "8 images x 2 processes" in result.stderr and result.stdout.count("Finished.") == 1
    assert (tmp_path / "run" / "model_index.json").exists() and (tmp_path / "run" / "checkpoint-4").is_dir()


def test_two_processes_train_what_one_trains(script, plain, tmp_path):
    finish(script.start_ranks(tiny(tmp_path / "run", train_batch_size=8)))
    assert difference(weights(plain, 4), weights(tmp_path / "run", 4)) < 1e-3  # the same rows and draws, summed in another order
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2, 3, 4]


@pytest.mark.slow
@pytest.mark.parametrize("which", [[0, 1], [1]])
def test_a_signal_stops_both_processes(script, tmp_path, which):
    common = {"max_train_steps": 60, "checkpointing_steps": 1000, "use_ema": True, "train_batch_size": 8}
    runs = script.start_ranks(tiny(tmp_path / "run", **common))
    runs[0].wait_until(lambda: lines(tmp_path / "run") >= 3)
    for rank in which:
        runs[rank].send(signal.SIGTERM)
    results = finish(runs, code=128 + signal.SIGTERM)
    assert sum(result.stdout.count("Stopped by SIGTERM") for result in results) == 1
    assert not (tmp_path / "run" / "summary.json").exists()
    finish(script.start_ranks(tiny(tmp_path / "run", **common, resume_from_checkpoint="latest")))
    finish(script.start_ranks(tiny(tmp_path / "whole", **common)))
    assert final_hashes(tmp_path / "run", 60) == final_hashes(tmp_path / "whole", 60)


@pytest.mark.skipif(not hasattr(psutil.Process, "rlimit"), reason="no limit on file sizes here")
@pytest.mark.parametrize("processes", [1, 2])
def test_a_disk_that_fails_while_saving_is_one_line_and_costs_nothing(script, tmp_path, processes):
    folder = tmp_path / "run"
    common = {"max_train_steps": 4000, "train_batch_size": 16 // processes}
    runs = script.start_ranks(tiny(folder, **common, checkpointing_steps=4), processes)
    runs[0].wait_until(lambda: (folder / "checkpoint-4").exists())
    psutil.Process(runs[0].pid).rlimit(psutil.RLIMIT_FSIZE, (50_000, 50_000))
    results = [run.wait() for run in runs]
    assert [result.code for result in results] == [1] * processes
    assert f"cannot write {folder / '.partial-checkpoint-'}" in results[0].error and "File too large" in results[0].error
    assert not list(folder.glob(".partial-*"))  # which may be what fills the disk
    saved = max(map(step_of, checkpoints(folder)))
    finish(script.start_ranks(tiny(folder, **common | {"max_train_steps": saved + 1}, resume_from_checkpoint="latest"), processes))


@pytest.mark.skipif(not hasattr(psutil.Process, "rlimit"), reason="no limit on file sizes here")
def test_a_disk_that_fails_while_a_pipeline_is_saved_leaves_nothing_of_it(script, tmp_path):
    folder = tmp_path / "run"
    flags = {"max_train_steps": 4000, "checkpointing_steps": 4000, "save_model_epochs": 1, "max_train_samples": 320, "logging_steps": 10}
    run = script.start(tiny(folder, **flags))
    psutil.Process(run.pid).rlimit(psutil.RLIMIT_FSIZE, (50_000, 50_000))
    result = run.wait()
    assert result.code == 1 and "File too large" in result.error and str(folder) in result.error
    assert not list(folder.glob(".partial-*")) and not (folder / "model_index.json").exists()


@pytest.mark.skipif(not hasattr(psutil.Process, "rlimit"), reason="no limit on file sizes here")
@pytest.mark.parametrize(("processes", "logger"), [(1, "none"), (2, "none"), (1, "tensorboard")])
def test_a_disk_that_fails_between_saves_is_one_line(script, tmp_path, processes, logger):
    folder = tmp_path / "run"
    common = {"max_train_steps": 4000, "train_batch_size": 16 // processes, "checkpointing_steps": 4000}
    runs = script.start_ranks(tiny(folder, **common, logger=logger), processes)
    runs[0].wait_until(lambda: lines(folder) >= 2)
    psutil.Process(runs[0].pid).rlimit(psutil.RLIMIT_FSIZE, (15_000, 15_000))
    results = [run.wait() for run in runs]
    assert [result.code for result in results] == [1] * processes
    assert f"cannot write {folder}: File too large" in results[0].error and not any("Traceback" in result.stderr for result in results)


def test_local_rank_flag_of_old_launchers(script, tmp_path):
    """They give the environment all but LOCAL_RANK."""
    port = str(free_port())
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    runs = [script.start(tiny(tmp_path / "run", train_batch_size=8, local_rank=rank), env={**common, "RANK": str(rank)}) for rank in (0, 1)]
    results = finish(runs)
    assert "8 images x 2 processes" in results[0].stderr and not results[1].stderr


def test_a_run_of_two_processes_is_not_resumed_on_one(script, tmp_path):
    finish(script.start_ranks(tiny(tmp_path / "run", train_batch_size=8)))
    result = script(tiny(tmp_path / "run", train_batch_size=8, resume_from_checkpoint="latest", max_train_steps=6))
    assert result.code == 2 and "processes was 2, is now 1" in result.error


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_bad_image_on_one_process_ends_both_with_one_line(script, tmp_path, seed):
    photos = colored(tmp_path / "photos", count=8)
    (photos / "03.png").write_bytes((photos / "03.png").read_bytes()[:-30])
    runs = script.start_ranks(tiny(tmp_path / "run", train_data_dir=photos, train_batch_size=4, seed=seed))
    results = [run.wait() for run in runs]
    assert [result.code for result in results] == [1, 1]
    assert "03.png" in results[0].error and "--skip_bad_images" in results[0].error
    assert Counter("error:" in result.stderr for result in results) == {True: 1, False: 1}
    assert "Traceback" not in results[1].stderr


def test_usage_errors_of_two_processes_are_one_line(script, tmp_path):
    results = [run.wait() for run in script.start_ranks(tiny(tmp_path / "run", train_data_dir=tmp_path / "nowhere"))]
    assert [result.code for result in results] == [2, 2]
    assert "no such folder" in results[0].error and "error" not in results[1].stderr


def test_a_help_text_from_a_shell():
    result = run_command([sys.executable, SCRIPT, "--help"])
    assert result.code == 0 and "--noise_coupling" in result.stdout and not result.stderr
