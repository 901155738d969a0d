"""Named choices: the keys of a dict of constructors are what the command line accepts."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from immiscible.errors import UserError

Built = TypeVar("Built")


def build_choice(table: Mapping[str, Callable[..., Built]], call: str, name: str, *args: Any, **options: Any) -> Built:
    """Calls ``table[name](*args, **options)``.

    Args:
        table: constructors by name.
        call: the public function that was called, for messages.
        name: the entry.
        *args: what every entry takes first.
        **options: the entry's own options.

    Raises:
        UserError: ``name`` is not in the table, or its constructor has no such option; the message lists what there is.
    """
    if name not in table:
        raise UserError(f"{call}({name!r}) is unknown; known: {', '.join(table)}")
    known = option_names(table[name], len(args))
    unknown = [option for option in options if option not in known]
    if unknown:
        has = f"its options are {', '.join(known)}" if known else "it has none"
        raise UserError(f"{call}({name!r}) has no option {' and no option '.join(unknown)}; {has}")
    return table[name](*args, **options)


def option_names(constructor: Callable[..., Any], positional: int = 0) -> tuple[str, ...]:
    """What an entry can be told by name beyond its first ``positional`` parameters: its signature alone declares it."""
    return tuple(inspect.signature(constructor).parameters)[positional:]


def used_options(constructor: Callable[..., Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a flat set of ``options``, such as all flags of a script, that ``constructor`` has a parameter for."""
    known = option_names(constructor)
    return {name: value for name, value in options.items() if name in known}
