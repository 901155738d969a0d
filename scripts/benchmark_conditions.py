#!/usr/bin/env python
"""What paired noise tells about the class, and what telling nothing costs in distance: every --coupling_condition in one table.

python scripts/benchmark_conditions.py
python scripts/benchmark_conditions.py --data digits emoji     # emoji: python scripts/make_emoji.py runs/emoji16 --side 16
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
from immiscible.data.loading import load_images
from immiscible.data.sources import ImageSource
from immiscible.data.transforms import ImageTransform
from immiscible.epoch import epoch_noise, plan_epoch
from immiscible.errors import UserError, run_script
from immiscible.evaluation.leakage import ClassLeak, bright_and_dark
from immiscible.randomness import seeded_generator

SEEDS = (0, 1, 2, 3, 4)
BATCH, WARM_UP = 256, 16  # images; batches before the measured ones, in which `centered` learns its means
EMOJI = Path("runs/emoji16/train")
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
EPOCHS = {"epoch, none": False, "epoch, within": True}  # all measured images at once; whether in their classes
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
    return batches_of(load_digits(), 8)


def emoji() -> Draw:
    """Batches of the emoji of scripts/make_emoji.py, nine classes, 16x16."""
    if not EMOJI.is_dir():
        raise UserError(f"{EMOJI} is not there: python scripts/make_emoji.py {EMOJI.parent} --side 16")
    return batches_of(load_images(train_data_dir=str(EMOJI), labels_for="the probes"), 16)


def batches_of(source: ImageSource, side: int) -> Draw:
    """Batches drawn from all images of a source."""
    transform = ImageTransform(side, source.channels)
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
    "emoji": ("emoji: 9 classes, D = 768", emoji),
}


def measure(coupling: Coupling, draw: Draw, seed: int, batches: int) -> dict[str, float]:
    """One seed's numbers; every coupling of a seed meets the same images and the same drawn noises."""
    generator, own = seeded_generator(seed, "images and noises"), seeded_generator(seed, "coupling")
    parts = []
    for number in range(WARM_UP + batches):
        x0, labels = draw(generator)
        drawn = torch.randn(x0.shape, generator=generator)
        paired = coupling(x0, drawn, labels=labels, generator=own)
        parts += [(x0, labels, drawn, paired)] if number >= WARM_UP else []
    return told(*map(torch.cat, zip(*parts, strict=True)))


def measure_epoch(within: bool, draw: Draw, seed: int, batches: int) -> dict[str, float]:
    """As `measure`, of the same images and a pool of an epoch's own."""
    generator = seeded_generator(seed, "images and noises")
    parts = []
    for number in range(WARM_UP + batches):
        x0, labels = draw(generator)
        torch.randn(x0.shape, generator=generator)
        parts += [(x0, labels)] if number >= WARM_UP else []
    x0, labels = map(torch.cat, zip(*parts, strict=True))
    plan = plan_epoch(x0, seed=seed, epoch=0, labels=labels if within else None)
    drawn, paired = (epoch_noise(numbers, *x0.shape[1:], seed=seed, epoch=0) for numbers in (torch.arange(len(x0)), plan))
    return told(x0, labels, drawn, paired)


def told(x0: Tensor, labels: Tensor, drawn: Tensor, paired: Tensor) -> dict[str, float]:
    """What the paired noises say of the classes, and how much nearer they are than those drawn."""
    leak = ClassLeak(capacity=len(x0))
    leak.add(paired, labels, x0)
    before, after = ((x0 - noise).flatten(1).norm(dim=1).double().sum() for noise in (drawn, paired))
    found = leak.result()
    return {
        "reduction": float(1 - after / before),
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
    parser.add_argument("--data", choices=DATA, nargs="+", default=[name for name in DATA if name != "emoji"])
    parser.add_argument("--batches", type=int, default=16, help=f"measured batches of {BATCH} images a seed, after {WARM_UP} of warm-up")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), help="medians and ranges over them are printed")
    parser.add_argument("--output_dir", type=Path, default=Path("benchmarks"), help="where conditions.md and conditions.csv are written")
    arguments = parser.parse_args(argv)
    if arguments.batches < 1:
        raise UserError(f"--batches must be at least 1, not {arguments.batches}")

    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    names = [*COUPLINGS, *EPOCHS]
    runs = [(data, coupling, seed) for data in arguments.data for coupling in names for seed in arguments.seeds]
    sources = {data: DATA[data][1]() for data in arguments.data}
    for data, name, seed in tqdm(runs, desc="conditions", unit="run"):
        if name in EPOCHS:
            result = measure_epoch(EPOCHS[name], sources[data], seed, arguments.batches)
        else:
            result = measure(build_coupling(**COUPLINGS[name]), sources[data], seed, arguments.batches)  # type: ignore[arg-type]
        found.setdefault((data, name), []).append(result)

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
        for name in names:
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
