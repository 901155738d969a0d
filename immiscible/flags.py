"""Flags: flat dataclasses whose field names are the flag names, ``--config`` files on top, one resolved file per run.

Flags that the diffusers example scripts have keep their name, meaning and default. A ``--config a.yaml b.yaml`` puts ``--key value``
for each key before the command line, so that files apply from left to right and the command line wins. Each file is checked alone
first: a misspelt key, a wrong choice or a wrong type is an error that names the file.

This module knows no flag by name. A configuration is a dataclass made of argument groups, its bases with an ``_argument_group_name``;
each stands in the wing that it is about. Nothing here imports torch, so that ``--help`` and usage errors come at once; argparse itself
does the work, since `transformers.HfArgumentParser`, which does the same, takes a second to import.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import math
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from functools import cached_property, partial
from pathlib import Path
from types import UnionType
from typing import Any, NoReturn, TypeVar, get_args, get_origin, get_type_hints

from immiscible.config_files import file_words, find_file
from immiscible.errors import UserError, short

PACKAGE = Path(__file__).parent
SPELLINGS = {"true": True, "t": True, "yes": True, "y": True, "1": True, "false": False, "f": False, "no": False, "n": False, "0": False}
HELP_WIDTH = 140  # of --help, in characters
MOST = 2**31 - 1  # of a whole number whose flag does not say otherwise
LONGEST_NAME, LONGEST_TEXT = 255, 4096  # bytes of a name in a path, and of a path, that file systems take


@dataclass(frozen=True)
class Range:
    """Which numbers a flag takes: finite ones between two ends; ``least`` and ``most`` belong to it, ``above`` and ``below`` not."""

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None

    def problem(self, value: float) -> str | None:
        """What a number must be that ``value`` is not, as in "must be at least 1, not 0"; None if it is right."""
        if not math.isfinite(value):
            return f"must be finite, not {value}"
        most = MOST if isinstance(value, int) and self.most is None and self.below is None else self.most
        ends = (
            ("at least", self.least, self.least is None or value >= self.least),
            ("above", self.above, self.above is None or value > self.above),
            ("at most", most, most is None or value <= most),
            ("below", self.below, self.below is None or value < self.below),
        )
        missed = [f"{words} {end}" for words, end, is_right in ends if not is_right]
        return f"must be {str(self) or missed[0]}, not {value if abs(value) < 1e30 else f'{value:g}'}" if missed else None

    def __str__(self) -> str:
        """Both ends of a range no wider than 1, else nothing: the far end of others is only what nobody can mean."""
        low, high = (self.above if self.least is None else self.least), (self.below if self.most is None else self.most)
        if low is None or high is None or high - low > 1:
            return ""
        if self.least is not None and self.most is not None:
            return f"from {low} to {high}"
        return f"{'above' if self.least is None else 'at least'} {low} and {'below' if self.most is None else 'at most'} {high}"


def flag(default: Any, text: str, **options: Any) -> Any:
    """A field whose name is the flag's.

    Args:
        default: of the flag; a list is copied for each configuration.
        text: what ``--help`` says.
        **options: ``choices``, the values that are taken; ``least``, ``above``, ``most`` and ``below``, the `Range` of a number; ``word``,
            a text that stands for a number; ``prose=True`` for a text that may be anything, also empty; ``saved=False`` keeps the value
            out of the run's config; ``alias``, another name that command lines and files may use.
    """
    metadata = {"help": text, **options}
    return (
        field(default_factory=lambda: list(default), metadata=metadata)
        if isinstance(default, list)
        else field(default=default, metadata=metadata)
    )


class Names(Sequence[str]):
    """The names in a table of this package, a dict's keys or a tuple's strings, without importing what the table needs.

    Where the module is imported they are what the table holds, with what a user has added; else they are read from its source.

    Args:
        module: such as ``immiscible.coupling``.
        table: such as ``COUPLINGS``.
    """

    def __init__(self, module: str, table: str) -> None:
        self._module, self._table = module, table

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: Any) -> Any:
        return self._names[index]

    @property
    def _names(self) -> tuple[str, ...]:
        loaded = getattr(sys.modules.get(self._module), self._table, None)
        return self._written if loaded is None else tuple(loaded)

    @cached_property
    def _written(self) -> tuple[str, ...]:
        path = PACKAGE.joinpath(*self._module.split(".")[1:]).with_suffix(".py")
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
            if any(isinstance(target, ast.Name) and target.id == self._table for target in targets):
                value: Any = node.value  # type: ignore[attr-defined]
                return tuple(map(ast.literal_eval, value.keys if isinstance(value, ast.Dict) else value.elts))
        raise LookupError(f"{path} has no table {self._table}")


Config = TypeVar("Config")


class _Help(argparse.RawDescriptionHelpFormatter):
    """Each flag in one spelling, with its choices or kind and its default, in few lines; the script's own lines as they are."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32, width=HELP_WIDTH)


class Parser(argparse.ArgumentParser):
    """argparse that raises, so that the caller can say which file an error is in, and one line can say it."""

    foreign: Mapping[str, str] = {}  # flags that others' scripts have and these have not -> what takes their place

    def error(self, message: str) -> NoReturn:
        """See `argparse.ArgumentParser.error`.

        Raises:
            UserError: always.
        """
        unknown = re.findall(r"--[\w-]+", message) if message.startswith("unrecognized arguments") else []
        for word in unknown[:1]:
            if there := self.foreign.get(word.removeprefix("--").replace("-", "_")):
                raise UserError(f"{word} is not a flag here: {there}")
            near = difflib.get_close_matches(word.replace("-", "_").replace("__", "--", 1), self._option_string_actions, n=1, cutoff=0.8)
            message += f"; did you mean {near[0]}?" if near and word not in self._option_string_actions else ""
        message = re.sub(r"(\S{60})\S{200,}", r"\1...", message)
        raise UserError(re.sub(r"^argument (--\w+): must ", r"\1 must ", message))

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """See `argparse.ArgumentParser`, which takes ``--flag=--`` for a flag without a value and gives it its default.

        Raises:
            UserError: there is such a word.
        """
        for word in sys.argv[1:] if args is None else args:
            if re.fullmatch(r"--[\w-]+=--", word):
                raise UserError(f"{word.partition('=')[0]} must have a value, not --")
        return super().parse_known_args(args, namespace)

    def add_flags(self, config_class: type) -> None:
        """Adds the flags of a configuration, group by group."""
        hints = get_type_hints(config_class)
        for group in argument_groups(config_class):
            shown = self.add_argument_group(getattr(group, "_argument_group_name"))  # noqa: B009
            for item in fields(group):
                own = next(each for each in fields(config_class) if each.name == item.name)
                _add(shown, own, hints[own.name])


def argument_groups(config_class: type) -> list[type]:
    """The groups of a configuration, last base first: the order in which ``--help`` and a saved file show them."""
    found: list[type] = []
    for base in reversed(config_class.__bases__):
        found += [base] if "_argument_group_name" in vars(base) else argument_groups(base)
    return list(dict.fromkeys(found))


def _add(group: Any, item: Any, hint: Any) -> None:
    kind, several = _kind(hint)
    default = item.default if item.default is not MISSING else item.default_factory()
    choices, alias = item.metadata.get("choices"), item.metadata.get("alias")
    text, shown = item.metadata["help"].replace("%", "%%"), " ".join(map(str, default)) if several and default else default
    options: dict[str, Any] = {"default": default, "dest": item.name}
    if kind is bool:
        options |= {"type": _boolean, "nargs": "?", "const": True, "metavar": "BOOL"}
        text += " (default: on; --no_" + item.name + " is off)" if default else ""
    else:
        allowed = range_of(item)
        reading = (
            prose if item.metadata.get("prose") else plain_text if kind is str else number(kind, item.metadata.get("word"), **vars(allowed))
        )
        options |= {"type": reading, "choices": choices, **({"nargs": "+"} if several else {})}
        options["metavar"] = "{" + ",".join(choices) + "}" if choices else {int: "N", float: "X"}.get(kind, "TEXT")
        options["metavar"] += f"|{item.metadata['word']}" if "word" in item.metadata else ""
        notes = ([] if default is None else [f"default: {str(shown).replace('%', '%%')}"]) + ([str(allowed)] if str(allowed) else [])
        notes += [f"also --{alias}"] if alias else []
        text += f" ({'; '.join(notes)})" if notes else ""
    for name, says in ((item.name, text), (alias, argparse.SUPPRESS)):  # an alias is an action of its own: errors name what was written
        if name:
            group.add_argument(f"--{name}", help=says, **options)
            _hidden(group, f"--{name.replace('_', '-')}", f"--{name}")
    if kind is bool and default:
        group.add_argument(f"--no_{item.name}", dest=item.name, action="store_false", default=default, help=argparse.SUPPRESS)
        _hidden(group, f"--no-{item.name.replace('_', '-')}", f"--no_{item.name}")


def _hidden(group: Any, name: str, of: str) -> None:
    """Another spelling of a flag, which ``--help`` leaves out."""
    group._option_string_actions[name] = group._option_string_actions[of]


def _kind(hint: Any) -> tuple[Any, bool]:
    """The type of one value, and whether there may be several."""
    if get_origin(hint) is UnionType or type(None) in get_args(hint):
        hint = next(part for part in get_args(hint) if part is not type(None))  # of a number or a word: the number
    return (get_args(hint)[0], True) if get_origin(hint) is list else (hint, False)


def _boolean(text: str) -> bool:
    if text.lower() not in SPELLINGS:
        raise argparse.ArgumentTypeError(f"{short(text)!r} is neither true nor false")
    return SPELLINGS[text.lower()]


def number(kind: type[int] | type[float], word: str | None = None, **ends: Any) -> Callable[[str], Any]:
    """What reads a number, or the ``word`` that may stand for one, for argparse; ``ends`` are those of a `Range`."""
    return partial(_read_number, kind, word, Range(**ends))


def _read_number(kind: type[int] | type[float], word: str | None, allowed: Range, text: str) -> int | float | str:
    if text == word:
        return text
    try:
        value = kind(text)
    except ValueError:
        if word:
            number = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"must be {number} or {word}, not {short(text)!r}") from None
        raise argparse.ArgumentTypeError(f"invalid {kind.__name__} value: {short(text)!r}") from None
    if problem := allowed.problem(value):
        raise argparse.ArgumentTypeError(problem)
    return value


def prose(text: str) -> str:
    """What reads a text for argparse: anything that is one, which bytes of another encoding on the command line are not."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"must be text in UTF-8, not {short(text)!a}") from None
    return text


def plain_text(text: str) -> str:
    """What reads a name or a path for argparse: not empty, as an unset variable of a shell is, and something that file systems take.

    ``~/`` is the user's folder, as shells have it, who do not read config files and leave ``--flag=~/folder`` as it is.
    """
    if text == "~" or text.startswith("~/"):
        text = os.path.expanduser(text)
    encoded = prose(text).encode()
    if not text.strip():
        raise argparse.ArgumentTypeError("must not be empty; give a value, or leave the flag out")
    if b"\0" in encoded:
        raise argparse.ArgumentTypeError(f"must not hold a NUL character, as {short(text)!r} does")
    if len(encoded) > LONGEST_TEXT or max(map(len, encoded.split(b"/"))) > LONGEST_NAME:
        raise argparse.ArgumentTypeError(f"must not hold a name of more than {LONGEST_NAME} bytes, as {short(text)!r} does")
    return text


def text_path(text: str) -> Path:
    """`plain_text` as a path."""
    return Path(plain_text(text))


def range_of(item: Any) -> Range:
    """Of a field that is a flag."""
    return Range(**{name: item.metadata[name] for name in ("least", "above", "most", "below") if name in item.metadata})


def check_ranges(arguments: Any) -> None:
    """The rule of `number` for a dataclass of flags that nobody has parsed.

    Raises:
        UserError: a number is out of range.
    """
    for item in fields(arguments):
        value = getattr(arguments, item.name)
        if isinstance(value, int | float) and not isinstance(value, bool) and (problem := range_of(item).problem(value)):
            raise UserError(f"--{item.name} {problem}")
        if isinstance(value, str) and item.metadata.get("word", value) != value:
            raise UserError(f"--{item.name} must be a number or {item.metadata['word']}, not {short(value)!r}")


def parse_config(
    config_class: type[Config], argv: Sequence[str], *, program: str, description: str, no_data_config: Path | None = None
) -> Config:
    """Reads ``argv`` and the ``--config`` files it names into a ``config_class``.

    Args:
        config_class: a dataclass made of argument groups (its bases). Its ``settle(values)`` may change what was given before it is built,
            and its ``check()``, which comes after that of each group, finds what contradicts what. Its ``foreign`` says of flags that it
            has not what takes their place.
        argv: the command line without the program.
        program: the script's name, for ``--help``.
        description: what the script does, for ``--help``.
        no_data_config: a config file that stands first when neither files nor command line give any of the flags in the class's
            ``names_data``.

    Raises:
        UserError: anything wrong with a flag or a file.
    """
    usage = f"{program} [--config FILE ...] [--flag value ...]"
    parser = Parser(prog=program, usage=usage, description=description, allow_abbrev=False, formatter_class=_Help)
    parser.foreign = getattr(config_class, "foreign", {})
    parser.add_flags(config_class)
    parser.add_argument(
        "--config",
        nargs="+",
        type=plain_text,
        default=[],
        metavar="FILE",
        help="YAML files of flags, applied left to right before the command line; those that come with the package are found from anywhere",
    )
    paths = [find_file(Path(path)) for path in parser.parse_args(argv).config]
    arguments = [word for path in paths for word in _file_arguments(path, parser)]
    namespace = vars(parser.parse_args([*arguments, *argv]))
    if no_data_config and not any(namespace[name] for name in config_class.names_data):  # type: ignore[attr-defined]
        namespace = vars(parser.parse_args([*_file_arguments(no_data_config, parser), *arguments, *argv]))
    namespace.pop("config")
    config: Any = config_class
    config.settle(namespace)
    config = config_class(**namespace)
    for group in argument_groups(config_class):
        group.check(config)  # type: ignore[attr-defined]
    config.check()
    return config


def defaults_of(config_class: type) -> dict[str, Any]:
    """The defaults of all flags of a configuration, by name."""
    blank = config_class()
    return {item.name: getattr(blank, item.name) for item in fields(blank)}


def flag_value(argv: Sequence[str], name: str) -> str | None:
    """One flag's value on a command line, or in the ``--config`` files it names, whose other flags are not looked at."""
    parser = Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", nargs="+", default=[])
    parser.add_argument(f"--{name}")
    paths = parser.parse_known_args(argv)[0].config
    words = [word for path in paths for word in file_words(find_file(Path(path)))]
    value: str | None = getattr(parser.parse_known_args([*words, *argv])[0], name)
    return value


def given(config: Any, group: type) -> dict[str, Any]:
    """The values of one argument group, without those that are not given, for functions that have a default of their own."""
    values = {item.name: getattr(config, item.name) for item in fields(group)}
    return {name: value for name, value in values.items() if value is not None}


def _file_arguments(path: Path, parser: Parser) -> list[str]:
    """The file's keys as ``--key value`` words, checked by parsing them alone."""
    words = file_words(path)
    try:
        parser.parse_args(words)
    except UserError as error:
        raise UserError(f"--config {path}: {error}") from None
    written: dict[str, str] = {}
    for word in words:
        name = word.partition("=")[0]
        if name.startswith("--"):
            flag = parser._option_string_actions[name].dest
            if flag in written:
                raise UserError(f"--config {path}: {written[flag]} and {name} are one flag; leave one of them")
            written[flag] = name
    return words
