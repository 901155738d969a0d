"""Optimizer, learning rate and average, of the argument groups of networks alone."""

from __future__ import annotations

import pytest
import torch
from class_networks import tiny_unet
from diffusers.optimization import get_scheduler
from torch import nn

from immiscible.errors import UserError
from immiscible.networks.arguments import OptimizationArguments, TextOptimizationArguments
from immiscible.networks.optimization import build_ema, build_optimizer, learning_rate, tuned

CPU = torch.device("cpu")


def text(**changes):
    return TextOptimizationArguments(**changes)


def test_learning_rate_counts_optimizer_steps():
    parameter = nn.Parameter(torch.zeros(1))
    for name in ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"):
        arguments = OptimizationArguments(lr_scheduler=name, lr_warmup_steps=3, learning_rate=0.01, gradient_accumulation_steps=4)
        rate = learning_rate(arguments, torch.optim.AdamW([parameter], lr=0.01), 10)
        optimizer = torch.optim.AdamW([parameter], lr=0.01)
        reference = get_scheduler(name, optimizer, num_warmup_steps=3, num_training_steps=10)
        for step in range(10):
            assert rate(step) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12), (name, step)
            optimizer.step()
            reference.step()


def test_a_rate_that_is_scaled_is_so_by_the_images_of_a_step():
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=0.01)
    options = {"lr_warmup_steps": 3, "learning_rate": 0.01, "gradient_accumulation_steps": 4, "train_batch_size": 5}
    plain = learning_rate(text(**options), optimizer, 10, processes=2)
    scaled = learning_rate(text(**options, scale_lr=True), optimizer, 10, processes=2)
    assert [scaled(step) for step in range(10)] == [4 * 5 * 2 * plain(step) for step in range(10)]
    assert plain(9) == 0.01


def test_a_polynomial_that_would_rise_is_refused():
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=1e-7)
    with pytest.raises(UserError, match="--learning_rate must be above that, not 1e-07"):
        learning_rate(text(lr_scheduler="polynomial", learning_rate=1e-7), optimizer, 10)


def test_the_optimizer_trains_what_requires_a_gradient_with_the_settings_of_the_flags():
    network = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    network[0].requires_grad_(False)
    settings = {"adam_beta1": 0.5, "adam_beta2": 0.6, "adam_weight_decay": 0.7, "adam_epsilon": 0.8, "learning_rate": 0.9}
    (group,) = build_optimizer(network, text(**settings)).param_groups
    assert [id(weight) for weight in group["params"]] == [id(weight) for weight in network[1].parameters()]
    assert (group["betas"], group["weight_decay"], group["eps"], group["lr"]) == ((0.5, 0.6), 0.7, 0.8, 0.9)
    assert type(build_optimizer(network, OptimizationArguments())) is torch.optim.AdamW


def test_weight_decay_of_radam_is_apart_from_the_gradient():
    """Without a gradient AdamW and RAdam both shrink a weight by lr x decay; decay inside the gradient would be a step of about lr."""
    settings = {"adam_beta1": 0.5, "adam_beta2": 0.6, "adam_weight_decay": 0.25, "adam_epsilon": 0.125, "learning_rate": 0.5}
    for arguments in (OptimizationArguments, TextOptimizationArguments):
        network = nn.Linear(1, 1, bias=False)
        optimizer = build_optimizer(network, arguments(optimizer="radam", **settings))
        (group,) = optimizer.param_groups
        assert type(optimizer) is torch.optim.RAdam and group["foreach"] is None  # torch's choice: foreach on a GPU
        assert (group["betas"], group["weight_decay"], group["eps"], group["lr"]) == ((0.5, 0.6), 0.25, 0.125, 0.5)
        with torch.no_grad():
            network.weight.fill_(8)
        network.weight.grad = torch.zeros_like(network.weight)
        optimizer.step()
        assert network.weight.item() == 8 * (1 - 0.5 * 0.25)


def test_8_bit_states_need_their_package(monkeypatch):
    monkeypatch.setattr("immiscible.networks.optimization.find_spec", lambda name: None)
    with pytest.raises(UserError, match="--use_8bit_adam needs bitsandbytes"):
        build_optimizer(nn.Linear(1, 1), text(use_8bit_adam=True))


def decays(ema, network, steps=30):
    found = []
    for _ in range(steps):
        ema.step(network.parameters())
        found.append(ema.cur_decay_value)
    return found


def test_averages_rise_as_in_the_example_of_their_script():
    """Warm-up by inverse gamma and power in the one, (1 + n) / (10 + n) in the other, where n is one less than the updates."""
    network = tiny_unet()
    arguments = OptimizationArguments(use_ema=True, ema_inv_gamma=2.0, ema_power=0.5, ema_max_decay=0.7)
    ema = build_ema(network, arguments, CPU)
    assert decays(ema, network) == pytest.approx([min(1 - (1 + n / 2) ** -0.5, 0.7) for n in range(30)])
    ema = build_ema(network, text(use_ema=True), CPU)
    assert decays(ema, network) == pytest.approx([0.0, *((1 + n) / (10 + n) for n in range(1, 30))])
    assert build_ema(network, text(), CPU) is None and build_ema(network, OptimizationArguments(), CPU) is None


def test_an_offloaded_average_is_at_home_in_host_memory_and_equal(tmp_path):
    network = tiny_unet()
    averages = [
        build_ema(network, text(use_ema=True, **changes), torch.device(place))
        for changes, place in (
            ({}, "cpu"),
            ({"offload_ema": True}, "meta"),  # where it never lies, but for updates the weights' device
        )
    ]
    for _ in range(3):
        with torch.no_grad():
            for weight in network.parameters():
                weight += 1
        for ema in averages:
            ema.step(network.parameters())
    for one, other in zip(averages[0].shadow_params, averages[1].shadow_params, strict=True):
        assert other.device == CPU and torch.equal(one, other)
    averages[1].save_pretrained(tmp_path)
    assert type(network).from_pretrained(tmp_path).config.sample_size == network.config.sample_size


def test_a_backend_that_is_not_there_is_one_line():
    assert tuned(tiny_unet(), text(), CPU).training is False
    with pytest.raises(UserError, match=r"--torch_compile_backend 'turbo' is unknown; known: .*inductor"):
        tuned(tiny_unet(), text(torch_compile=True, torch_compile_backend="turbo"), CPU)


def test_the_compiler_that_loses_gradients_on_a_cpu_is_refused():
    with pytest.raises(UserError, match=r"--torch_compile: on a CPU torch's inductor loses gradients.*--torch_compile_backend aot_eager"):
        tuned(tiny_unet(), text(torch_compile=True), CPU)
    for backend, device in (("inductor", "cuda"), ("aot_eager", "cpu")):  # nothing is compiled before the first call
        compiled = tuned(tiny_unet(), text(torch_compile=True, torch_compile_backend=backend), torch.device(device))
        assert isinstance(compiled, torch._dynamo.OptimizedModule)
