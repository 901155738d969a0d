#!/usr/bin/env python
"""What paired noise tells about the class, and what telling nothing costs in distance: every --coupling_condition in one table.

python scripts/benchmark_conditions.py
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from immiscible.coupling import Coupling, build_coupling
from immiscible.data.bundled import load_digits
from immiscible.data.transforms import ImageTransform
from immiscible.errors import UserError, run_script
from immiscible.evaluation.leakage import ClassLeak, bright_and_dark
from immiscible.randomness import seeded_generator

SEEDS = (0, 1, 2, 3, 4)
BATCH, WARM_UP = 256, 16  # images; batches before the measured ones, in which `centered` learns its means
SHAPE = (3, 32, 32)  # of the toys: D = 3072

COUPLINGS: dict[str, dict[str, object]] = {
    "independent": {"name": "independent"},
    "assignment, none": {"name": "assignment"},
    "assignment, within": {"name": "assignment", "condition": "within"},
    "assignment, centered": {"name": "assignment", "condition": "centered"},
    "assignment, penalty, ratio 0.01": {"name": "assignment", "condition": "penalty"},
    "assignment, penalty, ratio 0.3": {"name": "assignment", "condition": "penalty", "condition_ratio": 0.3},
    "nearest of 8": {"name": "nearest", "candidates": 8},
}
MEASURES = {
    "reduction": "distance reduction",
    "accuracy": "class read from the noise, linear probe",
    "quadratic_accuracy": "quadratic probe",
    "chance": "chance",
    "largest_mean_shift": "largest mean shift (sd)",
}
PERCENT = ("reduction", "accuracy", "quadratic_accuracy", "chance")

Draw = Callable[[torch.Generator], tuple[Tensor, Tensor]]


def digits() -> Draw:
    """Batches of the bundled digits, ten classes, 8x8."""
    source = load_digits()
    transform = ImageTransform(8, source.channels)
    images = torch.stack([transform(source.load(index), 0, index) for index in range(len(source))])
    labels = torch.tensor([source.label(index) for index in range(len(source))])

    def draw(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        rows = torch.randperm(len(images), generator=generator)[:BATCH]
        return images[rows], labels[rows]

    return draw


def hundred_classes() -> Draw:
    """A toy where a batch holds two or three images of a class: smooth pictures about the smooth mean of one of 100 classes."""

    def smooth(images: int, generator: torch.Generator) -> Tensor:
        return torch.nn.functional.interpolate(torch.randn(images, SHAPE[0], 4, 4, generator=generator), SHAPE[1:], mode="bilinear")

    means = 0.4 * smooth(100, seeded_generator(0, "class means"))

    def draw(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        labels = torch.randint(100, (BATCH,), generator=generator)
        grain = 0.1 * torch.randn(BATCH, *SHAPE, generator=generator)
        return (means[labels] + 0.3 * smooth(BATCH, generator) + grain).clamp(-1, 1), labels

    return draw


DATA: dict[str, tuple[str, Callable[[], Draw]]] = {
    "bright_dark": ("bright and dark: 2 classes, D = 3072", lambda: lambda generator: bright_and_dark(BATCH, SHAPE, generator)),
    "digits": ("bundled digits: 10 classes, D = 64", digits),
    "hundred": ("smooth pictures: 100 classes, D = 3072", hundred_classes),
}


def measure(coupling: Coupling, draw: Draw, seed: int, batches: int) -> dict[str, float]:
    """One seed's numbers; every coupling of a seed meets the same images and the same drawn noises."""
    generator, own = seeded_generator(seed, "images and noises"), seeded_generator(seed, "coupling")
    leak, before, after = ClassLeak(capacity=batches * BATCH), 0.0, 0.0
    for number in range(WARM_UP + batches):
        x0, labels = draw(generator)
        drawn = torch.randn(x0.shape, generator=generator)
        paired = coupling(x0, drawn, labels=labels, generator=own)
        if number >= WARM_UP:
            leak.add(paired, labels, x0)
            before += float((x0 - drawn).flatten(1).norm(dim=1).sum())
            after += float((x0 - paired).flatten(1).norm(dim=1).sum())
    found = leak.result()
    return {
        "reduction": 1 - after / before,
        "accuracy": found["accuracy"],
        "quadratic_accuracy": found["quadratic_accuracy"],
        "chance": found["chance"],
        "largest_mean_shift": found["largest_mean_shift"],
    }


def cell(measure_name: str, values: Sequence[float]) -> str:
    """Median and range over the seeds."""
    scale, digits, unit = (100, 1, " %") if measure_name in PERCENT else (1, 2, "")
    digits = 2 if measure_name == "reduction" else digits
    middle, *ends = (f"{scale * value:.{digits}f}" for value in (statistics.median(values), min(values), max(values)))
    return f"{middle}{unit} ({ends[0]} to {ends[1]})" if len(values) > 1 else f"{middle}{unit}"


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=DATA, nargs="+", default=list(DATA))
    parser.add_argument("--batches", type=int, default=16, help=f"measured batches of {BATCH} images a seed, after {WARM_UP} of warm-up")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), help="medians and ranges over them are printed")
    parser.add_argument("--output_dir", type=Path, default=Path("benchmarks"), help="where conditions.md and conditions.csv are written")
    arguments = parser.parse_args(argv)
    if arguments.batches < 1:
        raise UserError(f"--batches must be at least 1, not {arguments.batches}")

    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    runs = [(data, coupling, seed) for data in arguments.data for coupling in COUPLINGS for seed in arguments.seeds]
    sources = {data: DATA[data][1]() for data in arguments.data}
    for data, name, seed in tqdm(runs, desc="conditions", unit="run"):
        built = build_coupling(**COUPLINGS[name])  # type: ignore[arg-type]
        found.setdefault((data, name), []).append(measure(built, sources[data], seed, arguments.batches))

    lines = [
        "# What paired noise tells about the class",
        "",
        f"`python scripts/benchmark_conditions.py --data {' '.join(arguments.data)} --batches {arguments.batches} "
        f"--seeds {' '.join(map(str, arguments.seeds))}`: batches of {BATCH}, {arguments.batches * BATCH} images a seed after {WARM_UP} "
        f"batches of warm-up, median (range) over {len(arguments.seeds)} seeds, torch {torch.__version__}.",
        "",
        "The probes are those of `immiscible.class_leak`, held out: the linear one reads the noise's mean along the classes' mean images, "
        "the quadratic one also its scatter in the directions in which images differ most. The mean shift is the largest over classes; "
        "what independent noise shows is sampling error. Distance reduction is of the mean L2 distance between image and noise.",
    ]
    for data in arguments.data:
        title = DATA[data][0]
        lines += ["", f"## {title[0].upper()}{title[1:]}", "", f"| coupling | {' | '.join(MEASURES.values())} |", "|---" * 6 + "|"]
        for name in COUPLINGS:
            cells = [cell(each, [run[each] for run in found[data, name]]) for each in MEASURES]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    text = "\n".join(lines) + "\n"
    print(text)
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    (arguments.output_dir / "conditions.md").write_text(text)
    with (arguments.output_dir / "conditions.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["data", "coupling", "seed", *MEASURES])
        for (data, name), values in found.items():
            for seed, run in zip(arguments.seeds, values, strict=True):
                writer.writerow([data, name, seed, *(f"{run[each]:.6f}" for each in MEASURES)])


if __name__ == "__main__":
    sys.exit(run_script(main))
