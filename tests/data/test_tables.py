"""Folders of images, parquet files and data sets of the hub: their images, classes and captions."""

from __future__ import annotations

import base64
import re
from pathlib import Path

import numpy as np
import pytest
from launch import tiny
from pictures import encoded, folder, noise, one_batch, save

from immiscible.data.batches import BadImage, ImageDataset, check_batch, collate
from immiscible.data.loading import load_images
from immiscible.data.tables import TableImages
from immiscible.data.transforms import ImageTransform
from immiscible.errors import UserError


@pytest.mark.parametrize(
    "names", [["cat/1.png", "dog/2.png"], ["z.png", "B.jpg", "a/b/c.png"], ["train/a/1.png", "train/b/2.png"], ["data/1.png"]]
)
def test_a_folder_is_in_the_order_and_has_the_classes_that_datasets_gives_it(tmp_path, names):
    import datasets

    for name in names:
        save(tmp_path / "images" / name, noise(8, 8, 3))
    theirs = datasets.load_dataset("imagefolder", data_dir=str(tmp_path / "images"), cache_dir=str(tmp_path / "cache"), split="train")
    ours = load_images(train_data_dir=str(tmp_path / "images"))
    paths = [cell["path"] for cell in theirs.cast_column("image", datasets.Image(decode=False))["image"]]
    assert [ours.name(index) for index in range(len(ours))] == paths
    names = theirs.features["label"].names if "label" in theirs.features else None
    assert ours.class_names == names


def test_folder_with_class_subfolders(tmp_path, capfd):
    source = folder(tmp_path, {"cat/1.png": noise(5, 5, 3), "dog/2.jpg": noise(6, 6, 3), "dog/deep/3.png": noise(7, 7)})
    assert len(source) == 3 and source.channels == 3
    assert {Path(source.name(i)).name for i in range(3)} == {"1.png", "2.jpg", "3.png"}
    assert "3 images" in source.description
    assert capfd.readouterr().err == ""  # no progress bars for a local folder


def test_changed_folder_is_read_anew(tmp_path):
    first = folder(tmp_path, {"1.png": noise(5, 5, 3), "2.png": noise(5, 5, 3)})
    same = load_images(train_data_dir=str(tmp_path))
    (tmp_path / "notes.txt").write_text("not an image")
    assert first.fingerprint == same.fingerprint == load_images(train_data_dir=str(tmp_path)).fingerprint
    new = noise(5, 5, 3)
    more = folder(tmp_path, {"3.png": new, "1.png": new})
    assert len(more) == 3 and more.fingerprint != first.fingerprint
    assert np.array_equal(more.load(0), new)
    (tmp_path / "3.png").rename(tmp_path / "4.png")
    assert load_images(train_data_dir=str(tmp_path)).fingerprint != more.fingerprint


def test_missing_and_empty_folders(tmp_path):
    with pytest.raises(UserError, match=r"--train_data_dir .*no such folder"):
        load_images(train_data_dir=str(tmp_path / "absent"))
    with pytest.raises(UserError, match=r"--train_data_dir .*no training images"):
        load_images(train_data_dir=str(tmp_path))
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(UserError, match=r"--train_data_dir .*no training images"):
        load_images(train_data_dir=str(tmp_path))


def test_images_that_the_metadata_leave_out_are_told(tmp_path, caplog):
    for name in ("0.png", "1.png", "deep/2.png", ".hidden/3.png"):
        save(tmp_path / name, noise(4, 4, 3))
    lines = ['{"file_name": "0.png", "text": "a"}\n', '{"file_name": "1.png", "text": "b"}\n', '{"file_name": "deep/2.png", "text": "c"}\n']
    for count in (3, 2):
        caplog.clear()
        (tmp_path / "metadata.jsonl").write_text("".join(lines[:count]))
        with caplog.at_level("WARNING", logger="immiscible"):
            assert len(load_images(train_data_dir=str(tmp_path), caption_column="text")) == count
        assert ("1 images that are in no line" in caplog.text and "the first deep/2.png" in caplog.text) == (count == 2)
    (tmp_path / "metadata.jsonl").write_text(lines[0] + "{")
    with pytest.raises(
        UserError, match=r"cannot read its images and what their metadata\.jsonl says \(JSON parse error.*; metadata\.jsonl\)"
    ):
        load_images(train_data_dir=str(tmp_path), caption_column="text")


def write_parquet(path, **columns):
    import datasets

    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(columns).to_parquet(path)


def test_parquet_with_image_structs(tmp_path):
    arrays = [noise(4, 6, 3) for _ in range(3)]
    cells = [{"bytes": encoded(a), "path": f"{i}.png"} for i, a in enumerate(arrays)]
    write_parquet(tmp_path / "deep" / "part.parquet", image=cells, text=["a", "b", "c"])
    (tmp_path / "README.md").write_text("about")
    source = load_images(train_data_dir=str(tmp_path))
    assert all(np.array_equal(source.load(i), a) for i, a in enumerate(arrays))
    assert source.name(1) == f"row 1 of {tmp_path} (1.png)"
    write_parquet(tmp_path / "deep" / "part.parquet", image=cells[:2], text=["a", "b"])
    assert len(load_images(train_data_dir=str(tmp_path))) == 2  # and not the cached three


def test_paths_in_parquet_are_from_where_it_lies(tmp_path, monkeypatch):
    monkeypatch.chdir("/")
    arrays = {name: noise(4, 6, 3) for name in ("x/0.png", "y/0.png")}
    for name, array in arrays.items():
        save(tmp_path / "images" / name, array)
    (tmp_path / "table").mkdir()
    write_parquet(tmp_path / "table [1]" / "a.parquet", image=[str(Path("..", "images", name)) for name in arrays])
    source = load_images(train_data_dir=str(tmp_path / "table [1]"))
    assert [np.array_equal(source.load(i), array) for i, array in enumerate(arrays.values())] == [True, True]
    assert source.sizes().tolist() == [(tmp_path / "images" / name).stat().st_size for name in arrays]


@pytest.mark.slow
def test_a_run_on_paths_in_parquet(script, tmp_path):
    for number in range(3):
        save(tmp_path / "images" / f"{number}.png", noise(8, 8, 3))
    write_parquet(tmp_path / "data" / "table.parquet", image=[f"../images/{number}.png" for number in range(3)])
    assert script(tiny(tmp_path / "run", train_data_dir=tmp_path / "data", train_batch_size=3), cwd=Path("/")).code == 0


def test_parquet_without_rows_is_named(script, tmp_path):
    write_parquet(tmp_path / "data" / "a.parquet", image=[b""][:0])
    result = script(tiny(tmp_path / "run", train_data_dir=tmp_path / "data"))
    assert result.code == 2 and "a.parquet, and they hold no rows" in result.error
    (tmp_path / "data" / "b.parquet").write_bytes(b"no")
    result = script(tiny(tmp_path / "run", train_data_dir=tmp_path / "data"))
    assert result.code == 2 and "b.parquet: Parquet file size is 2 bytes" in result.error and not (tmp_path / "run").exists()


def test_parquet_of_raw_bytes_in_a_named_column_and_an_empty_row(tmp_path):
    array = noise(4, 4)
    write_parquet(tmp_path / "a.parquet", picture=[encoded(array), None])
    source = load_images(train_data_dir=str(tmp_path), image_column="picture")
    assert np.array_equal(source.load(0), array)
    batch = one_batch(source, ImageTransform(4), [(0, 1)])
    assert batch["bad"] == [BadImage(f"row 1 of {tmp_path}", "the row holds no image")]


def as_text(kind: str) -> object:
    image = encoded(noise(40, 40, 3), "JPEG" if kind == "jpeg" else "PNG")
    packed = base64.b64encode(image)
    return {"bytes": packed, "hex": image.hex(), "uri": f"data:image/png;base64,{packed.decode()}"}.get(kind, packed.decode())


@pytest.mark.parametrize("kind", ["png", "jpeg", "bytes", "hex", "uri"])
def test_images_written_as_text_are_told_and_not_printed(script, tmp_path, kind):
    write_parquet(tmp_path / "data" / "a.parquet", image=[as_text(kind)] * 3)
    result = script(tiny(tmp_path / "run", train_data_dir=tmp_path / "data", train_batch_size=3))
    what = "hexadecimal digits" if kind == "hex" else "base64"
    assert result.code == 1 and f"it is written as a text of {what}; write the bytes that the text stands for" in result.error
    assert re.search(r"cannot read image row \d of \S+/data", result.error) and len(result.stderr) < 3000


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("https://example.org/a.jpg", "it is an address, and nothing is fetched: download the images"),
        ("pictures/a.jpg", "there is no such file where the table lies"),
        ("/pictures/a.jpg", "No such file or directory"),
    ],
)
def test_paths_to_nowhere(tmp_path, value, reason):
    write_parquet(tmp_path / "a.parquet", image=[value])
    batch = one_batch(load_images(train_data_dir=str(tmp_path)), ImageTransform(4), [(0, 0)])
    assert batch["bad"][0].reason.startswith(reason)
    assert batch["bad"][0].name == (value if value[0] == "/" else f"row 0 of {tmp_path} ({value})")


def test_sizes_of_cells_and_files(tmp_path):
    cells = [{"bytes": b"12345", "path": "x"}, None, {"bytes": None, "path": str(tmp_path / "absent")}]
    write_parquet(tmp_path / "table" / "a.parquet", image=cells)
    assert load_images(train_data_dir=str(tmp_path / "table")).sizes().tolist() == [5, -1, -1]
    source = folder(tmp_path / "files", {f"{i}.png": noise(8, 4 + i, 3) for i in range(3)})
    assert source.sizes().tolist() == [(tmp_path / "files" / f"{i}.png").stat().st_size for i in range(3)]


def test_captions_of_a_whole_table(tmp_path):
    cells = [{"bytes": b"", "path": None}] * 5
    write_parquet(tmp_path / "a.parquet", image=cells, text=["a", " \n", None, "b", ""], several=[["a", "b"], [], ["c", " "], None, ["d"]])
    for column, wanted in (("text", [["a"], [""], None, ["b"], [""]]), ("several", [["a", "b"], None, ["c"], None, ["d"]])):
        source = load_images(train_data_dir=str(tmp_path), caption_column=column)
        found = [None if isinstance(captions, ValueError) else captions for captions in source.all_captions(range(5))]
        assert found == wanted and [None if isinstance(e, ValueError) else e for e in source.all_captions(range(3, 4))] == wanted[3:4]
        with pytest.raises(ValueError, match=f"it has no caption in column '{column}'"):
            source.captions(wanted.index(None))


def test_the_names_of_caption_classes_are_looked_up_once(tmp_path, monkeypatch):
    """`datasets` copies a thousand names each time that it is asked for its features."""
    import datasets

    source = load_images(train_data_dir=write_classes(tmp_path / "a", [1, 0, 1], label=["a", "b"]), caption_column="label")
    features, asked = datasets.Dataset.features, []
    monkeypatch.setattr(datasets.Dataset, "features", property(lambda self: asked.append(1) or features.fget(self)))
    assert [source.captions(i) for i in range(3)] == [["b"], ["a"], ["b"]] == list(source.all_captions(range(3)))
    assert len(asked) <= 1


def test_parquet_files_named_after_splits(tmp_path):
    for split, rows in (("train", 2), ("test", 3)):
        write_parquet(tmp_path / "data" / f"{split}-00000-of-00001.parquet", image=[{"bytes": encoded(noise(4, 4)), "path": None}] * rows)
    assert len(load_images(train_data_dir=str(tmp_path))) == 2


def test_wrong_columns_list_the_right_ones(tmp_path):
    write_parquet(tmp_path / "a.parquet", image=[{"bytes": encoded(noise(4, 4)), "path": None}], size=[4])
    with pytest.raises(UserError, match=r"--image_column 'img' .*image, size"):
        load_images(train_data_dir=str(tmp_path), image_column="img")
    with pytest.raises(UserError, match=r"--image_column 'size' .*holds .*int64.*image, size"):
        load_images(train_data_dir=str(tmp_path), image_column="size")


def test_broken_parquet_is_one_line(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"no")
    with pytest.raises(UserError, match=r"--train_data_dir .*\.parquet") as caught:
        load_images(train_data_dir=str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("second", "told"),
    [
        ({"image": ["x"]}, r"column image is string in \S*b\.parquet and struct<.*> in \S*a\.parquet"),
        ({"picture": ["x"]}, r"column image is not there in \S*b\.parquet and struct<.*> in \S*a\.parquet"),
    ],
)
def test_parquet_files_that_do_not_agree_are_named(tmp_path, second, told):
    write_parquet(tmp_path / "a.parquet", image=[{"bytes": b"x", "path": None}])
    write_parquet(tmp_path / "b.parquet", **second)
    with pytest.raises(UserError, match=rf"cannot read its \.parquet files \({told}\)$"):
        load_images(train_data_dir=str(tmp_path), cache_dir=str(tmp_path / "cache"))


def test_hub_dataset(monkeypatch):
    import datasets

    asked = []

    def load_dataset(*args, **options):
        asked.append((args, options))
        table = datasets.Dataset.from_dict({"img": [{"bytes": encoded(noise(5, 4)), "path": None}] * 3, "label": [0, 1, 2]})
        return table.cast_column("img", datasets.Image())

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = load_images(dataset_name="some/set", dataset_config_name="small", image_column="img", cache_dir="/c")
    assert asked == [(("some/set", "small"), {"cache_dir": "/c", "split": "train"})]
    assert source.load(1).size == (4, 5) and source.name(1) == "row 1 of some/set/small"
    assert source.fingerprint == "some/set/small, 3 images, columns img label"


def test_unreachable_hub_is_one_line(monkeypatch):
    import datasets

    def load_dataset(*args, **options):
        raise ConnectionError("Couldn't reach it\nand more")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError, match=r"--dataset_name some/set: .*Couldn't reach it") as caught:
        load_images(dataset_name="some/set")
    assert caught.value.exit_code == 1 and "\n" not in str(caught.value)


def test_classes_of_folders_are_numbered_in_the_order_of_their_names(tmp_path):
    names = ["Zebra", "cat", "cat 2", "catfish", "crane"]
    images = {f"{name}/{i}.png": noise(4, 4, 3) for name in reversed(names) for i in range(2)}
    source = folder(tmp_path, images, labels_for="--class_conditional")
    assert list(source.class_names) == names
    assert sorted(source.label(i) for i in range(10)) == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert all(names[source.label(i)] == Path(source.name(i)).parent.name for i in range(10))


def test_a_folder_without_class_folders_has_no_classes(tmp_path):
    images = {"1.png": noise(4, 4, 3), "2.png": noise(4, 4, 3)}
    assert folder(tmp_path, images).class_names is None
    with pytest.raises(
        UserError, match=r"--class_conditional needs classes.*one subfolder per class; its columns: image; of classes: none"
    ):
        load_images(train_data_dir=str(tmp_path), labels_for="--class_conditional")


def write_classes(path, labels, **columns):
    """Images that hold their row's number; ``columns`` are names and their classes."""
    import datasets

    cells = [{"bytes": encoded(np.full((4, 4), i, np.uint8)), "path": None} for i in range(len(labels))]
    table = datasets.Dataset.from_dict({"image": cells, "size": labels, **dict.fromkeys(columns, labels)})
    for name, classes in columns.items():
        table = table.cast_column(name, datasets.ClassLabel(names=classes))
    path.mkdir(exist_ok=True)
    table.to_parquet(path / "train.parquet")
    return str(path)


def test_classes_of_parquet_files(tmp_path):
    labels, names = [2, 0, 1, 1], ["crane", "dog", "crane, the machine"]
    source = load_images(train_data_dir=write_classes(tmp_path / "one", labels, label=names))
    assert list(source.class_names) == names and [source.label(i) for i in range(4)] == labels
    two = write_classes(tmp_path / "two", labels, fine=names, coarse=["a", "b", "c"])
    assert load_images(train_data_dir=two).class_names is None
    source = load_images(train_data_dir=two, label_column="fine", labels_for="--class_conditional")
    assert list(source.class_names) == names and [source.label(i) for i in range(4)] == labels
    columns = r"its columns: image, size, fine, coarse; of classes: fine, coarse$"
    with pytest.raises(UserError, match=rf"--class_conditional needs classes.*--label_column.*{columns}"):
        load_images(train_data_dir=two, labels_for="--class_conditional")
    for wrong in ("size", "label", "image"):
        with pytest.raises(UserError, match=rf"--label_column '{wrong}' is not a column of classes .*{columns}"):
            load_images(train_data_dir=two, label_column=wrong)


def test_rows_without_a_class_are_bad_images(tmp_path):
    path = write_classes(tmp_path / "a", [0, 1, None, -1], label=["a", "b"])
    source = load_images(train_data_dir=path)
    dataset = ImageDataset(source, ImageTransform(4), with_labels=True)
    batch = collate([dataset[0, i] for i in range(4)])
    assert [bad.name.split()[1] for bad in batch["bad"]] == ["2", "3"] and batch["labels"].tolist() == [0, 1]
    with pytest.raises(UserError, match=r"row 2 .*its class is None, not a number from 0 to 1.*--skip_bad_images"):
        check_batch(batch, skip_bad_images=False)
    assert one_batch(source, ImageTransform(4), [(0, 2)])["bad"] == []  # a run without labels needs none


def test_classes_of_one_name_are_told_apart_by_number(tmp_path):
    import datasets

    table = datasets.Dataset.from_dict({"label": [2, 0, 1]}).cast_column("label", datasets.ClassLabel(num_classes=3))
    table.info.features["label"].names = ["crane", "dog", "crane"]  # `datasets` itself refuses to make or to read such a column
    source = TableImages(table, "image", "birds", "", labels=table)
    assert list(source.class_names) == ["crane", "dog", "crane"] and [source.label(i) for i in range(3)] == [2, 0, 1]


def test_a_parquet_file_with_classes_of_one_name_is_one_line(tmp_path):
    import json

    import pyarrow.parquet as pq

    write_classes(tmp_path, [2, 0, 1], label=["crane", "dog", "heron"])
    [path] = tmp_path.glob("*.parquet")
    table = pq.read_table(path)
    information = json.loads(table.schema.metadata[b"huggingface"])
    information["info"]["features"]["label"]["names"][2] = "crane"
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(information)}), path)
    with pytest.raises(UserError, match=r"cannot read its \.parquet files \(Some label names are duplicated"):
        load_images(train_data_dir=str(tmp_path), labels_for="--class_conditional")


def test_classes_of_a_hub_dataset(monkeypatch):
    import datasets

    table = datasets.Dataset.from_dict({"image": [{"bytes": encoded(noise(4, 4)), "path": None}] * 3, "label": [1, 0, 2]})
    table = table.cast_column("label", datasets.ClassLabel(names=["x", "y", "z"]))
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: table)
    source = load_images(dataset_name="some/set", labels_for="--class_conditional")
    assert list(source.class_names) == ["x", "y", "z"] and [source.label(i) for i in range(3)] == [1, 0, 2]
    assert source.fingerprint == "some/set, 3 images, columns image label"
