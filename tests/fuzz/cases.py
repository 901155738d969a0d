"""All kinds of cases, in one order that a seed decides."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from launch import Scripts

from fuzz.parsing import parsing_cases
from fuzz.runs import RUNS, Ground

# Of a hundred cases, so many of each kind: those in this process cost little.
KINDS = {"flag": 40, "pair": 20, "yaml": 20, "run": 6, "data": 4, "checkpoint": 5, "cache": 3, "samples": 2}


def fuzz(
    shares: Mapping[str, int], cases: int, seed: int, scripts: Scripts, folder: Path, *, show: bool = False
) -> tuple[Counter[str], list[str]]:
    """Tries cases of each kind in proportion to its share.

    Args:
        shares: by kind, of `KINDS`.
        cases: how many in all; each kind has one or more.
        seed: of everything drawn.
        scripts: what runs whole scripts.
        folder: for what they read and leave.
        show: prints each failure when it is met.

    Returns:
        how many of each kind were tried, and a line for each that did not end as it should.
    """
    ground, tried, problems = Ground(scripts, folder / "ground"), Counter[str](), []
    for kind, share in shares.items():
        draw = random.Random(f"{seed} {kind}")
        made = ground.cases(kind, draw) if kind in RUNS else parsing_cases(kind, draw, folder)
        for _ in range(max(1, round(cases * share / sum(shares.values())))):
            label, judge = next(made)
            tried[kind] += 1
            if problem := judge():
                problems.append(f"{kind}: {label}: {problem}")
                if show:
                    print(problems[-1], flush=True)
    return tried, problems
