"""Whatever the caller's default device, the library makes its own tensors where it needs them.

The meta device stands for a GPU here: tensors made by default have no values there, and mix with others as little.
"""

import ast
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler

import immiscible
from immiscible.adapters import OTPlanSampler
from immiscible.assignment import costs
from immiscible.coupling import bias_notice, coupling_statistics
from immiscible.evaluation.leakage import leak_notice
from immiscible.process import PREDICTION_TYPES

ROOT = Path(__file__).resolve().parents[1]
N = 160  # enough for the auction


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(N, 3, 4, 4, generator=generator) for _ in range(2))
    return x0, noise, torch.randint(4, (N,), generator=generator), torch.randint(1000, (N,), generator=generator)


COUPLINGS = {
    "assignment": {},
    "exact": {"solver": "exact"},
    "stable": {"solver": "stable"},
    "l1": {"metric": "l1"},
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    **({"int8": {"dtype": "int8"}} if costs._multiplies_int8() else {}),
    **({"float8": {"dtype": "float8"}} if hasattr(torch, costs.FLOAT8) else {}),
    "within": {"condition": "within"},
    "penalty": {"condition": "penalty", "condition_ratio": 0.3},
    "centered": {"condition": "centered"},
    "flipped_assignment": {},
    "nearest": {},
    "nearest-dot": {"score": "dot"},
    "reservoir": {"size": 32},
    "independent": {},
    "above": {"min_timestep": 500},
}


def built(name):
    choice = name.split("-")[0]
    return immiscible.build_coupling(choice if choice in immiscible.COUPLINGS else "assignment", **COUPLINGS[name])


@pytest.mark.parametrize("device", ["meta", "cpu"])
@pytest.mark.parametrize("name", COUPLINGS)
def test_couplings(batch, name, device):
    x0, noise, labels, timesteps = batch
    told = {"labels": labels, "timesteps": timesteps}
    expected = built(name)(x0, noise, **told, generator=torch.Generator().manual_seed(1))
    with torch.device(device):
        coupling = built(name)
        for given in (noise, None):
            generator = torch.Generator("cpu").manual_seed(1)
            found = coupling(x0, given, **told, generator=generator)
            assert found.device.type == "cpu" and found.shape == x0.shape
            if given is not None:
                assert torch.equal(found, expected)
        coupling.load_state_dict(coupling.state_dict())
        assert all(value.device.type == "cpu" for value in coupling_statistics(x0, noise, found).values())
        bias_notice(coupling, 48)


@pytest.mark.parametrize("condition", ["none", "within", "penalty"])
def test_pools(batch, condition):
    x0, noise, labels, timesteps = batch
    rule = immiscible.AssignmentCoupling(condition=condition)
    expected = immiscible.GlobalCoupling(None, rule)(x0, noise, labels=labels)
    with torch.device("meta"):
        coupling = immiscible.GlobalCoupling(None, immiscible.AboveTimestep(rule, 0), seed=3)
        assert torch.equal(coupling(x0, noise, labels=labels), expected)
        drawn = coupling(x0, labels=labels, timesteps=timesteps)
        again = immiscible.GlobalCoupling(None, rule)
        again.load_state_dict({name: value.clone() for name, value in coupling.state_dict().items()})
        assert drawn.device.type == "cpu" and not torch.equal(again(x0, labels=labels), drawn)
        pairs = list(immiscible.Window(rule, 3)(x0.split(40), labels=lambda rows: labels[: len(rows)]))
    assert [paired.device.type for _, paired in pairs] == ["cpu"] * 4


@pytest.mark.parametrize("scheduler", [DDPMScheduler(), FlowMatchEulerDiscreteScheduler(shift=3.0), EDMEulerScheduler()])
def test_processes_laws_and_weights(batch, scheduler):
    x0, noise, _, t = batch
    with torch.device("meta"):
        process = immiscible.NoiseProcess.from_scheduler(scheduler)
        prediction_type = {**PREDICTION_TYPES, "edm": ("sample",)}[process.kind][-1]
        for tensor in (process.add_noise(x0, noise, t), process.target(x0, noise, t, prediction_type), process.sigma, process.model_time):
            assert tensor.device.type == "cpu"
        for name in immiscible.TIMESTEP_SAMPLINGS:
            if name == "asymmetric_released" and process.kind == "edm":
                continue  # which never flattens out
            sampler = immiscible.timestep_sampler(name, scheduler)
            assert sampler(8).device.type == "cpu" and sampler(8, device="meta").device.type == "meta"
            for continuous in (False, True):
                assert {tensor.device.type for tensor in sampler.levels(8, continuous=continuous)} == {"cpu"}
                assert {tensor.device.type for tensor in sampler.levels(8, "meta", continuous=continuous)} == {"meta"}
            sampler.marginal(8), sampler.moved_share()
        for name in immiscible.LOSS_WEIGHTINGS:
            weights = immiscible.loss_weights(name, scheduler, prediction_type)
            assert weights[t].device.type == weights.at(process.sigma[t]).device.type == "cpu"
            assert weights[t].isfinite().all() and weights.at(process.sigma[t]).isfinite().all()


def test_weights_follow_the_device_of_what_they_are_asked_for():
    weights = immiscible.loss_weights("min_snr", DDPMScheduler(), "epsilon")
    timesteps, sigma = torch.arange(4, device="meta"), torch.ones(4, 1, 1, 1, device="meta")
    for moved in (weights, weights.to("meta")):
        assert moved[timesteps].device.type == "meta" and moved[timesteps].shape == (4,)
        assert moved.at(sigma).device.type == "meta" and moved.at(sigma).shape == (4, 1, 1, 1)


def test_leaks_and_adapters(batch):
    x0, noise, labels, _ = batch
    with torch.device("meta"):
        leak = immiscible.ClassLeak()
        leak.add(noise, labels, x0)
        assert 0 <= leak.result()["accuracy"] <= 1
        assert "10 classes" in leak_notice(immiscible.AssignmentCoupling(), 10)
        paired, _ = OTPlanSampler().sample_plan(noise, x0)
    assert torch.equal(paired, noise[immiscible.assign(x0, noise, metric="squared_l2")])


MAKERS = {"arange", "empty", "eye", "full", "linspace", "logspace", "ones", "rand", "randint", "randn", "randperm", "tensor", "zeros"}


def test_every_tensor_that_the_library_makes_names_its_device():
    """Also those on paths that no CPU takes."""
    rooms = ["adapters", "coupling", "objectives", "pools", "process", "randomness", "timesteps", "weighting", "evaluation/leakage"]
    files = [*(ROOT / "immiscible" / f"{room}.py" for room in rooms), *(ROOT / "immiscible/assignment").glob("*.py")]
    calls = [
        (file.name, node)
        for file in files
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in MAKERS
        if isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"
    ]
    assert len(calls) > 20
    assert [f"{name}:{call.lineno}" for name, call in calls if "device" not in {word.arg for word in call.keywords}] == []
