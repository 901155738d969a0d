"""Cases that read flags in this process: thousands in a minute."""

from __future__ import annotations

import math
import random
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from fuzz.values import Flag, Target, any_value, targets
from immiscible.errors import UserError

SECONDS = 20  # of a case, of which any takes a few hundredths
LONGEST_LINE = 600
FILES = (
    lambda draw: "learning_rate: 1e-3\nlearning_rate: 2e-3\n",
    lambda draw: "seed: 1\n" * draw.randint(2, 50),
    lambda draw: (
        f"eval_inference_steps: [5, {draw.choice(('--overwrite_output_dir', '-h', '--help', '--output_dir=x', '--', '[1]', '{a: 1}'))}]\n"
    ),
    lambda draw: "seed: " + "[" * draw.choice((2, 50, 3000)) + "1" + "]" * draw.choice((0, 2, 3000)),
    lambda draw: "".join("a:\n" + " " * depth for depth in range(1, draw.choice((3, 1200)))) + "b",
    lambda draw: "k: &k [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("klmnopqrs", "lmnopqrst", strict=True)),
    lambda draw: "#" * (2**20 + draw.randint(1, 99)),
    lambda draw: draw.choice(
        ("&a [*a]", "{", "]", "- 1", "seed", "!!python/object:os.system x", "? [a]\n: b", "a: *b", "%YAML 9", "\t", "'")
    ),
    lambda draw: draw.choice(
        ("--- 1\n--- 2\n", "seed: 1\n---\nseed: 2\n", "<<: {seed: 1}\n", "seed=1: 2\n", "'': 1\n", "help: 1\n", "h: 1\n")
    ),
    lambda draw: draw.choice(
        ("config: x.yaml\n", "seed: !!int '1'\nseed2: 1\n", 'output_dir: "a\\0b"\n', "1: 2\n", "true: false\n", "~: 1\n")
    ),
    lambda draw: bytes(draw.randrange(256) for _ in range(draw.randint(1, 200))),
    lambda draw: "\ufeffseed: 1\nno_such_flag: 2\n",
)


def parsing_cases(kind: str, draw: random.Random, folder: Path) -> Iterator[tuple[str, Callable[[], str | None]]]:
    """Endless cases of ``flag``, ``pair`` or ``yaml``: what is tried, and a call that returns what is wrong with how it ended."""
    with_files = [target for target in targets() if target.takes_files]
    while True:
        if kind == "yaml":
            yield yaml_case(draw, draw.choice(with_files), folder)
            continue
        target = draw.choice(targets())
        values = {flag: any_value(draw, flag) for flag in draw.sample(target.flags, 1 if kind == "flag" else 2)}
        words = [f"--{flag.name}={value}" for flag, value in values.items()]
        yield f"{target.script} {words!r:.300}", partial(judge_flags, target, words, values)


def yaml_case(draw: random.Random, target: Target, folder: Path) -> tuple[str, Callable[[], str | None]]:
    """A file that is wrong, or one flag in a file."""
    path = folder / "case.yaml"
    if draw.random() < 0.5:
        content: Any = draw.choice(FILES)(draw)
    else:
        flag = draw.choice(target.flags)
        value = any_value(draw, flag)
        content = f"{flag.name}: {draw.choice((value, repr(value), f'[{value}]', f'[{value!r}, {value!r}]', '{x: 1}'))}\n"
    data = content if isinstance(content, bytes) else content.encode(errors="surrogatepass")

    def judge() -> str | None:
        path.write_bytes(data)
        # What only the flags together get wrong is found after the file, and names a flag.
        return outcome(target, ["--config", str(path)], [str(path), *(f"--{flag.name}" for flag in target.flags)])[1]

    return f"{target.script} --config with {data[:200]!r}", judge


def judge_flags(target: Target, words: list[str], values: dict[Flag, str]) -> str | None:
    """What is wrong with how these flags were read; None if nothing."""
    read, problem = outcome(target, words, [f"--{flag.name}" for flag in values])
    if read is None:
        return problem
    for flag, text in values.items():
        if flag.kind in (int, float):
            found = getattr(read, flag.name)
            for value in found if isinstance(found, list) else [found]:
                if not math.isfinite(value) or abs(value) > 2**63 or value != flag.kind(text):
                    return f"silent: --{flag.name} {text:.60} became {value}"
            if not flag.accepts(text):
                return f"silent: --{flag.name} {text:.60} is out of its range and was taken"
        elif flag.kind is str and not flag.prose and (not text.strip() or "\0" in text):
            return f"silent: --{flag.name} {text!r:.60} was taken"
    return None


def outcome(target: Target, words: list[str], named: list[str]) -> tuple[Any, str | None]:
    """The flags' values, or None and what is wrong with how they were refused: None if it was one line with one of ``named`` in it."""
    try:
        with limited(SECONDS):
            return target.parse([*target.base, *words]), None
    except UserError as error:
        line = " ".join(str(error).split())  # as `run_script` shows it
    except TimeoutError:
        return None, "hang"
    except SystemExit as end:
        return None, f"silent: left with {end.code}"
    except BaseException as error:
        return None, f"traceback: {type(error).__name__}: {error!s:.200}"
    if len(line) > LONGEST_LINE:
        return None, f"unreadable, {len(line)} characters: {line:.200}"
    return None, None if any(word in line for word in named) else f"unnamed: {line:.300}"


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raises `TimeoutError` inside the block when its time is over; of the main thread."""

    def over(*_: Any) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
