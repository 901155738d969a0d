"""The linear-assignment engine: which noise of a batch goes with which image.

The problem: for N images and N noises find the permutation that minimizes the summed distance,
``min over permutations p of sum_i d(x0[i], noise[p[i]])`` (Immiscible Diffusion, algorithm 1). Adding a constant to a row or a
column of the cost changes no minimizer, so costs are centered before they are solved: the solver then works on the part that
matters, two to three times faster, and nothing is lost to rounding large offsets.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import UserError

METRICS = ("l2", "squared_l2", "l1")
COST_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def assign(x0: Tensor, noise: Tensor, *, metric: str = "l2", dtype: str = "float32") -> Tensor:
    """The permutation of ``noise`` whose summed distance to ``x0`` is least; pair with ``noise[index]``.

    Args:
        x0: images or latents [N, ...], floating point, any device.
        noise: one noise per image, of the same shape and device.
        metric: ``l2`` (the paper's distance), ``squared_l2`` or ``l1`` (the paper's ablation).
        dtype: the precision in which images and noises enter the cost (the paper's quantized assignment uses float16); the
            cost itself is accumulated and solved in full precision.

    Returns:
        int64 [N] on x0's device: image i goes with ``noise[index[i]]``. Every noise is used exactly once.

    Raises:
        UserError: shapes or devices differ, an unknown metric or dtype, or a NaN or infinite row (named).
    """
    _check(x0, noise, metric, dtype)
    return solve(cost_matrix(x0, noise, metric=metric, dtype=dtype)).to(x0.device)


def cost_matrix(x0: Tensor, noise: Tensor, *, metric: str = "l2", dtype: str = "float32") -> Tensor:
    """The cost of pairing image i with noise j, up to row and column constants: fp32 [N, N] on the inputs' device.

    ``squared_l2`` is one matrix product, since ``|x - n|^2 = |x|^2 + |n|^2 - 2 x.n`` and only ``-2 x.n`` differs within a row and
    within a column; ``l2`` is the square root of all three terms; ``l1`` is `torch.cdist`.
    """
    images = x0.flatten(1).to(COST_DTYPES[dtype])  # [N, D]
    noises = noise.flatten(1).to(COST_DTYPES[dtype])  # [N, D]
    if metric == "l1":
        return torch.cdist(images.float(), noises.float(), p=1)
    product = (images @ noises.T).float()
    if metric == "squared_l2":
        return product.mul_(-2)
    squared = images.float().square().sum(1, keepdim=True) + noises.float().square().sum(1) - 2 * product
    return squared.clamp_(min=0).sqrt_()


def solve(cost: Tensor) -> Tensor:
    """The exact minimizer of ``sum_i cost[i, index[i]]`` over permutations, by scipy on the centered cost: int64 [N] on the CPU."""
    from scipy.optimize import linear_sum_assignment

    centered = cost.double()
    centered = centered - centered.mean(1, keepdim=True)
    centered -= centered.mean(0)
    _, columns = linear_sum_assignment(centered.cpu().numpy())
    return torch.from_numpy(columns)


def _check(x0: Tensor, noise: Tensor, metric: str, dtype: str) -> None:
    if metric not in METRICS:
        raise UserError(f"--coupling_metric {metric!r} is unknown; known: {', '.join(METRICS)}")
    if dtype not in COST_DTYPES:
        raise UserError(f"--coupling_dtype {dtype!r} is unknown; known: {', '.join(COST_DTYPES)}")
    if x0.shape != noise.shape or x0.device != noise.device:
        raise UserError(
            f"images and noises must agree in shape and device: {tuple(x0.shape)} on {x0.device}, {tuple(noise.shape)} on {noise.device}"
        )
    for name, rows in (("image", x0), ("noise", noise)):
        finite = torch.isfinite(rows.flatten(1)).all(1)
        if not finite.all():
            raise UserError(f"{name} {int((~finite).nonzero()[0])} of the batch holds NaN or infinite values; it has no distance")
