"""Noise coupling in ai-toolkit (read at 27a03a9): see README.md beside this file.

Every model draws by `BaseSDTrainProcess.get_noise`, whose result is added and learned.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch

import immiscible


def install(coupling: immiscible.Coupling) -> None:
    """Pairs every noise by ``coupling`` from now on.

    Raises:
        immiscible.UserError: at a step whose config already says which noise an image gets.
    """
    process: Any = import_module("jobs.process.BaseSDTrainProcess").BaseSDTrainProcess
    get_noise = process.get_noise

    def coupled(
        self: Any, latents: Any, batch_size: int, dtype: torch.dtype = torch.float32, batch: Any = None, timestep: Any = None
    ) -> Any:
        config = self.train_config
        if config.optimal_noise_pairing_samples > 1 or config.force_consistent_noise:
            raise immiscible.UserError("optimal_noise_pairing_samples and force_consistent_noise choose noises too; leave both out")
        noise = get_noise(self, latents, batch_size, dtype=dtype, batch=batch, timestep=timestep)
        return coupling(latents.to(noise), noise, timesteps=timestep)

    process.get_noise = coupled
