"""Runs another trainer's script with a noise coupling, from that trainer's folder; all further words are the script's:

    accelerate launch /path/to/integrations/coupled.py sd_scripts reservoir sdxl_train_network.py --pretrained_model_name_or_path ...

The first word is the trainer, of the files beside this one; the second the coupling, with its options as Python writes them, such as
assignment, nearest:candidates=4, reservoir:size=512.
"""

from __future__ import annotations

import ast
import runpy
import sys
from importlib import import_module
from pathlib import Path

HERE = Path(__file__).resolve().parent


def build(text: str) -> object:
    """The coupling called NAME or NAME:option=value,option=value."""
    import immiscible

    name, _, options = text.partition(":")
    given = dict(part.split("=", 1) for part in options.split(",") if part)
    return immiscible.build_coupling(name, **{key: _value(value) for key, value in given.items()})


def _value(text: str) -> object:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text  # a word


def main(words: list[str]) -> None:
    """``TRAINER COUPLING SCRIPT ...``"""
    if len(words) < 3:
        known = ", ".join(sorted(path.stem.removeprefix("immiscible_") for path in HERE.glob("immiscible_*.py")))
        sys.exit(f"usage: coupled.py TRAINER COUPLING SCRIPT [flags of SCRIPT]; trainers: {known}")
    trainer, coupling, script = words[:3]
    sys.argv, sys.path[:0] = words[2:], [str(Path(script).resolve().parent), str(Path.cwd())]  # the script's imports come first
    import_module(f"immiscible_{trainer}").install(build(coupling))
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
