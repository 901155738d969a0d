"""Fine-tunes a Stable Diffusion checkpoint, all of its U-Net or low-rank adapters, with noise coupling and asymmetric timesteps.

Takes every flag of diffusers' train_text_to_image.py and, with --use_lora, of its train_text_to_image_lora.py:

    accelerate launch finetune_sd.py --pretrained_model_name_or_path stabilityai/stable-diffusion-2-1 --dataset_name DATA \\
      --output_dir runs/tuned
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from immiscible.commands import called_as
from immiscible.commands.train_text_to_image import train_text_to_image
from immiscible.configs import TextToImageConfig
from immiscible.errors import UserError, run_script
from immiscible.flags import parse_config


def main(argv: Sequence[str]) -> None:
    config = parse_config(TextToImageConfig, argv, program=called_as("finetune_sd.py"), description=__doc__ or "")
    if config.model_preset:
        raise UserError(f"--model_preset {config.model_preset} begins with random weights; use train_text_to_image.py")
    train_text_to_image(config, from_scratch=False)


if __name__ == "__main__":
    sys.exit(run_script(main))
