#!/usr/bin/env python
"""Samples a trained model into a folder: immiscible/commands/sample.py."""

import sys

from immiscible.commands.sample import main
from immiscible.errors import run_script

if __name__ == "__main__":
    sys.exit(run_script(main))
