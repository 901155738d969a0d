"""Draws are a function of (seed, purpose, step, global row) and of nothing else."""

import random

import numpy
import pytest
import torch

from immiscible.randomness import Draws, derive_seed, reseed_globally

CPU = torch.device("cpu")


@pytest.mark.parametrize("parts", [[12], [6, 6], [4, 4, 4], [1, 2, 9], [8, 4], [5, 7]])
def test_a_global_row_has_the_same_numbers_however_rows_are_split(parts):
    whole, times = Draws(3, 5, 0, CPU).normal("noise", 12, 2, 3, 3), Draws(3, 5, 0, CPU).uniform("timesteps", 12)
    first = 0
    for size in parts:
        draws = Draws(3, 5, first, CPU)
        assert torch.equal(draws.normal("noise", size, 2, 3, 3), whole[first : first + size])
        assert torch.equal(draws.uniform("timesteps", size), times[first : first + size])
        first += size


def test_draws_differ_by_seed_step_purpose_and_row_and_leave_the_global_generator_alone():
    state = torch.get_rng_state()
    reference = Draws(1, 1, 0, CPU).normal("noise", 16, 4)
    for other in (
        Draws(2, 1, 0, CPU).normal("noise", 16, 4),
        Draws(1, 2, 0, CPU).normal("noise", 16, 4),
        Draws(1, 1, 0, CPU).normal("x", 16, 4),
    ):
        assert not torch.isclose(reference, other).any()
    assert len({tuple(row) for row in reference.tolist()}) == 16
    assert torch.equal(torch.get_rng_state(), state)


def test_rows_of_two_shapes_share_no_numbers_where_a_step_has_both():
    """Of one shape each row has the same numbers as ever, however rows are split."""
    square, flat = ((first, shape) for first, shape in ((0, (2, 4, 4)), (4, (2, 2, 4))))
    one, other = (Draws(0, 3, first, CPU, by_shape=True).normal("noise", 4, *shape).flatten() for first, shape in (square, flat))
    assert not torch.isin(one, other).any()
    plain = [Draws(0, 3, first, CPU).normal("noise", 4, *shape).flatten() for first, shape in (square, flat)]
    assert torch.isin(*plain).any()
    whole = Draws(0, 3, 0, CPU, by_shape=True).normal("noise", 12, *flat[1])
    assert torch.equal(whole[4:8].flatten(), other)
    assert torch.equal(Draws(0, 3, 0, CPU, by_shape=True).uniform("t", 8), Draws(0, 3, 0, CPU).uniform("t", 8))


def test_draws_have_the_right_law():
    noise = torch.cat([Draws(0, step, 0, CPU).normal("noise", 64, 3, 8, 8) for step in range(20)])
    assert noise.dtype == torch.float32
    assert abs(float(noise.mean())) < 5 / noise.numel() ** 0.5
    assert abs(float(noise.var()) - 1) < 5 * (2 / noise.numel()) ** 0.5
    correlation = torch.corrcoef(noise[:64].flatten(1))
    assert float((correlation - torch.eye(64)).abs().max()) < 6 / 192**0.5
    uniform = torch.cat([Draws(0, step, 0, CPU).uniform("timesteps", 256) for step in range(40)]).sort().values
    assert uniform.dtype == torch.float64 and uniform[0] >= 0 and uniform[-1] < 1
    assert float((uniform - (torch.arange(len(uniform)) + 0.5) / len(uniform)).abs().max()) < 1.95 / len(uniform) ** 0.5


def test_seeds_are_stable_across_machines_and_versions():
    assert derive_seed(0, "noise", 1, 2) == 5938781660159604271
    assert derive_seed(1, 23) != derive_seed(12, 3)
    assert 0 <= derive_seed("anything") < 2**63


def test_reseeding_reaches_every_global_generator():
    def numbers():
        return random.random(), float(numpy.random.rand()), float(torch.rand(()))

    reseed_globally(5, "library", 7, 0)
    first = numbers()
    reseed_globally(5, "library", 7, 0)
    assert numbers() == first
    reseed_globally(5, "library", 7, 1)
    assert not set(numbers()) & set(first)
