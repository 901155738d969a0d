"""The linear-assignment engine: which noise of a batch goes with which image.

The problem: for N images and N noises find the permutation that minimizes the summed distance,
``min over permutations p of sum_i d(x0[i], noise[p[i]])`` (Immiscible Diffusion, algorithm 1). Adding a constant to a row or a
column of the cost changes no minimizer, so costs are centered before they are solved: the solver then works on the part that
matters, and nothing is lost to rounding large offsets. Time is one matrix product, O(N^2 D), plus a solve of about 10 N^2 integer
operations; memory is O(N^2), never O(N^2 D).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace

import numpy
import torch
from torch import Tensor

from immiscible.assignment.costs import EXACT_BELOW, _costs, _norms, check_names
from immiscible.errors import UserError

SOLVERS = ("auto", "exact", "auction", "stable")

LARGEST_BLOCK = 16384  # its cost fills 2 GiB; pairing within blocks of this size keeps nearly all of the reduction
EPSILON = 0.0075  # of what a pair gains, N^(1/8) standard deviations of the cost or about that; far less is lost
BIDS_PER_ROW = 200  # ten times what an ordinary batch needs
NORMS = (1e-12, 1e12)  # the largest norm of a batch that fp32 squares comfortably; others are solved in another unit of length
_recorded: ContextVar[list[Assignment] | None] = ContextVar("recorded solutions", default=None)


@dataclass(frozen=True)
class Assignment:
    """A solved assignment with its certificate.

    Args:
        index: int64 [N] on the images' device: image i goes with ``noise[index[i]]``.
        gap: how far the summed cost can at most be from the least one, in the cost's units (the distance's, or the square's); 0 for the
            exact solver.
        kept: a lower bound on the share of the achievable reduction that is kept, the mean over all pairings counting as no reduction. Of
            ``stable``, whose aim is another one, it is measured against first choices for all, which no permutation gives.
        bids: of the auction; 0 for the other solvers.
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
        dtype: the precision in which images and noises enter the cost (the paper's quantized assignments use float16 and 8-bit floats);
            ``auto`` is `fast_dtype` for the auction, and float32 for the other solvers and for ``l1``. ``int8``, on CPUs only, and
            ``float8`` (e4m3) scale each image and noise to its largest value. ``float8`` is fast on GPUs that multiply it; elsewhere its
            rounded operands are multiplied in float32. What all but ``float8`` move in the reduction is about 0.01 %; the rest is done
            in fp32 or better.
        solver: ``exact``; ``auction``, which keeps more than 99.9 % of the reduction on images; ``auto`` is exact below
            `EXACT_BELOW` images. ``stable`` is the stable matching by the distance, see `immiscible.assignment.stable`. Above
            `LARGEST_BLOCK` images blocks of that size are solved apart.

    Returns:
        int64 [N] on x0's device: image i goes with ``noise[index[i]]``. Every noise is used exactly once.

    Raises:
        UserError: shapes or devices differ, an unknown name, or a NaN or infinite row (named).
    """
    _check(x0, noise, metric, dtype, solver)
    starts = range(0, max(1, len(x0)), LARGEST_BLOCK)
    pairs = zip(x0.split(LARGEST_BLOCK), noise.split(LARGEST_BLOCK), starts, strict=True)
    blocks = [_solve_pairs(images, noises, metric, dtype, solver, first).index + first for images, noises, first in pairs]
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


@contextmanager
def recorded_solutions() -> Iterator[list[Assignment]]:
    """Inside the block every `solve` of this thread, whoever calls it, is added to the list that the block is given."""
    solutions: list[Assignment] = []
    token = _recorded.set(solutions)
    try:
        yield solutions
    finally:
        _recorded.reset(token)


def solve(cost: Tensor, *, solver: str = "auto") -> Assignment:
    """Minimizes ``sum_i cost[i, index[i]]`` over permutations.

    ``exact`` is scipy's shortest augmenting paths on costs reduced by an auction's prices, which changes no minimizer and leaves it
    little to do. ``auction`` is a fixed-point Gauss-Seidel auction from zero prices with one epsilon, taken from the cost's spread; at
    `BIDS_PER_ROW` bids a row epsilon is multiplied by four and the solve goes on from its prices. ``stable`` minimizes no sum: no row and
    column would rather have each other (`immiscible.assignment.stable`), by costs which are to be whole.

    Args:
        cost: fp32 [N, N], any device, finite.
        solver: one of `SOLVERS`.

    Raises:
        UserError: the cost is not square, or a row of it holds NaN or infinite values (named).
    """
    n = len(cost)
    if cost.shape != (n, n):
        raise UserError(f"a cost matrix must be square, not {list(cost.shape)}")
    if n < 2:
        solution = _only_assignment(n, cost.device)
    elif solver == "stable":
        solution = _stable(cost)
    elif by_scipy(solver, n):
        solution = _exact(cost)
    else:
        solution = price_auction(cost)[0]
    record_solution(solution)
    return solution


def by_scipy(solver: str, n: int) -> bool:
    """Whether ``solver`` is the exact one for ``n`` images."""
    return solver == "exact" or (solver == "auto" and n < EXACT_BELOW)


def cost_dtype(dtype: str, solver: str, n: int) -> str:
    """``dtype``, unless it is ``auto`` and the solver, for ``n`` images, is not the auction."""
    return "float32" if dtype == "auto" and (solver == "stable" or by_scipy(solver, n)) else dtype


def record_solution(solution: Assignment) -> None:
    """Adds a solution to the list of `recorded_solutions`, where one is kept."""
    if (solutions := _recorded.get()) is not None:
        solutions.append(solution)


def price_auction(cost: Tensor, epsilon: float = EPSILON) -> tuple[Assignment, numpy.ndarray]:
    """The auction of `solve`, with each column's price in the cost's units, float64 [N].

    Args:
        cost: as in `solve`, N >= 2.
        epsilon: in N^(1/8) standard deviations of the mean row of the centered cost.
    """
    from immiscible.assignment.auction import BLOCK, LISTS_FROM, UNPAYABLE, auction, primal_and_dual

    n = len(cost)
    fixed, scale, spread = _fixed_point(cost)
    if math.isnan(scale):
        raise _not_finite(cost)
    blocks = fixed.reshape(n, -1, BLOCK)
    prices, owner = numpy.zeros(blocks.shape[1:], numpy.int32), numpy.full(fixed.shape[1], -1, numpy.int32)
    prices.reshape(-1)[n:] = UNPAYABLE
    index = numpy.full(n, -1, numpy.int32)
    step, bids, relaxations = max(1, round(epsilon * n**0.125 * spread)), 0, 0
    most = BIDS_PER_ROW * n
    while (spent := auction(blocks, step, prices, owner, index, most, n >= LISTS_FROM)) == most and (index < 0).any():
        step, bids, relaxations = 4 * step, bids + spent, relaxations + 1
    primal, dual = primal_and_dual(blocks, prices, index)
    highest, lowest = primal + n / 2, dual - n / 2  # of the sum and of the least one: rounding moves N costs by at most N / 2
    kept = 1.0 if spread == 0 or lowest >= 0 else max(0.0, min(1.0, highest / lowest))  # centered: the mean over all pairings is 0
    found = torch.from_numpy(index.astype(numpy.int64)).to(cost.device)
    return Assignment(found, (highest - lowest) / scale, kept, bids + spent, relaxations), prices.reshape(-1)[:n] / scale


def fixed_point_on_device(cost: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """As `auction.fixed_point`, in torch: int16 [N, width], and the two numbers as fp32 [2], on the cost's device."""
    from immiscible.assignment.auction import LARGEST_COST, ROUNDING, SPREAD

    centered = cost - cost.mean(1, keepdim=True)
    column_means = centered.mean(0)
    centered -= column_means
    deviation = centered.std(1, correction=0).mean()
    lowest, highest = centered.aminmax()
    scale = torch.minimum(SPREAD / deviation, LARGEST_COST / torch.maximum(-lowest, highest)).clamp(max=1e38)
    flat = deviation <= ROUNDING * column_means.square().mean().sqrt()
    factor = torch.where(flat, 0, scale)
    fixed = centered.mul_(factor).round_().to(torch.int16)
    return torch.nn.functional.pad(fixed, (0, width - len(cost))), torch.stack([torch.where(flat, torch.inf, scale), deviation * factor])


def _solve_pairs(x0: Tensor, noise: Tensor, metric: str, dtype: str, solver: str, first: int = 0) -> Assignment:
    """Of at most `LARGEST_BLOCK` pairs, of which the first is number ``first`` of the batch."""
    images, noises = x0.detach().flatten(1), noise.detach().flatten(1)
    norms, unit = (_norms(images), _norms(noises)), 1.0
    if len(images) and not NORMS[0] < float(torch.cat(norms).max()) < NORMS[1]:
        unit = _largest_value(images, noises, first)
        images, noises = ((rows.double() / unit).float() for rows in (images, noises))
        norms = (_norms(images), _norms(noises))
    if len(images) < 2:
        return _only_assignment(len(images), x0.device)
    cost = _costs(images, noises, norms, metric, cost_dtype(dtype, solver, len(images)), whole=solver == "stable")
    if dtype == "float16" and not torch.isfinite(cost).all():
        image = first + int((~torch.isfinite(cost).all(1)).nonzero()[0])
        raise UserError(f"image {image} of the batch overflows `dtype` float16; scale the data, or use float32")
    solution = solve(cost, solver=solver)
    return replace(solution, gap=solution.gap * (unit**2 if metric == "squared_l2" else unit))


def _largest_value(images: Tensor, noises: Tensor, first: int) -> float:
    """The largest absolute value, 1 if all are 0.

    Raises:
        UserError: a NaN or infinite row, named.
    """
    for name, rows in (("image", images), ("noise", noises)):
        finite = torch.isfinite(rows).all(1)
        if not finite.all():
            row = first + int((~finite).nonzero()[0])
            raise UserError(f"{name} {row} of the batch holds NaN or infinite values; it has no distance")
    return max(float(images.abs().max()), float(noises.abs().max())) or 1.0


def _only_assignment(n: int, device: torch.device) -> Assignment:
    """Of no or one pair."""
    return Assignment(torch.arange(n, device=device), 0.0, 1.0, 0, 0)


def _exact(cost: Tensor) -> Assignment:
    from scipy.optimize import linear_sum_assignment

    reduced = cost.detach().cpu().double().numpy()
    reduced = reduced - reduced.mean(1, keepdims=True)
    reduced -= reduced.mean(0)
    if not numpy.isfinite(reduced).all():
        raise _not_finite(cost)
    if len(cost) >= EXACT_BELOW:
        reduced += price_auction(torch.from_numpy(reduced.astype(numpy.float32)), EPSILON / 4)[1]  # scipy takes longer with coarser prices
        reduced -= reduced.min(1, keepdims=True)
    return Assignment(torch.from_numpy(linear_sum_assignment(reduced)[1]).to(cost.device), 0.0, 1.0, 0, 0)


def _stable(cost: Tensor) -> Assignment:
    from immiscible.assignment.stable import stable_matching

    on_cpu = cost.detach().cpu().float().contiguous()
    if not torch.isfinite(on_cpu).all():
        raise _not_finite(on_cpu)
    index = torch.from_numpy(stable_matching(on_cpu.numpy(), on_cpu.T.contiguous().numpy()))
    centered = on_cpu - on_cpu.mean(1, keepdim=True)
    centered -= centered.mean(0)
    reached = float(centered[torch.arange(len(index), device="cpu"), index].double().sum())
    lowest = max(float(centered.amin(side).double().sum()) for side in (0, 1))  # first choices of the columns, and of the rows
    kept = 1.0 if lowest >= 0 else max(0.0, min(1.0, reached / lowest))
    return Assignment(index.to(cost.device), max(0.0, reached - lowest), kept, 0, 0)


def _fixed_point(cost: Tensor) -> tuple[numpy.ndarray, float, float]:
    """The cost in fixed point, int16 [N, width], on the CPU, where the auction is, with `auction.fixed_point`'s numbers."""
    from immiscible.assignment.auction import BLOCK, fixed_point

    n, width = len(cost), -(-len(cost) // BLOCK) * BLOCK
    if cost.device.type == "cpu":
        fixed = numpy.empty((n, width), numpy.int16)
        return fixed, *fixed_point(cost.detach().float().contiguous().numpy(), fixed)
    on_device, numbers = fixed_point_on_device(cost.detach().float(), width)
    on_cpu = torch.empty(on_device.shape, dtype=torch.int16, device="cpu", pin_memory=cost.device.type == "cuda")
    on_cpu.copy_(on_device)
    scale, spread = numbers.tolist()
    return on_cpu.numpy(), scale, spread


def _not_finite(cost: Tensor) -> UserError:
    return UserError(f"row {int((~torch.isfinite(cost).all(1)).nonzero()[0])} of the cost holds NaN or infinite values")


def _check(x0: Tensor, noise: Tensor, metric: str, dtype: str, solver: str) -> None:
    check_names(metric, dtype)
    if solver not in SOLVERS:
        raise UserError(f"`solver` {solver!r} is unknown; known: {', '.join(SOLVERS)}")
    if x0.shape != noise.shape or x0.device != noise.device:
        raise UserError(
            f"images and noises must agree in shape and device: {tuple(x0.shape)} on {x0.device}, {tuple(noise.shape)} on {noise.device}"
        )
    if x0.dim() < 2 or not x0.is_floating_point() or not noise.is_floating_point():
        raise UserError(f"images and noises must be floating point [N, ...], not {list(x0.shape)} of {x0.dtype} and {noise.dtype}")
