#!/usr/bin/env python
"""The best of k noises per image: what the exact O(D + k) sampler saves against drawing all k noises.

python scripts/benchmark_nearest.py
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence

import torch
from benchmark_device import milliseconds, processor
from torch import Tensor

from immiscible.coupling import SCORES, TYPICAL_LENGTH, NearestCoupling
from immiscible.errors import run_script
from immiscible.randomness import seeded_generator

TARGET = 40  # times faster than the quicker of the two ways to draw all candidates


def streaming(x0: Tensor, candidates: int, score: str, generator: torch.Generator) -> Tensor:
    """Candidates one after another, of which the best so far is kept: memory of two batches."""
    best = torch.randn(x0.shape, device=x0.device, generator=generator)
    best_cost = cost(x0, best, score)
    for _ in range(candidates - 1):
        rival = torch.randn(x0.shape, device=x0.device, generator=generator)
        rival_cost = cost(x0, rival, score)
        better = rival_cost < best_cost
        best_cost = torch.where(better, rival_cost, best_cost)
        best = torch.where(better[:, None], rival, best)
    return best


def cost(x0: Tensor, noise: Tensor, score: str) -> Tensor:
    return -(x0 * noise).sum(1) if score == "dot" else noise.square().sum(1) - 2 * (x0 * noise).sum(1)


def broadcast(x0: Tensor, candidates: int, score: str, generator: torch.Generator, rows: int) -> Tensor:
    """All candidates of ``rows`` images at a time, [rows, k, D], scored in half precision as the papers' code does."""
    chosen = []
    for images in x0.split(rows):
        pool = torch.randn(len(images), candidates, x0.shape[1], device=x0.device, generator=generator)
        halves = pool.half()
        if score == "dot":
            costs = -(images.half()[:, None] * halves).float().sum(2)
        else:
            costs = torch.linalg.vector_norm(images.half()[:, None] - halves, dim=2)
        chosen.append(pool[torch.arange(len(images), device=x0.device), costs.argmin(1)])
    return torch.cat(chosen)


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--dimensions", type=int, nargs="+", default=[3072, 4096])
    parser.add_argument("--candidates", type=int, default=64)
    parser.add_argument("--score", choices=SCORES, default="l2")
    parser.add_argument("--chunk_rows", type=int, default=32, help="images whose candidates the broadcast reference holds at once")
    parser.add_argument("--repeats", type=int, default=7, help="rounds in which every way runs once; medians are printed")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)

    device = torch.device(arguments.device)
    name = processor(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} thread(s)"
    k, score = arguments.candidates, arguments.score
    print(f"B = {arguments.batch_size}, k = {k}, score {score}, medians of {arguments.repeats} interleaved rounds, {name}")
    for dimension in arguments.dimensions:
        generator = seeded_generator(arguments.seed, "benchmark", dimension, device=device)
        x0 = TYPICAL_LENGTH * torch.randn(arguments.batch_size, dimension, device=device, generator=generator)
        noise = torch.randn(x0.shape, device=device, generator=generator)
        coupling = NearestCoupling(k, score)
        ways: dict[str, Callable[[], Tensor]] = {
            "all k, streaming": lambda x0=x0, g=generator: streaming(x0, k, score, g),
            "all k, [B,k,D] in chunks": lambda x0=x0, g=generator: broadcast(x0, k, score, g, arguments.chunk_rows),
            "exact sampler, its own first noise": lambda x0=x0, g=generator, pick=coupling: pick(x0, generator=g),
            "exact sampler, first noise given": lambda x0=x0, n=noise, g=generator, pick=coupling: pick(x0, n, generator=g),
            "one noise alone": lambda x0=x0, g=generator: torch.randn(x0.shape, device=device, generator=g),
        }
        times: dict[str, list[float]] = {way: [] for way in ways}
        for round_ in range(arguments.repeats + 1):
            order = list(ways)[round_ % len(ways) :] + list(ways)[: round_ % len(ways)]  # so that no way always follows the same one
            for way in order:
                elapsed = milliseconds(ways[way], device)
                if round_:  # the first warms up
                    times[way].append(elapsed)
        medians = {way: statistics.median(values) for way, values in times.items()}
        print(f"\nD = {dimension}")
        for way, median in medians.items():
            print(f"  {way:<36}{median:>10.2f} ms")
        exact, given = medians["exact sampler, its own first noise"], medians["exact sampler, first noise given"]
        stream, chunks = medians["all k, streaming"], medians["all k, [B,k,D] in chunks"]
        for what, fast in (("with its own first noise", exact), ("first noise given, as a training step does", given)):
            ratio = min(stream, chunks) / fast
            verdict = "met" if ratio >= TARGET else "NOT met"
            print(
                f"  drawing {k} noises / exact sampler, {what}: {ratio:.1f}x (chunks {chunks / fast:.1f}x), target >= {TARGET}x: {verdict}"
            )


if __name__ == "__main__":
    sys.exit(run_script(main))
