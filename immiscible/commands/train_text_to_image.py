"""Trains a Stable Diffusion U-Net from random weights on captions or class names, with noise coupling and asymmetric timesteps.

The checkpoint of --pretrained_model_name_or_path gives VAE, text encoder, tokenizer, scheduler and the U-Net's configuration; to start
from its weights take finetune_sd.py. --model_preset puts a transformer into the U-Net's place. Takes every flag of the diffusers example of
this name:

    accelerate launch train_text_to_image.py --pretrained_model_name_or_path CompVis/stable-diffusion-v1-4 --dataset_name DATA \\
      --prediction_type v_prediction --output_dir runs/scratch
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

from immiscible.commands import called_as
from immiscible.configs import TextToImageConfig
from immiscible.errors import UserError, run_script
from immiscible.flags import parse_config


def main(argv: Sequence[str]) -> None:
    config = parse_config(TextToImageConfig, argv, program=called_as("train_text_to_image.py"), description=__doc__ or "")
    if config.use_lora:
        raise UserError("--use_lora adapts pretrained weights, which this script does not load; use finetune_sd.py")
    train_text_to_image(config, from_scratch=True)


def train_text_to_image(config: TextToImageConfig, *, from_scratch: bool) -> None:
    # After parsing, so that --help and usage errors come at once.
    from immiscible.tasks.text_to_image import text_to_image_task  # images and captions, checkpoint, encoders, objective
    from immiscible.training.run import (
        run,
    )  #                        the life of any run; noise and time are drawn in immiscible/objectives.py
    from immiscible.training.session import session  #                the accelerator, from launch to end

    with session(config) as accelerator:
        task: Any = partial(text_to_image_task, config, accelerator, from_scratch=from_scratch)
        run(config, accelerator, task)


if __name__ == "__main__":
    sys.exit(run_script(main))
