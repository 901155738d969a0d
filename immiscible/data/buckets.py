"""Buckets of aspect ratios: images of several shapes in one run, each cropped as little as its shape allows.

Each image goes to the bucket whose aspect ratio is nearest in logarithm, is resized to cover it and cropped, never stretched. A batch holds
one bucket (`immiscible.data.batches.BucketOrder`), on all processes the same one.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from immiscible.data.arguments import MOST_PIXELS, TextDataArguments
from immiscible.data.image_sizes import image_shapes
from immiscible.data.sources import ImageSource, why_unreadable
from immiscible.errors import UserError, short

logger = logging.getLogger(__name__)

ALIKE = 1e-9  # in the logarithm of a ratio

Size = tuple[int, int]


@dataclass(frozen=True)
class Buckets:
    """Which bucket each image is in.

    Args:
        sizes: height and width of each bucket.
        of: int64 [N], the number of each image's bucket; -1 of one that cannot be read, which is in none.
    """

    sizes: Sequence[Size]
    of: Tensor

    def size_of(self, index: int) -> Size:
        """Height and width of an image's bucket."""
        return self.sizes[int(self.of[index])]

    @cached_property
    def members(self) -> list[Tensor]:
        """The images of each bucket, int64, ascending."""
        return [(self.of == number).nonzero()[:, 0] for number in range(len(self.sizes))]


def bucket_sizes(arguments: TextDataArguments) -> list[Size]:
    """Height and width of each bucket that ``--buckets`` asks for, from the flattest to the tallest.

    ``auto`` has the square of ``--resolution``, and for each shorter side in steps of ``--bucket_step`` the longest other one by which the
    bucket neither exceeds the square's pixels nor ``--bucket_max_ratio``, in both orientations; as long as the ratio grows.

    Raises:
        UserError: it is neither ``auto`` nor a list of sizes, or ``auto`` has one bucket alone.
    """
    if arguments.buckets != "auto":
        return _listed(str(arguments.buckets))
    step, ratio = arguments.bucket_step, arguments.bucket_max_ratio
    side = arguments.resolution // step * step
    found: list[Size] = [(side, side)] if side else []
    for short_side in range(side - step, 0, -step):
        longest = min(arguments.resolution**2 / short_side, ratio * short_side)
        long_side = int(longest + ALIKE) // step * step
        if long_side * found[-1][0] <= short_side * found[-1][1]:
            break
        found.append((short_side, long_side))
    if len(found) < 2:
        raise UserError(
            f"--buckets auto has no bucket beside the square at --resolution {arguments.resolution}, --bucket_step {step} and "
            f"--bucket_max_ratio {ratio:g}: give a smaller step or a larger ratio"
        )
    return [*reversed(found), *((width, height) for height, width in found[1:])]


def _listed(text: str) -> list[Size]:
    """``height,width;height,width``, as diffusers' ``--aspect_ratio_buckets`` has them."""
    try:
        sizes = [(int(height), int(width)) for height, width in (part.split(",") for part in text.split(";"))]
    except ValueError:
        raise UserError(f"--buckets {short(text)!r}: give auto, or sizes as height,width;height,width such as 512,512;448,576") from None
    for size in sizes:
        if not all(1 <= side <= MOST_PIXELS for side in size):
            raise UserError(f"--buckets {short(text)!r}: each side must be from 1 to {MOST_PIXELS}, not those of {_named(size)}")
        if sizes.count(size) > 1:
            raise UserError(f"--buckets {short(text)!r}: {_named(size)} is there twice")
    return sorted(sizes, key=lambda size: (size[0] / size[1], size))


def _named(size: Size) -> str:
    return f"{size[0]},{size[1]}"


def check_multiple(sizes: Sequence[Size], arguments: TextDataArguments, multiple: int, what: str) -> None:
    """Whether the sides of all buckets can be divided by what the network's parts divide images by.

    Args:
        sizes: of `bucket_sizes`.
        arguments: the flags.
        multiple: such as 8.
        what: that divides them.

    Raises:
        UserError: a side cannot.
    """
    odd = [size for size in sizes if any(side % multiple for side in size)]
    if odd and arguments.buckets == "auto":
        raise UserError(f"--bucket_step {arguments.bucket_step} must be a multiple of {multiple}, by which {what} divides images")
    if odd:
        raise UserError(f"--buckets: the sides of {_named(odd[0])} must be multiples of {multiple}, by which {what} divides images")


def nearest_bucket(shapes: Tensor, sizes: Sequence[Size]) -> Tensor:
    """The bucket with the nearest logarithm of the aspect ratio, and of several with that ratio the one nearest in pixels.

    Args:
        shapes: height and width of each image, int64 [N, 2]; 0 of one that has none.
        sizes: of the buckets.

    Returns:
        int64 [N], -1 where there is no shape.
    """
    logs, of_buckets = (torch.as_tensor(each, device="cpu").double().log() for each in (shapes, sizes))
    ratios = (logs[:, None] - of_buckets).diff(dim=2)[..., 0].abs()  #   [N, buckets]
    areas = (logs[:, None] - of_buckets).sum(2).abs()
    nearest = areas.masked_fill(ratios > ratios.min(1, keepdim=True).values + ALIKE, torch.inf).argmin(1)
    return nearest.masked_fill((shapes <= 0).any(1), -1)


def assigned_buckets(source: ImageSource, sizes: Sequence[Size], arguments: TextDataArguments) -> Buckets:
    """The bucket of each image of a source.

    Args:
        source: the images, or what stands for them in a latent cache.
        sizes: of the buckets.
        arguments: of them ``cache_dir``, see `image_shapes`, and ``skip_bad_images``.

    Raises:
        UserError: an image cannot be read and ``skip_bad_images`` is off.
    """
    buckets = Buckets(sizes, nearest_bucket(image_shapes(source, arguments.cache_dir), sizes))
    if len(bad := (buckets.of < 0).nonzero()[:, 0].tolist()):
        first = source.name(bad[0])
        reason = _why(source, bad[0])
        if not arguments.skip_bad_images:
            raise UserError(f"cannot read image {first}: {reason}; remove it or pass --skip_bad_images", exit_code=1)
        logger.warning("skipped %d images that cannot be read and so are in no bucket, the first %s: %s", len(bad), first, reason)
    return buckets


def _why(source: ImageSource, index: int) -> str:
    """What is wrong with an image whose size is not known."""
    try:
        source.load(index)
    except Exception as error:  # Pillow's decoders raise nearly any type
        return why_unreadable(error)
    return "its size cannot be read"
