"""Samplers whose law changes in a run: by the step alone, or by the losses; and what a step asks of them."""

import copy

import numpy
import pytest
import torch
from diffusers import DDPMScheduler
from torch import nn

from immiscible.coupling import IndependentCoupling
from immiscible.errors import UserError
from immiscible.objectives import DenoisingObjective
from immiscible.process import as_process
from immiscible.randomness import Draws, PoolDraws
from immiscible.samplers import LossHistory, RampedSampler, TwoPhases
from immiscible.timesteps import timestep_sampler
from immiscible.weighting import loss_weights

PROCESS = as_process(DDPMScheduler(num_train_timesteps=10))
CPU = torch.device("cpu")


def law(name, **options):
    return timestep_sampler(name, PROCESS, **options)


# By the step


def test_a_law_that_stays_is_that_of_every_step():
    sampler, loss = law("mode"), torch.ones(3)
    assert sampler.at(7) is sampler and sampler.settled(7, torch.arange(3), loss) is loss
    assert sampler.history is None and sampler.course == ""


def test_a_ramp_ends_and_never_leaves_the_laws():
    sampler = law("clts", clts_mean=0.1, clts_std=0.2, clts_ramp_steps=100)
    first, last = sampler.at(0).probabilities, sampler.at(100).probabilities
    assert torch.equal(first, law("uniform").probabilities) and int(last.argmax()) == 0
    torch.testing.assert_close(sampler.at(25).probabilities, 0.75 * first + 0.25 * last)
    for step in (101, 10**6):
        assert torch.equal(sampler.at(step).probabilities, last)
    assert sampler.course == f"moves 0.0 to {100 * sampler.at(100).moved_share():.1f} % of the draws over 100 optimizer steps"
    assert sampler.at(3).levels(4).sigma.shape == (4,)  # which knows the process
    with pytest.raises(UserError, match="timestep probabilities"):
        RampedSampler(first, target=2 * last, ramp_steps=3)


def test_two_phases():
    first, second = law("asymmetric", asymmetric_tau=5), law("clts", clts_std=0.1, clts_ramp_steps=4)
    both = TwoPhases.of(first, second, 6)
    assert torch.equal(both.probabilities, first.probabilities)
    assert both.at(0) is both.at(5) is first
    assert torch.equal(both.at(6).probabilities, second.at(0).probabilities)  # whose steps begin there
    assert torch.equal(both.at(8).probabilities, second.at(2).probabilities)
    reflected = TwoPhases.of(timestep_sampler("asymmetric_released", DDPMScheduler()), timestep_sampler("uniform", DDPMScheduler()), 2)
    assert reflected.at(1).reflect_at == 642 and reflected.at(2).reflect_at is None


class OwnRows(IndependentCoupling):
    """Of a pool of all ranks, this one's."""

    def __call__(self, x0, noise=None, **options):
        return noise[: len(x0)]


class Network(nn.Module):
    def forward(self, x, time):
        return type("Said", (), {"sample": 0.1 * x * (1 + time.view(-1, 1, 1, 1))})()


def objective(sampler):
    weights = loss_weights("none", PROCESS, "epsilon").float()
    return DenoisingObjective(PROCESS, sampler, OwnRows(), weights)


def test_a_step_draws_from_its_own_law_also_within_a_window_over_steps():
    only = [torch.eye(10, dtype=torch.float64)[step] for step in (2, 7)]
    sampler = TwoPhases.of(*(type(law("uniform"))(p) for p in only), 5)
    parts = tuple(Draws(0, step, row, CPU) for step, row in ((4, 0), (4, 3), (5, 0), (5, 3)))
    assert objective(sampler).pair(torch.zeros(12, 1, 2, 2), PoolDraws(parts, 3)).timesteps.tolist() == [2] * 6 + [7] * 6
    ranks = PoolDraws((parts[0], parts[2]), 3, rank=1, ranks=2)
    assert objective(sampler).pair(torch.zeros(6, 1, 2, 2), ranks).timesteps.tolist() == [2] * 3 + [7] * 3


# By the losses


def losses_of(step, n=40):
    generator = numpy.random.default_rng(step)
    t = generator.integers(0, 10, n)
    return torch.from_numpy(t), torch.from_numpy(((1 + t) * generator.random(n)).astype("float32"))


def recorded(history, steps):
    for step in steps:
        history.law(step)
        history.record(step, *losses_of(step))
    return history


def test_the_law_is_iddpms():
    """Its resampler in a few lines: the last ten losses of each timestep, warm when all have ten; here two steps late."""
    history, kept, warm = LossHistory(10), [[] for _ in range(10)], 0
    for step in range(12):
        expected = numpy.full(10, 0.1)
        for known in range(step - 1):
            if known == step - 2:  # those before are in already
                for t, loss in zip(*(column.tolist() for column in losses_of(known)), strict=True):
                    kept[t] = [*kept[t], loss][-10:]
        if min(map(len, kept)) == 10:
            weights = numpy.sqrt([numpy.mean(numpy.square(each)) for each in kept])
            expected, warm = 0.999 * weights / weights.sum() + 0.001 / 10, warm + 1
        assert history.law(step).numpy() == pytest.approx(expected, rel=1e-12)
        history.record(step, *losses_of(step))
    assert 2 < warm < 10


def test_looking_ahead_changes_no_law():
    alone, ahead = LossHistory(10), LossHistory(10)
    for step in range(9):
        expected = alone.law(step)
        alone.record(step, *losses_of(step))
        assert torch.equal(ahead.law(step), expected)
        ahead.law(step + 1)  # before the step's losses are there
        ahead.record(step, *losses_of(step))
        assert torch.equal(ahead.law(step), expected)


@pytest.mark.parametrize("ahead", [False, True])
def test_it_goes_on_from_a_checkpoint_as_if_nothing_had_happened(ahead, tmp_path):
    history = recorded(LossHistory(10), range(7))
    if ahead:
        history.law(7)
    torch.save(history.state_dict(), tmp_path / "state")
    again = LossHistory(10)
    again.load_state_dict(torch.load(tmp_path / "state"))
    for step in range(7, 12):
        assert torch.equal(again.law(step), history.law(step))
        assert again.law(step).std() > 0.01
        for each in (history, again):
            each.record(step, *losses_of(step))


def test_losses_of_all_ranks_count_in_their_order():
    alone, shared = LossHistory(10), LossHistory(10)
    for step in range(8):
        t, loss = losses_of(step)
        alone.record(step, t, loss)
        other = torch.stack([t[20:].float(), loss[20:]], dim=1)
        shared.gather = lambda rows, other=other: torch.cat([rows, other])
        shared.record(step, t[:20], loss[:20])
        assert torch.equal(alone.law(step + 1), shared.law(step + 1))


def test_weighted_losses_are_unbiased():
    sampler = law("loss_second_moment")
    recorded(sampler.history, range(8))
    p, t = sampler.at(8).probabilities, torch.arange(10)
    loss = torch.rand(10, generator=torch.Generator().manual_seed(0))
    assert p.max() > 2 * p.min()
    weighted = sampler.settled(8, t, loss)
    assert float((p * weighted).sum()) == pytest.approx(float(loss.mean()), rel=1e-6)
    assert not weighted.requires_grad and sampler.settled(8, t, loss.clone().requires_grad_()).requires_grad


def test_the_objective_tells_the_losses_and_weighs_them():
    sampler = law("loss_second_moment")
    found, plain = objective(sampler), objective(law("uniform"))
    x0 = torch.rand(64, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    for step in range(8):
        draws = Draws(0, step, 0, CPU)
        pairs = found.pair(x0, PoolDraws((draws,), 64))
        alone = plain(Network(), pairs, draws)
        p = sampler.at(step).probabilities.float()
        torch.testing.assert_close(found(Network(), pairs, draws), alone / (10 * p[pairs.timesteps]))
    assert sampler.at(8).moved_share() > 0.05
    phases = TwoPhases.of(law("uniform"), copy.copy(sampler), 3)
    assert phases.history is sampler.history
