"""Noise coupling in SimpleTuner (read at bc8e6ab): see README.md beside this file.

`ModelFoundation.prepare_batch` draws and puts ``noise`` and ``input_noise`` into the batch. Of a flow it then asks the model for sigmas and
adds the noise; of a diffusion it has added it when it asks for conditions, and it is added again here.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import immiscible


def install(coupling: immiscible.Coupling) -> None:
    """Pairs every noise of models that prepare their batches by ModelFoundation by ``coupling`` from now on.

    Raises:
        immiscible.UserError: at a step with Diff2Flow or DiffusionBlocks, which read the noise before it can be paired.
    """
    common: Any = import_module("simpletuner.helpers.models.common")
    prepare_batch = common.ModelFoundation.prepare_batch

    def pair(batch: Any, timesteps: Any = None) -> None:
        noise = batch["noise"]
        paired = coupling(batch["latents"].to(noise.dtype), noise, timesteps=timesteps)
        batch["input_noise"] = paired if batch["input_noise"] is noise else batch["input_noise"] + (paired - noise)
        batch["noise"] = paired

    def coupled(self: Any, batch: Any, state: Any) -> Any:
        if getattr(self.config, "diff2flow_enabled", False) or self.diffusion_blocks_controller is not None:
            raise immiscible.UserError("Diff2Flow and DiffusionBlocks read the noise before it is paired; leave them out, or the coupling")
        is_flow = self.PREDICTION_TYPE is common.PredictionTypes.FLOW_MATCHING
        hook = "sample_flow_sigmas" if is_flow else "prepare_batch_conditions"
        original = getattr(self, hook)

        def hooked(batch: Any, state: Any) -> Any:
            pair(batch, None if is_flow else batch["timesteps"])
            if not is_flow:
                latents, noise = batch["latents"].float(), batch["input_noise"].float()
                batch["noisy_latents"] = self.noise_schedule.add_noise(latents, noise, batch["timesteps"]).to(batch["noisy_latents"])
            return original(batch=batch, state=state)

        setattr(self, hook, hooked)
        try:
            return prepare_batch(self, batch, state)
        finally:
            delattr(self, hook)

    common.ModelFoundation.prepare_batch = coupled
