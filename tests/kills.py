"""Starts runs, kills them, and compares what is left."""

from __future__ import annotations

import hashlib
import json
import signal
from pathlib import Path


def final_hashes(folder: Path, step: int) -> dict[str, str]:
    """Of the network and its average."""
    weights = sorted((folder / f"checkpoint-{step}").glob("*/diffusion_pytorch_model.safetensors"))
    assert [path.parent.name.removesuffix("_ema") for path in weights] in (["unet"] * 2, ["transformer"] * 2), weights
    return {path.parent.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in weights}


def start(script, argv, processes, **options):
    return script.start_ranks(argv, processes, **options) if processes > 1 else [script.start(argv, **options)]


def finish(runs, code=0):
    results = [run.wait(240) for run in runs]
    assert [result.code for result in results] == [code] * len(runs), results
    return results


def kill(runs):
    for run in runs:
        if run.poll() is None:
            run.send_group(signal.SIGKILL)
    for run in runs:
        run.wait()


def lines(folder):
    path = folder / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
