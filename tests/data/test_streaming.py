"""Streams: what each rank reads in each epoch, exact positions, damage, tables, and whole runs."""

import io
import json
import re
import sys
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar
from urllib.parse import unquote, urlsplit
from zlib import crc32

import numpy as np
import pytest
import torch
from kills import final_hashes, finish, kill, metrics, start
from launch import run_command, tiny
from tars import captioned, numbered, png, write_tar

from immiscible.configs import UnconditionalConfig
from immiscible.data.loading import build_loader, images_of, load_images
from immiscible.data.stream_order import StreamDataset, StreamOrder
from immiscible.data.streaming import TarStream, load_stream
from immiscible.data.tars import Columns, tar_samples
from immiscible.data.tars import content as read_member
from immiscible.data.transforms import ImageTransform
from immiscible.errors import UserError
from immiscible.flags import parse_config
from immiscible.randomness import seeded_generator

CPU = torch.device("cpu")
COUNTS = (5, 3, 4, 1, 6)  # samples of each shard


@pytest.fixture
def folder(tmp_path):
    for number, count in enumerate(COUNTS):
        write_tar(tmp_path / "stream" / f"{number}.tar", captioned(100 * number, count, "png"))
    return tmp_path / "stream"


def stream_of(folder, **options):
    return load_stream(train_data_dir=str(folder), caption_column="text", **options)


def positions(order):
    """(shard, number in it) of each micro-batch."""
    return [[divmod(int(key.sample.key), 100) for key in keys] for keys in order]


def order_of(stream, cache, **options):
    return StreamOrder(stream, options.pop("batch_size", 1), seed=7, cache_dir=str(cache), **options)


# Order


@pytest.mark.parametrize("buffer", [1, 2, 1000])
@pytest.mark.parametrize("ranks", [1, 2])
def test_an_epoch_of_all_ranks_is_every_image_once(folder, tmp_path, ranks, buffer):
    seen, epochs = [], 3
    for rank in range(ranks):
        order = order_of(stream_of(folder), tmp_path, stop=sum(COUNTS) * epochs, rank=rank, num_processes=ranks, shuffle_buffer=buffer)
        own = [row for (row,) in positions(order)]
        for epoch in range(epochs):
            shards = torch.randperm(len(COUNTS), generator=seeded_generator(7, "shards", epoch, len(COUNTS))).tolist()[rank::ranks]
            wanted = [(shard, row) for shard in shards for row in range(COUNTS[shard])]
            found, own = own[: len(wanted)], own[len(wanted) :]
            assert [shard for shard, _ in found] == [shard for shard, _ in wanted]  # a shard after another
            assert sorted(found) == sorted(wanted) and (found == wanted) == (buffer == 1)
            seen += [(epoch, row) for row in found]
    assert sorted(seen) == [(epoch, (shard, row)) for epoch in range(epochs) for shard, count in enumerate(COUNTS) for row in range(count)]


def test_epochs_and_seeds_have_orders_of_their_own(folder, tmp_path):
    rows = [row for (row,) in positions(order_of(stream_of(folder), tmp_path, stop=2 * sum(COUNTS)))]
    other = [row for (row,) in positions(StreamOrder(stream_of(folder), 1, seed=8, stop=sum(COUNTS), cache_dir=str(tmp_path)))]
    assert len({str(part) for part in (rows[: sum(COUNTS)], rows[sum(COUNTS) :], other)}) == 3


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("buffer", [1, 3])
def test_a_position_is_reached_exactly_whether_or_not_sizes_are_known(folder, tmp_path, known, buffer):
    stream, options = stream_of(folder), {"batch_size": 2, "stop": 30, "num_processes": 2, "rank": 1, "shuffle_buffer": buffer}
    whole = list(order_of(stream, tmp_path / "first", **options))
    for first in (0, 1, 2, 5, 9, 29):
        cache = tmp_path / ("first" if known else f"fresh-{first}")
        rest = list(order_of(stream, cache, start=first, **options))
        assert [[key.number for key in keys] for keys in rest] == [[key.number for key in keys] for keys in whole[first:]]
        assert [[key.sample for key in keys] for keys in rest] == [[key.sample for key in keys] for keys in whole[first:]]


def test_shards_of_known_size_are_passed_unopened(folder, tmp_path, monkeypatch):
    opened, read = [], TarStream.read
    monkeypatch.setattr(TarStream, "read", lambda self, shard: opened.append(shard) or read(self, shard))
    stream = stream_of(folder)
    list(order_of(stream, tmp_path, stop=2 * sum(COUNTS)))
    opened.clear()
    list(order_of(stream_of(folder), tmp_path, start=2 * sum(COUNTS) - 1, stop=2 * sum(COUNTS)))
    assert len(opened) == 2  # one to look at the columns, one to read


def test_sizes_that_were_cut_off_cost_time_and_nothing_else(folder, tmp_path):
    stream = stream_of(folder)
    whole = positions(order_of(stream, tmp_path, stop=30))
    (path,) = (tmp_path / "shard-sizes").iterdir()
    lines = path.read_text().split()
    path.write_text(path.read_text()[:-3] + "\n3 1")
    assert positions(order_of(stream, tmp_path, start=25, stop=30)) == whole[25:]
    assert len(lines) == 2 * len(COUNTS) and set(path.read_text().split("\n")[-6:]) > {"3 1", ""}


def test_numbers_differ_between_images_and_epochs(folder, tmp_path):
    keys = [key.number for keys in order_of(stream_of(folder), tmp_path, stop=2 * sum(COUNTS)) for key in keys]
    assert len(set(keys)) == 2 * sum(COUNTS)


# Batches


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_do_not_depend_on_workers(folder, tmp_path, workers):
    stream = stream_of(folder)
    order = order_of(stream, tmp_path, batch_size=4, stop=5)
    dataset = StreamDataset(stream, ImageTransform(6, random_flip=True), with_captions=True, with_geometry=True)
    batches = list(images_of(build_loader(dataset, order, workers, CPU), skip_bad_images=False))
    assert [batch.captions for batch in batches] == [[f"caption {100 * a + b}" for a, b in rows] for rows in positions(order)]
    reference = list(images_of(build_loader(dataset, order_of(stream, tmp_path, batch_size=4, stop=5), 0, CPU), skip_bad_images=False))
    assert all(torch.equal(one.x0, other.x0) for one, other in zip(batches, reference, strict=True))
    assert all(torch.equal(one.geometry, other.geometry) for one, other in zip(batches, reference, strict=True))
    geometry = torch.cat([batch.geometry for batch in batches])
    assert geometry[:, :2].unique(dim=0).tolist() == [[8, 10]] and geometry[:, 2:4].unique(dim=0).tolist() == [[0, 0], [0, 1]]


def test_a_bad_image_is_named_and_replaced_by_the_next_of_its_batch(tmp_path, caplog):
    members = captioned(0, 4, "png")
    members["000000002.png"] = members["000000002.png"][:50]
    del members["000000003.txt"]
    write_tar(tmp_path / "s" / "x.tar", members)
    stream = stream_of(tmp_path / "s")
    loader = build_loader(
        StreamDataset(stream, ImageTransform(8), with_captions=True), order_of(stream, tmp_path, batch_size=4, stop=1), 0, CPU
    )
    with pytest.raises(UserError, match=r"cannot read image 00000000[23] in .*x\.tar: .*--skip_bad_images"):
        list(images_of(loader, skip_bad_images=False))
    skipping = StreamDataset(stream, ImageTransform(8), skip_bad_images=True, with_captions=True)
    loader = build_loader(skipping, order_of(stream, tmp_path, batch_size=4, stop=1), 0, CPU)
    with caplog.at_level("WARNING", logger="immiscible"):
        (batch,) = images_of(loader, skip_bad_images=True)
    assert sorted(set(batch.captions)) == ["caption 0", "caption 1"] and batch.x0.shape == (4, 3, 8, 8)
    assert "(2 skipped so far)" in caplog.text


@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_of_bad_images_takes_the_next_ones_of_the_stream(tmp_path, workers):
    """Three in a row, in batches of one."""
    members = captioned(0, 8, "png")
    for number in (2, 3, 4):
        members[f"00000000{number}.png"] = b"no image"
    write_tar(tmp_path / "s" / "x.tar", members)
    stream = stream_of(tmp_path / "s")
    dataset = StreamDataset(stream, ImageTransform(8), skip_bad_images=True, with_captions=True)
    for first in (0, 3):
        order = order_of(stream, tmp_path, start=first, stop=9, skip_bad_images=True)
        batches = images_of(build_loader(dataset, order, workers, CPU), skip_bad_images=True)
        assert [batch.captions for batch in batches] == [[f"caption {number}"] for number in (0, 1, 5, 5, 5, 5, 6, 7, 0)[first:]]


def test_a_damaged_shard(folder, tmp_path, caplog):
    path = folder / "2.tar"
    path.write_bytes(path.read_bytes()[:-12000])
    stream = stream_of(folder)
    with pytest.raises(UserError, match=r"shard .*2\.tar is damaged after \d samples: .*--skip_bad_images") as caught:
        positions(order_of(stream, tmp_path, stop=sum(COUNTS)))
    assert caught.value.exit_code == 1
    with caplog.at_level("WARNING", logger="immiscible"):
        whole = positions(order_of(stream, tmp_path, stop=40, skip_bad_images=True))
    assert caplog.text.count("2.tar is damaged") == 1
    used = {row for (_, row) in (rows[0] for rows in whole if rows[0][0] == 2)}
    assert used == set(range(len(used))) and 0 < len(used) < COUNTS[2]
    assert positions(order_of(stream, tmp_path, start=25, stop=40, skip_bad_images=True)) == whole[25:]


# Tables, and what the hub has


@pytest.fixture
def table(tmp_path):
    import datasets

    columns = {
        "image": [{"bytes": png(seed=number), "path": None} for number in range(9)],
        "label": [number % 3 for number in range(9)],
        "text": [[f"a {number}", f"b {number}"] for number in range(9)],
    }
    names = datasets.ClassLabel(names=["crane", "heron", "dog"])
    kinds = datasets.Features({"image": datasets.Image(), "label": names, "text": datasets.List(datasets.Value("string"))})
    rows = datasets.Dataset.from_dict(columns, features=kinds)
    (tmp_path / "table").mkdir()
    for number in range(3):
        rows.shard(3, number).to_parquet(tmp_path / "table" / f"train-{number}.parquet")
    return tmp_path / "table"


def test_parquet_files_stream_as_they_load(table, tmp_path):
    options = {"train_data_dir": str(table), "caption_column": "text", "labels_for": "--class_conditional"}
    stream, loaded = load_stream(**options), load_images(**options)
    assert stream.class_names == loaded.class_names == ["crane", "heron", "dog"] and len(stream.shards) == 3
    samples = [sample for shard in range(3) for sample in stream.read(shard)]
    assert len(samples) == len(loaded) == 9
    for index, sample in enumerate(samples):
        assert np.array_equal(np.asarray(sample.load()), np.asarray(loaded.load(index)))
        assert (sample.label(), sample.captions()) == (loaded.label(index), loaded.captions(index))
        assert sample.name == f"row {index % 3} of shard {index // 3} of {table}"
    dataset = StreamDataset(stream, ImageTransform(8), with_labels=True, with_captions=True)
    order = order_of(stream, tmp_path, batch_size=3, stop=3)
    batches = list(images_of(build_loader(dataset, order, 2, CPU), skip_bad_images=False))
    assert sorted(torch.cat([batch.labels for batch in batches]).tolist()) == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_class_names_of_a_table_are_captions_by_number(table):
    stream = load_stream(train_data_dir=str(table), caption_column="label")
    assert [sample.captions() for sample in stream.read(0)] == [["crane"], ["heron"], ["dog"]]
    assert stream.texts.features["label"].names == ["crane", "heron", "dog"]


def test_a_name_streams_as_its_shards_do(folder, table):
    """A local folder takes the hub's path through `datasets`."""
    named = load_stream(dataset_name=str(folder), caption_column="text")
    assert [sample.captions() for sample in named.read(3)] == [["caption 300"]] and len(named.shards) == 5
    rows = load_stream(dataset_name=str(table), caption_column="text")
    assert [sample.captions()[0] for sample in rows.read(1)] == ["a 3", "a 4", "a 5"]


COMMIT = "c" * 40
STREAM_FROM_THE_HUB = """
import json, sys
import torch
from immiscible.data.transforms import ImageTransform
from immiscible.data.loading import build_loader, images_of, load_images
from immiscible.data.stream_order import StreamDataset, StreamOrder
from immiscible.data.streaming import load_stream

found = {}
for name in sys.argv[2:]:
    stream = load_stream(dataset_name=name, caption_column="text")
    order = StreamOrder(stream, 4, seed=0, stop=2, cache_dir=sys.argv[1])
    loader = build_loader(StreamDataset(stream, ImageTransform(8), with_captions=True), order, 1, torch.device("cpu"))
    captions = [caption for batch in images_of(loader, False) for caption in batch.captions]
    found[name] = captions, [str(shard) for shard in stream.shards]
whole = load_images(dataset_name="some/tables", caption_column="text", cache_dir=sys.argv[1])
found["whole"] = [whole.load(3).size, *whole.captions(3)]
print(json.dumps(found))
"""


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as reading takes; ``files`` are those of its data sets, by ``set/path``."""

    files: ClassVar[dict[str, bytes]] = {}

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        api, held = (
            re.match("/api/datasets/some/([^/]+)(?:/tree/[^/]+/?(.*))?", path),
            re.match("/datasets/some/([^/]+)/resolve/[^/]+/(.+)", path),
        )
        if held and "/".join(held.groups()) in self.files:
            content = self.files["/".join(held.groups())]
            first, last = re.match(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or f"bytes=0-{len(content)}").groups()
            code, tag = 206 if "Range" in self.headers else 200, f'"{crc32(content)}"'
            self.answer(code, content[int(first) : int(last) + 1], ETag=tag, X_Repo_Commit=COMMIT)
        elif api and "/tree/" in path:
            folder = f"{api[1]}/{api[2]}/" if api[2] else f"{api[1]}/"
            inside = {file.removeprefix(folder) for file in self.files if file.startswith(folder)}
            names = {file.split("/")[0]: "directory" if "/" in file else "file" for file in inside}
            entries = [{"path": f"{api[2]}/{name}".strip("/"), "type": kind, "oid": COMMIT} for name, kind in sorted(names.items())]
            self.answer(
                200, json.dumps([entry | {"size": len(self.files.get(f"{api[1]}/{entry['path']}", b""))} for entry in entries]).encode()
            )
        elif api:
            self.answer(200, json.dumps({"id": f"some/{api[1]}", "sha": COMMIT, "siblings": [], "tags": []}).encode())
        else:
            self.answer(404, X_Error_Code="EntryNotFound")

    do_HEAD = do_GET

    def do_POST(self):  # paths-info
        self.rfile.read(int(self.headers["Content-Length"]))
        self.answer(404)

    def answer(self, code, content=b"", **headers):
        self.send_response(code)
        for name, value in {**headers, "Content-Length": len(content)}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *words):
        pass


def test_the_hub_is_streamed(folder, table, tmp_path):
    """Shards, parquet files, and a folder of images, by an interpreter of its own that takes a server of ours for the hub."""
    files = {f"shards/data/train-{number}.tar": (folder / f"{number}.tar").read_bytes() for number in (0, 1)}
    files |= {f"tables/{path.name}": path.read_bytes() for path in table.iterdir()}
    files |= {f"photos/train/{number}.png": png(seed=number) for number in range(3)}
    lines = [json.dumps({"file_name": f"{number}.png", "text": f"photo {number}"}) for number in range(3)]
    files["photos/train/metadata.jsonl"] = "\n".join(lines).encode()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("OwnHub", (Hub,), {"files": files}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        environment = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_OFFLINE": "0", "NO_PROXY": "*", "HF_TOKEN": ""}
        command = [sys.executable, "-c", STREAM_FROM_THE_HUB, tmp_path / "cache", "some/shards", "some/tables", "some/photos"]
        result = run_command(command, HF_HOME=str(tmp_path / "home"), **environment)
    finally:
        server.shutdown()
        server.server_close()
    assert result.code == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    captions, shards = found["some/shards"]
    assert set(captions) == {f"caption {number}" for number in (0, 1, 2, 3, 4, 100, 101, 102)}
    assert shards == [f"hf://datasets/some/shards@{COMMIT}/data/train-{number}.tar" for number in (0, 1)]
    captions, shards = found["some/tables"]
    assert len({caption.split()[1] for caption in captions}) == 8 and len(shards) == 3
    assert set(found["some/photos"][0]) == {"photo 0", "photo 1", "photo 2"}
    assert found["whole"] == [[10, 8], "a 3", "b 3"]


def test_any_file_system_of_fsspec_is_read_from_front_to_back():
    import fsspec

    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        for name, value in captioned(0, 40, "png").items():
            entry = tarfile.TarInfo(name)
            entry.size = len(value)
            tar.addfile(entry, io.BytesIO(value))
    with fsspec.open("memory://stream/0.tar", "wb") as file:
        file.write(content.getvalue())
    remote = TarStream("somewhere", ["memory://stream/0.tar"], Columns(caption="text"))
    assert [sample.captions() for sample in remote.read(0)] == [[f"caption {number}"] for number in range(40)]
    assert all(sample.members["json"] == b"" for sample in remote.read(0))  # what is not used is not kept

    class Watched(io.BytesIO):
        def read(self, *size):
            places.append(self.tell())
            return super().read(*size)

    places: list[int] = []
    assert len(list(tar_samples(Watched(content.getvalue()), lambda tar, member, _: len(read_member(tar, member))))) == 40
    *way, end = places
    assert way == sorted(way) and end >= way[-1] - tarfile.RECORDSIZE


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels_for": "--class_conditional"}, r"--class_conditional needs to know the classes beforehand"),
        ({"caption_column": "alt"}, r"--caption_column 'alt' means the key 'alt' of its \.json"),
        ({"image_column": "jpg"}, r"--image_column 'jpg': no such image"),
    ],
)
def test_what_a_stream_lacks(folder, options, message):
    with pytest.raises(UserError, match=message):
        load_stream(train_data_dir=str(folder), **options)


def test_nothing_to_stream(folder, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "x.png").write_bytes(png())
    with pytest.raises(UserError, match=r"--streaming reads \.tar or \.parquet files"):
        load_stream(train_data_dir=str(tmp_path / "photos"))
    with pytest.raises(UserError, match=r"--dataset_name .*absent: cannot stream"):
        load_stream(dataset_name=str(tmp_path / "absent"))
    with pytest.raises(UserError, match="fewer than the 6 processes"):
        order_of(stream_of(folder), tmp_path, stop=1, num_processes=6)
    with pytest.raises(UserError, match=r"--train_data_dir .*absent: no such folder"):
        load_stream(train_data_dir=str(tmp_path / "absent"))
    (tmp_path / "empty").mkdir()
    with tarfile.open(tmp_path / "empty" / "0.tar", "w"):
        pass
    (tmp_path / "empty" / "1.tar").write_bytes(b"no tar" * 200)
    with pytest.raises(UserError, match="a stream of 2 tar shards, of which none holds a sample that can be read"):
        stream_of(tmp_path / "empty")


def test_what_is_wrong_with_the_first_samples_is_told_when_they_are_met(folder, tmp_path):
    """A run with --skip_bad_images goes past them."""
    write_tar(folder / "0.tar", {})
    (folder / "1.tar").write_bytes(b"no tar" * 200)
    members = captioned(200, 4, "png")
    del members["000000200.txt"]
    write_tar(folder / "2.tar", members)
    order = order_of(stream_of(folder), tmp_path, stop=11, skip_bad_images=True)
    assert {shard for ((shard, _),) in positions(order)} == {2, 3, 4}
    with pytest.raises(UserError, match=r"1\.tar is damaged after 0 samples"):
        list(order_of(stream_of(folder), tmp_path / "other", stop=11))


def test_shards_without_images_end_the_run(tmp_path):
    write_tar(tmp_path / "s" / "0.tar", captioned(0, 1))
    write_tar(tmp_path / "s" / "1.tar", {})
    rank = torch.randperm(2, generator=seeded_generator(7, "shards", 0, 2)).tolist().index(1)
    with pytest.raises(UserError, match=f"the shards of process {rank} hold no images"):
        list(order_of(stream_of(tmp_path / "s"), tmp_path, stop=1, rank=rank, num_processes=2))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--bundled_data", "digits", "--max_train_steps", "3"], "--streaming is for --dataset_name or --train_data_dir"),
        (["--train_data_dir", "x"], "--streaming needs --max_train_steps"),
        (["--train_data_dir", "x", "--max_train_steps", "3", "--eval_steps", "1"], "--eval_steps needs images in any order"),
        (["--train_data_dir", "x", "--max_train_steps", "3", "--max_train_samples", "9"], "--max_train_samples needs images in any order"),
        (["--train_data_dir", "x", "--max_train_steps", "3", "--shuffle_buffer", "0"], "--shuffle_buffer must be at least 1"),
    ],
)
def test_flags_that_a_stream_cannot_serve(words, message):
    with pytest.raises(UserError, match=message):
        parse_config(UnconditionalConfig, ["--streaming", *words], program="train_unconditional.py", description="")


# Runs


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_and_resumed_in_the_middle_of_an_epoch(script, tmp_path, processes):
    members = numbered(30)
    names = list(members)
    for number in range(5):
        write_tar(tmp_path / "tars" / f"{number}.tar", {name: members[name] for name in names[12 * number : 12 * (number + 1)]})
    words = {"train_data_dir": tmp_path / "tars", "streaming": True, "shuffle_buffer": 4, "cache_dir": tmp_path / "cache"}
    words |= {"train_batch_size": 4, "max_train_steps": 9, "checkpointing_steps": 1, "random_flip": True, "use_ema": True}
    words |= {"resume_from_checkpoint": "latest", "noise_coupling": "assignment"}
    finish(start(script, tiny(tmp_path / "whole", **words), processes))
    runs = start(script, tiny(tmp_path / "cut", **words), processes)
    runs[0].wait_until((tmp_path / "cut" / "checkpoint-5").is_dir)
    kill(runs)
    words |= {"cache_dir": tmp_path / "another", "dataloader_num_workers": 1}
    results = finish(start(script, tiny(tmp_path / "cut", **words), processes))
    assert final_hashes(tmp_path / "cut", 9) == final_hashes(tmp_path / "whole", 9)
    assert "stream of 5 tar shards" in results[0].stderr and "an epoch" not in results[0].stderr
    assert [line["step"] for line in metrics(tmp_path / "cut")] == list(range(1, 10))
