#!/usr/bin/env python
"""Trains a Stable Diffusion U-Net from random weights, or a transformer: immiscible/commands/train_text_to_image.py."""

import sys

from immiscible.commands.train_text_to_image import main
from immiscible.errors import run_script

if __name__ == "__main__":
    sys.exit(run_script(main))
