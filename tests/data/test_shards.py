"""WebDataset shards as a source of images: the index against `datasets`' own reader, damage, captions, classes, and whole runs."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import tarfile

import numpy as np
import pytest
import torch
from kills import final_hashes, finish, kill, metrics, start
from launch import tiny
from PIL import Image
from tars import captioned, numbered, png, write_tar
from tiny_text import data_folder, reach, tiny_text

import immiscible.data.shards as shards
from immiscible.data.batches import GlobalBatchOrder, ImageDataset
from immiscible.data.loading import build_loader, images_of, load_images
from immiscible.data.transforms import ImageTransform
from immiscible.errors import UserError

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path):
    """Two shards of five and three samples, beside what else img2dataset leaves."""
    root = tmp_path / "laion"
    write_tar(root / "00000.tar", captioned(0, 5))
    write_tar(root / "00001.tar", captioned(10000, 3))
    for name in ("00000.parquet", "00001.parquet", "00000_stats.json"):
        (root / name).write_bytes(b"not read")
    return root


def load(folder, **options):
    return load_images(train_data_dir=str(folder), **options)


def array(image):
    return np.asarray(image)


def test_every_sample_as_datasets_reads_it(folder):
    import datasets

    source = load(folder, caption_column="text")
    theirs = datasets.load_dataset("webdataset", data_files=[str(folder / f"0000{number}.tar") for number in (0, 1)], split="train")
    assert len(source) == len(theirs) == 8 and "8 images in 2 shards" in source.description
    for index in (7, 0, 4, 5, 3, 1, 2, 6):
        assert np.array_equal(array(source.load(index)), array(theirs[index]["jpg"]))
        assert source.captions(index) == [theirs[index]["txt"].strip()]
        assert source.name(index) == f"{theirs[index]['__key__']} in {folder / ('00000.tar' if index < 5 else '00001.tar')}"


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_formats_with_folders_long_names_and_dots(tmp_path, tar_format):
    long = "n" * 90 if tar_format == tarfile.USTAR_FORMAT else "n" * 200
    first, second = png(), png()
    members = {
        f"deep/{long}.JPG.txt": b"not the image's caption",
        f"deep/{long}.png": first,
        "__meta__/._x.png": b"hidden",
        "a.b/x.png": second,
        "a.b/x.cls": b"7\n",
        "a.b/y.seg.png": first,
        "a.b/y.png": first,
    }
    write_tar(tmp_path / "s" / "x.tar", members, tar_format)
    source = load(tmp_path / "s")
    assert [source.name(index).split(" in ")[0] for index in range(3)] == [f"deep/{long}", "a.b/x", "a.b/y"]
    assert np.array_equal(array(source.load(0)), array(Image.open(io.BytesIO(first))))
    assert np.array_equal(array(source.load(1)), array(Image.open(io.BytesIO(second))))
    assert source.class_names == [str(number) for number in range(8)] and source.label(1) == 7


def test_samples_of_one_key_in_a_row_stay_apart(tmp_path):
    images = [png(), png()]
    with tarfile.open(tmp_path / "twice.tar", "w") as tar:
        for content in images:
            entry = tarfile.TarInfo("x.png")
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    source = load(tmp_path)
    assert len(source) == 2
    for index, content in enumerate(images):
        assert np.array_equal(array(source.load(index)), array(Image.open(io.BytesIO(content))))


def test_captions_from_text_and_from_keys_of_json(folder):
    assert load(folder, caption_column="txt").captions(5) == ["caption 10000"]
    assert load(folder, caption_column="caption").captions(5) == ["alt 10000"]
    assert load(folder, caption_column="names").captions(5) == ["a 10000", "b 10000"]
    with pytest.raises(ValueError, match="no caption"):
        load(folder).captions(0)


def test_shards_by_name_are_columns_called_after_the_extensions(folder):
    """A local folder takes the hub's path through `datasets`, which makes a table of the shards."""
    for path in folder.glob("0000?[._][ps]*"):
        path.unlink()
    source = load_images(dataset_name=str(folder), image_column="jpg", caption_column="txt")
    assert len(source) == 8 and [text.strip() for text in source.captions(5)] == ["caption 10000"]


def test_every_mode_becomes_three_channels(tmp_path):
    kinds = [("RGB", "PNG"), ("L", "PNG"), ("P", "PNG"), ("RGBA", "PNG"), ("CMYK", "JPEG"), ("1", "PNG"), ("I;16", "PNG")]
    members = {}
    for number, (mode, kind) in enumerate(kinds):
        stream = io.BytesIO()
        base = Image.fromarray(np.full((8, 8), 128, dtype=np.uint16)) if mode == "I;16" else Image.new(mode, (8, 8))
        base.save(stream, kind)
        members[f"{number}.{'jpg' if kind == 'JPEG' else 'png'}"] = stream.getvalue()
    write_tar(tmp_path / "modes.tar", members)
    source = load(tmp_path)
    dataset = ImageDataset(source, ImageTransform(8))
    assert all(dataset[0, index]["pixel_values"].shape == (3, 8, 8) for index in range(len(kinds)))


def test_the_index_is_made_once(folder, monkeypatch, tmp_path):
    first = load(folder, cache_dir=str(tmp_path / "cache"))
    scan, scanned = shards._scan, []
    monkeypatch.setattr(shards, "_scan", lambda shard: scanned.append(shard) or scan(shard))
    second = load(folder, cache_dir=str(tmp_path / "cache"))
    assert not scanned and np.array_equal(first.extents, second.extents) and first.fingerprint == second.fingerprint
    write_tar(folder / "00001.tar", captioned(20000, 4))
    third = load(folder, cache_dir=str(tmp_path / "cache"))
    assert scanned == [str(folder / "00001.tar")]
    assert len(third) == 9 and third.fingerprint != first.fingerprint and third.name(8).startswith("000020003 in")
    folder.rename(tmp_path / "moved")
    assert load(tmp_path / "moved").fingerprint == third.fingerprint


def test_an_index_that_was_cut_off_is_made_anew(folder, tmp_path):
    first = load(folder, cache_dir=str(tmp_path / "cache"))
    whole, empty = (tmp_path / "cache" / "tar-index").glob("*.npy")
    whole.write_bytes(whole.read_bytes()[:-8])
    empty.write_bytes(b"")
    assert np.array_equal(load(folder, cache_dir=str(tmp_path / "cache")).extents, first.extents)
    assert np.load(whole).shape[1] == np.load(empty).shape[1] == 3


@pytest.mark.parametrize("added", [[2**62, 2**62, 0], [512, 512, 0], [0, 0, 7]], ids=["absurd", "shifted", "another class"])
def test_a_damaged_index_is_made_anew(script, tmp_path, added):
    members = {f"{number}.{kind}": content for number in range(4) for kind, content in (("png", png()), ("cls", b"%d" % (number % 2)))}
    write_tar(tmp_path / "data" / "0.tar", members)
    words = {"train_data_dir": tmp_path / "data", "class_conditional": True, "train_batch_size": 4, "max_train_steps": 1}
    words["cache_dir"] = tmp_path / "cache"
    assert script(tiny(tmp_path / "whole", **words)).code == 0
    (path,) = (tmp_path / "cache" / "tar-index").glob("*.npy")
    content, rows = path.read_bytes(), np.load(path)
    path.write_bytes(content.replace(rows.tobytes(), (rows + np.array(added)).tobytes()))
    result = script(tiny(tmp_path / "run", **words))
    assert result.code == 0, result.stderr
    one, other = (metrics(tmp_path / name)[0]["loss"] for name in ("whole", "run"))
    assert one == other and np.array_equal(np.load(path), rows)


def test_a_class_beyond_all_images_is_told(script, tmp_path):
    members = {f"{number}.{kind}": content for number in range(4) for kind, content in (("png", png()), ("cls", b"1"))}
    write_tar(tmp_path / "data" / "0.tar", members | {"3.cls": b"9999"})
    words = {"train_data_dir": tmp_path / "data", "train_batch_size": 4, "max_train_steps": 1}
    result = script(tiny(tmp_path / "run", **words, class_conditional=True))
    assert result.code == 0 and "numbers in .cls members, which reach 9999" in result.stderr and "one of 10000 classes" in result.stderr
    assert "9999" not in script(tiny(tmp_path / "other", **words)).stderr


def test_a_shard_that_changed_while_it_was_in_use_is_a_bad_image(folder):
    source = load(folder)
    write_tar(folder / "00000.tar", {"x.txt": b""})
    item = ImageDataset(source, ImageTransform(8))[0, 3]
    (bad,) = item["bad"]
    assert "00000.tar" in bad.name and "not there any more" in bad.reason


@pytest.mark.parametrize("workers", [0, 2])
def test_ranks_and_workers_share_the_images_of_an_epoch(folder, workers):
    source = load(folder, caption_column="text")
    seen = []
    for rank in (0, 1):
        order = GlobalBatchOrder(len(source), 2, seed=3, stop=2, rank=rank, num_processes=2)
        loader = build_loader(ImageDataset(source, ImageTransform(8), with_captions=True), order, workers, CPU)
        seen += [caption for batch in images_of(loader, skip_bad_images=False) for caption in batch.captions]
    assert sorted(seen) == sorted(f"caption {number}" for number in (*range(5), *range(10000, 10003)))


def test_wherever_a_tar_is_cut_the_samples_before_are_whole_and_the_cut_is_told(tmp_path):
    members = captioned(0, 4)
    whole = write_tar(tmp_path / "whole.tar", members).read_bytes()
    table, damage = shards._scan(str(tmp_path / "whole.tar"))
    assert not damage and len(table) == 4
    path, ends = tmp_path / "cut.tar", [int(end) for end in table[:, 1]]
    for size in range(256, ends[-1], 512):
        for cut in (size, size + 256):
            path.write_bytes(whole[:cut])
            rows, damage = shards._scan(str(path))
            assert np.array_equal(rows, table[: len(rows)]) or (cut % 512 == 0 and not damage), cut
            complete = sum(end <= cut for end in ends)
            assert complete - 1 <= len(rows) <= complete + 1
            if cut % 512:
                assert damage and len(rows) <= complete, cut


def test_a_broken_header_is_not_taken_for_the_end(tmp_path):
    path = write_tar(tmp_path / "x.tar", captioned(0, 4))
    table, _ = shards._scan(str(path))
    content = bytearray(path.read_bytes())
    content[table[2, 0] : table[2, 0] + 512] = b"x" * 512
    path.write_bytes(content)
    rows, damage = shards._scan(str(path))
    assert f"byte {table[2, 0]}" in damage and np.array_equal(rows, table[:1])  # the second may have lost members


def test_a_damaged_shard_ends_the_run_or_is_used_up_to_the_damage(folder, caplog):
    path = folder / "00001.tar"
    rows, _ = shards._scan(str(path))
    path.write_bytes(path.read_bytes()[: rows[1, 0] + 600])
    with pytest.raises(UserError, match=r"shard .*00001\.tar is damaged: .*000010001\.jpg.*--skip_bad_images") as caught:
        load(folder)
    assert caught.value.exit_code == 1
    for _ in range(2):  # told each time
        caplog.clear()
        with caplog.at_level("WARNING", logger="immiscible"):
            source = load(folder, skip_bad_images=True)
        assert len(source) == 6 and "00001.tar is damaged" in caplog.text and "1 damaged so far" in caplog.text


def test_bad_samples_are_named_and_skipped_only_on_request(tmp_path, caplog):
    members = {
        **captioned(0, 1, "png"),
        "1.png": png()[:60],
        "1.txt": b"cut off",
        "2.txt": b"no image",
        "3.png": png(),
        "4.png": png(),
        "4.txt": b"\xff\xfe",
        "5.png": png(seed=5),
        "5.txt": b"  \n",
    }
    write_tar(tmp_path / "s" / "x.tar", members)
    source = load(tmp_path / "s", caption_column="text")
    reasons = ["truncated", "has no image (only txt)", "no caption", "utf-8"]
    dataset = ImageDataset(source, ImageTransform(8), with_captions=True)
    for index, reason in enumerate(reasons, start=1):
        (bad,) = dataset[0, index]["bad"]
        assert bad.name == f"{index} in {tmp_path / 's' / 'x.tar'}" and reason in bad.reason
    order = GlobalBatchOrder(len(source), 6, seed=0, stop=2)
    with pytest.raises(UserError, match=r"cannot read image \d in .*x\.tar: .*--skip_bad_images"):
        list(images_of(build_loader(dataset, order, 0, CPU), skip_bad_images=False))
    dataset.skip_bad_images = True
    with caplog.at_level("WARNING", logger="immiscible"):
        batches = list(images_of(build_loader(dataset, order, 0, CPU), skip_bad_images=True))
    assert {caption for batch in batches for caption in batch.captions} == {"caption 0", ""}  # a blank one is the empty prompt
    assert "(4 skipped so far)" in caplog.text and caplog.text.count("skipped image") == 4


def test_members_with_longer_names_are_image_and_caption(tmp_path):
    """As data sets of edited images have them."""
    pairs = [(f"{i}.{kind}", content) for i in range(3) for kind, content in (("input.jpg", png(seed=i)), ("outputs.txt", b"a %d" % i))]
    write_tar(tmp_path / "x.tar", pairs)
    source = load(tmp_path, image_column="input.jpg", caption_column="outputs.txt")
    assert [source.captions(i) for i in range(3)] == [["a 0"], ["a 1"], ["a 2"]] and source.load(0).size == (10, 8)
    with pytest.raises(UserError, match=r"its \.missing\.txt member, not found in .*members input\.jpg, outputs\.txt"):
        load(tmp_path, image_column="input.jpg", caption_column="missing.txt")


def test_shards_in_held_out_folders_are_not_trained_on(tmp_path, caplog):
    for name in ("train/0", "val/1", "2"):
        write_tar(tmp_path / f"{name}.tar", captioned(0, 2))
    assert len(load(tmp_path)) == 2 and "2 files in the folder itself, val (beside train)" in caplog.text


def test_one_of_the_first_samples_must_have_what_the_run_needs(tmp_path):
    members = captioned(0, 3)
    del members["000000000.txt"]
    write_tar(tmp_path / "x.tar", {"readme.txt": b"no sample", **members})
    source = load(tmp_path, caption_column="text")
    assert source.captions(2) == ["caption 1"] and len(source) == 4
    with pytest.raises(UserError, match=r"--caption_column 'alt' means.*its sample 000000002 in .*x\.tar has the members jpg, json"):
        load(tmp_path, caption_column="alt")


def test_numbers_that_are_no_classes(tmp_path):
    members = {f"{number}.{kind}": content for number in range(2) for kind, content in (("png", png()), ("cls", b"1"))}
    members["1.cls"] = b"20231115123456789012"
    write_tar(tmp_path / "x.tar", members)
    source = load(tmp_path, labels_for="--class_conditional")
    assert source.class_names == ["0", "1"]
    with pytest.raises(ValueError, match="it has no class"):
        source.label(1)


def test_classes_are_the_numbers_in_cls(tmp_path):
    members = {f"{number}.{kind}": content for number in range(4) for kind, content in (("png", png()), ("cls", b"%d" % (2 * number)))}
    members["3.cls"] = b"cat"
    write_tar(tmp_path / "x.tar", members)
    source = load(tmp_path, labels_for="--class_conditional")
    assert source.class_names == ["0", "1", "2", "3", "4"] and [source.label(index) for index in range(3)] == [0, 2, 4]
    (bad,) = ImageDataset(source, ImageTransform(8), with_labels=True)[0, 3]["bad"]
    assert "no class" in bad.reason


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"caption_column": "alt"}, r"--caption_column 'alt' means the key 'alt' of its .json member.*keys caption, names, status"),
        ({"image_column": "png"}, r"--image_column 'png': no such image.*members jpg, json, txt"),
        ({"labels_for": "--class_conditional"}, r"--class_conditional needs classes.*\.cls.*members jpg, json, txt"),
        ({"label_column": "class"}, r"--label_column 'class': .*\.cls"),
    ],
)
def test_what_a_shard_lacks(folder, options, message):
    with pytest.raises(UserError, match=message):
        load(folder, **options)


def test_no_samples_and_two_kinds_of_files(folder, tmp_path):
    write_tar(tmp_path / "empty" / "x.tar", {})
    with pytest.raises(UserError, match=r"its 1 \.tar files hold no samples"):
        load(tmp_path / "empty")
    write_tar(tmp_path / "text" / "x.tar", {"x.txt": b"a"})
    with pytest.raises(UserError, match=r"--image_column 'image': no such image.*members txt"):
        load(tmp_path / "text")
    (folder / "train-0.parquet").touch()
    with pytest.raises(UserError, match=r"holds both \.tar and \.parquet files"):
        load(folder)


def test_not_a_tar(tmp_path):
    (tmp_path / "x.tar").write_bytes(b"hello" * 300)
    with pytest.raises(UserError, match=r"x\.tar is damaged"):
        load(tmp_path)
    for kind, pack in (("gzip", gzip.compress), ("bzip2", bz2.compress), ("xz", lzma.compress)):
        (tmp_path / "x.tar").write_bytes(pack(b"hello" * 300))
        with pytest.raises(UserError, match=rf"x\.tar is damaged: it is compressed \({kind}\) and no plain tar: decompress it"):
            load(tmp_path)


@pytest.fixture
def both(tmp_path):
    """The same 24 images as files and as shards, in the same order."""
    members = numbered(24)
    names = list(members)
    for number in range(3):
        write_tar(tmp_path / "tars" / f"{number}.tar", {name: members[name] for name in names[16 * number : 16 * (number + 1)]})
    for name in names[::2]:
        (tmp_path / "files").mkdir(exist_ok=True)
        (tmp_path / "files" / name).write_bytes(members[name])
    return tmp_path


def test_a_run_on_shards_is_the_run_on_the_files_in_them(script, both):
    words = {"train_batch_size": 8, "max_train_steps": 4, "crop": "adm"}
    for kind, workers in (("files", 0), ("tars", 2)):
        finish(start(script, tiny(both / "runs" / kind, train_data_dir=both / kind, dataloader_num_workers=workers, **words), 1))
    files, tars = (metrics(both / "runs" / kind) for kind in ("files", "tars"))
    assert [line["loss"] for line in tars] == [line["loss"] for line in files]


@pytest.mark.slow
def test_killed_and_resumed_within_an_epoch(script, both):
    words = {"train_data_dir": both / "tars", "train_batch_size": 8, "max_train_steps": 7, "checkpointing_steps": 1}
    words |= {"resume_from_checkpoint": "latest", "random_flip": True, "class_conditional": True, "use_ema": True}
    finish(start(script, tiny(both / "whole", **words), 1))
    runs = start(script, tiny(both / "cut", **words), 1)
    runs[0].wait_until((both / "cut" / "checkpoint-4").is_dir)
    kill(runs)
    finish(start(script, tiny(both / "cut", **words), 1))
    assert final_hashes(both / "cut", 7) == final_hashes(both / "whole", 7)


@pytest.fixture
def text_shards(tmp_path):
    """The captioned images of `tiny_text` as two shards."""
    members = {}
    for number, line in enumerate((data_folder() / "metadata.jsonl").read_text().splitlines()):
        facts = json.loads(line)
        members[f"{number:05}.png"] = (data_folder() / facts["file_name"]).read_bytes()
        members[f"{number:05}.json"] = json.dumps({"captions": facts["text"]}).encode()
    names = list(members)
    for number in (0, 1):
        write_tar(tmp_path / "text" / f"{number}.tar", {name: members[name] for name in names[16 * number : 16 * (number + 1)]})
    return tmp_path / "text"


@pytest.mark.slow
def test_text_to_image_on_shards_is_that_on_a_folder(monkeypatch, text_shards, tmp_path):
    files = reach(monkeypatch, tiny_text(tmp_path / "files"), steps=3)
    tars = reach(monkeypatch, tiny_text(tmp_path / "tars", train_data_dir=text_shards, caption_column="captions"), steps=3)
    assert tars.losses == files.losses


@pytest.mark.slow
def test_text_to_image_streams_shards(monkeypatch, text_shards, tmp_path):
    words = {"train_data_dir": text_shards, "caption_column": "captions", "streaming": True, "shuffle_buffer": 3}
    streamed = reach(monkeypatch, tiny_text(tmp_path / "run", cache_dir=tmp_path / "cache", **words), steps=4)
    again = reach(monkeypatch, tiny_text(tmp_path / "run", cache_dir=tmp_path / "cache", **words, dataloader_num_workers=1), steps=4)
    assert streamed.losses == again.losses and len(set(streamed.losses)) == 4 and np.isfinite(streamed.losses).all()
