"""One assignment over all ranks, or over several micro-batches, in a loop that is not ours."""

import multiprocessing
from types import SimpleNamespace

import pytest
import torch

import immiscible
from immiscible import AboveTimestep, AssignmentCoupling, GlobalCoupling, ReservoirCoupling, UserError, Window, assign
from immiscible.coupling import coupling_state

RANKS, BATCH, SHAPE = 3, 24, (3, 4, 4)
RULES = {
    "plain": AssignmentCoupling(),
    "within": AssignmentCoupling(condition="within"),
    "above": AboveTimestep(AssignmentCoupling(), 500),
    "above-within": AboveTimestep(AssignmentCoupling(condition="within"), 500),
}


def everyone(step):
    """The images, labels and timesteps of all ranks, rank by rank."""
    generator = torch.Generator().manual_seed(step)
    x0 = torch.rand(RANKS * BATCH, *SHAPE, generator=generator) * 2 - 1
    return x0, torch.randint(3, (len(x0),), generator=generator), torch.randint(1000, (len(x0),), generator=generator)


def rank_pairs(rank, folder):
    """What one rank of a foreign loop gets: its own images, labels and timesteps, no noise, nobody's draws."""
    torch.set_num_threads(1)
    torch.manual_seed(100 + rank)  # whatever each rank has drawn before
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS)
    own, found = slice(rank * BATCH, (rank + 1) * BATCH), {}
    accelerator = SimpleNamespace(process_index=rank, num_processes=RANKS, device=torch.device("cpu"))
    for name, rule in RULES.items():
        for kind, who in (("accelerator", accelerator), ("group", None)):
            coupling = GlobalCoupling(who, rule, seed=7)
            for step in range(2):
                x0, labels, timesteps = (values[own] for values in everyone(step))
                found[name, kind, step] = coupling(x0, timesteps=timesteps if name.startswith("above") else None, labels=labels)
    coupling = GlobalCoupling(accelerator)
    found["unseeded"] = coupling(everyone(0)[0][own])
    found["state"] = coupling.state_dict()
    found["next"] = coupling(everyone(1)[0][own])
    resumed = GlobalCoupling(accelerator)
    resumed.load_state_dict(found["state"])
    found["resumed"] = resumed(everyone(1)[0][own])
    found["window"] = [noise for _, noise in Window(GlobalCoupling(accelerator, seed=9), 2)(everyone(0)[0][own].split(BATCH // 2))]
    try:
        coupling(everyone(0)[0][: BATCH - (rank == 2)])
    except UserError as error:
        found["uneven"] = str(error)
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each rank found."""
    folder, context = tmp_path_factory.mktemp("ranks"), multiprocessing.get_context("fork")
    runs = [context.Process(target=rank_pairs, args=(rank, str(folder))) for rank in range(RANKS)]
    for run in runs:
        run.start()
    for run in runs:
        run.join(120)
    assert [run.exitcode for run in runs] == [0] * RANKS
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


def distances(x0, noise):
    return (x0 - noise).flatten(1).norm(dim=1)


def sorted_rows(noise):
    return sorted(map(tuple, noise.flatten(1).tolist()))


@pytest.mark.parametrize("name", RULES)
def test_ranks_without_noise_get_one_assignment_of_noises_of_their_own(found, name):
    for step in range(2):
        paired, by_group = (torch.cat([part[name, kind, step] for part in found]) for kind in ("accelerator", "group"))
        x0, labels, timesteps = everyone(step)
        assert torch.equal(paired, by_group)  # with accelerate's object or from the group alone
        assert len(paired.flatten(1).unique(dim=0)) == RANKS * BATCH and paired.std() == pytest.approx(1, abs=0.05)
        # The same as one process with all images and this pool gets, up to the 16 bits of the exchange.
        above = timesteps >= 500 if name.startswith("above") else torch.ones_like(timesteps, dtype=torch.bool)
        order = torch.randperm(int(above.sum()), generator=torch.Generator().manual_seed(0))
        pool, images = paired[above][order], x0[above]
        rule = AssignmentCoupling(condition="within" if "within" in name else "none")
        if "within" in name:  # within a class the pool is that of the class
            for label in range(3):
                rows = (labels == label) & above
                best = paired[rows][assign(x0[rows], paired[rows], solver="exact")]
                assert float(distances(x0[rows], paired[rows]).sum()) <= 1.001 * float(distances(x0[rows], best).sum())
        else:
            best = rule(images, pool)
            assert float(distances(images, paired[above]).sum()) <= 1.001 * float(distances(images, best).sum())
            assert float(distances(images, paired[above]).sum()) < 0.97 * float(distances(images, pool).sum())
    assert not torch.equal(*(torch.cat([part[name, "group", step] for part in found]) for step in range(2)))


def test_a_seed_that_is_not_given_is_agreed_upon_and_a_state_goes_on(found):
    paired = torch.cat([part["unseeded"] for part in found])
    assert len(paired.flatten(1).unique(dim=0)) == RANKS * BATCH
    assert len({int(part["state"]["seed"]) for part in found}) == 1 and all(int(part["state"]["calls"]) == 1 for part in found)
    assert all(torch.equal(part["next"], part["resumed"]) for part in found)


def test_the_ranks_pairs_are_nearer_than_each_ranks_own(found):
    x0 = everyone(0)[0]
    together = torch.cat([part["plain", "group", 0] for part in found])
    apart = torch.cat([AssignmentCoupling()(images, noise) for images, noise in zip(x0.split(BATCH), together.split(BATCH), strict=True)])
    drawn = together[torch.randperm(len(together), generator=torch.Generator().manual_seed(0))]
    alone = torch.cat([AssignmentCoupling()(images, noise) for images, noise in zip(x0.split(BATCH), drawn.split(BATCH), strict=True)])
    assert float(distances(x0, together).sum()) < float(distances(x0, alone).sum())
    assert float(distances(x0, together).sum()) <= 1.001 * float(distances(x0, apart).sum())


def test_a_window_over_ranks_is_one_assignment_too(found):
    paired = torch.cat([torch.cat(part["window"]) for part in found])
    assert len(paired.flatten(1).unique(dim=0)) == RANKS * BATCH
    best = AssignmentCoupling()(everyone(0)[0], paired)
    assert float(distances(everyone(0)[0], paired).sum()) <= 1.001 * float(distances(everyone(0)[0], best).sum())


def test_all_ranks_hear_of_an_uneven_batch(found):
    assert [part["uneven"] for part in found] == [f"every rank must bring as many images, not between {BATCH - 1} and {BATCH}: "
                                                 "drop the last short batch"] * RANKS  # fmt: skip


def test_alone_it_is_an_assignment_whose_noises_follow_the_seed():
    x0 = everyone(0)[0].bfloat16()
    first, again, other = (GlobalCoupling(seed=seed)(x0) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other) and first.dtype == torch.bfloat16
    torch.manual_seed(4)
    unseeded = GlobalCoupling()(x0)
    torch.manual_seed(4)
    assert torch.equal(unseeded, GlobalCoupling()(x0))  # as torch.randn would
    given = torch.randn(x0.shape, generator=torch.Generator().manual_seed(3))
    coupling = GlobalCoupling()
    assert sorted_rows(coupling(x0.float(), given)) == sorted_rows(given) and coupling.state_dict() == {}


# Windows


def micro_batches(sizes):
    generator = torch.Generator().manual_seed(1)
    return [{"latents": torch.rand(size, *SHAPE, generator=generator) * 2 - 1, "number": number} for number, size in enumerate(sizes)]


@pytest.mark.parametrize("sizes", [[8] * 6, [8] * 7, [8, 5, 8, 3], [4]])
def test_a_window_is_one_big_assignment(sizes):
    batches = micro_batches(sizes)
    pairs = list(Window(AssignmentCoupling(), 3)(batches, lambda batch: batch["latents"], generator=torch.Generator().manual_seed(2)))
    assert [batch for batch, _ in pairs] == batches  # in order, one by one
    generator = torch.Generator().manual_seed(2)
    for first in range(0, len(sizes), 3):
        images = torch.cat([batch["latents"] for batch in batches[first : first + 3]])
        expected = AssignmentCoupling()(images, generator=generator)
        assert torch.equal(torch.cat([noise for _, noise in pairs[first : first + 3]]), expected)
    assert [len(noise) for _, noise in pairs] == sizes


def test_a_window_hands_on_timesteps_and_labels_and_reads_no_further_than_it_must():
    read = []

    def loader():
        for batch in micro_batches([16] * 4):
            read.append(batch["number"])
            yield {**batch, "t": torch.full((16,), 100 * batch["number"]), "label": torch.arange(16) % 2}

    coupling = AboveTimestep(AssignmentCoupling(condition="within"), 100)
    window = Window(coupling, 2)(
        loader(),
        lambda batch: batch["latents"],
        timesteps=lambda batch: batch["t"],
        labels=lambda batch: batch["label"],
        generator=torch.Generator().manual_seed(2),
    )
    first = next(window)
    assert read == [0, 1]
    pairs = [first, *window]
    drawn = torch.randn(32, *SHAPE, generator=torch.Generator().manual_seed(2))
    assert torch.equal(pairs[0][1], drawn[:16])  # below the least timestep
    expected = AssignmentCoupling(condition="within")(pairs[1][0]["latents"], drawn[16:], labels=torch.arange(16) % 2)
    assert torch.equal(pairs[1][1], expected)


def test_a_window_of_one_and_of_none_and_with_a_state():
    batches = [batch["latents"] for batch in micro_batches([4] * 5)]
    torch.manual_seed(0)
    pairs = list(Window(AssignmentCoupling(), 1)(batches))
    torch.manual_seed(0)
    assert all(torch.equal(noise, AssignmentCoupling()(images)) for images, noise in pairs)
    assert list(Window(AssignmentCoupling(), 4)([])) == []
    with pytest.raises(UserError, match="`k`, the micro-batches of a window, must be at least 1, not 0"):
        Window(AssignmentCoupling(), 0)
    window = Window(ReservoirCoupling(4), 2)
    list(window(batches))
    again = Window(ReservoirCoupling(4), 2)
    again.load_state_dict(window.state_dict())
    assert len(coupling_state(again)) == 4 and immiscible.Window is Window
