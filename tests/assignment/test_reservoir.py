"""The reservoir: an unbiased pool for small batches."""

import pytest
import torch
from scipy.stats import kstest

from immiscible.assignment.reservoir import ReservoirCoupling
from immiscible.assignment.solve import assign
from immiscible.coupling import AboveTimestep, build_coupling, coupling_state, restore_coupling
from immiscible.data.bundled import PhotoCrops
from immiscible.data.transforms import ImageTransform
from immiscible.errors import UserError

SIZE, TURNOVERS = 256, 40


def draw(count, shape, seed):
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def crops():
    source, transform = PhotoCrops(32), ImageTransform(32, 3)
    return torch.stack([transform(source.load(i), 0, i) for i in range(1024)])


@pytest.fixture(scope="module")
def used(crops):
    """The noises that 40 turnovers of a reservoir of 256 give to single images, and the inner products; the declared seed is 0."""
    coupling, generator = ReservoirCoupling(SIZE), torch.Generator().manual_seed(0)
    order = torch.randint(len(crops), (SIZE * TURNOVERS,), generator=generator)
    noises = torch.cat([coupling(crops[i : i + 1], generator=generator) for i in order])
    return noises, (crops[order] * noises).flatten(1).sum(1)


def test_the_marginal_stays_standard_normal(crops, used):
    """Over 40 turnovers: the square length, the brightest direction of the images, and single components."""
    noises = used[0].flatten(1)
    count, dimension = noises.shape
    assert kstest(noises[:, ::97].flatten().numpy(), "norm").pvalue > 0.01
    square = noises.square().sum(1)
    assert abs(float(square.mean()) - dimension) < 4 * (2 * dimension / count) ** 0.5
    flat = crops.flatten(1)
    main = torch.linalg.svd(flat - flat.mean(0), full_matrices=False).Vh[0]
    along = noises @ main
    # What is still kept at the end is what few images wanted: up to SIZE of the count are missing from the sample.
    assert abs(float(along.var()) - 1) < 4 * (2 / count) ** 0.5 + 1 / TURNOVERS
    assert abs(float(along.mean())) < 4 / count**0.5 + 1 / TURNOVERS
    nearest = build_coupling("nearest", candidates=64)(crops, generator=torch.Generator().manual_seed(0)).flatten(1)
    assert abs(float(nearest.square().sum(1).mean()) - dimension) > 4 * (2 * dimension / len(crops)) ** 0.5  # the test can fail


def test_single_images_align_as_in_a_large_assignment(crops, used):
    """At least 70 % of what assignment over 1024 images reaches."""
    pool = draw(1024, crops.shape[1:], 1)
    reference = (crops * pool[assign(crops, pool)]).flatten(1).sum(1).mean()
    steady = used[1][4 * SIZE :].mean()
    assert steady > 0.7 * reference


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_every_noise_is_used_once_or_kept(batch):
    coupling, generator = ReservoirCoupling(16), torch.Generator().manual_seed(0)
    fresh, used = [], []
    for step in range(20):
        noise = draw(batch, (1, 2, 2), step)
        used.append(coupling(draw(batch, (1, 2, 2), 100 + step), noise, generator=generator))
        fresh.append(noise)
    first = torch.randn(16, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    rows = torch.cat([*used, torch.stack(list(coupling.state_dict().values()))]).view(-1, 4)
    known = torch.cat([first, *fresh]).view(-1, 4)
    assert sorted(map(tuple, rows.tolist())) == sorted(map(tuple, known.tolist()))


def test_the_images_of_a_batch_take_the_best_noises_together():
    """Brute force over ordered choices of 2 out of 4."""
    coupling = ReservoirCoupling(2)
    kept, x0, noise = draw(2, (1, 1, 3), 0), draw(2, (1, 1, 3), 1), draw(2, (1, 1, 3), 2)
    coupling.load_state_dict({f"noise-{i}": row for i, row in enumerate(kept)})
    paired = coupling(x0, noise)
    candidates = torch.cat([kept, noise])
    score = x0.flatten(1) @ candidates.flatten(1).T
    best = max(float(score[0, i] + score[1, j]) for i in range(4) for j in range(4) if i != j)
    assert float((x0 * paired).sum()) == pytest.approx(best, rel=1e-6)


def test_a_state_taken_earlier_goes_on_as_the_reservoir_did():
    coupling, generator = AboveTimestep(ReservoirCoupling(8), 0), torch.Generator().manual_seed(0)
    images = [draw(2, (1, 2, 2), step) for step in range(12)]
    run = []
    for step, x0 in enumerate(images):
        if step == 6:
            taken = coupling_state(coupling)
            before = {name: noise.clone() for name, noise in taken.items()}
        run.append(coupling(x0, draw(2, (1, 2, 2), 50 + step), timesteps=torch.zeros(2), generator=generator))
    assert all(torch.equal(before[name], taken[name]) for name in before)  # untouched by the steps after it
    other = AboveTimestep(ReservoirCoupling(8), 0)
    restore_coupling(other, before)
    for step in range(6, 12):
        again = other(images[step], draw(2, (1, 2, 2), 50 + step), timesteps=torch.zeros(2))
        assert torch.equal(again, run[step])


def test_bad_reservoirs_are_named():
    with pytest.raises(UserError, match="`size` must be at least 1, not 0"):
        ReservoirCoupling(0)
    coupling = ReservoirCoupling(4)
    with pytest.raises(UserError, match="give `size` 2, not 4"):
        coupling.load_state_dict({"noise-0": torch.zeros(1), "noise-1": torch.zeros(1)})
    with pytest.raises(UserError, match="mean, count was saved: in part, or by another coupling"):
        coupling.load_state_dict({"mean": torch.zeros(1, 1), "count": torch.zeros(1)})
    bad = draw(2, (1, 2, 2), 0)
    bad[1, 0, 0, 0] = float("nan")
    with pytest.raises(UserError, match="image 1 of the batch"):
        coupling(bad)


def test_kept_noises_keep_no_batch_alive():
    coupling = ReservoirCoupling(16)
    for step in range(30):
        coupling(draw(4, (1, 2, 2), step), draw(4, (1, 2, 2), 100 + step))
    assert all(noise.untyped_storage().nbytes() == 4 * noise.numel() for noise in coupling.state_dict().values())
