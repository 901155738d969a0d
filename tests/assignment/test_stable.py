"""The stable matching: no two would rather have each other; it is Gale and Shapley's from either side, and greedy from the least."""

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from immiscible import AssignmentCoupling, GlobalCoupling, UserError, assign, cost_matrix, plan_epoch
from immiscible.assignment.solve import certified_assignment, solve


def ranks(cost: numpy.ndarray) -> numpy.ndarray:
    """The place of each pair [i, j] in the order by cost, then by i, then by j: all different."""
    places = numpy.empty(cost.size, int)
    places[cost.flatten().argsort(kind="stable")] = numpy.arange(cost.size)
    return places.reshape(cost.shape)


def greedy(cost: numpy.ndarray) -> list[int]:
    """Pairs from the least up, unless one of the two is taken."""
    index, n = {}, len(cost)
    for place in cost.flatten().argsort(kind="stable"):
        i, j = divmod(int(place), n)
        if i not in index and j not in index.values():
            index[i] = j
    return [index[i] for i in range(n)]


def deferred_acceptance(rank: numpy.ndarray) -> list[int]:
    """Gale and Shapley's algorithm: each free row proposes down its list, each column keeps the best so far; which column a row gets."""
    n = len(rank)
    lists, kept, free = [list(row.argsort()) for row in rank], {}, list(range(n))
    while free:
        i = free.pop()
        j = int(lists[i].pop(0))
        rejected = kept.get(j)
        if rejected is None or rank[i, j] < rank[rejected, j]:
            kept[j] = i
        else:
            rejected = i
        if rejected is not None:
            free.append(rejected)
    row_of = sorted((i, j) for j, i in kept.items())
    return [j for _, j in row_of]


def blocking_pairs(rank: numpy.ndarray, index: list[int]) -> list[tuple[int, int]]:
    """The pairs that would rather have each other than what they have."""
    n, image_of = len(rank), {j: i for i, j in enumerate(index)}
    pairs = [(i, j) for i in range(n) for j in range(n)]
    return [(i, j) for i, j in pairs if rank[i, j] < rank[i, index[i]] and rank[i, j] < rank[image_of[j], j]]


@settings(max_examples=60, deadline=None)
@given(n=st.integers(2, 40), kind=st.sampled_from(["normal", "few values", "popular columns", "equal"]), seed=st.integers(0, 2**16))
def test_it_is_the_one_stable_matching(n, kind, seed):
    generator = numpy.random.default_rng(seed)
    cost = generator.normal(size=(n, n)).astype(numpy.float32)
    if kind == "few values":
        cost = cost.round()
    elif kind == "popular columns":
        cost += 10 * generator.normal(size=n).astype(numpy.float32)
    elif kind == "equal":
        cost[:] = 1
    index = solve(torch.from_numpy(cost), solver="stable").index.tolist()
    rank = ranks(cost)
    assert sorted(index) == list(range(n))
    assert blocking_pairs(rank, index) == []
    assert index == greedy(cost) == deferred_acceptance(rank)
    noise_to_image = deferred_acceptance(rank.T)
    assert [noise_to_image[j] for j in index] == list(range(n))
    worse = [*index[1:], index[0]]
    assert blocking_pairs(rank, worse)  # which the check sees


@pytest.fixture(scope="module")
def batch():
    """Images of many lengths, so that what is left out of costs elsewhere matters here."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.linspace(0.1, 3, 60)[torch.randperm(60, generator=generator), None, None, None]
    return lengths * torch.randn(60, 3, 4, 4, generator=generator), torch.randn(60, 3, 4, 4, generator=generator)


@pytest.mark.parametrize("metric", ["l2", "squared_l2", "l1"])
def test_it_goes_by_whole_distances(batch, metric):
    x0, noise = batch
    difference = x0.double().flatten(1)[:, None] - noise.double().flatten(1)
    distance = difference.abs().sum(2) if metric == "l1" else difference.norm(dim=2)
    for dtype in ("auto", "float32"):
        assert assign(x0, noise, metric=metric, solver="stable", dtype=dtype).tolist() == greedy(distance.numpy())
    without_constants = solve(cost_matrix(x0, noise, metric=metric), solver="stable").index
    assert without_constants.tolist() != greedy(distance.numpy())
    whole = cost_matrix(x0, noise, metric=metric, whole=True).double()
    torch.testing.assert_close(whole, distance.square() if metric == "squared_l2" else distance, rtol=1e-5, atol=0)


def test_its_certificate_is_true(batch):
    solution = certified_assignment(*batch, solver="stable")
    distance = torch.cdist(*(rows.double().flatten(1) for rows in batch)).numpy()
    none, least = 60 * distance.mean(), distance[linear_sum_assignment(distance)].sum()
    reached = distance[range(60), solution.index].sum()
    assert least < reached <= least + solution.gap
    assert 0 < solution.kept < (none - reached) / (none - least) < 1
    assert (solution.bids, solution.relaxations) == (0, 0)


def test_within_classes_and_over_an_epoch(batch):
    x0, noise = batch
    labels = torch.arange(60) % 3
    paired = AssignmentCoupling(solver="stable", condition="within")(x0, noise, labels=labels)
    for group in range(3):
        rows = labels == group
        assert torch.equal(paired[rows], noise[rows][assign(x0[rows], noise[rows], solver="stable")])
    plan = plan_epoch(x0, seed=0, epoch=0, coupling=AssignmentCoupling(solver="stable"))
    assert plan.sort().values.tolist() == list(range(60))
    assert not torch.equal(plan, plan_epoch(x0, seed=0, epoch=0))


def test_what_it_refuses(batch):
    with pytest.raises(UserError, match="`solver` stable compares whole distances, of which GlobalCoupling exchanges differences"):
        GlobalCoupling(None, AssignmentCoupling(solver="stable"))
    cost = torch.zeros(5, 5)
    cost[3, 1] = float("nan")
    with pytest.raises(UserError, match="row 3 of the cost"):
        solve(cost, solver="stable")
