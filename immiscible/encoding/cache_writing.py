"""Fills a cache of latents and text states."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from immiscible.data.batches import BadImage, ImageDataset, check_batch
from immiscible.data.loading import build_loader
from immiscible.data.sources import ImageSource, Subset, TableImages
from immiscible.data.transforms import image_transform
from immiscible.encoding.cache import (
    INDEX,
    MANIFEST,
    _differences,
    _precision,
    _read_manifest,
    _vae,
    cache_settings,
    caption_digest,
    image_sizes,
    shard_name,
)
from immiscible.encoding.encoders import LatentEncoder
from immiscible.encoding.texts import TextToImageEncoder
from immiscible.errors import UserError
from immiscible.files import PARTIAL, clean_up
from immiscible.networks.latents import latent_downsampling
from immiscible.networks.stable_diffusion import StableDiffusion, place_frozen, text_states
from immiscible.networks.weights import PRECISIONS
from immiscible.processes import on_every_process, on_main_process
from immiscible.training import checkpoints

if TYPE_CHECKING:
    from accelerate import Accelerator
    from diffusers import AutoencoderKL

    from immiscible.configs import AnyConfig
    from immiscible.networks.stable_diffusion import StableDiffusion

    Parts: TypeAlias = StableDiffusion | AutoencoderKL


logger = logging.getLogger(__name__)


LOCK = ".lock"


NAMES_THE_MODEL = ("pretrained_model_name_or_path", "vae_model_name_or_path", "revision", "variant")


NOTES = "immiscible"  # a shard's one key of metadata: safetensors writes several in an order of its own


@dataclass(frozen=True)
class CacheSummary:
    """What was made.

    Args:
        images: rows of latents.
        captions: rows of texts.
        bad: the images that could not be read.
        bytes: of all files.
        kept: shards that were there already, and checked.
        made: shards made now, over all processes.
    """

    images: int
    captions: int
    bad: list[BadImage]
    bytes: int
    kept: int
    made: int


def write_cache(
    config: AnyConfig,
    parts: Parts,
    source: ImageSource,
    accelerator: Accelerator,
    *,
    batch_size: int,
    rows_per_shard: int,
) -> CacheSummary:
    """Fills ``--latent_cache_dir``; every rank calls it and makes each W-th shard. What is there already is checked by its hash and kept.

    Args:
        config: the flags of the runs that shall use it; with ``random_flip`` mirror images are encoded too.
        parts: as loaded.
        source: the images.
        accelerator: VAE and text encoder work on its device and in its precision.
        batch_size: images or captions encoded together.
        rows_per_shard: images or captions of a file.

    Raises:
        UserError: the folder holds something else or a cache of other settings, the disk is too small, or an image or a caption cannot
            be read and ``skip_bad_images`` is off; on every rank.
    """
    from accelerate.utils import gather_object

    folder = Path(str(config.latent_cache_dir))
    settings = cache_settings(config, parts, source)
    encoder = _encoder(parts, accelerator)
    manifest = {
        "settings": settings,
        "rows_per_shard": rows_per_shard,
        "model": {name: getattr(config, name) for name in NAMES_THE_MODEL if hasattr(config, name)},
        "precision": _precision(accelerator.mixed_precision),
        "images": len(source),
        "files": {},
    }
    sizes = image_sizes(source)
    images = _ImageShards(config, _vae(parts), encoder, source, accelerator, batch_size, rows_per_shard)
    jobs: list[tuple[str, Sequence[Any], Shards]] = [("latents", sizes.tolist(), images)]
    needed, described = len(source) * images.row_bytes, f"{len(source):,} images x {images.row_bytes / 2**10:.1f} KiB"
    captions: list[str] = []
    if isinstance(parts, StableDiffusion):
        captions = distinct_captions(source, config, accelerator)
        texts = _TextShards(parts, captions, accelerator, batch_size, rows_per_shard)
        jobs.append(("texts", captions, texts))
        needed += len(captions) * texts.row_bytes
        described += f" and {len(captions):,} captions x {texts.row_bytes / 2**10:.1f} KiB"
    logger.info("%s: %s MiB in %s", described, f"{needed / 2**20:,.1f}", folder)

    def unseal() -> None:
        _write_manifest(folder, manifest)

    def seal() -> None:
        digests = np.array([caption_digest(caption) for caption in captions], dtype=np.uint64)
        _save(save_arrays, {"digests": digests, "sizes": sizes}, folder / INDEX)
        listed = dict(sorted({**files, INDEX: _facts(folder / INDEX)}.items()))
        whole = json.dumps([settings, {name: facts["sha256"] for name, facts in listed.items()}])
        sealed = {
            **manifest,
            "captions": len(captions),
            "bad": dict(sorted(bad.items(), key=lambda item: int(item[0]))),
            "files": listed,
            "fingerprint": hashlib.sha256(whole.encode()).hexdigest()[:16],
        }
        _write_manifest(folder, sealed)

    with _filling(folder, manifest, needed, accelerator):
        writer = _Writer(folder, accelerator, rows_per_shard, (_read_manifest(folder) or {})["files"])
        missing = [writer.missing(kind, rows) for kind, rows, _ in jobs]
        if any(map(any, gather_object([list(map(len, missing))]))):
            on_main_process(accelerator, unseal)  # from here on until the end the files are not those that a manifest has listed
        for (kind, rows, shards), numbers in zip(jobs, missing, strict=True):
            writer.make(kind, rows, numbers, shards)
        files: dict[str, Any] = dict(pair for part in gather_object([writer.files]) for pair in part.items())
        bad = dict(pair for part in gather_object([writer.bad]) for pair in part.items())
        on_main_process(accelerator, seal)
    kept, made = (sum(gather_object([count])) for count in (writer.kept, writer.made))
    named = [BadImage(source.name(int(index)), reason) for index, reason in bad.items()]
    return CacheSummary(len(source), len(captions), named, sum(facts["bytes"] for facts in files.values()), kept, made)


def _encoder(parts: Parts, accelerator: Accelerator) -> LatentEncoder | TextToImageEncoder:
    """What encodes in training, on the device."""
    precision = PRECISIONS[accelerator.mixed_precision]
    if isinstance(parts, StableDiffusion):
        place_frozen(parts, accelerator.device, precision)
        return TextToImageEncoder(parts, accelerator.device)
    return LatentEncoder(parts.to(accelerator.device), accelerator.device, precision=precision)


def distinct_captions(source: ImageSource, config: AnyConfig, accelerator: Accelerator) -> list[str]:
    """Every caption of the data once, and the empty one, in the order of their digests. Each rank looks through a share of the images.

    Raises:
        UserError: an image has none and ``skip_bad_images`` is off; on every rank.
    """
    from accelerate.utils import gather_object

    rank, processes = accelerator.process_index, accelerator.num_processes
    share = range(len(source) * rank // processes, len(source) * (rank + 1) // processes)
    own: set[str] = set()

    def collect() -> None:
        bar = tqdm(share, desc="captions", unit="image", delay=2, disable=None if accelerator.is_main_process else True)
        for index, found in zip(bar, _captions(source, share), strict=True):
            if not isinstance(found, Exception):
                own.update(found)
            elif not config.skip_bad_images:
                reason = f"{found}; remove it or pass --skip_bad_images"
                raise UserError(f"cannot read a caption of {source.name(index)}: {reason}", exit_code=1)

    on_every_process(accelerator, collect)
    captions = sorted({""}.union(*gather_object([own])), key=caption_digest)
    for one, other in pairwise(captions):
        if caption_digest(one) == caption_digest(other):
            raise UserError(f"the captions {one!r} and {other!r} have one digest; change one", exit_code=1)
    return captions


def _captions(source: ImageSource, rows: range) -> Iterator[Sequence[str] | Exception]:
    """Those of each image, or what is wrong with them."""
    if isinstance(source, TableImages):
        yield from source.all_captions(rows)
        return
    for row in rows:
        try:
            yield source.captions(row)
        except Exception as error:  # as in `ImageDataset`: whatever a source raises makes that image a bad one
            yield error


@contextmanager
def _filling(folder: Path, manifest: dict[str, Any], needed: int, accelerator: Accelerator) -> Iterator[None]:
    """Prepares the folder and keeps other calls out of it meanwhile."""
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        on_main_process(accelerator, lambda: _prepare(folder, manifest, needed, lock))
        yield
    finally:
        lock.release()


def _prepare(folder: Path, manifest: dict[str, Any], needed: int, lock: FileLock) -> None:
    """Creates the folder, or finds there what a cache with these settings has left; takes the lock.

    Raises:
        UserError: something else is there, another call is at work there, or the disk is too small.
    """
    held = _read_manifest(folder)
    if held is None and folder.exists() and (not folder.is_dir() or any(map(_is_foreign, folder.iterdir()))):
        raise UserError(f"--latent_cache_dir {folder} holds something else; give another folder")
    if held is not None:
        differences = _differences(held["settings"], manifest["settings"])
        for name in ("rows_per_shard", "precision", "flips"):
            values = [{**each["settings"], **each}.get(name) for each in (held, manifest)]
            if values[0] != values[1]:
                differences.append(f"{name.replace('_', ' ')} was {values[0]} and is {values[1]}")
        if differences:
            raise UserError(f"--latent_cache_dir {folder} holds another cache: {'; '.join(differences)}; give another folder or delete it")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(f"--latent_cache_dir {folder} is being filled by another call; wait for its end", exit_code=1) from None
    clean_up(folder)
    there = sum(path.stat().st_size for path in folder.iterdir())
    free = shutil.disk_usage(folder).free
    if needed - there > free:
        raise UserError(
            f"--latent_cache_dir {folder}: {(needed - there) / 2**30:.1f} GiB are needed and {free / 2**30:.1f} GiB free", exit_code=1
        )
    if held is None:
        _write_manifest(folder, manifest)


def _is_foreign(path: Path) -> bool:
    """Whether it is not what a call leaves that was killed before it wrote a manifest."""
    return path.name != LOCK and not path.name.startswith(PARTIAL)


def _save(save: Callable[..., None], tensors: Mapping[str, Any], path: Path, **options: Any) -> None:
    """By safetensors under another name, then renamed; what fails is an `OSError`."""
    new = path.with_name(f"{PARTIAL}{path.name}")
    try:
        save(tensors, new, **options)
    except SafetensorError as error:  # of a full disk too
        raise OSError(errno.EIO, str(error), str(path)) from None
    checkpoints.replace(new, path)


def _write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    new = folder / f"{PARTIAL}{MANIFEST}"
    new.write_text(json.dumps(manifest, indent=1))
    checkpoints.replace(new, folder / MANIFEST)


def _facts(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


Shard = tuple[dict[str, Tensor], dict[str, str]]  # tensors, and the index and reason of each image that could not be read


Shards = Callable[[Sequence[int], Callable[[int], object]], Iterator[Shard]]  # of the shards with these numbers; tells the rows done


class _Writer:
    """Writes this rank's shards of a kind in rounds, after each of which the ranks learn of failures."""

    def __init__(self, folder: Path, accelerator: Accelerator, rows_per_shard: int, recorded: Mapping[str, Any]) -> None:
        self._folder, self._accelerator, self._rows, self._recorded = folder, accelerator, rows_per_shard, recorded
        self.files: dict[str, Any] = {}
        self.bad: dict[str, str] = {}
        self.kept = self.made = 0

    def missing(self, kind: str, rows: Sequence[Any]) -> list[int]:
        """Which of this rank's shards are not there, sound and made of these rows: sizes of images, or captions."""
        mine = range(self._accelerator.process_index, -(-len(rows) // self._rows), self._accelerator.num_processes)
        bar = tqdm(mine, desc=f"checking {kind}", unit="shard", delay=2, leave=False, disable=self._show)
        return [number for number in bar if not self._keep(shard_name(kind, number), self._digest(rows, number))]

    def make(self, kind: str, rows: Sequence[Any], missing: Sequence[int], shards: Shards) -> None:
        """Makes what is missing."""
        from accelerate.utils import gather_object

        turns = max(gather_object([len(missing)]))
        own = sum(min(self._rows, len(rows) - number * self._rows) for number in missing)
        processes = self._accelerator.num_processes
        of = f" (the first of {processes} processes)" if processes > 1 else ""
        with tqdm(total=own, desc=f"{kind}{of}", disable=self._show) as bar:
            made = shards(missing, bar.update)

            def make(turn: int) -> None:
                if turn < len(missing):
                    self._make(shard_name(kind, missing[turn]), next(made), self._digest(rows, missing[turn]))

            for turn in range(turns):
                on_every_process(self._accelerator, partial(make, turn))

    @property
    def _show(self) -> bool | None:
        """tqdm's ``disable``."""
        return None if self._accelerator.is_main_process else True

    def _digest(self, rows: Sequence[Any], number: int) -> str:
        """Of the rows of a shard."""
        own = json.dumps(rows[number * self._rows : (number + 1) * self._rows])
        return hashlib.sha256(own.encode()).hexdigest()[:16]

    def _keep(self, name: str, digest: str) -> bool:
        """Whether the shard is there, sound and of these rows."""
        path = self._folder / name
        try:
            with safe_open(path, framework="numpy") as file:
                found = json.loads((file.metadata() or {})[NOTES])
        except (OSError, SafetensorError, KeyError, ValueError):
            return False
        facts = _facts(path)
        if self._recorded.get(name, facts) != facts or found.get("rows") != digest:
            logger.warning("%s is damaged, or what it was made of has changed; making it anew", path)
            return False
        self.files[name] = facts
        self.bad |= found["bad"]
        self.kept += 1
        return True

    def _make(self, name: str, shard: Shard, digest: str) -> None:
        tensors, bad = shard
        if not all(tensor.isfinite().all() for tensor in tensors.values()):
            raise UserError(f"{name}: NaN, or too large for fp16; --mixed_precision no may help", exit_code=1)
        _save(save_file, tensors, self._folder / name, metadata={NOTES: json.dumps({"rows": digest, "bad": bad})})
        self.files[name] = _facts(self._folder / name)
        self.bad |= bad
        self.made += 1


class _ByNumber(Subset):
    """All images, named by their number: two may share a name."""

    def name(self, index: int) -> str:
        """The number."""
        return str(index)


@dataclass(frozen=True)
class _ImageShards:
    config: AnyConfig
    vae: AutoencoderKL
    encoder: LatentEncoder | TextToImageEncoder
    source: ImageSource
    accelerator: Accelerator
    batch_size: int
    rows_per_shard: int

    @property
    def shape(self) -> tuple[int, ...]:
        """[F, 2, C, h, w]: of the image and its mirror image, mean and log-variance."""
        side = self.config.resolution // latent_downsampling(self.vae)
        return 1 + self.config.random_flip, 2, self.vae.config.latent_channels, side, side

    @property
    def row_bytes(self) -> int:
        """Of an image."""
        return 2 * math.prod(self.shape)

    def __call__(self, numbers: Sequence[int], done: Callable[[int], object]) -> Iterator[Shard]:
        config = self.config
        transform = replace(image_transform(config, self.vae.config.in_channels, seed=0), random_flip=False)
        shards = [_batches(number, len(self.source), self.rows_per_shard, self.batch_size) for number in numbers]
        keys = ([(0, index) for index in rows] for batches in shards for rows in batches)
        dataset = ImageDataset(_ByNumber(self.source, range(len(self.source))), transform)
        loader = iter(build_loader(dataset, keys, config.dataloader_num_workers, self.accelerator.device))
        for batches in shards:
            moments: list[Tensor] = []
            bad: dict[str, str] = {}
            for rows in batches:
                batch = next(loader)
                found = {each.name: each.reason for each in batch["bad"]}
                if found and not config.skip_bad_images:
                    batch["bad"] = [BadImage(self.source.name(int(index)), reason) for index, reason in found.items()]
                    check_batch(batch, skip_bad_images=False)
                bad |= found
                good = torch.tensor([str(index) not in found for index in rows])
                moments.append(self._moments(batch["pixel_values"], good))
                done(len(rows))
            yield {"moments": torch.cat(moments)}, bad

    @torch.no_grad()
    def _moments(self, pixels: Tensor, good: Tensor) -> Tensor:
        """fp16 [n, F, 2, C, h, w] on the CPU; zeros where ``good`` [n] is not set, which has as many ones as ``pixels`` has rows."""
        moments = torch.zeros(len(good), *self.shape, dtype=torch.float16)
        if good.any():
            for flip in range(moments.shape[1]):
                found = torch.stack(self.encoder.posterior(pixels.flip(-1) if flip else pixels), 1)
                moments[good, flip] = found.to("cpu", torch.float16)
        return moments


@dataclass(frozen=True)
class _TextShards:
    parts: StableDiffusion
    captions: Sequence[str]
    accelerator: Accelerator
    batch_size: int
    rows_per_shard: int

    @property
    def row_bytes(self) -> int:
        """Of a caption: its states and their pooled one."""
        return 2 * self.parts.text_encoder.config.hidden_size * (self.parts.tokenizer.model_max_length + 1)

    @torch.no_grad()
    def __call__(self, numbers: Sequence[int], done: Callable[[int], object]) -> Iterator[Shard]:
        for number in numbers:
            parts = []
            for rows in _batches(number, len(self.captions), self.rows_per_shard, self.batch_size):
                encoded = text_states(self.parts, self.captions[rows.start : rows.stop], self.accelerator.device)
                parts.append([tensor.to("cpu", torch.float16) for tensor in encoded])
                done(len(rows))
            states, pooled = (torch.cat(column) for column in zip(*parts, strict=True))
            yield {"states": states, "pooled": pooled}, {}


def _batches(number: int, rows: int, rows_per_shard: int, batch_size: int) -> list[range]:
    """The rows of a shard, in batches."""
    shard = range(number * rows_per_shard, min((number + 1) * rows_per_shard, rows))
    return [shard[start : start + batch_size] for start in range(0, len(shard), batch_size)]
