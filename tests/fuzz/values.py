"""Flags as the fuzzer sees them, and values for them: right ones, ends of ranges, and what should be refused."""

from __future__ import annotations

import importlib
import math
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cache, partial
from pathlib import Path
from typing import Any, get_type_hints

from launch import ROOT

from immiscible.commands import compare, sample
from immiscible.configs import TextToImageConfig, UnconditionalConfig
from immiscible.flags import Range, _kind, parse_config, range_of

HUGE = ("1" + "0" * 30, "-1" + "0" * 30, "9" * 5000, "1e30", "-1e30", "1e308", "1e999", "2147483648", "-2147483649", "1" + "0" * 18)
NOT_FINITE = ("inf", "-inf", "nan", "Infinity", "-NaN")
NO_NUMBER = ("", " ", "one", "1,5", "0x10", "1e", "--", "1 2", "none", "½", "١", "true", "[1]", "{}", "1\n2", "\udcff", "🎲", "-", "1.5.2")
NO_TEXT = (
    "",
    " ",
    "x" * 300,
    "a/" * 3000,
    "é" * 200,
    "\udcff\udcfe",
    "🎲" * 80,
    "..",
    "/dev/null",
    "-",
    "a\nb",
    "~",
    "$HOME",
    "%s%n",
    "a\0b",
)
WORDS = ("a", "1", "true", "null", "latest", "none", "x.yaml", "0")


ANY = Range()


@dataclass(frozen=True)
class Flag:
    """One flag: its name, the type of a value, what a number may be, and the choices that there are."""

    name: str
    kind: type
    allowed: Range = ANY
    choices: Sequence[str] = ()
    prose: bool = False

    def accepts(self, text: str) -> bool:
        """Whether a number is one that the flag's own words allow: this is what the parser is checked against."""
        try:
            value = self.kind(text)
        except ValueError:
            return False
        return math.isfinite(value) and self.allowed.problem(value) is None and (abs(value) <= 2**63 or self.kind is float)


@dataclass(frozen=True)
class Target:
    """A script up to what it makes of its flags.

    Args:
        script: its path from the repository's root.
        flags: all it has.
        base: words that it needs.
        parse: gives the flags' values, as attributes.
        takes_files: whether it has --config.
    """

    script: str
    flags: tuple[Flag, ...]
    base: tuple[str, ...]
    parse: Callable[[list[str]], Any]
    takes_files: bool = True


def flags_of(config: type) -> tuple[Flag, ...]:
    """Of a configuration."""
    hints = get_type_hints(config)
    found = []
    for item in fields(config):
        choices = tuple(item.metadata.get("choices") or ())
        found.append(Flag(item.name, _kind(hints[item.name])[0], range_of(item), choices, bool(item.metadata.get("prose"))))
    return tuple(found)


def module_of(script: str) -> Any:
    """A script as a module."""
    path = ROOT / script
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    return importlib.import_module(path.stem)


@cache
def targets() -> tuple[Target, ...]:
    """The six scripts that people train, sample and compare with; precompute_latents.py twice, for its two sets of flags."""

    def parsing(config: type) -> Callable[[list[str]], Any]:
        return partial(parse_config, config, program="fuzz", description="")

    text = ("--pretrained_model_name_or_path", "model", "--train_data_dir", "photos")
    plain, cached = ("--bundled_data", "digits"), ("--latent_cache_dir", "cache", "--center_crop")
    precompute = module_of("scripts/precompute_latents.py")
    found = [
        Target("train_unconditional.py", flags_of(UnconditionalConfig), plain, parsing(UnconditionalConfig)),
        Target("train_text_to_image.py", flags_of(TextToImageConfig), text, parsing(TextToImageConfig)),
        Target("finetune_sd.py", flags_of(TextToImageConfig), (*text, "--use_lora"), parsing(TextToImageConfig)),
    ]
    for config, base in ((precompute.TextCacheConfig, text), (precompute.ImageCacheConfig, (*plain, "--vae_model_name_or_path", "vae"))):
        found.append(Target("scripts/precompute_latents.py", flags_of(config), (*base, *cached), parsing(config)))
    needed = ("--model", "m", "--output_dir", "o", "--num_images", "2", "--num_inference_steps", "2")
    found.append(Target("scripts/sample.py", _of_parser(sample.parser()), needed, sample.parser().parse_args, takes_files=False))
    words = {
        "runs": str,
        "names": str,
        "task": str,
        "methods": str,
        "seeds": int,
        "baseline": str,
        "output_dir": str,
        "jobs": int,
        "script": str,
    }
    allowed = {"seeds": Range(least=0, most=2**63 - 1), "jobs": Range(least=1, most=1024)}
    kinds = tuple(Flag(name, kind, allowed.get(name, ANY)) for name, kind in words.items())
    found.append(
        Target(
            "scripts/compare.py",
            kinds,
            ("--task", "digits", "--methods", "baseline"),
            lambda argv: compare.parse(argv)[0],
            takes_files=False,
        )
    )
    return tuple(found)


def _of_parser(parser: Any) -> tuple[Flag, ...]:
    """The flags of an argparse parser; what type a value has is what reading "1" gives."""
    found = []
    for action in parser._actions:
        if action.option_strings and action.nargs != 0:
            value = action.type("1") if action.type else "1"
            kind = str if isinstance(value, Path) else type(value)
            read = action.type.args if isinstance(action.type, partial) else ()
            allowed = next((each for each in read if isinstance(each, Range)), ANY)
            found.append(Flag(action.dest, kind, allowed, tuple(action.choices or ())))
    return tuple(found)


def any_value(draw: random.Random, flag: Flag) -> str:
    """A value that may be right, at an end, just beyond it, absurd, or no value at all."""
    if flag.kind in (int, float):
        return draw.choice(
            (draw.choice(HUGE), draw.choice(NOT_FINITE), draw.choice(NO_NUMBER), number_near(draw, flag), right_number(draw, flag))
        )
    if flag.kind is bool:
        return draw.choice(("true", "false", "maybe", "", "2", "nan", "x" * 300))
    if flag.choices:
        return draw.choice((*flag.choices, *flag.choices, flag.choices[0].upper(), flag.choices[0] + " ", draw.choice(NO_TEXT)))
    return draw.choice((*NO_TEXT, *WORDS))


def number_near(draw: random.Random, flag: Flag) -> str:
    """An end of the range, or the number before or after it."""
    ends = [end for end in vars(flag.allowed).values() if end is not None] or [0, 1]
    end = flag.kind(draw.choice(ends))
    if flag.kind is int:
        return str(end + draw.choice((-1, 0, 1)))
    return repr(draw.choice((end, math.nextafter(end, math.inf), math.nextafter(end, -math.inf), -end, 5e-324)))


def right_number(draw: random.Random, flag: Flag, most: float = math.inf) -> str:
    """A number inside the range, small ones as often as great ones; ``most`` bounds it further."""
    low = next((end for end in (flag.allowed.least, flag.allowed.above) if end is not None), 0)
    high = next((end for end in (flag.allowed.most, flag.allowed.below) if end is not None), 2**31 - 1)
    high = max(low, min(high, most))
    value = low + (high - low) * 10 ** draw.uniform(-6, 0)
    return str(int(value)) if flag.kind is int else repr(float(value))
