"""Many samples of a trained model, of which prompts or classes, and exactly how many, in one folder.

Image i is a function of (seed, i) and what the model was told of it, whatever the number of processes: they share batches of consecutive
images, so that each image is computed in the same company, and a folder that was cut short is completed to the same bytes. Another batch
size gives the same images up to rounding.
"""

from __future__ import annotations

import json
import os
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import torch
from PIL import Image
from tqdm import tqdm

from immiscible.errors import UserError
from immiscible.files import LOCK, PARTIAL, clean_up, lock, replace
from immiscible.sampling.pipelines import WHOLE, at_random, in_turn, sample_images

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

MANIFEST, TABLE, METADATA = "manifest.json", "samples.npz", "metadata.jsonl"
# What may differ where a folder is completed; the networks are compared by their weights, not by where these lie.
FREE = ("command", "complete", "num_images", "batch_size", "processes", "versions", "model", "lora")


def read_lines(path: Path, flag: str) -> list[str]:
    """The prompts or class names of a text file, one a line. Lines end as files' lines do, not at every character that Unicode ends one at.

    Raises:
        UserError: the file cannot be read, is empty, or has an empty line, which would shift the numbers of what follows.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")]
    except OSError as error:
        raise UserError(f"{flag} {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{flag} {path} is not a text file in UTF-8") from None
    if not any(lines):
        raise UserError(f"{flag} {path} is empty: it must have one line or more")
    if not all(lines):
        raise UserError(f"{flag} {path}: line {lines.index('') + 1} is empty; remove it")
    return lines


@dataclass(frozen=True)
class Request:
    """What to sample.

    Args:
        num_images: N; images 0 to N - 1.
        steps: inference steps.
        seed: of the images' generators.
        batch_size: images sampled together.
        prompts: what images are of; empty for a pipeline without prompts.
        guidance_scale: with prompts or classes; 1 is none.
        guidance_interval: with classes: the noise levels at which they are guided.
        side: of the images with prompts, in pixels; None for what the network says.
        random_labels: of which prompt or class an image is, is drawn, and not each in turn.
    """

    num_images: int
    steps: int
    seed: int = 0
    batch_size: int = 16
    prompts: Sequence[str] = ()
    guidance_scale: float = 1.0
    guidance_interval: tuple[float, float] = WHOLE
    side: int | None = None
    random_labels: bool = False

    @property
    def turn(self) -> Callable[[int, int], int]:
        """Of which of the prompts or classes an image is, by its number and theirs."""
        return at_random(self.seed) if self.random_labels else in_turn

    def batches(self, rank: int = 0, ranks: int = 1) -> Iterator[range]:
        """The numbers of the images that a process samples together; the batches do not depend on how many processes share them."""
        starts = range(0, self.num_images, self.batch_size)
        for first in islice(starts, rank, None, ranks):
            yield range(first, min(first + self.batch_size, self.num_images))


class SampleFolder:
    """A folder of exactly the images ``000000.png`` to N - 1, with a manifest that says what they are.

    Args:
        path: the folder.
        size: width and height of an image in pixels.
        mode: what Pillow calls its kind of pixels: "L" of grey ones, "RGB" of colored ones.
    """

    def __init__(self, path: Path, size: tuple[int, int], mode: str = "RGB") -> None:
        self.path, self.size, self.mode = path, size, mode

    def prepare(self, manifest: Mapping[str, Any]) -> None:
        """Creates the folder or checks that it holds a part of these samples; locks it and writes the manifest. One process calls it.

        Raises:
            UserError: it holds samples of something else, more of them than are wanted, or other files; or another call is filling it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        present = self._present(f"{PARTIAL}{MANIFEST}")
        if present and MANIFEST not in present:
            raise UserError(f"--output_dir {self.path} holds {present[0]} and no {MANIFEST}: give a new folder")
        self._lock = lock(self.path, "--output_dir")  # not before it is known whose folder this is
        clean_up(self.path)
        present = self._present()
        old = self._manifest() if present else {}
        manifest = json.loads(json.dumps(manifest))  # as it will be read
        keys = [key for key in {**old, **manifest} if old and key not in FREE and old.get(key) != manifest.get(key)]
        if keys:
            changes = "; ".join(f"{key} was {_short(old.get(key))}, is now {_short(manifest.get(key))}" for key in keys)
            raise UserError(f"--output_dir {self.path} holds other samples: {changes}. Give these settings again, or a new folder")
        allowed = {MANIFEST, TABLE, METADATA, *(file_name(number) for number in range(manifest["num_images"]))}
        if foreign := [name for name in present if name not in allowed]:
            surplus = re.fullmatch(r"\d{6,}\.png", foreign[0])
            why = f"beyond --num_images {manifest['num_images']}" if surplus else "which is no sample"
            raise UserError(
                f"--output_dir {self.path} holds {foreign[0]}, {why} ({len(foreign)} such files): remove it, or give a new folder"
            )
        if old.get("num_images") != manifest["num_images"]:  # what was written of all images is not of all images any more
            for name in (TABLE, METADATA):
                (self.path / name).unlink(missing_ok=True)
        self.write_manifest(manifest)

    def missing(self, numbers: Sequence[int]) -> list[int]:
        """Those of the images that are not there, or not whole."""
        return [number for number in numbers if not self._is_good(self.path / file_name(number))]

    def write(self, number: int, image: numpy.ndarray) -> None:
        """Saves one image, uint8 [H, W, C]; a process that is killed leaves no half of it under its name."""
        partial = self.path / f"{PARTIAL}{file_name(number)}"
        Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(partial, format="PNG")
        os.replace(partial, self.path / file_name(number))

    def write_manifest(self, manifest: Mapping[str, Any]) -> None:
        """Replaces the manifest."""
        partial = self.path / f"{PARTIAL}{MANIFEST}"
        partial.write_text(json.dumps(manifest, indent=1))
        replace(partial, self.path / MANIFEST)

    def write_table(self, num_images: int, labels: int | None, turn: Callable[[int, int], int] = in_turn) -> None:
        """Saves all images in one file as the ADM evaluation reads them: ``arr_0`` uint8 [N, H, W, C], and the class of each as ``arr_1``.

        Args:
            num_images: N.
            labels: the number of classes; None leaves ``arr_1`` out.
            turn: which of them an image has, see `sample_images`.
        """
        first = numpy.asarray(Image.open(self.path / file_name(0)))
        shape = (num_images, *first.shape, *([1] if first.ndim == 2 else []))
        partial = self.path / f"{PARTIAL}{TABLE}"
        with zipfile.ZipFile(partial, "w") as archive:  # written image by image: fifty thousand of them do not fit every memory
            with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as file:
                header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                numpy.lib.format.write_array_header_1_0(file, header)
                for number in tqdm(range(num_images), desc=TABLE, unit="image", delay=2, leave=False, disable=None):
                    with Image.open(self.path / file_name(number)) as image:
                        file.write(numpy.asarray(image).tobytes())
            if labels:
                with archive.open(zipfile.ZipInfo("arr_1.npy"), "w") as file:
                    numpy.lib.format.write_array(file, numpy.array([turn(number, labels) for number in range(num_images)]))
        replace(partial, self.path / TABLE)

    def write_metadata(
        self, num_images: int, prompts: Sequence[str], labels: int | None, turn: Callable[[int, int], int] = in_turn
    ) -> None:
        """Writes what each image was told, a line for each: its ``file_name``, ``text`` where there are prompts, ``label`` where classes.

        Args:
            num_images: N.
            prompts: what they are of; may be empty.
            labels: the number of classes, as for `write_table`.
            turn: likewise.
        """
        partial = self.path / f"{PARTIAL}{METADATA}"
        with partial.open("w") as file:
            for number in range(num_images):
                text = {"text": prompts[turn(number, len(prompts))]} if prompts else {}
                label = {"label": turn(number, labels)} if labels else {}
                file.write(json.dumps({"file_name": file_name(number), **text, **label}) + "\n")
        replace(partial, self.path / METADATA)

    def _present(self, *but: str) -> list[str]:
        """The names of what is there, sorted; not the lock's, nor these."""
        return sorted(path.name for path in self.path.iterdir() if path.name not in (LOCK, *but))

    def _manifest(self) -> dict[str, Any]:
        try:
            manifest = json.loads((self.path / MANIFEST).read_text())
        except (OSError, ValueError, RecursionError):
            manifest = None
        if not isinstance(manifest, dict) or not manifest:
            raise UserError(f"--output_dir {self.path}: its {MANIFEST} is broken; give a new folder")
        return manifest

    def _is_good(self, path: Path) -> bool:
        if not path.exists():
            return False
        try:
            with Image.open(path) as image:
                kind = image.size, image.mode
                image.verify()  # every chunk's checksum, up to the last chunk
        except (OSError, SyntaxError, ValueError):
            return False
        return kind == (self.size, self.mode)


def file_name(number: int) -> str:
    """Of an image."""
    return f"{number:06}.png"


def draw(
    pipeline: DiffusionPipeline,
    request: Request,
    folder: SampleFolder,
    *,
    device: torch.device,
    rank: int = 0,
    ranks: int = 1,
    progress: Callable[[int], Any] = lambda images: None,
) -> int:
    """Samples this process's images that are not in the folder yet.

    Args:
        pipeline: what samples them.
        request: which.
        folder: where they go.
        device: where the networks run.
        rank: this process.
        ranks: how many processes share the images.
        progress: called with the number of images done, or found done, after each batch.

    Returns:
        how many images were written.

    Raises:
        UserError: (exit code 1) the samples hold NaN values.
    """
    written = 0
    sample = partial(
        sample_images,
        pipeline,
        steps=request.steps,
        seed=request.seed,
        device=device,
        prompts=request.prompts,
        guidance_scale=request.guidance_scale,
        guidance_interval=request.guidance_interval,
        side=request.side,
        turn=request.turn,
        bar=False,
    )
    for numbers in request.batches(rank, ranks):
        missing = folder.missing(numbers)
        if missing:
            images = sample(len(numbers), batch_size=len(numbers), first=numbers[0])
            for number in missing:
                folder.write(number, images[number - numbers[0]])
        written += len(missing)
        progress(len(numbers))
    return written


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
