"""What a network says of images in files, computed once, in as many processes as there are, and kept: a killed evaluation goes on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from immiscible.errors import UserError
from immiscible.evaluation.features import FeatureNetwork
from immiscible.evaluation.image_files import ImageFiles, Part
from immiscible.evaluation.image_sets import ImageSet
from immiscible.evaluation.statistics import Moments, Statistics
from immiscible.kept import read_kept, write_kept
from immiscible.processes import on_every_process

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class KeptPart:
    """A part of the images that is measured.

    Attributes:
        number: of the part.
        pixels: its `Part.digest`.
        file: the name of the file with what the network said; empty where none was asked.
        count: how many images.
        labels: their classes, or None.
    """

    number: int
    pixels: str
    file: str
    count: int
    labels: list[int] | None


def outputs_of(network: FeatureNetwork, images: Tensor) -> Mapping[str, Tensor]:
    """All that the network says of uint8 [B, C, H, W], by the names of `ImageSet`: ``features`` alone of one without ``outputs``."""
    outputs: Callable[[Tensor], Mapping[str, Tensor]] | None = getattr(network, "outputs", None)
    return {"features": network(images)} if outputs is None else outputs(images)


def given_by(network: FeatureNetwork, channels: int, side: int) -> set[str]:
    """The fields of `ImageSet` that the network gives of images of this shape, by one black image."""
    texts = {"text_embeddings"} if hasattr(network, "texts") else set[str]()
    return {*outputs_of(network, torch.zeros(1, channels, side, side, dtype=torch.uint8)), *texts}


def measure(
    images: ImageFiles,
    network: Any,
    fields: Collection[str],
    folder: Path,
    *,
    rank: int = 0,
    ranks: int = 1,
    progress: Callable[[int], Any] = lambda images: None,
) -> list[KeptPart]:
    """Asks the network of this process's parts, but for those whose files are there: a file is named by the pixels and the network.

    Args:
        images: of which every ``ranks``-th part is read, from ``rank`` on.
        network: a `FeatureNetwork`; with ``texts`` where text embeddings are wanted.
        fields: of `ImageSet`, what is kept.
        folder: where; what is exact in fp32 is kept so.
        rank: this process.
        ranks: how many share the images.
        progress: called with the number of images of each part.

    Raises:
        UserError: (exit code 1) an image cannot be read, or a file cannot be written.
    """
    facts = [getattr(network, name, None) for name in ("name", "weights_sha256", "resize", "side")]
    facts += [str(getattr(network, "_device", "cpu")).partition(":")[0], *sorted(fields)]
    done = []
    for part in images.parts(rank, ranks):
        told, pixels, name = part.captions if "text_embeddings" in fields else None, part.digest, ""
        if fields:
            name = f"{hashlib.blake2b(repr((facts, pixels, told)).encode(), digest_size=16).hexdigest()}.safetensors"
            if not read_kept(folder / name, lambda tensors: None):
                write_kept(folder / name, _narrow(_said(part, network, fields)), "features")
                if not (folder / name).exists():
                    raise UserError(f"{folder / name} was not written: is the disk full?", exit_code=1)
        done.append(KeptPart(part.number, pixels, name, len(part.images), None if part.labels is None else part.labels.tolist()))
        progress(len(part.images))
    return done


def measure_together(
    accelerator: Accelerator, images: ImageFiles, network: Any, fields: Collection[str], folder: Path, what: str
) -> MeasuredImages:
    """`measure` by all processes, with a bar that is called ``what``; the same on each, and for any number of them.

    Raises:
        UserError: what `measure` raises in one of them, in all.
    """
    from accelerate.utils import gather_object
    from tqdm import tqdm

    rank, ranks = accelerator.process_index, accelerator.num_processes
    mine: list[KeptPart] = []
    with tqdm(total=images.share(rank, ranks), desc=what, unit="image", disable=not accelerator.is_main_process) as bar:

        def work() -> None:
            mine.extend(measure(images, network, fields, folder, rank=rank, ranks=ranks, progress=bar.update))

        on_every_process(accelerator, work, folder)
    return MeasuredImages(folder, sorted(gather_object(mine), key=lambda part: part.number))


@dataclass
class MeasuredImages:
    """What is known of images, in files; `statistics` may be known without them.

    Args:
        folder: of the files.
        parts: all of them, in order.
        statistics: by field, of a file or from the cache; others are computed when asked for.
    """

    folder: Path
    parts: Sequence[KeptPart] = ()
    statistics: dict[str, Statistics] = field(default_factory=dict)

    @property
    def pixels(self) -> str:
        """A digest of all images."""
        return hashlib.blake2b(repr([part.pixels for part in self.parts]).encode(), digest_size=16).hexdigest()

    @property
    def count(self) -> int | None:
        """Of the images; None where statistics do not say it."""
        return sum(part.count for part in self.parts) or next((of.count for of in self.statistics.values()), None)

    def moments(self, name: str) -> Statistics:
        """Mean and covariance of a field, in memory that does not grow with the images.

        Raises:
            UserError: (exit code 1) there are fewer than 2 images, or a file is broken.
        """
        if name not in self.statistics:
            moments: Moments | None = None
            for _, tensors in self._read():
                moments = moments or Moments(tensors[name].shape[1])
                moments.add(tensors[name])
            self.statistics[name] = (moments or Moments(0)).statistics()
        return self.statistics[name]

    def rows(self, fields: Collection[str]) -> ImageSet:
        """All images, in order, with these fields alone; features in float64, and nothing beside them in memory.

        Raises:
            UserError: (exit code 1) a file is broken.
        """
        found, first = dict[str, Tensor](), 0
        for part, tensors in self._read():
            for name in set(fields) - {"labels"}:
                rows = tensors[name]
                if name not in found:
                    found[name] = torch.empty(self.count or 0, rows.shape[1], dtype=torch.float64)
                found[name][first : first + part.count] = rows
            first += part.count
        if "labels" in fields:
            found["labels"] = torch.tensor([label for part in self.parts for label in part.labels or ()])
        return ImageSet(**found)

    def _read(self) -> Iterator[tuple[KeptPart, dict[str, Tensor]]]:
        for part in self.parts:
            tensors: dict[str, Tensor] = {}
            if not read_kept(self.folder / part.file, tensors.update):
                raise UserError(f"{self.folder / part.file} is gone or broken; evaluate again", exit_code=1)
            yield part, tensors


def _said(part: Part, network: Any, fields: Collection[str]) -> dict[str, Tensor]:
    found = dict(outputs_of(network, part.images))
    if "text_embeddings" in fields:
        found["text_embeddings"] = network.texts(part.captions)
    return {name: found[name] for name in fields if name != "labels"}


def _narrow(found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """In fp32, which networks compute in, where that loses nothing: half the size on disk."""
    return {name: narrow if (narrow := rows.float()).double().equal(rows) else rows for name, rows in found.items()}
