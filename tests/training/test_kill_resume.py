"""Killed = never killed: whatever the moment of the kill, the continued run ends with the same bits."""

from __future__ import annotations

import random
import signal
import time

import psutil
import pytest
from kills import final_hashes, finish, kill, lines, start
from launch import tiny

FULL = {
    "gradient_accumulation_steps": 2,
    "dropout": 0.1,
    "random_flip": True,
    "use_ema": True,
    "noise_coupling": "assignment",
    "timestep_sampling": "asymmetric",
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 3,
    "resume_from_checkpoint": "latest",
    "max_train_samples": 200,  # several epochs
}


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_law_that_follows_the_losses_goes_on_as_it_was(script, tmp_path, processes):
    """With ten timesteps every one soon has ten losses; killed before or after, looking ahead or not, the run ends with the same bits."""
    changes = {"timestep_sampling": "loss_second_moment", "ddpm_num_steps": 10, "max_train_steps": 16, "use_ema": True}
    changes |= {"gradient_accumulation_steps": 2, "noise_coupling": "assignment", "resume_from_checkpoint": "latest"}
    finish(start(script, tiny(tmp_path / "whole", **changes, look_ahead="false"), processes))
    expected = final_hashes(tmp_path / "whole", 16)
    folder = tmp_path / "killed"
    argv = tiny(folder, **changes, checkpointing_steps=3)
    runs = start(script, argv, processes)
    runs[0].wait_until(lambda: lines(folder) > 11)
    kill(runs)
    assert (folder / "checkpoint-9").exists() and not (folder / "checkpoint-16").exists()
    finish(start(script, argv, processes))
    assert final_hashes(folder, 16) == expected
    finish(start(script, tiny(tmp_path / "uniform", **{**changes, "timestep_sampling": "uniform"}), processes))
    assert final_hashes(tmp_path / "uniform", 16) != expected


def freeze_in_a_save(run, folder):
    """Stops the process while a checkpoint is half written, so that the kill that follows comes in time, or lets it finish."""

    def saving():
        return any(folder.glob(".partial-checkpoint-*"))

    def finished():
        return (folder / "summary.json").exists()

    run.wait_until(lambda: not saving() or finished())  # what the last kill left is cleaned up first
    while True:
        run.wait_until(lambda: saving() or finished())
        run.send(signal.SIGSTOP)
        while psutil.Process(run.pid).status() not in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE):
            time.sleep(0.001)
        if saving() or finished():
            return
        run.send(signal.SIGCONT)


def kill_at_random_points(script, tmp_path, *, kills, processes, steps, checkpointing_steps, seed, **changes):
    """Kills a run ``kills`` times, every third time during a save; returns the final hashes and how many died during a save."""
    folder, draw, during_saves = tmp_path / "killed", random.Random(seed), 0
    argv = tiny(folder, **FULL, **changes, max_train_steps=steps, checkpointing_steps=checkpointing_steps)
    for number in range(kills):
        runs = start(script, argv, processes)
        if number % 3 == 1:
            freeze_in_a_save(runs[0], folder)
        else:
            before, more = lines(folder), draw.randint(0, checkpointing_steps)
            runs[0].wait_until(lambda before=before, more=more: lines(folder) > before + more or (folder / "summary.json").exists())
            time.sleep(draw.random() * 0.05)
        kill(runs)
        during_saves += any(folder.glob(".partial-checkpoint-*"))
        if (folder / "summary.json").exists():
            break
    finish(start(script, argv, processes))
    assert sorted(path.name for path in folder.glob(".*")) == [".immiscible-lock", ".immiscible-run"]
    return final_hashes(folder, steps), during_saves, number + 1


@pytest.mark.slow
def test_killed_three_times(script, tmp_path):
    steps = 9
    changes = {"dataloader_num_workers": 2}
    finish([script.start(tiny(tmp_path / "whole", **FULL, **changes, max_train_steps=steps, checkpointing_steps=100))])
    expected = final_hashes(tmp_path / "whole", steps)
    found, during_saves, kills = kill_at_random_points(
        script, tmp_path, kills=3, processes=1, steps=steps, checkpointing_steps=2, seed=1, **changes
    )
    assert found == expected
    assert during_saves >= 1 and kills >= 2
    assert expected["unet"] != expected["unet_ema"]


def test_another_seed_gives_other_weights(script, tmp_path):
    """So that equal hashes mean something."""
    hashes = []
    for seed in (0, 1):
        finish([script.start(tiny(tmp_path / str(seed), **FULL, max_train_steps=2, seed=seed))])
        hashes.append(final_hashes(tmp_path / str(seed), 2))
    assert hashes[0] != hashes[1]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_twenty_times(script, tmp_path, processes):
    steps = 300
    changes = {"dataloader_num_workers": 2, "train_batch_size": 8}
    whole = tiny(tmp_path / "whole", **FULL, **changes, max_train_steps=steps, checkpointing_steps=1000)
    finish(start(script, whole, processes))
    expected = final_hashes(tmp_path / "whole", steps)
    found, during_saves, kills = kill_at_random_points(
        script, tmp_path, kills=20, processes=processes, steps=steps, checkpointing_steps=4, seed=processes, **changes
    )
    assert found == expected
    assert kills == 20 and during_saves >= 4


OPTIMIZERS = {
    "muon": {"decay_norms_and_biases": False, "lr_scheduler": "cosine"},
    "adamw_8bit": {},
    "adafactor": {"mixed_precision": "bf16"},
    "prodigy": {"learning_rate": 1.0},
    "schedule_free": {"gradient_accumulation_steps": 2, "lr_scheduler": "constant_with_warmup"},
}


@pytest.mark.parametrize("name", ["muon", *(pytest.param(name, marks=pytest.mark.slow) for name in list(OPTIMIZERS)[1:])])
def test_with_each_optimizer_a_run_goes_on_exactly(script, tmp_path, name):
    package = {"adamw_8bit": "bitsandbytes", "prodigy": "prodigyopt", "schedule_free": "schedulefree"}.get(name, "torch")
    pytest.importorskip(package)
    changes = {"lr_warmup_steps": 2, "use_ema": True, **OPTIMIZERS[name], "max_train_steps": 6, "checkpointing_steps": 3}
    finish([script.start(tiny(tmp_path / "whole", optimizer=name, **changes))])
    again = {**changes, "resume_from_checkpoint": tmp_path / "whole" / "checkpoint-3"}
    finish([script.start(tiny(tmp_path / "again", optimizer=name, **again))])
    found = final_hashes(tmp_path / "again", 6)
    assert found == final_hashes(tmp_path / "whole", 6) and found["unet"] != found["unet_ema"]
