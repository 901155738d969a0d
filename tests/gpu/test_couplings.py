"""Couplings on a GPU against the same on the CPU, with the same images, noises and labels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from pairs import SHAPE, assert_permutation, images_and_noises, paired_distance, row_of_each
from torch import Tensor

from immiscible.coupling import AssignmentCoupling, Coupling, NearestCoupling, build_coupling, coupling_state, restore_coupling
from immiscible.coupling import coupling_statistics as statistics_of
from immiscible.evaluation.leakage import class_leak
from immiscible.pools import GlobalCoupling
from immiscible.randomness import seeded_generator

BATCH = 96  # few enough for the exact solver, so that two devices have one answer
MANY = 4096  # images whose mean alignment is known to one part in sixty
ALIKE = 1e-4  # of the summed distance: the precision of fp32 costs, and ties


def told(n: int, states: bool, *parts: int | str) -> dict[str, Tensor]:
    """Labels, classes or text states, and timesteps of n images, on the CPU."""
    generator = seeded_generator("told", n, *parts)
    labels = torch.randn(n, 16, device="cpu", generator=generator) if states else torch.randint(7, (n,), device="cpu", generator=generator)
    return {"labels": labels, "timesteps": torch.randint(10, (n,), device="cpu", generator=generator)}


def on(device: torch.device, words: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.to(device) for name, value in words.items()}


def check_permutation(device: torch.device, build: Any, states: bool, batches: int = 3) -> None:
    """Three batches: the noises of the batch, each once, at the CPU's summed distance; the state that is kept is the CPU's."""
    there, here = build(), build()
    for number in range(batches):
        x0, noise = images_and_noises(BATCH, number)
        words = told(BATCH, states, number)
        found, expected = there(x0.to(device), noise.to(device), **on(device, words)), here(x0, noise, **words)
        assert found.device == device and found.dtype == noise.dtype and found.shape == noise.shape
        rows = row_of_each(found, noise)
        assert_permutation(rows, BATCH, torch.device("cpu"))
        assert paired_distance(x0, found) == pytest.approx(paired_distance(x0, expected), rel=ALIKE)
        assert paired_distance(x0, found) < paired_distance(x0, noise)
        if getattr(there, "condition", "") == "within":
            assert torch.equal(words["labels"][rows], words["labels"])
    assert coupling_state(there).keys() == coupling_state(here).keys()
    for name, value in coupling_state(there).items():
        torch.testing.assert_close(value.cpu(), coupling_state(here)[name], rtol=1e-4, atol=1e-4)


PERMUTATIONS: dict[str, tuple[dict[str, Any], bool]] = {
    "assignment": ({"name": "assignment"}, False),
    "above a timestep": ({"name": "assignment", "min_timestep": 3}, False),
    "within classes": ({"name": "assignment", "condition": "within"}, False),
    "centered, classes": ({"name": "assignment", "condition": "centered"}, False),
    "centered, text states": ({"name": "assignment", "condition": "centered"}, True),
    "penalty, classes": ({"name": "assignment", "condition": "penalty", "condition_ratio": 0.3}, False),
    "penalty, infinite": ({"name": "assignment", "condition": "penalty", "condition_ratio": 0.01}, False),
    "penalty, text states": ({"name": "assignment", "condition": "penalty", "condition_ratio": 0.05}, True),
}


@pytest.mark.parametrize("name", PERMUTATIONS)
def test_permutations(device, name):
    options, states = PERMUTATIONS[name]
    check_permutation(device, lambda: build_coupling(**{**options, "dtype": "float32"}), states)


def test_flipped_assignment(device):
    """Its distance says nothing; its noises are the CPU's."""
    x0, noise = images_and_noises(BATCH)
    coupling = build_coupling("flipped_assignment", dtype="float32")
    assert torch.equal(coupling(x0.to(device), noise.to(device)).cpu(), coupling(x0, noise))


def test_global_assignment_of_one_process(device):
    x0, noise = images_and_noises(BATCH)
    coupling = GlobalCoupling(coupling=AssignmentCoupling(dtype="float32"))
    found = coupling(x0.to(device), noise.to(device))
    assert found.device == device
    assert_permutation(row_of_each(found, noise), BATCH, torch.device("cpu"))
    assert paired_distance(x0, found) == pytest.approx(paired_distance(x0, coupling(x0, noise)), rel=1e-3)  # its costs travel in bfloat16


@contextmanager
def cpu_draws() -> Iterator[None]:
    """Whatever the library draws comes from one sequence of the CPU's, so that two devices draw alike."""
    generator = seeded_generator("draws of any device")
    normal, gamma = torch.randn, torch._standard_gamma

    def randn(*size: Any, device: Any = None, generator: Any = None, **words: Any) -> Tensor:
        return normal(*size, device="cpu", generator=own, **words).to(device)

    def standard_gamma(shape: Tensor, generator: Any = None) -> Tensor:
        return gamma(shape.cpu(), generator=own).to(shape.device)

    own = generator
    with mock.patch.object(torch, "randn", randn), mock.patch.object(torch, "_standard_gamma", standard_gamma):
        yield


def check_nearest(device: torch.device, coupling: Coupling) -> None:
    """The same candidates: the same noises. `torch.equal` is too much for sums over a row."""
    x0, noise = images_and_noises(256)
    x0[3] = 0  # has no direction
    with cpu_draws():
        expected = coupling(x0, noise)
    with cpu_draws():
        found = coupling(x0.to(device), noise.to(device))
    assert found.device == device
    assert not torch.equal(expected, noise)
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("score", ["l2", "dot"])
def test_nearest(device, score):
    check_nearest(device, NearestCoupling(8, score))


def aligned(x0: Tensor, noise: Tensor) -> tuple[float, float]:
    """Of noises: the mean component along their images, and the mean square of a number."""
    x0, noise = x0.cpu().double().flatten(1), noise.cpu().double().flatten(1)
    return float(((x0 * noise).sum(1) / x0.norm(dim=1)).mean()), float(noise.square().mean())


def check_nearest_draws(device: torch.device, coupling: Coupling) -> None:
    """Its own draws on the device: other numbers of the same law. Both means are known to 1/64 and 1/600; six such errors are allowed."""
    x0, noise = images_and_noises(MANY)
    found = coupling(x0.to(device), noise.to(device), generator=torch.Generator(device).manual_seed(1))
    again = coupling(x0.to(device), noise.to(device), generator=torch.Generator(device).manual_seed(1))
    assert torch.equal(found.cpu(), again.cpu())
    expected = aligned(x0, coupling(x0, noise, generator=torch.Generator().manual_seed(2)))
    along, square = aligned(x0, found)
    assert abs(along - expected[0]) < 6 * 2**0.5 / 64
    assert abs(square - expected[1]) < 6 * 2**0.5 / 600
    assert expected[0] > 0.5


@pytest.mark.parametrize("score", ["l2", "dot"])
def test_nearest_draws(device, score):
    check_nearest_draws(device, NearestCoupling(8, score))


def check_reservoir(device: torch.device) -> None:
    """Goes on from a state of the CPU as on the CPU, noise by noise; every noise is used once or kept."""
    here, there = build_coupling("reservoir", size=32), build_coupling("reservoir", size=32)
    here(*images_and_noises(4, "first"), generator=seeded_generator("reservoir"))
    restore_coupling(there, coupling_state(here))
    for number in range(5):
        x0, noise = images_and_noises(4, number)
        expected, found = here(x0, noise), there(x0.to(device), noise.to(device))
        assert found.device == device
        assert torch.equal(found.cpu(), expected)
    kept = torch.stack([value.cpu() for value in coupling_state(there).values()])
    assert torch.equal(kept, torch.stack(list(coupling_state(here).values())))


def test_reservoir(device):
    check_reservoir(device)


def test_a_reservoir_that_begins_on_the_device(device):
    x0, noise = images_and_noises(4)
    coupling = build_coupling("reservoir", size=16)
    paired = coupling(x0.to(device), noise.to(device), generator=torch.Generator(device).manual_seed(0))
    kept = list(coupling_state(coupling).values())
    assert paired.device == device and len(kept) == 16
    everything = torch.cat([paired.cpu().flatten(1), torch.stack([row.cpu() for row in kept]).flatten(1)])
    assert len(everything.unique(dim=0)) == 20
    assert {row.tobytes() for row in noise.flatten(1).numpy()} <= {row.tobytes() for row in everything.numpy()}


def test_statistics(device):
    x0, noise = images_and_noises(BATCH)
    paired = noise.roll(1, 0)
    found, expected = statistics_of(x0.to(device), noise.to(device), paired.to(device)), statistics_of(x0, noise, paired)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert value.device == device
        assert float(value) == pytest.approx(float(expected[name]), rel=1e-4, abs=1e-5), name


def test_class_leak(device):
    """The probe of what noise tells about the class, on noises that do tell it."""
    labels = torch.arange(400, device="cpu") % 4
    x0, noise = images_and_noises(400)
    marks = torch.randn(4, *SHAPE, device="cpu", generator=seeded_generator("marks"))
    x0, noise = x0 + marks[labels], noise + 0.3 * marks[labels]
    found, expected = class_leak(noise.to(device), labels.to(device), x0.to(device)), class_leak(noise, labels, x0)
    assert found["accuracy"] == pytest.approx(expected["accuracy"], abs=0.01) and expected["accuracy"] > 0.5
    assert found["largest_mean_shift"] == pytest.approx(expected["largest_mean_shift"], rel=1e-3)
