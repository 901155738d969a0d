#!/usr/bin/env python
"""Scores samples against real images: immiscible/commands/evaluate.py."""

import sys

from immiscible.commands.evaluate import main
from immiscible.errors import run_script

if __name__ == "__main__":
    sys.exit(run_script(main))
