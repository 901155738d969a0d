"""What a plan says of a step's memory, against the most that torch's allocator has given out."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from conftest import REAL, real_device
from diffusers import SD3Transformer2DModel, UNet2DConditionModel

from immiscible.training.memory import step_memory, step_passes

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16}


def unet() -> tuple[torch.nn.Module, tuple[torch.Tensor, ...]]:
    network = UNet2DConditionModel(
        sample_size=64,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(128, 256),
        cross_attention_dim=256,
        attention_head_dim=8,
    )
    return network, (torch.randn(8, 4, 64, 64), torch.zeros(8, dtype=torch.long), torch.randn(8, 77, 256))


def transformer() -> tuple[torch.nn.Module, tuple[torch.Tensor, ...]]:
    network = SD3Transformer2DModel(64, 2, 16, 6, 64, 8, 256, 512, 128, 16, pos_embed_max_size=64)
    return network, (torch.randn(8, 16, 64, 64), torch.randn(8, 77, 256), torch.randn(8, 128), torch.zeros(8))


def most(work: Callable[[], None]) -> int:
    """Bytes beside what was there, at once."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.gpu
@pytest.mark.parametrize("device", [REAL])
@pytest.mark.parametrize("build", [unet, transformer])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_takes_what_was_predicted(build, precision, checkpointing, device):
    device, dtype = real_device(), PRECISIONS[precision]
    network, arguments = build()
    predicted = step_passes(network, arguments, {}, device=device, checkpointing=checkpointing, precision=dtype)
    whole = step_memory(network, predicted, optimizer="adamw", device=device)
    network.to(device)
    if checkpointing:
        network.enable_gradient_checkpointing()
    given = tuple(argument.to(device) for argument in arguments)
    optimizer = torch.optim.AdamW(network.parameters())

    def passes() -> None:
        with torch.autocast("cuda", dtype, enabled=dtype is not None):
            output = network(*given).sample
        output.float().square().mean().backward()

    def step() -> None:
        passes()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()  # what libraries take once
    peak, passing = most(step), most(passes)
    static = whole.weights + whole.optimizer
    print(f"{build.__name__} {precision} {checkpointing}: {predicted.peak / 2**20:.1f} said, {passing / 2**20:.1f} MiB")
    assert predicted.peak == pytest.approx(passing, rel=0.15)
    assert whole.peak == pytest.approx(static + peak, rel=0.15)
