"""Fills a cache of latents and text states: which files are there and sound, which are to be made, and the manifest that seals them."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from dataclasses import replace as replace_of
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import save_file
from tqdm import tqdm

from immiscible.data.arguments import ImageArguments, TextDataArguments
from immiscible.data.batches import BadImage
from immiscible.data.buckets import Buckets
from immiscible.data.image_sizes import encoded_bytes, image_shapes
from immiscible.data.sources import ImageSource
from immiscible.encoding.cache import buckets_of, cache_settings, caption_digest, precision_name, vae_of
from immiscible.encoding.cache_manifest import INDEX, MANIFEST, fingerprint, read_manifest, settings_that_differ, shard_name
from immiscible.encoding.cache_shards import ImageShards, Shard, TextShards, distinct_captions
from immiscible.encoding.captions import AS_THEY_ARE, CaptionRules
from immiscible.encoding.encoders import LatentEncoder
from immiscible.encoding.texts import TextToImageEncoder
from immiscible.errors import UserError
from immiscible.files import PARTIAL, clean_up, file_facts, replace
from immiscible.networks.checkpoint_parts import CheckpointParts
from immiscible.networks.weights import PRECISIONS
from immiscible.processes import from_main_process, on_every_process, on_main_process

if TYPE_CHECKING:
    from accelerate import Accelerator
    from diffusers import AutoencoderKL

    Parts: TypeAlias = CheckpointParts | AutoencoderKL

logger = logging.getLogger(__name__)

LOCK = ".lock"
NOTES = "immiscible"  # a shard's one key of metadata: safetensors writes several in an order of its own


@dataclass(frozen=True)
class CacheSummary:
    """What was made.

    Args:
        images: rows of latents.
        captions: rows of texts.
        bad: the images that could not be read.
        transparent: images with transparent pixels, below which ``alpha_color`` lies.
        bytes: of all files.
        kept: shards that were there already, and checked.
        made: shards made now, over all processes.
    """

    images: int
    captions: int
    bad: list[BadImage]
    transparent: int
    bytes: int
    kept: int
    made: int


@dataclass(frozen=True)
class _Kind:
    """The shards of one kind.

    Args:
        name: in their names, ``latents`` or ``texts``.
        what: they are of, images or captions.
        rows: what tells each row's image or caption from an edited one: the bytes of an image, with its number where it may change its
            row, or the caption.
        shards: make the tensors.
    """

    name: str
    what: str
    rows: Sequence[Any]
    shards: ImageShards | TextShards


@dataclass
class _Made:
    """What stands in the folder when all shards do.

    Args:
        files: the facts of each shard, by name.
        bad: the index and reason of each image that could not be read.
        transparent: images with transparent pixels.
        kept: shards that were there already.
        made: shards made now.
    """

    files: dict[str, Any]
    bad: dict[str, str]
    transparent: int = 0
    kept: int = 0
    made: int = 0


def write_cache(
    folder: Path,
    data: ImageArguments,
    parts: Parts,
    source: ImageSource,
    accelerator: Accelerator,
    *,
    model: Mapping[str, str | None],
    batch_size: int,
    rows_per_shard: int,
    rules: CaptionRules = AS_THEY_ARE,
) -> CacheSummary:
    """Fills a folder; every rank calls it and makes each W-th shard. What is there already is checked by its hash and kept.

    Args:
        folder: of ``--latent_cache_dir``.
        data: the flags of the runs that shall use it; with ``random_flip`` mirror images are encoded too.
        parts: as loaded.
        source: the images.
        accelerator: VAE and text encoder work on its device and in its precision.
        model: the flags that name the parts and their values, for who reads the manifest.
        batch_size: images or captions encoded together.
        rows_per_shard: images or captions of a file.
        rules: with the trigger word of captions.

    Raises:
        UserError: the folder holds something else or a cache of other settings, the disk is too small, or an image or a caption cannot
            be read and ``skip_bad_images`` is off; on every rank.
    """
    manifest: dict[str, Any] = {
        "settings": cache_settings(data, parts, source, rules.trigger),
        "rows_per_shard": rows_per_shard,
        "model": dict(model),
        "precision": precision_name(accelerator.mixed_precision),
        "images": len(source),
        "files": {},
    }
    sizes, device, encoder = encoded_bytes(source), accelerator.device, _encoder(parts, accelerator)
    shapes = from_main_process(accelerator, lambda: image_shapes(source, data.cache_dir)).numpy()
    buckets = from_main_process(accelerator, lambda: _buckets(data, parts, source))
    images = ImageShards(data, vae_of(parts), encoder, source, device, batch_size, rows_per_shard, buckets)
    index = {"sizes": sizes, "shapes": shapes}
    if buckets:
        manifest["bucket_images"] = list(map(len, buckets.members))
        index["rows"] = _places(images.rows, rows_per_shard, len(source))
    kinds = [_Kind("latents", "images", list(enumerate(sizes.tolist())) if buckets else sizes.tolist(), images)]
    captions: list[str] = []
    if isinstance(parts, CheckpointParts):
        captions = distinct_captions(source, accelerator, skip_bad_images=data.skip_bad_images)
        kinds.append(_Kind("texts", "captions", captions, TextShards(parts, captions, device, batch_size, rows_per_shard, rules)))
    index["digests"] = np.array([caption_digest(caption) for caption in captions], dtype=np.uint64)
    made = _fill(folder, manifest, kinds, index, accelerator)
    bad = [BadImage(source.name(int(row)), reason) for row, reason in made.bad.items()]
    size = sum(facts["bytes"] for facts in made.files.values())
    return CacheSummary(len(source), len(captions), bad, made.transparent, size, made.kept, made.made)


def _buckets(data: ImageArguments, parts: Parts, source: ImageSource) -> Buckets | None:
    """Of the images, those that cannot be read in the first one, where their rows stay empty."""
    if not isinstance(data, TextDataArguments) or not isinstance(parts, CheckpointParts) or data.buckets is None:
        return None
    buckets = buckets_of(source, data, parts)
    return replace_of(buckets, of=buckets.of.clamp(min=0))


def _places(shards: Sequence[Sequence[int]], rows_per_shard: int, count: int) -> np.ndarray:
    """In which row each image is, int64 [N], where each shard is counted as a full one."""
    rows = np.empty(count, dtype=np.int64)
    for number, images in enumerate(shards):
        rows[images] = number * rows_per_shard + np.arange(len(images))
    return rows


def _fill(
    folder: Path, manifest: Mapping[str, Any], kinds: Sequence[_Kind], index: Mapping[str, np.ndarray], accelerator: Accelerator
) -> _Made:
    """Makes what is missing and seals the folder: its manifest lists files only while all are there and none is being made anew.

    Args:
        folder: of the cache.
        manifest: before any file is listed.
        kinds: all shards.
        index: the arrays of the `INDEX`.
        accelerator: every rank calls this.
    """
    from accelerate.utils import gather_object

    described = " and ".join(f"{len(kind.rows):,} {kind.what} x {kind.shards.bytes / len(kind.rows) / 2**10:.1f} KiB" for kind in kinds)
    needed = sum(kind.shards.bytes for kind in kinds)
    logger.info("%s: %s MiB in %s", described, f"{needed / 2**20:,.1f}", folder)
    with _held(folder, manifest, needed, accelerator):
        writer = _Writer(folder, accelerator, (read_manifest(folder) or {})["files"])
        missing = [writer.missing(kind) for kind in kinds]
        if any(map(any, gather_object([list(map(len, missing))]))):
            on_main_process(accelerator, lambda: _write_manifest(folder, manifest))  # until the end the files are not those it has listed
        for kind, numbers in zip(kinds, missing, strict=True):
            writer.make(kind, numbers)
        made = writer.made_by_all()
        on_main_process(accelerator, lambda: _seal(folder, manifest, made, index))
    return made


def _seal(folder: Path, manifest: Mapping[str, Any], made: _Made, index: Mapping[str, np.ndarray]) -> None:
    """Writes the index, and the manifest that lists all files."""
    _save(save_arrays, index, folder / INDEX)
    files = dict(sorted({**made.files, INDEX: file_facts(folder / INDEX)}.items()))
    sealed = {
        **manifest,
        "captions": len(index["digests"]),
        "bad": dict(sorted(made.bad.items(), key=lambda item: int(item[0]))),
        "files": files,
        "fingerprint": fingerprint(manifest["settings"], files),
    }
    _write_manifest(folder, sealed)


class _Writer:
    """Writes this rank's shards of a kind in rounds, after each of which the ranks learn of failures."""

    def __init__(self, folder: Path, accelerator: Accelerator, recorded: Mapping[str, Any]) -> None:
        self._folder, self._accelerator, self._recorded = folder, accelerator, recorded
        self._own = _Made({}, {})

    def missing(self, kind: _Kind) -> list[int]:
        """Which of this rank's shards are not there, sound and made of these rows."""
        mine = range(self._accelerator.process_index, len(kind.shards.rows), self._accelerator.num_processes)
        bar = tqdm(mine, desc=f"checking {kind.name}", unit="shard", delay=2, leave=False, disable=self._show)
        return [number for number in bar if not self._keep(shard_name(kind.name, number), self._digest(kind, number))]

    def make(self, kind: _Kind, missing: Sequence[int]) -> None:
        """Makes what is missing."""
        from accelerate.utils import gather_object

        turns = max(gather_object([len(missing)]))
        own = sum(len(kind.shards.rows[number]) for number in missing)
        processes = self._accelerator.num_processes
        of = f" (the first of {processes} processes)" if processes > 1 else ""
        with tqdm(total=own, desc=f"{kind.name}{of}", disable=self._show) as bar:
            made = kind.shards(missing, bar.update)

            def make(turn: int) -> None:
                if turn < len(missing):
                    self._make(shard_name(kind.name, missing[turn]), next(made), self._digest(kind, missing[turn]))

            for turn in range(turns):
                on_every_process(self._accelerator, partial(make, turn))

    def made_by_all(self) -> _Made:
        """What all ranks have made and kept."""
        from accelerate.utils import gather_object

        parts = gather_object([self._own])
        files = dict(pair for part in parts for pair in part.files.items())
        bad = dict(pair for part in parts for pair in part.bad.items())
        transparent, kept, made = (sum(getattr(part, name) for part in parts) for name in ("transparent", "kept", "made"))
        return _Made(files, bad, transparent, kept, made)

    @property
    def _show(self) -> bool | None:
        """tqdm's ``disable``."""
        return None if self._accelerator.is_main_process else True

    def _digest(self, kind: _Kind, number: int) -> str:
        """Of the rows of a shard."""
        own = json.dumps([kind.rows[row] for row in kind.shards.rows[number]])
        return hashlib.sha256(own.encode()).hexdigest()[:16]

    def _keep(self, name: str, digest: str) -> bool:
        """Whether the shard is there, sound and of these rows."""
        path = self._folder / name
        try:
            with safe_open(path, framework="numpy") as file:
                found = json.loads((file.metadata() or {})[NOTES])
        except (OSError, SafetensorError, KeyError, ValueError):
            return False
        facts = file_facts(path)
        if self._recorded.get(name, facts) != facts or found.get("rows") != digest:
            logger.warning("%s is damaged, or what it was made of has changed; making it anew", path)
            return False
        self._own.files[name] = facts
        self._note(found)
        self._own.kept += 1
        return True

    def _make(self, name: str, shard: Shard, digest: str) -> None:
        tensors, notes = shard
        if not all(tensor.isfinite().all() for tensor in tensors.values()):
            raise UserError(f"{name}: NaN, or too large for fp16; --mixed_precision no may help", exit_code=1)
        _save(save_file, tensors, self._folder / name, metadata={NOTES: json.dumps({"rows": digest, **notes})})
        self._own.files[name] = file_facts(self._folder / name)
        self._note(notes)
        self._own.made += 1

    def _note(self, notes: Mapping[str, Any]) -> None:
        self._own.bad |= notes["bad"]
        self._own.transparent += notes.get("transparent", 0)  # shards of an earlier version do not say


@contextmanager
def _held(folder: Path, manifest: Mapping[str, Any], needed: int, accelerator: Accelerator) -> Iterator[None]:
    """Prepares the folder and keeps other calls out of it meanwhile."""
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        on_main_process(accelerator, lambda: _prepare(folder, manifest, needed, lock))
        yield
    finally:
        lock.release()


def _prepare(folder: Path, manifest: Mapping[str, Any], needed: int, lock: FileLock) -> None:
    """Creates the folder, or finds there what a cache with these settings has left; takes the lock.

    Raises:
        UserError: something else is there, another call is at work there, or the disk is too small.
    """
    held = read_manifest(folder)
    if held is None and folder.exists() and (not folder.is_dir() or any(map(_is_foreign, folder.iterdir()))):
        raise UserError(f"--latent_cache_dir {folder} holds something else; give another folder")
    if held is not None:
        differences = settings_that_differ(held["settings"], manifest["settings"])
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
    replace(new, path)


def _write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    new = folder / f"{PARTIAL}{MANIFEST}"
    new.write_text(json.dumps(manifest, indent=1))
    replace(new, folder / MANIFEST)


def _encoder(parts: Parts, accelerator: Accelerator) -> LatentEncoder | TextToImageEncoder:
    """What encodes in training, on the device."""
    precision = PRECISIONS[accelerator.mixed_precision]
    if isinstance(parts, CheckpointParts):
        parts.place_frozen(accelerator.device, precision)
        return TextToImageEncoder(parts, accelerator.device)
    return LatentEncoder(parts.to(accelerator.device), accelerator.device, precision=precision)
