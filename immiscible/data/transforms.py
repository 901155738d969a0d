"""From an image of any size and mode to a square of pixels, or to the rectangle of its bucket."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageColor
from torch import Tensor

from immiscible.data.arguments import ImageArguments
from immiscible.errors import UserError
from immiscible.randomness import derive_seed

ROUNDING = 0.01  # of the range, by which a resized image may leave it
PIL_MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # channels -> Pillow's 8-bit mode


class Cut(NamedTuple):
    """What of an image is seen, before it is mirrored: the size to which it is resized, and where in that the crop begins."""

    height: int
    width: int
    top: int
    left: int


@dataclass(frozen=True)
class ImageTransform:
    """From an image of any size and mode to ``[channels, resolution, resolution]``, float32 in [-1, 1], as diffusers' example does it.

    The short side is resized to ``resolution`` (antialiased), a square is cut out, and perhaps mirrored. Crop and flip are
    functions of (seed, epoch, index), drawn apart, so that turning one off leaves the other as it was. Where a ``size`` is given, height
    and width of a bucket, it stands for the square: the image is resized until it covers that, and never stretched.

    Args:
        resolution: side in pixels.
        channels: 1, 3 or 4.
        center_crop: cut the square from the middle and not at a random place.
        random_flip: mirror left-right with probability 1/2.
        preserve_input_precision: keep the 16 or 32 bits of such images through the resizing; else every image becomes 8-bit first.
            Either way 16 bits span 0..65535, integers of 32 bits 0..2**31-1 and floats 0..1; values of another range are refused.
        seed: the run's seed.
        interpolation: how 8-bit images are resized, by Pillow's name in lower case; images of more bits are bilinear.
        crop: ``diffusers`` as above; ``adm`` as in the guided-diffusion papers on ImageNet: halve by box filters while twice the
            resolution fits, then bicubic, and the center square.
        alpha_color: what transparent images are laid upon, unless alpha is one of the channels; by Pillow's name, or ``#rrggbb``.

    Raises:
        UserError: another number of channels, or a resolution below 1.
    """

    resolution: int
    channels: int = 3
    center_crop: bool = False
    random_flip: bool = False
    preserve_input_precision: bool = False
    seed: int = 0
    interpolation: str = "bilinear"
    crop: str = "diffusers"
    alpha_color: str = "white"

    def __post_init__(self) -> None:
        if self.channels not in PIL_MODES:
            raise UserError(f"{self.channels} image channels are not supported; use 1 (gray), 3 (RGB) or 4 (RGBA)")
        if self.resolution < 1:
            raise UserError(f"--resolution {self.resolution} is below 1")

    def __call__(self, image: Image.Image | np.ndarray, epoch: int, index: int) -> Tensor:
        """`decode`, then `augment`."""
        return self.augment(self.decode(image), epoch, index)

    def decode(self, image: Image.Image | np.ndarray) -> Image.Image | Tensor:
        """The image in the wanted channels: 8-bit as a PIL image, or float32 [C,H,W] in [0,1] with ``preserve_input_precision``.

        Raises:
            ValueError: pixels that are NaN, infinite or of another range, or a mode that Pillow cannot convert.
        """
        if isinstance(image, np.ndarray):
            image = Image.fromarray(image)
        if image.mode.startswith(("I", "F")):
            gray = _unit_gray(image)
            if self.preserve_input_precision:
                return torch.cat([gray.expand(min(self.channels, 3), -1, -1), torch.ones_like(gray).expand(self.channels // 4, -1, -1)])
            # Pillow's own conversion would clip at 255, which turns most 16-bit images white and floats in 0..1 black.
            image = Image.fromarray(gray[0].clamp(0, 1).mul(255).round().to(torch.uint8).numpy())
        if self.is_laid_upon(image):
            rgba = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, ImageColor.getrgb(self.alpha_color)[:3]), rgba)
        elif image.mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")  # straight to RGB is the same but warns once per image
        image = image.convert(PIL_MODES[self.channels])
        return _bytes_tensor(image).div(255) if self.preserve_input_precision else image

    def is_laid_upon(self, image: Image.Image | np.ndarray) -> bool:
        """Whether the image has transparent pixels, below which `decode` puts ``alpha_color``; whatever color they hide is not seen."""
        if self.channels == 4 or not isinstance(image, Image.Image) or not image.has_transparency_data:
            return False
        if image.mode.startswith(("I", "F")):
            return False
        return bool(np.asarray(image.convert("RGBA").getchannel("A")).min() < 255)

    def augment(self, pixels: Image.Image | Tensor, epoch: int, index: int, size: tuple[int, int] | None = None) -> Tensor:
        """Resize, crop, flip and scale what `decode` returned: float32 [channels, *size] in [-1, 1]."""
        size = size or (self.resolution, self.resolution)
        cut = self.cut(*size_of(pixels), epoch, index, size)
        if isinstance(pixels, Tensor):
            if cut[:2] != tuple(pixels.shape[-2:]):
                pixels = torch.nn.functional.interpolate(pixels[None], cut[:2], mode="bilinear", antialias=True)[0]
        else:
            if self.crop == "adm":
                pixels, kernel = _halved(pixels, self.resolution), Image.Resampling.BICUBIC
            else:
                kernel = Image.Resampling[self.interpolation.removesuffix("_exact").upper()]
            pixels = _bytes_tensor(pixels.resize((cut.width, cut.height), kernel))
        pixels = pixels[:, cut.top : cut.top + size[0], cut.left : cut.left + size[1]]
        if self.flips(epoch, index):
            pixels = pixels.flip(-1)
        unit = pixels if pixels.is_floating_point() else pixels.to(torch.float32).div(255)
        return unit.sub(0.5).div(0.5).contiguous()

    def flips(self, epoch: int, index: int) -> bool:
        """Whether the image is mirrored in this epoch."""
        return self.random_flip and derive_seed(self.seed, "flip", epoch, index) % 2 == 1

    def original_size(self, image: Image.Image | np.ndarray) -> tuple[int, int]:
        """Height and width of what a source has loaded, before anything is done to it."""
        return size_of(image)

    def cut(self, height: int, width: int, epoch: int, index: int, size: tuple[int, int] | None = None) -> Cut:
        """What `augment` takes of an image of this height and width."""
        size = size or (self.resolution, self.resolution)
        resized = self._resized(height, width, size)
        top, left = (
            self._offset(side, whole - part, epoch, index) for side, whole, part in zip(("top", "left"), resized, size, strict=True)
        )
        return Cut(*resized, top, left)

    def geometry(
        self, height: int, width: int, epoch: int, index: int, size: tuple[int, int] | None = None
    ) -> tuple[int, int, int, int, int, int]:
        """What SDXL's network is told of a crop (arXiv:2307.01952, section 2.2): height and width of the original image, top and left of
        the crop in the resized one, height and width of the crop.

        Of a mirrored image the left is that of the crop in the mirror image, as in diffusers' ``train_text_to_image_sdxl.py``, which
        mirrors first.
        """
        size = size or (self.resolution, self.resolution)
        cut = self.cut(height, width, epoch, index, size)
        left = cut.width - size[1] - cut.left if self.flips(epoch, index) else cut.left
        return height, width, cut.top, left, *size

    def _resized(self, height: int, width: int, size: tuple[int, int]) -> tuple[int, int]:
        if self.crop == "adm":
            while min(height, width) >= 2 * self.resolution:
                height, width = height // 2, width // 2
            factor = self.resolution / min(height, width)
            return round(height * factor), round(width * factor)
        # The side that would be too short by the other's factor becomes the bucket's; the other is rounded down, as torchvision does it.
        if height * size[1] <= width * size[0]:
            return size[0], size[0] * width // height
        return size[1] * height // width, size[1]

    def _offset(self, side: str, extra: int, epoch: int, index: int) -> int:
        if self.crop == "adm":
            return extra // 2
        if self.center_crop:
            return round(extra / 2)  # torchvision's rule: halves go to the even neighbour
        return derive_seed(self.seed, "crop", side, epoch, index) % (extra + 1)


def image_transform(arguments: ImageArguments, channels: int, seed: int) -> ImageTransform:
    """What makes pixels of the images, as the flags say.

    Args:
        arguments: the flags.
        channels: of the pixels.
        seed: the run's seed.
    """
    return ImageTransform(
        arguments.resolution,
        channels,
        arguments.center_crop,
        arguments.random_flip,
        arguments.preserve_input_precision,
        seed,
        arguments.image_interpolation_mode,
        arguments.crop,
        arguments.alpha_color or "white",
    )


def size_of(image: Image.Image | np.ndarray | Tensor) -> tuple[int, int]:
    """Height and width of an image, of an array [H,W] or [H,W,3], or of a tensor [C,H,W]."""
    if isinstance(image, Image.Image):
        return image.height, image.width
    height, width = image.shape[-2:] if isinstance(image, Tensor) else image.shape[:2]
    return height, width


def _halved(image: Image.Image, resolution: int) -> Image.Image:
    while min(image.size) >= 2 * resolution:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    return image


def _bytes_tensor(image: Image.Image) -> Tensor:
    """uint8 [C,H,W] from a mode L, RGB or RGBA."""
    array = torch.from_numpy(np.array(image))
    return array[None] if array.ndim == 2 else array.permute(2, 0, 1)


def _unit_gray(image: Image.Image) -> Tensor:
    """float32 [1,H,W] from a 16 or 32-bit mode, 1 being the largest value of its integers.

    Raises:
        ValueError: pixels that are not finite, or of a range that would make nothing but white or black of them.
    """
    array = np.array(image)
    kind = array.dtype.kind
    largest = {"u": 65535, "i": 2**31 - 1, "f": 1}[kind]
    if not np.isfinite(array).all():
        raise ValueError("it has NaN or infinite pixels")
    low, high = array.min().item(), array.max().item()
    found = f"its {'floats' if kind == 'f' else 'integers'} reach from {low:g} to {high:g}"
    if low < -ROUNDING * largest or high > (1 + ROUNDING) * largest:
        raise ValueError(f"{found}, not from 0 to {largest}; save it as 8 or 16 bits")
    if kind == "i" and 0 < high <= 65535:  # of fewer bits, in a mode of more; 16 bits may just be dark
        raise ValueError(f"{found} and {largest} is white, so that all of it would be black; save it as {8 if high <= 255 else 16} bits")
    return torch.from_numpy((array.astype(np.float64) / largest).astype(np.float32))[None]
