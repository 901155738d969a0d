"""Consistency training's formulas, in float64 from the papers."""

import copy
import math
import sys
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from immiscible.configs import UnconditionalConfig
from immiscible.consistency import (
    LPIPS,
    AveragedTeacher,
    ConsistencyObjective,
    ConsistencyScalings,
    Discretization,
    l2,
    pseudo_huber,
    student,
)
from immiscible.coupling import AssignmentCoupling
from immiscible.edm import Karras, LogNormal, SigmaProcess
from immiscible.errors import UserError
from immiscible.method import build_objective
from immiscible.randomness import Draws, PoolDraws, reseed_globally
from immiscible.timesteps import timestep_sampler
from immiscible.weighting import loss_weights

CPU = torch.device("cpu")


class Network(nn.Module):
    def __init__(self, dropout=0.0):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(0.7))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, time):
        return SimpleNamespace(sample=self.dropout(self.gain * torch.tanh(x) * (1 + 1e-3 * time.view(-1, 1, 1, 1))))


def objective(curriculum="doubling", uniform=False, steps=8, first=10, last=1280, **options):
    process = SigmaProcess.build(
        Karras() if uniform else LogNormal(-1.1, 2.0, 0.002, 80), ConsistencyScalings(), sigma_data=0.5, num_levels=1000
    )
    return ConsistencyObjective(
        process=process,
        sampler=timestep_sampler("uniform", process),
        coupling=AssignmentCoupling(),
        weights=loss_weights("none", process, "preconditioned"),
        prediction_type="preconditioned",
        discretization=Discretization(curriculum, first, last, steps),
        **options,
    )


def paired(found, batch=32, step=0):
    draws = Draws(3, step, 0, CPU)
    x0 = torch.rand(batch, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return found.pair(x0, PoolDraws((draws,), batch)), draws


def float64_denoised(network, x0, noise, sigma):
    sigma = sigma.view(-1, 1, 1, 1)
    x = x0 + sigma * noise
    skip = 0.25 / ((sigma - 0.002) ** 2 + 0.25)
    out = (sigma - 0.002) * 0.5 / (sigma**2 + 0.25).sqrt()
    with torch.no_grad():
        return skip * x + out * network(x / (sigma**2 + 0.25).sqrt(), 250 * sigma.flatten().log()).sample


def karras(count):
    ends = 0.002 ** (1 / 7), 80 ** (1 / 7)
    return torch.tensor([(ends[0] + number / (count - 1) * (ends[1] - ends[0])) ** 7 for number in range(count)], dtype=torch.float64)


@pytest.mark.parametrize("improved", [True, False])
def test_loss_is_the_papers(improved):
    """One loss, step by step: levels, one noise for both, boundary scalings, distance and weight."""
    options = {"distance": pseudo_huber, "by_gap": True} if improved else {"distance": l2, "by_gap": False}
    found = objective("doubling" if improved else "square_root", not improved, first=10 if improved else 2, last=40, **options)
    pairs, draws = paired(found, step=3)
    levels = karras(21 if improved else math.ceil(math.sqrt(3 / 8 * (41**2 - 4) + 4) - 1) + 1)
    share = (pairs.timesteps + draws.uniform("level", 32)) / 1000
    if improved:
        below, upto = (torch.special.ndtr(torch.tensor((math.log(end) + 1.1) / 2, dtype=torch.float64)) for end in (0.002, 80))
        drawn = (2 * torch.special.ndtri(below + (upto - below) * share) - 1.1).exp()
    else:
        drawn = (0.002 ** (1 / 7) + share * (80 ** (1 / 7) - 0.002 ** (1 / 7))) ** 7
    index = torch.tensor([max(number for number in range(len(levels) - 1) if levels[number] <= sigma + 1e-12) for sigma in drawn])
    low, high = levels[index], levels[index + 1]
    network, x0, noise = Network().double(), pairs.x0.double(), pairs.noise.double()
    difference = float64_denoised(network, x0, noise, high) - float64_denoised(network, x0, noise, low)
    if improved:
        c = 0.00054 * math.sqrt(3 * 4 * 4)
        expected = ((difference.square().sum((1, 2, 3)) + c**2).sqrt() - c) / (high - low)
    else:
        expected = difference.square().mean((1, 2, 3))
    assert torch.allclose(found(Network(), pairs, draws).double(), expected, rtol=2e-3, atol=1e-6)


def test_at_the_least_level_the_network_says_its_input():
    found = objective()
    pairs, _ = paired(found)
    least = torch.full((32,), 0.002, dtype=torch.float64)
    said = found.denoised(Network(), pairs.x0, pairs.noise, least, {})
    assert torch.equal(said, pairs.x0 + torch.tensor(0.002) * pairs.noise)
    grid = found.grid(5)
    assert (grid[0], grid[-1]) == (0.002, 80) and (grid.diff() > 0).all()


def test_scalings_agree_with_the_sampler_of_diffusers():
    from diffusers import CMStochasticIterativeScheduler

    scheduler = CMStochasticIterativeScheduler()
    for sigma in (0.002, 0.5, 3.0, 80.0):
        ours = ConsistencyScalings()(torch.tensor(sigma, dtype=torch.float64))
        skip, out = scheduler.get_scalings_for_boundary_condition(torch.tensor(sigma, dtype=torch.float64))
        assert (float(ours.skip), float(ours.out)) == pytest.approx((float(skip), float(out)))
        assert float(ours.time) == pytest.approx(float(scheduler.sigma_to_t(sigma)))
    scheduler.set_timesteps(1)
    scaled = scheduler.scale_model_input(torch.ones(1, 1), scheduler.timesteps[0])
    assert float(scaled) == pytest.approx(float(ConsistencyScalings()(torch.tensor(80.0)).input))


def test_the_doubling_curriculum_in_eight_equal_parts():
    count = Discretization("doubling", 10, 1280, 800)
    assert [count(step) for step in range(0, 800, 100)] == [11, 21, 41, 81, 161, 321, 641, 1281]
    assert [count(step) for step in (99, 100, 799, 800, 10**6)] == [11, 21, 1281, 1281, 1281]
    assert Discretization("doubling", 10, 1280, 3)(0) == 11  # shorter than its parts
    uneven = Discretization("doubling", 3, 13, 90)  # s1 / s0 is cut to 4 first: three parts of 30 steps
    assert [uneven(step) for step in (0, 29, 30, 59, 60, 89, 90)] == [4, 4, 7, 7, 13, 13, 14]
    assert {Discretization("constant", 10, 1280, 800)(step) for step in (0, 400, 800)} == {11}


def test_the_square_root_curriculum_and_the_averaged_teachers_decay():
    """Appendix C of Song et al.: from s0 to s1 + 1 levels, and a decay that grows with them."""
    count = Discretization("square_root", 2, 150, 800_000)
    assert count(0) == 2 and count(800_000) == 151
    assert count(400_000) == math.ceil(math.sqrt(0.5 * (151**2 - 4) + 4) - 1) + 1
    teacher = AveragedTeacher(count, 0.9, lambda model: model)
    assert teacher.mu(0) == pytest.approx(math.exp(2 * math.log(0.9) / 2))
    assert teacher.mu(800_000) == pytest.approx(math.exp(2 * math.log(0.9) / 151))


def test_pairs_of_levels_are_drawn_as_the_papers_say():
    """Improved: ``erf((ln s_{i+1} - m) / (sqrt(2) s)) - erf(the same of s_i)``, normalized; original: uniform."""
    for uniform in (False, True):
        found = objective("constant", uniform)
        t = found.sampler(40_000, generator=torch.Generator().manual_seed(1))
        low, high = found.pair_of_levels(t, Draws(0, 0, 0, CPU))
        levels = karras(11)
        index = (low[:, None] - levels[None]).abs().argmin(1)
        assert torch.allclose(high, levels[index + 1])
        ends = torch.erf((levels.log() + 1.1) / (math.sqrt(2) * 2))
        expected = torch.full((10,), 0.1, dtype=torch.float64) if uniform else ends.diff() / ends.diff().sum()
        assert (index.bincount(minlength=10) / 40_000 - expected).abs().max() < 0.01
    low, high = objective("constant", skip_steps=3).pair_of_levels(t, Draws(0, 0, 0, CPU))
    index = (low[:, None] - levels[None]).abs().argmin(1)
    assert torch.allclose(high, levels[index + 3])


def test_the_teacher_has_no_gradient_and_drops_out_the_same_units():
    found, network = objective("constant", last=10), Network(dropout=0.5)
    pairs, draws = paired(found)
    dropped = []
    network.dropout.register_forward_hook(lambda module, given, result: dropped.append((result == 0) & (given[0] != 0)))
    reseed_globally(0, "library")
    found(network, pairs, draws).mean().backward()
    assert len(dropped) == 2 and torch.equal(*dropped) and dropped[0].any()
    alone = Network()
    alone.gain.data.fill_(0.7)
    teacher = copy.deepcopy(alone)
    other = objective("constant", last=10, teacher=lambda model, step: teacher)
    first, second = Network(), alone
    found(first, pairs, draws).mean().backward()
    other(second, pairs, draws).mean().backward()
    assert teacher.gain.grad is None and torch.equal(first.gain.grad, second.gain.grad)


def test_the_averaged_teacher_follows_and_goes_on_where_it_was():
    count = Discretization("square_root", 2, 50, 10)
    teacher, network = AveragedTeacher(count, 0.9, lambda model: model), Network()
    expected, x = 0.7, torch.ones(1, 1, 1, 1)
    for step in range(6):
        for _ in range(2):  # micro-batches
            said = teacher(network, step)(x, torch.zeros(1)).sample
        assert float(said.detach()) == pytest.approx(expected * math.tanh(1), rel=1e-6)
        with torch.no_grad():
            network.gain += 0.1
        mu = math.exp(2 * math.log(0.9) / count(step))
        expected = mu * expected + (1 - mu) * float(network.gain.detach())
    again = AveragedTeacher(count, 0.9, lambda model: model)
    again.load_state_dict(copy.deepcopy(teacher.state_dict()))
    assert torch.equal(again(network, 6)(x, torch.zeros(1)).sample, teacher(network, 6)(x, torch.zeros(1)).sample)
    assert student(network, 0) is network


def test_the_averaged_teacher_is_the_same_of_a_compiled_network():
    """A run may be compiled from one of its checkpoints on."""
    config = UnconditionalConfig(objective="consistency", teacher="ema", curriculum_steps=9)
    network, said = Network(), []
    for model in (network, torch.compile(network, backend="eager")):
        found = build_objective(config, None, Accelerator(cpu=True))
        said.append(found.teacher(model, 0)(torch.ones(1, 1, 1, 1), torch.zeros(1)).sample)
        assert found.teacher.state_dict()["weights"].keys() == {"gain"}
    assert torch.equal(*said)


def test_lpips_is_asked_for_by_name(monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(UserError, match="needs the packages lpips and torchvision"):
        LPIPS(CPU)
    seen = []

    class Fake(nn.Module):
        def __init__(self, net, verbose):
            super().__init__()

        def forward(self, output, target):
            seen.append(output.shape)
            return (output - target).square().mean((1, 2, 3), keepdim=True)

    monkeypatch.setitem(sys.modules, "lpips", SimpleNamespace(LPIPS=Fake))
    distance = LPIPS(CPU)(torch.ones(2, 3, 8, 8), torch.zeros(2, 3, 8, 8))
    assert distance.tolist() == [1, 1] and seen == [torch.Size([2, 3, 224, 224])]
    with pytest.raises(UserError, match="three channels, not 1"):
        LPIPS(CPU)(torch.ones(2, 1, 8, 8), torch.zeros(2, 1, 8, 8))
