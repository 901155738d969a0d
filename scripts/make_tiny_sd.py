#!/usr/bin/env python
"""Builds a tiny but complete Stable Diffusion checkpoint and two data sets for it, offline, from installed photographs.

python scripts/make_tiny_sd.py runs/tiny_sd

``model``     what `diffusers.StableDiffusionPipeline.from_pretrained` loads, five megabytes, for images of 64x64 and latents of 4x8x8;
              by ``--version 3`` or ``3.5`` what `StableDiffusion3Pipeline` loads, of 16x8x8, with all three text encoders.
              The VAE is trained here, briefly, on crops of photographs and images of the classes, so that its latents say what is in an
              image, if not how it looks in detail. The U-Net is untrained. So is the text model: frozen random features tell captions
              apart, but know no meaning.
``captions``  an image folder: 256 crops of 64x64 and what can be truly said of each. Column ``text`` has one caption; ``captions`` a
              list of one or three (`datasets` takes strings or lists in one column, not both).
``classes``   a parquet file: two JPEG images of 64x64 in each of 1,000 classes, which are a photograph, a part of it, and a tint. As in
              ImageNet, two pairs of classes share their first name, up to the comma: crane (134 and 517) and maillot (638 and 639).
              Whole names must differ, or `datasets` does not read the file.

The same machine writes the same bytes every time; with other processors or library versions the last digits of the VAE may differ.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageColor
from torch import Tensor
from tqdm import tqdm

from immiscible.data.bundled import PHOTOGRAPHS, PhotoCrops
from immiscible.data.sources import open_image
from immiscible.data.transforms import ImageTransform
from immiscible.errors import UserError, run_script
from immiscible.randomness import derive_seed, seeded_generator

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, DiffusionPipeline
    from transformers import CLIPTokenizer

RESOLUTION = 64
VAE_STEPS = 800  # 19 dB in half a minute
TRAIN_CROPS, HELD_OUT_CROPS = 1500, 128
SEAL = ".make_tiny_sd"  # in each folder written here: what the rest of it hashes to

SUBJECTS = {  # of the photographs, by the file's name
    "astronaut": "an astronaut",
    "chelsea": "a cat",
    "coffee": "a coffee cup",
    "hubble_deep_field": "galaxies",
    "ihc": "a tissue",
    "motorcycle_left": "a motorcycle",
    "motorcycle_right": "a motorcycle",
    "retina": "a retina",
    "rocket": "a rocket",
    "china": "a palace",
    "flower": "a flower",
}
HUES = ("red", "orange", "yellow", "green", "jade", "cyan", "blue", "indigo", "purple", "pink")  # evenly around the color wheel
BRIGHTNESS = ("dark", "moderately bright", "bright")  # thirds of the mean luminance
SHOTS = ("close", "medium", "wide")  # thirds of the crop's side, as a share of the photograph's short side
CAPTIONED_IMAGES = 256
SMALLEST_SHARE = 0.25  # of the short side

PARTS = {"widest": 0.9, "wide": 0.7, "medium": 0.5, "close": 0.35, "closest": 0.25}  # name -> share of the photograph's short side
SIDES = ("left", "right")
TWINS = {134: "crane", 517: "crane, machine", 638: "maillot", 639: "maillot, tank suit"}  # numbered as in ImageNet
IMAGES_PER_CLASS = 2


def make_model(folder: Path, version: int | str = 1, vae_steps: int = 0, *, with_t5: bool = True) -> float:
    """Writes the checkpoint and returns the VAE's PSNR in dB, the mean over crops that it was not trained on.

    Args:
        folder: for the pipeline.
        version: the layout of Stable Diffusion 1 (predicts epsilon) or 2 (predicts v; linear projections, heads per block, the text
            model's own size and activation, padding with ``!``), or "xl", "3" or "3.5".
        vae_steps: optimizer steps of the VAE's training; with 0 its latents are noise.
        with_t5: of "3" and "3.5".
    """
    from tiny_sd1 import sd1_pipeline, sd1_vae
    from tiny_sd3 import VERSIONS, sd3_pipeline
    from tiny_sdxl import sdxl_pipeline

    with _seeded("make_tiny_sd", version), _one_thread():
        pipeline: DiffusionPipeline
        if version in VERSIONS:
            pipeline = sd3_pipeline(build_tokenizer, _captions(), str(version), sample_size=RESOLUTION, with_t5=with_t5)
        elif version == "xl":
            pipeline = sdxl_pipeline(sd1_vae(RESOLUTION), build_tokenizer)
        else:
            pipeline = sd1_pipeline(build_tokenizer, int(version), sample_size=RESOLUTION)
        psnr = _settle_vae(pipeline.vae, vae_steps)
        pipeline.save_pretrained(folder)
    return psnr


def _settle_vae(vae: AutoencoderKL, steps: int) -> float:
    """Trains a VAE and gives its latents unit variance by its scaling factor; returns its PSNR in dB on other crops."""
    transform, crops = ImageTransform(RESOLUTION), PhotoCrops(RESOLUTION)
    held_out = torch.stack([transform(crops.load(i), 0, i) for i in range(HELD_OUT_CROPS)])  # [128,3,64,64]
    if steps:
        images = [crops.load(HELD_OUT_CROPS + i) for i in range(TRAIN_CROPS)] + [class_image(label, 0) for label in range(0, 1000, 2)]
        train_vae(vae, torch.stack([transform(image, 0, i) for i, image in enumerate(images)]), steps)
    with torch.no_grad():
        latents = vae.encode(held_out).latent_dist.mode()  # [128,4,8,8], or sixteen channels of Stable Diffusion 3
        psnr = 10 * torch.log10(4 / (vae.decode(latents).sample.clamp(-1, 1) - held_out).square().mean((1, 2, 3))).mean().item()
    if vae.config.shift_factor is not None:
        vae.register_to_config(shift_factor=latents.mean().item())
    vae.register_to_config(scaling_factor=1 / latents.std().item())
    return float(psnr)


def build_tokenizer(pad_token: str) -> CLIPTokenizer:
    """CLIP's tokenizer with a vocabulary of the words in the captions and class names; other words are spelled out in bytes.

    As in CLIP, ``!`` is token 0, and the last two are the start and the end of a text.
    """
    from tokenizers import pre_tokenizers
    from transformers import CLIPTokenizer

    merges = _merges()
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())  # one for each byte
    words = [*letters, *(f"{letter}</w>" for letter in letters), *map("".join, merges), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer({word: i for i, word in enumerate(words)}, merges, pad_token=pad_token, model_max_length=77)


@cache
def _merges() -> list[tuple[str, str]]:
    return _learn_merges(Counter(word for text in [*_captions(), *class_names()] for word in re.findall(r"[a-z]+|[^\sa-z]+", text)))


def _captions() -> list[str]:
    return [caption for image in range(CAPTIONED_IMAGES) for caption in captioned_image(image)[1]]


def _learn_merges(words: Mapping[str, int]) -> list[tuple[str, str]]:
    """Byte-pair encoding (Sennrich et al. 2016, algorithm 1) of words and their counts until each word is one token.

    `tokenizers` has it too, but breaks ties differently in every process.
    """
    spelled = {word: [*word[:-1], f"{word[-1]}</w>"] for word in words}
    merges = []
    while pairs := Counter({pair: 0 for pieces in spelled.values() for pair in pairwise(pieces)}):
        for word, pieces in spelled.items():
            for pair in pairwise(pieces):
                pairs[pair] += words[word]
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        for pieces in spelled.values():
            for i in reversed(range(len(pieces) - 1)):
                if tuple(pieces[i : i + 2]) == best:
                    pieces[i : i + 2] = ["".join(best)]
    return merges


def train_vae(vae: AutoencoderKL, images: Tensor, steps: int) -> None:
    """Trains ``vae`` in place on ``images`` [N,3,H,W]: squared error, and the KL divergence weighted as in Stable Diffusion.

    For a good result in little time, steps see 16 quarters of images at first and 4 whole images later, which costs the same, and an
    error of color counts five times an error of gray, or the few colors that photographs are made of would be all that it learns.
    """
    height, width = images.shape[-2:]
    generator = seeded_generator("make_tiny_sd", "vae")
    optimizer = torch.optim.Adam(vae.parameters(), lr=0.002, betas=(0.9, 0.95))
    warmup = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / warmup, 1 - step / steps))
    vae.train()
    for step in tqdm(range(steps), desc="VAE", unit="step", delay=2, leave=False, disable=None):
        count, part = (16, 2) if step < 0.6 * steps else (4, 1)
        chosen = torch.randint(len(images), (count,), generator=generator)
        top, left = (int(torch.randint(side - side // part + 1, (), generator=generator)) for side in (height, width))
        x = images[chosen, :, top : top + height // part, left : left + width // part]  # [16,3,H/2,W/2] or [4,3,H,W]
        posterior = vae.encode(x).latent_dist
        error = vae.decode(posterior.sample(generator)).sample - x
        color = error - error.mean(1, keepdim=True)
        loss = error.square().mean() + 4 * color.square().mean() + 1e-6 * posterior.kl().mean() / x[0].numel()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 0.5)
        optimizer.step()
        schedule.step()
    vae.eval()


def make_captions(folder: Path) -> None:
    """Writes the captioned image folder: PNG files and ``metadata.jsonl``."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for i in tqdm(range(CAPTIONED_IMAGES), desc="captions", unit="image", delay=2, leave=False, disable=None):
        image, captions = captioned_image(i)
        image.save(folder / f"{i:03}.png")
        rows.append({"file_name": f"{i:03}.png", "text": captions[0], "captions": captions if i % 4 == 0 else captions[:1]})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def captioned_image(index: int) -> tuple[Image.Image, list[str]]:
    """Image ``index`` of the captioned ones and three captions: all that is known of it, its subject, its look."""
    names = _photograph_names()
    which = index % len(names)
    share = SMALLEST_SHARE + (1 - SMALLEST_SHARE) * _unit("captions", index, "share")
    image = _crop(photographs()[which], share, _unit("captions", index, "left"), _unit("captions", index, "top"))
    subject, color = SUBJECTS[names[which]], dominant_color(image)
    shot = SHOTS[min(int(3 * (share - SMALLEST_SHARE) / (1 - SMALLEST_SHARE)), 2)]
    brightness = BRIGHTNESS[int(3 * np.asarray(image.convert("L")).mean() / 256)]
    look = f"{brightness}, mostly {color}"
    source = f"a {shot} crop of the photograph of {subject}"
    return image, [f"{source}, {look}", source, f"a picture, {look}"]


def dominant_color(image: Image.Image) -> str:
    """The name that most pixels of an RGB image have: black, white, gray or one of `HUES`."""
    hue, saturation, value = np.asarray(image.convert("HSV")).astype(int).reshape(-1, 3).T
    names = np.array(HUES)[np.round(hue / 256 * len(HUES)).astype(int) % len(HUES)]
    names = np.where(saturation < 50, np.where(value > 200, "white", "gray"), names)
    names = np.where(value < 50, "black", names)
    return Counter(names.tolist()).most_common(1)[0][0]


def make_classes(folder: Path) -> None:
    """Writes the class-labeled parquet file: columns ``image`` and ``label``, a `datasets.ClassLabel`."""
    from datasets import ClassLabel, Dataset, Features
    from datasets import Image as ImageFeature

    folder.mkdir(parents=True, exist_ok=True)
    names = class_names()
    labels = [label for _ in range(IMAGES_PER_CLASS) for label in range(len(names))]
    images = []
    for i, label in enumerate(tqdm(labels, desc="classes", unit="image", delay=2, leave=False, disable=None)):
        file = io.BytesIO()
        class_image(label, i // len(names)).save(file, "JPEG", quality=90)
        images.append({"bytes": file.getvalue(), "path": None})
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=names)})
    Dataset.from_dict({"image": images, "label": labels}, features).to_parquet(folder / "train-00000-of-00001.parquet")


def class_names() -> list[str]:
    """The 1,000 names by number, true of the images but for the four of `TWINS`."""
    names = []
    for label in range(len(_class_photographs()) * len(HUES) * len(PARTS) * len(SIDES)):
        photograph, tint, part, side = _class_of(label)
        subject = SUBJECTS[photograph].removeprefix("a ").removeprefix("an ")
        names.append(TWINS.get(label, f"{HUES[tint]} {subject} {part} {side}"))
    return names


def class_image(label: int, copy: int) -> Image.Image:
    """Image number ``copy`` of a class; two of a class differ in where exactly the crop lies."""
    photograph, tint, part, side = _class_of(label)
    left, top = (0.2 * _unit("classes", label, copy, what) for what in ("left", "top"))
    image = _crop(
        photographs()[_photograph_names().index(photograph)],
        PARTS[part],
        left + (0.8 if side == "right" else 0),
        top + 0.4,
    )
    color = Image.new("RGB", image.size, ImageColor.getrgb(f"hsv({360 * tint // len(HUES)},100%,100%)"))
    return Image.blend(image, color, 0.4)


def _class_of(label: int) -> tuple[str, int, str, str]:
    """The photograph's name, the number of the tint, the part and the side."""
    rest, side = divmod(label, len(SIDES))
    rest, part = divmod(rest, len(PARTS))
    photograph, tint = divmod(rest, len(HUES))
    return _class_photographs()[photograph], tint, list(PARTS)[part], SIDES[side]


@cache
def photographs() -> list[Image.Image]:
    """What scikit-image and scikit-learn install, RGB, in the order of `PHOTOGRAPHS`."""
    return [open_image(files(package) / path).convert("RGB") for package, paths in PHOTOGRAPHS.items() for path in paths]


def _photograph_names() -> list[str]:
    return [Path(path).stem for paths in PHOTOGRAPHS.values() for path in paths]


def _class_photographs() -> list[str]:
    """Ten of the eleven: the two of the motorcycle are what its two eyes see."""
    return [name for name in _photograph_names() if name != "motorcycle_right"]


def _crop(photograph: Image.Image, share: float, left: float, top: float) -> Image.Image:
    """A square of ``share`` of the photograph's short side, at ``left`` and ``top`` of the room that is left (0 to 1), at 64x64."""
    side = round(share * min(photograph.size))
    x, y = round(left * (photograph.width - side)), round(top * (photograph.height - side))
    return photograph.resize((RESOLUTION, RESOLUTION), Image.Resampling.BOX, (x, y, x + side, y + side))


def _unit(*parts: int | str) -> float:
    """A number in [0, 1) that is a function of ``parts``."""
    return derive_seed("make_tiny_sd", *parts) / 2**63


@contextmanager
def _seeded(*parts: int | str) -> Iterator[None]:
    """The global generator on the CPU, from which new weights are drawn, seeded inside and as it was after."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(*parts))
        yield


@contextmanager
def _one_thread() -> Iterator[None]:
    """Sums over several threads are rounded in another order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def content_hash(folder: Path) -> str:
    """Of the names and bytes of all files in ``folder`` but the seal."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != SEAL)
    digest = hashlib.blake2b(digest_size=16)
    for path in files:
        content = path.read_bytes()
        digest.update(f"{path.relative_to(folder).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def _is_own(folder: Path) -> bool:
    """Whether all that is in ``folder`` was written here."""
    seal = folder / SEAL
    return seal.is_file() and seal.read_text() == content_hash(folder)


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output_folder", type=Path, help="gets the folders model, captions and classes")
    parser.add_argument("--version", choices=("1", "2", "xl", "3", "3.5"), default="1", help="the layout of which Stable Diffusion")
    parser.add_argument("--without_t5", action="store_true", help="of version 3 and 3.5: leave the third text encoder out")
    parser.add_argument("--vae_steps", type=int, default=VAE_STEPS, help="optimizer steps of the VAE's training")
    parser.add_argument("--what", nargs="+", choices=("model", "captions", "classes"), default=["model", "captions", "classes"])
    arguments = parser.parse_args(argv)
    if arguments.vae_steps < 0:
        raise UserError(f"--vae_steps must be at least 0, not {arguments.vae_steps}")
    for name in arguments.what:
        target = arguments.output_folder / name
        if os.path.lexists(target) and not _is_own(target):
            raise UserError(f"{target} is there and is not what this script wrote; remove it or choose another folder")

    import datasets
    from transformers.utils import logging

    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # it warns of image processors that this pipeline does not use

    def model(folder: Path) -> str:
        version = int(arguments.version) if arguments.version in ("1", "2") else arguments.version
        psnr = make_model(folder, version, arguments.vae_steps, **({"with_t5": False} if arguments.without_t5 else {}))
        return f"Stable Diffusion {arguments.version}, VAE of {psnr:.1f} dB after {arguments.vae_steps} steps"

    def captions(folder: Path) -> str:
        make_captions(folder)
        return f"{CAPTIONED_IMAGES} captioned images"

    def classes(folder: Path) -> str:
        make_classes(folder)
        return f"{IMAGES_PER_CLASS} images in each of {len(class_names())} classes"

    writers = {"model": model, "captions": captions, "classes": classes}
    for name in dict.fromkeys(arguments.what):
        start = time.perf_counter()
        target = arguments.output_folder / name
        try:
            arguments.output_folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=arguments.output_folder, prefix=".unfinished-") as unfinished:
                new = Path(unfinished) / name
                summary = writers[name](new)
                size = sum(path.stat().st_size for path in new.rglob("*"))
                (new / SEAL).write_text(content_hash(new))
                if target.exists():
                    shutil.rmtree(target)
                new.rename(target)
        except OSError as error:
            raise UserError(f"cannot write {target}: {error.strerror or error}", exit_code=1) from error
        print(f"{target}: {summary}; {size / 1e6:.1f} MB, {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    sys.exit(run_script(main))
