"""Noise coupling in musubi-tuner (read at 30c658c): see README.md beside this file.

Every script that trains a LoRA draws in `NetworkTrainer.train` and hands latents and noise to `process_batch`. Latents of videos are
[B, C, F, H, W], which is as good as any other shape.
"""

from __future__ import annotations

import inspect
from importlib import import_module
from typing import Any

import immiscible


def install(coupling: immiscible.Coupling) -> None:
    """Pairs every noise of these scripts by ``coupling`` from now on."""
    trainer: Any = import_module("musubi_tuner.training.trainer_base").NetworkTrainer
    process_batch = trainer.process_batch
    signature = inspect.signature(process_batch)

    def coupled(*args: Any, **options: Any) -> Any:
        given = signature.bind(*args, **options)
        latents, noise = given.arguments["latents"], given.arguments["noise"]
        given.arguments["noise"] = coupling(latents.to(noise.dtype), noise)
        return process_batch(*given.args, **given.kwargs)

    trainer.process_batch = coupled
