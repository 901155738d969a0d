"""What a step is predicted to need, against what it takes: torch's own record of allocations, which knows nothing of the prediction."""

import re
import resource
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
from diffusers import SD3Transformer2DModel, UNet2DConditionModel, UNet2DModel
from launch import ROOT, tiny
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from immiscible.configs import UnconditionalConfig
from immiscible.networks.optimization import CLASSES, OPTIMIZERS, _imported, build_optimizer
from immiscible.training.loop import StepStats
from immiscible.training.memory import Passes, at_first_call, optimizer_bytes, other_networks, step_memory, step_passes, table
from immiscible.training.summary import report_plan

BLOCKS = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (32, 64),
    "norm_num_groups": 8,
}


def pixels():
    kinds = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    network = UNet2DModel(16, 3, 3, block_out_channels=(32, 64), norm_num_groups=8, **kinds)
    return network, (torch.randn(8, 3, 16, 16), torch.zeros(8, dtype=torch.long))


def captions():
    network = UNet2DConditionModel(16, 4, 4, cross_attention_dim=32, attention_head_dim=4, layers_per_block=1, **BLOCKS)
    return network, (torch.randn(8, 4, 16, 16), torch.zeros(8, dtype=torch.long), torch.randn(8, 77, 32))


def joint():
    sizes = {"num_attention_heads": 4, "attention_head_dim": 16, "joint_attention_dim": 32, "caption_projection_dim": 64}
    network = SD3Transformer2DModel(16, 2, 4, 4, pooled_projection_dim=24, out_channels=4, pos_embed_max_size=16, **sizes)
    return network, (torch.randn(8, 4, 16, 16), torch.randn(8, 20, 32), torch.randn(8, 24), torch.zeros(8))


def measured(work):
    """The most bytes that lived at once in ``work()``, beside what was there, as the allocator has written down."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        work()
    events = record.profiler.kineto_results.events()
    now = peak = 0
    for _, change in sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"):
        now += change
        peak = max(peak, now)
    return peak


def passes(network, arguments, precision=None):
    with torch.autocast("cpu", precision or torch.bfloat16, enabled=precision is not None):
        output = network(*arguments).sample
    output.float().square().mean().backward()


# Convolutions in bf16 with checkpointing are tested on a GPU: a CPU without instructions for bf16 unfolds images inside the kernel, which
# no operation shows, and of so small a network that is a third of the peak.
SMALL, SLOW = torch.bfloat16, pytest.mark.slow


@pytest.mark.parametrize(
    ("build", "checkpointing", "precision"),
    [
        (captions, False, None),
        (joint, True, SMALL),
        pytest.param(captions, True, None, marks=SLOW),
        pytest.param(captions, False, SMALL, marks=SLOW),
        pytest.param(joint, False, None, marks=SLOW),
        pytest.param(joint, False, SMALL, marks=SLOW),
        pytest.param(pixels, False, None, marks=SLOW),
        pytest.param(pixels, True, None, marks=SLOW),
    ],
)
def test_the_peak_of_the_passes_is_that_of_the_allocator(build, checkpointing, precision):
    network, arguments = build()
    before = {name: weight.clone() for name, weight in network.state_dict().items()}
    predicted = step_passes(network, arguments, {}, device="cpu", checkpointing=checkpointing, precision=precision)
    assert not network.is_gradient_checkpointing and all(weight.grad is None for weight in network.parameters())
    assert all(torch.equal(weight, before[name]) for name, weight in network.state_dict().items())
    if checkpointing:
        network.enable_gradient_checkpointing()
    assert predicted.peak == pytest.approx(measured(lambda: passes(network, arguments, precision)), rel=0.15)
    assert predicted.largest < predicted.activations < predicted.peak


def test_activations_are_what_is_saved_for_the_backward_pass():
    network, arguments = captions()
    saved = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        saved[storage._cdata] = storage.nbytes(), tensor
        return tensor

    weights = {tensor.untyped_storage()._cdata for tensor in (*network.parameters(), *arguments)}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        network(*arguments)
    held = sum(size for key, (size, _) in saved.items() if key not in weights)
    predicted = step_passes(network, arguments, {}, device="cpu", checkpointing=False)
    assert predicted.activations == pytest.approx(held, rel=0.15)
    assert step_passes(network, arguments, {}, device="cpu", checkpointing=True).activations < held / 3


def test_operations_are_those_that_torch_counts():
    network, arguments = joint()
    without, with_it = (step_passes(network, arguments, {}, device="cpu", checkpointing=each).flops for each in (False, True))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        passes(network, arguments)
    assert counter.get_total_flops() < without < 1.05 * counter.get_total_flops()  # fused attention makes its first product again
    assert without < with_it < 4 / 3 * without
    assert step_passes(network, arguments, {}, device="cpu", accumulation=4).flops == 4 * without


@SLOW
def test_gradients_that_are_there_are_counted_from_the_second_micro_batch_on():
    network, arguments = captions()

    def step():
        passes(network, arguments)
        passes(network, arguments)

    predicted = step_passes(network, arguments, {}, device="cpu", accumulation=8)
    assert predicted.peak == pytest.approx(measured(step), rel=0.15)
    assert predicted.peak > step_passes(network, arguments, {}, device="cpu").peak


def test_a_network_that_is_called_through_hooks_and_in_channels_last():
    network, (x, t) = pixels()
    network.to(memory_format=torch.channels_last)
    network.register_forward_pre_hook(lambda module, arguments, options: ((*arguments, options["t"]), {}), with_kwargs=True)
    predicted = step_passes(network, (x,), {"t": t}, device="cpu")

    def step():
        network(x, t=t).sample.square().mean().backward()

    assert predicted.peak == pytest.approx(measured(step), rel=0.15)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_keep_what_is_said(name):
    if name in CLASSES:
        try:
            _imported("", *CLASSES[name])
        except Exception as error:
            pytest.skip(str(error))
    network, arguments = joint()
    network.pos_embed.requires_grad_(False)
    optimizer = build_optimizer(network, UnconditionalConfig(optimizer=name))
    passes(network, arguments)
    optimizer.step()
    kept = sum(value.nbytes for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor))
    assert optimizer_bytes(name, network) == pytest.approx(kept, rel=0.02)


def test_a_whole_step_beside_what_is_there_before():
    network, arguments = captions()
    optimizer = build_optimizer(network, UnconditionalConfig())
    predicted = step_memory(network, step_passes(network, arguments, {}, device="cpu"), optimizer="adamw", device="cpu")

    def step():
        passes(network, arguments)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    static = predicted.weights + predicted.optimizer + predicted.frozen + predicted.average
    assert predicted.peak - static == pytest.approx(measured(step), rel=0.15)


def test_what_depends_on_the_run():
    network = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 32, bias=False))
    network[1].requires_grad_(False)
    size, trained = 4 * (64 * 64 + 64 * 32), 4 * 64 * 64
    small, large = Passes(0, 10, 10, 0), Passes(0, 10 * size, 10, 0)
    alone = step_memory(network, small, optimizer="adamw", device="cpu")
    assert (alone.weights, alone.gradients, alone.optimizer, alone.average) == (size, trained, 2 * trained, 0)
    assert alone.peak == size + 2 * trained + trained + trained
    more = step_memory(network, large, optimizer="muon", device="cuda", averaged=True, frozen=7, processes=2)
    assert (more.weights, more.average, more.frozen) == (size + trained, size, 7)
    assert more.peak == size + trained + more.optimizer + size + 7 + 10 * size
    assert step_memory(network, small, optimizer="adamw", device="cuda").update == trained
    rows = table(alone, more, "with --gradient_checkpointing").splitlines()
    assert rows[0].endswith("to the right with --gradient_checkpointing") and re.fullmatch(r"  weights +0\.0 +0\.0", rows[1])
    assert table(alone, None, "").splitlines()[-1].split() == ["peak", f"{alone.peak / 2**20:.1f}"]


def test_other_networks_of_a_task_are_found_wherever_they_stand():
    @dataclass
    class Parts:
        vae: nn.Module
        network: nn.Module
        encoders: dict = field(default_factory=dict)

    @dataclass
    class Work:
        parts: Parts
        source: object
        network: nn.Module

    network, vae, first, second = (nn.Linear(1, 1) for _ in range(4))
    task = Work(Parts(vae, network, {"one": first, "more": [second, first]}), SimpleNamespace(of=nn.Linear(1, 1)), network)
    assert sorted(map(id, other_networks(task))) == sorted(map(id, (vae, first, second)))
    network.add_module("text_encoder", second)  # which is trained then, as a part of the network
    assert sorted(map(id, other_networks(task))) == sorted(map(id, (vae, first)))


def test_what_a_hook_calls_beside_the_network_is_there_before():
    """As T5, which is not adapted where the other text encoders are."""
    network, encoder, ids = nn.Linear(64, 64), nn.Embedding(512, 64).requires_grad_(False), torch.zeros(2, dtype=torch.long)
    network.register_forward_pre_hook(lambda _, arguments: (encoder(arguments[0]) @ encoder.weight[:64],))
    found = step_passes(network, (ids,), {}, device="cpu:0", beside=[encoder])  # as accelerate calls it in each of several processes
    gradients = sum(weight.nbytes for weight in network.parameters())
    assert gradients <= found.peak < gradients + 2**13 and encoder.weight.nbytes > 2**16


def test_the_first_call_is_told_before_it_is_made():
    network, told = nn.Linear(2, 3), []
    with at_first_call(network, lambda arguments, options: told.append((arguments, options))):
        given = torch.zeros(1, 2)
        network(input=given)
        network(given)
    assert told == [((), {"input": given})] and not network._forward_pre_hooks


SIZES = {  # published: about 2.6, 2 and 8.1 thousand millions
    "sdxl": 2_567_463_684,
    "sd3": 2_028_328_000,
    "sd35_large": 8_056_627_520,
}


@pytest.fixture
def published(monkeypatch):
    """A network of its published shape without weights, and a call of it at 1024 pixels, by name."""
    monkeypatch.syspath_prepend(f"{ROOT}/scripts")
    from benchmark_memory import published

    def on_meta(name):
        with torch.device("meta"):
            return published(name, side=1024, batch=1)

    return on_meta


def resident():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 2**10


@pytest.mark.parametrize("name", SIZES)
def test_large_networks_have_their_published_size_and_take_no_memory(name, published):
    before = resident()
    network, _, _ = published(name)
    assert sum(weight.numel() for weight in network.parameters()) == pytest.approx(SIZES[name], rel=0.01)
    memory = step_memory(network, Passes(0, 0, 0, 0), optimizer="adamw", device="cuda", averaged=True)
    assert memory.average == memory.gradients == memory.optimizer / 2 == 4 * sum(map(torch.numel, network.parameters()))
    assert memory.gradients <= memory.weights < 1.03 * memory.gradients  # with the table of positions
    assert resident() - before < 2**29


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sdxl", "sd3"])
def test_a_step_of_a_large_network_is_predicted_without_its_memory(name, published):
    network, arguments, options = published(name)
    before = resident()
    one = step_passes(network, arguments, options, device="cpu", checkpointing=True, precision=torch.bfloat16)
    memory = step_memory(network, one, optimizer="adamw", device="cuda")
    assert resident() - before < 2**29 < memory.peak / 40
    gradients = memory.gradients
    assert gradients < one.peak < 1.2 * gradients and one.activations < gradients / 8
    assert 2e13 / 3 < one.flops < 8e13


@pytest.mark.parametrize("predict", [None, lambda arguments, options: 1 / 0])
def test_a_plan_without_a_prediction_says_so_and_goes_on(predict):
    network, said = nn.Linear(1, 1), []
    accelerator = SimpleNamespace(
        is_main_process=True, device=torch.device("cpu"), print=said.append, reduce=lambda value, reduction: value
    )

    def steps():
        for step in range(1, 4):
            network(torch.ones(1))
            yield StepStats(step, {"step_seconds": 0.5}, {})

    report_plan(steps(), network, accelerator, 3, checkpoint=lambda: 0.0, predict=predict)
    reason = "compiled or split" if predict is None else "ZeroDivisionError: division by zero"
    assert "not predicted" in said[0] and reason in said[0] and said[1].startswith("Plan: 3 steps of 0.500 s") and "GFLOP" not in said[1]


def test_a_plan_tells_what_a_step_needs_and_its_operations(script, tmp_path):
    flags = {"max_train_steps": 100, "use_ema": True, "dropout": 0.1}
    result = script(tiny(tmp_path / "run", plan=True, **flags), cwd=tmp_path)
    assert result.code == 0, result.stderr
    rows = dict(re.findall(r"^  (\w[\w ]+?) +([\d.,]+)(?: +[\d.,]+)?$", result.stdout, re.M))
    weights = re.search(r"Plan: weights ([\d.]+) MiB", result.stdout)[1]
    assert rows["weights"] == rows["gradients"] == rows["average"] == weights
    assert float(rows["optimizer"]) == pytest.approx(2 * float(weights), abs=0.2)
    assert float(rows["peak"]) > 5 * float(weights) and float(rows["activations"]) > 0
    assert re.search(r"Plan: [\d.]+ GFLOP a step of a process, at [\d.]+ GFLOP/s here", result.stdout)
    assert "with --gradient_checkpointing" in result.stdout
