"""What couplings carry from batch to batch: through accelerate's checkpoints, and from files that earlier versions wrote."""

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

import immiscible
from immiscible.coupling import coupling_state, restore_coupling

COUPLINGS = {
    "independent": lambda: immiscible.IndependentCoupling(),
    "assignment": lambda: immiscible.AssignmentCoupling(),
    "centered": lambda: immiscible.AssignmentCoupling(condition="centered"),
    "nearest": lambda: immiscible.NearestCoupling(),
    "flipped_assignment": lambda: immiscible.FlippedAssignmentCoupling(),
    "reservoir": lambda: immiscible.ReservoirCoupling(8),
    "above": lambda: immiscible.AboveTimestep(immiscible.ReservoirCoupling(8), 10),
    "global": lambda: immiscible.GlobalCoupling(seed=1),
    "window": lambda: immiscible.Window(immiscible.ReservoirCoupling(8), 2),
}
WIDE, TALL = (3, 4, 8), (3, 8, 4)  # two buckets of aspect ratios
STATEFUL = ("centered", "reservoir", "above", "global", "window")


def test_every_coupling_is_here():
    assert set(immiscible.COUPLINGS) <= set(COUPLINGS)


def step(coupling, number, shape):
    """What a coupling gives in step ``number`` of a run: a function of its state alone."""
    generator = torch.Generator().manual_seed(number)
    x0 = torch.rand(6, *shape, generator=generator) * 2 - 1
    told = {"timesteps": torch.arange(6) * 4, "labels": torch.arange(6) % 2}
    if isinstance(coupling, immiscible.Window):
        ((_, noise),) = coupling([x0], generator=generator)
        return noise
    return coupling(x0, generator=generator, **told)


def shapes_of(name):
    return (WIDE,) if name == "centered" else (WIDE, TALL)


@pytest.mark.parametrize("name", COUPLINGS)
def test_accelerates_checkpoints_take_it(name, tmp_path):
    accelerator = Accelerator(cpu=True)
    coupling = COUPLINGS[name]()
    accelerator.register_for_checkpointing(coupling)
    for number in range(4):
        for shape in shapes_of(name):
            step(coupling, number, shape)
    accelerator.save_state(str(tmp_path / "checkpoint"))
    expected = [step(coupling, 9, shape) for shape in shapes_of(name)]

    fresh = COUPLINGS[name]()
    without_state = [step(COUPLINGS[name](), 9, shape) for shape in shapes_of(name)]
    accelerator._custom_objects.clear()
    accelerator.register_for_checkpointing(fresh)
    accelerator.load_state(str(tmp_path / "checkpoint"))
    assert all(torch.equal(step(fresh, 9, shape), noise) for shape, noise in zip(shapes_of(name), expected, strict=True))
    differs = any(not torch.equal(one, other) for one, other in zip(without_state, expected, strict=True))
    assert differs == (name in STATEFUL)  # the state matters where there is one
    accelerator._custom_objects.clear()


def test_a_state_taken_earlier_stays_as_it_was():
    for name in STATEFUL:
        coupling = COUPLINGS[name]()
        step(coupling, 0, WIDE)
        taken = coupling_state(coupling)
        before = {key: value.clone() for key, value in taken.items()}
        for number in range(1, 4):
            step(coupling, number, WIDE)
        assert before and all(torch.equal(taken[key], value) for key, value in before.items())
        assert any(not torch.equal(coupling_state(coupling)[key], value) for key, value in before.items())


def test_files_of_earlier_versions_restore(tmp_path):
    """``coupling-0.safetensors`` as it was written before: one pool, ``noise-{slot}``; a class's mean and count, or gram and cross."""
    kept = torch.randn(8, *WIDE, generator=torch.Generator().manual_seed(0))
    x0, noise = (torch.randn(2, *WIDE, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    save_file({f"noise-{slot}": row.clone() for slot, row in enumerate(kept)}, tmp_path / "coupling-0.safetensors")
    reservoir = immiscible.ReservoirCoupling(8)
    restore_coupling(reservoir, load_file(tmp_path / "coupling-0.safetensors"))
    paired = reservoir(x0, noise)
    score = x0.flatten(1) @ torch.cat([kept, noise]).flatten(1).T
    best = max((float(score[0, i] + score[1, j]), i, j) for i in range(10) for j in range(10) if i != j)
    assert torch.equal(paired, torch.cat([kept, noise])[list(best[1:])])
    taken = [slot for slot in best[1:] if slot < 8]
    assert all(torch.equal(reservoir.state_dict()[f"noise-{slot}"], kept[slot]) for slot in set(range(8)) - set(taken))

    dimension = x0[0].numel()
    classes = {"mean": torch.randn(2, dimension), "count": torch.tensor([3, 4])}
    texts = {"gram": torch.eye(3, dtype=torch.float64), "cross": torch.randn(3, dimension)}
    for saved, labels in ((classes, torch.tensor([0, 1])), (texts, torch.randn(2, 2))):
        save_file(saved, tmp_path / "coupling-0.safetensors")
        coupling = immiscible.AboveTimestep(immiscible.AssignmentCoupling(condition="centered"), 5)
        restore_coupling(coupling, load_file(tmp_path / "coupling-0.safetensors"))
        assert set(coupling.coupling.state) == set(saved)
        coupling(x0, noise, timesteps=torch.tensor([9, 9]), labels=labels)
        assert not torch.equal(coupling.coupling.state[next(iter(saved))], saved[next(iter(saved))])


def test_another_couplings_state_is_named():
    state = immiscible.GlobalCoupling(seed=1)
    step(state, 0, WIDE)
    for name in ("independent", "centered", "reservoir", "nearest"):
        with pytest.raises(immiscible.UserError, match="seed, calls was saved"):
            COUPLINGS[name]().load_state_dict(state.state_dict())
    with pytest.raises(immiscible.UserError, match="keeps seed and calls, but mean was saved"):
        state.load_state_dict({"mean": torch.zeros(1)})


# The reservoir's pools


def test_a_reservoir_has_a_pool_of_each_shape():
    one, two = immiscible.ReservoirCoupling(8), {shape: immiscible.ReservoirCoupling(8) for shape in (WIDE, TALL)}
    for number in range(12):
        for shape in (WIDE, TALL):
            assert torch.equal(step(one, number, shape), step(two[shape], number, shape))
    assert [noise.shape for noise in one.state_dict().values()] == [WIDE] * 8 + [TALL] * 8


@pytest.mark.parametrize("second", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("first", [torch.bfloat16, torch.float32])
def test_a_reservoir_gives_the_dtype_it_is_called_with(first, second):
    coupling, generator = immiscible.ReservoirCoupling(8), torch.Generator().manual_seed(0)
    drawn = {first: [], second: []}
    for number in range(12):
        dtype = (first, second)[number % 2]
        noise = torch.randn(2, *WIDE, generator=generator).to(dtype)
        drawn[dtype].append(noise)
        paired = coupling(torch.randn(2, *WIDE, generator=generator).to(dtype), noise, generator=generator)
        assert paired.dtype == dtype
    kept = list(coupling.state_dict().values())
    assert {noise.dtype for noise in kept} == {torch.promote_types(first, second)}
    # Fresh noises are kept as they came: nothing is rounded on its way into the pool.
    fresh = {tuple(row.double().flatten().tolist()) for noises in drawn.values() for noise in noises for row in noise}
    assert sum(tuple(noise.double().flatten().tolist()) in fresh for noise in kept) > 4
