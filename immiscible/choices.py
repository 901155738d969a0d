"""Named choices: the keys of a dict of constructors are what the command line accepts."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from immiscible.errors import UserError

Built = TypeVar("Built")


def build_choice(table: Mapping[str, Callable[..., Built]], flag: str, name: str, *args: Any, **options: Any) -> Built:
    """Calls ``table[name](*args, ...)`` with those of ``options`` that this constructor has a parameter for.

    One flat set of options serves every entry of a table, and an entry declares what it uses by its signature alone.

    Raises:
        UserError: ``name`` is not in the table; the message lists what is.
    """
    if name not in table:
        raise UserError(f"{flag} {name!r} is unknown; known: {', '.join(table)}")
    parameters = inspect.signature(table[name]).parameters
    return table[name](*args, **{key: value for key, value in options.items() if key in parameters})
