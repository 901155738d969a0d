"""The assignment engine on a GPU against the same on the CPU, and both against plain float64 arithmetic.

Each check is a function of the device, so that `test_checks.py` can hand it something broken.
"""

from __future__ import annotations

import numpy
import pytest
import torch
from pairs import assert_permutation, images_and_noises, summed_distances
from pretended import OnGPU
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from immiscible.assignment.auction import BLOCK, costs_from_products, fixed_point
from immiscible.assignment.costs import METRICS, _operand, cost_matrix, costs_on_device
from immiscible.assignment.solve import Assignment, assign, certified_assignment, fixed_point_on_device, solve
from immiscible.errors import UserError

SIZES = (2, 127, 128, 1000, 4096)
DTYPES = ("auto", "float32", "float16", "bfloat16", "float8")
LARGEST_EXACT = 1000  # up to which scipy says what the least cost is
# What the precision of the operands and of a product's 10, 7 or 23 bits may move: the cost, as a share of its spread, and an assignment's
# sum, in spreads a pair. ``auto`` is bfloat16 on a GPU.
COST_ERROR = {"float32": 1e-4, "float16": 2e-3, "bfloat16": 2e-2, "auto": 2e-2, "float8": 2e-2}
SUM_ERROR = {"float32": 1e-4, "float16": 1e-3, "bfloat16": 1e-2, "auto": 1e-2, "float8": 5e-2}


def sizes(device: torch.device) -> tuple[int, ...]:
    """A pretended device has one CPU core."""
    return SIZES if not isinstance(torch.empty(0, device=device), OnGPU) else tuple(n for n in SIZES if n < 1000)


def doubly_centered(cost: Tensor) -> Tensor:
    """Less row and column means, float64 on the CPU: all that an assignment sees."""
    cost = cost.cpu().double()
    cost = cost - cost.mean(1, keepdim=True)
    return cost - cost.mean(0)


def check_assignment(device: torch.device, metric: str, dtype: str, n: int) -> None:
    """A permutation on the device, whose distance is the CPU's within the certificates, which are true."""
    x0, noise = images_and_noises(n)
    there = certified_assignment(x0.to(device), noise.to(device), metric=metric, dtype=dtype)
    here = certified_assignment(x0, noise, metric=metric, dtype="float32" if dtype == "auto" else dtype)
    assert_permutation(there.index, n, device)
    assert torch.equal(assign(x0.to(device), noise.to(device), metric=metric, dtype=dtype).cpu(), there.index.cpu())
    distance = summed_distances(x0, noise, metric)  # float64 [N, N]
    rounding = SUM_ERROR[dtype] * n * float(doubly_centered(distance).std())
    found, expected = (float(distance[torch.arange(n), each.index.cpu()].sum()) for each in (there, here))
    assert abs(found - expected) <= max(there.gap, here.gap) + rounding
    if n <= LARGEST_EXACT:
        least = float(distance.numpy()[linear_sum_assignment(distance.numpy())].sum())
        assert least - 1e-6 * abs(least) <= found <= least + there.gap + rounding


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("metric", METRICS)
def test_assignment(device, metric, dtype):
    for n in sizes(device):
        check_assignment(device, metric, dtype, n)


def check_solve(device: torch.device, solver: str, n: int) -> None:
    """The same cost, solved from the device and from the CPU: neither is worse than the other by more than it admits."""
    x0, noise = images_and_noises(n)
    cost = cost_matrix(x0, noise)
    there, here = solve(cost.to(device), solver=solver), solve(cost, solver=solver)
    assert_permutation(there.index, n, device)

    def total(solution: Assignment) -> float:
        return float(cost.double()[torch.arange(n), solution.index.cpu()].sum())

    rounding = 1e-6 * n * float(cost.std())
    assert total(there) <= total(here) + there.gap + rounding
    assert total(here) <= total(there) + here.gap + rounding
    assert 0.99 <= there.kept <= 1


@pytest.mark.parametrize("solver", ["auto", "auction", "exact"])
def test_solve(device, solver):
    for n in sizes(device):
        if solver != "exact" or n <= LARGEST_EXACT:
            check_solve(device, solver, n)


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_broken_image_is_named(device, broken):
    """NaN survives the way through the device's minima, integers and transfer."""
    for n in (60, 200):
        x0, noise = images_and_noises(n)
        x0[17, 0, 0, 0] = broken
        with pytest.raises(UserError, match="17"):
            assign(x0.to(device), noise.to(device))


def check_costs(device: torch.device, metric: str, dtype: str, n: int) -> None:
    """`cost_matrix` against float64 distances of the rounded images and noises, up to constants of rows and columns."""
    x0, noise = images_and_noises(n)
    cost = cost_matrix(x0.to(device), noise.to(device), metric=metric, dtype=dtype)
    assert cost.device == device and cost.dtype == torch.float32
    rounded = "bfloat16" if dtype == "auto" and metric != "l1" else "float32" if dtype == "auto" else dtype
    operands = (_operand(rows.flatten(1), rounded) for rows in (x0, noise))
    expected = doubly_centered(summed_distances(*(rows.double() * scale[:, None] for rows, scale in operands), metric))
    spread = float(expected.std())
    assert float((doubly_centered(cost) - expected).square().mean().sqrt()) <= COST_ERROR[dtype] * spread


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("metric", METRICS)
def test_costs(device, metric, dtype):
    for n in sizes(device):
        if n > 2:  # the two costs that four pairs have apart from constants are one number
            check_costs(device, metric, dtype, n)


def check_costs_from_products(device: torch.device, metric: str, n: int) -> None:
    """`costs_on_device` against its compiled twin, on the same products, of images shorter and longer than the noises."""
    x0, noise = (rows.flatten(1) for rows in images_and_noises(n))
    x0 = x0 * torch.linspace(0, 4, n)[:, None]
    image_norm, noise_norm = x0.norm(dim=1), noise.norm(dim=1)
    far, products = image_norm > noise_norm.mean(), x0 @ noise.T
    assert far.any() and not far.all()
    expected, ones = torch.empty(n, n), torch.ones(n)
    words = [rows.numpy() for rows in (products, ones, ones, image_norm, noise_norm, far)]
    costs_from_products(*words, metric == "squared_l2", expected.numpy())
    given = [rows.to(device) for rows in (products, image_norm, noise_norm, far)]
    found = costs_on_device(*given, metric)
    assert found.device == device
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("metric", ["l2", "squared_l2"])
def test_costs_from_products(device, metric):
    for n in sizes(device):
        check_costs_from_products(device, metric, n)


def check_fixed_point(device: torch.device, cost: Tensor) -> None:
    """`fixed_point_on_device` against its compiled twin: the same integers up to one, the same scale and spread."""
    n, width = len(cost), -(-len(cost) // BLOCK) * BLOCK
    expected = numpy.empty((n, width), numpy.int16)
    numbers = fixed_point(cost.numpy(), expected)
    found, found_numbers = fixed_point_on_device(cost.to(device), width)
    assert found.device == device and found.dtype == torch.int16 and found.shape == (n, width)
    torch.testing.assert_close(found_numbers.cpu().double(), torch.tensor(numbers, dtype=torch.float64), rtol=1e-4, atol=0, equal_nan=True)
    if not numpy.isnan(numbers[0]):
        assert int((found.cpu().int() - torch.from_numpy(expected).int()).abs().max()) <= 1
        assert not found.cpu()[:, n:].any()


def test_fixed_point(device):
    for n in sizes(device):
        cost = cost_matrix(*images_and_noises(n))
        for given in (cost, 1e6 * cost, 1e-6 * cost, cost + torch.linspace(0, 30, n), torch.arange(n).expand(n, n).float().contiguous()):
            check_fixed_point(device, given)
    outlier, broken = cost.clone(), cost.clone()
    outlier[0, 0], broken[3, 5] = 1e3 * cost.abs().max(), torch.nan
    check_fixed_point(device, outlier)
    check_fixed_point(device, broken)
