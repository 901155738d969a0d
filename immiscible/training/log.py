"""What a run writes while it trains."""

from __future__ import annotations

import logging
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy
import torch

from immiscible.config_files import save_config
from immiscible.evaluation.leakage import ClassLeak
from immiscible.files import append_line, drop_later_lines
from immiscible.processes import on_main_process

if TYPE_CHECKING:
    from accelerate import Accelerator

    from immiscible.training.arguments import RunConfig


logger = logging.getLogger(__name__)

STEP = {"train_seconds": "step_seconds", "train_cpu_seconds": "step_cpu_seconds"}  # what is spent in all, and in a step


class RunLog:
    """``metrics.jsonl`` always, and the tracker if there is one; a line holds means since the line before, and when these steps ``began``
    and ``ended``, in seconds since 1970, with what was measured and sampled before them; also ``images_per_second`` of all processes,
    ``remaining_seconds`` of steps alone, and on a GPU ``gpu_memory_mib``, the most that rank 0 has held of it so far.

    Args:
        folder: the run's folder.
        accelerator: rank 0 writes.
        config: sent to the tracker.
        start_step: lines of later steps, which a killed run left behind, are dropped.
        max_steps: of the whole run.

    ``times`` is what was spent in steps since the run began, without evaluation, sampling and saving: ``train_seconds``, and
    ``train_cpu_seconds`` where every step said what it took.
    """

    def __init__(self, folder: Path, accelerator: Accelerator, config: RunConfig, start_step: int, max_steps: int) -> None:
        self._path = folder / "metrics.jsonl"
        self._accelerator = accelerator
        self._max_steps = max_steps
        self._images = config.train_batch_size * config.gradient_accumulation_steps * accelerator.num_processes  # of a step
        self._sums: dict[str, float] = {}
        self._count = 0
        self.times = dict.fromkeys(STEP, 0.0)
        self._began = time.time()
        on_main_process(accelerator, lambda: self._begin(folder, config, start_step))

    def _begin(self, folder: Path, config: RunConfig, start_step: int) -> None:
        for line in drop_later_lines(self._path, start_step)[-1:]:
            self.times = {name: line[name] for name in STEP if name in line}
        save_config(config, folder / "config.yaml")
        if config.tracker != "none":
            values = {name: value for name, value in asdict(config).items() if name != "hub_token"}
            scalars = {name: value for name, value in values.items() if isinstance(value, int | float | str | bool)}
            self._accelerator.init_trackers(config.tracker_project_name, config=scalars)

    def add(self, step: int, metrics: dict[str, float], *, write: bool, leak: ClassLeak | None = None) -> dict[str, float]:
        """Collects a step's metrics; with ``write`` their means become a line, with what ``leak`` has found. Returns the means so far."""
        self.times = {name: spent + metrics[STEP[name]] for name, spent in self.times.items() if STEP[name] in metrics}
        self._count += 1
        self._sums = {name: self._sums.get(name, 0.0) + value for name, value in metrics.items()}
        means = {name: value / self._count for name, value in self._sums.items()}
        before = means["pair_distance_drawn"]
        means |= {"distance_reduction_percent": 100 * (before - means["pair_distance"]) / before, **self.times}
        means |= self._pace(step, means["step_seconds"])
        if write:
            self._sums, self._count = {}, 0
            if means.get("assignment_relaxations"):
                logger.warning("the assignment's auction met its cap of bids and went on with a coarser step, up to step %d", step)
            if leak:
                means |= {f"class_leak_{name}": value for name, value in leak.result().items() if isinstance(value, float)}
            on_main_process(self._accelerator, lambda: self._write(step, means), self._path.parent)
        return means

    def _pace(self, step: int, seconds: float) -> dict[str, float]:
        """How fast it goes at ``seconds`` a step, and what it takes; see the class."""
        device = self._accelerator.device
        held = {"gpu_memory_mib": torch.cuda.max_memory_allocated(device) / 2**20} if device.type == "cuda" else {}
        return {"images_per_second": self._images / seconds, "remaining_seconds": (self._max_steps - step) * seconds, **held}

    def _write(self, step: int, means: dict[str, float]) -> None:
        began, self._began = self._began, time.time()
        when = {"began": round(began, 3), "ended": round(self._began, 3)}
        append_line(self._path, {"step": step, **when, **{name: float(f"{value:.8g}") for name, value in means.items()}})
        self._accelerator.log(means, step=step)

    @staticmethod
    def shown(means: dict[str, float]) -> dict[str, str]:
        """What the progress bar shows beside its own rate and the time that is left."""
        held = {"GPU": f"{means['gpu_memory_mib'] / 1024:.1f} GiB"} if "gpu_memory_mib" in means else {}
        return {"loss": f"{means['loss']:.4f}", "images/s": f"{means['images_per_second']:.3g}", **held}

    def add_images(self, name: str, images: numpy.ndarray, step: int) -> None:
        """Samples, uint8 [N, H, W, 3], for the trackers in which diffusers' examples show theirs; to be called on rank 0."""
        for tracker in self._accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.log_images({name: images}, step=step, dataformats="NHWC")
            elif tracker.name == "wandb":
                tracker.log_images({name: list(images)}, step=step)
