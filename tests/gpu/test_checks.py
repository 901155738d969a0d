"""The checks can fail: each is handed a GPU whose arithmetic, order or memory is wrong in one place, and must say so."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import test_axes as axes
import test_couplings as couplings
import test_engine as engine
import test_gpu_training as training
import torch
from gpu_runs import RunsOnGPU, gpu_memory
from kills import lines
from launch import tiny
from pretended import OnGPU, pretended_gpu

import immiscible.assignment.conditions as conditions
import immiscible.assignment.costs as costs
import immiscible.assignment.solve as solving
import immiscible.training.loop as loop
from immiscible.coupling import NearestCoupling, build_coupling

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here and need not be pretended: make gpu-check")


@pytest.fixture
def gpu() -> Iterator[torch.device]:
    with pretended_gpu() as device:
        yield device


def swapped(index: torch.Tensor) -> torch.Tensor:
    """Half of the pairs exchange their noises: still a permutation."""
    return torch.cat([index[: len(index) // 2].roll(1, 0), index[len(index) // 2 :]])


def on_gpu(tensor: Any) -> bool:
    return isinstance(tensor, OnGPU)


BREAKS: dict[str, tuple[Any, str, Callable[[Any], Any]]] = {
    # where, what, and a wrapper of the right function that is wrong for tensors of the device
    "a permutation that is none": (solving, "solve", lambda right: lambda cost, **k: _with_index(right, cost, k, torch.zeros_like)),
    "a worse permutation": (solving, "solve", lambda right: lambda cost, **k: _with_index(right, cost, k, swapped)),
    "a transposed product": (costs, "costs_on_device", lambda right: lambda products, *a: right(products.T.contiguous(), *a)),
    "a forgotten norm": (costs, "costs_on_device", lambda right: lambda p, image, *a: right(p, torch.ones_like(image), *a)),
    "half of the precision": (costs, "_operand", lambda right: lambda rows, dtype: right(_coarse(rows), dtype)),
    "rounding downwards": (solving, "fixed_point_on_device", lambda right: lambda cost, width: _shifted(right, cost, width)),
    "a forgotten scale": (solving, "fixed_point_on_device", lambda right: lambda cost, width: _unscaled(right, cost, width)),
}  # fmt: skip


def _with_index(right: Any, cost: Any, words: Any, change: Any) -> Any:
    solution = right(cost, **words)
    return solving.replace(solution, index=change(solution.index)) if on_gpu(cost) else solution


def _coarse(rows: torch.Tensor) -> torch.Tensor:
    return (rows * 8).round() / 8 if on_gpu(rows) else rows


def _shifted(right: Any, cost: torch.Tensor, width: int) -> Any:
    fixed, numbers = right(cost, width)
    return fixed - 2, numbers


def _unscaled(right: Any, cost: torch.Tensor, width: int) -> Any:
    fixed, numbers = right(cost, width)
    return fixed, numbers * 1.01


CAUGHT: list[tuple[str, Callable[[torch.device], None]]] = [
    ("a permutation that is none", lambda gpu: engine.check_assignment(gpu, "l2", "auto", 128)),
    ("a worse permutation", lambda gpu: engine.check_assignment(gpu, "l2", "auto", 128)),
    ("a worse permutation", lambda gpu: engine.check_assignment(gpu, "l1", "float32", 127)),
    ("a transposed product", lambda gpu: engine.check_assignment(gpu, "squared_l2", "bfloat16", 128)),
    ("a transposed product", lambda gpu: engine.check_costs(gpu, "l2", "float16", 127)),
    ("a forgotten norm", lambda gpu: engine.check_costs(gpu, "l2", "auto", 127)),
    ("half of the precision", lambda gpu: engine.check_costs(gpu, "l2", "float32", 127)),
    ("half of the precision", lambda gpu: engine.check_costs(gpu, "squared_l2", "bfloat16", 127)),
]


@pytest.mark.parametrize(("broken", "check"), CAUGHT, ids=[f"{name} {number}" for number, (name, _) in enumerate(CAUGHT)])
def test_the_engines_checks(monkeypatch, gpu, broken, check):
    check(gpu)  # passes as it is
    where, what, wrong = BREAKS[broken]
    monkeypatch.setattr(where, what, wrong(getattr(where, what)))
    with pytest.raises(AssertionError):
        check(gpu)


@pytest.mark.parametrize("broken", ["rounding downwards", "a forgotten scale"])
def test_the_fixed_points_check(monkeypatch, gpu, broken):
    _, what, wrong = BREAKS[broken]
    monkeypatch.setattr(engine, what, wrong(getattr(engine, what)))
    with pytest.raises(AssertionError):
        engine.check_fixed_point(gpu, torch.randn(128, 128))


@pytest.mark.parametrize("solver", ["auction", "exact"])
def test_the_solvers_check(monkeypatch, gpu, solver):
    _, _, wrong = BREAKS["a worse permutation"]
    monkeypatch.setattr(engine, "solve", wrong(engine.solve))
    with pytest.raises(AssertionError):
        engine.check_solve(gpu, solver, 128)


def test_the_products_check(monkeypatch, gpu):
    monkeypatch.setattr(
        engine, "costs_on_device", lambda products, image, noise, far, metric: costs.costs_on_device(products, image, noise, ~far, metric)
    )
    with pytest.raises(AssertionError):
        engine.check_costs_from_products(gpu, "l2", 127)


class Wrong:
    """A coupling that, on the device, changes what the right one gives."""

    def __init__(self, coupling: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.coupling, self.change = coupling, change

    def __getattr__(self, name: str) -> Any:
        return getattr(self.coupling, name)

    def __call__(self, x0: torch.Tensor, *words: Any, **named: Any) -> torch.Tensor:
        found = self.coupling(x0, *words, **named)
        return self.change(found) if on_gpu(x0) else found


@pytest.mark.parametrize(
    "change",
    [
        lambda noise: noise.cpu(),  # the wrong device
        lambda noise: noise.roll(1, 0),  # the wrong order
        lambda noise: torch.cat([noise[:1], noise[:-1]]),  # a noise used twice
    ],
)
def test_the_permutations_check(gpu, change):
    with pytest.raises(AssertionError):
        couplings.check_permutation(gpu, lambda: Wrong(build_coupling("assignment", dtype="float32"), change), False)


def test_the_classes_check(monkeypatch, gpu):
    monkeypatch.setattr(conditions, "_within", lambda cost, groups, solver: solving.solve(cost, solver=solver).index)
    with pytest.raises(AssertionError):
        couplings.check_permutation(gpu, lambda: build_coupling("assignment", dtype="float32", condition="within"), False)


def test_the_centers_check(monkeypatch, gpu):
    """A mean that a batch moves twice as far as it should."""
    right = conditions._class_means

    def wrong(images, labels, state):
        predicted, after = right(images, labels, state)
        return predicted, {**after, "mean": after["mean"] * 1.01} if on_gpu(images) else after

    monkeypatch.setattr(conditions, "_class_means", wrong)
    with pytest.raises(AssertionError):
        couplings.check_permutation(gpu, lambda: build_coupling("assignment", dtype="float32", condition="centered"), False)


@pytest.mark.parametrize("check", [couplings.check_nearest, couplings.check_nearest_draws])
def test_the_nearest_checks(gpu, check):
    with pytest.raises(AssertionError):
        check(gpu, Wrong(NearestCoupling(8), lambda noise: 1.05 * noise))


def test_the_reservoirs_check(monkeypatch, gpu):
    from immiscible.assignment.reservoir import ReservoirCoupling

    right = ReservoirCoupling._best
    monkeypatch.setattr(ReservoirCoupling, "_best", lambda self, score: right(self, score if not on_gpu(score) else -score))
    with pytest.raises(AssertionError):
        couplings.check_reservoir(gpu)


def test_the_process_check(monkeypatch, gpu):
    from immiscible.process import NoiseProcess

    right = NoiseProcess.add_noise
    monkeypatch.setattr(
        NoiseProcess,
        "add_noise",
        lambda self, x0, noise, t: right(self, x0, noise, t).half().float() if on_gpu(x0) else right(self, x0, noise, t),
    )
    with pytest.raises(AssertionError):
        axes.check_process(gpu, axes.processes()["ddpm"], torch.float32)


def test_the_draws_check(monkeypatch, gpu):
    """A generator that goes on from row to row: rows then depend on how they are split."""
    from immiscible.randomness import Draws

    monkeypatch.setattr(Draws, "normal", lambda self, purpose, *shape: torch.randn(shape, device=self.device))
    with pytest.raises(AssertionError):
        axes.check_draws(gpu)


def test_the_samplers_check(monkeypatch, gpu):
    from immiscible.timesteps import TimestepSampler

    right = TimestepSampler.from_uniforms
    monkeypatch.setattr(
        TimestepSampler,
        "from_uniforms",
        lambda self, uniforms: right(self, uniforms.float().double() if on_gpu(uniforms) else uniforms) * 1,
    )
    axes.check_sampler(gpu, "uniform", axes.processes()["ddpm"])  # a uniform of 24 bits is seldom on the other side of a step
    monkeypatch.setattr(
        TimestepSampler, "from_uniforms", lambda self, uniforms: right(self, uniforms.half().double() if on_gpu(uniforms) else uniforms)
    )
    with pytest.raises(AssertionError):
        axes.check_sampler(gpu, "uniform", axes.processes()["ddpm"])


def test_a_tensor_left_on_the_cpu_is_found(monkeypatch, gpu):
    """What `pretended_gpu` is for: the mistake of a device that no CPU test sees."""
    right = solving._only_assignment
    monkeypatch.setattr(solving, "_only_assignment", lambda n, device: right(n, torch.device("cpu")))
    with pytest.raises(AssertionError):
        engine.check_solve(gpu, "auto", 1)
    monkeypatch.setattr(costs, "_norms", lambda rows: rows.cpu().norm(dim=1))
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        engine.check_costs(gpu, "l2", "auto", 127)


def test_the_look_aheads_check(monkeypatch):
    """A worker that hands out a batch that is not yet the next one's."""
    right = loop._look_ahead

    def late(items, depth, device):
        before = None
        for item in right(items, depth, device):
            yield before or item
            before = item

    monkeypatch.setattr(loop, "_look_ahead", late)
    with pytest.raises(AssertionError, match="with and without look-ahead differ"):
        training.check_look_ahead(torch.device("cpu"), "assignment", 1)


@pytest.mark.slow
def test_the_resume_check(script, tmp_path):
    """A run that goes on from its checkpoint with another learning rate."""
    started = []

    class Runs:
        """The real runs, but for the one that goes on."""

        def __call__(self, argv, **options):
            words = [str(word) for word in argv]
            killed = any(word.endswith("killed") for word in words)
            started.append(killed)
            return script(words + (["--learning_rate", "2e-3"] if killed else []), **options)

        start = staticmethod(lambda argv: script.start(argv))

    with pytest.raises(AssertionError, match="the run that was killed differs"):
        training.check_resume(Runs(), torch.device("cpu"), tmp_path)
    assert started == [False, False, True]


@pytest.mark.slow
def test_a_run_that_went_to_the_cpu_is_found(tmp_path):
    """As one does whose torch sees no device; the way in which runs are started on a GPU is tried here too."""
    runs = RunsOnGPU(tmp_path)
    try:
        result = runs(tiny(tmp_path / "run", max_train_steps=1))
        assert result.code == 0 and gpu_memory(result) == 0
        with pytest.raises(AssertionError, match="the run used no GPU"):
            training.assert_finished(result, torch.device("cuda"))
        running = runs.start(tiny(tmp_path / "killed", max_train_steps=1000))
        running.wait_until(lambda: lines(tmp_path / "killed") > 0)
        running.send_group(signal.SIGKILL)
        assert running.wait().code == 137
    finally:
        runs.close()


def test_lost_gradients_are_found():
    """As a compiler lost them: the first loss is right, the first gradient is not, later losses are a few percent off."""
    plain = [{"loss": 1.12 - 0.1 * step, "grad_norm": 2.0} for step in range(6)]
    training.assert_trained_alike(plain, [dict(line) for line in plain])
    for wrong in (
        [{**plain[0], "grad_norm": 1.9}, *plain[1:]],
        [*plain[:5], {**plain[5], "loss": 1.05 * plain[5]["loss"]}],
        [{**plain[0], "loss": 1.01 * plain[0]["loss"]}, *plain[1:]],
        plain[:5],
    ):
        with pytest.raises(AssertionError):
            training.assert_trained_alike(plain, wrong)


def test_losses_that_are_no_numbers_are_found(tmp_path):
    import json

    from safetensors.torch import save_file

    weights = tmp_path / "weights.safetensors"
    falling = [1.0, 0.9, 0.5, 0.4, 0.3, 0.2]
    for losses, weight in (([*falling[:-1], float("nan")], 1.0), (falling[::-1], 1.0), (falling, float("inf"))):
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps({"loss": loss}) + "\n" for loss in losses))
        save_file({"weight": torch.tensor([weight])}, weights)
        with pytest.raises(AssertionError):
            training.check_finite(tmp_path, weights)
