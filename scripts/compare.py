#!/usr/bin/env python
"""Compares training runs, or trains and compares them: immiscible/commands/compare.py."""

import sys

from immiscible.commands.compare import main
from immiscible.errors import run_script

if __name__ == "__main__":
    sys.exit(run_script(main))
