"""Runs for comparisons: curves, and the folders that they leave."""

import html
import json
import math
import re
from itertools import count, pairwise

import pytest
from PIL import Image

from immiscible.config_files import save_config
from immiscible.configs import TextToImageConfig, UnconditionalConfig
from immiscible.reports.ratios import Interval

INF = math.inf
DAYS = count(20000)


def decay(stop=500, every=100, speed=1.0, scale=1.0):
    """A curve that falls by a factor of e in 100 steps at speed 1, evaluated every ``every`` steps."""
    return [(float(step), scale * 50 * math.exp(-speed * step / 100)) for step in range(every, stop + 1, every)]


def exactly(value):
    return Interval(value, value)


def words(page):
    """A page's text without its tags."""
    return html.unescape(re.sub(r"<[^>]+>", "", page))


def noisy(generator, stop=500):
    """A curve that falls on average, with noise and ties, at steps that are not evenly spaced."""
    steps = sorted(generator.sample(range(1, stop), 8))
    return [(float(step), max(0.1, round(30 * math.exp(-step / 200) * generator.uniform(0.6, 1.5), 1))) for step in steps]


def near(interval, value, tolerance=1e-9):
    return interval.low == interval.high == pytest.approx(value, rel=tolerance)


def clocked(steps, *, session="alone", cpu_seconds_per_step=None):
    """What lines of a log at these steps say of time: of a run that had two days to itself, or of a session (start, end).

    A session of None is an older run's, which did not say.
    """
    start, end = (86400 * next(DAYS), 86400 * next(DAYS)) if session == "alone" else session or (0, 0)
    ends = [start + (end - start) * (number + 1) / len(steps) for number in range(len(steps))]
    lines = [{"began": began, "ended": ended} if session else {} for began, ended in pairwise([start, *ends])]
    for step, line in zip(steps, lines, strict=True):
        if cpu_seconds_per_step:
            line |= {"step_cpu_seconds": cpu_seconds_per_step, "train_cpu_seconds": step * cpu_seconds_per_step}
    return lines


def write_run(
    folder,
    curves,
    *,
    guided=None,
    steps=None,
    seed=0,
    finished=True,
    dimension=None,
    line=None,
    seconds_per_step=0.05,
    cpu_seconds_per_step=None,
    session="alone",
    metric=None,
    text=False,
    **flags,
):
    """A folder as a training script leaves it; ``curves`` by number of inference steps, ``guided`` ones by guidance scale, too.

    ``steps`` are a curve's whose steps all have, where ``curves`` are none. ``session`` is as in `clocked`.
    """
    (folder / "samples").mkdir(parents=True)
    data = {"pretrained_model_name_or_path": "sd", "train_data_dir": "photos"} if text else {"bundled_data": "digits"}
    values = {**data, "resolution": 8, "prediction_type": "v_prediction", "max_train_steps": 500, **flags}
    config = TextToImageConfig if text else UnconditionalConfig
    save_config(config(seed=seed, output_dir=str(folder), **values), folder / "config.yaml")
    common = {"feature": "FD-digits", "samples": 1500, "reference_images": 1797, "data": "abc", "weights": "ema"}
    common |= {"validation_loss": {"0-499": 0.2, "500-999": 0.1}, **({"num_features": dimension} if dimension else {}), **(line or {})}
    with (folder / "evaluation.jsonl").open("w") as file:
        for number, (step, _) in enumerate(steps or next(iter(curves.values()))):
            distances = {str(steps): curve[number][1] for steps, curve in curves.items()}
            if guided:
                by_scale = {f"{scale:g}": {str(steps): curve[number][1] for steps, curve in of.items()} for scale, of in guided.items()}
                common["frechet_distance_guided"] = by_scale
            times = {"train_seconds": step * seconds_per_step}
            times |= {"train_cpu_seconds": step * cpu_seconds_per_step} if cpu_seconds_per_step else {}
            file.write(json.dumps({"step": int(step), **times, **common, "frechet_distance": distances}) + "\n")
    metrics = {"step_seconds": seconds_per_step, "coupling_seconds": 0.005, "distance_reduction_percent": 9.5}
    metrics |= {"noise_variance_drift": 0.01, "noise_norm_drift": -0.02, "paired_images": 256, "loss": 0.1, **(metric or {})}
    times = clocked((10, 20), session=session, cpu_seconds_per_step=cpu_seconds_per_step)
    lines = [
        {"step": step, "train_seconds": step * seconds_per_step, **time, **metrics} for step, time in zip((10, 20), times, strict=True)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if finished:
        (folder / "summary.json").write_text(json.dumps({"step": 500}))
        Image.new("RGB", (64, 64), "navy").save(folder / "samples" / "step-0000500.png")
    return folder


def run_pair(tmp_path, name, **curves):
    """The folders of an arm's two seeds with the same curves, whose speed at 5 and at 20 inference steps is given."""
    return [
        write_run(tmp_path / f"{name}-seed{seed}", {5: decay(speed=curves["five"]), 20: decay(speed=curves["twenty"])}, seed=seed)
        for seed in range(2)
    ]


def leave_checkpoint(folder, from_scratch=False, processes=1):
    (folder / "checkpoint-500").mkdir(exist_ok=True)
    state = {"step": 500, "identity": {"network": {"from_scratch": from_scratch}, "processes": processes}, "files": {}}
    (folder / "checkpoint-500" / "training_state.json").write_text(json.dumps(state))
