"""Means and covariances of features: summed up batch by batch, kept by a key of all that they depend on, read from published files."""

from __future__ import annotations

import hashlib
import json
import logging
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from immiscible.errors import UserError, first_line
from immiscible.files import PARTIAL, cache_folder, replace
from immiscible.kept import read_kept, write_kept

logger = logging.getLogger(__name__)

PUBLISHED_NAMES = {"features": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}  # in .npz files since TTUR and ADM


@dataclass(frozen=True)
class Statistics:
    """Of N feature vectors: mean, float64 [F], covariance with divisor N - 1, float64 [F, F]; N is None where a file does not say it."""

    mean: Tensor
    covariance: Tensor
    count: int | None = None


class Moments:
    """Mean and covariance of features that come in batches, in any number of them, in memory that does not grow.

    Sums of squares are taken about the batch's mean and joined by Chan et al. 1979, so that a mean far from 0 costs no digits.

    Args:
        num_features: F.
    """

    def __init__(self, num_features: int) -> None:
        self.count = 0
        self.mean = torch.zeros(num_features, dtype=torch.float64)
        self.scatter = torch.zeros(num_features, num_features, dtype=torch.float64)

    def add(self, features: Tensor) -> None:
        """Takes a batch, [B, F], in; computes in float64."""
        if len(features):
            batch = features.double()
            mean = batch.mean(0)
            self._join(len(batch), mean, (batch - mean).T @ (batch - mean))

    def merge(self, other: Moments) -> None:
        """Takes in what another one, such as another rank's, has seen."""
        if other.count:
            self._join(other.count, other.mean, other.scatter)

    def statistics(self) -> Statistics:
        """Of all that came in.

        Raises:
            UserError: fewer than 2 did.
        """
        if self.count < 2:
            raise UserError(f"a covariance needs at least 2 images, not {self.count}", exit_code=1)
        return Statistics(self.mean.clone(), self.scatter / (self.count - 1), self.count)

    def _join(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        both, apart = self.count + count, mean - self.mean
        self.scatter += scatter + torch.outer(apart, apart) * (self.count * count / both)
        self.mean += apart * (count / both)
        self.count = both


def moments_of(outputs: Iterable[Mapping[str, Tensor]], names: Iterable[str]) -> dict[str, Statistics]:
    """Statistics of some of what `PretrainedFeatures.outputs` gave for each batch, by name.

    Raises:
        UserError: there were fewer than 2 images.
    """
    names, moments = list(names), dict[str, Moments]()
    for batch in outputs:
        for name in names:
            moments.setdefault(name, Moments(batch[name].shape[1])).add(batch[name])
    return {name: moments.get(name, Moments(0)).statistics() for name in names}


def distance_of_statistics(first: Statistics, second: Statistics) -> float:
    """The squared Frechet distance, ``|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))`` (Heusel et al. 2017, eq. 6), in float64.

    The root's trace is that of ``(C1^(1/2) C2 C1^(1/2))^(1/2)``, of a symmetric matrix, which singular covariances do no harm.

    Raises:
        UserError: they are of features of other numbers.
    """
    if first.mean.shape != second.mean.shape:
        raise UserError(f"statistics of {len(first.mean)} and of {len(second.mean)} features are of different networks")
    values, vectors = torch.linalg.eigh(first.covariance)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    crossed = torch.linalg.eigvalsh(root @ second.covariance @ root).clamp(min=0).sqrt().sum()
    apart = (first.mean - second.mean).square().sum()
    return max(0.0, float(apart + first.covariance.trace() + second.covariance.trace() - 2 * crossed))


@dataclass(frozen=True)
class StatisticsKey:
    """All that statistics of reference images depend on.

    Attributes:
        data: the source's fingerprint.
        split: of the data.
        crop: how images became squares.
        resolution: their side, in pixels.
        count: of images.
        network: the name of the features' distance.
        weights_sha256: of the network; empty for one without weights.
        resize: how images came to the network's side.
        protocol: the entry of `PROTOCOLS`.
    """

    data: str
    split: str
    crop: str
    resolution: int
    count: int
    network: str
    weights_sha256: str
    resize: str
    protocol: str


def key_of(features: Any, *, data: str, split: str, crop: str, resolution: int, count: int, protocol: str) -> StatisticsKey:
    """The key of what a `FeatureNetwork` says of images; one that resizes and weighs nothing has ``own`` and no hash."""
    resize, weights = getattr(features, "resize", "own"), getattr(features, "weights_sha256", "")
    return StatisticsKey(data, split, crop, resolution, count, features.name, weights, resize, protocol)


def cached_statistics(key: StatisticsKey, compute: Callable[[], dict[str, Statistics]]) -> dict[str, Statistics]:
    """What is kept under the key in the cache folder, or else computed and kept; what is broken is told and computed anew."""
    found = kept_statistics(key)
    if not found:
        found = compute()
        keep_statistics(key, found)
    return found


def kept_statistics(key: StatisticsKey) -> dict[str, Statistics]:
    """What is kept under the key in the cache folder; nothing where nothing is, or where it is broken, which is told."""
    found: dict[str, Statistics] = {}

    def use(tensors: dict[str, Tensor]) -> None:
        if tensors["key"].numpy().tobytes() != _dumped(key):
            raise ValueError("it is of another key")
        for name in (part.removesuffix(".mean") for part in tensors if part.endswith(".mean")):
            found[name] = Statistics(tensors[f"{name}.mean"], tensors[f"{name}.covariance"], int(tensors[f"{name}.count"]))

    read_kept(_place(key), use)
    return found


def keep_statistics(key: StatisticsKey, found: Mapping[str, Statistics]) -> None:
    """Keeps them in the cache folder under the key."""
    tensors = {"key": torch.frombuffer(bytearray(_dumped(key)), dtype=torch.uint8)}
    for name, of in found.items():
        tensors |= {f"{name}.mean": of.mean, f"{name}.covariance": of.covariance, f"{name}.count": torch.tensor(of.count)}
    write_kept(_place(key), tensors, "the statistics of reference images")


def _place(key: StatisticsKey) -> Path:
    return cache_folder() / "statistics" / f"{hashlib.blake2b(_dumped(key), digest_size=16).hexdigest()}.safetensors"


@dataclass(frozen=True)
class Reference:
    """What a file of statistics holds.

    Attributes:
        path: of the file.
        statistics: by the names of `PretrainedFeatures.outputs`: ``features``, and ``spatial`` where it has them.
        key: how they were made; None for a published file, which does not say.
        images: how many images are in it, for `images_of_npz`; 0 in most.
    """

    path: Path
    statistics: dict[str, Statistics]
    key: StatisticsKey | None
    images: int

    def check(self, num_features: int, **wanted: Any) -> None:
        """Whether it can stand for the reference of what is measured.

        Args:
            num_features: F of the network that looks at the samples.
            **wanted: fields of `StatisticsKey` that must agree. A file without a key passes, with a warning.

        Raises:
            UserError: it cannot; the line says which fields differ.
        """
        found = len(self.statistics["features"].mean)
        if found != num_features:
            raise UserError(f"--reference {self.path} is of {found} features, the samples' network gives {num_features}")
        if self.key is None:
            logger.warning("%s does not say of which network, resize and images it is: nothing but its size was checked", self.path)
            return
        differs = [f"its {name} is {was}, not {value}" for name, value in wanted.items() if (was := getattr(self.key, name)) != value]
        if differs:
            raise UserError(f"--reference {self.path} does not fit: {'; '.join(differs)}")


def write_reference(path: Path, key: StatisticsKey, statistics: Mapping[str, Statistics]) -> None:
    """Writes an ``.npz`` that `read_reference` reads, and pytorch-fid and ADM's evaluator too: ``mu``, ``sigma``, ``mu_s``, ``sigma_s``.

    Raises:
        UserError: (exit code 1) it cannot be written.
    """
    arrays: dict[str, Any] = {"key": np.frombuffer(_dumped(key), np.uint8)}
    for name, (mean, covariance) in PUBLISHED_NAMES.items():
        if name in statistics:
            arrays |= {mean: statistics[name].mean.numpy(), covariance: statistics[name].covariance.numpy()}
    partial = path.with_name(f"{PARTIAL}{path.name}")
    try:
        with partial.open("wb") as file:
            np.savez(file, **arrays)
        replace(partial, path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}", exit_code=1) from error


def holds_statistics(path: Path) -> bool:
    """Whether `read_reference` is what reads this file: an ``.npz`` with ``mu``."""
    if path.suffix != ".npz" or not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return "mu.npy" in archive.namelist()


def read_reference(path: Path) -> Reference:
    """The statistics in an ``.npz``: our own, TTUR's, pytorch-fid's, EDM's (``mu``, ``sigma``), ADM's (``mu_s``, ``sigma_s``, images too).

    Raises:
        UserError: (exit code 1) it cannot be read, holds no statistics, or these are damaged.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            if "mu" not in file or "sigma" not in file:
                raise ValueError(f"it holds {', '.join(file) or 'nothing'}, not mu and sigma")
            key = StatisticsKey(**json.loads(file["key"].tobytes())) if "key" in file else None
            count = None if key is None else key.count
            statistics = {
                name: _checked(torch.from_numpy(file[mean]).double(), torch.from_numpy(file[covariance]).double(), count)
                for name, (mean, covariance) in PUBLISHED_NAMES.items()
                if mean in file and covariance in file
            }
        images = _open_images(path)[0][0] if "arr_0" in file.files else 0
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"--reference {path} is no file of statistics ({first_line(error)})", exit_code=1) from error
    return Reference(path, statistics, key, images)


def images_of_npz(path: Path, batch_size: int) -> Iterator[Tensor]:
    """The images of an ``.npz`` as ADM's evaluator reads them (``arr_0``, uint8 [N, H, W, C]), batch by batch, uint8 [B, C, H, W].

    They are never all in memory; the last batch may be smaller.

    Raises:
        UserError: (exit code 1) it cannot be read, or holds no such images.
    """
    try:
        shape, start = _open_images(path)
        with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
            file.read(start)
            for first in range(0, shape[0], batch_size):
                count = min(batch_size, shape[0] - first)
                wanted = count * shape[1] * shape[2] * shape[3]
                pixels = bytearray(file.read(wanted))
                if len(pixels) != wanted:
                    raise ValueError("it ends within an image")
                yield torch.frombuffer(pixels, dtype=torch.uint8).view(count, *shape[1:]).permute(0, 3, 1, 2)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} holds no images that can be read ({first_line(error)})", exit_code=1) from error


def shape_of_npz(path: Path) -> tuple[int, ...]:
    """(N, H, W, C) of the images that `images_of_npz` reads.

    Raises:
        UserError: (exit code 1) it cannot be read, or holds no such images.
    """
    try:
        return _open_images(path)[0]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} holds no images that can be read ({first_line(error)})", exit_code=1) from error


def _open_images(path: Path) -> tuple[tuple[int, ...], int]:
    """The shape of ``arr_0`` and where its bytes begin."""
    with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[np.lib.format.read_magic(file)]
        shape, columns_first, dtype = read(file)
        if dtype != np.uint8 or len(shape) != 4 or columns_first:
            raise ValueError(f"arr_0 is {dtype} of {len(shape)} dimensions, not uint8 [N, H, W, C]")
        return shape, file.tell()


def _checked(mean: Tensor, covariance: Tensor, count: int | None) -> Statistics:
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise ValueError(f"mean and covariance have shapes {tuple(mean.shape)} and {tuple(covariance.shape)}")
    if not (mean.isfinite().all() and covariance.isfinite().all()):
        raise ValueError("it holds NaN or infinite values")
    return Statistics(mean, covariance, count)


def _dumped(key: StatisticsKey) -> bytes:
    return json.dumps(asdict(key), sort_keys=True).encode()
