"""Tasks, methods and seeds -> the runs of a comparison: which config files, and which of the flags that all arms share."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from immiscible.config_files import CONFIGS, find_file
from immiscible.errors import UserError
from immiscible.flags import Parser
from immiscible.method import MethodArguments, unused_flags
from immiscible.reports.grid import Job


class _MethodFlags(MethodArguments):
    """The flags that say how an arm draws and weighs, for a parser of them alone."""


def plan(
    *,
    task: Sequence[str],
    methods: Sequence[str],
    seeds: Sequence[int],
    script: Sequence[str],
    output_dir: Path,
    shared: Sequence[str],
    guidance_scale: float = 1.0,
) -> tuple[list[Job], list[str]]:
    """The grid, all methods of the first seed first, so that what slows the machine down for a while slows all arms.

    Args:
        task: config files, or names in `CONFIGS`/tasks.
        methods: an arm each: config files or names in `CONFIGS`/methods, put together by "+", after "NAME=" if it has one.
        seeds: each arm is trained once with each.
        script: the training script, as words for the interpreter.
        output_dir: gets a folder for each run.
        shared: further words of every command; an arm goes without those flags of the method that it does not use.
        guidance_scale: at which the runs will be compared.

    Returns:
        the runs, and a line for each flag that some arms go without.

    Raises:
        UserError: a file is missing or cannot be read, an arm is there twice, nothing would be measured, or no arm uses a shared flag.
    """
    task_files = [find_config(text, "tasks") for text in task]
    arms = {name: [*task_files, *paths] for name, paths in _arms(methods).items()}
    words, lines = _shared_out(arms, shared)
    jobs = []
    for seed in seeds:
        for name, files in arms.items():
            if flag_value("eval_steps", files, shared) is None:
                raise UserError("nothing would be measured: set eval_steps in the task's file, or put `-- --eval_steps N` at the end")
            if guidance_scale != 1 and flag_value("eval_guidance_scales", files, shared) is None:
                given = f"--guidance_scale {guidance_scale:g}"
                raise UserError(f"{given} would not be measured: put `-- --eval_guidance_scales 1 {guidance_scale:g}` at the end")
            folder = output_dir / f"{name}-seed{seed}"
            command = [*script, "--config", *map(str, files), "--seed", str(seed), "--output_dir", str(folder)]
            command += ["--resume_from_checkpoint", "latest", *words[name]]
            settings = "\n".join([shlex.join(command), *(path.read_text() for path in files)])
            steps = flag_value("max_train_steps", files, shared)
            log = output_dir / "logs" / f"{folder.name}.log"
            jobs.append(Job(name, folder, log, command, settings, int(steps) if steps and steps.isdigit() else None))
    return jobs, lines


def _arms(methods: Sequence[str]) -> dict[str, list[Path]]:
    arms: dict[str, list[Path]] = {}
    for text in methods:
        name, _, files = text.rpartition("=")
        paths = [find_config(part, "methods") for part in files.split("+")]
        name = name or "+".join(path.stem for path in paths)
        if name in arms or "/" in name:
            raise UserError(f"--methods: {name} {'is there twice' if name in arms else 'is no name of a folder'}; NAME={files} names it")
        arms[name] = paths
    return arms


def find_config(text: str, kind: str) -> Path:
    """A config file by its path, or by its name in `CONFIGS`/``kind``."""
    folder = CONFIGS / kind
    for path in (find_file(Path(text)), folder / f"{text}.yaml"):
        if path.is_file():
            return short(path) if path.is_relative_to(CONFIGS) else path
    flag, known = {"tasks": "--task", "methods": "--methods"}[kind], sorted(path.stem for path in folder.glob("*.yaml"))
    raise UserError(f"{flag} {text}: no such file; configs/{kind} holds {', '.join(known)}")


def short(path: Path) -> Path:
    """A path from here, where there is one: on Windows none leads to another drive."""
    try:
        return Path(os.path.relpath(path))
    except ValueError:
        return path


def flag_value(name: str, files: Sequence[Path], words: Sequence[str]) -> str | None:
    """What a flag is set to by the files and then by the further words, the last one winning; None if by neither."""
    value: Any = None
    for path in files:
        try:
            content = yaml.load(path.read_text(), Loader=yaml.BaseLoader)
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise UserError(f"{path}: {str(error).splitlines()[0]}") from None
        if isinstance(content, dict):
            value = content.get(name, "") or value
    for word, following in pairwise([*words, "--"]):
        if _name(word) == name:
            _, equals, inline = word.partition("=")
            value = inline if equals else "true" if following.startswith("--") else following
    return None if value is None else str(value)


def _name(word: str) -> str:
    """The flag that a word of a command line is, in its own spelling; nothing for a value."""
    return word[2:].partition("=")[0].replace("-", "_") if word.startswith("--") else ""


def _shared_out(arms: dict[str, list[Path]], shared: Sequence[str]) -> tuple[dict[str, list[str]], list[str]]:
    """The words of ``shared`` for each arm, and a line for each flag that some go without."""
    words: dict[str, list[str]] = {}
    without: dict[tuple[str, str], list[str]] = {}
    for name, files in arms.items():
        given = _by_flag(shared)
        while unused := {flag: why for flag, why in _unused(files, given).items() if any(_name(part[0]) == flag for part in given)}:
            for part in [part for part in given if _name(part[0]) in unused]:
                given.remove(part)
                without.setdefault((shlex.join(part), unused[_name(part[0])]), []).append(name)
        words[name] = [word for part in given for word in part]
    for (flag, why), names in without.items():
        if len(names) == len(arms):
            raise UserError(f"{flag} after `--` is {why}, and by none of the arms: leave it out")
    return words, [f"{flag} is left out for {', '.join(names)}: it is {why}" for (flag, why), names in without.items()]


def _by_flag(words: Sequence[str]) -> list[list[str]]:
    """Words of a command line, each flag with its values."""
    parts: list[list[str]] = []
    for word in words:
        if word.startswith("--") or not parts:
            parts.append([])
        parts[-1].append(word)
    return parts


def _unused(files: Sequence[Path], given: Sequence[Sequence[str]]) -> dict[str, str]:
    """The flags of the method that an arm sets and does not use, with what would use them."""
    parser, words = Parser(add_help=False, allow_abbrev=False), [word for part in given for word in part]
    parser.add_flags(_MethodFlags)
    set_here = {item.name: flag_value(item.name, files, words) for item in fields(MethodArguments)}
    return unused_flags(vars(parser.parse_args([f"--{name}={value}" for name, value in set_here.items() if value is not None])))
