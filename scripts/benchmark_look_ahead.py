#!/usr/bin/env python
"""What assignment adds to a step when the next batch's pairs are made while the step runs.

    python scripts/benchmark_look_ahead.py

A step waits 50 ms, as one does whose network runs on a GPU; in one variant a fifth of it is Python, as when kernels are launched. Two
loops: `train`, the real one, whose network does nothing but wait, and `_look_ahead` alone, whose consumer does. Each runs with independent
noise and with assignment, with look-ahead and without. What assignment adds to the median step over independent noise is its exposed
overhead: the median, over turns, of the difference between two arms' turns of a few steps that stand next to each other. The first steps of
a turn are not counted, since what they need was made while other arms ran. Two cores must be free: one for the steps, one for the pairs.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import count, cycle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from benchmark_assignment import batch, processor, table, verdict, versions, write_csv
from torch import Tensor, nn
from tqdm import tqdm

from immiscible.coupling import AssignmentCoupling, Coupling, IndependentCoupling
from immiscible.data.batches import Images
from immiscible.encoding.encoders import PixelEncoder
from immiscible.errors import run_script
from immiscible.objectives import DenoisingObjective
from immiscible.process import NoiseProcess
from immiscible.randomness import seeded_generator
from immiscible.schedulers import build_scheduler
from immiscible.timesteps import timestep_sampler
from immiscible.training.loop import StopRequest, _look_ahead, train
from immiscible.weighting import loss_weights

SEEDS = (0, 1, 2, 3, 4)  # declared here; the worst of them must meet the target
SHARE = 0.01  # of the step's wait: the target
SKIPPED = 4  # steps of a turn that are not counted
COLUMNS = {
    "loop": ("loop", "s"),
    "N": ("N", "d"),
    "Python": ("python", ".0%"),
    "look-ahead": ("look_ahead", "s"),
    "independent": ("independent_ms", ".2f"),
    "assignment": ("assignment_ms", ".2f"),
    "exposed ms": ("exposed_ms", ".2f"),
    "worst seed": ("exposed_ms_worst", ".2f"),
}


class Waiting(nn.Module):
    """A network of one weight that takes ``seconds``, a share ``python`` of them in the interpreter."""

    def __init__(self, seconds: float, python: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.5))
        self.seconds, self.python = seconds, python

    def forward(self, xt: Tensor, time: Tensor) -> SimpleNamespace:
        """As a diffusers network is called."""
        self.wait()
        return SimpleNamespace(sample=self.weight * xt)

    def wait(self) -> None:
        """A step's work, as the calling thread sees it: one sleep, or ten kernels' launches and sleeps."""
        pieces = 10 if self.python else 1
        for _ in range(pieces):
            end = time.perf_counter() + self.python * self.seconds / pieces
            while time.perf_counter() < end:
                pass
            time.sleep((1 - self.python) * self.seconds / pieces)


def pair_steps(images: list[Tensor], coupling: Coupling, network: Waiting, seed: int, ahead: bool) -> Iterator[float]:
    """`_look_ahead` alone: noises are drawn and coupled, the step waits."""
    generator = seeded_generator(seed, "look_ahead")
    items: Iterator[Any] = (coupling(x0, torch.randn(x0.shape, generator=generator)) for x0 in cycle(images))
    if ahead:
        items = _look_ahead(items, 1, torch.device("cpu"))
    while True:
        start = time.perf_counter()
        next(items)
        network.wait()
        yield time.perf_counter() - start


def train_steps(images: list[Tensor], coupling: Coupling, network: Waiting, seed: int, ahead: bool) -> Iterator[float]:
    """`train`: draws, coupling, corruption, loss, gradient, update."""
    from accelerate import Accelerator

    accelerator = Accelerator()
    process = NoiseProcess.from_scheduler(build_scheduler("ddpm")).to(accelerator.device)
    weights = loss_weights("none", process, "epsilon").float().to(accelerator.device)
    objective = DenoisingObjective(process, timestep_sampler("uniform", process), coupling, weights)
    model, optimizer = accelerator.prepare(network, torch.optim.SGD(network.parameters(), lr=1e-3))
    for stats in train(
        accelerator, model, optimizer, objective, map(Images, cycle(images)), PixelEncoder(accelerator.device),
        batch_size=len(images[0]), seed=seed, start_step=0, max_steps=10**9,
        learning_rate=lambda step: 1e-3, max_grad_norm=1.0, ema=None, stop=StopRequest(), ahead=ahead,
    ):  # fmt: skip
        yield stats.metrics["step_seconds"]


LOOPS: dict[str, Callable[..., Iterator[float]]] = {"train": train_steps, "pairs alone": pair_steps}


def measure(loop: str, n: int, python: float, seed: int, arguments: argparse.Namespace) -> list[dict[tuple[str, bool], float]]:
    """For each turn the median ms of a step by (noise, look-ahead)."""
    images = [x0.view(n, 3, 32, 32) for x0 in batch(4 * n, 3072, seed, torch.device("cpu"))[0].split(n)]
    couplings: dict[str, Callable[[], Coupling]] = {"independent": IndependentCoupling, "assignment": AssignmentCoupling}
    arms = {
        (noise, ahead): LOOPS[loop](images, couplings[noise](), Waiting(arguments.milliseconds / 1000, python), seed, ahead)
        for ahead in (False, True)
        for noise in couplings
    }
    turns = []
    for turn in range(arguments.turns):
        medians = {}
        for arm in list(arms) if turn % 2 else list(reversed(arms)):
            steps = [1000 * next(arms[arm]) for _ in range(SKIPPED + arguments.steps)]
            medians[arm] = statistics.median(steps[SKIPPED:])
        turns.append(medians)
    for steps in arms.values():
        steps.close()  # type: ignore[attr-defined]
    return turns


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 1024], help="batch sizes N, of 32x32 photo crops")
    parser.add_argument("--milliseconds", type=float, default=50, help="that a step waits")
    parser.add_argument("--steps", type=int, default=16, help="counted steps of a turn")
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help=f"how many of the declared seeds {SEEDS}")
    parser.add_argument("--output_dir", type=Path, default=Path("benchmarks"), help="of the table (CSV) and the printed text")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)

    rows: list[dict[str, Any]] = []
    cases = [(loop, n, python) for loop in LOOPS for n in arguments.sizes for python in (0.0, 0.2)]
    for number, (loop, n, python) in zip(count(1), tqdm(cases, desc="look-ahead", leave=False)):
        seeds = [measure(loop, n, python, seed, arguments) for seed in tqdm(SEEDS[: arguments.seeds], desc=f"case {number}", leave=False)]
        for ahead in (False, True):
            exposed = [statistics.median(turn["assignment", ahead] - turn["independent", ahead] for turn in turns) for turns in seeds]
            row = {"loop": loop, "N": n, "python": python, "look_ahead": "yes" if ahead else "no"}
            for noise in ("independent", "assignment"):
                row[f"{noise}_ms"] = statistics.median(turn[noise, ahead] for turns in seeds for turn in turns)
            rows.append(row | {"exposed_ms": statistics.median(exposed), "exposed_ms_worst": max(exposed)})

    lines = [
        f"python scripts/benchmark_look_ahead.py {' '.join(argv)}".strip(),
        f"{processor(torch.device('cpu'))}, one thread of torch on {platform.system()}; {versions()}",
        f"{arguments.seeds} seeds x {arguments.turns} turns x {arguments.steps} steps of {arguments.milliseconds:g} ms and what the "
        "loop does beside; ms are medians over seeds\n",
        table(rows, COLUMNS),
        "",
    ]
    target = SHARE * arguments.milliseconds
    for row in rows:
        if row["look_ahead"] == "yes":
            text = f"4. {row['loop']}, N={row['N']}, {row['python']:.0%} Python: exposed ms per step"
            lines.append(verdict(text, row["exposed_ms_worst"], target, at_least=False))
    print("\n".join(lines))
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    path = arguments.output_dir / "look_ahead.txt"
    path.write_text("\n".join(lines) + "\n")
    write_csv(rows, path.with_suffix(".csv"))
    print(f"\n{path}, {path.with_suffix('.csv').name}")


if __name__ == "__main__":
    sys.exit(run_script(main))
