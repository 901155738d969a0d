"""Trains an unconditional diffusion model with noise coupling (Immiscible Diffusion) and asymmetric timesteps (SpeeD).

Takes every flag of the diffusers example of this name. Without flags it trains on the bundled digits; it diffuses pixels, or latents
with --vae_model_name_or_path:

    accelerate launch train_unconditional.py
    accelerate launch train_unconditional.py --train_data_dir photos --prediction_type v_prediction --config configs/methods/immiscible.yaml
    accelerate launch train_unconditional.py --train_data_dir photos --resolution 256 --vae_model_name_or_path stabilityai/sd-vae-ft-mse
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

from immiscible.commands import called_as
from immiscible.config_files import CONFIGS
from immiscible.configs import UnconditionalConfig
from immiscible.errors import run_script
from immiscible.flags import parse_config

DIGITS = CONFIGS / "tasks/digits.yaml"


def main(argv: Sequence[str]) -> None:
    program = called_as("train_unconditional.py")
    config = parse_config(UnconditionalConfig, argv, program=program, description=__doc__ or "", no_data_config=DIGITS)
    train_unconditional(config)


def train_unconditional(config: UnconditionalConfig) -> None:
    # After parsing, so that --help and usage errors come at once.
    from immiscible.tasks.latents import latents_task  #  a frozen VAE's latents: which images, which U-Net, how a batch is encoded
    from immiscible.tasks.pixels import pixels_task  #    the same for pixels
    from immiscible.training.run import run  #            the life of any run; noise and time are drawn in immiscible/objectives.py
    from immiscible.training.session import session  #    the accelerator, from launch to end

    task: Any = latents_task if config.vae_model_name_or_path else pixels_task
    with session(config) as accelerator:
        run(config, accelerator, partial(task, config, accelerator))


if __name__ == "__main__":
    sys.exit(run_script(main))
