#!/usr/bin/env python
"""Trains an unconditional diffusion model with noise coupling and asymmetric timesteps: immiscible/commands/train_unconditional.py."""

import sys

from immiscible.commands.train_unconditional import main
from immiscible.errors import run_script

if __name__ == "__main__":
    sys.exit(run_script(main))
