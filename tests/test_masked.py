"""Masked training: the mask's share, and a loss that is the sum of both passes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from immiscible.coupling import IndependentCoupling
from immiscible.errors import UserError
from immiscible.masked import MaskedObjective
from immiscible.objectives import DenoisingObjective
from immiscible.randomness import Draws, PoolDraws

CPU = torch.device("cpu")


def draws(step=0, first_row=0):
    return Draws(7, step, first_row, CPU)


def masked(least=0.3, greatest=None, tokens=16, objective=None):
    return MaskedObjective(objective, tokens, least, least if greatest is None else greatest)


@pytest.mark.parametrize(
    ("tokens", "share", "kept"), [(16, 0.3, 11), (256, 0.3, 179), (100, 0.5, 50), (10, 0.9, 1), (4, 0.9, 1), (9, 0.0, 9)]
)
def test_the_mask_has_the_stated_share(tokens, share, kept):
    found = masked(share, tokens=tokens).kept(5, draws())
    assert found.shape == (5, kept) and found.dtype == torch.int64
    assert all(row == sorted(set(row)) and row[0] >= 0 and row[-1] < tokens for row in found.tolist())


def test_every_token_is_masked_as_often():
    found = masked(tokens=16).kept(4096, draws())
    often = torch.bincount(found.flatten(), minlength=16) / 4096
    torch.testing.assert_close(often, torch.full((16,), 11 / 16), rtol=0, atol=5 * (11 / 16 * 5 / 16 / 4096) ** 0.5)


def test_an_images_mask_is_its_own_wherever_it_is_trained():
    whole, parts = masked().kept(8, draws()), [masked().kept(4, draws(first_row=first)) for first in (0, 4)]
    assert torch.equal(whole, torch.cat(parts)) and len({tuple(row) for row in whole.tolist()}) == 8
    assert not torch.equal(whole, masked().kept(8, draws(step=1)))


def test_a_range_is_drawn_from_in_each_step():
    objective = masked(0.3, 0.5, tokens=1000)
    shares = torch.tensor([1 - objective.kept(1, draws(step)).shape[1] / 1000 for step in range(200)])
    assert 0.3 <= shares.min() < 0.32 and 0.48 < shares.max() <= 0.501 and abs(shares.mean() - 0.4) < 0.02
    assert objective.kept(1, draws(3, 0)).shape == objective.kept(1, draws(3, 64)).shape  # every rank's


@pytest.mark.parametrize(("least", "greatest"), [(-0.1, 0.3), (0.5, 0.3), (0.5, 1.0)])
def test_shares_that_are_none(least, greatest):
    with pytest.raises(UserError, match="shares from 0 to below 1"):
        masked(least, greatest)


class Recorded(nn.Module):
    """Doubles what it is given, less the share that it does not see; keeps what it was called with."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(self, x, time, **told):
        self.calls.append((x, time, told))
        return SimpleNamespace(sample=x * (2 if "kept" not in told else told["kept"].shape[1] / 16))


def test_the_loss_is_that_of_both_passes_of_one_noise():
    from immiscible.process import NoiseProcess
    from immiscible.schedulers import build_scheduler
    from immiscible.timesteps import timestep_sampler
    from immiscible.weighting import loss_weights

    process = NoiseProcess.from_scheduler(build_scheduler("ddpm"))
    weights = loss_weights("min_snr", process, "epsilon").float()
    plain = DenoisingObjective(process, timestep_sampler("uniform", process), IndependentCoupling(), weights, noise_offset=0.1)
    objective, model = masked(objective=plain), Recorded()
    x0, labels = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(4)
    pairs = objective.pair(x0, PoolDraws((draws(),), 4), labels, {"class_labels": labels})
    loss = objective(model, pairs, draws())
    (x, time, told), (other, again, more) = model.calls
    assert torch.equal(x, other) and torch.equal(time, again)
    assert told.keys() == {"class_labels"} and more.keys() == {"class_labels", "kept"}
    assert torch.equal(more["kept"], objective.kept(4, draws()))
    one = plain(lambda x, time, **told: SimpleNamespace(sample=2 * x), pairs, draws())
    two = plain(lambda x, time, **told: SimpleNamespace(sample=11 / 16 * x), pairs, draws())
    torch.testing.assert_close(loss, one + two)
    for name in ("process", "sampler", "coupling", "weights", "prediction_type", "image_scale"):
        assert getattr(objective, name) is getattr(plain, name)


def test_a_law_that_goes_by_losses_learns_of_the_sum_once():
    from immiscible.process import NoiseProcess
    from immiscible.schedulers import build_scheduler
    from immiscible.timesteps import timestep_sampler
    from immiscible.weighting import loss_weights

    process = NoiseProcess.from_scheduler(build_scheduler("ddpm", num_train_timesteps=4))
    sampler, weights = timestep_sampler("loss_second_moment", process), loss_weights("none", process, "epsilon")
    objective = masked(objective=DenoisingObjective(process, sampler, IndependentCoupling(), weights))
    pairs = objective.pair(torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0)), PoolDraws((draws(),), 8))
    loss = objective(Recorded(), pairs, draws())
    told = sampler.history.state_dict()["waiting"][0]
    assert torch.equal(told[:, 0].long(), pairs.timesteps) and torch.equal(told[:, 1], loss)  # uniform still, so that it weighs one
