"""Tar shards."""

from __future__ import annotations

import io
import json
import tarfile

import numpy as np
from PIL import Image

RANDOM = np.random.default_rng(0)


def png(side=8, mode="RGB", kind="PNG", seed=None):
    random = RANDOM if seed is None else np.random.default_rng(seed)
    image = Image.fromarray(random.integers(0, 256, (side, side + 2, 3), dtype=np.uint8)).convert(mode)
    stream = io.BytesIO()
    image.save(stream, kind)
    return stream.getvalue()


def write_tar(path, members, tar_format=tarfile.USTAR_FORMAT):
    """``members``: name -> bytes, in order; pairs of them, where names come twice."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tar_format) as tar:
        for name, content in members.items() if isinstance(members, dict) else members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return path


def captioned(first, count, kind="jpg"):
    """As img2dataset writes them."""
    return {
        f"{number:09}.{extension}": content
        for number in range(first, first + count)
        for extension, content in (
            (kind, png(kind="JPEG" if kind == "jpg" else "PNG", seed=number)),
            ("json", json.dumps({"caption": f"alt {number}", "names": [f"a {number}", f"b {number}"], "status": "success"}).encode()),
            ("txt", f"caption {number}\n".encode()),
        )
    }


def numbered(count):
    return {f"{number:03}.{kind}": content for number in range(count) for kind, content in (("png", png(seed=number)), ("cls", b"1"))}
