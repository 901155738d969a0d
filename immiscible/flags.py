"""Flags: flat dataclasses whose field names are the flag names, ``--config`` files on top, one resolved file per run.

Flags that the diffusers example scripts have keep their name, meaning and default. A ``--config a.yaml b.yaml`` puts ``--key value``
for each key before the command line, so that files apply from left to right and the command line wins. Each file is checked alone
first: a misspelt key, a wrong choice or a wrong type is an error that names the file.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import field, fields
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml
from transformers.hf_argparser import HfArgumentParser

from immiscible.configs import UnconditionalConfig, _validate
from immiscible.errors import UserError


def flag(default: Any, text: str, **options: Any) -> Any:
    """A field whose name is the flag's."""
    return field(default=default, metadata={"help": text.replace("%", "%%"), **options})


Config = TypeVar("Config", bound=UnconditionalConfig)


class _TextLoader(yaml.BaseLoader):
    """Keeps `no` and `1e-4` as they are written; an unquoted null is an empty value, which means not given."""


_TextLoader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"(?:~|null|Null|NULL)$"), list("~nN"))


_TextLoader.add_constructor("tag:yaml.org,2002:null", lambda loader, node: "")


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults beside the flags, and the script's own lines as they are."""


class _Parser(HfArgumentParser):
    """argparse that raises, so that the caller can say which file an error is in."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def parse_config(
    config_class: type[Config], argv: Sequence[str], *, program: str, description: str, no_data_config: Path | None = None
) -> Config:
    """Reads ``argv`` and the ``--config`` files it names into a ``config_class``.

    Args:
        config_class: a dataclass made of argument groups (its dataclass bases).
        argv: the command line without the program.
        program: the script's name, for ``--help``.
        description: what the script does, for ``--help``.
        no_data_config: a config file that stands first when neither files nor command line name any data.

    Raises:
        UserError: anything wrong with a flag or a file.
    """
    groups = [base for base in reversed(config_class.__mro__) if base.__name__.endswith("Arguments")]
    usage = f"{program} [--config FILE ...] [--flag value ...]"
    parser = _Parser(groups, prog=program, usage=usage, description=description, allow_abbrev=False, formatter_class=_Help)
    for action in parser._actions:
        if action.option_strings and action.option_strings[0].startswith("--no_"):
            action.help = f"switches --{action.dest} off"
    parser.add_argument(
        "--config", nargs="+", default=[], metavar="FILE", help="YAML files of flags, applied left to right before the command line"
    )
    paths = [Path(path) for path in parser.parse_args(argv).config]
    arguments = [word for path in paths for word in _file_arguments(path, parser)]
    namespace = vars(parser.parse_args([*arguments, *argv]))
    if no_data_config and not any(namespace[name] for name in ("dataset_name", "train_data_dir", "bundled_data")):
        namespace = vars(parser.parse_args([*_file_arguments(no_data_config, parser), *arguments, *argv]))
    namespace.pop("config")
    config_class.settle(namespace)
    config = config_class(**namespace)
    _validate(config)
    return config


def flag_value(argv: Sequence[str], name: str) -> str | None:
    """One flag's value on a command line, or in the ``--config`` files it names, whose other flags are not looked at."""
    parser = _Parser([], add_help=False, allow_abbrev=False)
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
    values = {item.name: getattr(config, item.name) for item in fields(config)}
    values["hub_token"] = None  # a secret stays out of files
    values |= {"overwrite_output_dir": False, "resume_from_checkpoint": None}  # a restart deletes nothing and continues nothing
    lines = yaml.safe_dump(values, sort_keys=False).replace(": null\n", ":\n")
    path.write_text(f"# Every flag of this run; restart it with --config {path.name} --output_dir ANOTHER_FOLDER\n{lines}")


def _file_arguments(path: Path, parser: _Parser) -> list[str]:
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
