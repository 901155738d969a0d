"""Real images that samples are held against: images in files, or statistics of them, own or published."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from immiscible.data.bundled import BUNDLED
from immiscible.data.transforms import ImageTransform
from immiscible.errors import UserError
from immiscible.evaluation.image_files import ImageFiles, NpzFiles, SourceFiles, load_source
from immiscible.evaluation.kept_features import MeasuredImages, measure_together
from immiscible.evaluation.scoring import Available, available
from immiscible.evaluation.statistics import (
    Reference,
    StatisticsKey,
    holds_statistics,
    keep_statistics,
    kept_statistics,
    read_reference,
)
from immiscible.files import file_facts
from immiscible.processes import from_main_process, on_main_process

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class RealImages:
    """What ``--reference`` names.

    Attributes:
        named: the flag and what it names.
        images: None where there are statistics alone.
        file: of statistics, or None.
    """

    named: str
    images: ImageFiles | None
    file: Reference | None

    def available(self, given: Collection[str]) -> Available:
        """What is there of what a network gives of images."""
        images = self.images
        found = Available(self.named, (), ()) if images is None else available(self.named, given, labels=images.has_labels, captions=False)
        return found if self.file is None else Available(self.named, found.fields, set(self.file.statistics) & set(given))

    def facts(self) -> dict[str, Any]:
        """What says which images these are, for the JSON."""
        found: dict[str, Any] = {"images": self.file.statistics["features"].count if self.images is None and self.file else None}
        if self.images is not None:
            found = {"images": self.images.count, "data": self.images.fingerprint, "crop": self.images.crop or None}
        return found if self.file is None else {**found, "sha256": file_facts(self.file.path)["sha256"]}

    def measure(
        self,
        accelerator: Accelerator,
        network: Any,
        folder: Path,
        *,
        rows: Collection[str],
        moments: Collection[str],
        key: Callable[[MeasuredImages], StatisticsKey],
    ) -> MeasuredImages:
        """`measure_together`; but means and covariances, where they are all that is needed, may be known from a file, or from before.

        Args:
            accelerator: of the processes.
            network: see `measure`.
            folder: see `measure`.
            rows: fields of which each image is needed.
            moments: fields of which mean and covariance are.
            key: of the statistics of images that were read.

        Raises:
            UserError: see `measure_together`.
        """
        if self.images is None or self.file is not None:
            found = MeasuredImages(folder)
            if rows and self.images is not None:
                found = measure_together(accelerator, self.images, network, rows, folder, "features of the reference")
            found.statistics.update(self.file.statistics if self.file else {})
            return found
        if rows:
            return measure_together(accelerator, self.images, network, {*rows, *moments}, folder, "features of the reference")
        read = measure_together(accelerator, self.images, network, (), folder, "reading the reference")

        def known() -> bool:
            read.statistics.update(kept_statistics(key(read)))
            return set(moments) <= read.statistics.keys()

        if from_main_process(accelerator, known):
            return read
        found = measure_together(accelerator, self.images, network, moments, folder, "features of the reference")
        on_main_process(accelerator, lambda: keep_statistics(key(found), {name: found.moments(name) for name in moments}))
        return found


def open_real(
    name: str, flag: str, *, side: int, channels: int, crop: Literal["diffusers", "adm"] = "diffusers", with_labels: bool = False
) -> RealImages:
    """Real images as squares of the samples' size, or statistics.

    Args:
        name: of bundled data, or the path of a folder as ``--train_data_dir`` takes it, or of an ``.npz`` of images or statistics.
        flag: that gave it.
        side: of the samples, in pixels.
        channels: of the samples.
        crop: see `ImageTransform`; not used for an ``.npz``.
        with_labels: whether classes are needed.

    Raises:
        UserError: nothing there, or an ``.npz`` of images of another size.
    """
    path, named = Path(name), f"{flag} {name}"
    if path.suffix == ".npz" and path.is_file():
        file = read_reference(path) if holds_statistics(path) else None
        if file and not file.images:
            return RealImages(named, None, file)
        images = NpzFiles(path, named)
        if (images.side, images.channels) != (side, channels):
            theirs = f"{images.side}x{images.side} with {images.channels} channels"
            raise UserError(f"{named} holds images of {theirs}, the samples are {side}x{side} with {channels}")
        return RealImages(named, images, file)
    bundled = name in BUNDLED and not path.exists()
    source = load_source(flag, **({"bundled_data": name, "resolution": side} if bundled else {"train_data_dir": name}))
    transform = ImageTransform(side, channels, center_crop=True, crop=crop)
    return RealImages(named, SourceFiles(source, named, transform, with_labels=with_labels), None)
