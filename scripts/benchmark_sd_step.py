#!/usr/bin/env python
"""What a text-to-image step costs here against the same step written directly in diffusers and accelerate.

    python scripts/make_tiny_sd.py TINY
    python scripts/benchmark_sd_step.py --pretrained_model_name_or_path TINY/model --channels 64 128

Both encode images and captions in each step. Steps of the two loops alternate in one process; the ratio is the median over pairs, and with
the assignment the coupling's own time is reported apart. Peak memory is taken in a process of its own for each loop.
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
from immiscible.errors import run_script
from immiscible.objectives import DenoisingObjective
from immiscible.process import NoiseProcess
from immiscible.timesteps import timestep_sampler
from immiscible.training.loop import StopRequest, train
from immiscible.weighting import loss_weights

RATE = 1e-4


def parts(arguments: argparse.Namespace) -> tuple:
    from diffusers import UNet2DConditionModel

    from immiscible.configs import TextToImageConfig
    from immiscible.networks.families import load_checkpoint
    from immiscible.networks.optimization import build_ema, build_optimizer
    from immiscible.networks.placing import place

    torch.manual_seed(0)
    accelerator = accelerator_on(torch.device(arguments.device), mixed_precision=arguments.mixed_precision)
    config = TextToImageConfig(
        pretrained_model_name_or_path=arguments.pretrained_model_name_or_path,
        resolution=arguments.resolution,
        use_lora=arguments.use_lora,
        use_ema=not arguments.use_lora,
        foreach_ema=True,
        learning_rate=RATE,
    )
    found = load_checkpoint(config, resolution=config.resolution, cache_dir=None, from_scratch=False)
    if arguments.channels:
        settings = {**found.network.config, "block_out_channels": arguments.channels}
        found.network = UNet2DConditionModel.from_config(settings)
    place(found, accelerator, adapters=config if config.use_lora else None, idle=False)
    ema = build_ema(found.network, config, accelerator.device)
    model, optimizer = accelerator.prepare(found.network, build_optimizer(found.network, config))
    return accelerator, found, model, optimizer, ema


def batches(arguments: argparse.Namespace) -> Iterator[Images]:
    generator = torch.Generator().manual_seed(0)
    captions = [f"picture number {number} of many" for number in range(arguments.batch)]
    while True:
        shape = (arguments.batch, 3, arguments.resolution, arguments.resolution)
        yield Images(torch.rand(shape, generator=generator) * 2 - 1, captions=captions)


def our_steps(arguments: argparse.Namespace, assignment: bool) -> Iterator[float]:
    """One step per item: the seconds that the coupling took."""
    from immiscible.encoding.texts import TextToImageEncoder

    accelerator, found, model, optimizer, ema = parts(arguments)
    process, prediction_type = NoiseProcess.from_scheduler(found.scheduler), found.scheduler.config.prediction_type
    objective = DenoisingObjective(
        process.to(accelerator.device),
        timestep_sampler("uniform", process),
        AssignmentCoupling() if assignment else IndependentCoupling(),
        loss_weights("none", process, prediction_type).float().to(accelerator.device),
        prediction_type,
    )
    for stats in train(
        accelerator, model, optimizer, objective, batches(arguments), TextToImageEncoder(found, accelerator.device),
        batch_size=arguments.batch, seed=0, start_step=0, max_steps=10**9,
        learning_rate=lambda step: RATE, max_grad_norm=1.0, ema=ema, stop=StopRequest(),
    ):  # fmt: skip
        yield stats.metrics["coupling_seconds"]


def plain_steps(arguments: argparse.Namespace) -> Iterator[float]:
    """The diffusers example's step, with its two transfers of a number to the host."""
    from diffusers.optimization import get_scheduler

    accelerator, found, model, optimizer, ema = parts(arguments)
    vae, scheduler, device = found.vae, found.scheduler, accelerator.device
    rate = accelerator.prepare(get_scheduler("constant", optimizer))
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    for images, _, captions in batches(arguments):
        words = found.tokenizer(
            captions, max_length=found.tokenizer.model_max_length, padding="max_length", truncation=True, return_tensors="pt"
        ).input_ids.to(device)
        with accelerator.accumulate(model):
            latents = vae.encode(images.to(device, vae.dtype)).latent_dist.sample() * vae.config.scaling_factor
            noise = torch.randn_like(latents)
            timesteps = torch.randint(0, scheduler.config.num_train_timesteps, (len(latents),), device=device).long()
            noisy = scheduler.add_noise(latents, noise, timesteps)
            states = found.text_encoder(words, return_dict=False)[0]
            target = noise if scheduler.config.prediction_type == "epsilon" else scheduler.get_velocity(latents, noise, timesteps)
            output = model(noisy, timesteps, states, return_dict=False)[0]
            loss = torch.nn.functional.mse_loss(output.float(), target.float(), reduction="mean")
            accelerator.gather(loss.repeat(arguments.batch)).mean().item()
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            rate.step()
            optimizer.zero_grad()
        if ema is not None:
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


def ratios(rows: list[dict[str, tuple[float, float]]], name: str) -> str:
    """Median and quartiles of a loop's step, without its coupling, over the plain one beside it."""
    low, middle, high = statistics.quantiles([(row[name][0] - row[name][1]) / row["plain"][0] for row in rows], n=4)
    return f"{middle:9.4f} ({low:.3f} to {high:.3f})"


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrained_model_name_or_path", required=True)
    parser.add_argument("--channels", type=int, nargs="+", help="another width of each level of the U-Net, with random weights")
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--resolution", type=int, default=64)
    parser.add_argument("--mixed_precision", choices=("no", "fp16", "bf16"), default="no")
    parser.add_argument("--use_lora", action="store_true")
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
        order = [*list(loops)[turn % 3 :], *list(loops)[: turn % 3]]  # so that no loop follows itself, its weights still in the cache
        rows.append({name: timed(loops[name], device) for name in order})
    plain = statistics.median(row["plain"][0] for row in rows)
    where = processor(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    kind = "adapters" if arguments.use_lora else "full"
    print(
        f"{kind}, {arguments.mixed_precision}, batch {arguments.batch}, {arguments.resolution}x{arguments.resolution}, "
        f"{where}, median (quartiles) of {arguments.pairs} interleaved pairs"
    )
    print(f"plain diffusers + accelerate      {1000 * plain:9.1f} ms a step")
    print(f"here, independent noise           {ratios(rows, 'independent')} x plain  (target: at most 1.03)")
    apart = statistics.median(row["assignment"][1] for row in rows)
    print(f"here, assignment, without solving {ratios(rows, 'assignment')} x plain  (target: at most 1.03); solving {1000 * apart:.2f} ms")
    print(f"peak memory, plain                {memory['plain']:9.1f} MiB")
    for name in ("independent", "assignment"):
        more = memory[name] - memory["plain"]
        print(f"peak memory, {name:<21}{memory[name] / memory['plain']:9.4f} x plain  (target: at most 1.02), {more:+.1f} MiB")


if __name__ == "__main__":
    sys.exit(run_script(main))
