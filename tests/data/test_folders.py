"""Folders as people have them: the names in them, captions beside images, links, other files; through the scripts as a user runs them."""

from __future__ import annotations

import json
import os
import re
import tarfile
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from launch import flags, tiny
from pictures import noise, save
from PIL import Image, features
from pyarrow.csv import write_csv
from tars import png, write_tar
from tiny_text import FINETUNE, model_folder, tiny_text

from immiscible.data.loading import load_images
from immiscible.errors import UserError


def fill(root: Path, *names: str) -> Path:
    """Images; a file of another kind is a line of text."""
    for name in names:
        path = root / name
        if path.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp", ".avif", ".bmp", ".jfif"):
            path.parent.mkdir(parents=True, exist_ok=True)
            kind = {".avif": "AVIF", ".webp": "WEBP", ".bmp": "BMP", ".png": "PNG"}.get(path.suffix.lower(), "JPEG")
            Image.fromarray(noise(40, 36, 3)).save(path, kind)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("some words\n")
    return root


def described(root: Path, texts: dict[str, object], name: str = "metadata.jsonl") -> Path:
    (root / name).write_text("".join(json.dumps({"file_name": file, "text": text}) + "\n" for file, text in texts.items()))
    return root


def images_used(script, tmp_path: Path, folder: Path, **changes) -> tuple[int, str]:
    """How many images a run trains on, and the line about those that it leaves out."""
    run = tmp_path / "run"
    changes = {"train_data_dir": folder, "train_batch_size": 2, "max_train_steps": 1, "overwrite_output_dir": run.exists(), **changes}
    result = script(tiny(run, **changes))
    assert result.code == 0, result.stderr
    lines = [line for line in result.stderr.splitlines() if "left out of" in line]
    assert len(lines) <= 1
    (count,) = set(re.findall(rf"{re.escape(str(folder.resolve()))}: (\d+) images", result.stdout + result.stderr))
    return int(count), "".join(lines)


def captioned_run(script, tmp_path: Path, folder: Path, **changes):
    changes = {"train_data_dir": folder, "train_batch_size": 2, "max_train_steps": 2, "use_lora": True, **changes}
    return script(tiny_text(changes.pop("output_dir", tmp_path / "run"), **changes), program=FINETUNE)


def captions_of(folder: Path, column: str = "text", **changes) -> dict[str, list[str]]:
    source = load_images(train_data_dir=str(folder), caption_column=column, **changes)
    return {os.path.relpath(source.name(i), folder): list(source.captions(i)) for i in range(len(source))}


# Names


@pytest.mark.parametrize(
    "names",
    [
        ("cat.png", "train.png", "bus.png", "dog.png"),
        ("photo of test tubes.jpg", "val.jpg", "IMG_0.jpg", "dev-1.jpg"),
        ("a.jpg", "b.jpg", "c.jpg", "eval.jpg", "training_notes.txt", "validation.json", "test_log.csv", "dev.md"),
        ("rome/train/1.png", "rome/test/2.png", "oslo/val/3.png", "oslo/x/4.png"),
    ],
)
def test_names_of_files_and_of_inner_folders_decide_nothing(script, tmp_path, names):
    assert images_used(script, tmp_path, fill(tmp_path / "photos", *names)) == (4, "")


def test_metadata_are_read_whatever_the_images_are_called(script, tmp_path):
    names = ("photo of a train.jpg", "photo of test tubes.jpg", "cat.jpg", "val.png")
    folder = described(fill(tmp_path / "photos", *names), {name: f"about {name}" for name in names})
    assert captioned_run(script, tmp_path, folder).code == 0
    assert captions_of(folder) == {name: [f"about {name}"] for name in names}


@pytest.mark.parametrize(
    ("names", "used", "line"),
    [
        (("train/1.png", "train/2.png", "test/3.png", "val/4.png", "val/5.png"), 2, "3 files in test, val (beside train)"),
        (("Training/1.png", "Training/2.png", "Validation/3.png"), 2, "1 files in Validation (beside Training)"),
        (("train2017/1.png", "train2017/2.png", "val2017/3.png"), 2, "1 files in val2017 (beside train2017)"),
        (("train/1.png", "train/2.png", "train/3.png", "4.png", "more/5.png"), 3, "2 files in the folder itself, more (beside train)"),
        (("1.png", "2.png", "eval/3.png"), 2, "1 files in eval (by its name not for training)"),
    ],
)
def test_folders_at_the_top_are_splits_and_what_they_leave_out_is_counted(script, tmp_path, names, used, line):
    found, left_out = images_used(script, tmp_path, fill(tmp_path / "photos", *names))
    assert found == used and left_out.endswith(line)


def test_held_out_images_alone_are_refused(script, tmp_path):
    result = script(tiny(tmp_path / "run", train_data_dir=fill(tmp_path / "photos", "test/1.png", "val/2.png")))
    assert result.code == 2 and "holds nothing but test, val" in result.error and not (tmp_path / "run").exists()


def test_the_folder_of_a_run_is_no_training_data(script, tmp_path):
    folder = fill(tmp_path / "photos", "1.png", "2.png", "3.png")
    other = tmp_path / "elsewhere"
    assert script(tiny(other, max_train_steps=1)).code == 0
    assert (other / ".immiscible-run").exists()
    save(other / "samples" / "1.png", noise(8, 8, 3))
    other.rename(folder / "old run")
    assert images_used(script, tmp_path, folder) == (3, f"left out of {folder}: 1 folders of runs, the first old run")


@pytest.mark.parametrize("name", ["photos [2023]", "what? * [a-z]", "{a,b}"])
def test_brackets_in_the_path(script, tmp_path, name):
    assert images_used(script, tmp_path, fill(tmp_path / name, "1.png", "2 [x].png")) == (2, "")


@pytest.mark.skipif(os.name != "posix", reason="names are text here")
def test_a_name_that_is_no_text(script, tmp_path):
    folder = fill(tmp_path / "photos", "1.png", "2.png")
    os.rename(folder / "2.png", os.path.join(os.fsencode(folder), b"\xff\xfe.png"))
    found, left_out = images_used(script, tmp_path, folder, train_batch_size=1)
    assert found == 1 and "2.png" not in left_out and "UTF-8" in left_out


# Formats and other files


def test_what_pillow_reads_is_read_and_what_looks_like_an_image_is_counted(script, tmp_path):
    if not features.check("avif"):
        pytest.skip("this Pillow reads no AVIF")
    folder = fill(tmp_path / "photos", "a.avif", "b.JFIF", "c.WEBP", "d.jpg", "x.heic", "y.HEIC", "z.jxl", "q.svg", "notes.txt")
    found, left_out = images_used(script, tmp_path, folder)
    assert found == 4
    for what in ("2 .heic files, which are not read here (`pip install pillow-heif`)", "1 .jxl files", "1 .svg files"):
        assert what in left_out
    result = script(tiny(tmp_path / "other", train_data_dir=fill(tmp_path / "phone", "x.heic", "y.heic")))
    assert result.code == 2 and "no training images found" in result.error and "2 .heic files" in result.error


def packed(archive: Path, folder: Path, **members: str) -> Path:
    """A zip of all that lies in a folder, and of further texts by name."""
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted(folder.rglob("*")):
            file.write(path, path.relative_to(folder))
        for name, text in members.items():
            file.writestr(name, text)
    return archive


def test_images_in_a_zip_are_read_as_in_a_folder(script, tmp_path):
    folder = fill(tmp_path / "photos", *(f"{place}/{number}.png" for place in ("b/cats", "b/dogs", "__MACOSX") for number in range(3)))
    (tmp_path / "zipped").mkdir()
    packed(tmp_path / "zipped" / "my.ZIP", folder, **{".hidden/1.png": "", "notes.md": "", "more.tar": ""})
    changes = {"train_batch_size": 6, "class_conditional": True, "dataloader_num_workers": 2, "max_train_steps": 2}
    found, left_out = images_used(script, tmp_path, tmp_path / "zipped", **changes)
    assert found == 6 and left_out.endswith("1 shards, tables or archives inside of archives (unpack them), the first my.ZIP/more.tar")
    whole = load_images(train_data_dir=str(folder / "b"))
    for source in (load_images(train_data_dir=str(tmp_path / "zipped")), load_images(train_data_dir=str(tmp_path / "zipped" / "my.ZIP"))):
        assert source.class_names == ["cats", "dogs"] and source.sizes().tolist() == whole.sizes().tolist()
        for i in range(6):
            assert source.load(i) == whole.load(i) and source.label(i) == whole.label(i)
        assert source.name(4) == str(tmp_path / "zipped" / "my.ZIP" / "b" / "dogs" / "1.png")


@pytest.mark.parametrize("kind", ["txt", "jsonl", "csv", "parquet"])
def test_captions_in_a_zip(tmp_path, kind):
    texts = {f"{number}.png": f"thing {number}" for number in range(3)}
    folder = fill(tmp_path / "photos", *texts)
    if kind == "txt":
        for name, text in texts.items():
            (folder / name).with_suffix(".txt").write_text(text)
    else:
        described(folder, texts)
    if kind in ("csv", "parquet"):
        (folder / "metadata.jsonl").unlink()
        write = pq.write_table if kind == "parquet" else write_csv
        write(pa.table({"file_name": list(texts), "text": list(texts.values())}), folder / f"metadata.{kind}")
    (tmp_path / "zipped").mkdir()
    packed(tmp_path / "zipped" / "a.zip", folder)
    assert captions_of(tmp_path / "zipped") == {f"a.zip/{name}": [text] for name, text in texts.items()}
    if kind == "jsonl":
        described(folder, {"gone.png": "x"})
        packed(tmp_path / "zipped" / "a.zip", folder)
        with pytest.raises(UserError, match=r"1 of the 1 images that a\.zip/metadata\.jsonl names are not there.*a\.zip/gone\.png"):
            captions_of(tmp_path / "zipped")


@pytest.mark.parametrize(
    ("archives", "used", "line"),
    [
        ({"all.zip": ("train/1.png", "train/2.png", "test/3.png")}, 2, "1 files in test (beside train)"),
        ({"train2017.zip": ("a/1.png", "2.png"), "val2017.zip": ("train/3.png",)}, 2, "1 files in val2017 (beside train2017)"),
        ({"a.zip": ("1.png", "2.png"), "b.zip": ("1.png", "val/4.png")}, 3, "1 files in val (by its name not for training)"),
    ],
)
def test_splits_in_archives(tmp_path, caplog, archives, used, line):
    (tmp_path / "zipped").mkdir()
    for archive, names in archives.items():
        packed(tmp_path / "zipped" / archive, fill(tmp_path / f"of {archive}", *names))
    assert len(load_images(train_data_dir=str(tmp_path / "zipped"))) == used and caplog.text.strip().endswith(line)


def test_archives_that_are_not_read(script, tmp_path):
    folder = fill(tmp_path / "photos", "0.png", "1.png")
    packed(tmp_path / "archive.zip", folder)
    only = fill(tmp_path / "only", "more.tar.gz")
    result = script(tiny(tmp_path / "run", train_data_dir=only))
    assert result.code == 2 and result.error.endswith("unpack more.tar.gz, as only .zip files are looked into")
    result = script(tiny(tmp_path / "run", train_data_dir=only, streaming=True))
    assert result.code == 2 and result.error.endswith("holds none; unpack more.tar.gz")
    (only / "cut.zip").write_bytes((tmp_path / "archive.zip").read_bytes()[:-30])
    packed(only / "texts.zip", fill(tmp_path / "texts", "a.txt"))
    (only / "secret.zip").write_bytes(_encrypted((tmp_path / "archive.zip").read_bytes()))
    result = script(tiny(tmp_path / "run", train_data_dir=only))
    for reason in ("cut.zip, which cannot be read (File is not a zip", "texts.zip, which holds no images", "(its files are encrypted)"):
        assert result.code == 2 and reason in result.error
    result = script(tiny(tmp_path / "run", train_data_dir=only / "more.tar.gz"))
    assert result.code == 2 and result.error.endswith("more.tar.gz: no folder, but a file; give a folder, or a .zip of one")
    (tmp_path / "archive.zip").rename(folder / "archive.zip")
    found, left_out = images_used(script, tmp_path, folder)
    assert found == 2 and left_out.endswith("1 archives (unpack them), the first archive.zip")


def test_what_lies_in_a_zip_under_names_that_are_no_paths_is_counted(script, tmp_path):
    (tmp_path / "zipped").mkdir()
    strange = dict.fromkeys(["../../out.png", "/top.png", "a//b.png", "./c.png"], "")
    packed(tmp_path / "zipped" / "a.zip", fill(tmp_path / "photos", "0.png", "1.png"), **strange)
    found, left_out = images_used(script, tmp_path, tmp_path / "zipped")
    assert found == 2 and left_out.endswith("4 files in archives, whose names there are no paths in them, the first a.zip: ../../out.png")


def _encrypted(archive: bytes) -> bytes:
    """The same with the mark of encryption on each member."""
    marked = bytearray(archive)
    for signature, offset in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        place = archive.find(signature)
        while place >= 0:
            marked[place + offset] |= 1
            place = archive.find(signature, place + 1)
    return bytes(marked)


def test_a_damaged_image_in_a_zip_is_named(script, tmp_path):
    (tmp_path / "zipped").mkdir()
    archive = packed(tmp_path / "zipped" / "a.zip", fill(tmp_path / "photos", "0.png", "1.png", "2.png"))
    content = bytearray(archive.read_bytes())
    place = content.index(b"IDAT", content.index(b"1.png"))
    content[place + 50] ^= 255
    archive.write_bytes(content)
    changes = {"train_data_dir": archive.parent, "train_batch_size": 3}
    result = script(tiny(tmp_path / "run", **changes))
    assert result.code == 1 and f"cannot read image {archive}/1.png: Bad CRC-32 for file '1.png'" in result.error
    result = script(tiny(tmp_path / "other", **changes, skip_bad_images=True))
    assert result.code == 0 and f"skipped image {archive}/1.png" in result.stderr


def test_images_beside_shards_or_tables_of_images_are_refused(script, tmp_path):
    for kind in ("tar", "parquet"):
        folder = fill(tmp_path / kind, *(f"{i}.jpg" for i in range(6)))
        if kind == "tar":
            with tarfile.open(folder / "backup.tar", "w") as tar:
                tar.add(folder / "0.jpg", "x.jpg")
        else:
            pq.write_table(pa.table({"image": [(folder / "0.jpg").read_bytes()]}), folder / "x.parquet")
        result = script(tiny(tmp_path / "run", train_data_dir=folder))
        assert result.code == 2 and "holds both images (6, the first 0.jpg) and" in result.error and f".{kind} files (1" in result.error


def test_the_files_that_img2dataset_writes(script, tmp_path):
    folder = tmp_path / "laion"
    for number in range(4):
        fill(folder, f"00000/{number:09}.jpg")
        (folder / f"00000/{number:09}.txt").write_text(f"caption {number}")
        (folder / f"00000/{number:09}.json").write_text(json.dumps({"caption": f"alt {number}", "status": "success"}))
    pq.write_table(pa.table({"url": ["x"] * 4, "caption": ["y"] * 4}), folder / "00000.parquet")
    (folder / "00000_stats.json").write_text("{}")
    result = captioned_run(script, tmp_path, folder)
    assert result.code == 0 and "1 .parquet files without a column 'image'" in result.stderr
    assert list(captions_of(folder).values()) == [[f"caption {number}"] for number in range(4)]
    assert list(captions_of(folder, "caption").values()) == [[f"alt {number}"] for number in range(4)]
    result = captioned_run(script, tmp_path, folder, caption_column="words", output_dir=tmp_path / "other")
    assert result.code == 2 and "--caption_column 'words' is not in" in result.error and "000000000.json" in result.error


def test_metadata_without_the_captions_column_tell_their_columns(tmp_path):
    folder = described(fill(tmp_path / "photos", "0.png"), {"0.png": "a cat"})
    with pytest.raises(UserError, match=r"--caption_column 'words' is not in .*; columns of the metadata: image, text$"):
        load_images(train_data_dir=str(folder), caption_column="words")


# Links


def test_linked_folders_are_read_once_and_loops_are_left_out(script, tmp_path):
    fill(tmp_path / "real", "1.png", "deep/2.png")
    folder = fill(tmp_path / "photos", "own.png", "inner/3.png")
    links = {"sub": "../real", "loop": ".", "up": "..", "again": "inner", "inner/back": "../../real", "absent": "nowhere"}
    for name, target in links.items():
        (folder / name).symlink_to(target)
    found, left_out = images_used(script, tmp_path, folder)
    assert found == 4 and "4 links to folders that are read already or hold this one" in left_out
    source = load_images(train_data_dir=str(folder))
    assert {os.path.relpath(source.name(i), folder) for i in range(4)} >= {"own.png", "inner/3.png"}


# Captions


@pytest.mark.parametrize("names", [("{}.txt",), ("{}.caption",), ("{}.png.txt",), ("{}.TXT",)])
def test_captions_beside_the_images(script, tmp_path, names):
    folder = fill(tmp_path / "photos", *(f"{number:03}.png" for number in range(6)), "notes.txt")
    for number in range(6):
        for name in names:
            (folder / name.format(f"{number:03}")).write_bytes(b"\xef\xbb\xbf" + f"a thing {number},\nüber\n".encode())
    result = captioned_run(script, tmp_path, folder)
    assert result.code == 0, result.stderr
    assert captions_of(folder) == {f"{number:03}.png": [f"a thing {number},\nüber"] for number in range(6)}


def test_images_without_their_caption_file_are_told_at_the_start(script, tmp_path):
    folder = fill(tmp_path / "photos", *(f"{number}.png" for number in range(6)), "1.txt", "2.txt", "3.txt")
    (folder / "4.txt").write_text("")
    result = captioned_run(script, tmp_path, folder)
    assert result.code == 2 and "2 of 6 images in" in result.error and "the first 0.png" in result.error
    assert not (tmp_path / "run").exists()
    result = captioned_run(script, tmp_path, folder, skip_bad_images=True, max_train_steps=4)
    assert result.code == 0 and "it has no caption file beside it" in result.stderr
    assert load_images(train_data_dir=str(folder), caption_column="text", skip_bad_images=True).captions(4) == [""]


def test_a_folder_without_captions_says_where_they_are_looked_for(script, tmp_path):
    folder = fill(tmp_path / "data" / "images", "1.png", "2.png")
    (tmp_path / "data" / "metadata.jsonl").write_text('{"file_name": "images/1.png", "text": "a"}\n')
    result = captioned_run(script, tmp_path, folder)
    assert result.code == 2 and "neither .txt or .caption files beside the images nor a metadata.jsonl" in result.error
    assert f"{tmp_path / 'data' / 'metadata.jsonl'} lies above this folder" in result.error


@pytest.mark.slow
def test_an_edited_caption_file_is_noticed_by_the_cache_of_latents(script, tmp_path):
    folder = fill(tmp_path / "photos", *(f"{number}.png" for number in range(4)), *(f"{number}.txt" for number in range(4)))
    shared = {"latent_cache_dir": tmp_path / "cache", "center_crop": True}
    words = {"pretrained_model_name_or_path": model_folder(), "train_data_dir": folder, "resolution": 32, "train_batch_size": 4}
    made = script(flags({**words, **shared}), program="scripts/precompute_latents.py")
    assert made.code == 0, made.stderr
    assert captioned_run(script, tmp_path, folder, cache_latents=True, **shared).code == 0
    for number in range(4):
        (folder / f"{number}.txt").write_text("other words")
    result = captioned_run(script, tmp_path, folder, cache_latents=True, output_dir=tmp_path / "other", **shared)
    assert result.code == 1 and "'other words' is not in the latent cache" in result.error


def test_empty_captions_are_the_empty_prompt(script, tmp_path):
    texts = {"0.png": "a cat", "1.png": "", "2.png": "   ", "3.png": "a dog"}
    folder = described(fill(tmp_path / "photos", *texts), texts)
    assert captioned_run(script, tmp_path, folder, max_train_steps=4).code == 0
    assert captions_of(folder) == {"0.png": ["a cat"], "1.png": [""], "2.png": [""], "3.png": ["a dog"]}
    lists = {"0.png": ["a cat", "", " "], "1.png": [""], "2.png": ["b", "c"], "3.png": ["d"]}
    assert list(captions_of(described(folder, lists)).values()) == [["a cat"], [""], ["b", "c"], ["d"]]
    (folder / "metadata.jsonl").unlink()
    (folder / "metadata.csv").write_text("file_name,text\n0.png,NA\n1.png,\n2.png,7\n3.png,a dog\n")
    assert list(captions_of(folder).values()) == [["NA"], [""], ["7"], ["a dog"]]


@pytest.mark.parametrize("plan", [True, False])
def test_a_bad_first_sample_is_the_same_line_in_a_plan(script, tmp_path, plan):
    members = {f"{i}.{kind}": content for i in range(3) for kind, content in (("png", png()), ("json", b'{"caption": null}'))}
    write_tar(tmp_path / "data" / "0.tar", {**members, "9.png": png(), "9.json": b'{"caption": "a"}'})
    result = captioned_run(script, tmp_path, tmp_path / "data", caption_column="caption", train_batch_size=4, plan=plan)
    assert result.code == 1 and re.match(r"cannot read image \d in .*0\.tar: it has no caption \(.*the key 'caption'", result.error)
    assert "Plan:" not in result.stdout and (tmp_path / "run").exists() == (not plan)


def test_a_missing_caption_is_an_error(script, tmp_path):
    texts = {"0.png": "a cat", "1.png": None, "2.png": "b", "3.png": None}
    result = captioned_run(script, tmp_path, described(fill(tmp_path / "photos", *texts), texts), train_batch_size=4)
    assert result.code != 0 and "1.png" in result.error and "no caption" in result.error and "2 of" in result.error
    assert not (tmp_path / "run").exists()


# Metadata


def test_metadata_above_the_folders_of_the_splits(script, tmp_path):
    names = [f"{split}/t{number}.jpg" for split in ("train", "test") for number in range(4)]
    folder = described(fill(tmp_path / "photos", *names), {name: f"pic {name}" for name in names})
    result = captioned_run(script, tmp_path, folder)
    assert result.code == 0 and "4 files in test (beside train)" in result.stderr
    assert captions_of(folder) == {name: [f"pic {name}"] for name in names[:4]}


def test_metadata_with_the_separators_of_windows(tmp_path):
    folder = described(fill(tmp_path / "photos", "a/0.png", "b/1.png"), {"a\\0.png": "x", ".\\b\\1.png": "y"})
    assert captions_of(folder) == {"a/0.png": ["x"], "b/1.png": ["y"]}


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        ('{"file_name": "0.png", "text": "a"}\n{"file_name": "gone.png", "text": "b"}\n', "1 of the 2 images .*in row 2.*gone.png"),
        ('{"file_name": "photos/0.png", "text": "a"}\n', "1 of the 1 images .*photos/photos/0.png; file_name is a path from where"),
        ('{"file_name": "../../etc/passwd", "text": "a"}\n', "'../../etc/passwd', which does not lie in this folder"),
        ('{"file": "0.png", "text": "a"}\n', "metadata.jsonl has no column file_name.*its columns: file, text"),
        ("", "it is empty; metadata.jsonl"),
        (
            '{"file_name": "", "text": "a"}\n{"file_name": "0.png", "text": "b"}\n',
            "1 of the 2 images .*in row 1, is '', and there is no file",
        ),
        ('{"file_name": "0.png", "text": "a", "image": "x"}\n', "it has two columns 'image', of which file_name is one; metadata.jsonl"),
        ('{"file_name": 0, "text": "a"}\n', "its column file_name holds int64, not texts; metadata.jsonl"),
    ],
)
def test_metadata_are_checked_at_the_start(script, tmp_path, lines, told):
    folder = fill(tmp_path / "photos", "0.png", "1.png")
    (folder / "metadata.jsonl").write_text(lines)
    for result in (captioned_run(script, tmp_path, folder), script(tiny(tmp_path / "run", train_data_dir=folder, train_batch_size=2))):
        assert result.code == 2 and re.search(told, result.error), result.error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("text", ['{"file_name": "0.png", "text": "\xe9"}', '{"file_name": "\xe9.png", "text": "a"}'])
def test_metadata_of_another_encoding_are_told_at_the_start(script, tmp_path, text):
    folder = fill(tmp_path / "photos", "0.png", "1.png")
    (folder / "metadata.jsonl").write_bytes(text.encode("latin-1"))
    result = captioned_run(script, tmp_path, folder)
    assert result.code == 2 and re.search(r"'utf-8' codec can't decode byte 0xe9 .*; metadata\.jsonl", result.error)


@pytest.mark.parametrize(
    ("table", "told"),
    [
        ("file_name,text,text\n0.png,a,b\n", r"it has two columns 'text'; metadata\.csv"),
        ("file_name,file_name\n0.png,1.png\n", r"it has two columns 'file_name'; metadata\.csv"),
        ("file_name,text\n", r"it has no rows; metadata\.csv"),
    ],
)
def test_columns_that_are_there_twice_and_tables_without_rows(tmp_path, table, told):
    folder = fill(tmp_path / "photos", "0.png", "1.png")
    (folder / "metadata.csv").write_text(table)
    with pytest.raises(UserError, match=told):
        captions_of(folder)


def test_metadata_are_known_by_their_name_in_capitals(tmp_path):
    folder = described(fill(tmp_path / "photos", "0.png"), {"0.png": "a"}, "Metadata.JSONL")
    assert captions_of(folder) == {"0.png": ["a"]}


def test_a_table_by_semicolons_and_two_metadata_files_are_told(tmp_path):
    folder = fill(tmp_path / "photos", "0.png")
    (folder / "metadata.csv").write_text("file_name;text\n0.png;a\n")
    with pytest.raises(UserError, match=r"its only column is 'file_name;text': separate columns by commas; metadata\.csv"):
        captions_of(folder)
    (folder / "metadata.csv").write_text("file_name,text\n0.png,a cat, asleep, in the sun\n")
    with pytest.raises(UserError, match=r"line 2 has more fields than the header: a text with commas stands in quotes; metadata\.csv"):
        captions_of(folder)
    described(folder, {"0.png": "a"})
    with pytest.raises(UserError, match=r"holds both metadata\.csv and metadata\.jsonl"):
        captions_of(folder)


# Pixels


@pytest.mark.slow
def test_transparent_images_are_laid_upon_a_color_and_counted(script, tmp_path):
    folder = fill(tmp_path / "photos", "0.png", "1.jpg")
    for number, alpha in enumerate((0, 100, 255)):
        Image.new("RGBA", (8, 8), (0, 255, 0, alpha)).save(folder / f"alpha-{number}.png")
    shared = {"train_data_dir": folder, "train_batch_size": 5, "max_train_steps": 2, "dataloader_num_workers": 1}
    result = script(tiny(tmp_path / "run", **shared))
    lines = [line for line in result.stderr.splitlines() if line.startswith("transparent")]
    assert result.code == 0 and lines == [
        "transparent images are laid upon --alpha_color (white by default); how many is told at the end",
        "transparent: 4 of 10 images read",
    ]
    losses = []
    for color in ("black", "white"):
        assert script(tiny(tmp_path / color, **shared, alpha_color=color)).code == 0
        losses.append((tmp_path / color / "metrics.jsonl").read_text().splitlines()[0].split('"loss": ')[1].split(",")[0])
    assert losses[0] != losses[1] and losses[1] in (tmp_path / "run" / "metrics.jsonl").read_text()
    result = script(tiny(tmp_path / "no", **shared, alpha_color="whitish"))
    assert result.code == 2 and "--alpha_color 'whitish'" in result.error


def test_an_image_of_another_range_is_a_bad_image(script, tmp_path):
    folder = fill(tmp_path / "photos", "0.png", "1.png")
    Image.fromarray(noise(8, 8).astype("float32")).save(folder / "float.tif")
    result = script(tiny(tmp_path / "run", train_data_dir=folder, train_batch_size=3))
    assert result.code == 1 and "float.tif: its floats reach from" in result.error and "not from 0 to 1" in result.error
