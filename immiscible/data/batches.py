"""Batches: which images a rank takes for which micro-batch, and what becomes of images that cannot be read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from immiscible.data.buckets import Buckets
from immiscible.data.sources import ImageSource, why_unreadable
from immiscible.data.transforms import ImageTransform
from immiscible.errors import UserError
from immiscible.randomness import derive_seed, seeded_generator


@dataclass(frozen=True)
class BadImage:
    """An image that could not be used: its name in the source, and why."""

    name: str
    reason: str


class Batch(TypedDict):
    """``pixel_values`` float32 [B,C,H,W], contiguous, of one bucket if there are several; ``labels`` int64 [B] of a dataset
    ``with_labels``, ``captions`` of one ``with_captions``, ``geometry`` int64 [B,6] of one ``with_geometry``, else None; ``bad`` the images
    that were met and not used; ``transparent`` how many were laid upon a color. Give it to `check_batch`.
    """

    pixel_values: Tensor
    labels: Tensor | None
    captions: list[str] | None
    geometry: Tensor | None
    bad: list[BadImage]
    transparent: int


class Images(NamedTuple):
    """A batch as training takes it: ``x0`` float32 [B,C,H,W] in [-1, 1], the class of each image, int64 [B], its caption, and where its
    crop lies, int64 [B,6], see `ImageTransform.geometry`; each of them or None.
    """

    x0: Tensor
    labels: Tensor | None = None
    captions: list[str] | None = None
    geometry: Tensor | None = None


class ImageDataset(Dataset[dict[str, Any]]):
    """The pixels of ``(epoch, index)``; a bad image is reported and raises nothing, as a worker's traceback would hide which it is.

    Args:
        source: the images.
        transform: what makes pixels of them.
        skip_bad_images: use the next readable image in place of a bad one.
        with_labels: give the images' classes too; an image without one is a bad image.
        with_captions: give a caption of each too, of several one drawn by (seed, epoch, index); an image without one is a bad image.
        with_geometry: give each image's `ImageTransform.geometry` too.
        buckets: of the source's images, each of which is cut to the size of its own; None for squares. A substitute is of the same one.

    Raises:
        UserError: ``with_labels``, and the source has no classes.
    """

    def __init__(
        self,
        source: ImageSource,
        transform: ImageTransform,
        skip_bad_images: bool = False,
        with_labels: bool = False,
        with_captions: bool = False,
        with_geometry: bool = False,
        buckets: Buckets | None = None,
    ):
        if with_labels and source.class_names is None:
            raise UserError(f"class labels are asked for, and {source.description} has none")
        self.source = source
        self.transform = transform
        self.skip_bad_images = skip_bad_images
        self.with_labels = with_labels
        self.with_captions = with_captions
        self.with_geometry = with_geometry
        self.buckets = buckets

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        """``{"pixel_values": float32 [C,H,W], "label": int | None, "caption": str | None, "geometry": six int | None, "bad":
        list[BadImage], "transparent": bool}``; ``bad`` alone if there is no image to give.
        """
        epoch, index = key
        size = self.buckets.size_of(index) if self.buckets else None
        bad: list[BadImage] = []
        for position in self._candidates(index):
            try:
                image = self.source.load(position)
                pixels, transparent = self.transform.decode(image), self.transform.is_laid_upon(image)
                label = self.source.label(position) if self.with_labels else None
                captions = self.source.captions(position) if self.with_captions else [None]
            except Exception as error:  # Pillow's decoders raise nearly any type on broken files
                bad.append(BadImage(self.source.name(position), why_unreadable(error)))
            else:
                # Drawn for the index that was asked for: a substitute differs from its own appearance in the epoch.
                caption = captions[derive_seed(self.transform.seed, "caption", epoch, index) % len(captions)]
                whole = self.transform.original_size(image) if self.with_geometry else None
                geometry = self.transform.geometry(*whole, epoch, index, size) if whole else None
                told = {"label": label, "caption": caption, "geometry": geometry}
                pixel_values = self.transform.augment(pixels, epoch, index, size)
                return {"pixel_values": pixel_values, **told, "bad": bad, "transparent": transparent}
        return {"bad": bad}

    def _candidates(self, index: int) -> Iterator[int]:
        """An image, and those that may take its place, in their order: all others, or those of its bucket."""
        yield index
        if not self.skip_bad_images:
            return
        count = len(self.source)
        of = self.buckets.of.tolist() if self.buckets else None
        others = ((index + step) % count for step in range(1, count))
        yield from (position for position in others if of is None or of[position] == of[index])


def collate(items: Sequence[dict[str, Any]]) -> Batch:
    """A `Batch` of items of `ImageDataset`; those without pixels leave their row out, and ``pixel_values`` is [0] if all do."""
    good = [item for item in items if "pixel_values" in item]
    labels = [item["label"] for item in good if item["label"] is not None]
    captions = [item["caption"] for item in good if item["caption"] is not None]
    geometry = [item["geometry"] for item in good if item["geometry"] is not None]
    return {
        "pixel_values": torch.stack([item["pixel_values"] for item in good]) if good else torch.empty(0),
        "labels": torch.tensor(labels) if labels else None,
        "captions": captions or None,
        "geometry": torch.tensor(geometry) if geometry else None,
        "bad": [bad for item in items for bad in item["bad"]],
        "transparent": sum(item["transparent"] for item in good),
    }


def check_batch(batch: Batch, skip_bad_images: bool) -> list[BadImage]:
    """The images that were skipped in this batch, once each; to be called in the main process, where an error ends the run.

    On several ranks only the one that met the bad image raises.

    Raises:
        UserError: there is a bad image and ``skip_bad_images`` is off, or no image of the data can be read.
    """
    if batch["bad"] and not skip_bad_images:
        first = batch["bad"][0]
        raise UserError(f"cannot read image {first.name}: {first.reason}; remove it or pass --skip_bad_images", exit_code=1)
    if len(batch["pixel_values"]) == 0:
        first = batch["bad"][0]
        raise UserError(f"none of the images can be read; the first tried was {first.name}: {first.reason}", exit_code=1)
    return list(dict.fromkeys(batch["bad"]))


class GlobalBatchOrder(Sampler[list[tuple[int, int]]]):
    """The keys ``(epoch, index)`` of one rank's micro-batches, from the run's micro-batch ``start`` to ``stop``.

    Epoch e is a permutation of the images that depends on (seed, e), cut into global micro-batches of ``num_processes * batch_size``
    rows, of which the last short one is dropped; rank r has rows ``r * batch_size`` to ``(r + 1) * batch_size``. So the global rows
    depend on the product alone. Data smaller than one global micro-batch is repeated to fill one.

    Args:
        num_images: at least 1.
        batch_size: images a rank sees in a micro-batch.
        seed: the run's seed.
        start: first micro-batch, counted from the beginning of the run over epochs.
        stop: the micro-batch after the last.
        rank: this process.
        num_processes: ranks.
    """

    def __init__(self, num_images: int, batch_size: int, seed: int, *, start: int = 0, stop: int, rank: int = 0, num_processes: int = 1):
        self.num_images = num_images
        self.batch_size = batch_size
        self.seed = seed
        self.start = start
        self.stop = stop
        self.rank = rank
        self.global_batch_size = num_processes * batch_size
        self.batches_per_epoch = max(1, num_images // self.global_batch_size)

    def __len__(self) -> int:
        return max(0, self.stop - self.start)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        permuted_epoch, permutation = -1, torch.empty(0, dtype=torch.int64)
        for micro_batch in range(self.start, self.stop):
            epoch, position = divmod(micro_batch, self.batches_per_epoch)
            if epoch != permuted_epoch:
                permuted_epoch, permutation = epoch, self.permutation(epoch)
            first = position * self.global_batch_size + self.rank * self.batch_size
            yield [(epoch, index) for index in permutation[first : first + self.batch_size].tolist()]

    def permutation(self, epoch: int) -> Tensor:
        """The images of an epoch in their order, int64; repeated to fill one global micro-batch where they are fewer."""
        permutation = torch.randperm(self.num_images, generator=seeded_generator(self.seed, "order", epoch))
        return permutation.repeat(-(-self.global_batch_size // self.num_images))


class BucketOrder(GlobalBatchOrder):
    """As `GlobalBatchOrder`, of images in buckets: all ranks take the same bucket at the same micro-batch, and so does a whole window.

    In epoch e the images of each bucket are permuted by (seed, e, bucket) and cut into windows of global micro-batches, of which the last
    short one is dropped; the windows of all buckets stand in an order drawn from (seed, e).

    Args:
        buckets: of the images.
        batch_size: images a rank sees in a micro-batch.
        seed: the run's seed.
        window: micro-batches that are paired together, from the run's beginning on.
        start: first micro-batch, counted from the beginning of the run over epochs.
        stop: the micro-batch after the last.
        rank: this process.
        num_processes: ranks.

    Raises:
        UserError: no bucket holds the images of a window.
    """

    def __init__(
        self,
        buckets: Buckets,
        batch_size: int,
        seed: int,
        *,
        window: int = 1,
        start: int = 0,
        stop: int,
        rank: int = 0,
        num_processes: int = 1,
    ):
        super().__init__(len(buckets.of), batch_size, seed, start=start, stop=stop, rank=rank, num_processes=num_processes)
        self.buckets = buckets
        self._together = self.global_batch_size * window
        self._counts = [len(members) // self._together for members in buckets.members]
        self.batches_per_epoch = window * sum(self._counts)
        if not self.batches_per_epoch:
            most = max(map(len, buckets.members))
            wider = f" of --coupling_window {window}" if window > 1 else ""
            raise UserError(
                f"no bucket has the {self._together} images{wider} that are trained on together, the fullest has {most}: lower "
                f"--train_batch_size, or take fewer --buckets"
            )

    def permutation(self, epoch: int) -> Tensor:
        """The images of an epoch in their order, int64, without those that fill no batch."""
        windows = []
        for number, (members, count) in enumerate(zip(self.buckets.members, self._counts, strict=True)):
            drawn = members[torch.randperm(len(members), generator=seeded_generator(self.seed, "order", epoch, number))]
            windows.append(drawn[: count * self._together].view(count, self._together))
        table = torch.cat(windows)
        return table[torch.randperm(len(table), generator=seeded_generator(self.seed, "bucket order", epoch))].flatten()

    @property
    def words(self) -> list[str]:
        """A line for each bucket, and one for the images that an epoch leaves out."""
        per_window = self._together // self.global_batch_size
        lines = [
            f"{height} x {width}: {len(members):,} images, {count * per_window:,} batches an epoch"
            for (height, width), members, count in zip(self.buckets.sizes, self.buckets.members, self._counts, strict=True)
        ]
        left_out = self.num_images - self.batches_per_epoch * self.global_batch_size
        never = sum(len(members) for members, count in zip(self.buckets.members, self._counts, strict=True) if not count)
        last = f"{left_out:,} of {self.num_images:,} images are left out of each epoch, as buckets hold whole batches"
        return [*lines, last + (f"; {never:,} of them are in buckets of less than one, and are never used" if never else "")]
