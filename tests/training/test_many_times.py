"""What chance decides, many times over: signals at any moment, two runs in one folder, ranks that die, kills of every kind of run."""

import json
import random
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
from kills import final_hashes, finish, kill, lines, metrics, start
from latent_caches import PRECOMPUTE
from launch import flags, tiny
from tiny_text import FINETUNE, data_folder, model_folder

pytestmark = pytest.mark.slow

LIVE = {
    "max_train_samples": 64,
    "save_images_epochs": 1,
    "ddpm_num_inference_steps": 40,
    "use_ema": True,
    "resume_from_checkpoint": "latest",
}
LIVE |= {"eval_steps": 3, "eval_samples": 64, "eval_inference_steps": [40], "checkpointing_steps": 1000}


def test_twenty_signals_at_any_moment(script, tmp_path):
    """In a step, a grid, an evaluation or a save: what was trained is saved, and the run ends as if it had not been stopped."""
    steps, draw, seconds, during = 48, random.Random(0), [], Counter()
    folder = tmp_path / "stopped"
    whole = {**LIVE, "max_train_steps": steps}
    finish([script.start(tiny(tmp_path / "whole", **whole))])
    for _ in range(20):
        run, before = script.start(tiny(folder, **whole)), lines(folder)
        run.wait_until(lambda before=before: lines(folder) > before or (folder / "summary.json").exists())
        time.sleep(draw.random() * 1.5)
        run.send(signal.SIGTERM)
        sent = time.monotonic()
        result = run.wait()
        seconds.append(time.monotonic() - sent)
        if (folder / "summary.json").exists():
            break
        assert result.code == 128 + signal.SIGTERM, result
        during["a grid or an evaluation" if "left out" in result.stderr else "a step"] += 1
        last = max(int(path.name.partition("-")[2]) for path in folder.glob("checkpoint-*"))
        assert f"at step {last} of {steps}" in result.stdout and lines(folder) >= last
    finish([script.start(tiny(folder, **whole))])
    print(f"{sum(during.values())} signals, {dict(during)}; ended {max(seconds):.2f} s after the signal at most")
    assert sum(during.values()) >= 10 and during["a grid or an evaluation"] >= 2
    assert final_hashes(folder, steps) == final_hashes(tmp_path / "whole", steps)
    grids = sorted(path.name for path in (tmp_path / "whole" / "samples").iterdir())
    assert grids == sorted(path.name for path in (folder / "samples").iterdir())
    for name in grids:
        assert (folder / "samples" / name).read_bytes() == (tmp_path / "whole" / "samples" / name).read_bytes()

    one, other = (
        [(line["step"], line["frechet_distance"]) for line in map(json.loads, (run / "evaluation.jsonl").read_text().splitlines())]
        for run in (tmp_path / "whole", folder)
    )
    assert one == other


def test_two_runs_at_once_twenty_times(script, tmp_path):
    """At offsets from none to a whole start: exactly one trains, as if alone."""
    draw = random.Random(1)
    for number in range(20):
        folder = tmp_path / str(number)
        words = tiny(folder, max_train_steps=40, checkpointing_steps=10, resume_from_checkpoint="latest")
        first = script.start(words)
        time.sleep(draw.random() * 0.6)
        results = [run.wait() for run in (first, script.start(words))]
        trained = [result for result in results if result.code == 0]
        assert len(trained) >= 1 and all(result.code in (0, 1) for result in results), results
        if len(trained) == 2:  # the second came when the first had finished
            assert "is finished" in results[1].stderr, results[1]
        else:
            (refused,) = (result for result in results if result.code == 1)
            assert "in use by another process" in refused.error or "meanwhile" in refused.error
        assert [line["step"] for line in metrics(folder)] == list(range(1, 41))


@pytest.mark.parametrize("processes", [2, 4])
def test_ranks_that_die_at_any_moment(script, tmp_path, processes):
    draw, seconds = random.Random(processes), []
    for number in range(5):
        folder = tmp_path / str(number)
        words = tiny(folder, max_train_steps=100_000, checkpointing_steps=5, train_batch_size=4, resume_from_checkpoint="latest")
        runs = start(script, words, processes)
        runs[0].wait_until((folder / "checkpoint-5").exists)
        time.sleep(draw.random())
        dead = draw.randrange(processes)
        runs[dead].send_group(signal.SIGKILL)
        killed = time.monotonic()
        for rank, run in enumerate(runs):
            result = run.wait(60)
            if rank != dead:
                assert result.code == 1 and "another process of this launch" in result.error
        seconds.append(time.monotonic() - killed)
        newest = max(int(path.name.partition("-")[2]) for path in folder.glob("checkpoint-*"))
        more = tiny(folder, max_train_steps=newest + 1, checkpointing_steps=5, train_batch_size=4, resume_from_checkpoint="latest")
        results = finish(start(script, more, processes))
        assert "damaged" not in results[0].stderr and [line["step"] for line in metrics(folder)] == list(range(1, newest + 2))
    print(f"{processes} processes: all ended {max(seconds):.2f} s after the kill at most")


def kinds(tmp_path: Path) -> dict[str, tuple[str, dict]]:
    text = {"pretrained_model_name_or_path": model_folder(), "train_data_dir": data_folder(), "resolution": 32, "train_batch_size": 4}
    text |= {"lr_warmup_steps": 0, "report_to": "none", "seed": 0, "logging_steps": 1, "learning_rate": 1e-3, "use_lora": True}
    cache = {**text, "center_crop": True, "cache_latents": True, "latent_cache_dir": tmp_path / "cache"}
    pairs = {"noise_coupling": "assignment", "coupling_window": 3, "gradient_accumulation_steps": 2, "use_ema": True}
    return {
        "adapters": (FINETUNE, {**text, "noise_coupling": "assignment"}),
        "cache": (FINETUNE, {**cache, "noise_coupling": "assignment"}),
        "reservoir": ("train_unconditional.py", {"noise_coupling": "reservoir", "train_batch_size": 4, "use_ema": True}),
        "window": ("train_unconditional.py", pairs),
        "epoch": ("train_unconditional.py", {**pairs, "coupling_window": "epoch", "max_train_samples": 100}),
    }


@pytest.mark.parametrize("name", ["adapters", "cache", "reservoir", "window", "epoch"])
def test_twenty_kills_of_every_kind_of_run(script, tmp_path, name):
    program, changes = kinds(tmp_path)[name]
    steps, draw, kills = 60, random.Random(3), 0
    common = {**changes, "max_train_steps": steps, "checkpointing_steps": 2, "resume_from_checkpoint": "latest"}

    def words(folder: str) -> list[str]:
        return flags({**common, "output_dir": tmp_path / folder}) if program == FINETUNE else tiny(tmp_path / folder, **common)

    if name == "cache":
        finish([script.start(words("whole"), program=PRECOMPUTE)])
    finish([script.start(words("whole"), program=program)])
    folder = tmp_path / "killed"
    for _ in range(20):
        run, before = script.start(words("killed"), program=program), lines(folder)
        more = before + draw.randint(0, 4)
        run.wait_until(lambda more=more: lines(folder) > more or (folder / "summary.json").exists())
        time.sleep(draw.random() * 0.05)
        kill([run])
        if (folder / "summary.json").exists():
            break
        kills += 1
    finish([script.start(words("killed"), program=program)])
    print(f"{name}: {kills} kills")
    assert kills >= 10
    found, expected = (hashes(tmp_path / run / f"checkpoint-{steps}") for run in ("killed", "whole"))
    assert found == expected and expected


def hashes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.safetensors"))}
