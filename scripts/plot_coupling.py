#!/usr/bin/env python
"""Draws which noise belongs to which image: the pairs of one batch of digits, in the plane in which the digits differ most.

python scripts/plot_coupling.py --output docs/coupling.png
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from immiscible.coupling import COUPLINGS, build_coupling
from immiscible.data.bundled import load_digits
from immiscible.data.transforms import ImageTransform
from immiscible.errors import UserError, run_script
from immiscible.randomness import seeded_generator


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--noise_coupling", nargs="+", choices=COUPLINGS, default=["independent", "assignment"])
    parser.add_argument("--batch", type=int, default=256, help="images paired together")
    parser.add_argument("--shown", type=int, default=48, help="pairs drawn")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("coupling.png"))
    arguments = parser.parse_args(argv)
    if arguments.batch < 2:
        raise UserError(f"--batch must be at least 2, not {arguments.batch}")
    if not 1 <= arguments.shown <= arguments.batch:
        raise UserError(f"--shown must be from 1 to --batch, {arguments.batch}, not {arguments.shown}")

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    source, generator = load_digits(), seeded_generator(arguments.seed, "plot")
    transform = ImageTransform(8, 1)
    chosen = torch.randperm(len(source), generator=generator)[: arguments.batch].tolist()
    x0 = torch.stack([transform(source.load(i), 0, i) for i in chosen])
    noise = torch.randn(x0.shape, generator=generator)
    center = x0.flatten(1).mean(0)
    plane = torch.linalg.svd(x0.flatten(1) - center, full_matrices=False).Vh[:2].T  # [D, 2]

    figure, axes = pyplot.subplots(
        1, len(arguments.noise_coupling), figsize=(5.2 * len(arguments.noise_coupling), 5), squeeze=False, sharey=True
    )
    for axis, name in zip(axes[0], arguments.noise_coupling, strict=True):
        paired = build_coupling(name)(x0, noise, generator=seeded_generator(arguments.seed, "coupling"))
        ends = [(tensor.flatten(1)[: arguments.shown] - center) @ plane for tensor in (x0, paired)]
        for start, end in zip(*ends, strict=True):
            axis.plot(*zip(start.tolist(), end.tolist(), strict=True), color="0.75", linewidth=0.8, zorder=1)
        axis.scatter(*ends[0].T, s=22, color="#0072b2", label="image", zorder=2)
        axis.scatter(*ends[1].T, s=22, color="#d55e00", marker="x", label="its noise", zorder=2)
        distance = (x0 - paired).flatten(1).norm(dim=1).mean()
        axis.set_title(f"{name}\nmean distance {distance:.2f}")
        axis.set_xlabel("first principal component of the digits")
        axis.legend(loc="upper right")
    axes[0][0].set_ylabel("second principal component")
    figure.suptitle(f"{arguments.shown} of {arguments.batch} pairs of digits (8x8) and noise")
    figure.tight_layout()
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.output, dpi=110)
    print(f"{arguments.output}: {arguments.shown} pairs under {', '.join(arguments.noise_coupling)}")


if __name__ == "__main__":
    sys.exit(run_script(main))
