#!/usr/bin/env python
"""What a step from cached latents costs against one that encodes its images and captions, beside what operation counts predict.

    python scripts/benchmark_cache.py
    python scripts/benchmark_cache.py --model sd_v1 --resolution 256 --batch 1 --pairs 3

The tiny model is that of make_tiny_sd.py; sd_v1 has the sizes of Stable Diffusion 1 and random weights (15 GB of memory, 9 with sgd).
Both loops train one U-Net in turns, without look-ahead, so that nothing hides behind anything. Reading is timed apart: rows from the
mapped files to what the coupling and the network get.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmark_device import synchronize
from make_tiny_sd import build_tokenizer, make_model
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from immiscible.configs import TextToImageConfig
from immiscible.data.batches import GlobalBatchOrder, ImageDataset
from immiscible.data.loading import build_loader, captioned_source, images_of
from immiscible.data.transforms import ImageTransform
from immiscible.encoding.cache import LatentCache
from immiscible.encoding.cache_manifest import MANIFEST
from immiscible.encoding.cache_writing import write_cache
from immiscible.encoding.texts import TextToImageEncoder
from immiscible.errors import run_script
from immiscible.flags import parse_config
from immiscible.method import build_objective
from immiscible.networks.checkpoint_parts import CheckpointParts
from immiscible.networks.families import load_checkpoint
from immiscible.networks.stable_diffusion import StableDiffusion
from immiscible.training.loop import StopRequest, train
from immiscible.training.session import session

SD_V1_UNET = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}  # the rest is UNet2DConditionModel's default
SD_V1_VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}
SD_V1_TEXT = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12, "projection_dim": 768}


def tiny(folder: Path, config: TextToImageConfig) -> CheckpointParts:
    make_model(folder)
    return load_checkpoint(config, resolution=config.resolution, cache_dir=config.cache_dir, from_scratch=True)


def sd_v1(folder: Path, config: TextToImageConfig) -> CheckpointParts:
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    tokenizer = build_tokenizer(pad_token="<|endoftext|>")
    tokens = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text_encoder = CLIPTextModel(CLIPTextConfig(**SD_V1_TEXT, **tokens))
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    vae, unet = AutoencoderKL(**SD_V1_VAE), UNet2DConditionModel(**SD_V1_UNET)
    for part in (vae, text_encoder):
        part.requires_grad_(False).eval()
    return StableDiffusion(
        network=unet,
        vae=vae,
        encoders={"text_encoder": text_encoder},
        tokenizers={"tokenizer": tokenizer},
        scheduler=scheduler,
        name="sd_v1",
        options={"revision": None, "variant": None},
    )


MODELS: dict[str, Callable[[Path, TextToImageConfig], CheckpointParts]] = {"tiny": tiny, "sd_v1": sd_v1}
OPTIMIZERS = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}


def write_images(folder: Path, count: int, resolution: int) -> None:
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (count, resolution, resolution, 3), dtype=np.uint8)
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{number:03}.png")
    rows = [json.dumps({"file_name": f"{number:03}.png", "text": f"picture number {number}"}) for number in range(count)]
    (folder / "metadata.jsonl").write_text("\n".join(rows))


def gigaflops(parts: CheckpointParts, resolution: int) -> dict[str, float]:
    """Of a forward pass for one image. Without memory, except for the text encoder, whose masks need numbers."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    side, found = resolution // 2 ** (len(parts.vae.config.block_out_channels) - 1), {}
    with torch.device("meta"):
        unet, vae = UNet2DConditionModel.from_config(parts.network.config), AutoencoderKL.from_config(parts.vae.config)
        states = torch.empty(1, parts.tokenizer.model_max_length, parts.network.config.cross_attention_dim)
        latent, image = torch.empty(1, 4, side, side), torch.empty(1, 3, resolution, resolution)
        time_ = torch.zeros(1, dtype=torch.int64)
    work = {
        "U-Net": lambda: unet(latent, time_, states),
        "VAE encoder": lambda: vae.encode(image),
        "text encoder": lambda: parts.texts(["a text"], torch.device("cpu")),
    }
    for name, forward in work.items():
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            forward()
        found[name] = counter.get_total_flops() / 1e9
    return found


class Timed:
    """Passes on what loading and encoding give, and adds up the seconds that they take."""

    def __init__(self, batches: Iterator[Any], encode: Callable[..., Any], device: torch.device) -> None:
        self._batches, self._encode, self.device, self.seconds = batches, encode, device, 0.0

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        return self._timed(lambda: next(self._batches))

    def encode(self, *words: Any) -> Any:
        """As the encoder."""
        return self._timed(lambda: self._encode(*words))

    def _timed(self, work: Callable[[], Any]) -> Any:
        synchronize(self.device)
        start = time.perf_counter()
        found = work()
        synchronize(self.device)
        self.seconds += time.perf_counter() - start
        return found


def timed(steps: Iterator[Any], reading: Timed) -> tuple[float, float]:
    """Seconds of a step, and of loading and encoding in it."""
    synchronize(reading.device)
    start, before = time.perf_counter(), reading.seconds
    next(steps)
    synchronize(reading.device)
    return time.perf_counter() - start, reading.seconds - before


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="tiny")
    parser.add_argument("--resolution", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=20, help="steps of each kind")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="adamw", help="sgd saves the memory of AdamW's states")
    parser.add_argument("--mixed_precision", choices=("no", "bf16"), default="no")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as root:
        compare(arguments, Path(root))


def compare(arguments: argparse.Namespace, root: Path) -> None:
    write_images(root / "images", 4 * arguments.batch, arguments.resolution)
    words = [
        *("--pretrained_model_name_or_path", str(root / "model"), "--train_data_dir", str(root / "images")),
        *("--cache_dir", str(root / "tables"), "--cache_latents", "--latent_cache_dir", str(root / "cache"), "--center_crop"),
        *("--resolution", str(arguments.resolution), "--report_to", "none", "--mixed_precision", arguments.mixed_precision),
    ]
    config = parse_config(TextToImageConfig, words, program="benchmark_cache.py", description="")
    with session(config) as accelerator:
        torch.manual_seed(0)
        parts, source = MODELS[arguments.model](root / "model", config), captioned_source(config, config.labels_for)
        counts = gigaflops(parts, arguments.resolution)
        folder, named = root / "cache", {"pretrained_model_name_or_path": config.pretrained_model_name_or_path}
        write_cache(folder, config, parts, source, accelerator, model=named, batch_size=arguments.batch, rows_per_shard=2048)
        cache = LatentCache(folder, json.loads((folder / MANIFEST).read_text()))
        parts.place_frozen(accelerator.device, parts.vae.dtype)
        parts.network.to(accelerator.device).train()
        objective = build_objective(config, parts.scheduler, accelerator)
        model, optimizer = accelerator.prepare(parts.network, OPTIMIZERS[arguments.optimizer](parts.network.parameters(), lr=1e-5))
        transform = ImageTransform(arguments.resolution, center_crop=True)
        encoder = TextToImageEncoder(parts, accelerator.device)
        order = GlobalBatchOrder(len(source), arguments.batch, seed=0, stop=10**9)

        def loop(images: Any, augment: ImageTransform, encode: Any) -> tuple[Iterator[Any], Timed]:
            loader = build_loader(ImageDataset(images, augment, with_captions=True), order, 0, accelerator.device)
            reading = Timed(images_of(loader, skip_bad_images=False), encode, accelerator.device)
            return train(
                accelerator, model, optimizer, objective, reading, reading.encode,
                batch_size=arguments.batch, seed=0, start_step=0, max_steps=10**9,
                learning_rate=lambda step: 1e-5, max_grad_norm=1.0, ema=None, stop=StopRequest(),
            ), reading  # fmt: skip

        loops = {
            "uncached": loop(source, transform, encoder),
            "cached": loop(cache.images(source), cache.transform(transform), cache.encoder(encoder)),
        }
        for each in loops.values():
            timed(*each)  # first steps allocate
        rows = []
        for turn in tqdm(range(arguments.pairs), desc="pairs", leave=False):
            rows.append({name: timed(*loops[name]) for name in (loops if turn % 2 else reversed(loops))})
        report(arguments, rows, counts)


def report(arguments: argparse.Namespace, rows: list[dict[str, tuple[float, float]]], counts: dict[str, float]) -> None:
    middle = {name: [statistics.median(row[name][which] for row in rows) for which in (0, 1)] for name in rows[0]}
    ratio = statistics.median(row["uncached"][0] / row["cached"][0] for row in rows)
    share = statistics.median(row["cached"][1] / row["cached"][0] for row in rows)
    step = 3 * counts["U-Net"]
    predicted = (step + counts["VAE encoder"] + counts["text encoder"]) / step
    print(
        f"{arguments.model}, batch {arguments.batch}, {arguments.resolution}x{arguments.resolution}, {torch.get_num_threads()} threads, "
        f"precision {arguments.mixed_precision}, {arguments.optimizer}, median of {arguments.pairs} interleaved pairs"
    )
    for name, (seconds, reading) in middle.items():
        print(f"{name:<9}{1000 * seconds:10.1f} ms a step, of which loading and encoding {1000 * reading:10.2f} ms")
    print(f"uncached / cached    {ratio:6.3f} measured, {predicted:6.3f} by operation counts (a step is three forward passes of the U-Net)")
    print(f"reading the cache    {100 * share:6.2f} % of a cached step (target: below 2 %)")
    print("GFLOP an image:      " + ", ".join(f"{name} {count:.3g}" for name, count in counts.items()))


if __name__ == "__main__":
    sys.exit(run_script(main))
