"""The assignment: brute force, permutation, centering, what it refuses."""

import itertools

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

import immiscible.assignment as engine
from immiscible import UserError, assign, cost_matrix
from immiscible.assignment import certified_assignment, solve
from immiscible.data import ImageTransform, PhotoCrops


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


@pytest.fixture(scope="module")
def crops():
    source, transform = PhotoCrops(16), ImageTransform(16)
    return torch.stack([transform(source.load(i), 0, i) for i in range(512)])


def optimum(cost):
    """scipy on the float64 cost, centered: its columns, and the least cost with the mean over all pairings as zero."""
    centered = cost.double() - cost.double().mean(1, keepdim=True)
    centered -= centered.mean(0)
    rows, columns = linear_sum_assignment(centered.numpy())
    return centered, float(centered[rows, columns].sum())


@pytest.mark.parametrize("metric", ["l2", "squared_l2", "l1"])
@pytest.mark.parametrize("n", [2, 63, 64, 65, 130, 512])
def test_the_auction_keeps_nearly_all_and_its_certificate_is_true(crops, metric, n):
    noise = torch.randn(crops[:n].shape, generator=torch.Generator().manual_seed(n))
    cost = cost_matrix(crops[:n], noise, metric=metric)
    solution = solve(cost, solver="auction")
    assert sorted(solution.index.tolist()) == list(range(n))
    centered, least = optimum(cost)
    reached = float(centered[torch.arange(n), solution.index].sum())
    if n > 100:
        assert reached / least > 0.999
        assert solution.kept > 0.98
    assert solution.kept <= reached / least + 1e-6
    assert 0 <= reached - least <= solution.gap * (1 + 1e-6) + 1e-6
    assert solution.relaxations == 0


@pytest.mark.parametrize("metric", ["l2", "squared_l2", "l1"])
@pytest.mark.parametrize("n", [2, 127, 128, 300])
def test_exact_is_scipys_optimum(crops, metric, n):
    noise = torch.randn(crops[:n].shape, generator=torch.Generator().manual_seed(n))
    cost = cost_matrix(crops[:n], noise, metric=metric)
    centered, least = optimum(cost)
    index = solve(cost, solver="exact").index
    assert sorted(index.tolist()) == list(range(n))
    assert float(centered[torch.arange(n), index].sum()) == pytest.approx(least, rel=1e-9)


def test_a_price_war_ends_with_a_larger_epsilon_and_says_so(crops, monkeypatch):
    monkeypatch.setattr(engine, "BIDS_PER_ROW", 2)
    noise = torch.randn(crops.shape, generator=torch.Generator().manual_seed(1))
    solution = solve(cost_matrix(crops, noise), solver="auction")
    assert sorted(solution.index.tolist()) == list(range(512))
    assert solution.relaxations > 0
    centered, least = optimum(cost_matrix(crops, noise))
    assert float(centered[torch.arange(512), solution.index].sum()) / least >= solution.kept - 1e-6


def test_blocks_above_the_largest_size(crops, monkeypatch):
    monkeypatch.setattr(engine, "LARGEST_BLOCK", 200)
    noise = torch.randn(crops.shape, generator=torch.Generator().manual_seed(1))
    index = assign(crops, noise)
    assert sorted(index.tolist()) == list(range(512))
    assert torch.equal(index[:200], assign(crops[:200], noise[:200]))
    assert torch.equal(index[400:] - 400, assign(crops[400:], noise[400:]))
    with pytest.raises(UserError, match="at most 200 images, not 512"):
        certified_assignment(crops, noise)


def test_memory_is_quadratic_in_the_batch(crops):
    largest = [0]

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                largest[0] = max(largest[0], result.numel())
            return result

    noise = torch.randn(crops.shape, generator=torch.Generator().manual_seed(1))
    for metric in ("l2", "squared_l2"):
        with Watch():
            assign(crops, noise, metric=metric)
    assert largest[0] <= max(crops.numel(), 512 * 512)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 40),
    scale=st.sampled_from([1e-30, 1e-6, 1.0, 1e6, 1e15]),
    copies=st.integers(1, 5),
    solver=st.sampled_from(["exact", "auction", "auto"]),
    metric=st.sampled_from(["l2", "squared_l2", "l1"]),
    seed=st.integers(0, 2**16),
)
def test_any_finite_input_gives_a_permutation_no_worse_than_the_mean(n, scale, copies, solver, metric, seed):
    """Duplicate images and noises, constant images, huge and tiny scales."""
    generator = numpy.random.default_rng(seed)
    x0 = torch.from_numpy(generator.normal(size=(n, 12)) * scale).float()[generator.integers(0, max(1, n // copies), n)]
    noise = torch.from_numpy(generator.normal(size=(n, 12))).float()[generator.integers(0, max(1, n // copies), n)]
    index = assign(x0, noise, metric=metric, solver=solver)
    assert sorted(index.tolist()) == list(range(n))
    cost = distances(x0, noise, metric)
    assert float(cost[torch.arange(n), index].sum()) <= float(cost.mean() * n) * (1 + 1e-5)


@pytest.mark.parametrize("solver", ["exact", "auction"])
@pytest.mark.parametrize("case", ["equal images", "equal noises", "constant images", "huge", "tiny", "not contiguous", "half"])
def test_awkward_inputs_still_give_a_permutation(case, solver):
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
    assert sorted(assign(x0, noise, solver=solver).tolist()) == list(range(16))


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
    with pytest.raises(UserError, match="auto, float32, float16, bfloat16"):
        assign(x0, noise, dtype="int4")
    with pytest.raises(UserError, match="--coupling_solver 'hungarian' is unknown; known: auto, exact, auction"):
        assign(x0, noise, solver="hungarian")
