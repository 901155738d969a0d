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
import re
import sys
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from types import UnionType
from typing import Any, NoReturn, TypeVar, get_args, get_origin, get_type_hints

import yaml

from immiscible.errors import UserError

PACKAGE = Path(__file__).parent
SPELLINGS = {"true": True, "t": True, "yes": True, "y": True, "1": True, "false": False, "f": False, "no": False, "n": False, "0": False}
HELP_WIDTH = 140  # of --help, in characters


def flag(default: Any, text: str, **options: Any) -> Any:
    """A field whose name is the flag's.

    Args:
        default: of the flag; a list is copied for each configuration.
        text: what ``--help`` says.
        **options: ``choices``, the values that are taken; ``saved=False`` keeps the value out of the run's config.
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


class _TextLoader(yaml.BaseLoader):
    """Keeps `no` and `1e-4` as they are written; an unquoted null is an empty value, which means not given."""


_TextLoader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"(?:~|null|Null|NULL)$"), list("~nN"))
_TextLoader.add_constructor("tag:yaml.org,2002:null", lambda loader, node: "")


class _Help(argparse.RawDescriptionHelpFormatter):
    """Each flag in one spelling, with its choices or kind and its default, in few lines; the script's own lines as they are."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32, width=HELP_WIDTH)


class Parser(argparse.ArgumentParser):
    """argparse that raises, so that the caller can say which file an error is in, and one line can say it."""

    def error(self, message: str) -> NoReturn:
        """See `argparse.ArgumentParser.error`.

        Raises:
            UserError: always.
        """
        unknown = re.findall(r"--[\w-]+", message) if message.startswith("unrecognized arguments") else []
        for word in unknown[:1]:
            near = difflib.get_close_matches(word.replace("-", "_").replace("__", "--", 1), self._option_string_actions, n=1, cutoff=0.8)
            message += f"; did you mean {near[0]}?" if near and word not in self._option_string_actions else ""
        raise UserError(message)

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
    choices = item.metadata.get("choices")
    text, shown = item.metadata["help"].replace("%", "%%"), " ".join(map(str, default)) if several and default else default
    names = [f"--{item.name}", *([f"--{item.name.replace('_', '-')}"] if "_" in item.name else [])]
    options: dict[str, Any] = {"default": default, "dest": item.name}
    if kind is bool:
        options |= {"type": _boolean, "nargs": "?", "const": True, "metavar": "BOOL"}
        text += " (default: on; --no_" + item.name + " is off)" if default else ""
    else:
        options |= {"type": kind, "choices": choices, **({"nargs": "+"} if several else {})}
        options["metavar"] = "{" + ",".join(choices) + "}" if choices else {int: "N", float: "X"}.get(kind, "TEXT")
        text += "" if default is None else f" (default: {str(shown).replace('%', '%%')})"
    shortest, *others = names
    group.add_argument(shortest, help=text, **options)
    for name in others:
        _hidden(group, name, shortest)
    if kind is bool and default:
        group.add_argument(f"--no_{item.name}", dest=item.name, action="store_false", default=default, help=argparse.SUPPRESS)
        _hidden(group, f"--no-{item.name.replace('_', '-')}", f"--no_{item.name}")


def _hidden(group: Any, name: str, of: str) -> None:
    """Another spelling of a flag, which ``--help`` leaves out."""
    group._option_string_actions[name] = group._option_string_actions[of]


def _kind(hint: Any) -> tuple[Any, bool]:
    """The type of one value, and whether there may be several."""
    if get_origin(hint) is UnionType or type(None) in get_args(hint):
        (hint,) = (part for part in get_args(hint) if part is not type(None))
    return (get_args(hint)[0], True) if get_origin(hint) is list else (hint, False)


def _boolean(text: str) -> bool:
    if text.lower() not in SPELLINGS:
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return SPELLINGS[text.lower()]


def parse_config(
    config_class: type[Config], argv: Sequence[str], *, program: str, description: str, no_data_config: Path | None = None
) -> Config:
    """Reads ``argv`` and the ``--config`` files it names into a ``config_class``.

    Args:
        config_class: a dataclass made of argument groups (its bases). Its ``settle(values)`` may change what was given before it is built,
            and its ``check()``, which comes after that of each group, finds what contradicts what.
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
    parser.add_flags(config_class)
    parser.add_argument(
        "--config", nargs="+", default=[], metavar="FILE", help="YAML files of flags, applied left to right before the command line"
    )
    paths = [Path(path) for path in parser.parse_args(argv).config]
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


@dataclass
class Bounds:
    """The least values of flags, for the ``check`` of a group.

    Args:
        at_least_one: flags that are numbers of at least 1.
        not_negative: of at least 0.
        positive: above 0.
        shares: at least 0 and below 1.
    """

    at_least_one: str = ""
    not_negative: str = ""
    positive: str = ""
    shares: str = ""

    def check(self, config: Any) -> None:
        """Looks at those that are given.

        Raises:
            UserError: one is out of range.
        """
        for names, is_right, what in (
            (self.at_least_one, lambda value: value >= 1, "at least 1"),
            (self.not_negative, lambda value: value >= 0, "at least 0"),
            (self.positive, lambda value: value > 0, "above 0"),
            (self.shares, lambda value: 0 <= value < 1, "at least 0 and below 1"),
        ):
            for name in names.split():
                value = getattr(config, name)
                if value is not None and not is_right(value):
                    raise UserError(f"--{name} must be {what}, not {value}")


def flag_value(argv: Sequence[str], name: str) -> str | None:
    """One flag's value on a command line, or in the ``--config`` files it names, whose other flags are not looked at."""
    parser = Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", nargs="+", default=[])
    parser.add_argument(f"--{name}")
    paths = parser.parse_known_args(argv)[0].config
    words = [word for path in paths for word in _file_words(Path(path))]
    value: str | None = getattr(parser.parse_known_args([*words, *argv])[0], name)
    return value


def given(config: Any, group: type) -> dict[str, Any]:
    """The values of one argument group, without those that are not given, for functions that have a default of their own."""
    values = {item.name: getattr(config, item.name) for item in fields(group)}
    return {name: value for name, value in values.items() if value is not None}


def save_config(config: Any, path: Path) -> None:
    """Writes every flag's value; a run restarts from the file by ``--config``. A flag that is not given has an empty value."""
    values = {item.name: getattr(config, item.name) if item.metadata.get("saved", True) else item.default for item in fields(config)}
    lines = yaml.safe_dump(values, sort_keys=False).replace(": null\n", ":\n")
    path.write_text(f"# Every flag of this run; restart it with --config {path.name} --output_dir ANOTHER_FOLDER\n{lines}")


def _file_arguments(path: Path, parser: Parser) -> list[str]:
    """The file's keys as ``--key value`` words, checked by parsing them alone."""
    words = _file_words(path)
    try:
        parser.parse_args(words)
    except UserError as error:
        raise UserError(f"--config {path}: {error}") from None
    return words


def _file_words(path: Path) -> list[str]:
    """The file's keys as ``--key value`` words."""
    try:
        content = yaml.load(path.read_text(), Loader=_TextLoader)
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise UserError(f"--config {path}: not a text file") from None
    except yaml.YAMLError as error:
        raise UserError(f"--config {path}: not valid YAML: {error}") from None
    if content is None or content == "":
        return []
    if not isinstance(content, dict):
        raise UserError(f"--config {path}: expected lines of `flag: value`")
    words: list[str] = []
    for key, value in content.items():
        if isinstance(value, dict):
            raise UserError(f"--config {path}: {key} holds a mapping; flags are flat, one `flag: value` a line")
        if value != "":
            words += [f"--{key}", *value] if isinstance(value, list) else [f"--{key}={value}"]  # "=": values like -1e-3 are no flags
    if "config" in content:
        raise UserError(f"--config {path}: a config file cannot name further config files; give them all on the command line")
    if {"help", "h"} & content.keys():
        raise UserError(f"--config {path}: help belongs on the command line")
    return words
