"""Files that survive a kill, and what the disk says when it is full."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import sys

import pytest
from launch import run_command

from immiscible.errors import UserError
from immiscible.files import (
    DISCARDED,
    PARTIAL,
    append_line,
    clean_up,
    discard,
    drop_later_lines,
    file_facts,
    full_disk,
    read_lines,
    replace,
)


def test_what_is_replaced_is_whole_before_and_after(tmp_path):
    new, target = tmp_path / f"{PARTIAL}model", tmp_path / "model"
    for content in ("one", "two"):
        new.mkdir()
        (new / "weights").write_text(content)
        replace(new, target)
        assert [path.name for path in tmp_path.iterdir()] == ["model"] and (target / "weights").read_text() == content
    mask = os.umask(0o027)
    try:
        (tmp_path / "private").touch(0o600)
        replace(tmp_path / "private", target)
    finally:
        os.umask(mask)
    assert target.is_file() and target.stat().st_mode & 0o777 == 0o640


def test_a_link_is_discarded_and_never_what_it_points_to(tmp_path):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "kept", target_is_directory=True)
    discard(tmp_path / "link")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept"] and (tmp_path / "kept" / "file").exists()


def test_what_a_kill_left_is_cleaned_up_and_nothing_else(tmp_path):
    for name in (f"{PARTIAL}a", f"{DISCARDED}b", "c", ".hidden"):
        (tmp_path / name).write_text("x")
    (tmp_path / f"{PARTIAL}folder").mkdir()
    clean_up(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".hidden", "c"]
    (tmp_path / f"{DISCARDED}c").write_text("half deleted by an earlier call")
    discard(tmp_path / "c")
    assert [path.name for path in tmp_path.iterdir()] == [".hidden"]


def test_facts_of_a_file_of_several_blocks(tmp_path):
    content = os.urandom(2**20 + 17)
    (tmp_path / "file").write_bytes(content)
    assert file_facts(tmp_path / "file") == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_a_full_disk_is_named_and_other_failures_are_as_they_are(tmp_path, monkeypatch):
    with pytest.raises(RuntimeError, match="something else"), full_disk(tmp_path):
        raise RuntimeError("something else")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(OSError, match="No space left") as caught, full_disk(tmp_path):
        raise RuntimeError("PytorchStreamWriter failed writing file data/0")
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(tmp_path))


def test_lines_of_later_steps_and_a_half_line_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_lines(path) == [] == drop_later_lines(path, 3)
    for step in (1, 2, 3):
        append_line(path, {"step": step})
    path.write_text(path.read_text() + '{"step": 4, "lo')
    assert [line["step"] for line in read_lines(path)] == [1, 2, 3]
    assert drop_later_lines(path, 2) == [{"step": 1}, {"step": 2}]
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"step": 1}, {"step": 2}]
    assert [each.name for each in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_the_module_needs_no_torch():
    code = "import sys; import immiscible.files; assert 'torch' not in sys.modules"
    assert run_command([sys.executable, "-c", code]).code == 0


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b'{"step": 1}\n\xff\xfe\x00\n{"step": 2}\n', "line 2 is no JSON object"),
        (b'{"step": 1}\nnull\n{"step": 2}\n', "line 2 is no JSON object"),
        (b"[1]\n", "line 1 is no JSON object"),
        (b"[" * 5000 + b"\n{}\n", "line 1 is no JSON object"),
        (b'{"step": 1}\n{"loss": 1}\n', "line 2 has no `step`"),
        (b'{"step": "two"}\n', "line 1 has no `step`"),
    ],
)
def test_damaged_lines_are_named_and_left_as_they_are(tmp_path, content, line):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"metrics.jsonl is damaged: {line}") as caught:
        drop_later_lines(path, 3)
    assert caught.value.exit_code == 1 and path.read_bytes() == content


def test_a_folder_in_the_place_of_lines(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match=r"metrics\.jsonl cannot be read: Is a directory"):
        drop_later_lines(tmp_path / "metrics.jsonl", 3)
