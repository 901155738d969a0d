"""How large images are: on disk, by which an edited one is noticed, and in pixels, from their headers."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from immiscible.data.shards import ShardImages
from immiscible.data.sources import ImageSource, Subset
from immiscible.data.tables import TableImages
from immiscible.kept import read_kept, write_kept

THREADS, TOGETHER = 8, 1000  # images whose headers are read at once, and those that are asked for together
LONG = 2.0  # seconds of reading, from which on what was found is kept for the next start


def encoded_bytes(source: ImageSource) -> np.ndarray:
    """Bytes of each encoded image, int64 [N]: of its file, its cell in a table, or its sample in a tar; 0 of bundled images."""
    if isinstance(source, Subset):
        return encoded_bytes(source.source)[np.asarray(source.indices)]
    if isinstance(source, ShardImages):
        return source.extents[:, 1] - source.extents[:, 0]
    return source.sizes() if isinstance(source, TableImages) else np.zeros(len(source), dtype=np.int64)


def image_shapes(source: ImageSource, cache_dir: str | None) -> Tensor:
    """Height and width of each image, int64 [N, 2] on the CPU; 0 of one whose header cannot be read.

    What took long to read is kept in the cache folder, for as long as the data are called the same and no image has another length.

    Args:
        source: the images.
        cache_dir: see `immiscible.data.loading.load_images`.
    """
    path = _kept_path(source, cache_dir)
    found: dict[str, Tensor] = {}
    if read_kept(path, found.update):
        return found["shapes"]
    start = time.perf_counter()
    bar = tqdm(_sizes(source), desc="sizes of images", total=len(source), unit="image", delay=LONG, leave=False, disable=None)
    shapes = torch.tensor(list(bar), dtype=torch.int64, device="cpu").reshape(-1, 2)
    if time.perf_counter() - start > LONG:
        write_kept(path, {"shapes": shapes}, "the sizes of images")
    return shapes


def _sizes(source: ImageSource) -> Iterator[tuple[int, int]]:
    def size(index: int) -> tuple[int, int]:
        try:
            return source.size(index)
        except Exception:  # nearly any type, of broken files; `load` says what is wrong with them
            return 0, 0

    with ThreadPoolExecutor(THREADS) as threads:
        for start in range(0, len(source), TOGETHER):
            yield from threads.map(size, range(start, min(start + TOGETHER, len(source))))


def _kept_path(source: ImageSource, cache_dir: str | None) -> Path:
    import datasets

    digest = hashlib.blake2b(source.fingerprint.encode(errors="surrogateescape"), digest_size=16)
    digest.update(encoded_bytes(source).tobytes())
    return Path(cache_dir or datasets.config.HF_DATASETS_CACHE).expanduser() / "image-sizes" / f"{digest.hexdigest()}.safetensors"
