"""The assignment: brute force, permutation, centering, what it refuses."""

import itertools
import subprocess
import sys

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

import immiscible.assignment.costs as costs
import immiscible.assignment.solve as engine
from immiscible import AssignmentCoupling, UserError, assign, cost_matrix
from immiscible.assignment.auction import (
    BLOCK,
    LARGEST_COST,
    LISTS_FROM,
    SPREAD,
    UNPAYABLE,
    auction,
    costs_from_products,
    fixed_point,
    quantize,
)
from immiscible.assignment.costs import costs_on_device
from immiscible.assignment.solve import certified_assignment, fixed_point_on_device, price_auction, solve
from immiscible.data.bundled import PhotoCrops
from immiscible.data.transforms import ImageTransform

DTYPES = ["float32", "float16", "bfloat16", *(["int8"] if costs._multiplies_int8() else [])]
FLOAT8 = hasattr(torch, costs.FLOAT8)
DTYPES += ["float8"] if FLOAT8 else []


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
@pytest.mark.parametrize("dtype", DTYPES)
def test_is_a_permutation_that_never_loses_to_identity(metric, dtype):
    generator = torch.Generator().manual_seed(0)
    x0 = torch.rand(64, 3, 8, 8, generator=generator) * 2 - 1
    noise = torch.randn(64, 3, 8, 8, generator=generator)
    if (metric, dtype) == ("l1", "int8"):
        with pytest.raises(UserError, match="no inner product"):
            assign(x0, noise, metric=metric, dtype=dtype)
        return
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
    gains = {dtype: float((cost.diagonal() - cost[torch.arange(128), assign(x0, noise, dtype=dtype)]).sum()) for dtype in DTYPES}
    assert min(gains.values()) >= 0.999 * gains["float32"]


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


@settings(max_examples=40, deadline=None)
@given(n=st.integers(2, 400), distinct=st.sampled_from([2, 10, 30000]), most=st.sampled_from([2, 200]), seed=st.integers(0, 2**16))
def test_lists_of_cheap_columns_change_no_bid(n, distinct, most, seed):
    generator = numpy.random.default_rng(seed)
    width = -(-n // BLOCK) * BLOCK
    cost = generator.integers(-distinct // 2, distinct // 2 + 1, size=(n, width)).astype(numpy.int16).reshape(n, -1, BLOCK)
    results = []
    for with_lists in (False, True):
        prices = numpy.zeros(width, numpy.int32)
        prices[n:] = UNPAYABLE
        owner, index = numpy.full(width, -1, numpy.int32), numpy.full(n, -1, numpy.int32)
        bids = auction(cost, 1 + distinct // 300, prices.reshape(-1, BLOCK), owner, index, most * n, with_lists)
        results.append((bids, prices.tolist(), owner.tolist(), index.tolist()))
    assert results[0] == results[1]


def test_a_large_batch_uses_them():
    cost = torch.randn(LISTS_FROM, LISTS_FROM, generator=torch.Generator().manual_seed(0))
    solution = solve(cost, solver="auction")
    assert sorted(solution.index.tolist()) == list(range(LISTS_FROM))
    assert solution.kept > 0.99 and solution.relaxations == 0


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


@pytest.mark.parametrize("metric", ["l2", "squared_l2"])
def test_costs_from_products_agree_with_the_definition_and_between_devices(metric):
    """Images from a millionth of the noises' length to a million times it, a zero image and a zero noise."""
    generator = torch.Generator().manual_seed(5)
    scale = torch.logspace(-6, 6, 41, dtype=torch.float64)[:, None]
    x0, noise = scale * torch.randn(41, 30, generator=generator, dtype=torch.float64), torch.randn(70, 30, generator=generator).double()
    x0[7], noise[9] = 0, 0
    x0, noise = x0.float().double(), noise.float().double()
    image_norm, noise_norm = x0.norm(dim=1), noise.norm(dim=1)
    far = image_norm > noise_norm.mean()
    products, ones = (x0 @ noise.T).float(), torch.ones(70)
    on_cpu = torch.empty(41, 70)
    arguments = (products, ones[:41], ones, image_norm.float(), noise_norm.float(), far)
    costs_from_products(*(tensor.numpy() for tensor in arguments), metric == "squared_l2", on_cpu.numpy())
    on_device = costs_on_device(products.clone(), image_norm.float(), noise_norm.float(), far, metric)

    inner = x0 @ noise.T
    if metric == "squared_l2":
        expected = -2 * inner
    else:
        expected = distances(x0, noise, "l2") - noise_norm - torch.where(far, image_norm, 0)[:, None]
        assert 10 < far.sum() < 30
    size = expected.abs().amax(1, keepdim=True).clamp(min=1e-9)
    assert ((on_cpu - expected) / size).abs().max() < 3e-6
    assert ((on_device - expected) / size).abs().max() < 3e-6


def test_fixed_point_agrees_between_devices_and_with_float64(crops):
    noise = torch.randn(crops.shape, generator=torch.Generator().manual_seed(1))
    costs = {
        "ordinary": cost_matrix(crops, noise),
        "offsets": 30 + cost_matrix(crops, noise) + 10 * torch.randn(512, 1) + 10 * torch.randn(512),
        "one outlier": torch.zeros(130, 130).index_put((torch.tensor(3), torch.tensor(5)), torch.tensor(1e6)) + torch.randn(130, 130),
    }
    for name, cost in costs.items():
        n = len(cost)
        fixed = numpy.empty((n, n + 64), numpy.int16)
        scale, spread = fixed_point(cost.numpy(), fixed)
        on_device, numbers = fixed_point_on_device(cost, n + 64)
        assert numbers.tolist() == pytest.approx([scale, spread], rel=1e-4)
        assert (torch.from_numpy(fixed) - on_device).abs().max() <= 1
        assert not fixed[:, n:].any()
        centered = optimum(cost)[0]
        deviation = float(centered.std(1, correction=0).mean())
        assert scale == pytest.approx(min(SPREAD / deviation, LARGEST_COST / float(centered.abs().max())), rel=1e-4)
        assert spread == pytest.approx(scale * deviation, rel=1e-6)
        tolerance = 0.6 if name != "offsets" else 1.0
        assert (torch.from_numpy(fixed[:, :n]) - scale * centered).abs().max() < tolerance
    assert spread < SPREAD / 50  # the outlier had to fit


def test_costs_of_the_column_alone_are_flat_and_cost_nothing():
    cost = (55 + torch.rand(200)).expand(200, 200).contiguous()
    fixed = numpy.empty((200, 256), numpy.int16)
    assert fixed_point(cost.numpy(), fixed) == (numpy.inf, 0) and not fixed.any()
    on_device, numbers = fixed_point_on_device(cost, 256)
    assert numbers.tolist() == [numpy.inf, 0] and not on_device.any()
    solution = solve(cost, solver="auction")
    assert sorted(solution.index.tolist()) == list(range(200))
    assert (solution.gap, solution.kept, solution.bids) == (0, 1, 200)


@given(rows=st.integers(1, 9), columns=st.integers(2, 200), scale=st.sampled_from([1e-30, 1.0, 1e30]), seed=st.integers(0, 2**16))
@settings(max_examples=30, deadline=None)
def test_int8_rows_are_rounded_to_the_largest_value(rows, columns, scale, seed):
    values = (numpy.random.default_rng(seed).normal(size=(rows, columns)) * scale).astype(numpy.float32)
    values[0] = 0
    out, factor = numpy.empty(values.shape, numpy.int8), numpy.empty(rows, numpy.float32)
    quantize(values, out, factor)
    assert (numpy.abs(out[1:].astype(int)).max(1) == 127).all() and not out[0].any()
    assert (numpy.abs(out * factor[:, None].astype(float) - values) <= 0.501 * factor[:, None]).all()


@pytest.mark.skipif("int8" not in DTYPES, reason="this processor has no int8 product that is right")
@pytest.mark.parametrize("metric", ["l2", "squared_l2"])
def test_int8_rows_of_the_cost_are_alike_in_any_company(metric):
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(100, 300, generator=generator), torch.randn(100, 300, generator=generator)
    whole = cost_matrix(x0, noise, metric=metric, dtype="int8")
    for start, stop in ((0, 1), (3, 40), (50, 100)):
        assert torch.equal(cost_matrix(x0[start:stop], noise, metric=metric, dtype="int8", rows_per_product=32), whole[start:stop])


def rounded_to_float8(values: numpy.ndarray) -> numpy.ndarray:
    """The nearest number of e4m3 to each, by its definition: exponents from -6 to 8, three bits after the leading one, no infinity."""
    normal = [2.0**exponent * (1 + bits / 8) for exponent in range(-6, 9) for bits in range(8)][:-1]  # the last is NaN
    numbers = numpy.array([2.0**-6 * bits / 8 for bits in range(8)] + normal)
    numbers = numpy.concatenate([-numbers[:0:-1], numbers])
    return numbers[numpy.abs(values[..., None] - numbers).argmin(-1)]


@pytest.mark.skipif(not FLOAT8, reason="this torch has no 8-bit floats")
@pytest.mark.parametrize("metric", ["l2", "squared_l2", "l1"])
@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e9])
def test_float8_costs_are_those_of_the_rounded_operands(metric, scale):
    generator = torch.Generator().manual_seed(8)
    x0, noise = scale * torch.randn(9, 40, generator=generator), scale * torch.randn(130, 40, generator=generator)
    x0[3] = 0

    def rounded(rows):
        factor = 448 / numpy.maximum(numpy.abs(rows.double().numpy()).max(1, keepdims=True), 1e-300)
        return torch.from_numpy(rounded_to_float8(rows.double().numpy() * factor) / factor)

    cost, images, noises = cost_matrix(x0, noise, metric=metric, dtype="float8").double(), rounded(x0), rounded(noise)
    if metric == "l1":
        expected = distances(images, noises, "l1")
    else:  # lengths are not rounded
        squares = x0.double().square().sum(1)[:, None] + noise.double().square().sum(1) - 2 * images @ noises.T
        expected = squares if metric == "squared_l2" else squares.clamp(min=0).sqrt()
    apart = cost - expected
    apart = apart - apart.mean(1, keepdim=True) - apart.mean(0) + apart.mean()
    assert apart.abs().max() < 2e-6 * expected.max()
    assert not torch.allclose(expected, distances(x0, noise, metric), rtol=1e-4, atol=0)  # rounding is seen


@pytest.mark.skipif(not FLOAT8, reason="this torch has no 8-bit floats")
def test_products_of_float8_are_filled_up_to_whole_tiles():
    (rows, _), (columns, _) = (costs._operand(torch.randn(count, 37), "float8") for count in (5, 21))
    try:
        found = costs._float8_products(rows, columns)
    except (AttributeError, RuntimeError, TypeError) as error:
        pytest.skip(f"no such product here: {error}")
    assert torch.equal(found, rows.float() @ columns.float().T)
    assert not costs._multiplies_float8(torch.device("cpu"))  # which has it, but not fast


def test_a_torch_without_float8_is_named(monkeypatch):
    monkeypatch.delattr(torch, costs.FLOAT8, raising=False)
    with pytest.raises(UserError, match=r"`dtype` float8 needs a torch with float8_e4m3fn, which .* lacks; give bfloat16"):
        AssignmentCoupling(dtype="float8")
    assert len(assign(torch.randn(3, 8), torch.randn(3, 8), dtype="bfloat16")) == 3


def test_auto_takes_int8_only_where_it_is_fast_and_right(monkeypatch):
    if not hasattr(torch.cpu, "get_capabilities"):
        pytest.skip("torch cannot tell")
    cpu, known = torch.device("cpu"), {}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known)
    monkeypatch.setattr(costs, "_multiplies_int8", lambda: True)
    ask = costs.fast_dtype.__wrapped__
    assert ask(cpu) == "float32"
    known["avx512_bf16"] = True
    assert ask(cpu) == "bfloat16"
    known["avx512_vnni"] = True
    assert ask(cpu) == "int8"
    assert ask(cpu, 1) == ask(cpu, 200_000) == "bfloat16"
    assert ask(torch.device("cuda")) == "bfloat16"
    monkeypatch.setattr(costs, "_multiplies_int8", lambda: False)
    assert ask(cpu) == "bfloat16"
    with pytest.raises(UserError, match="`dtype` int8 needs a CPU"):
        assign(torch.randn(3, 8), torch.randn(3, 8), dtype="int8")


@pytest.mark.skipif(not hasattr(torch, "_int_mm"), reason="this torch has no int8 product")
def test_saturating_int8_products_are_noticed(monkeypatch):
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: (a.float() @ b.float()).clamp(-32768, 32767).int())
    assert not costs._multiplies_int8.__wrapped__()


def excess(x0: torch.Tensor, noise: torch.Tensor, metric: str, index: torch.Tensor) -> float:
    """What ``index`` misses of the reduction that the best permutation of all reaches, as a share of it; in float64."""
    n = len(x0)
    cost = distances(x0, noise, metric)
    cost = cost - cost.mean(1, keepdim=True)
    cost = cost - cost.mean(0)
    least = min(float(cost[range(n), p].sum()) for p in map(list, itertools.permutations(range(n))))
    return (float(cost[torch.arange(n), index].sum()) - least) / max(-least, 1e-300)


@pytest.mark.parametrize("metric", ["l2", "squared_l2", "l1"])
@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1e3, 1e6])
def test_right_answer_at_any_scale_of_the_images(metric, scale):
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        x0, noise = scale * torch.randn(6, 3, 4, 4, generator=generator), torch.randn(6, 3, 4, 4, generator=generator)
        assert excess(x0, noise, metric, assign(x0, noise, metric=metric)) < 1e-3


@pytest.mark.parametrize("metric", ["l2", "squared_l2", "l1"])
@pytest.mark.parametrize("scale", [1e-40, 1e-25, 1e12, 1e25, 1e38])
def test_a_common_scale_changes_nothing(metric, scale):
    generator = torch.Generator().manual_seed(6)
    x0, noise = torch.rand(6, 40, generator=generator) - 0.5, torch.rand(6, 40, generator=generator) - 0.5
    solution = certified_assignment(scale * x0, scale * noise, metric=metric, solver="auction")
    assert excess(x0, noise, metric, solution.index) < 0.05
    assert excess(x0, noise, metric, assign(scale * x0, scale * noise, metric=metric)) < 1e-3
    unit = scale**2 if metric == "squared_l2" else scale
    assert solution.gap == pytest.approx(unit * certified_assignment(x0, noise, metric=metric, solver="auction").gap, rel=0.1)


@pytest.mark.parametrize("n", [0, 1, 2])
@pytest.mark.parametrize("solver", ["auto", "exact", "auction"])
def test_the_smallest_batches(n, solver):
    x0, noise = torch.randn(n, 3, 2, 2), torch.randn(n, 3, 2, 2)
    for metric in ("l2", "squared_l2", "l1"):
        index = assign(x0, noise, metric=metric, solver=solver)
        assert index.dtype == torch.int64 and sorted(index.tolist()) == list(range(n))
    x0, noise = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    assert assign(x0, noise, solver=solver).tolist() == [1, 0]


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 40),
    scale=st.sampled_from([1e-30, 1e-6, 1.0, 1e6, 1e15, 1e30]),
    copies=st.integers(1, 5),
    solver=st.sampled_from(["exact", "auction", "auto"]),
    metric=st.sampled_from(["l2", "squared_l2", "l1"]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**16),
)
def test_any_finite_input_gives_a_permutation_no_worse_than_the_mean(n, scale, copies, solver, metric, dtype, seed):
    """Duplicate images and noises, constant images, huge and tiny scales, half and double precision, strided tensors."""
    generator = numpy.random.default_rng(seed)
    x0 = torch.from_numpy(generator.normal(size=(12, n)) * scale).to(dtype).T[generator.integers(0, max(1, n // copies), n)]
    noise = torch.from_numpy(generator.normal(size=(n, 24))).to(dtype)[generator.integers(0, max(1, n // copies), n), ::2]
    index = assign(x0, noise, metric=metric, solver=solver)
    assert sorted(index.tolist()) == list(range(n))
    cost = distances(x0, noise, metric)
    assert float(cost[torch.arange(n), index].sum()) <= float(cost.mean() * n) * (1 + 1e-5)


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(2, 150),
    kind=st.sampled_from(["normal", "few values", "heavy tails", "rank one", "one good column", "sparse", "offsets"]),
    scale=st.sampled_from([1e-30, 1.0, 1e20]),
    seed=st.integers(0, 2**16),
)
def test_the_auction_ends_and_its_certificate_holds_for_any_cost(n, kind, scale, seed):
    generator = numpy.random.default_rng(seed)
    cost = generator.normal(size=(n, n))
    if kind == "few values":
        cost = cost.round()
    elif kind == "heavy tails":
        cost = cost * numpy.exp(2 * generator.normal(size=(n, 1)))
    elif kind == "rank one":
        cost = cost[:, :1] * cost[:1]
    elif kind == "one good column":
        cost = 1e-3 * cost
        cost[:, 0] -= 1
    elif kind == "sparse":
        cost = cost * (generator.random((n, n)) < 0.05)
    elif kind == "offsets":
        cost = cost + 100 * generator.normal(size=(n, 1)) + 100 * generator.normal(size=n)
    cost = torch.from_numpy(cost * scale).float()
    solution = solve(cost, solver="auction")
    assert sorted(solution.index.tolist()) == list(range(n))
    centered, least = optimum(cost)
    reached = float(centered[torch.arange(n), solution.index].sum())
    slack = 1e-6 * float(cost.double().abs().sum()) / n  # fp32 means
    assert reached - least <= solution.gap + slack
    if -least > 1e3 * slack:
        assert reached / least >= solution.kept - 1e-3
        assert reached / least > 0.8


def test_price_wars_between_duplicates_end_soon(crops):
    noise = torch.randn(crops.shape, generator=torch.Generator().manual_seed(1))
    cases = {
        "two images": (crops[:2].repeat(256, 1, 1, 1), noise),
        "eight of each": (crops[:64].repeat(8, 1, 1, 1), noise[:64].repeat(8, 1, 1, 1)),
        "one is different": (torch.cat([100 * crops[:1], crops[1:2].expand(511, -1, -1, -1)]), noise),
        "constant": (torch.ones_like(crops), noise),
        "nearly constant": (1 + 1e-7 * crops, noise),
    }
    for name, (x0, pool) in cases.items():
        solution = certified_assignment(x0, pool, solver="auction")
        assert sorted(solution.index.tolist()) == list(range(512)), name
        assert solution.bids <= 100 * 512, name
        assert solution.kept > 0.9, name


@pytest.mark.parametrize("solver", ["exact", "auction"])
@pytest.mark.parametrize("case", ["equal images", "equal noises", "constant images", "huge", "tiny", "not contiguous", "half"])
def test_awkward_inputs_give_a_best_permutation(case, solver):
    generator = torch.Generator().manual_seed(4)
    x0, noise = torch.randn(6, 3, 4, 4, generator=generator), torch.randn(6, 3, 4, 4, generator=generator)
    if case == "equal images":
        x0 = x0[:1].expand_as(x0)
    elif case == "equal noises":
        noise = noise[:1].expand_as(noise)
    elif case == "constant images":
        x0 = torch.ones_like(x0)
    elif case == "huge":
        x0 = x0 * 1e7
    elif case == "tiny":
        x0 = x0 * 1e-7
    elif case == "not contiguous":
        x0 = x0.transpose(1, 3).transpose(1, 3).flip(0)
    else:
        x0, noise = x0.half(), noise.half()
    index = assign(x0, noise, solver=solver)
    assert sorted(index.tolist()) == list(range(6))
    if case not in ("equal images", "equal noises", "constant images"):  # where all are best
        assert excess(x0, noise, "l2", index) < (1e-3 if solver == "exact" else 0.05)


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 200),
    value=st.sampled_from([float("nan"), float("inf"), float("-inf")]),
    which=st.sampled_from(["image", "noise"]),
    metric=st.sampled_from(["l2", "squared_l2", "l1"]),
    solver=st.sampled_from(["auto", "exact", "auction"]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]),
    data=st.data(),
)
def test_a_row_that_is_not_finite_is_named(n, value, which, metric, solver, dtype, data):
    x0, noise = torch.randn(n, 10).to(dtype), torch.randn(n, 10).to(dtype)
    row, column = data.draw(st.integers(0, n - 1)), data.draw(st.integers(0, 9))
    (x0 if which == "image" else noise)[row, column] = value
    with pytest.raises(ValueError, match=f"^{which} {row} of the batch holds NaN or infinite values"):
        assign(x0, noise, metric=metric, solver=solver)


def test_a_row_is_named_by_its_place_in_the_whole_batch(monkeypatch):
    monkeypatch.setattr(engine, "LARGEST_BLOCK", 4)
    x0, noise = torch.randn(10, 5), torch.randn(10, 5)
    noise[9, 0] = float("nan")
    with pytest.raises(UserError, match="noise 9 of the batch"):
        assign(x0, noise)


def test_refuses_what_has_no_answer_and_says_where():
    x0, noise = torch.zeros(4, 3, 2, 2), torch.randn(4, 3, 2, 2)
    with pytest.raises(UserError, match="agree in shape"):
        assign(x0[:3], noise)
    with pytest.raises(UserError, match=r"agree in shape and device: \(4, 3, 2, 2\) on cpu, \(4, 3, 2, 2\) on meta"):
        assign(x0, noise.to("meta"))
    with pytest.raises(UserError, match=r"floating point \[N, ...\], not \[4\]"):
        assign(torch.zeros(4), torch.zeros(4))
    with pytest.raises(UserError, match=r"torch.int64"):
        assign(x0.long(), noise)
    with pytest.raises(UserError, match="l2, squared_l2, l1"):
        assign(x0, noise, metric="cosine")
    with pytest.raises(UserError, match="auto, float32, float16, bfloat16, int8"):
        assign(x0, noise, dtype="int4")
    with pytest.raises(UserError, match="`dtype` 'int4' is unknown"):
        cost_matrix(x0, noise, dtype="int4")
    with pytest.raises(UserError, match="`solver` 'hungarian' is unknown; known: auto, exact, auction"):
        assign(x0, noise, solver="hungarian")
    with pytest.raises(UserError, match="image 0 of the batch overflows `dtype` float16"):
        assign(x0 + 6e4, noise + 10, dtype="float16")
    for solver in ("exact", "auction"):
        with pytest.raises(UserError, match=r"square, not \[4, 3\]"):
            solve(torch.zeros(4, 3), solver=solver)
        cost = torch.zeros(150, 150)
        cost[17, 3] = float("nan")
        with pytest.raises(UserError, match="row 17 of the cost"):
            solve(cost, solver=solver)


def test_inputs_stay_as_they_are_and_need_no_gradient(crops):
    noise = torch.randn(crops.shape, generator=torch.Generator().manual_seed(1)).requires_grad_()
    x0, before = crops.clone().requires_grad_(), noise.detach().clone()
    for metric in ("l2", "squared_l2"):
        for dtype in DTYPES:
            index = assign(x0, noise, metric=metric, dtype=dtype)
            assert not index.requires_grad
    assert torch.equal(x0, crops) and torch.equal(noise, before)
    cost = cost_matrix(x0, noise)
    copy = cost.clone()
    price_auction(cost)
    solve(cost, solver="exact")
    assert torch.equal(cost, copy)


def test_batches_of_fine_tuning_load_no_compiler():
    """Below `EXACT_BELOW` images the pairing costs no memory worth naming."""
    work = (
        "import sys, torch, immiscible; from immiscible.assignment.solve import EXACT_BELOW\n"
        "images = torch.randn(EXACT_BELOW - 1, 4, 8, 8)\n"
        "assert immiscible.AssignmentCoupling()(images).shape == images.shape\n"
        "print('numba' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", work], check=True, capture_output=True, text=True)
    assert result.stdout == "False\n"
