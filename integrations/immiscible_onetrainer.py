"""Noise coupling in OneTrainer (read at 23df383): see README.md beside this file.

Every model draws by `ModelSetupNoiseMixin._create_noise`. Offset and perturbation noise are added there to what was drawn; they stay with
their image, whose offset may depend on its timestep.
"""

from __future__ import annotations

from importlib import import_module
from types import SimpleNamespace
from typing import Any

import torch

import immiscible


def install(coupling: immiscible.Coupling) -> None:
    """Pairs every noise by ``coupling`` from now on; validation's too."""
    mixin: Any = import_module("modules.modelSetup.mixin.ModelSetupNoiseMixin").ModelSetupNoiseMixin
    create = mixin._create_noise

    def coupled(self: Any, source_tensor: Any, config: Any, generator: Any, timestep: Any = None, betas: Any = None) -> Any:
        again = torch.Generator(generator.device)
        again.set_state(generator.get_state())
        plain = SimpleNamespace(train_device=config.train_device, offset_noise_weight=0, perturbation_noise_weight=0)
        drawn = create(self, source_tensor, plain, again)  # as will be drawn now, without what is added to it
        noise = create(self, source_tensor, config, generator, timestep, betas)
        paired = coupling(source_tensor.to(drawn), drawn, timesteps=timestep)
        return paired if torch.equal(noise, drawn) else noise + (paired - drawn)

    mixin._create_noise = coupled
