"""What ends a run early, and that nothing is lost by it."""

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from kills import final_hashes, finish, lines, start
from launch import ENVIRONMENT, ROOT, SCRIPT, free_port, tiny

GRIDS = {"max_train_samples": 64, "save_images_epochs": 1, "checkpointing_steps": 1000, "max_train_steps": 8, "use_ema": True}


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_stop_during_a_grid_saves_and_the_grid_comes_when_resumed(script, tmp_path, processes):
    slow = {**GRIDS, "ddpm_num_inference_steps": 200, "train_batch_size": 16 // processes}
    words = tiny(tmp_path / "stopped", **slow, resume_from_checkpoint="latest")
    runs = start(script, words, processes)
    runs[0].wait_until(lambda: lines(tmp_path / "stopped") >= 4)  # an epoch of four steps has ended: the grid is under way
    runs[0].send(signal.SIGTERM)
    results = [run.wait() for run in runs]
    assert [result.code for result in results] == [128 + signal.SIGTERM] * processes, results
    assert "Stopped by SIGTERM at step" in results[0].stdout and "left out" in results[0].stderr
    assert list((tmp_path / "stopped").glob("checkpoint-*")) and not list((tmp_path / "stopped" / "samples").glob("*4.png"))
    finish(start(script, words, processes))
    finish(start(script, tiny(tmp_path / "whole", **slow), processes))
    assert final_hashes(tmp_path / "stopped", 8) == final_hashes(tmp_path / "whole", 8)
    for grid in (tmp_path / "whole" / "samples").iterdir():
        assert grid.read_bytes() == (tmp_path / "stopped" / "samples" / grid.name).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("step", [2, 3])
def test_a_stop_during_an_evaluation(script, tmp_path, step):
    """At the last step, too; the measurement is made up for, and so is all that ends a run."""
    slow = {"eval_steps": 3 if step == 3 else 2, "eval_samples": 64, "eval_inference_steps": 200, "checkpointing_steps": 1000}
    words = tiny(tmp_path / "run", **slow, max_train_steps=3, resume_from_checkpoint="latest")
    run = script.start(words)
    run.wait_until(lambda: lines(tmp_path / "run") >= step)
    time.sleep(0.2)
    run.send(signal.SIGTERM)
    result = run.wait()
    assert result.code == 128 + signal.SIGTERM and f"at step {step} of 3" in result.stdout and "left out" in result.stderr, result
    assert not (tmp_path / "run" / "summary.json").exists() and not (tmp_path / "run" / "evaluation.jsonl").read_text()
    finish([script.start(words)])
    evaluations = [json.loads(line) for line in (tmp_path / "run" / "evaluation.jsonl").read_text().splitlines()]
    assert [line["step"] for line in evaluations] == sorted({step, 3})
    assert (tmp_path / "run" / "samples" / "step-0000003.png").exists() and (tmp_path / "run" / "model_index.json").exists()


def test_what_a_kill_comes_before_is_made_when_resumed(script, tmp_path):
    """The grid and the pipeline of a step that is saved already."""
    folder = tmp_path / "run"
    often = {"checkpointing_steps": 4, "save_model_epochs": 1, "ddpm_num_inference_steps": 60}
    words = tiny(folder, **{**GRIDS, **often}, resume_from_checkpoint="latest")
    run = script.start(words)
    run.wait_until((folder / "checkpoint-4").exists)
    run.kill_all()
    assert not (folder / "samples" / "step-0000004.png").exists() and not (folder / "model_index.json").exists()
    run = script.start(words)
    run.wait_until((folder / "model_index.json").exists)
    run.kill_all()
    assert (folder / "samples" / "step-0000004.png").exists() and not (folder / "checkpoint-8").exists()


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_every_signal_saves_and_has_its_code(script, tmp_path, number):
    run = script.start(tiny(tmp_path / "run", max_train_steps=100_000, checkpointing_steps=50_000))
    run.wait_until(lambda: lines(tmp_path / "run") >= 2)
    run.send(number)
    result = run.wait()
    assert result.code == 128 + number and f"Stopped by {signal.Signals(number).name}" in result.stdout
    assert len(list((tmp_path / "run").glob("checkpoint-*"))) == 1


def test_a_second_signal_ends_at_once_whatever_the_process_waits_for():
    code = """
import ctypes
from immiscible.training.stop import StopRequest
with StopRequest():
    print("ready", flush=True)
    mutex = ctypes.create_string_buffer(64)
    for _ in range(2):
        ctypes.CDLL(None).pthread_mutex_lock(mutex)  # for ever, in C, where no Python handler runs: as torch waits for a rank
"""
    environment = {**os.environ, **ENVIRONMENT}
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    time.sleep(1.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM and "second SIGTERM" in errors


@pytest.mark.slow
def test_a_second_signal_ends_a_process_that_waits_for_a_frozen_one(script, tmp_path):
    runs = start(script, tiny(tmp_path / "run", max_train_steps=100_000, checkpointing_steps=3, train_batch_size=4), 2)
    runs[0].wait_until((tmp_path / "run" / "checkpoint-3").exists)
    try:
        runs[1].send(signal.SIGSTOP)
        time.sleep(1)
        runs[0].send(signal.SIGTERM)
        time.sleep(1.5)
        assert runs[0].poll() is None  # it waits
        runs[0].send(signal.SIGTERM)
        result = runs[0].wait(30)
        assert result.code == 128 + signal.SIGTERM and "ended at once by a second SIGTERM" in result.stderr
    finally:
        runs[1].kill_all()


@pytest.mark.slow
@pytest.mark.parametrize("program", [SCRIPT, ROOT / "scripts" / "sample.py"], ids=lambda path: path.stem)
def test_a_process_whose_fellow_never_comes_says_so(tmp_path, program):
    """Within minutes, here seconds."""
    code = "import datetime, runpy, sys, immiscible.training.session as session; session.RENDEZVOUS = datetime.timedelta(seconds=2);"
    words = ["--model", ".", "--num_images", "2", "--num_inference_steps", "2", "--output_dir", str(tmp_path / "run")]
    words = tiny(tmp_path / "run") if program == SCRIPT else words
    ranks = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1"}
    environment = {**os.environ, **ENVIRONMENT, **ranks, "MASTER_PORT": str(free_port()), "PYTHONPATH": str(ROOT)}
    code += f"sys.argv[0] = {str(program)!r}; runpy.run_path({str(program)!r}, run_name='__main__')"
    (tmp_path / "empty").mkdir()
    command = [sys.executable, "-c", code, *map(str, words)]
    done = subprocess.run(command, cwd=tmp_path / "empty", env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "has ended, or never came" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("processes", [2, 4])
def test_a_killed_rank_ends_the_others_with_one_line(script, tmp_path, processes):
    runs = start(script, tiny(tmp_path / "run", max_train_steps=100_000, checkpointing_steps=3, train_batch_size=4), processes)
    runs[0].wait_until((tmp_path / "run" / "checkpoint-6").exists)
    runs[-1].send_group(signal.SIGKILL)
    for run in runs[:-1]:
        result = run.wait(60)
        assert result.code == 1 and "another process of this launch" in result.error and "--resume_from_checkpoint latest" in result.error


def test_a_killed_loader_worker_saves_and_says_so(script, tmp_path):
    run = script.start(tiny(tmp_path / "run", max_train_steps=100_000, checkpointing_steps=50_000, dataloader_num_workers=2))
    run.wait_until(lambda: lines(tmp_path / "run") >= 2)
    psutil.Process(run.pid).children()[0].kill()
    result = run.wait()
    assert result.code == 1 and "--dataloader_num_workers" in result.error and "saved at step" in result.error
    assert len(list((tmp_path / "run").glob("checkpoint-*"))) == 1


@pytest.mark.slow
def test_the_death_of_the_launcher_saves(tmp_path):
    """`docker stop` and `kill` end `accelerate launch` alone."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no"]
    words = [*launch, "--dynamo_backend", "no", str(SCRIPT), *tiny(tmp_path / "run", max_train_steps=100_000, checkpointing_steps=50_000)]
    launcher = subprocess.Popen(words, env={**os.environ, **ENVIRONMENT}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while lines(tmp_path / "run") < 3:
        assert time.monotonic() < deadline and launcher.poll() is None
        time.sleep(0.1)
    (child,) = psutil.Process(launcher.pid).children()
    launcher.kill()
    child.wait(60)
    assert len(list((tmp_path / "run").glob("checkpoint-*"))) == 1
