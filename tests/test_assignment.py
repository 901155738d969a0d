"""The assignment: brute force, permutation, centering, what it refuses."""

import itertools

import pytest
import torch

from immiscible import UserError, assign, cost_matrix
from immiscible.assignment import solve


def distances(x0: torch.Tensor, noise: torch.Tensor, metric: str) -> torch.Tensor:
    """The true costs in float64, by the definition."""
    difference = x0.double().flatten(1)[:, None] - noise.double().flatten(1)[None]
    squared = difference.square().sum(2)
    return {"l1": difference.abs().sum(2), "l2": squared.sqrt(), "squared_l2": squared}[metric]


@pytest.mark.parametrize("metric", ["l2", "squared_l2", "l1"])
@pytest.mark.parametrize("n", range(1, 8))
def test_equals_brute_force(metric, n):
    for seed in range(20 if n < 7 else 4):
        generator = torch.Generator().manual_seed(1000 * n + seed)
        x0 = 0.5 * torch.randn(n, 3, 4, 4, generator=generator) + 0.3
        noise = torch.randn(n, 3, 4, 4, generator=generator)
        cost = distances(x0, noise, metric)
        least = min(sum(float(cost[i, p[i]]) for i in range(n)) for p in itertools.permutations(range(n)))
        index = assign(x0, noise, metric=metric)
        assert sorted(index.tolist()) == list(range(n))
        assert float(cost[torch.arange(n), index].sum()) == pytest.approx(least, rel=1e-6)


@pytest.mark.parametrize("metric", ["l2", "squared_l2", "l1"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_is_a_permutation_that_never_loses_to_identity(metric, dtype):
    generator = torch.Generator().manual_seed(0)
    x0 = torch.rand(64, 3, 8, 8, generator=generator) * 2 - 1
    noise = torch.randn(64, 3, 8, 8, generator=generator)
    index = assign(x0, noise, metric=metric, dtype=dtype)
    assert index.dtype == torch.int64
    assert sorted(index.tolist()) == list(range(64))
    cost = distances(x0, noise, metric)
    assert cost[torch.arange(64), index].sum() < cost.diagonal().sum()


def test_quantized_cost_keeps_nearly_all_of_the_reduction():
    generator = torch.Generator().manual_seed(1)
    x0 = torch.rand(128, 3, 16, 16, generator=generator).mul(2).sub(1) * torch.rand(128, 1, 1, 1, generator=generator)
    noise = torch.randn(128, 3, 16, 16, generator=generator)
    cost = distances(x0, noise, "l2")
    gains = {
        dtype: float((cost.diagonal() - cost[torch.arange(128), assign(x0, noise, dtype=dtype)]).sum())
        for dtype in ("float32", "float16", "bfloat16")
    }
    assert gains["float16"] >= 0.999 * gains["float32"]
    assert gains["bfloat16"] >= 0.99 * gains["float32"]


def test_cost_is_the_distance_up_to_row_and_column_constants():
    generator = torch.Generator().manual_seed(2)
    x0, noise = torch.randn(9, 50, generator=generator), torch.randn(9, 50, generator=generator)
    for metric in ("l2", "squared_l2", "l1"):
        error = cost_matrix(x0, noise, metric=metric).double() - distances(x0, noise, metric)
        centered = error - error.mean(1, keepdim=True) - error.mean(0) + error.mean()
        assert centered.abs().max() < 1e-6 * distances(x0, noise, metric).max()


def test_row_and_column_offsets_do_not_matter():
    generator = torch.Generator().manual_seed(3)
    cost = torch.randn(40, 40, generator=generator, dtype=torch.float64)
    shifted = (
        cost
        + 1e6 * torch.randn(40, 1, generator=generator, dtype=torch.float64)
        + 1e6 * torch.randn(40, generator=generator, dtype=torch.float64)
    )
    assert torch.equal(solve(cost, solver="exact").index, solve(shifted, solver="exact").index)


@pytest.mark.parametrize("case", ["equal images", "equal noises", "constant images", "huge", "tiny", "not contiguous", "half"])
def test_awkward_inputs_still_give_a_permutation(case):
    generator = torch.Generator().manual_seed(4)
    x0, noise = torch.randn(16, 3, 4, 4, generator=generator), torch.randn(16, 3, 4, 4, generator=generator)
    if case == "equal images":
        x0 = x0[:1].expand_as(x0)
    elif case == "equal noises":
        noise = noise[:1].expand_as(noise)
    elif case == "constant images":
        x0 = torch.ones_like(x0)
    elif case == "huge":
        x0 = x0 * 1e15
    elif case == "tiny":
        x0 = x0 * 1e-20
    elif case == "not contiguous":
        x0 = x0.transpose(1, 3).transpose(1, 3).flip(0)
    else:
        x0, noise = x0.half(), noise.half()
    assert sorted(assign(x0, noise).tolist()) == list(range(16))


def test_refuses_what_has_no_answer_and_says_where():
    x0, noise = torch.zeros(4, 3, 2, 2), torch.randn(4, 3, 2, 2)
    broken = noise.clone()
    broken[2, 0, 0, 0] = float("nan")
    with pytest.raises(UserError, match="noise 2 of the batch"):
        assign(x0, broken)
    broken = x0.clone()
    broken[3, 1, 1, 1] = float("inf")
    with pytest.raises(UserError, match="image 3 of the batch"):
        assign(broken, noise)
    with pytest.raises(UserError, match="agree in shape"):
        assign(x0[:3], noise)
    with pytest.raises(UserError, match="l2, squared_l2, l1"):
        assign(x0, noise, metric="cosine")
    with pytest.raises(UserError, match="float32, float16, bfloat16"):
        assign(x0, noise, dtype="int4")
