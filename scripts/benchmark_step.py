#!/usr/bin/env python
"""What a training step costs here against the same step written directly in diffusers and accelerate.

    python scripts/benchmark_step.py

Steps of the two loops alternate in one process; the ratio is the median over pairs, and with --assignment the coupling's own time is
reported apart. Peak memory is taken in a process of its own for each loop.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence

import torch
from benchmark_device import accelerator_on, add_device, milliseconds, most_memory, processor
from tqdm import tqdm

from immiscible.coupling import AssignmentCoupling, IndependentCoupling
from immiscible.data.batches import Images
from immiscible.encoding.encoders import PixelEncoder
from immiscible.errors import run_script
from immiscible.networks.unet import build_unet, unet_config
from immiscible.objectives import DenoisingObjective
from immiscible.process import NoiseProcess
from immiscible.schedulers import build_scheduler
from immiscible.timesteps import timestep_sampler
from immiscible.training.loop import StopRequest, train
from immiscible.weighting import loss_weights

RATE = 1e-4


def parts(arguments: argparse.Namespace) -> tuple:
    from diffusers.training_utils import EMAModel

    torch.manual_seed(0)
    accelerator = accelerator_on(torch.device(arguments.device))
    config = unet_config(config_name_or_path=None, preset=arguments.preset, resolution=arguments.resolution, channels=3, dropout=None)
    unet = build_unet(config)
    ema = EMAModel(unet.parameters(), use_ema_warmup=True, foreach=True)
    ema.to(accelerator.device)
    model, optimizer = accelerator.prepare(unet, torch.optim.AdamW(unet.parameters(), lr=RATE))
    return accelerator, model.train(), optimizer, ema


def batches(arguments: argparse.Namespace) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    while True:
        yield torch.rand(arguments.batch, 3, arguments.resolution, arguments.resolution, generator=generator) * 2 - 1


def our_steps(arguments: argparse.Namespace, assignment: bool) -> Iterator[float]:
    """One step per item: the seconds that the coupling took."""
    accelerator, model, optimizer, ema = parts(arguments)
    process = NoiseProcess.from_scheduler(build_scheduler("ddpm"))
    objective = DenoisingObjective(
        process.to(accelerator.device),
        timestep_sampler("uniform", process),
        AssignmentCoupling() if assignment else IndependentCoupling(),
        loss_weights("none", process, "epsilon").float().to(accelerator.device),
    )
    for stats in train(
        accelerator, model, optimizer, objective, map(Images, batches(arguments)), PixelEncoder(accelerator.device),
        batch_size=arguments.batch, seed=0, start_step=0, max_steps=10**9,
        learning_rate=lambda step: RATE, max_grad_norm=1.0, ema=ema, stop=StopRequest(),
    ):  # fmt: skip
        yield stats.metrics["coupling_seconds"]


def plain_steps(arguments: argparse.Namespace) -> Iterator[float]:
    """The diffusers example's step: noise, timesteps, add_noise, epsilon loss, clipping, AdamW, scheduler, EMA, and its `.item()`."""
    from diffusers import DDPMScheduler
    from diffusers.optimization import get_scheduler

    accelerator, model, optimizer, ema = parts(arguments)
    scheduler = DDPMScheduler()
    rate = accelerator.prepare(get_scheduler("constant", optimizer))
    for clean in batches(arguments):
        clean = clean.to(accelerator.device)
        noise = torch.randn_like(clean)
        timesteps = torch.randint(0, 1000, (len(clean),), device=clean.device)
        with accelerator.accumulate(model):
            output = model(scheduler.add_noise(clean, noise, timesteps), timesteps).sample
            loss = torch.nn.functional.mse_loss(output.float(), noise.float())
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            rate.step()
            optimizer.zero_grad()
        ema.step(model.parameters())
        loss.detach().item()
        yield 0.0


def peak_memory(arguments: argparse.Namespace) -> None:
    steps = plain_steps(arguments) if arguments.memory_of == "plain" else our_steps(arguments, arguments.memory_of == "assignment")
    for _ in range(3):
        next(steps)
    print(most_memory(torch.device(arguments.device)))


def timed(steps: Iterator[float], device: torch.device) -> tuple[float, float]:
    """Seconds of a step, and of the coupling in it."""
    coupling: list[float] = []
    took = milliseconds(lambda: coupling.append(next(steps)), device) / 1000
    return took, coupling[0]


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--resolution", type=int, default=32)
    parser.add_argument("--preset", default="unet-small")
    add_device(parser)
    parser.add_argument(
        "--memory_of", choices=("plain", "independent", "assignment"), help="print the peak memory of one loop in MiB and stop"
    )
    arguments = parser.parse_args(argv)
    if arguments.memory_of:
        peak_memory(arguments)
        return

    device, memory = torch.device(arguments.device), {}  # first: a process starts with its parent's peak, which is still small
    for name in tqdm(("plain", "independent", "assignment"), desc="memory", leave=False):
        command = [sys.executable, __file__, *argv, "--memory_of", name]
        memory[name] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    loops = {"plain": plain_steps(arguments), "independent": our_steps(arguments, False), "assignment": our_steps(arguments, True)}
    for steps in loops.values():
        timed(steps, device)  # first steps allocate
    rows = []
    for turn in tqdm(range(arguments.pairs), desc="pairs", leave=False):
        order = list(loops) if turn % 2 else list(reversed(loops))
        rows.append({name: timed(loops[name], device) for name in order})
    plain = statistics.median(row["plain"][0] for row in rows)
    where = processor(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    print(
        f"{arguments.preset}, batch {arguments.batch}, {arguments.resolution}x{arguments.resolution}, {where}, "
        f"median of {arguments.pairs} interleaved pairs"
    )
    print(f"plain diffusers + accelerate      {1000 * plain:9.1f} ms a step")
    ratio = statistics.median(row["independent"][0] / row["plain"][0] for row in rows)
    print(f"here, independent noise           {ratio:9.4f} x plain  (target: at most 1.03)")
    ratio = statistics.median((row["assignment"][0] - row["assignment"][1]) / row["plain"][0] for row in rows)
    apart = statistics.median(row["assignment"][1] for row in rows)
    print(f"here, assignment, without solving {ratio:9.4f} x plain  (target: at most 1.03); assignment itself {1000 * apart:.2f} ms")
    print(f"peak memory, plain                {memory['plain']:9.1f} MiB")
    for name in ("independent", "assignment"):
        print(f"peak memory, {name:<21}{memory[name] / memory['plain']:9.4f} x plain  (target: at most 1.02)")


if __name__ == "__main__":
    sys.exit(run_script(main))
