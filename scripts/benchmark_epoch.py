#!/usr/bin/env python
"""Plans of whole epochs: what they take beside the matrix products in them and beside other solvers, in memory, and in a step.

    python scripts/benchmark_epoch.py                                     # all of it, on one core
    python scripts/benchmark_epoch.py --parts plans --sizes 10000         # one part
    pip install POT lapx                                                  # for the other solvers, which are left out where not installed

`plans` times `plan_epoch` of images in memory, over all of them and in each of ten classes, beside the products of just these blocks in the
precision in which the plan multiplies. `solvers` times one block: `plan_epoch`, cdist with scipy, POT's emd (which torchcfm calls) and
lapx. `imagenet` times one block and one class of 4x32x32 latents and multiplies: an extrapolation to 1,281,167 images, and called one.
`steps` times what a step of a run waits for longer with planned noises than with independent ones, once the epoch is planned.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import sys
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from benchmark_assignment import batch, cdist_scipy, interleaved, pin_to_one_core, table, verdict, write_csv
from benchmark_device import milliseconds, processor, versions
from benchmark_look_ahead import SHARE, SKIPPED, Waiting, train_steps
from torch import Tensor
from tqdm import tqdm

from immiscible.assignment.costs import _operand, fast_dtype
from immiscible.assignment.solve import LARGEST_BLOCK
from immiscible.coupling import AssignmentCoupling, IndependentCoupling
from immiscible.epoch import EpochCoupling, EpochPlan, PlannedRows, epoch_noise, epoch_problems, plan_epoch
from immiscible.errors import UserError, run_script
from immiscible.randomness import PoolDraws, seeded_generator

CPU = torch.device("cpu")
CLASSES = 10
IMAGENET = 1_281_167, 1000, 1281  # images, classes, images of a class
PARTS = ("plans", "solvers", "imagenet", "steps")
Row = dict[str, Any]
COLUMNS = {
    "N": ("N", "d"),
    "D": ("D", "d"),
    "classes": ("classes", "d"),
    "blocks": ("blocks", "d"),
    "plan s": ("plan_s", ".2f"),
    "noise s": ("noise_s", ".2f"),
    "products s": ("products_s", ".2f"),
    "plan/prod.": ("over_products", ".3f"),
    "peak MiB": ("extra_mib", ".0f"),
}


def products(problems: list[Tensor], images: Tensor) -> float:
    """Seconds of the matrix products of a plan alone, in its precision."""
    dtype, total = fast_dtype(CPU, images.shape[1]), 0.0
    for problem in problems:
        rows, _ = _operand(images[problem], dtype)
        columns, _ = _operand(torch.randn(len(problem), images.shape[1]), dtype)

        def multiply(rows: Tensor = rows, columns: Tensor = columns) -> None:
            for part in rows.split(1024):
                torch._int_mm(part, columns.T) if dtype == "int8" else part @ columns.T

        total += milliseconds(multiply, CPU) / 1000
    return total


def labels_of(count: int, classes: int) -> Tensor | None:
    return torch.arange(count) % classes if classes > 1 else None


def plans(arguments: argparse.Namespace) -> list[Row]:
    rows = []
    for count in arguments.sizes:
        images = batch(count, 3072, 0, CPU)[0]
        for classes in (1, CLASSES):
            labels = labels_of(count, classes)
            row: Row = {"N": count, "D": 3072, "classes": classes, "extra_mib": extra_memory(images, labels)}
            turns = [one_plan(images, labels, turn) for turn in range(arguments.repeats)]
            rows.append(row | {name: statistics.median(turn[name] for turn in turns) for name in turns[0]})
    return rows


def one_plan(images: Tensor, labels: Tensor | None, epoch: int) -> Row:
    problems = epoch_problems(len(images), seed=0, epoch=epoch, labels=labels)
    plan = milliseconds(lambda: plan_epoch(images, seed=0, epoch=epoch, labels=labels), CPU) / 1000
    noise = milliseconds(lambda: [epoch_noise(part, images.shape[1], seed=0, epoch=epoch) for part in problems], CPU) / 1000
    own = products(problems, images)
    return {"blocks": len(problems), "plan_s": plan, "noise_s": noise, "products_s": own, "over_products": plan / own}


def solvers(arguments: argparse.Namespace) -> list[Row]:
    """One block of each size: ours whole, its noises drawn too; the others on the distances of the same pairs, noises given."""
    rows = []
    for count in arguments.block_sizes:
        images, noise = batch(count, 3072, 0, CPU)
        plan_epoch(images[:200], seed=0, epoch=0)  # compiles
        ways: dict[str, Callable[[], Any]] = {"plan": lambda images=images: plan_epoch(images, seed=0, epoch=0)}
        slow: dict[str, Callable[[], Any]] = {"cdist+scipy": lambda images=images, noise=noise: cdist_scipy(images, noise)}
        slow |= other_solvers(images, noise)
        times = interleaved(CPU, ways, arguments.repeats) | interleaved(CPU, slow, 1) | {"plan after": milliseconds(ways["plan"], CPU)}
        rows.append({"N": count, "D": 3072, **{f"{name}_ms": value for name, value in times.items()}})
    return rows


def other_solvers(images: Tensor, noise: Tensor) -> dict[str, Callable[[], Any]]:
    found: dict[str, Callable[[], Any]] = {}
    try:
        import ot

        uniform = ot.unif(len(images))
        found["POT emd"] = lambda: ot.emd(uniform, uniform, (torch.cdist(images, noise) ** 2).numpy(), numItermax=10**7)
    except ImportError:
        pass
    try:
        import lap

        found["lapx"] = lambda: lap.lapjv(torch.cdist(images, noise).double().numpy())
    except ImportError:
        pass
    return found


def imagenet(arguments: argparse.Namespace) -> list[Row]:
    images, classes, of_class = IMAGENET
    rows = []
    for count, times, classed in ((LARGEST_BLOCK, images / LARGEST_BLOCK, 1), (of_class, images / of_class, classes)):
        latents = batch(count, 4096, 0, CPU)[0]
        plan_epoch(latents[:200], seed=0, epoch=0)
        seconds = statistics.median(
            milliseconds(lambda latents=latents: plan_epoch(latents, seed=0, epoch=0), CPU) / 1000 for _ in range(arguments.repeats)
        )
        rows.append({"N": images, "D": 4096, "classes": classed, "blocks": round(times), "measured_s": seconds, "plan_s": seconds * times})
    return rows


def steps(arguments: argparse.Namespace) -> list[Row]:
    """The median over turns of what a step of 50 ms takes longer with planned noises, looked ahead and not."""
    rows = []
    for count in (64, 256):
        images = [x0.view(count, 3, 32, 32) for x0 in batch(4 * count, 3072, 0, CPU)[0].split(count)]
        plan = EpochPlan.unsolved(50_000, [])
        numbers = torch.randperm(50_000, generator=seeded_generator("benchmark"))

        def planned(draws: PoolDraws, numbers: Tensor = numbers, plan: EpochPlan = plan) -> PlannedRows:
            first = draws.step * draws.batch_size % (50_000 - draws.batch_size)
            return PlannedRows(numbers[first : first + draws.batch_size], 0, 0, plan)

        for ahead in (False, True):
            arms = {
                name: train_steps(images, coupling, Waiting(0.05, 0.0, CPU), 0, ahead)
                for name, coupling in (("independent", IndependentCoupling()), ("epoch", EpochCoupling(AssignmentCoupling(), planned)))
            }
            turns = []
            for turn in range(2 * arguments.repeats):
                medians = {}
                for name in list(arms) if turn % 2 else list(reversed(arms)):
                    taken = [1000 * next(arms[name]) for _ in range(SKIPPED + 16)]
                    medians[name] = statistics.median(taken[SKIPPED:])
                turns.append(medians)
            for arm in arms.values():
                arm.close()  # type: ignore[attr-defined]
            row: Row = {"N": count, "look_ahead": "yes" if ahead else "no"}
            row |= {f"{name}_ms": statistics.median(turn[name] for turn in turns) for name in arms}
            rows.append(row | {"exposed_ms": statistics.median(turn["epoch"] - turn["independent"] for turn in turns)})
    return rows


def extra_memory(images: Tensor, labels: Tensor | None) -> float | None:
    """MiB that a plan needs beside the images at its peak, in a forked process; None where it cannot be told."""
    if not Path("/proc/self/clear_refs").exists():
        return None
    plan_epoch(images[:200], seed=0, epoch=0)
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    child = context.Process(target=_send_extra_memory, args=(images, labels, there))
    child.start()
    there.close()
    try:
        return here.recv()
    finally:
        child.join()


def _send_extra_memory(images: Tensor, labels: Tensor | None, pipe: Connection) -> None:
    def status(field: str) -> float:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
        return int(line.split()[1]) / 2**10

    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is resident now
    plan_epoch(images, seed=0, epoch=0, labels=labels)
    pipe.send(status("VmHWM") - before)
    pipe.close()


def told(part: str, rows: list[Row]) -> list[str]:
    """A part's table, and the targets that it answers."""
    columns = (
        COLUMNS
        if part == "plans"
        else {
            name: (name, "s" if isinstance(value, str) else ",.4g" if isinstance(value, float) else "d") for name, value in rows[0].items()
        }
    )
    lines = [part, table(rows, columns)]
    if part == "plans":
        lines += [
            verdict(
                f"plan of {row['N']} x 3072{' in classes' if row['classes'] > 1 else ''}, times its own products",
                row["over_products"],
                1.5,
                at_least=False,
            )
            for row in rows
            if row["N"] >= 50_000
        ]
    if part == "solvers":
        for row in rows:
            for name, target in (("cdist+scipy", 15), ("POT emd", 10)):
                if f"{name}_ms" in row and row["N"] == 4096:
                    ratio = row[f"{name}_ms"] / max(row["plan_ms"], row["plan after_ms"])
                    lines.append(verdict(f"block of {row['N']}: times faster than {name}", ratio, target, at_least=True))
    if part == "imagenet":
        lines.append("measured_s is of one block or class; plan_s is that times the number of them: an extrapolation")
    if part == "steps":
        lines += [
            verdict(f"batch {row['N']}: exposed ms of a 50 ms step", row["exposed_ms"], SHARE * 50, at_least=False)
            for row in rows
            if row["look_ahead"] == "yes"
        ]
    return [*lines, ""]


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 50_000], help="images of the plans, 32x32 photo crops")
    parser.add_argument("--block_sizes", type=int, nargs="+", default=[1024, 4096], help="images of the blocks given to all solvers")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output_dir", type=Path, default=Path("benchmarks"), help="of the tables (CSV) and the printed text")
    arguments = parser.parse_args(argv)
    if min(*arguments.sizes, *arguments.block_sizes) < 2 or arguments.repeats < 1:
        raise UserError("--sizes and --block_sizes must be at least 2, --repeats at least 1")
    torch.set_num_threads(1)
    lines = [
        f"python scripts/benchmark_epoch.py {' '.join(argv)}".strip(),
        f"{processor(CPU)}; {versions()}; operands of the cost in {fast_dtype(CPU)}; medians of {arguments.repeats}\n",
    ]
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    measure = {"plans": plans, "solvers": solvers, "imagenet": imagenet, "steps": steps}
    for part in tqdm(sorted(arguments.parts, key=lambda part: part != "steps"), desc="parts", leave=False):  # steps need two cores
        if part != "steps":
            pin_to_one_core()
        rows = measure[part](arguments)
        write_csv(rows, arguments.output_dir / f"epoch_{part}.csv")
        lines += told(part, rows)
    path = arguments.output_dir / ("epoch.txt" if set(arguments.parts) == set(PARTS) else f"epoch_{'_'.join(arguments.parts)}.txt")
    path.write_text("\n".join(lines))
    print(f"{path.read_text()}\n{path}")


if __name__ == "__main__":
    sys.exit(run_script(main))
