#!/usr/bin/env python
"""Draws what a Frechet distance owes to the number of images, for each feature network, on real images.

Images that no model touched are held against a reference, more and more of them; and the same images without their finest detail, as a
difference that is there. Where the two lines are apart by less than the first one falls, the number of images says more than the images.

python scripts/make_emoji.py runs/emoji16 --side 16
python scripts/plot_sample_count.py --reference runs/emoji16/train --images runs/emoji16/held_out --side 16 --output docs/sample_count.png
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate
from tqdm import tqdm

from immiscible.errors import UserError, run_script
from immiscible.evaluation.features import FeatureNetwork, PrincipalDirections, build_features
from immiscible.evaluation.frechet import FrechetDistance
from immiscible.evaluation.real_images import open_real
from immiscible.randomness import seeded_generator


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", required=True, help="real images: a folder as --train_data_dir takes it, bundled data, or an .npz")
    parser.add_argument("--images", required=True, help="others of the same kind, of which more and more are taken")
    parser.add_argument("--side", type=int, required=True, help="to which all are brought, in pixels")
    parser.add_argument(
        "--features", nargs="+", default=["pixels", "efficientnet:64", "efficientnet"], help="networks, as NAME or NAME:DIRECTIONS"
    )
    parser.add_argument("--counts", nargs="+", type=int, default=[64, 128, 256, 512, 1024, 2048, 3500])
    parser.add_argument("--draws", type=int, default=5, help="subsets of each size, of which the median is drawn")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("sample_count.png"))
    arguments = parser.parse_args(argv)

    reference, images = (
        pixels(name, f"--{flag}", arguments.side) for flag, name in (("reference", arguments.reference), ("images", arguments.images))
    )
    if not 2 <= min(arguments.counts) <= max(arguments.counts) <= len(images):
        raise UserError(f"--counts must be from 2 to the number of --images, {len(images)}, not {' '.join(map(str, arguments.counts))}")
    if arguments.draws < 1:
        raise UserError(f"--draws must be at least 1, not {arguments.draws}")
    coarse = interpolate(avg_pool2d(images.float(), 2), scale_factor=2, mode="nearest").round().to(torch.uint8)
    subsets = {
        count: [
            torch.randperm(len(images), generator=seeded_generator(arguments.seed, "subset", count, draw))[:count]
            for draw in range(arguments.draws)
        ]
        for count in sorted(set(arguments.counts))
    }
    sets = {"reference": reference, "real images": images, "without their finest detail": coarse}
    seen: dict[str, dict[str, Tensor]] = {}
    found = {}
    for name, directions in map(network_asked, arguments.features):
        network: Any = build_features(name, channels=3, resolution=arguments.side, device=torch.device("cpu"))
        if name not in seen:
            seen[name] = {kind: told(network, each) for kind, each in sets.items()}
        features = seen[name]
        if directions:
            network = PrincipalDirections(network, features["reference"], directions)
            features = {kind: network.along(each) for kind, each in features.items()}
        distance = FrechetDistance(network.name, features["reference"])
        found[network.name] = {
            kind: {
                count: [distance(features[kind][rows]) for rows in draws]
                for count, draws in tqdm(subsets.items(), desc=network.name, leave=False, delay=2, disable=None)
            }
            for kind in list(sets)[1:]
        }
        print(f"{network.name} ({network.num_features} features)")
        for kind, distances in found[network.name].items():
            print(f"  {kind}: " + ", ".join(f"{count} {median(values):.4g}" for count, values in distances.items()))
    draw(found, len(reference), arguments.output)
    print(f"picture in {arguments.output}")


def pixels(name: str, flag: str, side: int) -> Tensor:
    """uint8 [N, 3, side, side] of what ``flag`` names."""
    files = open_real(name, flag, side=side, channels=3).images
    if files is None:
        raise UserError(f"{flag} {name} holds statistics; the images themselves are needed")
    return torch.cat([part.images for part in files.parts()])


def network_asked(words: str) -> tuple[str, int]:
    """The network's name and, after a colon, how many of its principal directions; 0 for all features."""
    name, _, directions = words.partition(":")
    if directions and not (directions.isdecimal() and int(directions)):
        raise UserError(f"--features {words}: after the colon goes a number of directions, such as {name}:64")
    return name, int(directions or 0)


def told(network: FeatureNetwork, images: Tensor) -> Tensor:
    """The network's features, float64 [N, F]."""
    batches = images.split(64)
    return torch.cat([network(batch) for batch in tqdm(batches, desc=network.name, leave=False, delay=2, disable=None)])


def draw(found: dict[str, dict[str, dict[int, list[float]]]], reference: int, output: Path) -> None:
    """One panel a network, of both kinds of images; the lines are medians, the bands go from the least to the greatest."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(found), figsize=(4.4 * len(found), 4.2), squeeze=False)
    for axis, (name, kinds) in zip(axes[0], found.items(), strict=True):
        for (kind, distances), color, marker in zip(kinds.items(), ("#0072b2", "#d55e00"), "ox", strict=True):
            counts = list(distances)
            axis.fill_between(counts, [min(distances[n]) for n in counts], [max(distances[n]) for n in counts], color=color, alpha=0.2)
            axis.plot(counts, [median(distances[n]) for n in counts], color=color, marker=marker, label=kind)
        axis.set_xscale("log", base=2)
        axis.set_xticks(counts, map(str, counts), rotation=45)
        axis.set_yscale("log")
        axis.set_title(name)
        axis.set_xlabel("images")
    axes[0][0].set_ylabel(f"distance from {reference:,} others")
    axes[0][0].legend()
    figure.suptitle("The same images, counted: a Frechet distance falls with their number")
    figure.tight_layout()
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=110)


if __name__ == "__main__":
    sys.exit(run_script(main))
