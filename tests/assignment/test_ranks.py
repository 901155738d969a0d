"""One assignment over several ranks and several batches."""

import multiprocessing
import os
from types import SimpleNamespace

import pytest
import torch
from kills import final_hashes, finish, kill, metrics, start
from launch import tiny

from immiscible.assignment.costs import cost_matrix
from immiscible.assignment.solve import certified_assignment
from immiscible.coupling import AboveTimestep, AssignmentCoupling, FlippedAssignmentCoupling, IndependentCoupling, build_coupling
from immiscible.errors import UserError
from immiscible.pools import GlobalCoupling
from immiscible.randomness import Draws, PoolDraws

GLOBAL_BATCH, WINDOW, SHAPE, SEED = 48, 2, (3, 4, 4), 5
RULES = {
    "l2": AssignmentCoupling(),
    "auction": AssignmentCoupling(solver="auction"),
    "squared_l2": AssignmentCoupling(metric="squared_l2", dtype="float32"),
    "l1": AssignmentCoupling(metric="l1"),
    "flipped": FlippedAssignmentCoupling(),
    "within": AssignmentCoupling(condition="within"),
    "penalty": AssignmentCoupling(condition="penalty"),
}


def everyone():
    """The images, labels and timesteps of a window's global rows."""
    generator = torch.Generator().manual_seed(1)
    rows = WINDOW * GLOBAL_BATCH
    x0 = torch.rand(rows, *SHAPE, generator=generator) * 2 - 1
    return x0, torch.randint(3, (rows,), generator=generator), torch.randint(1000, (rows,), generator=generator)


def pool_of(rank, ranks):
    size = GLOBAL_BATCH // ranks
    parts = tuple(Draws(SEED, 7, (micro * ranks + rank) * size, torch.device("cpu")) for micro in range(WINDOW))
    return PoolDraws(parts, size, rank, ranks)


def rank_pairs(rank, ranks, folder):
    """What one rank pairs, in every case; its exchanges are counted."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet-{ranks}", rank=rank, world_size=ranks)
    pool, accelerator = pool_of(rank, ranks), SimpleNamespace(process_index=rank, num_processes=ranks)
    x0, labels, timesteps = everyone()
    own = slice(None) if pool.own is None else pool.own
    noise, gathers, gather = pool.normal("noise", *SHAPE), [], torch.distributed.all_gather
    torch.distributed.all_gather = lambda *words, **options: gathers.append(1) or gather(*words, **options)
    found = {}
    for name, rule in RULES.items():
        for min_timestep in (0, 600):
            coupling = GlobalCoupling(accelerator, AboveTimestep(rule, min_timestep), window=WINDOW)
            found[f"{name}-{min_timestep}"] = coupling(x0[own], noise, timesteps=timesteps, labels=labels[own])
    found["gathers"] = len(gathers)
    bad = x0.clone()
    bad[29, 0, 0, 0] = float("nan")
    try:
        GlobalCoupling(accelerator, window=WINDOW)(bad[own], noise)
    except UserError as error:
        found["error"] = str(error)
    partners = coupling.ranks
    found["failed"] = (partners.any_failed(False), partners.any_failed(rank == ranks - 1))
    torch.save(found, f"{folder}/{ranks}-{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def paired(tmp_path_factory):
    """{ranks: [what each rank found]} for 1, 2 and 4 ranks."""
    folder, context = tmp_path_factory.mktemp("ranks"), multiprocessing.get_context("fork")
    runs = [context.Process(target=rank_pairs, args=(rank, ranks, str(folder))) for ranks in (1, 2, 4) for rank in range(ranks)]
    for run in runs:
        run.start()
    for run in runs:
        run.join(120)
    assert [run.exitcode for run in runs] == [0] * len(runs)
    return {ranks: [torch.load(folder / f"{ranks}-{rank}.pt") for rank in range(ranks)] for ranks in (1, 2, 4)}


def in_global_order(parts):
    return torch.stack([part.unflatten(0, (WINDOW, -1)) for part in parts], dim=1).flatten(0, 2)


@pytest.mark.parametrize("min_timestep", [0, 600])
@pytest.mark.parametrize("name", RULES)
def test_any_number_of_ranks_pairs_alike(paired, name, min_timestep):
    one, two, four = (in_global_order([found[f"{name}-{min_timestep}"] for found in paired[ranks]]) for ranks in (1, 2, 4))
    assert torch.equal(one, two) and torch.equal(one, four)
    timesteps = everyone()[2]
    drawn = pool_of(0, 1).normal("noise", *SHAPE)
    assert sorted(map(tuple, one.flatten(1).tolist())) == sorted(map(tuple, drawn.flatten(1).tolist()))  # a permutation, all distinct
    assert len(one.flatten(1).unique(dim=0)) == WINDOW * GLOBAL_BATCH
    below = timesteps < min_timestep
    assert torch.equal(one[below], drawn[below])
    assert not torch.equal(one[~below], drawn[~below])


def test_the_pairs_are_as_near_as_one_assignment_can_make_them(paired):
    """16 bits in the exchange cost nothing that matters."""
    x0, _, _ = everyone()
    drawn = pool_of(0, 1).normal("noise", *SHAPE)
    found = in_global_order([part["l2-0"] for part in paired[4]])
    best = drawn[certified_assignment(x0, drawn, solver="exact").index]
    independent, reached, least = (float(cost) for cost in (cost_matrix(x0, drawn).mean(), distance(x0, found), distance(x0, best)))
    assert (independent - reached) / (independent - least) > 0.999


def distance(x0, noise):
    return (x0 - noise).flatten(1).norm(dim=1).mean()


def test_there_is_one_gather_per_window(paired):
    assert [found["gathers"] for found in paired[4]] == [2 * len(RULES)] * 4


def test_all_ranks_name_a_bad_row_and_learn_of_a_failure(paired):
    for ranks, found in paired.items():
        assert all("image 29 of the global batch" in part["error"] for part in found)
        assert all(part["failed"] == (False, True) for part in found), ranks


def test_the_pool_of_all_ranks_is_what_each_rank_draws():
    whole = pool_of(0, 1)
    for ranks in (2, 3, 4):
        for rank in range(ranks):
            pool = pool_of(rank, ranks)
            assert torch.equal(pool.normal("noise", *SHAPE), whole.normal("noise", *SHAPE))
            assert torch.equal(pool.uniform("timesteps"), whole.uniform("timesteps"))
            alone = PoolDraws(pool.parts, pool.batch_size)
            assert alone.own is None and torch.equal(alone.normal("noise", *SHAPE), pool.normal("noise", *SHAPE)[pool.own])


def test_rows_come_out_alike_whatever_stands_beside_them():
    generator = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(100, 300, generator=generator) for _ in range(2))
    for metric in ("l2", "squared_l2"):
        for dtype in ("float32", "bfloat16", "float16"):
            whole = cost_matrix(x0, noise, metric=metric, dtype=dtype, rows_per_product=32)
            for first, last in ((0, 1), (3, 40), (50, 100), (7, 71)):
                part = cost_matrix(x0[first:last], noise, metric=metric, dtype=dtype, rows_per_product=32)
                assert torch.equal(part, whole[first:last])
            assert torch.allclose(whole, cost_matrix(x0, noise, metric=metric, dtype=dtype), rtol=1e-4, atol=1e-4)


def test_what_a_global_coupling_cannot_do_is_one_line():
    assert GlobalCoupling(None, AboveTimestep(AssignmentCoupling(), 9)).min_timestep == 9
    for coupling in (IndependentCoupling(), build_coupling("nearest")):
        with pytest.raises(UserError, match="GlobalCoupling needs a coupling that pairs"):
            GlobalCoupling(None, coupling)
    with pytest.raises(UserError, match="`condition` centered keeps means"):
        GlobalCoupling(None, AssignmentCoupling(condition="centered"))
    coupling = GlobalCoupling()
    with pytest.raises(UserError, match="needs the noises of all ranks, 2 for 2 images here, not 3"):
        coupling(torch.zeros(2, 1, 1, 1), torch.zeros(3, 1, 1, 1), timesteps=torch.zeros(3))
    with pytest.raises(UserError, match="at most 16384 images at once, not 20000"):
        coupling(torch.zeros(20000, 1), torch.zeros(20000, 1), timesteps=torch.zeros(20000))
    with pytest.raises(UserError, match="needs labels"):
        GlobalCoupling(None, AssignmentCoupling(condition="within"))(torch.zeros(2, 1))
    above = GlobalCoupling(None, AboveTimestep(AssignmentCoupling(), 9))
    with pytest.raises(UserError, match="`min_timestep` needs the timesteps"):
        above(torch.zeros(2, 1))
    with pytest.raises(UserError, match="those of the 2 images here or of all 2, not 3"):
        above(torch.zeros(2, 1), timesteps=torch.zeros(3))


# The script

COMMON = {"noise_coupling": "assignment", "coupling_scope": "global", "max_train_steps": 6}


@pytest.fixture(scope="module")
def on_one(script, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one") / "run"
    finish([script.start(tiny(folder, **COMMON, train_batch_size=16))])
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_equal_global_batches_have_equal_losses(script, on_one, tmp_path, ranks):
    finish(script.start_ranks(tiny(tmp_path / "run", **COMMON, train_batch_size=16 // ranks), ranks))
    for one, several in zip(metrics(on_one), metrics(tmp_path / "run"), strict=True):
        assert several["loss"] == pytest.approx(one["loss"], rel=1e-6)
        assert several["pair_distance"] == pytest.approx(one["pair_distance"], rel=1e-6)
        assert several["paired_images"] == 16


@pytest.mark.slow
def test_a_bad_image_on_one_of_two_ranks_ends_both(script, tmp_path):
    from pictures import colored

    photos = colored(tmp_path / "photos", count=8)
    (photos / "03.png").write_bytes((photos / "03.png").read_bytes()[:-30])
    runs = script.start_ranks(tiny(tmp_path / "run", **COMMON, train_data_dir=photos, train_batch_size=4), 2)
    results = [run.wait() for run in runs]
    assert [result.code for result in results] == [1, 1]
    assert "03.png" in results[0].error and "Traceback" not in results[1].stderr


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_window_goes_on_where_it_was_cut(script, tmp_path, ranks):
    """A window of 3 batches over steps of 2: most checkpoints lie within one. Killed ranks continue to the same bits."""
    words = {**COMMON, "coupling_window": 3, "gradient_accumulation_steps": 2, "train_batch_size": 8, "use_ema": True}
    scope = "global" if ranks > 1 else "process"
    words |= {"coupling_scope": scope, "max_train_steps": 10, "checkpointing_steps": 1, "resume_from_checkpoint": "latest"}
    finish(start(script, tiny(tmp_path / "whole", **words), ranks))
    cut = tiny(tmp_path / "cut", **words)
    for checkpoint in (tmp_path / "cut" / f"checkpoint-{step}" for step in (2, 5)):
        runs = start(script, cut, ranks)
        runs[0].wait_until(checkpoint.is_dir)
        kill(runs)
    finish(start(script, cut, ranks))
    assert final_hashes(tmp_path / "cut", 10) == final_hashes(tmp_path / "whole", 10)
    assert {line["paired_images"] for line in metrics(tmp_path / "whole")} == {3 * 8 * ranks}


@pytest.mark.slow
def test_a_longer_run_goes_on_from_a_shorter_one_within_a_window(script, tmp_path):
    words = {"noise_coupling": "assignment", "coupling_window": 4, "use_ema": True}
    finish([script.start(tiny(tmp_path / "whole", **words, max_train_steps=6))])
    finish([script.start(tiny(tmp_path / "cut", **words, max_train_steps=3))])
    finish([script.start(tiny(tmp_path / "cut", **words, max_train_steps=6, resume_from_checkpoint="latest"))])
    assert final_hashes(tmp_path / "cut", 6) == final_hashes(tmp_path / "whole", 6)


@pytest.mark.slow
def test_a_window_brings_pairs_nearer_than_single_batches(script, tmp_path):
    distances = []
    for window in (1, 8):
        words = {"noise_coupling": "assignment", "coupling_window": window, "train_batch_size": 8, "max_train_steps": 8}
        finish([script.start(tiny(tmp_path / f"run-{window}", **words))])
        distances.append(metrics(tmp_path / f"run-{window}"))
    one, eight = ([sum(line[name] for line in run) / 8 for name in ("pair_distance_drawn", "pair_distance")] for run in distances)
    assert one[0] == pytest.approx(eight[0], rel=1e-6)  # the same images and noises
    assert eight[1] < one[1] < one[0]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_reservoir_goes_on_where_it_was_cut(script, tmp_path, ranks):
    words = {"noise_coupling": "reservoir", "coupling_reservoir": 16, "train_batch_size": 2, "use_ema": True, "max_train_steps": 9}
    words |= {"checkpointing_steps": 1, "resume_from_checkpoint": "latest"}
    runs = {name: tiny(tmp_path / name, **words) for name in ("whole", "cut")}
    finish(start(script, runs["whole"], ranks))
    started = start(script, runs["cut"], ranks)
    started[0].wait_until(lambda: (tmp_path / "cut" / "checkpoint-4").is_dir())
    kill(started)
    finish(start(script, runs["cut"], ranks))
    assert final_hashes(tmp_path / "cut", 9) == final_hashes(tmp_path / "whole", 9)
    assert len(list((tmp_path / "whole" / "checkpoint-9").glob("coupling-*.safetensors"))) == ranks


def test_one_image_on_one_rank_with_its_class():
    coupling = GlobalCoupling(None, AssignmentCoupling(condition="within"))
    noise = torch.randn(1, *SHAPE)
    assert torch.equal(coupling(noise, noise, timesteps=torch.zeros(1), labels=torch.tensor([3])), noise)


def test_too_many_images_at_once_are_refused_before_anything_is_written(script, tmp_path):
    words = {"noise_coupling": "assignment", "coupling_scope": "global", "coupling_window": 1024, "train_batch_size": 17}
    result = script(tiny(tmp_path / "run", **words))
    assert result.code == 2 and "pairs at most 16384 images at once" in result.error and not (tmp_path / "run").exists()


def test_flags_for_other_couplings_are_refused(script, tmp_path):
    for words in ({"coupling_scope": "global"}, {"coupling_window": 4}):
        result = script(tiny(tmp_path / "run", noise_coupling="nearest", **words))
        assert result.code == 2 and f"--{next(iter(words))} is for couplings that pair the images of a batch" in result.error
    assert not os.path.exists(tmp_path / "run")
