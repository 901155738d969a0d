"""Checkpoints that can be trusted, and a folder that one run at a time writes."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kills import final_hashes, metrics
from launch import ENVIRONMENT, SCRIPT, tiny
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_text import ADAPTERS, FINETUNE, tiny_text

from immiscible.errors import UserError
from immiscible.training.checkpoints import STATE_FILE, damage, save_checkpoint

WEIGHTS = "diffusion_pytorch_model.safetensors"


def argv(folder, steps=8, **changes):
    return tiny(folder, **{"checkpointing_steps": 4, "use_ema": True, "max_train_steps": steps, **changes})


@pytest.fixture(scope="module")
def whole(script, tmp_path_factory):
    """A finished run of eight steps, with checkpoints 4 and 8."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert script(argv(folder)).code == 0
    return folder


@pytest.fixture
def copy(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "run"))


def snapshot(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".immiscible-lock")
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def reseal(checkpoint: Path) -> None:
    """As somebody does who changes a checkpoint on purpose, or as code would that has a fault."""
    state = json.loads((checkpoint / STATE_FILE).read_text())
    for name in state["files"]:
        content = (checkpoint / name).read_bytes()
        state["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (checkpoint / STATE_FILE).write_text(json.dumps(state))


def zeroed(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def poisoned(path: Path) -> None:
    tensors = load_file(path)
    name = min(tensors)
    tensors[name] = torch.full_like(tensors[name], torch.nan)
    save_file(tensors, path)


def shortened(path: Path) -> None:
    tensors = load_file(path)
    save_file({name: tensor for name, tensor in tensors.items() if name != max(tensors)}, path)


@pytest.mark.parametrize("name", ["optimizer.bin", f"unet/{WEIGHTS}", f"unet_ema/{WEIGHTS}", "unet/config.json"])
def test_latest_steps_back_over_what_is_not_what_was_saved(script, copy, whole, name):
    (copy / "summary.json").unlink()
    zeroed(copy / "checkpoint-8" / name)
    result = script(argv(copy, resume_from_checkpoint="latest"))
    assert result.code == 0, result.stderr
    assert "checkpoint-8 is damaged" in result.stderr and name in result.stderr and "SHA-256" in result.stderr
    assert final_hashes(copy, 8) == final_hashes(whole, 8)


def test_weights_of_another_run_are_noticed(script, copy, tmp_path):
    assert script(argv(tmp_path / "other", seed=1)).code == 0
    shutil.copy(tmp_path / "other" / "checkpoint-8" / "unet" / WEIGHTS, copy / "checkpoint-8" / "unet" / WEIGHTS)
    result = script(argv(copy, 12, resume_from_checkpoint="checkpoint-8"))
    assert result.code == 2 and f"unet/{WEIGHTS}" in result.error


def test_latest_steps_back_over_what_is_not_finite(script, copy, whole):
    (copy / "summary.json").unlink()
    poisoned(copy / "checkpoint-8" / "unet_ema" / WEIGHTS)
    reseal(copy / "checkpoint-8")
    result = script(argv(copy, resume_from_checkpoint="latest"))
    assert result.code == 0 and "NaN" in result.stderr
    assert final_hashes(copy, 8) == final_hashes(whole, 8)


def test_no_whole_checkpoint_is_an_error_and_nothing_is_touched(script, copy):
    for step in (4, 8):
        zeroed(copy / f"checkpoint-{step}" / "optimizer.bin")
    before = snapshot(copy)
    result = script(argv(copy, 12, resume_from_checkpoint="latest"))
    assert result.code == 1 and "no checkpoint" in result.error and "is whole" in result.error and str(copy) in result.error
    assert snapshot(copy) == before


@pytest.mark.parametrize(
    "content", ["[]", "null", "{", '{"step": "two", "identity": {}, "files": {}}', '{"step": 8, "identity": [], "files": {}}']
)
def test_a_broken_state_is_one_line(script, copy, content):
    (copy / "checkpoint-8" / STATE_FILE).write_text(content)
    result = script(argv(copy, 12, resume_from_checkpoint="checkpoint-8"))
    assert result.code == 2 and STATE_FILE in result.error


@pytest.mark.parametrize(("part", "change"), [("unet", shortened), ("unet_ema", shortened)])
def test_missing_keys_are_never_filled(script, copy, part, change):
    change(copy / "checkpoint-8" / part / WEIGHTS)
    reseal(copy / "checkpoint-8")
    result = script(argv(copy, 12, resume_from_checkpoint="latest"))
    assert result.code == 1 and f"checkpoint-8/{part}" in result.error and "missing" in result.error


@pytest.mark.parametrize("name", ["optimizer.bin", f"unet/{WEIGHTS}", "unet/config.json", f"unet_ema/{WEIGHTS}"])
def test_what_cannot_be_read_is_one_line_with_its_name(script, copy, name):
    (copy / "checkpoint-8" / name).write_bytes(b"{not what it was")
    reseal(copy / "checkpoint-8")
    result = script(argv(copy, 12, resume_from_checkpoint="checkpoint-8"))
    assert result.code in (1, 2) and name.split("/")[0] in result.error


def test_an_optimizer_without_state_is_not_taken_for_one(script, copy):
    path = copy / "checkpoint-8" / "optimizer.bin"
    content = torch.load(path, weights_only=True)
    torch.save({**content, "state": {}}, path)
    reseal(copy / "checkpoint-8")
    result = script(argv(copy, 12, resume_from_checkpoint="latest"))
    assert result.code == 1 and "optimizer.bin" in result.error


def without_some(path: Path) -> None:
    tensors = load_file(path)
    save_file({name: tensor for name, tensor in tensors.items() if name != min(tensors)}, path)


def without_any(path: Path) -> None:
    save_file({}, path)


def gone(path: Path) -> None:
    state = json.loads((path.parent / STATE_FILE).read_text())
    del state["files"][path.name]
    (path.parent / STATE_FILE).write_text(json.dumps(state))
    path.unlink()


@pytest.mark.parametrize("change", [without_some, without_any])
def test_adapters_are_never_filled(script, tmp_path, change):
    words = {"use_lora": True, "max_train_steps": 1, "checkpointing_steps": 1}
    assert script(tiny_text(tmp_path / "run", **words), program=FINETUNE).code == 0
    change(tmp_path / "run" / "checkpoint-1" / ADAPTERS)
    reseal(tmp_path / "run" / "checkpoint-1")
    result = script(tiny_text(tmp_path / "run", **words | {"max_train_steps": 2}, resume_from_checkpoint="latest"), program=FINETUNE)
    assert result.code == 1 and "checkpoint-1 holds other adapters" in result.error and "lora_A.weight is missing" in result.error


@pytest.mark.parametrize("change", [gone, without_some, without_any])
def test_a_reservoir_is_never_filled(script, tmp_path, change):
    words = {"noise_coupling": "reservoir", "train_batch_size": 4, "coupling_reservoir": 16}
    assert script(tiny(tmp_path / "run", **words)).code == 0
    change(tmp_path / "run" / "checkpoint-4" / "coupling-0.safetensors")
    reseal(tmp_path / "run" / "checkpoint-4")
    result = script(tiny(tmp_path / "run", **words, max_train_steps=6, resume_from_checkpoint="checkpoint-4"))
    named = "checkpoint-4: a reservoir" if change is without_some else "coupling-0.safetensors"
    assert result.code in (1, 2) and named in result.error and len(result.error) < 400


def test_an_update_that_is_not_finite_is_not_saved(script, tmp_path):
    """Loss and gradient are finite, and clipped to what Adam's square has no number for: 0 / 0."""
    result = script(tiny(tmp_path / "run", adam_epsilon=0, max_grad_norm=1e-30, max_train_steps=1))
    assert result.code == 1 and "NaN or infinity after step 1 in the weights" in result.error and "nothing was saved" in result.error
    assert not list((tmp_path / "run").glob("checkpoint-*")) and not (tmp_path / "run" / "model_index.json").exists()


def test_nothing_that_is_not_finite_is_saved(tmp_path):
    from accelerate import Accelerator
    from diffusers import UNet2DModel

    network = UNet2DModel(sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8,), norm_num_groups=8, layers_per_block=1,
                          down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",))  # fmt: skip
    accelerator = Accelerator(cpu=True)
    accelerator.prepare(network, torch.optim.AdamW(network.parameters()))
    save_checkpoint(accelerator, tmp_path, 1, None, {}, None)
    assert damage(tmp_path / "checkpoint-1") == ""
    with torch.no_grad():
        next(network.parameters())[0] = torch.inf
    with pytest.raises(UserError, match=r"NaN or infinity after step 2 in the weights: nothing was saved") as raised:
        save_checkpoint(accelerator, tmp_path, 2, None, {}, None)
    assert raised.value.exit_code == 1 and [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    with torch.no_grad():
        next(network.parameters())[0] = 0
    with pytest.raises(UserError, match="coupling's state"):
        save_checkpoint(accelerator, tmp_path, 2, None, {}, None, {"noise-0": torch.tensor([torch.nan])})


# Whose folder


def test_folders_of_others_are_never_touched(script, copy):
    (copy / "checkpoint-2").mkdir()
    (copy / "checkpoint-2" / "precious.txt").write_text("mine")
    result = script(argv(copy, 12, resume_from_checkpoint="latest", checkpoints_total_limit=1))
    assert result.code == 0, result.stderr
    assert (copy / "checkpoint-2" / "precious.txt").read_text() == "mine"
    assert sorted(path.name for path in copy.glob("checkpoint-*")) == ["checkpoint-12", "checkpoint-2"]
    result = script(argv(copy, 4, overwrite_output_dir=True))
    assert result.code == 2 and "checkpoint-2" in result.error  # in the way of a run from its beginning
    (copy / "checkpoint-2").rename(copy / "kept")
    assert script(argv(copy, 4, overwrite_output_dir=True)).code == 0 and (copy / "kept" / "precious.txt").exists()


def test_a_foreign_folder_in_the_way_is_an_error_before_the_first_step(script, copy):
    (copy / "checkpoint-12").mkdir()
    before = snapshot(copy)
    result = script(argv(copy, 12, resume_from_checkpoint="latest"))
    assert result.code == 2 and "checkpoint-12" in result.error and snapshot(copy) == before


@pytest.mark.parametrize("inside", ["run", "a/b/run", "."])
def test_a_run_does_not_go_into_its_data(script, tmp_path, inside):
    (tmp_path / "photos").mkdir()
    for number in range(16):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / "photos" / f"{number}.png")
    before = snapshot(tmp_path)
    result = script(tiny(tmp_path / "photos" / inside, train_data_dir=tmp_path / "photos"))
    assert result.code == 2 and "--train_data_dir" in result.error and "inside" in result.error
    assert snapshot(tmp_path) == before


def test_a_run_does_not_go_into_the_images_held_out_nor_delete_images(script, tmp_path):
    for place in ("held", "run/samples"):
        (tmp_path / place).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / place / "0.png")
    (tmp_path / "run" / ".immiscible-run").touch()
    before = snapshot(tmp_path)
    measured = {"eval_steps": 2, "eval_data_dir": tmp_path / "held"}
    result = script(tiny(tmp_path / "held" / "run", **measured))
    assert result.code == 2 and "lies inside --eval_data_dir" in result.error
    result = script(tiny(tmp_path / "run", train_data_dir=tmp_path / "run" / "samples", overwrite_output_dir=True))
    assert result.code == 2 and f"--overwrite_output_dir deletes {tmp_path / 'run' / 'samples'}" in result.error
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    result = script(tiny(tmp_path / "link"))
    assert result.code == 2 and f"link is a link to {tmp_path / 'gone'}, which is not there" in result.error
    (tmp_path / "link").unlink()
    assert snapshot(tmp_path) == before


def test_a_checkpoint_may_be_a_link_and_not_another_one_renamed(script, copy, tmp_path):
    (copy / "summary.json").unlink()
    shutil.move(copy / "checkpoint-8", tmp_path / "elsewhere")
    (copy / "checkpoint-8").symlink_to(tmp_path / "elsewhere")
    shutil.copytree(copy / "checkpoint-4", copy / "checkpoint-10")
    result = script(argv(copy, 12, resume_from_checkpoint="latest", checkpoints_total_limit=1))
    assert result.code == 0, result.stderr
    assert "checkpoint-10 is damaged (it is of step 4, whatever it is called)" in result.stderr
    assert (tmp_path / "elsewhere" / "optimizer.bin").exists() and (copy / "checkpoint-12").is_dir()


def test_two_runs_in_one_folder(script, tmp_path):
    """Whichever comes first trains, as if it were alone; the other says so in one line."""
    folder = tmp_path / "run"
    runs = [script.start(argv(folder, 60, seed=seed, resume_from_checkpoint="latest")) for seed in (0, 0)]
    results = [run.wait() for run in runs]
    trained = [result for result in results if result.code == 0]
    refused = [result for result in results if result.code == 1]
    assert len(trained) == 1 and len(refused) == 1, results
    assert "in use by another process" in refused[0].error or "meanwhile" in refused[0].error
    assert [line["step"] for line in metrics(folder)] == list(range(1, 61))


def test_a_run_is_not_overwritten_while_it_trains(script, tmp_path):
    folder = tmp_path / "run"
    first = script.start(argv(folder, 100_000))
    first.wait_until((folder / "checkpoint-8").exists)
    second = script(argv(folder, 4, overwrite_output_dir=True, seed=7))
    assert second.code == 1 and "in use" in second.error
    first.send(signal.SIGTERM)
    assert first.wait().code == 128 + signal.SIGTERM
    steps = [line["step"] for line in metrics(folder)]
    assert len(steps) > 8 and steps == list(range(1, len(steps) + 1))


@pytest.mark.slow
def test_a_launch_whose_processes_do_not_see_each_other_is_refused(tmp_path):
    """On a machine without a GPU, by torch's own launcher, accelerate sees one process in each."""
    environment = {name: value for name, value in {**os.environ, **ENVIRONMENT}.items() if name != "ACCELERATE_USE_CPU"}
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", str(SCRIPT), *argv(tmp_path / "run")]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 1 and "WORLD_SIZE" in done.stderr and not (tmp_path / "run").exists()
