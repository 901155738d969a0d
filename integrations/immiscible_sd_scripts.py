"""Noise coupling in kohya's sd-scripts (read at 48d368f): see README.md beside this file.

SD 1.x, 2.x and SDXL get noise, noisy latents and timesteps from one function, which draws. Flux, SD3, Lumina, Anima and HunyuanImage draw
first and hand latents and noise to a function of their family, in which the noise is paired where it lies, before it is added.
"""

from __future__ import annotations

import inspect
from importlib import import_module
from typing import Any

import immiscible

FLOWS = ("flux_train_utils", "sd3_train_utils", "lumina_train_util")


def install(coupling: immiscible.Coupling) -> None:
    """Pairs every noise of these scripts by ``coupling`` from now on.

    Raises:
        immiscible.UserError: at a step with --ip_noise_gamma, which perturbs what is added inside the function that draws.
    """
    diffusion: Any = import_module("library.train_util")
    draw = diffusion.get_noise_noisy_latents_and_timesteps

    def coupled(args: Any, noise_scheduler: Any, latents: Any) -> Any:
        if args.ip_noise_gamma:
            raise immiscible.UserError("--ip_noise_gamma adds another noise than the one that is learned; leave it out, or the coupling")
        noise, _, timesteps = draw(args, noise_scheduler, latents)
        noise = coupling(latents.to(noise.dtype), noise, timesteps=timesteps)
        noisy = noise_scheduler.add_noise(latents, noise, timesteps)
        noise_scheduler.alphas_cumprod = noise_scheduler.alphas_cumprod.cpu()  # where the function leaves it
        return noise, noisy, timesteps

    diffusion.get_noise_noisy_latents_and_timesteps = coupled
    for name in FLOWS:
        _pair_given(import_module(f"library.{name}"), "get_noisy_model_input_and_timesteps", coupling)


def _pair_given(module: Any, name: str, coupling: immiscible.Coupling) -> None:
    """Replaces a function that is given ``latents`` and their fresh ``noise``: the noise's values are paired first, for its caller too."""
    add = getattr(module, name)
    signature = inspect.signature(add)

    def paired(*args: Any, **options: Any) -> Any:
        given = signature.bind(*args, **options).arguments
        latents, noise = given["latents"], given["noise"]
        noise.copy_(coupling(latents.to(noise.dtype), noise))
        return add(*args, **options)

    setattr(module, name, paired)
