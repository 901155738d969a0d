"""What goes into the shards of a cache: moments of latents, and text states of captions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, TypedDict

import torch
from torch import Tensor
from tqdm import tqdm

from immiscible.data.arguments import ImageArguments
from immiscible.data.batches import BadImage, ImageDataset, check_batch
from immiscible.data.buckets import Buckets
from immiscible.data.loading import build_loader
from immiscible.data.sources import ImageSource, Subset
from immiscible.data.tables import TableImages
from immiscible.data.transforms import image_transform
from immiscible.encoding.cache import caption_digest
from immiscible.encoding.captions import AS_THEY_ARE, CaptionRules
from immiscible.encoding.encoders import LatentEncoder
from immiscible.encoding.texts import TextToImageEncoder
from immiscible.errors import UserError
from immiscible.networks.checkpoint_parts import CheckpointParts
from immiscible.networks.latents import latent_downsampling
from immiscible.processes import on_every_process

if TYPE_CHECKING:
    from accelerate import Accelerator
    from diffusers import AutoencoderKL


class Notes(TypedDict):
    """What is written beside the tensors: index and reason of each image that could not be read, and how many have transparent pixels."""

    bad: dict[str, str]
    transparent: int


Shard = tuple[dict[str, Tensor], Notes]


class _ByNumber(Subset):
    """All images, named by their number: two may share a name."""

    def name(self, index: int) -> str:
        """The number."""
        return str(index)


@dataclass(frozen=True)
class ImageShards:
    """The ``moments`` of images; see `immiscible.encoding.cache`.

    Args:
        data: the flags of the runs that shall use the cache.
        vae: whose latents they are.
        encoder: has it.
        source: the images.
        device: where the VAE is.
        batch_size: images encoded together.
        rows_per_shard: images of a file.
        buckets: of all images, those that cannot be read in any; None for squares.
    """

    data: ImageArguments
    vae: AutoencoderKL
    encoder: LatentEncoder | TextToImageEncoder
    source: ImageSource
    device: torch.device
    batch_size: int
    rows_per_shard: int
    buckets: Buckets | None = None

    @cached_property
    def rows(self) -> list[Sequence[int]]:
        """The images of each shard, of one bucket."""
        members: list[Sequence[int]] = [range(len(self.source))]
        if self.buckets:
            members = [images.tolist() for images in self.buckets.members]
        return [part for images in members for part in _parts(images, self.rows_per_shard)]

    def shape(self, shard: int) -> tuple[int, ...]:
        """[F, 2, C, h, w]: of the image and its mirror image, mean and log-variance."""
        size = self.buckets.size_of(self.rows[shard][0]) if self.buckets else (self.data.resolution, self.data.resolution)
        height, width = (side // latent_downsampling(self.vae) for side in size)
        return 1 + self.data.random_flip, 2, self.vae.config.latent_channels, height, width

    @property
    def bytes(self) -> int:
        """Of all images."""
        return sum(2 * len(rows) * math.prod(self.shape(shard)) for shard, rows in enumerate(self.rows))

    def __call__(self, numbers: Sequence[int], done: Callable[[int], object]) -> Iterator[Shard]:
        """The shards with these numbers; ``done`` is told the rows after each batch.

        Raises:
            UserError: an image cannot be read and ``skip_bad_images`` is off.
        """
        transform = replace(image_transform(self.data, self.vae.config.in_channels, seed=0), random_flip=False)
        shards = [_parts(self.rows[number], self.batch_size) for number in numbers]
        keys = ([(0, index) for index in rows] for batches in shards for rows in batches)
        dataset = ImageDataset(_ByNumber(self.source, range(len(self.source))), transform, buckets=self.buckets)
        loader = iter(build_loader(dataset, keys, self.data.dataloader_num_workers, self.device))
        for number, batches in zip(numbers, shards, strict=True):
            moments: list[Tensor] = []
            notes = Notes(bad={}, transparent=0)
            for rows in batches:
                batch = next(loader)
                found = {each.name: each.reason for each in batch["bad"]}
                if found and not self.data.skip_bad_images:
                    batch["bad"] = [BadImage(self.source.name(int(index)), reason) for index, reason in found.items()]
                    check_batch(batch, skip_bad_images=False)
                notes["bad"] |= found
                notes["transparent"] += batch["transparent"]
                good = torch.tensor([str(index) not in found for index in rows])
                moments.append(self._moments(batch["pixel_values"], good, self.shape(number)))
                done(len(rows))
            yield {"moments": torch.cat(moments)}, notes

    @torch.no_grad()
    def _moments(self, pixels: Tensor, good: Tensor, shape: Sequence[int]) -> Tensor:
        """fp16 [n, F, 2, C, h, w] on the CPU; zeros where ``good`` [n] is not set, which has as many ones as ``pixels`` has rows."""
        moments = torch.zeros(len(good), *shape, dtype=torch.float16)
        if good.any():
            for flip in range(moments.shape[1]):
                found = torch.stack(self.encoder.posterior(pixels.flip(-1) if flip else pixels), 1)
                moments[good, flip] = found.to("cpu", torch.float16)
        return moments


@dataclass(frozen=True)
class TextShards:
    """The text states of captions, by the names of their family; see `immiscible.encoding.cache`.

    Args:
        parts: of the checkpoint.
        captions: each once.
        device: where the text encoder is.
        batch_size: captions encoded together.
        rows_per_shard: captions of a file.
        rules: with the trigger word that the text encoder reads in captions.
    """

    parts: CheckpointParts
    captions: Sequence[str]
    device: torch.device
    batch_size: int
    rows_per_shard: int
    rules: CaptionRules = AS_THEY_ARE

    @cached_property
    def rows(self) -> list[Sequence[int]]:
        """The captions of each shard."""
        return _parts(range(len(self.captions)), self.rows_per_shard)

    @property
    def bytes(self) -> int:
        """Of all captions: all their text states."""
        return 2 * len(self.captions) * sum(map(math.prod, self.parts.text_shapes.values()))

    @torch.no_grad()
    def __call__(self, numbers: Sequence[int], done: Callable[[int], object]) -> Iterator[Shard]:
        """As `ImageShards`; no caption is a bad one."""
        for number in numbers:
            parts = []
            for rows in _parts(self.rows[number], self.batch_size):
                encoded = self.parts.texts(self.rules.told([self.captions[row] for row in rows]), self.device)
                parts.append({name: states.to("cpu", torch.float16) for name, states in encoded.items()})
                done(len(rows))
            yield {name: torch.cat([part[name] for part in parts]) for name in parts[0]}, Notes(bad={}, transparent=0)


def _parts(rows: Sequence[int], count: int) -> list[Sequence[int]]:
    """Of at most ``count`` rows each."""
    return [rows[start : start + count] for start in range(0, len(rows), count)]


def distinct_captions(source: ImageSource, accelerator: Accelerator, *, skip_bad_images: bool) -> list[str]:
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
            elif not skip_bad_images:
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
