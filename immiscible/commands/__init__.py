"""What is called from a shell: by the scripts of a checkout, as `python -m immiscible.commands.NAME`, or by the commands that pip makes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from immiscible.errors import UserError, run_script

OF_THE_EXTRA = ("yaml", "accelerate", "diffusers")  # what pip installs with immiscible[scripts] and not with immiscible alone


def _command(module: str) -> Callable[[], int]:
    """What pip's command of a module here runs; its exit code is the command's."""

    def run() -> int:
        def main(argv: Sequence[str]) -> None:
            if missing := [name for name in OF_THE_EXTRA if find_spec(name) is None]:
                raise UserError(
                    f"{', '.join(missing)} not found; the commands need more than the library: pip install 'immiscible[scripts]'"
                )
            import_module(f"{__name__}.{module}").main(argv)

        return run_script(main)

    return run


run_train_unconditional = _command("train_unconditional")
run_train_text_to_image = _command("train_text_to_image")
run_finetune_sd = _command("finetune_sd")
run_sample = _command("sample")
run_compare = _command("compare")
run_evaluate = _command("evaluate")


def called_as(script: str) -> str:
    """The program's name for a user: the installed command's where it was started by one, else the script's path in a checkout."""
    name = Path(sys.argv[0]).stem
    return name if name.startswith("immiscible-") else script
