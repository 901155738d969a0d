#!/usr/bin/env python
"""The assignment engine beside what most trainers do and beside the published release, in one run, interleaved, on one core or one GPU.

    python scripts/benchmark_assignment.py                                       # N = 64 to 4096, about half an hour
    python scripts/benchmark_assignment.py --sizes 1024 16384 --dimensions 3072  # the large one, on request

Two references, in our words: `torch.cdist` and scipy on the L2 matrix (most trainers), and the norms of the fp16 differences of all pairs
and scipy (the release). Times are from images and noises to the permutation; taking the noises by it costs the same everywhere and is left
out. A time is the median over the repeats of a seed and then over the seeds. What is kept is the share of the reduction of the summed
distance, against the mean over all pairings, that the best permutation reaches; beyond --largest_scipy, a lower bound on that share. A
target must be met by the worst of the declared seeds. Peak memory is the resident set's, of a forked process, beyond the inputs.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TextIO

import torch
from benchmark_device import add_device, milliseconds, processor, slug, versions
from tqdm import tqdm

from immiscible.assignment.costs import cost_matrix, fast_dtype
from immiscible.assignment.solve import EPSILON, assign, certified_assignment, price_auction, solve
from immiscible.data.bundled import PhotoCrops
from immiscible.data.transforms import ImageTransform
from immiscible.errors import UserError, run_script
from immiscible.randomness import seeded_generator

SEEDS = (0, 1, 2, 3, 4)  # declared here; the worst of them must meet a target
SIDES = {3072: 32, 4096: 0, 12288: 64}  # D -> side of RGB photo crops; 4096 has none and is drawn as 4x32x32 latents
METRICS = ("l2", "squared_l2")
FINE = EPSILON / 50  # of the auction that bounds the best permutation from below where an exact one would take minutes
Row = dict[str, Any]
COLUMNS = {
    "N": ("N", "d"),
    "D": ("D", "d"),
    "metric": ("metric", "s"),
    "cost": ("cost_ms", ".3f"),
    "solve": ("solve_ms", ".3f"),
    "total": ("total_ms", ".3f"),
    "cdist+scipy": ("cdist_scipy_ms", ".1f"),
    "broadcast": ("broadcast_scipy_ms", ".0f"),
    "scipy alone": ("scipy_same_ms", ".2f"),
    "exact": ("exact_raw_ms", ".2f"),
    "bf16 product": ("bf16_product_ms", ".2f"),
    "kept": ("kept_worst", ".5f"),
    "certified": ("certified_worst", ".4f"),
    "bids/row": ("bids_per_row", ".1f"),
    "peak MiB": ("extra_mib", ".1f"),
    "/ inputs": ("extra_over_inputs", ".2f"),
}


def batch(n: int, dimension: int, seed: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Images and noises [N, D]: photo crops, or for D = 4096 smooth unit-deviation stand-ins for latents."""
    generator = seeded_generator(seed, "benchmark", n, dimension)
    if SIDES[dimension]:
        source, transform = PhotoCrops(SIDES[dimension]), ImageTransform(SIDES[dimension])
        chosen = torch.randperm(max(n, len(source)), generator=generator)[:n].tolist()  # any number names a crop
        x0 = torch.stack([transform(source.load(i), 0, i) for i in chosen]).flatten(1)
    else:
        coarse = torch.randn(n, 4, 4, 4, generator=generator)
        x0 = torch.nn.functional.interpolate(coarse, size=32, mode="bilinear") + 0.6 * torch.randn(n, 4, 32, 32, generator=generator)
        x0 = (x0 / x0.std()).flatten(1)
    return x0.to(device), torch.randn(n, dimension, generator=generator).to(device)


def scipy_on(cost: torch.Tensor) -> torch.Tensor:
    from scipy.optimize import linear_sum_assignment

    return torch.from_numpy(linear_sum_assignment(cost.cpu().numpy())[1])


def cdist_scipy(x0: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    return scipy_on(torch.cdist(x0, noise))


def broadcast_scipy(x0: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """The release's cost: norms of fp16 differences of all pairs, scaled by 0.1 against overflow; here a few rows at a time, which is
    faster on a CPU than all 2 N^2 D bytes at once."""
    images, noises = 0.1 * x0.half(), 0.1 * noise.half()
    return scipy_on(torch.cat([torch.linalg.vector_norm(rows[:, None] - noises[None], dim=2) for rows in images.split(16)]))


def bf16_product(images: torch.Tensor, noises: torch.Tensor) -> torch.Tensor:
    return images @ noises.T


def exact(cost: torch.Tensor) -> torch.Tensor:
    return solve(cost, solver="exact").index


def interleaved(device: torch.device, ways: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """The median time of each way; in every repeat each runs once, and none always follows the same one."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    names = list(ways)
    for turn in range(repeats):
        for place in range(len(names)):
            name = names[(turn + place) % len(names)]
            times[name].append(milliseconds(ways[name], device))
    return {name: statistics.median(values) for name, values in times.items()}


def total_cost(cost: torch.Tensor, index: torch.Tensor) -> float:
    return float(cost[torch.arange(len(cost), device=cost.device), index.to(cost.device)].double().sum())


def best_reduction(cost: torch.Tensor, none: float, largest_scipy: int) -> float:
    """Of the summed cost against ``none``: what the best permutation reaches or, for a large cost, cannot exceed."""
    if len(cost) <= largest_scipy:
        return none - total_cost(cost, exact(cost))
    solution, _ = price_auction(cost, FINE)
    return none - total_cost(cost, solution.index) + solution.gap


def measure(n: int, dimension: int, seed: int, arguments: argparse.Namespace, device: torch.device) -> dict[str, Row]:
    """One seed: a row for each metric."""
    x0, noise = batch(n, dimension, seed, device)
    halves = x0.bfloat16(), noise.bfloat16()
    costs = {metric: cost_matrix(x0, noise, metric=metric, dtype="auto") for metric in METRICS}
    fast: dict[str, Callable[[], Any]] = {"bf16_product": lambda: bf16_product(*halves)}
    slow: dict[str, Callable[[], Any]] = {}
    for metric in METRICS:
        fast[f"cost {metric}"] = lambda metric=metric: cost_matrix(x0, noise, metric=metric, dtype="auto")
        fast[f"solve {metric}"] = lambda metric=metric: solve(costs[metric])
        fast[f"total {metric}"] = lambda metric=metric: assign(x0, noise, metric=metric)
        if n <= arguments.largest_scipy:
            slow[f"scipy_same {metric}"] = lambda metric=metric: scipy_on(costs[metric])
    row: Row = {}
    if n <= arguments.largest_scipy:
        raw = torch.cdist(x0, noise)
        slow |= {"cdist_scipy": lambda: cdist_scipy(x0, noise), "scipy_raw": lambda: scipy_on(raw), "exact_raw": lambda: exact(raw)}
        least = total_cost(raw, scipy_on(raw))
        row["exact_error"] = abs(total_cost(raw, exact(raw)) / least - 1)
    if n <= arguments.largest_broadcast or (n, dimension) == (1024, 3072):
        row["broadcast_scipy"] = milliseconds(lambda: broadcast_scipy(x0, noise), device)
    for name in fast:
        fast[name]()  # warm
    if n <= 1024:
        row |= interleaved(device, fast | slow, arguments.repeats)
    else:  # a turn of the slow ones takes seconds to minutes
        row |= interleaved(device, fast, arguments.repeats) | interleaved(device, slow, 1)

    rows = {}
    for metric in METRICS:
        distance = cost_matrix(x0, noise, metric=metric, dtype="float32")
        solution = certified_assignment(x0, noise, metric=metric)
        none = float(distance.double().mean()) * n
        kept = (none - total_cost(distance, solution.index)) / best_reduction(distance, none, arguments.largest_scipy)
        own = {name.removesuffix(f" {metric}"): value for name, value in row.items() if name.endswith(f" {metric}") or " " not in name}
        rows[metric] = own | {"kept": kept, "certified": solution.kept, "bids_per_row": solution.bids / n}
    return rows


def summary(n: int, dimension: int, metric: str, seeds: list[Row]) -> Row:
    """Medians of the times, the worst seed's shares and ratios."""
    row: Row = {"N": n, "D": dimension, "metric": metric}
    timed = ("cost", "solve", "total", "bf16_product", "exact_raw", "cdist_scipy", "broadcast_scipy", "scipy_raw", "scipy_same")
    row |= {f"{name}_ms": statistics.median(seed[name] for seed in seeds) for name in timed if name in seeds[0]}
    for name in ("kept", "certified"):
        row[f"{name}_worst"] = min(seed[name] for seed in seeds)
    row["bids_per_row"] = statistics.median(seed["bids_per_row"] for seed in seeds)
    row["bids_per_row_most"] = max(seed["bids_per_row"] for seed in seeds)
    ratios = {
        "cdist_scipy_over_total": ("cdist_scipy", "total"),
        "broadcast_scipy_over_total": ("broadcast_scipy", "total"),
        "scipy_over_solve": ("scipy_same", "solve"),
        "scipy_over_exact": ("scipy_raw", "exact_raw"),
        "bf16_product_over_solve": ("bf16_product", "solve"),
    }
    for name, (slow, quick) in ratios.items():
        if slow in seeds[0]:
            row[f"{name}_worst"] = min(seed[slow] / seed[quick] for seed in seeds)
    if "exact_error" in seeds[0]:
        row["exact_error_worst"] = max(seed["exact_error"] for seed in seeds)
    return row


def targets(rows: list[Row], device: torch.device, arguments: argparse.Namespace) -> list[str]:
    """A line for each part of each target: met or not by the worst seed, or what to run to measure it."""
    lines: list[str] = []
    found = {(row["N"], row["D"], row["metric"]): row for row in rows}

    def line(number: str, text: str, value: float | None, target: float, at_least: bool, needs: str) -> None:
        if value is None:
            lines.append(f"not measured  {number}. {text} (target {'>=' if at_least else '<='} {target:g}): {needs}")
        else:
            lines.append(verdict(f"{number}. {text}", value, target, at_least=at_least))

    on_cpu = device.type == "cpu"
    for metric in METRICS:
        row = found.get((1024, 3072, metric), {})
        needs = "run with --sizes 1024 --dimensions 3072" + ("" if on_cpu else " --device cpu")
        ratio = row.get if on_cpu else {}.get  # the ratios are of one CPU core
        for text, key, target in (
            ("times faster than cdist + scipy", "cdist_scipy_over_total_worst", 12),
            ("times faster than the broadcast reference", "broadcast_scipy_over_total_worst", 300),
        ):
            line("1", f"N=1024, D=3072, {metric}: total, {text}", ratio(key), target, True, needs)
        line("1", f"N=1024, D=3072, {metric}: share of its reduction kept", row.get("kept_worst"), 0.999, True, needs)
    for metric in METRICS:
        row = found.get((1024, 3072, metric), {})
        ratio = row.get if on_cpu else {}.get
        line("2", f"N=1024, {metric}: solve, times faster than scipy on the same matrix", ratio("scipy_over_solve_worst"), 40, True, needs)
    line("2", "N=1024: exact, times faster than scipy on the raw L2 matrix", ratio("scipy_over_exact_worst"), 2, True, needs)
    line("2", "N=1024: exact, relative distance from scipy's optimum", row.get("exact_error_worst"), 1e-9, False, needs)
    for metric in METRICS:
        row, small = found.get((16384, 3072, metric), {}), found.get((1024, 3072, metric), {})
        needs = "run with --sizes 1024 16384 --dimensions 3072"
        over = 1 / row["bf16_product_over_solve_worst"] if row and on_cpu else None
        line("3", f"N=16384, {metric}: solve, times the bf16 product of the same matrix", over, 0.3, False, needs)
        line("3", f"N=16384, {metric}: share of its reduction kept, at least", row.get("kept_worst"), 0.999, True, needs)
        bids = row["bids_per_row_most"] / small["bids_per_row"] if row and small else None
        line("3", f"N=16384, {metric}: most bids per row, times the median at N=1024", bids, 1.5, False, needs)
    lines.append("elsewhere     4. look-ahead, exposed overhead per step: scripts/benchmark_look_ahead.py")
    lines.append("elsewhere     9. adversarial inputs: tests/assignment/test_assignment.py")
    row = found.get((1024, 3072, "l2"), {})
    total = row.get("total_ms") if not on_cpu else None
    line("10", "N=1024, D=3072 on a GPU: total, ms", total, 2.5, False, "no GPU here" if on_cpu else needs)
    return lines


def verdict(text: str, value: float, target: float, *, at_least: bool) -> str:
    met = value >= target if at_least else value <= target
    return f"{'MET         ' if met else 'NOT MET     '}  {text}: {value:.6g} (target {'>=' if at_least else '<='} {target:g})"


def table(rows: list[Row], columns: dict[str, tuple[str, str]]) -> str:
    """Aligned text; ``columns`` are titles with a row's key and a format."""
    lines = ["  ".join(f"{title:>11}" for title in columns)]
    for row in rows:
        cells = (format(row[key], style) if row.get(key) is not None else "-" for key, style in columns.values())
        lines.append("  ".join(f"{cell:>11}" for cell in cells))
    return "\n".join(lines)


def write_csv(rows: list[Row], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows({key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()} for row in rows)


def extra_memory(n: int, dimension: int, metric: str, device: torch.device) -> float | None:
    """MiB that `assign` needs beside its inputs at its peak; None where it cannot be told."""
    if device.type == "cuda":
        x0, noise = torch.randn(n, dimension, device=device), torch.randn(n, dimension, device=device)
        assign(x0, noise, metric=metric)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        assign(x0, noise, metric=metric)
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    if not Path("/proc/self/clear_refs").exists():
        return None
    context = multiprocessing.get_context("fork")  # a child has all that is compiled, and a heap without holes
    here, there = context.Pipe()
    child = context.Process(target=_send_extra_memory, args=(n, dimension, metric, there))
    child.start()
    there.close()
    try:
        return here.recv()
    except EOFError:
        return None
    finally:
        child.join()


def _send_extra_memory(n: int, dimension: int, metric: str, pipe: Connection) -> None:
    def status(field: str) -> float:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
        return int(line.split()[1]) / 2**10

    x0, noise = torch.randn(n, dimension), torch.randn(n, dimension)
    assign(x0[:20], noise[:20], metric=metric)
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is resident now
    assign(x0, noise, metric=metric)
    pipe.send(status("VmHWM") - before)
    pipe.close()


def pin_to_one_core() -> None:
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def report(file: TextIO, text: str) -> None:
    print(text)
    print(text, file=file)


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=[64, 128, 256, 512, 1024, 2048, 4096], help="batch sizes N; 16384 on request"
    )
    parser.add_argument("--dimensions", type=int, nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help=f"how many of the declared seeds {SEEDS}")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--largest_scipy", type=int, default=2048, help="largest N at which scipy is run")
    parser.add_argument(
        "--largest_broadcast", type=int, default=256, help="largest N at which the broadcast reference is run; 1024 always is"
    )
    add_device(parser)
    parser.add_argument("--output_dir", type=Path, default=Path("benchmarks"), help="of the table (CSV), the plot and the printed text")
    arguments = parser.parse_args(argv)
    if not 1 <= arguments.seeds <= len(SEEDS) or arguments.repeats < 1 or min(arguments.sizes) < 2:
        raise UserError(f"--seeds must be from 1 to {len(SEEDS)}, --repeats at least 1 and --sizes at least 2")
    device = torch.device(arguments.device)
    if device.type == "cpu":
        pin_to_one_core()
    for n in (10, 150):  # imports and compiles both solvers
        assign(torch.randn(n, 64), torch.randn(n, 64))

    memory = {}  # first: forked processes start with what this one holds
    work = [(n, dimension) for dimension in arguments.dimensions for n in arguments.sizes]
    for n, dimension in tqdm(work, desc="memory", leave=False):
        for metric in METRICS:
            memory[n, dimension, metric] = extra_memory(n, dimension, metric, device)
    rows = []
    for n, dimension in tqdm(work, desc="benchmark", leave=False):
        seeds = [
            measure(n, dimension, seed, arguments, device) for seed in tqdm(SEEDS[: arguments.seeds], desc=f"{n}x{dimension}", leave=False)
        ]
        for metric in METRICS:
            row = summary(n, dimension, metric, [seed[metric] for seed in seeds])
            extra = memory[n, dimension, metric]
            if extra is not None:
                row |= {"extra_mib": extra, "extra_over_inputs": extra * 2**20 / (8 * n * dimension)}
            rows.append(row)

    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    ordinary = arguments.sizes == parser.get_default("sizes")
    stem = "_".join(["assignment", slug(device), *([] if ordinary else map(str, arguments.sizes))])
    path = arguments.output_dir / f"{stem}.txt"
    with path.open("w") as file:
        report(file, f"python scripts/benchmark_assignment.py {' '.join(argv)}".strip())
        report(file, f"{processor(device)}; {versions()}; operands of the cost in {fast_dtype(device)}")
        report(file, f"{arguments.seeds} seeds x {arguments.repeats} repeats; ms are medians, shares and targets the worst seed's\n")
        report(file, table(rows, COLUMNS) + "\n")
        report(file, "\n".join(targets(rows, device, arguments)))
    write_csv(rows, path.with_suffix(".csv"))
    plot(rows, path.with_suffix(".png"))
    print(f"\n{path}, {path.with_suffix('.csv').name}, {path.with_suffix('.png').name}")


def plot(rows: list[Row], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    dimensions = sorted({row["D"] for row in rows})
    figure, axes = pyplot.subplots(1, len(dimensions), figsize=(4.5 * len(dimensions), 4), squeeze=False, sharey=True)
    for axis, dimension in zip(axes[0], dimensions, strict=True):
        for name, label, style in (
            ("broadcast_scipy_ms", "fp16 broadcast + scipy (release)", "C3o-"),
            ("cdist_scipy_ms", "cdist + scipy (most trainers)", "C1o-"),
            ("exact_raw_ms", "exact solve alone", "C2s--"),
            ("total_ms", "total", "C0o-"),
            ("solve_ms", "solve alone", "C0s--"),
        ):
            points = [(row["N"], row[name]) for row in rows if row["D"] == dimension and row["metric"] == "l2" and name in row]
            if points:
                axis.loglog(*zip(*points, strict=True), style, label=label, base=10, markersize=4)
        axis.set(title=f"D = {dimension}", xlabel="batch size N")
        axis.set_xscale("log", base=2)
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("ms, L2")
    axes[0][0].legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=90)


if __name__ == "__main__":
    sys.exit(run_script(main))
