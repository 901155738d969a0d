"""The linear-assignment engine: which noise of a batch goes with which image.

The problem: for N images and N noises find the permutation that minimizes the summed distance,
``min over permutations p of sum_i d(x0[i], noise[p[i]])`` (Immiscible Diffusion, algorithm 1). Adding a constant to a row or a
column of the cost changes no minimizer, so costs are centered before they are solved: the solver then works on the part that
matters, and nothing is lost to rounding large offsets. Time is one matrix product, O(N^2 D), plus a solve of about 10 N^2 integer
operations; memory is O(N^2), never O(N^2 D).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy
import torch
from torch import Tensor

from .errors import UserError

METRICS = ("l2", "squared_l2", "l1")
SOLVERS = ("auto", "exact", "auction")
COST_DTYPES = ("auto", "float32", "float16", "bfloat16")
EXACT_BELOW = 128  # where scipy takes less than a millisecond
LARGEST_BLOCK = 16384  # its cost fills 2 GiB; pairing within blocks of this size keeps nearly all of the reduction
EPSILON = 0.024  # of the cost's standard deviation: about 1 % of what a pair gains, and far less is lost
BIDS_PER_ROW = 200  # ten times what an ordinary batch needs


@dataclass(frozen=True)
class Assignment:
    """A solved assignment with its certificate.

    Args:
        index: int64 [N] on the images' device: image i goes with ``noise[index[i]]``.
        gap: how far the summed cost can at most be from the least one, in the cost's units (the distance's, or the square's); 0 for the
            exact solver.
        kept: a lower bound on the share of the achievable reduction that is kept, the mean over all pairings counting as no reduction.
        bids: of the auction; 0 for the exact solver.
        relaxations: how often the auction met its cap and went on with four times the epsilon.
    """

    index: Tensor
    gap: float
    kept: float
    bids: int
    relaxations: int


def assign(x0: Tensor, noise: Tensor, *, metric: str = "l2", dtype: str = "auto", solver: str = "auto") -> Tensor:
    """The permutation of ``noise`` whose summed distance to ``x0`` is least; pair with ``noise[index]``.

    Args:
        x0: images or latents [N, ...], floating point, any device.
        noise: one noise per image, of the same shape and device.
        metric: ``l2`` (the paper's distance), ``squared_l2`` or ``l1`` (the paper's ablation).
        dtype: the precision in which images and noises enter the cost (the paper's quantized assignment uses float16); ``auto`` is
            bfloat16 for the auction where the device multiplies it fast, else float32. Inner products come out in this precision, which
            moves the reduction by less than 0.01 %; the rest is done in fp32 or better.
        solver: ``exact``; ``auction``, which keeps more than 99.9 % of the reduction on images; ``auto`` is exact below
            `EXACT_BELOW` images. Above `LARGEST_BLOCK` images blocks of that size are solved apart.

    Returns:
        int64 [N] on x0's device: image i goes with ``noise[index[i]]``. Every noise is used exactly once.

    Raises:
        UserError: shapes or devices differ, an unknown name, or a NaN or infinite row (named).
    """
    _check(x0, noise, metric, dtype, solver)
    pairs = zip(x0.split(LARGEST_BLOCK), noise.split(LARGEST_BLOCK), range(0, len(x0), LARGEST_BLOCK), strict=True)
    blocks = [_solve_pairs(images, noises, metric, dtype, solver).index + first for images, noises, first in pairs]
    return torch.cat(blocks) if len(blocks) > 1 else blocks[0]


def certified_assignment(x0: Tensor, noise: Tensor, *, metric: str = "l2", dtype: str = "auto", solver: str = "auto") -> Assignment:
    """As `assign`, for at most `LARGEST_BLOCK` images, with a certificate of how far from the least cost the result can be.

    Raises:
        UserError: as `assign`, or too many images.
    """
    _check(x0, noise, metric, dtype, solver)
    if len(x0) > LARGEST_BLOCK:
        raise UserError(f"a certificate needs all costs at once: at most {LARGEST_BLOCK} images, not {len(x0)}")
    return _solve_pairs(x0, noise, metric, dtype, solver)


def cost_matrix(x0: Tensor, noise: Tensor, *, metric: str = "l2", dtype: str = "float32") -> Tensor:
    """The cost of pairing image i with noise j, up to row and column constants: fp32 [N, M] on the inputs' device.

    ``squared_l2`` is one matrix product, since ``|x - n|^2 = |x|^2 + |n|^2 - 2 x.n`` and only ``-2 x.n`` differs within a row and
    within a column; ``l2`` is the square root of all three terms; ``l1`` is `torch.cdist`.

    Args:
        x0: [N, ...].
        noise: [M, ...], of the same elements and device.
        metric: as in `assign`.
        dtype: as in `assign`; ``auto`` as for the auction.
    """
    precision = getattr(torch, fast_dtype(x0.device) if dtype == "auto" else dtype)
    images, noises = x0.flatten(1).to(precision), noise.flatten(1).to(precision)  # [N, D], [M, D]
    if metric == "l1":
        return torch.cdist(images.float(), noises.float(), p=1)
    product = (images @ noises.T).float()
    if metric == "squared_l2":
        return product.mul_(-2)
    squares = images.float().square().sum(1, keepdim=True), noises.float().square().sum(1)
    return product.mul_(-2).add_(squares[0]).add_(squares[1]).clamp_(min=0).sqrt_()


def fast_dtype(device: torch.device) -> str:
    """The dtype in which this device multiplies matrices fastest without losing the assignment: bfloat16 where the hardware has it."""
    if device.type == "cuda":
        return "bfloat16"
    capabilities = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return "bfloat16" if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else "float32"


def solve(cost: Tensor, *, solver: str = "auto") -> Assignment:
    """Minimizes ``sum_i cost[i, index[i]]`` over permutations.

    ``exact`` is scipy's shortest augmenting paths on costs reduced by an auction's prices, which changes no minimizer and leaves it
    little to do. ``auction`` is a fixed-point Gauss-Seidel auction from zero prices with one epsilon, taken from the cost's spread; at
    `BIDS_PER_ROW` bids a row epsilon is multiplied by four and the solve goes on from its prices.

    Args:
        cost: fp32 [N, N], any device, finite.
        solver: one of `SOLVERS`.
    """
    n = len(cost)
    chosen = ("exact" if n < EXACT_BELOW else "auction") if solver == "auto" else solver
    if chosen == "exact":
        return _exact(cost.cpu().double().numpy(), cost.device)
    if cost.device.type == "cpu":
        return _auction(cost.float().contiguous().numpy(), cost.device)[0]
    # Half the bytes cross the bus; centered and scaled first, so that nothing is lost to offsets.
    centered = cost - cost.mean(1, keepdim=True)
    centered -= centered.mean(0)
    unit = centered.std().clamp(min=1e-30)
    solution = _auction((centered / unit).half().cpu().float().numpy(), cost.device)[0]
    return replace(solution, gap=solution.gap * float(unit))


def _solve_pairs(x0: Tensor, noise: Tensor, metric: str, dtype: str, solver: str) -> Assignment:
    if len(x0) == 1:
        return Assignment(torch.zeros(1, dtype=torch.int64, device=x0.device), 0.0, 1.0, 0, 0)
    exact = solver == "exact" or (solver == "auto" and len(x0) < EXACT_BELOW)
    cost = cost_matrix(x0.detach(), noise, metric=metric, dtype="float32" if dtype == "auto" and exact else dtype)
    if not torch.isfinite(cost).all():
        largest = float(x0.abs().max())
        raise UserError(
            f"pair distances overflow: an image holds values up to {largest:.3g}; scale the data, or use --coupling_dtype float32"
        )
    return solve(cost, solver=solver)


def _exact(cost: numpy.ndarray, device: torch.device) -> Assignment:
    from scipy.optimize import linear_sum_assignment

    reduced = cost - cost.mean(1, keepdims=True)
    reduced -= reduced.mean(0)
    if len(cost) >= EXACT_BELOW:
        reduced += _auction(reduced.astype(numpy.float32), device)[1]
        reduced -= reduced.min(1, keepdims=True)
    return Assignment(torch.from_numpy(linear_sum_assignment(reduced)[1]).to(device), 0.0, 1.0, 0, 0)


def _auction(cost: numpy.ndarray, device: torch.device) -> tuple[Assignment, numpy.ndarray]:
    """The assignment of a centered fp32 cost (or one that may be), and each column's price in its units, float64 [N]."""
    from .auction import BLOCK, SPREAD, auction, fixed_point, primal_and_dual

    n = len(cost)
    fixed = numpy.empty((n, -(-n // BLOCK) * BLOCK), numpy.int32)
    scale = fixed_point(cost, fixed)
    prices, owner = numpy.zeros(fixed.shape[1], numpy.int32), numpy.full(fixed.shape[1], -1, numpy.int32)
    index = numpy.full(n, -1, numpy.int32)
    epsilon, bids, relaxations = int(EPSILON * SPREAD), 0, 0
    while (spent := auction(fixed, epsilon, prices, owner, index, BIDS_PER_ROW * n)) == BIDS_PER_ROW * n and (index < 0).any():
        epsilon, bids, relaxations = 4 * epsilon, bids + spent, relaxations + 1
    primal, dual = primal_and_dual(fixed, prices, index)
    gap = primal - dual + n  # rounding to integers moves a sum of N costs by at most N / 2
    kept = 1.0 if dual - n >= 0 else max(0.0, min(1.0, -primal / (n - dual)))  # centered: the mean over all pairings is 0
    solution = Assignment(torch.from_numpy(index.astype(numpy.int64)).to(device), gap / scale, kept, bids + spent, relaxations)
    return solution, prices[:n] / scale


def _check(x0: Tensor, noise: Tensor, metric: str, dtype: str, solver: str) -> None:
    for flag, name, known in (("metric", metric, METRICS), ("dtype", dtype, COST_DTYPES), ("solver", solver, SOLVERS)):
        if name not in known:
            raise UserError(f"--coupling_{flag} {name!r} is unknown; known: {', '.join(known)}")
    if x0.shape != noise.shape or x0.device != noise.device:
        raise UserError(
            f"images and noises must agree in shape and device: {tuple(x0.shape)} on {x0.device}, {tuple(noise.shape)} on {noise.device}"
        )
    for name, rows in (("image", x0), ("noise", noise)):
        finite = torch.isfinite(rows.flatten(1)).all(1)
        if not finite.all():
            raise UserError(f"{name} {int((~finite).nonzero()[0])} of the batch holds NaN or infinite values; it has no distance")
