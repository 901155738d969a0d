"""The flags of the data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from immiscible.errors import UserError
from immiscible.flags import Names, flag

CROPS = ("diffusers", "adm")
MOST_PIXELS = 2**14  # a side
INTERPOLATIONS = ("nearest", "nearest_exact", "bilinear", "bicubic", "box", "hamming", "lanczos")


@dataclass
class ImageArguments:
    """Which images, and how they are cropped: what all scripts share.

    What only one of them has a flag for stands here as what it is for the others: ``bundled_data``, ``label_column``, ``caption_column``,
    ``preserve_input_precision`` and ``buckets``.
    """

    dataset_name: str | None = flag(None, "a data set on the hub (its `train` split), or a local folder that `datasets` can load")
    dataset_config_name: str | None = flag(None, "the configuration of --dataset_name")
    train_data_dir: str | None = flag(
        None, "a folder of images (subfolders allowed), a .zip of one, a folder of parquet files or of WebDataset shards (.tar)"
    )
    image_column: str = flag("image", "the column of the data set that holds the images", alias="dataset_image_column_name")
    cache_dir: str | None = flag(None, "where downloaded data sets and models are kept")
    resolution: int = flag(64, "images are resized and cropped to this many pixels a side", least=1, most=MOST_PIXELS)
    center_crop: bool = flag(False, "crop the center instead of a random place")
    random_flip: bool = flag(False, "flip half of the images left to right")
    crop: str = flag(
        "diffusers",
        "diffusers: resize the short side, then cut; adm: halve by box filters, then bicubic, and cut the center, as ImageNet papers do",
        choices=CROPS,
    )
    image_interpolation_mode: str = flag(
        "bilinear", "how images are resized, with --crop diffusers", choices=INTERPOLATIONS, alias="interpolation_type"
    )
    alpha_color: str | None = flag(
        None, "what transparent images are laid upon: a name, #rrggbb or rgb(r,g,b); white by default; not used with 4 channels"
    )
    max_train_samples: int | None = flag(None, "train on at most this many images, a fixed random subset", least=1, most=10**12)
    train_subset_fraction: float | None = flag(
        None,
        "train on this share of the images, a fixed random subset that does not depend on --seed: 0.1 is the paper's 10 % of ImageNet",
        above=0,
        most=1,
    )
    skip_bad_images: bool = flag(False, "replace unreadable images by the next one and count them, instead of stopping")
    streaming: bool = flag(
        False,
        "read .tar or .parquet shards from front to back, over the network if --dataset_name is on the hub, and keep nothing on disk; "
        "epochs are not counted, so give --max_train_steps",
    )
    shuffle_buffer: int = flag(1000, "with --streaming: images of one shard that are shuffled together", least=1)
    dataloader_num_workers: int = flag(0, "processes that decode images; 0 decodes in the training process", least=0, most=1024)

    if TYPE_CHECKING:  # flags of one of the subclasses, constants of the other
        bundled_data: str | None = None
        label_column: str | None = None
        caption_column: str | None = None
        preserve_input_precision: bool = False
        buckets: str | None = None

    @property
    def named_sources(self) -> list[str]:
        """The flags that name data, of those that are given."""
        named = ("dataset_name", "train_data_dir", "bundled_data")
        return [f"--{name}" for name in named if getattr(self, name)]

    def check(self) -> None:
        """What these flags can get wrong.

        Raises:
            UserError: they contradict each other.
        """
        if self.alpha_color is not None:
            from PIL import ImageColor

            try:
                ImageColor.getrgb(self.alpha_color)
            except ValueError:
                raise UserError(
                    f"--alpha_color {self.alpha_color!r} is no color that Pillow knows; give a name such as black, #rrggbb or rgb(r,g,b)"
                ) from None
        if len(self.named_sources) > 1:
            raise UserError(f"{' and '.join(self.named_sources)} are given together; choose one source of images")
        if self.train_subset_fraction is not None and self.max_train_samples is not None:
            raise UserError("--train_subset_fraction and --max_train_samples both say how many images are used; give one of them")
        if not self.streaming:
            return
        if not (self.dataset_name or self.train_data_dir):
            raise UserError("--streaming is for --dataset_name or --train_data_dir; leave it out")
        for name in ("max_train_samples", "train_subset_fraction"):
            if getattr(self, name) is not None:
                raise UserError(f"--{name} needs images in any order, which --streaming does not give; leave out one of them")


@dataclass
class DataArguments(ImageArguments):
    """Which images, and how they are cropped, for ``train_unconditional.py``."""

    _argument_group_name = "data"
    caption_column = buckets = None

    bundled_data: str | None = flag(
        None,
        "real images that install with the packages: 1,797 digits of 8x8, or random crops of photographs",
        choices=Names("immiscible.data.bundled", "BUNDLED"),
    )
    label_column: str | None = flag(
        None,
        "the column of the data set that holds the classes (ClassLabel), where a flag needs them; by default `label`",
        alias="dataset_class_label_column_name",
    )
    preserve_input_precision: bool = flag(False, "keep 16 and 32-bit images at their precision instead of converting to 8-bit")

    def check(self) -> None:
        """See `ImageArguments.check`."""
        super().check()
        if self.label_column and self.bundled_data:
            raise UserError("--label_column names a column of --dataset_name or --train_data_dir; bundled data needs none")
        if self.crop == "adm" and self.preserve_input_precision:
            raise UserError("--crop adm is defined for 8-bit images, which --preserve_input_precision avoids; leave one of them out")
        for other, resizes in (("--crop adm", self.crop == "adm"), ("--preserve_input_precision", self.preserve_input_precision)):
            if resizes and self.image_interpolation_mode != "bilinear":
                raise UserError(
                    f"--image_interpolation_mode {self.image_interpolation_mode}: {other} resizes in its own way; leave one of them out"
                )


@dataclass
class TextDataArguments(ImageArguments):
    """Which images and captions, and how the images are cropped."""

    _argument_group_name = "data"
    bundled_data = label_column = None
    preserve_input_precision = False

    resolution: int = flag(512, "images are resized and cropped to this many pixels a side", least=1, most=MOST_PIXELS)
    train_data_dir: str | None = flag(
        None,
        "a folder of images with their captions in .txt files beside them or in a metadata.jsonl (or a .zip of one), of parquet files, or "
        "of WebDataset shards (.tar)",
    )
    caption_column: str = flag(
        "text",
        "the column of the captions: text, a list of texts of which each epoch takes one, or classes (ClassLabel), whose names become "
        "the prompts, by number; for .tar shards and for files beside images `text` is .txt, any other name a key of .json",
    )
    proportion_empty_prompts: float = flag(0.0, "share of the images that are trained without their caption, for guidance", least=0, most=1)
    image_interpolation_mode: str = flag("lanczos", "how images are resized, with --crop diffusers", choices=INTERPOLATIONS)
    buckets: str | None = flag(
        None,
        "train on images of several shapes, a batch of one: auto for sizes of about as many pixels as the square of --resolution, or the "
        "sizes as height,width;height,width: each image goes to the one nearest in aspect ratio and is cropped to it, never stretched",
        alias="aspect_ratio_buckets",
    )
    bucket_step: int = flag(64, "with --buckets auto: the sides are multiples of this", least=1, most=MOST_PIXELS)
    bucket_max_ratio: float = flag(2.0, "with --buckets auto: the longer side over the shorter one, at most", least=1, most=100)

    def check(self) -> None:
        """See `ImageArguments.check`."""
        super().check()
        if not self.named_sources:
            raise UserError("--dataset_name or --train_data_dir is required: images with captions")
        if self.buckets is None or self.buckets != "auto":
            for name in ("bucket_step", "bucket_max_ratio"):
                if getattr(self, name) != getattr(TextDataArguments, name):
                    raise UserError(f"--{name} is of --buckets auto; leave it out, or give that")
        if self.buckets is None:
            return
        if self.streaming:
            raise UserError("--buckets needs the sizes of all images beforehand, which --streaming does not give; leave out one of them")
        if self.crop == "adm":
            raise UserError("--crop adm cuts squares as papers on ImageNet do; leave out it or --buckets")
