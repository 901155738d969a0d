"""The times in a run's log: those of the steps, added up over sessions, and when they were taken."""

import json
import time
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from immiscible.configs import UnconditionalConfig
from immiscible.training import loop
from immiscible.training.log import RunLog

STEP = {"loss": 0.5, "pair_distance": 1.0, "pair_distance_drawn": 1.0}


def test_a_line_says_how_fast_it_goes_and_what_is_left(tmp_path):
    (line, later), _ = logged(tmp_path, 0, (1, 2.0, 1.5), (2, 4.0, 1.5))
    assert (line["images_per_second"], line["remaining_seconds"]) == (8.0, 18.0)  # 16 images in 2 seconds, 9 steps of 10 to go
    assert (later["images_per_second"], later["remaining_seconds"]) == (4.0, 32.0) and "gpu_memory_mib" not in line
    assert RunLog.shown(line) == {"loss": "0.5000", "images/s": "8"}


def test_on_a_gpu_memory_is_logged_and_shown(tmp_path, monkeypatch):
    accelerator = SimpleNamespace(device=torch.device("cuda"), num_processes=2, is_main_process=True, log=lambda *_, **__: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**29)
    monkeypatch.setattr("immiscible.training.log.on_main_process", lambda accelerator, work, folder=None: work())
    config = UnconditionalConfig(output_dir=str(tmp_path), logger="none", gradient_accumulation_steps=4)
    means = RunLog(tmp_path, accelerator, config, 0, 10).add(1, {**STEP, "step_seconds": 2.0}, write=True)
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert line["gpu_memory_mib"] == 1536 and line["images_per_second"] == 16 * 4 * 2 / 2
    assert RunLog.shown(means) == {"loss": "0.5000", "images/s": "64", "GPU": "1.5 GiB"}


def logged(folder, start, *steps):
    """Adds steps (number, wall, CPU seconds or None) to a run's log, a line each; returns the lines and the times that it then has."""
    log = RunLog(folder, Accelerator(cpu=True), UnconditionalConfig(output_dir=str(folder), logger="none"), start, 10)
    for step, wall, cpu in steps:
        log.add(step, {**STEP, "step_seconds": wall, **({} if cpu is None else {"step_cpu_seconds": cpu})}, write=True)
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()], log.times


def test_times_add_up_over_sessions(tmp_path):
    before = time.time()
    lines, _ = logged(tmp_path, 0, (1, 2.0, 1.5), (2, 2.0, 1.5), (3, 2.0, 1.5))
    assert [(line["train_seconds"], line["train_cpu_seconds"]) for line in lines] == [(2.0, 1.5), (4.0, 3.0), (6.0, 4.5)]
    assert lines[0]["ended"] == lines[1]["began"] and before - 0.001 <= lines[0]["began"] <= lines[2]["ended"] <= time.time() + 0.001
    lines, times = logged(tmp_path, 2, (3, 1.0, 0.5))  # killed, and resumed from step 2
    assert [line["step"] for line in lines] == [1, 2, 3] and times == {"train_seconds": 5.0, "train_cpu_seconds": 3.5}
    assert lines[2]["began"] >= lines[1]["ended"]


@pytest.mark.parametrize("steps", [[(1, 2.0, None), (2, 2.0, 1.5)], [(1, 2.0, 1.5), (2, 2.0, None)]], ids=["old or GPU first", "GPU later"])
def test_cpu_time_that_not_every_step_said_is_not_told(tmp_path, steps):
    for start, step in enumerate(steps):
        lines, times = logged(tmp_path, start, step)
    assert times == {"train_seconds": 4.0} and "train_cpu_seconds" not in lines[-1]


@pytest.mark.parametrize("device, said", [("cpu", True), ("cuda", False), ("mps", False)])
def test_steps_on_a_gpu_say_no_cpu_time(device, said):
    accelerator = SimpleNamespace(device=torch.device(device), gradient_accumulation_steps=1, process_index=0)
    stop = SimpleNamespace(agreed=lambda accelerator: False)
    items = iter([loop.Item(None, None, {})] * 2)

    def update(fetched, step, rate):
        sum(range(100_000))
        return {"loss": 0.5}

    for stats in loop._steps(accelerator, items, update, range(2), 0, lambda step: 1e-3, stop):
        assert stats.metrics["step_seconds"] > 0
        assert stats.metrics.get("step_cpu_seconds", 0.0) > 0 if said else "step_cpu_seconds" not in stats.metrics
