import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from immiscible.configs import UnconditionalConfig
from immiscible.method import chosen_sampler
from immiscible.objective_choice import training_scheduler
from immiscible.process import NoiseProcess
from immiscible.training.summary import NEEDED, measured_facts, method_facts, peak_memory


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the kernel's own count is read from /proc")
def test_peak_memory_is_the_kernels_in_mebibytes():
    peak = int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 2**10
    assert peak_memory() == pytest.approx(peak, rel=0.05)


def test_peak_memory_of_macos_is_counted_in_bytes(monkeypatch):
    found = SimpleNamespace(getrusage=lambda who: SimpleNamespace(ru_maxrss=3 * 2**20), RUSAGE_SELF=0)
    monkeypatch.setitem(sys.modules, "resource", found)
    monkeypatch.setattr(sys, "platform", "darwin")
    assert peak_memory() == 3


def test_peak_memory_without_the_module_that_windows_lacks(monkeypatch):
    monkeypatch.setitem(sys.modules, "resource", None)
    monkeypatch.setattr(psutil, "Process", lambda: SimpleNamespace(memory_info=lambda: SimpleNamespace(peak_wset=5 * 2**20)))
    assert peak_memory() == 5


def test_edited_metrics_do_not_cost_the_end_of_a_run(tmp_path):
    config = SimpleNamespace(folder=tmp_path, gradient_accumulation_steps=1, by_epoch=False, coupling_caches=0)
    good = {"step": 2, "loss": 0.5, **dict.fromkeys(NEEDED, 2.0), "pair_distance": 1.0}
    other = {name: value for name, value in good.items() if name != "step_seconds"} | {"pair_distance": "x", "coupling_seconds": 4.0}

    def facts(*lines):
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return measured_facts(config)

    assert facts() == {} == facts(good, {"step": 3})
    assert facts(good, good) == facts(good)
    assert facts(other, good)["coupling_time"] == "3000.00 ms of a 2000.0 ms step"
    assert facts(other, good)["pair_distance"] == facts(good)["pair_distance"]


def test_of_a_coupling_that_did_nothing_nothing_is_told(tmp_path):
    config = SimpleNamespace(folder=tmp_path, gradient_accumulation_steps=1, by_epoch=False, coupling_caches=0)
    idle = {
        "step": 2,
        "loss": 0.5,
        **dict.fromkeys(NEEDED, 2.0),
        "paired_images": 1.0,
        "assignment_kept": 1.0,
        "assignment_bids_per_row": 0.0,
    }
    told = []
    for line in (idle, {**idle, "pair_distance": 1.9, "noise_norm_drift": -1e-7}):
        (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
        told.append(measured_facts(config))
    assert told[0] == {"optimizer_steps": "2", "final_loss": "0.50000"}
    assert told[1].keys() - told[0].keys() == {"pair_distance", "noise_marginal_drift", "coupling_time"}
    assert told[1]["noise_marginal_drift"].endswith("norm 0")


@pytest.mark.parametrize(
    ("law", "moved", "told"),
    [
        ("uniform", 1e-17, "uniform"),
        ("asymmetric", 1e-4, "asymmetric (on this schedule the law hardly differs from uniform)"),
        ("asymmetric", 0.027, "asymmetric, moves 2.7 % of the draws (on this schedule the law hardly differs from uniform)"),
        ("asymmetric", 0.221, "asymmetric, moves 22.1 % of the draws"),
    ],
)
def test_no_law_moves_nothing(law, moved, told):
    parts = {"sampler": SimpleNamespace(moved_share=lambda: moved, course=""), "process": SimpleNamespace(num_timesteps=7, kind="ddpm")}
    objective = SimpleNamespace(**parts, image_scale=1, prediction_type="sample")
    facts = method_facts(UnconditionalConfig(timestep_sampling=law), objective, schedule="linear", inference_steps=2)
    assert facts["timestep_sampling"] == told


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (
            {"timestep_sampling": "clts", "clts_std": 0.1, "clts_ramp_steps": 2000},
            "clts, moves 0.0 to 57.2 % of the draws over 2,000 optimizer steps",
        ),
        ({"timestep_sampling": "loss_second_moment"}, "loss_second_moment, follows the losses once every timestep has ten"),
        ({"timestep_shift": 3.0}, "uniform, moves 18.6 % of the draws, shift 3"),
        (
            {"timestep_sampling": "asymmetric", "second_timestep_sampling": "uniform", "second_phase_step": 1500},
            "asymmetric, moves 22.1 % of the draws; from optimizer step 1,500 on uniform",
        ),
    ],
)
def test_what_becomes_of_a_law_is_said(flags, told):
    config = UnconditionalConfig(**flags)
    process = NoiseProcess.from_scheduler(training_scheduler(config))
    objective = SimpleNamespace(sampler=chosen_sampler(config, process), process=process, image_scale=1, prediction_type="epsilon")
    facts = method_facts(config, objective, schedule="linear", inference_steps=2)
    assert facts["timestep_sampling"].startswith(told)
