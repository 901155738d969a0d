"""The manifest of a latent cache: what it says, whether it can be believed, and whether the files are those that it lists."""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from immiscible.errors import UserError, first_line
from immiscible.files import file_facts

MANIFEST = "manifest.json"
INDEX = "index.safetensors"
HASHED_BYTES = 8 * 2**30  # of a cache at the start of a run: some seconds
FORMAT = 2  # of the files; a cache of another format is refused

# What must be equal for a cache to serve a run, in words that say which flag it is.
MUST_AGREE = {
    "format": "the cache's format",
    "vae": "the VAE's encoder (a hash of its weights; --pretrained_model_name_or_path, --vae_model_name_or_path)",
    "scaling_factor": "the VAE's scaling factor",
    "text_encoder": "the text encoder or tokenizer of --pretrained_model_name_or_path (a hash)",
    "resolution": "--resolution",
    "buckets": "the buckets (--buckets, --bucket_step, --bucket_max_ratio)",
    "crop": "the crop (--crop, --center_crop, --alpha_color)",
    "interpolation": "--preserve_input_precision or --image_interpolation_mode",
    "image_column": "--image_column",
    "caption_column": "--caption_column",
    "trigger_word": "--trigger_word",
    "data": "the data",
}


def shard_name(kind: str, number: int) -> str:
    """``latents-00000.safetensors``."""
    return f"{kind}-{number:05d}.safetensors"


def settings_that_differ(cached: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """In words, of what must agree."""
    different = [name for name in MUST_AGREE if cached.get(name) != wanted[name]]
    return [f"{MUST_AGREE[name]} was {cached.get(name)} in the cache and is {wanted[name]} here" for name in different]


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The content of a folder's `MANIFEST`; None if there is none.

    Raises:
        UserError: it is not that of a cache; the line says what is wrong with it.
    """
    path = folder / MANIFEST
    if not path.exists():
        return None
    try:
        manifest = json.loads(path.read_text())
        wrong = _wrong_in(manifest)
    except (OSError, ValueError, RecursionError) as error:
        wrong = first_line(error)
    if wrong:
        raise UserError(f"{path} is not the manifest of a latent cache ({wrong}); give another --latent_cache_dir")
    return dict(manifest)


def _wrong_in(manifest: Any) -> str | None:
    """What a manifest has not as `immiscible.encoding.cache_writing` writes it; None if nothing. While files are made none is listed."""
    if not isinstance(manifest, dict):
        return "no JSON object"
    wanted: dict[str, type] = {"settings": dict, "files": dict, "rows_per_shard": int, "precision": str}
    wanted |= {"bad": dict, "fingerprint": str, "images": int, "captions": int} if manifest.get("files") else {}
    for name, kind in wanted.items():
        if not isinstance(manifest.get(name), kind) or isinstance(manifest[name], bool):
            return f"its {name} is {_shown(manifest.get(name))}"
    for name in ("rows_per_shard", "images", "captions"):
        if manifest.get(name, 1) < (name != "captions"):
            return f"its {name} is {manifest[name]}"
    older = {"buckets", "trigger_word"}  # what a cache has none of that was made before there were these
    if lacking := {*MUST_AGREE, "flips"} - older - manifest["settings"].keys():
        return f"its settings lack {', '.join(sorted(lacking))}"
    counts = manifest.get("bucket_images", [])
    if not isinstance(counts, list) or not all(type(count) is int and count >= 0 for count in counts):
        return f"its bucket_images is {_shown(counts)}"
    if manifest["files"] and counts and sum(counts) != manifest["images"]:
        return f"its bucket_images are {sum(counts):,} together, and its images {manifest['images']:,}"
    for name, facts in manifest["files"].items():
        is_file = isinstance(facts, dict) and type(facts.get("bytes")) is int and isinstance(facts.get("sha256"), str)
        if not is_file or facts.keys() != {"bytes", "sha256"}:
            return f"its files hold {_shown({name: facts})}"
    if manifest["files"]:
        shards = sum(-(-count // manifest["rows_per_shard"]) for count in (*_images_in(manifest), manifest["captions"]))
        if shards + 1 != len(manifest["files"]):
            return f"its {len(manifest['files']):,} files are not the {shards + 1:,} of so many images and captions"
        if odd := sorted(manifest["files"].keys() ^ shards_of(manifest).keys()):
            return f"its files are not those of so many images and captions; the first odd one is {_shown(odd[0])}"
        if manifest["fingerprint"] != fingerprint(manifest["settings"], manifest["files"]):
            return "its fingerprint is not that of its settings and files"
    for row, reason in manifest.get("bad", {}).items():
        if not row.isdecimal() or not isinstance(reason, str):
            return f"its bad images hold {_shown({row: reason})}"
    return None


def _shown(value: Any) -> str:
    """A value of a JSON file for a message."""
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def check_files(folder: Path, manifest: Mapping[str, Any], again: str) -> None:
    """Whether all are there, with their sizes and SHA-256, and the shards are such; ``again`` says how to make them.

    Hashing is bounded: of a cache larger than `HASHED_BYTES` the index and as many shards as make these bytes, others in every call.
    """
    files = manifest["files"]
    if not files:
        raise UserError(f"--latent_cache_dir {folder} is not finished; {again} to go on")
    for name, facts in files.items():
        size = (folder / name).stat().st_size if (folder / name).is_file() else None
        if size != facts["bytes"]:
            found = "is missing" if size is None else f"has {size} bytes instead of {facts['bytes']}"
            raise UserError(f"--latent_cache_dir {folder}: {name} {found}; {again} to mend it")
    names, budget = random.SystemRandom().sample(sorted(files), len(files)), HASHED_BYTES
    names.sort(key=lambda name: name != INDEX)
    hashed = set()
    for name in names:
        budget -= files[name]["bytes"]
        if budget >= 0 or name == INDEX:
            hashed.add(name)
    rows = shards_of(manifest)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        sound = threads.map(lambda name: _is_sound(folder / name, files[name] if name in hashed else None, rows[name]), names)
        broken = sorted(name for name, good in zip(names, sound, strict=True) if not good)
    if broken:
        more = f" ({len(broken)} such files)" if len(broken) > 1 else ""
        raise UserError(f"--latent_cache_dir {folder}: {broken[0]} is damaged, it is not what was written{more}; {again} to mend it")


def _is_sound(path: Path, facts: Any, rows: int | None) -> bool:
    """Whether a file of tensors can be opened, has these facts where they are given, and so many rows."""
    try:
        with safe_open(path, framework="numpy") as file:
            counts = {file.get_slice(name).get_shape()[0] for name in file.keys()}  # noqa: SIM118 (no mapping)
        return (rows is None or counts == {rows}) and (facts is None or file_facts(path) == facts)
    except (OSError, SafetensorError, ValueError, IndexError):
        return False


def shards_of(manifest: Mapping[str, Any]) -> dict[str, int | None]:
    """The files that a cache has and how many rows are in each; None for the index."""
    per_shard = manifest["rows_per_shard"]
    found: dict[str, int | None] = {INDEX: None}
    for kind, parts in (("latents", _images_in(manifest)), ("texts", [manifest["captions"]])):
        full = [min(per_shard, rows - start) for rows in parts for start in range(0, rows, per_shard)]
        found |= {shard_name(kind, number): rows for number, rows in enumerate(full)}
    return found


def _images_in(manifest: Mapping[str, Any]) -> list[int]:
    """How many images are in each bucket, of a cache in buckets; else in all."""
    return manifest.get("bucket_images") or [manifest["images"]]


def fingerprint(settings: Mapping[str, Any], files: Mapping[str, Any]) -> str:
    """Tells a cache from one that holds other bits."""
    whole = json.dumps([settings, {name: facts["sha256"] for name, facts in files.items()}])
    return hashlib.sha256(whole.encode()).hexdigest()[:16]
