"""What disks, editors and people do to files."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

ODD: tuple[Any, ...] = ([], {}, None, "x", "", -1, 0, 10**30, 1.5, float("nan"), True, [None], {"a": 1}, ["a"], "../../x", [[]])


def damage(draw: random.Random, path: Path, others: Sequence[Path] = ()) -> str:
    """Does something to a file; returns what.

    Args:
        draw: decides what.
        path: the file.
        others: files whose content it may get instead of its own.
    """
    ways = ["truncated", "zeroed", "emptied", "deleted", "made a folder", "overwritten with junk", "one bit flipped"]
    ways += ["exchanged"] * (2 * bool(others)) + ["edited"] * (6 * (path.suffix in (".json", ".jsonl", ".yaml")))
    way, old = draw.choice(ways), path.read_bytes()
    if way == "truncated":
        path.write_bytes(old[: draw.randrange(len(old) or 1)])
    elif way == "zeroed":
        path.write_bytes(bytes(len(old)))
    elif way == "emptied":
        path.write_bytes(b"")
    elif way == "deleted":
        path.unlink()
    elif way == "made a folder":
        path.unlink()
        path.mkdir()
    elif way == "overwritten with junk":
        path.write_bytes(draw.randbytes(len(old)))
    elif way == "one bit flipped":
        place = draw.randrange(len(old) or 1)
        path.write_bytes(old[:place] + bytes([old[place] ^ 1 << draw.randrange(8)]) + old[place + 1 :] if old else b"\0")
    elif way == "exchanged":
        other = draw.choice(others)
        path.write_bytes(other.read_bytes())
        way += f" for {other.name}"
    else:
        way += f" to {_edit(draw, path)}"
    return f"{path.name} {way}"


def _edit(draw: random.Random, path: Path) -> str:
    """Another value, or none, somewhere in a file of JSON or YAML, or another whole content."""
    text = path.read_text()
    if path.suffix != ".json" or draw.random() < 0.2:
        lines = text.splitlines()
        new = draw.choice(("[]", "null", "3", "{}", "{", "\x00", '{"step": "two"}', '{"loss": 1}', "x: [", "- a"))
        where = draw.randrange(len(lines) + 1)
        path.write_text(new if draw.random() < 0.4 else "\n".join([*lines[:where], new, *lines[where:]]) + "\n")
        return repr(new)
    content = inside = json.loads(text)
    while isinstance(inside, dict) and inside:
        key = draw.choice(list(inside))
        if not isinstance(inside[key], dict) or not inside[key] or draw.random() < 0.5:
            value = draw.choice(("gone", *ODD))
            if value == "gone":
                del inside[key]
            else:
                inside[key] = value
            path.write_text(json.dumps(content))
            return f"{key} = {value!r}"
        inside = inside[key]
    path.write_text(json.dumps(draw.choice(ODD)))
    return "something else"


def _pixels(picture: Path) -> bytes | None:
    """What Pillow reads, None if it cannot."""
    try:
        with Image.open(picture) as image:
            return image.tobytes()
    except (OSError, SyntaxError, ValueError):
        return None


def damage_images(draw: random.Random, folder: Path) -> tuple[str, bool]:
    """Does something to a folder of pictures; returns what, and whether a picture was lost by it, which must be said."""
    picture = draw.choice(sorted(folder.glob("*.png")))
    if draw.random() < 0.4:
        before = _pixels(picture)
        return damage(draw, picture), _pixels(picture) != before  # a bit of a checksum, which Pillow passes over, loses nothing
    odd = folder / draw.choice(
        ("train.png", "tést 🎲.png", "a b[1].png", "x" * 240 + ".png", "UPPER.PNG", "%s.png", "-flag.png", "test_0.png")
    )
    way = draw.choice(("text", "mode", "size", "name", "broken link", "loop", "other format", "notes", "metadata", "subfolder"))
    if way == "text":
        odd.write_text("no picture")
    elif way == "mode":
        mode = draw.choice(("1", "L", "P", "RGBA", "LA", "I;16"))
        Image.new(mode, (8, 8)).save(odd)
        way += f" {mode}"
    elif way == "size":
        size = draw.choice(((1, 1), (1, 900), (8, 9), (3000, 2)))
        Image.new("RGB", size).save(odd)
        way += f" {size}"
    elif way == "name":
        shutil.copy(picture, odd)
    elif way == "broken link":
        odd.symlink_to("nowhere")
    elif way == "loop":
        (folder / "loop").symlink_to(folder)
    elif way == "other format":
        Image.new("RGB", (8, 8)).save(folder / f"other.{(kind := draw.choice(('gif', 'bmp', 'webp', 'tiff', 'jpg', 'ppm')))}")
        way += f" {kind}"
    elif way == "notes":
        (folder / draw.choice(("train_log.txt", "dev.md", "validation.json", "test_notes.txt", "Thumbs.db"))).write_text("notes")
    elif way == "metadata":
        lines = ("{", "[]", '{"file_name": "../../etc/passwd"}', '{"file_name": "nowhere.png", "text": "a"}', '{"text": 3}', "\x00")
        (folder / "metadata.jsonl").write_text(draw.choice(lines) + "\n")
    else:
        (inside := folder / draw.choice(("train", "test", "eval", "éé"))).mkdir()
        shutil.copy(picture, inside / "inside.png")
    return f"{way} ({odd.name})", way in ("text", "broken link")
