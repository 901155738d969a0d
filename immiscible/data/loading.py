"""From flags to batches: the source that they name, the order of its images, and the loader."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from inspect import signature
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from torch.utils.data._utils import signal_handling

from immiscible.data.arguments import DataArguments, ImageArguments, TextDataArguments
from immiscible.data.batches import BadImage, Batch, BucketOrder, GlobalBatchOrder, ImageDataset, Images, check_batch, collate
from immiscible.data.buckets import Buckets
from immiscible.data.bundled import BUNDLED
from immiscible.data.folders import image_folder
from immiscible.data.listing import check_one_kind, list_folder
from immiscible.data.shards import load_shards
from immiscible.data.sources import ImageSource, Subset, split_source
from immiscible.data.stream_order import StreamDataset, StreamOrder
from immiscible.data.streaming import Stream, load_stream
from immiscible.data.tables import TableImages, hub_images, parquet_images
from immiscible.data.transforms import ImageTransform
from immiscible.errors import UserError, first_line, short
from immiscible.flags import given
from immiscible.randomness import seeded_generator

logger = logging.getLogger(__name__)


def training_source(arguments: DataArguments, labels_for: str | None) -> ImageSource | Stream:
    """The images that the flags of ``train_unconditional.py`` name.

    Args:
        arguments: the flags.
        labels_for: the flag that needs the images' classes; None if the run does without.

    Raises:
        UserError: as `load_images` or, with ``--streaming``, `load_stream`.
    """
    load = load_stream if arguments.streaming else load_images
    data = given(arguments, DataArguments)
    chosen: dict[str, Any] = {name: data[name] for name in signature(load).parameters if name in data}
    return load(**chosen, labels_for=labels_for)


def captioned_source(arguments: TextDataArguments, labels_for: str | None) -> ImageSource | Stream:
    """The images that the flags of the Stable Diffusion scripts name, with their captions.

    Args:
        arguments: the flags.
        labels_for: the flag that needs classes, for which the captions' are taken; None if the run does without.

    Raises:
        UserError: as `load_images` or, with ``--streaming``, `load_stream`; or classes are needed and the captions are texts.
    """
    named: dict[str, Any] = {
        "dataset_name": arguments.dataset_name,
        "dataset_config_name": arguments.dataset_config_name,
        "train_data_dir": arguments.train_data_dir,
        "image_column": arguments.image_column,
        "caption_column": arguments.caption_column,
        "cache_dir": arguments.cache_dir,
    }
    if arguments.streaming:
        return load_stream(**named, label_column=arguments.caption_column if labels_for else None, labels_for=labels_for)
    source = load_images(
        **named,
        max_train_samples=arguments.max_train_samples,
        train_subset_fraction=arguments.train_subset_fraction,
        skip_bad_images=arguments.skip_bad_images,
    )
    if labels_for is None:
        return source
    classed = with_prompt_classes(source, arguments.caption_column)
    if classed is None:
        raise UserError(
            f"{labels_for} needs classes, and --caption_column {arguments.caption_column} holds texts: name a column of classes "
            f"(ClassLabel); --coupling_condition centered and penalty take texts"
        )
    return classed


def with_held_out(
    load: Callable[[Any, str | None], Any], arguments: ImageArguments, labels_for: str | None, *, share: float | None, folder: str | None
) -> tuple[Any, ImageSource | None]:
    """The images to train on, and those held out: a share of them, or what a folder holds, or None.

    Args:
        load: `training_source` or `captioned_source`.
        arguments: the flags that it takes.
        labels_for: see there.
        share: ``--validation_split``.
        folder: ``--eval_data_dir``.

    Raises:
        UserError: as ``load``; a share that leaves nothing; or a folder with other classes.
    """
    source = load(arguments, labels_for)
    if share is not None:
        return split_source(source, share)
    if folder is None:
        return source, None
    elsewhere: dict[str, Any] = dict.fromkeys(["dataset_name", "dataset_config_name", "max_train_samples", "train_subset_fraction"])
    if arguments.bundled_data:
        elsewhere["bundled_data"] = None
    try:
        held_out = load(replace(arguments, train_data_dir=folder, **elsewhere), labels_for)
    except UserError as error:
        raise UserError(str(error).replace("--train_data_dir", "--eval_data_dir"), error.exit_code) from None
    if labels_for and held_out.class_names != source.class_names:
        known, found = (", ".join(map(short, names or ())) for names in (source.class_names, held_out.class_names))
        raise UserError(f"--eval_data_dir {folder} has the classes {found}; it must have those of the training images, {known}")
    return source, held_out


def prompt_classes(source: ImageSource | Stream, caption_column: str) -> Sequence[str] | None:
    """The names of the classes that the caption column holds, by number; None if it holds texts."""
    while isinstance(source, Subset):
        source = source.source
    texts = getattr(source, "texts", None)
    return None if texts is None else getattr(texts.features[caption_column], "names", None)


def with_prompt_classes(source: ImageSource, caption_column: str) -> ImageSource | None:
    """The same images, the classes that the caption column holds for labels; None if it holds texts."""
    return None if prompt_classes(source, caption_column) is None else _with_classes(source)


def _with_classes(source: ImageSource) -> ImageSource:
    """The same images, their captions' classes for labels."""
    if isinstance(source, Subset):
        return replace(source, source=_with_classes(source.source))
    assert isinstance(source, TableImages)
    return replace(source, labels=source.texts)


def load_images(
    *,
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    train_data_dir: str | None = None,
    bundled_data: str = "digits",
    image_column: str = "image",
    label_column: str | None = None,
    labels_for: str | None = None,
    caption_column: str | None = None,
    cache_dir: str | None = None,
    max_train_samples: int | None = None,
    train_subset_fraction: float | None = None,
    skip_bad_images: bool = False,
    resolution: int = 64,
) -> ImageSource:
    """The training images: a dataset of the Hub, else a local folder, else bundled data.

    Args:
        dataset_name: what `datasets.load_dataset` takes; its ``train`` split is used.
        dataset_config_name: the dataset's configuration.
        train_data_dir: a folder of images (with or without a subfolder per class), or one that holds ``.parquet`` files or WebDataset
            shards (``.tar``, see `immiscible.data.tars`, where what is called columns here is explained for them) at any depth.
        bundled_data: a key of `BUNDLED`; used when the two above are None.
        image_column: the column of images in a Hub dataset or in parquet files.
        label_column: the column of classes, a `datasets.ClassLabel`; None for the one called ``label``, if it is of that kind. An image
            folder has it if all its images lie in subfolders of one depth, two at least: one per class, in the order of their names.
        labels_for: the flag that needs classes; None if the run does without.
        caption_column: the column of captions, texts or lists of texts or classes; None if the run does without.
        cache_dir: where `datasets` keeps its tables; None for its default.
        max_train_samples: use that many images, the same ones for every seed; more than there are means all.
        train_subset_fraction: use this share of the images, rounded to whole ones, the same ones for every seed.
        skip_bad_images: use what stands before the damage of a damaged ``.tar``.
        resolution: side of the crops of ``photo_crops``; the other sources keep their sizes.

    Raises:
        UserError: nothing there, no such column, both sources given, a number below 1, or no classes where ``labels_for`` needs them.
    """
    if dataset_name is not None and train_data_dir is not None:
        raise UserError("--dataset_name and --train_data_dir are both given; choose one")
    if max_train_samples is not None and max_train_samples < 1:
        raise UserError(f"--max_train_samples {max_train_samples} is below 1")
    columns = (image_column, label_column, labels_for, caption_column, cache_dir)
    if dataset_name is not None:
        source: ImageSource = hub_images(dataset_name, dataset_config_name, *columns)
    elif train_data_dir is None:
        source = _bundled_images(bundled_data, resolution, labels_for)
    else:
        source = _local_images(train_data_dir, *columns, skip_bad_images)
    return _drawn(source, max_train_samples, train_subset_fraction)


def _local_images(
    folder: str,
    image_column: str,
    label_column: str | None,
    labels_for: str | None,
    caption_column: str | None,
    cache_dir: str | None,
    skip_bad_images: bool,
) -> ImageSource:
    """What a folder holds, of the one kind that it holds; says in one line what of it is left out."""
    listing = list_folder(folder)
    check_one_kind(listing, folder, image_column)
    columns = (image_column, label_column, labels_for, caption_column)
    source: ImageSource
    if listing.images:
        source = image_folder(listing, *columns, skip_bad_images)
    elif listing.shards:
        source = load_shards(listing, *columns, cache_dir, skip_bad_images)
    else:
        source = parquet_images(listing, *columns, cache_dir)
    if listing.left_out:
        logger.warning("left out of %s: %s", listing.root, "; ".join(listing.left_out))
    return source


def _bundled_images(name: str, resolution: int, labels_for: str | None) -> ImageSource:
    if name not in BUNDLED:
        raise UserError(f"--bundled_data {name!r} is unknown; known: {', '.join(BUNDLED)}")
    source = BUNDLED[name](resolution)
    if labels_for and source.class_names is None:
        raise UserError(f"{labels_for} needs classes, and --bundled_data {name} has none; choose data with classes, e.g. digits")
    return source


def _drawn(source: ImageSource, count: int | None, share: float | None) -> ImageSource:
    """``count`` of the images, or a ``share`` of them; all if both are None."""
    if share is not None:
        count = round(share * len(source))
        if count < 1:
            raise UserError(f"--train_subset_fraction {share:g} of {len(source)} images leaves none; give a larger share")
    if count is None or count >= len(source):
        return source
    drawn = torch.randperm(len(source), generator=seeded_generator("max_train_samples"))[:count]
    return Subset(source, drawn.tolist())


def batch_order(
    source: ImageSource | Stream,
    arguments: ImageArguments,
    *,
    batch_size: int,
    seed: int,
    rank: int,
    num_processes: int,
    buckets: Buckets | None = None,
    window: int = 1,
) -> GlobalBatchOrder | StreamOrder:
    """Which images a rank takes for which micro-batch; ``stop`` is to be set.

    Args:
        source: the images.
        arguments: of a stream ``shuffle_buffer``, ``skip_bad_images`` and ``cache_dir`` say how it is read.
        batch_size: images a rank sees in a micro-batch.
        seed: the run's seed.
        rank: this process.
        num_processes: ranks.
        buckets: of the images, or None.
        window: micro-batches that are paired together, which then are of one bucket.

    Raises:
        UserError: see `StreamOrder` and `BucketOrder`.
    """
    ranks = {"rank": rank, "num_processes": num_processes}
    if buckets is not None:
        return BucketOrder(buckets, batch_size, seed, window=window, stop=0, **ranks)
    if not isinstance(source, Stream):
        return GlobalBatchOrder(len(source), batch_size, seed, stop=0, **ranks)
    return StreamOrder(
        source,
        batch_size,
        seed,
        stop=0,
        **ranks,
        shuffle_buffer=arguments.shuffle_buffer,
        skip_bad_images=arguments.skip_bad_images,
        cache_dir=arguments.cache_dir,
    )


def training_images(
    source: ImageSource | Stream,
    transform: ImageTransform,
    *,
    skip_bad_images: bool = False,
    with_labels: bool = False,
    with_captions: bool = False,
    with_geometry: bool = False,
    buckets: Buckets | None = None,
) -> ImageDataset | StreamDataset:
    """What the loader loads, for the keys of `batch_order`; the arguments are those of `ImageDataset`, of which a stream has no buckets.

    Raises:
        UserError: classes are needed, and the source has none.
    """
    told = {"with_labels": with_labels, "with_captions": with_captions, "with_geometry": with_geometry}
    if isinstance(source, Stream):
        return StreamDataset(source, transform, skip_bad_images, **told)
    return ImageDataset(source, transform, skip_bad_images, **told, buckets=buckets)


def build_loader(dataset: Dataset[Any], order: Iterable[list[Any]], num_workers: int, device: torch.device) -> DataLoader[Batch]:
    """A loader of `Batch`, on the CPU (pinned if ``device`` is a GPU), in ``order``, that draws nothing from the global generators."""
    signal_handling._SIGCHLD_handler_set = True  # keeps torch's own away, which raises in the middle of a step; its iterator notices, too
    return DataLoader(
        dataset,
        batch_sampler=order,
        collate_fn=collate,
        num_workers=num_workers,
        pin_memory=device.type == "cuda",
        persistent_workers=num_workers > 0,
        worker_init_fn=_leave_signals_to_the_parent,
        generator=torch.Generator(),
    )


def _leave_signals_to_the_parent(worker: int) -> None:
    # Ctrl-C and a scheduler's SIGTERM reach the whole process group. The parent must find its workers alive while it finishes the
    # step and saves; they end when it closes the loader, sends them SIGTERM itself as multiprocessing does at exit, or is gone
    # (torch's watchdog). Only sigwaitinfo tells the sender; where it is missing, torch's own handler stays, which obeys anyone.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_at_the_parents_sigterm, daemon=True).start()


def _end_at_the_parents_sigterm() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def _whole(batches: Iterable[Batch]) -> Iterator[Batch]:
    """The batches; the end of a loader process, of which torch says so by a `RuntimeError`, is a failure that the run can save before."""
    try:
        yield from batches
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise UserError(
            f"a process that decodes images has ended ({first_line(error)}), for want of memory perhaps: lower --dataloader_num_workers",
            exit_code=1,
        ) from None


def images_of(loader: DataLoader[Batch], skip_bad_images: bool) -> Iterator[Images]:
    """The images of each batch, on the CPU, with what else the dataset gives; names each skipped image once, and counts them.

    That images are transparent is told when the first is met, and how many were at the end.

    Raises:
        UserError: as `check_batch`; or (exit code 1) a loader process is gone.
    """
    skipped: set[BadImage] = set()
    seen = transparent = 0
    try:
        for batch in _whole(loader):
            for bad in check_batch(batch, skip_bad_images):
                if bad not in skipped:
                    skipped.add(bad)
                    logger.warning("skipped image %s: %s (%d skipped so far)", bad.name, bad.reason, len(skipped))
            if batch["transparent"] and not transparent:
                logger.warning("transparent images are laid upon --alpha_color (white by default); how many is told at the end")
            seen, transparent = seen + len(batch["pixel_values"]), transparent + batch["transparent"]
            yield Images(batch["pixel_values"], batch["labels"], batch["captions"], batch["geometry"])
    finally:
        if transparent:
            logger.warning("transparent: %d of %d images read", transparent, seen)


def unlabelled_images(batches: Iterator[Batch], skip_bad_images: bool) -> Iterator[Images]:
    """As `images_of` of a loader's iterator, the pixels alone and without a word: of images that will be met again.

    Raises:
        UserError: as `images_of`.
    """
    for batch in _whole(batches):
        check_batch(batch, skip_bad_images)
        yield Images(batch["pixel_values"])
