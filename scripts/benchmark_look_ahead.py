#!/usr/bin/env python
"""What assignment adds to a step when the next batch's pairs are made while the step runs.

    python scripts/benchmark_look_ahead.py

A step takes 50 ms; in one variant a fifth of it is Python, as when kernels are launched. On a GPU it multiplies matrices for that long,
from which the pairs' own products, on another stream, take their share; on a CPU it waits. Two loops: `train`, the real one, whose network
does nothing else, and `_look_ahead` alone, whose consumer does. Each runs with independent noise and with assignment, with look-ahead and
without. What assignment adds to the median step over independent noise is its exposed overhead: the median, over turns, of the difference
between two arms' turns of a few steps that stand next to each other. The first steps of a turn are not counted, since what they need was
made while other arms ran. Two cores must be free: one for the steps, one for the pairs.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import count, cycle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from benchmark_assignment import batch, table, verdict, write_csv
from benchmark_device import accelerator_on, add_device, processor, slug, synchronize, versions
from torch import Tensor, nn
from tqdm import tqdm

from immiscible.coupling import AssignmentCoupling, Coupling, IndependentCoupling
from immiscible.data.batches import Images
from immiscible.encoding.encoders import PixelEncoder
from immiscible.errors import run_script
from immiscible.objectives import DenoisingObjective, Pairs
from immiscible.process import NoiseProcess
from immiscible.randomness import Draws, seeded_generator
from immiscible.schedulers import build_scheduler
from immiscible.timesteps import timestep_sampler
from immiscible.training.loop import Item, StopRequest, _look_ahead, train
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
    """A network of one weight that takes ``seconds`` of its device, a share ``python`` of them in the interpreter."""

    def __init__(self, seconds: float, python: float, device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.5, device=device))
        self.seconds, self.python, self.device = seconds, python, device
        self._busy = busy_work((1 - python) * seconds / self.pieces, device)

    @property
    def pieces(self) -> int:
        """How many times a step turns from the interpreter to the device."""
        return 10 if self.python else 1

    def forward(self, xt: Tensor, time: Tensor) -> SimpleNamespace:
        """As a diffusers network is called."""
        self.wait()
        return SimpleNamespace(sample=self.weight * xt)

    def wait(self) -> None:
        """A step's work, as the calling thread sees it: on a GPU it is only launched."""
        for _ in range(self.pieces):
            end = time.perf_counter() + self.python * self.seconds / self.pieces
            while time.perf_counter() < end:
                pass
            self._busy()


def busy_work(seconds: float, device: torch.device) -> Callable[[], object]:
    """Something that keeps the device busy for so long: a sleep on a CPU, products of bfloat16 matrices on a GPU."""
    if device.type != "cuda":
        return partial(time.sleep, seconds)
    matrix = torch.randn(4096, 4096, device=device).bfloat16()
    out = torch.empty_like(matrix)

    def products(number: int) -> None:
        for _ in range(number):
            torch.mm(matrix, matrix, out=out)

    products(10)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    products(100)
    end.record()
    synchronize(device)
    return partial(products, max(1, round(100 * 1000 * seconds / start.elapsed_time(end))))


def pair_steps(images: list[Tensor], coupling: Coupling, network: Waiting, seed: int, ahead: bool) -> Iterator[float]:
    """`_look_ahead` alone: noises are drawn and coupled, the step takes its time."""
    device, timesteps = network.device, torch.zeros(len(images[0]), dtype=torch.int64, device=network.device)
    generator = seeded_generator(seed, "look_ahead", device=device)

    def item(x0: Tensor) -> Item:
        x0 = x0.to(device)
        noise = coupling(x0, torch.randn(x0.shape, device=device, generator=generator))
        return Item(Draws(seed, 0, 0, device), Pairs(x0, timesteps, noise, None, {}, {}), {})

    items: Iterator[Item] = map(item, cycle(images))
    if ahead:
        items = _look_ahead(items, 1, device)
    while True:
        start = time.perf_counter()
        next(items)
        network.wait()
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()  # as a step does that wants to know its loss
        yield time.perf_counter() - start


def train_steps(images: list[Tensor], coupling: Coupling, network: Waiting, seed: int, ahead: bool) -> Iterator[float]:
    """`train`: draws, coupling, corruption, loss, gradient, update."""
    accelerator = accelerator_on(network.device)
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
    seconds, device = arguments.milliseconds / 1000, torch.device(arguments.device)
    arms = {
        (noise, ahead): LOOPS[loop](images, couplings[noise](), Waiting(seconds, python, device), seed, ahead)
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


def summary(case: tuple[str, int, float], seeds: list[list[dict[tuple[str, bool], float]]]) -> list[dict[str, Any]]:
    """Two rows of a case, without look-ahead and with it, from what `measure` found for each seed."""
    loop, n, python = case
    rows = []
    for ahead in (False, True):
        exposed = [statistics.median(turn["assignment", ahead] - turn["independent", ahead] for turn in turns) for turns in seeds]
        row: dict[str, Any] = {"loop": loop, "N": n, "python": python, "look_ahead": "yes" if ahead else "no"}
        for noise in ("independent", "assignment"):
            row[f"{noise}_ms"] = statistics.median(turn[noise, ahead] for turns in seeds for turn in turns)
        rows.append(row | {"exposed_ms": statistics.median(exposed), "exposed_ms_worst": max(exposed)})
    return rows


def report(rows: list[dict[str, Any]], argv: Sequence[str], arguments: argparse.Namespace) -> str:
    """The table and the verdicts, with what they were measured by."""
    device = torch.device(arguments.device)
    host = f"one thread of torch on {platform.system()}"
    lines = [
        f"python scripts/benchmark_look_ahead.py {' '.join(argv)}".strip(),
        f"{processor(device)}, {host}; {versions()}",
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
    return "\n".join(lines)


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 1024], help="batch sizes N, of 32x32 photo crops")
    parser.add_argument("--milliseconds", type=float, default=50, help="that a step takes")
    parser.add_argument("--steps", type=int, default=16, help="counted steps of a turn")
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help=f"how many of the declared seeds {SEEDS}")
    add_device(parser)
    parser.add_argument("--output_dir", type=Path, default=Path("benchmarks"), help="of the table (CSV) and the printed text")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)

    rows: list[dict[str, Any]] = []
    cases = [(loop, n, python) for loop in LOOPS for n in arguments.sizes for python in (0.0, 0.2)]
    for number, case in zip(count(1), tqdm(cases, desc="look-ahead", leave=False)):
        seeds = [measure(*case, seed, arguments) for seed in tqdm(SEEDS[: arguments.seeds], desc=f"case {number}", leave=False)]
        rows += summary(case, seeds)
    text = report(rows, argv, arguments)
    print(text)
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    device = torch.device(arguments.device)
    path = arguments.output_dir / f"{'_'.join(['look_ahead', *([slug(device)] if device.type == 'cuda' else [])])}.txt"
    path.write_text(text + "\n")
    write_csv(rows, path.with_suffix(".csv"))
    print(f"\n{path}, {path.with_suffix('.csv').name}")


if __name__ == "__main__":
    sys.exit(run_script(main))
