"""The flags of the data."""

from __future__ import annotations

from dataclasses import dataclass

from immiscible.data.bundled import BUNDLED
from immiscible.flags import flag

CROPS = ("diffusers", "adm")


@dataclass
class DataArguments:
    """Which images, and how they are cropped."""

    _argument_group_name = "data"

    dataset_name: str | None = flag(None, "a data set on the hub (its `train` split), or a local folder that `datasets` can load")
    dataset_config_name: str | None = flag(None, "the configuration of --dataset_name")
    train_data_dir: str | None = flag(None, "a folder of images (subfolders allowed), of parquet files or of WebDataset shards (.tar)")
    bundled_data: str | None = flag(
        None, "real images that install with the packages: 1,797 digits of 8x8, or random crops of photographs", choices=BUNDLED
    )
    image_column: str = flag("image", "the column of the data set that holds the images")
    label_column: str | None = flag(
        None, "the column of the data set that holds the classes (ClassLabel), where a flag needs them; by default `label`"
    )
    cache_dir: str | None = flag(None, "where downloaded data sets are kept")
    resolution: int = flag(64, "images are resized and cropped to this many pixels a side")
    center_crop: bool = flag(False, "crop the center instead of a random place")
    random_flip: bool = flag(False, "flip half of the images left to right")
    crop: str = flag(
        "diffusers",
        "diffusers: resize the short side, then cut; adm: halve by box filters, then bicubic, and cut the center, as ImageNet papers do",
        choices=CROPS,
    )
    preserve_input_precision: bool = flag(False, "keep 16 and 32-bit images at their precision instead of converting to 8-bit")
    max_train_samples: int | None = flag(None, "train on at most this many images, a fixed random subset")
    train_subset_fraction: float | None = flag(
        None, "train on this share of the images, a fixed random subset that does not depend on --seed: 0.1 is the paper's 10 % of ImageNet"
    )
    skip_bad_images: bool = flag(False, "replace unreadable images by the next one and count them, instead of stopping")
    streaming: bool = flag(
        False,
        "read .tar or .parquet shards from front to back, over the network if --dataset_name is on the hub, and keep nothing on disk; "
        "epochs are not counted, so give --max_train_steps",
    )
    shuffle_buffer: int = flag(1000, "with --streaming: images of one shard that are shuffled together")
    dataloader_num_workers: int = flag(0, "processes that decode images; 0 decodes in the training process")


INTERPOLATIONS = ("nearest", "nearest_exact", "bilinear", "bicubic", "box", "hamming", "lanczos")


@dataclass
class TextDataArguments:
    """Which images and captions, and how the images are cropped."""

    _argument_group_name = "data"

    dataset_name: str | None = flag(None, "a data set on the hub (its `train` split), or a local folder that `datasets` can load")
    dataset_config_name: str | None = flag(None, "the configuration of --dataset_name")
    train_data_dir: str | None = flag(
        None, "a folder of images with a metadata.jsonl that has their captions, of parquet files, or of WebDataset shards (.tar)"
    )
    image_column: str = flag("image", "the column of the data set that holds the images")
    caption_column: str = flag(
        "text",
        "the column of the captions: text, a list of texts of which each epoch takes one, or classes (ClassLabel), whose names become "
        "the prompts, by number; for .tar shards `text` is the .txt member, any other name a key of the .json member",
    )
    proportion_empty_prompts: float = flag(0.0, "share of the images that are trained without their caption, for guidance")
    cache_dir: str | None = flag(None, "where downloaded data sets and models are kept")
    resolution: int = flag(512, "images are resized and cropped to this many pixels a side")
    center_crop: bool = flag(False, "crop the center instead of a random place")
    random_flip: bool = flag(False, "flip half of the images left to right")
    image_interpolation_mode: str = flag("lanczos", "how images are resized", choices=INTERPOLATIONS)
    crop: str = flag(
        "diffusers",
        "diffusers: resize the short side, then cut; adm: halve by box filters, then bicubic, and cut the center, as ImageNet papers do",
        choices=CROPS,
    )
    max_train_samples: int | None = flag(None, "train on at most this many images, a fixed random subset")
    train_subset_fraction: float | None = flag(
        None, "train on this share of the images, a fixed random subset that does not depend on --seed"
    )
    skip_bad_images: bool = flag(False, "replace unreadable images by the next one and count them, instead of stopping")
    streaming: bool = flag(
        False,
        "read .tar or .parquet shards from front to back, over the network if --dataset_name is on the hub, and keep nothing on disk; "
        "epochs are not counted, so give --max_train_steps",
    )
    shuffle_buffer: int = flag(1000, "with --streaming: images of one shard that are shuffled together")
    dataloader_num_workers: int = flag(0, "processes that decode images; 0 decodes in the training process")
