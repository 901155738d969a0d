"""What lies in a folder of training data, told by one walk through it that opens no file, but for archives where all lies in them.

Names of splits count only as those of folders at the top: if one is called ``train``, what lies outside of it is left out, else what lies
in those called ``test``, ``val`` and so on. File names never decide. What is left out is counted, with the reason.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from immiscible.data.archives import ZIP, members
from immiscible.data.sources import OTHER_IMAGES, image_extensions
from immiscible.errors import UserError, first_line

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
SIDECARS = (".txt", ".caption", ".json")
RUN_MARKER = ".immiscible-run"  # in the output folder of a run, whose samples and checkpoints are not training data
_ARCHIVES = (ZIP, ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".7z", ".rar")
_TRAIN = re.compile(r"train(?:ing)?[-_ ]?\d*", re.IGNORECASE)  # with a year, as COCO has it
_HELD_OUT = re.compile(r"(?:test(?:ing)?|eval(?:uation)?|val(?:id|idation)?|dev)[-_ ]?\d*", re.IGNORECASE)


@dataclass
class Listing:
    """Paths relative to ``root``, in the order of their names; archives that are read are folders in them.

    Args:
        root: the folder or the one archive, absolute.
        images: what Pillow reads.
        metadata: of the names in `METADATA`.
        tables: other ``.parquet`` files.
        shards: ``.tar`` files.
        archives: packed files that are not looked into.
        sidecars: by what a path would be with its extension in lower case, the files with one of `SIDECARS`.
        left_out: what of training data is not used, in words.
        train: the folders at the top that are used alone.
        held_out: those that are not used.
    """

    root: Path
    images: list[str] = field(default_factory=list)
    metadata: list[str] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)
    shards: list[str] = field(default_factory=list)
    archives: list[str] = field(default_factory=list)
    sidecars: dict[str, str] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    train: frozenset[str] = frozenset()
    held_out: frozenset[str] = frozenset()

    def trains(self, path: str) -> bool:
        """Whether a relative path is of the training split."""
        top = _top(path)
        return top in self.train if self.train else top not in self.held_out


def list_folder(folder: str) -> Listing:
    """Walks through ``--train_data_dir``; hidden files and folders, and folders that begin with two underscores, are passed by.

    Links to folders are followed, each folder once; one that leads back to a folder above is left out. Where there are neither images
    nor tables nor shards, archives (``.zip``) are read as folders; ``folder`` may be one, too.

    Raises:
        UserError: no such folder, or it holds held-out splits alone.
    """
    root = Path(folder).expanduser().resolve()
    packed = root.is_file() and root.suffix.lower() == ZIP
    if not (packed or root.is_dir()):
        what = f"no folder, but a file; give a folder, or a {ZIP} of one" if root.is_file() else "no such folder"
        raise UserError(f"--train_data_dir {folder}: {what}")
    listing = Listing(root)
    unread: Counter[str] = Counter()
    names, runs, loops = _walk(root)
    for name in names:
        _sort_in(listing, name, unread)
    if not (listing.images or listing.tables or listing.shards):
        zips = [name for name in listing.archives if name.lower().endswith(ZIP)]
        listing.archives = [name for name in listing.archives if name not in zips]
        _look_into(listing, [""] if packed else zips, unread)
    if unnamed := [name for name in listing.images if not _is_text(name)]:
        listing.images = [name for name in listing.images if _is_text(name)]
        listing.left_out.append(f"{len(unnamed)} images with names that are not UTF-8, the first {unnamed[0]!r}")
    for kind, count in sorted(unread.items()):
        package = OTHER_IMAGES[kind]
        remedy = f"`pip install {package}`" if package else "convert them"
        listing.left_out.append(f"{count} .{kind} files, which are not read here ({remedy})")
    if runs:
        listing.left_out.append(f"{len(runs)} folders of runs, the first {runs[0]}")
    if loops:
        listing.left_out.append(f"{len(loops)} links to folders that are read already or hold this one, the first {loops[0]}")
    _choose_split(listing, folder)
    return listing


def check_one_kind(listing: Listing, folder: str, image_column: str) -> None:
    """Notes what lies beside images and is no data; the files of shards are named after them, and hold no images.

    Raises:
        UserError: there is nothing that can be read, or images lie both in files and in shards or tables.
    """
    if not (listing.images or listing.shards or listing.tables):
        reason = f"; {'; '.join(listing.left_out)}" if listing.left_out else ""
        if listing.archives:
            reason += f"; unpack {listing.archives[0]}, as only .zip files are looked into"
        raise UserError(f"--train_data_dir {folder}: no training images found in it, nor .parquet or .tar files{reason}")
    if listing.archives:
        listing.left_out.append(f"{len(listing.archives)} archives (unpack them), the first {listing.archives[0]}")
    if not listing.images:
        return
    others = {".tar": listing.shards, ".parquet": [name for name in listing.tables if _holds(listing.root / name, image_column)]}
    for kind, found in others.items():
        if found:
            raise UserError(
                f"--train_data_dir {folder} holds both images ({len(listing.images)}, the first {listing.images[0]}) and {kind} files "
                f"({len(found)}, the first {found[0]}): give the subfolder of one kind, or move the other elsewhere"
            )
    if listing.tables:
        listing.left_out.append(f"{len(listing.tables)} .parquet files without a column {image_column!r}, the first {listing.tables[0]}")


def _holds(path: Path, column: str) -> bool:
    """Whether a parquet file has such a column, or cannot be read."""
    import pyarrow.parquet as pq

    try:
        return column in pq.read_schema(path).names
    except Exception:  # Arrow's own types
        return True


def _walk(root: Path) -> tuple[list[str], list[str], list[str]]:
    """The files, the folders of runs and the links not followed, all relative to ``root`` and sorted; none of an archive."""
    files: list[str] = []
    runs: list[str] = []
    loops: list[str] = []
    own = {os.path.realpath(path) for path in (root, *root.parents)}  # a link to one of them would be read for ever
    seen = {str(root)}
    # Links wait until the tree itself is read, so that what lies in it keeps its own name.
    folders, links = [""] if root.is_dir() else list[str](), list[str]()
    while folders or links:
        if folders:
            folder = folders.pop()
        else:
            links.sort(reverse=True)
            folder = links.pop()
            real = os.path.realpath(root / folder)
            if real in seen or real in own:
                loops.append(folder)
                continue
            seen.add(real)
        found = list(os.scandir(root / folder))
        if folder and any(entry.name == RUN_MARKER for entry in found):
            runs.append(folder)
            continue
        for entry in found:
            path = os.path.join(folder, entry.name)
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                if entry.name.startswith("__"):
                    continue
                if entry.is_symlink():
                    links.append(path)
                else:
                    folders.append(path)
                    seen.add(os.path.join(os.path.realpath(root / folder), entry.name))
            elif entry.is_file() or entry.is_symlink():
                files.append(path)
    return sorted(files), sorted(runs), sorted(loops)


def _sort_in(listing: Listing, path: str, unread: Counter[str]) -> None:
    stem, dot = os.path.splitext(path)
    extension, name = dot[1:].lower(), os.path.basename(path)
    if extension in image_extensions():
        listing.images.append(path)
    elif name.lower() in METADATA:
        listing.metadata.append(path)
    elif extension == "parquet":
        listing.tables.append(path)
    elif extension == "tar":
        listing.shards.append(path)
    elif dot.lower() in SIDECARS:
        listing.sidecars[stem + dot.lower()] = path
    elif extension in OTHER_IMAGES:
        unread[extension] += 1
    elif name.lower().endswith(_ARCHIVES):
        listing.archives.append(path)


def _look_into(listing: Listing, archives: Sequence[str], unread: Counter[str]) -> None:
    """Sorts in what the ``.zip`` files hold, images and what tells of them; counts what else is packed there."""
    nested, strange = [], []
    for archive in archives:
        before = len(listing.images)
        try:
            paths, others = members(listing.root / archive)
        except (OSError, ValueError) as error:
            listing.left_out.append(f"{archive or listing.root.name}, which cannot be read ({first_line(error)})")
            continue
        strange += [f"{archive or listing.root.name}: {name}" for name in others]
        for name in (os.path.join(archive, path) for path in paths):
            if os.path.basename(name).lower() not in METADATA and name.lower().endswith((".parquet", ".tar", *_ARCHIVES)):
                nested.append(name)
            else:
                _sort_in(listing, name, unread)
        if len(listing.images) == before:
            listing.left_out.append(f"{archive or listing.root.name}, which holds no images")
    if strange:
        listing.left_out.append(f"{len(strange)} files in archives, whose names there are no paths in them, the first {strange[0]}")
    if nested:
        listing.left_out.append(f"{len(nested)} shards, tables or archives inside of archives (unpack them), the first {nested[0]}")


def _top(path: str) -> str:
    """The folder that may be a split: the first one, also of what an archive holds that is not called as a split is; "" at the top."""
    first, inner, rest = path.partition(os.sep)
    stem, dot = os.path.splitext(first)
    if not inner or dot.lower() != ZIP:
        return first if inner else ""
    return stem if _TRAIN.fullmatch(stem) or _HELD_OUT.fullmatch(stem) else _top(rest)


def _choose_split(listing: Listing, folder: str) -> None:
    data = [*listing.images, *listing.tables, *listing.shards]
    tops = {_top(path) for path in data}
    listing.train = frozenset(filter(_TRAIN.fullmatch, tops))
    listing.held_out = frozenset(filter(_HELD_OUT.fullmatch, tops))
    if not listing.train and not listing.held_out:
        return
    elsewhere = Counter(_top(path) or "." for path in data if not listing.trains(path))
    if sum(elsewhere.values()) == len(data):
        raise UserError(
            f"--train_data_dir {folder} holds nothing but {', '.join(sorted(listing.held_out))}, by their names not for training; give one "
            f"of these folders itself, or rename it"
        )
    if elsewhere:
        places = ", ".join(sorted(elsewhere)).replace(".", "the folder itself", 1) if "." in elsewhere else ", ".join(sorted(elsewhere))
        chosen = f"beside {', '.join(sorted(listing.train))}" if listing.train else "by its name not for training"
        listing.left_out.append(f"{sum(elsewhere.values())} files in {places} ({chosen})")
    for name in ("images", "metadata", "tables", "shards"):
        paths: Sequence[str] = getattr(listing, name)
        # Metadata at the top tell of all splits.
        setattr(listing, name, [path for path in paths if listing.trains(path) or (name == "metadata" and not _top(path))])


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
