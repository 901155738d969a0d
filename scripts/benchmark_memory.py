#!/usr/bin/env python
"""What a step of a network of published size takes of a GPU, against what `--plan` predicts: memory and time, SDXL and Stable Diffusion 3.

    python scripts/benchmark_memory.py --output benchmarks/memory_gpu.txt

The weights are random: what a step takes does not depend on their values. `full` trains all in fp32 with AdamW and computes in bf16;
`lora` trains adapters of rank 16 in fp32 on weights that are frozen in bf16. The prediction is made before, on tensors without data.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from benchmark_device import milliseconds, processor
from torch import Tensor, nn

from immiscible.errors import UserError, run_script
from immiscible.training.memory import step_memory, step_passes

RANK = 16
NETWORKS = ("sdxl", "sd3", "sd35_large")


def published(name: str, side: int, batch: int) -> tuple[Any, tuple[Tensor, ...], dict[str, Any]]:
    """A network of its published shape, on the default device, and a call of it for images of ``side`` pixels."""
    from diffusers import SD3Transformer2DModel, UNet2DConditionModel

    latent = side // 8
    if name == "sdxl":
        network = UNet2DConditionModel(
            sample_size=128,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(320, 640, 1280),
            cross_attention_dim=2048,
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )
        told = {"added_cond_kwargs": {"text_embeds": torch.zeros(batch, 1280), "time_ids": torch.zeros(batch, 6)}}
        return network, (torch.zeros(batch, 4, latent, latent), torch.ones(batch), torch.zeros(batch, 77, 2048)), told
    layers = 24 if name == "sd3" else 38
    more: dict[str, Any] = {"pos_embed_max_size": 192} | ({} if name == "sd3" else {"qk_norm": "rms_norm"})
    network = SD3Transformer2DModel(128, 2, 16, layers, 64, layers, 4096, 64 * layers, 2048, 16, **more)
    return network, (torch.zeros(batch, 16, latent, latent), torch.zeros(batch, 154, 4096), torch.zeros(batch, 2048), torch.ones(batch)), {}


def with_adapters(network: Any) -> Any:
    """The network in bf16 and frozen, with fp32 adapters."""
    from peft import LoraConfig

    network.requires_grad_(False).to(torch.bfloat16)
    network.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["to_k", "to_q", "to_v", "to_out.0"]))
    for weight in network.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()
    return network


def steps(network: nn.Module, arguments: Sequence[Any], options: Mapping[str, Any], count: int) -> tuple[int, float]:
    """The most bytes that were allocated at once, and the median milliseconds of a step but for the first two."""
    optimizer = torch.optim.AdamW([weight for weight in network.parameters() if weight.requires_grad], lr=1e-6)

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            output = network(*arguments, **options).sample
        output.float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    device = torch.device("cuda")
    torch.cuda.reset_peak_memory_stats()
    taken = [milliseconds(step, device) for _ in range(count)]
    return torch.cuda.max_memory_allocated(), median(taken[2:])


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=["sdxl", "sd3"])
    parser.add_argument("--modes", nargs="+", choices=["full", "lora"], default=["full", "lora"])
    parser.add_argument("--side", type=int, default=1024, help="of the images, in pixels")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=4, help="of each, the first two untimed")
    parser.add_argument("--output", type=Path, help="also write the table there")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        raise UserError("this measures a GPU's memory, and there is none; `--plan` predicts it anywhere")
    if arguments.steps < 3:
        raise UserError(f"--steps must be at least 3, of which the first two are not timed, not {arguments.steps}")

    device = torch.device("cuda")
    lines = [
        f"{processor(device)}, torch {torch.__version__}; {arguments.side} px, batch {arguments.batch}, bf16 autocast, AdamW",
        f"{'network':<11}{'trained':<9}{'checkpointing':<15}{'predicted GiB':>14}{'measured GiB':>14}{'ratio':>8}{'ms':>9}{'TFLOP/s':>9}",
    ]
    print("\n".join(lines), flush=True)
    for name in arguments.networks:
        for mode in arguments.modes:
            with device:
                network, given, told = published(name, arguments.side, arguments.batch)
            network = (with_adapters(network) if mode == "lora" else network).train()
            for checkpointing in (True, False):
                (network.enable_gradient_checkpointing if checkpointing else network.disable_gradient_checkpointing)()
                passes = step_passes(network, given, told, device=device, precision=torch.bfloat16)
                predicted = step_memory(network, passes, optimizer="adamw", device=device).peak
                start = f"{name:<11}{mode:<9}{'on' if checkpointing else 'off':<15}{predicted / 2**30:>14.2f}"
                try:
                    measured, took = steps(network, given, told, arguments.steps)
                    end = f"{measured / 2**30:>14.2f}{predicted / measured:>8.3f}{took:>9.0f}{passes.flops / took / 1e9:>9.0f}"
                except torch.OutOfMemoryError:
                    end = f"{'does not fit':>14}"
                lines.append(start + end)
                print(lines[-1], flush=True)
                network.zero_grad(set_to_none=True)
                gc.collect()
                torch.cuda.empty_cache()
            del network, given, told
            gc.collect()
            torch.cuda.empty_cache()
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.exit(run_script(main))
