"""One assignment over an epoch: its pool, its blocks and classes, and that it is the assignment of just these images and noises."""

import numpy
import pytest
import torch
from scipy.optimize import linear_sum_assignment

import immiscible
from immiscible import epoch as epochs
from immiscible.coupling import build_coupling
from immiscible.epoch import EpochCoupling, EpochPlan, epoch_problems
from immiscible.errors import UserError

SHAPE = (1, 4, 4)


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randn(300, *SHAPE, generator=torch.Generator().manual_seed(0))


def pool(count: int, seed: int = 0, epoch: int = 0) -> torch.Tensor:
    return immiscible.epoch_noise(torch.arange(count), *SHAPE, seed=seed, epoch=epoch)


def test_a_noise_is_a_function_of_its_number_whoever_asks():
    whole = pool(50)
    numbers = torch.tensor([49, 3, 3, 17])
    assert torch.equal(immiscible.epoch_noise(numbers, *SHAPE, seed=0, epoch=0), whole[numbers])
    for other in (pool(50, seed=1), pool(50, epoch=1)):
        assert not torch.isin(other, whole).any()


def test_the_pool_is_standard_normal_and_its_rows_know_nothing_of_each_other():
    noises = immiscible.epoch_noise(torch.arange(4000), 64, seed=0, epoch=0)
    assert abs(float(noises.mean())) < 0.01 and abs(float(noises.var()) - 1) < 0.015
    neighbours = (noises[1:] * noises[:-1]).mean(1)  # 64 products of independent numbers: deviation 1/8
    assert abs(float(neighbours.mean())) < 0.01 and abs(float(neighbours.std()) - 1 / 8) < 0.01


def test_no_two_noises_of_an_epoch_have_one_seed():
    """Torch's generator takes 32 bits: seeds drawn at random would collide for two hundred pairs of a million."""
    for first in (0, 12345, 2**32 - 1):
        numbers = numpy.concatenate([numpy.arange(10**6), [2**31, 2**32 - 1]])
        assert len(numpy.unique(epochs._mixed(numbers, first))) == len(numbers)


@pytest.mark.parametrize("metric", ["l2", "squared_l2"])
def test_a_plan_is_the_assignment_of_these_images_and_noises(images, metric):
    plan = immiscible.plan_epoch(images, seed=0, epoch=0, coupling=immiscible.AssignmentCoupling(metric=metric, solver="exact"))
    assert torch.equal(plan.sort().values, torch.arange(300))
    cost = torch.cdist(images.flatten(1).double(), pool(300).flatten(1).double())
    cost = cost if metric == "l2" else cost.square()
    rows, best = linear_sum_assignment(cost.numpy())
    assert float(cost[torch.arange(300), plan].sum()) == pytest.approx(float(cost.numpy()[rows, best].sum()), rel=1e-6)


def test_classes_share_out_their_own_noises(images):
    labels = torch.cat([torch.zeros(200), torch.ones(98), torch.tensor([7, -1])]).long()[torch.randperm(300)]
    plan = immiscible.plan_epoch(images, seed=3, epoch=5, labels=labels)
    assert torch.equal(plan.sort().values, torch.arange(300)) and torch.equal(labels[plan], labels)
    alone = (labels == 7) | (labels == -1)
    assert torch.equal(plan[alone], alone.nonzero()[:, 0])
    noises = pool(300, seed=3, epoch=5)
    for label in (0, 1):
        rows = (labels == label).nonzero()[:, 0]
        cost = torch.cdist(images[rows].flatten(1), noises[rows].flatten(1)).double().numpy()
        least = cost[linear_sum_assignment(cost)].sum()
        found = (images[rows] - noises[plan[rows]]).flatten(1).norm(dim=1).double().sum()
        assert least <= float(found) + 1e-4 < 1.001 * least + (cost.trace() - least) * 0.01


def test_large_epochs_are_cut_into_random_blocks_of_equal_size(images, monkeypatch):
    monkeypatch.setattr(epochs, "LARGEST_BLOCK", 128)
    blocks = [epoch_problems(300, seed=0, epoch=number) for number in (0, 0, 1)]
    assert [len(block) for block in blocks[0]] == [100, 100, 100]
    assert torch.equal(torch.cat(blocks[0]).sort().values, torch.arange(300))
    assert all(map(torch.equal, blocks[0], blocks[1])) and not torch.equal(blocks[0][0], blocks[2][0])
    labels = (torch.arange(300) < 280).long()
    classes = [set(labels[block].tolist()) for block in epoch_problems(300, seed=0, epoch=0, labels=labels)]
    assert classes == [{0}, {1}, {1}, {1}]
    plan = immiscible.plan_epoch(lambda rows: images[rows], 300, seed=0, epoch=0)
    for block in blocks[0]:
        assert set(plan[block].tolist()) == set(block.tolist())
        direct = immiscible.assign(images[block], pool(300)[block])
        assert torch.equal(plan[block], block[direct])


def test_a_plan_brings_pairs_nearer_than_batches_do(images):
    plan = immiscible.plan_epoch(images, seed=0, epoch=0)
    noises = pool(300)
    near = (images - noises[plan]).flatten(1).norm(dim=1).mean()
    batches = torch.cat([noises[rows][immiscible.assign(images[rows], noises[rows])] for rows in torch.arange(300).split(30)])
    assert near < (images - batches).flatten(1).norm(dim=1).mean() < (images - noises).flatten(1).norm(dim=1).mean()


def test_how_many_were_paired_together():
    plan = EpochPlan.unsolved(10, [torch.arange(6), torch.tensor([6, 7])])
    assert plan.together == pytest.approx((6 * 6 + 2 * 2 + 1 + 1) / 10) and plan.numbers.tolist() == [-1] * 8 + [8, 9]


def test_one_image_and_none():
    assert immiscible.plan_epoch(torch.zeros(1, 3), seed=0, epoch=0).tolist() == [0]
    assert immiscible.plan_epoch(torch.zeros(0, 3), seed=0, epoch=0).tolist() == []


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"coupling": build_coupling("assignment", condition="centered")}, "condition` centered"),
        ({"coupling": build_coupling("assignment", min_timestep=5)}, "at every timestep"),
        ({"coupling": build_coupling("nearest")}, "assignment"),
        ({"labels": torch.zeros(300)}, r"int64 \[300\]"),
        ({"labels": torch.zeros(299).long()}, r"int64 \[300\]"),
    ],
)
def test_what_cannot_be_planned(images, options, line):
    with pytest.raises(UserError, match=line):
        immiscible.plan_epoch(images, seed=0, epoch=0, **options)


def test_a_function_of_images_needs_their_number(images):
    with pytest.raises(UserError, match="`count`"):
        immiscible.plan_epoch(lambda rows: images[rows], seed=0, epoch=0)


def test_a_broken_image_is_named(images):
    broken = images.clone()
    broken[17] = float("nan")
    with pytest.raises(UserError, match="image 17 of epoch 0 holds NaN"):
        immiscible.plan_epoch(broken, seed=0, epoch=0)


def test_a_coupling_without_plans_says_what_to_use():
    with pytest.raises(UserError, match="plan_epoch"):
        EpochCoupling(immiscible.AssignmentCoupling())(torch.zeros(2, 3))
