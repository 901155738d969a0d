"""Config files: YAML with a `flag: value` a line, read as the words of a command line, and written so that a run restarts from one.

What a flag is and takes is told in `immiscible.flags`; here every name and value is a text.
"""

from __future__ import annotations

import os
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from immiscible.errors import UserError, short

LARGEST_FILE = 2**20  # bytes
PACKAGE = Path(__file__).resolve().parent
IN_WHEEL, IN_CHECKOUT = PACKAGE / "recipes", PACKAGE.parent / "configs"
CONFIGS = IN_WHEEL if IN_WHEEL.is_dir() else IN_CHECKOUT  # the files that come with the package, in folders such as `methods`


class _TextLoader(yaml.BaseLoader):
    """Keeps `no` and `1e-4` as they are written; an unquoted null is an empty value, which means not given."""


_TextLoader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"(?:~|null|Null|NULL)$"), list("~nN"))
_TextLoader.add_constructor("tag:yaml.org,2002:null", lambda loader, node: "")


def save_config(config: Any, path: Path) -> None:
    """Writes every flag's value; a run restarts from the file by ``--config``. A flag that is not given has an empty value."""
    values = {item.name: getattr(config, item.name) if item.metadata.get("saved", True) else item.default for item in fields(config)}
    lines = yaml.safe_dump(values, sort_keys=False).replace(": null\n", ":\n")
    path.write_text(f"# Every flag of this run; restart it with --config {path.name} --output_dir ANOTHER_FOLDER\n{lines}")


def find_file(path: Path) -> Path:
    """The path itself, or where nothing is there the file of ours that it names, as `configs/methods/flow.yaml` or `flow.yaml`."""
    if path.is_absolute() or ".." in path.parts or os.path.exists(path):
        return path
    below = path.parts[1:] if path.parts[0] == "configs" else path.parts
    folders = sorted(CONFIGS.iterdir()) if len(path.parts) == 1 else [CONFIGS]
    return next((file for folder in folders if os.path.isfile(file := folder.joinpath(*below))), path)


def file_words(path: Path) -> list[str]:
    """The file's keys as ``--key value`` words."""
    content = _file_content(path)
    if {"config", "help", "h"} & content.keys():
        which = "a config file cannot name further config files; give them all" if "config" in content else "help belongs"
        raise UserError(f"--config {path}: {which} on the command line")
    found: list[str] = []
    for key, value in content.items():
        if isinstance(value, dict):
            raise UserError(f"--config {path}: {short(key)} holds a mapping; flags are flat, one `flag: value` a line")
        if not isinstance(value, list):
            found += [f"--{key}={value}"] if value != "" else []  # "=": values like -1e-3 are no flags
            continue
        for item in value:
            if not isinstance(item, str):
                raise UserError(f"--config {path}: {short(key)} holds a list or a mapping inside a list; its items must be plain values")
            if item.startswith("-") and not _is_number(item):
                raise UserError(
                    f"--config {path}: {short(key)} holds {short(item)!r}, which looks like a flag; a flag has a line of its own"
                )
        found += [f"--{key}", *value]
    return found


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _file_content(path: Path) -> dict[str, Any]:
    """What a config file says: texts, lists and mappings by key.

    Raises:
        UserError: it cannot be read, is too large, is not YAML of `flag: value`, or gives a key twice.
    """
    try:
        with path.open("rb") as file:
            data = file.read(LARGEST_FILE + 1)
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror or error}") from None
    if len(data) > LARGEST_FILE:
        raise UserError(f"--config {path}: larger than {LARGEST_FILE / 2**20:g} MiB, which no file of flags is")
    loader = None
    try:
        loader = _TextLoader(data.decode("utf-8-sig"))
        node = loader.get_single_node()
        lines: dict[str, int] = {}
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else []:
            _check_key(path, key, lines)
        content = loader.construct_document(node) if node else None
    except UnicodeDecodeError:
        raise UserError(f"--config {path}: not a text file in UTF-8") from None
    except yaml.YAMLError as error:
        raise UserError(f"--config {path}: not valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise UserError(f"--config {path}: nested too deeply; flags are flat, one `flag: value` a line") from None
    finally:
        if loader is not None:
            loader.dispose()
    if content is None or content == "":
        return {}
    if not isinstance(content, dict):
        raise UserError(f"--config {path}: expected lines of `flag: value`")
    return content


def _check_key(path: Path, key: Any, lines: dict[str, int]) -> None:
    """Whether a key can be a flag's name and is new; ``lines`` says in which line each was, and gets this one's."""
    line = key.start_mark.line + 1
    if not isinstance(key, yaml.ScalarNode) or not re.fullmatch(r"\w[\w-]*", key.value):
        raise UserError(f"--config {path}: line {line} begins with what is no flag's name; expected lines of `flag: value`")
    name = key.value.replace("-", "_")
    if name in lines:
        raise UserError(f"--config {path}: {key.value} is given twice, in lines {lines[name]} and {line}; leave one of them")
    lines[name] = line
