#!/usr/bin/env python
"""Table 3 of Immiscible Diffusion, measured: how much assignment shortens the mean image-noise distance, and what it costs.

python scripts/benchmark_distance.py
python scripts/benchmark_distance.py --dtypes bfloat16 float16 int8 float8     # beside it, what quantized costs keep of the reduction
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence

import torch
from tqdm import tqdm

from immiscible.assignment.costs import COST_DTYPES, METRICS, cost_matrix
from immiscible.assignment.solve import SOLVERS, assign
from immiscible.data.bundled import PhotoCrops, load_digits
from immiscible.data.transforms import ImageTransform
from immiscible.errors import UserError, run_script
from immiscible.randomness import seeded_generator

PAPER = {128: (1.93, 5.4), 256: (2.16, 6.7), 512: (2.32, 8.8), 1024: (2.44, 22.8)}  # reduction in %, ms on an A6000


def shares_kept(x0: torch.Tensor, noise: torch.Tensor, metric: str, dtypes: Sequence[str]) -> list[float]:
    """What the best permutation by each quantized cost keeps of the reduction of the summed distance, from the mean over all pairings."""
    if not dtypes:
        return []
    distance = cost_matrix(x0, noise, metric=metric).double()  # up to constants
    rows = torch.arange(len(x0))

    def reduction(dtype: str) -> float:
        index = assign(x0, noise, metric=metric, dtype=dtype, solver="exact")
        return float(len(x0) * distance.mean() - distance[rows, index].sum())

    best = reduction("float32")
    return [reduction(dtype) / best for dtype in dtypes]


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=("photo_crops", "digits"), default="photo_crops")
    parser.add_argument("--resolution", type=int, default=32, help="side of the photo crops; 32 gives D = 3072 as CIFAR-10")
    parser.add_argument("--metric", choices=METRICS, default="l2")
    parser.add_argument("--solver", choices=SOLVERS, default="auto")
    parser.add_argument(
        "--dtypes",
        choices=COST_DTYPES[1:],
        nargs="+",
        default=[],
        help="print too which share of the least distance's reduction each keeps, solved exactly, in the worst batch",
    )
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=list(PAPER))
    parser.add_argument("--repeats", type=int, default=5, help="batches per size; medians are printed")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)

    if arguments.repeats < 1 or min(arguments.batch_sizes) < 2:
        raise UserError("--repeats must be at least 1 and --batch_sizes at least 2")
    source = load_digits() if arguments.data == "digits" else PhotoCrops(arguments.resolution)
    transform = ImageTransform(8 if arguments.data == "digits" else arguments.resolution, source.channels)
    if max(arguments.batch_sizes) > len(source):
        raise UserError(f"--batch_sizes {max(arguments.batch_sizes)} exceeds the {len(source)} images of {arguments.data}")
    needed = min(len(source), 4 * max(arguments.batch_sizes))
    images = torch.stack([transform(source.load(i), 0, i) for i in tqdm(range(needed), desc="images", leave=False)])
    generator = seeded_generator(arguments.seed, "benchmark")

    print(
        f"{arguments.data}, D = {images[0].numel()}, pixel std {images.std():.3f}, metric {arguments.metric}, solver {arguments.solver}, "
        f"median of {arguments.repeats}"
    )
    quantized_titles = "".join(f"  {dtype + ' keeps':>14}" for dtype in arguments.dtypes)
    print(f"{'N':>5}  {'distance reduction':>18}  {'paper, CIFAR-10':>15}  {'assignment':>10}  {'paper, A6000':>12}" + quantized_titles)
    for n in arguments.batch_sizes:
        reductions, seconds, kept = [], [], []
        for _ in range(arguments.repeats):
            x0 = images[torch.randperm(len(images), generator=generator)[:n]]
            noise = torch.randn(x0.shape, generator=generator)
            start = time.perf_counter()
            index = assign(x0, noise, metric=arguments.metric, solver=arguments.solver)
            seconds.append(time.perf_counter() - start)
            before, after = ((x0 - pool).flatten(1).norm(dim=1).mean() for pool in (noise, noise[index]))
            reductions.append(float(1 - after / before))
            kept.append(shares_kept(x0, noise, arguments.metric, arguments.dtypes))
        paper_reduction, paper_ms = (f"{value}" for value in PAPER[n]) if n in PAPER else ("", "")
        print(
            f"{n:>5}  {100 * statistics.median(reductions):>16.2f} %  {paper_reduction:>13} %  "
            f"{1000 * statistics.median(seconds):>7.1f} ms  {paper_ms:>9} ms"
            + "".join(f"  {100 * min(shares):>12.3f} %" for shares in zip(*kept, strict=True))
        )
    energy = torch.linalg.svdvals(images.flatten(1) - images.flatten(1).mean(0)).square()
    print(
        f"Why the level differs from the paper's: the reduction grows with |x| and with the number of directions in which images differ. "
        f"Here |x| / sqrt(D) = {images.flatten(1).norm(dim=1).mean() / images[0].numel() ** 0.5:.2f} and one direction holds "
        f"{100 * energy[0] / energy.sum():.0f} % of the variance; it is another data set than CIFAR-10, and times are of this machine."
    )


if __name__ == "__main__":
    sys.exit(run_script(main))
