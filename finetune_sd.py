#!/usr/bin/env python
"""Fine-tunes a Stable Diffusion checkpoint, or low-rank adapters of it: immiscible/commands/finetune_sd.py."""

import sys

from immiscible.commands.finetune_sd import main
from immiscible.errors import run_script

if __name__ == "__main__":
    sys.exit(run_script(main))
