"""Images and noises to pair, and what a pairing is worth."""

from __future__ import annotations

import torch
from torch import Tensor

from immiscible.randomness import seeded_generator

SHAPE = (3, 8, 8)  # D = 192
ROWS = 64  # of the distances between all pairs that are held at once


def images_and_noises(n: int, *parts: int | str) -> tuple[Tensor, Tensor]:
    """Smooth pictures in [-1, 1] and standard normal noises, fp32 [n, 3, 8, 8] on the CPU; other ``parts`` give others."""
    generator = seeded_generator("gpu", n, *parts)
    coarse = torch.randn(n, 3, 2, 2, device="cpu", generator=generator)
    grain = torch.randn(n, *SHAPE, device="cpu", generator=generator)
    x0 = (0.5 * torch.nn.functional.interpolate(coarse, size=SHAPE[1:], mode="bilinear") + 0.2 * grain).clamp(-1, 1)
    return x0, torch.randn(n, *SHAPE, device="cpu", generator=generator)


def summed_distances(x0: Tensor, noise: Tensor, metric: str) -> Tensor:
    """The distances of all pairs by their definition, float64 [N, N] on the CPU."""
    images, noises = x0.cpu().double().flatten(1), noise.cpu().double().flatten(1)
    if metric == "l1":
        return torch.cat([torch.cdist(rows, noises, p=1) for rows in images.split(ROWS)])
    squared = images.square().sum(1, keepdim=True) + noises.square().sum(1) - 2 * images @ noises.T
    return squared if metric == "squared_l2" else squared.clamp(min=0).sqrt()


def paired_distance(x0: Tensor, noise: Tensor) -> float:
    """The summed distance of each image to its own noise, in float64."""
    return float((x0.cpu().double() - noise.cpu().double()).flatten(1).norm(dim=1).sum())


def assert_permutation(index: Tensor, n: int, device: torch.device) -> None:
    """``index`` is one, int64 on ``device``."""
    assert index.device == device and index.dtype == torch.int64
    assert torch.equal(index.cpu().sort().values, torch.arange(n, device="cpu"))


def row_of_each(paired: Tensor, noise: Tensor) -> Tensor:
    """Which row of ``noise`` each row of ``paired`` is, int64 [N] on the CPU; fails where one is none of them."""
    rows = {row.tobytes(): number for number, row in enumerate(noise.cpu().flatten(1).numpy())}
    return torch.tensor([rows[row.tobytes()] for row in paired.cpu().flatten(1).numpy()], device="cpu")
