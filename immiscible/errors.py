"""The one exception type for a user's mistake, and how a script ends on it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

if TYPE_CHECKING:
    from accelerate import Accelerator


class UserError(ValueError):
    """What is wrong, which flag, file or value, and what would be right: one line, shown without a traceback.

    Args:
        message: the line.
        exit_code: 2 for wrong usage (flags, config files), 1 for a failure met while running (a bad image, a NaN loss).
    """

    def __init__(self, message: str, exit_code: int = 2):
        super().__init__(message)
        self.exit_code = exit_code


def on_every_process(accelerator: Accelerator, work: Callable[[], None]) -> None:
    """Does ``work``, in which no process waits for another; a user's mistake or a failing disk that one meets is raised on every one.

    Raises:
        UserError: what ``work`` raised, or its `OSError` as one line; of several the first rank's.
    """
    from accelerate.utils import gather_object

    failure: tuple[str, int] | None = None
    try:
        work()
    except UserError as error:
        failure = (str(error), error.exit_code)
    except OSError as error:
        failure = (f"cannot write {error.filename or 'the output folder'}: {error.strerror or error}", 1)
    except SafetensorError as error:  # of a full disk too
        failure = (f"cannot write the output folder: {error}", 1)
    met = [each for each in gather_object([failure]) if each]
    if met:
        raise UserError(met[0][0], exit_code=met[0][1])


def run_script(main: Callable[[Sequence[str]], None]) -> int:
    """Runs a script's ``main(argv)`` and returns its exit code; a `UserError` becomes one line on stderr, from rank 0 only."""
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        sys.stderr.write(f"{Path(sys.argv[0]).name}: interrupted\n")
        return 130
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            line = " ".join(str(error).split())
            sys.stderr.write(f"{Path(sys.argv[0]).name}: error: {line}\n")
        return error.exit_code
    return 0
