"""The one exception type for a user's mistake, and how a script ends on it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

SHOWN = 60  # characters of a value in a message


class UserError(ValueError):
    """What is wrong, which flag, file or value, and what would be right: one line, shown without a traceback.

    Args:
        message: the line.
        exit_code: 2 for wrong usage (flags, config files), 1 for a failure met while running (a bad image, a NaN loss).
    """

    def __init__(self, message: str, exit_code: int = 2):
        super().__init__(message)
        self.exit_code = exit_code


class PeerLost(UserError):
    """Another process of a run is gone; said by every one that is left, since it may have been the one that speaks."""

    def __init__(self, message: str):
        super().__init__(message, exit_code=1)


def first_line(error: BaseException) -> str:
    """What an error says, for a line of ours: its first line, with the next one where a colon ends it, or its type if it says nothing."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return " ".join(line.strip() for line in lines[: 1 + lines[0].endswith(":")])


def short(text: str) -> str:
    """A value that somebody gave, for a line of ours: its first characters."""
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def run_script(main: Callable[[Sequence[str]], None]) -> int:
    """Runs a script's ``main(argv)`` and returns its exit code; a `UserError` becomes one line on stderr, from rank 0 only."""
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        sys.stderr.write(f"{Path(sys.argv[0]).name}: interrupted\n")
        return 130
    except UserError as error:
        if isinstance(error, PeerLost) or os.environ.get("RANK", "0") == "0":
            line = " ".join(str(error).split())
            sys.stderr.write(f"{Path(sys.argv[0]).name}: error: {line}\n")
        return error.exit_code
    return 0
