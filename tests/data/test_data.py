import io
import multiprocessing
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from immiscible.configs import UnconditionalConfig
from immiscible.data import bundled
from immiscible.data.batches import BadImage, GlobalBatchOrder, ImageDataset, check_batch, collate
from immiscible.data.bundled import BUNDLED
from immiscible.data.loading import build_loader, images_of, load_images
from immiscible.data.sources import ArrayImages, Subset, split_source
from immiscible.data.tables import TableImages
from immiscible.data.transforms import ImageTransform
from immiscible.errors import UserError
from immiscible.flags import parse_config

CPU = torch.device("cpu")
RANDOM = np.random.default_rng(0)


def noise(height, width, *channels):
    return RANDOM.integers(0, 256, (height, width, *channels), dtype=np.uint8)


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return path


def truncate(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    return path


def encoded(array, kind="PNG"):
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, kind)
    return stream.getvalue()


def grays(pixels):
    """[-1,1] -> 0..255"""
    return (pixels * 0.5 + 0.5) * 255


def one_batch(source, transform, keys, skip=False):
    dataset = ImageDataset(source, transform, skip)
    return collate([dataset[key] for key in keys])


@pytest.mark.parametrize("shape", [(100, 130), (131, 90), (64, 64), (20, 31), (16, 16), (47, 33)])
def test_the_adm_crop_follows_the_published_rule(shape):
    """guided-diffusion: halve (rounding down) by box filter while the short side is at least twice the size, scale the short side to
    the size by a bicubic filter with both sides rounded, and cut the middle square, the odd pixel below and right."""
    side, original = 16, noise(*shape, 3)
    image = Image.fromarray(original)
    while min(image.size) // side >= 2:
        image = image.resize([length // 2 for length in image.size], resample=Image.BOX)
    image = image.resize([round(length * (side / min(image.size))) for length in image.size], resample=Image.BICUBIC)
    top, left = ((length - side) // 2 for length in np.array(image).shape[:2])
    wanted = np.array(image)[top : top + side, left : left + side]
    for center_crop in (False, True):  # it is always the middle
        pixels = ImageTransform(side, center_crop=center_crop, crop="adm")(original, 0, 5)
        assert np.array_equal(grays(pixels).round().to(torch.uint8).permute(1, 2, 0).numpy(), wanted)


@pytest.mark.parametrize("names", [["cat/1.png", "dog/2.png"], ["a/train/1.png", "a/test/2.png"], ["train-1.png", "x.png"], ["data/1.png"]])
def test_the_quick_search_of_a_folder_finds_what_datasets_finds(tmp_path, names):
    import datasets

    for name in names:
        save(tmp_path / "images" / name, noise(8, 8, 3))
    theirs = datasets.load_dataset("imagefolder", data_dir=str(tmp_path / "images"), cache_dir=str(tmp_path / "cache"), split="train")
    ours = load_images(train_data_dir=str(tmp_path / "images"))
    paths = [cell["path"] for cell in theirs.cast_column("image", datasets.Image(decode=False))["image"]]
    assert [ours.name(index) for index in range(len(ours))] == paths
    names = theirs.features["label"].names if "label" in theirs.features else None
    assert ours.class_names == names


def test_adm_and_diffusers_crops_differ_and_16_bits_have_no_adm():
    original = noise(64, 64, 3)
    crops = [ImageTransform(8, center_crop=True, crop=crop)(original, 0, 0) for crop in ("adm", "diffusers")]
    assert not torch.equal(*crops)
    words = ["--train_data_dir", "x", "--crop", "adm", "--preserve_input_precision"]
    with pytest.raises(UserError, match="--crop adm is defined for 8-bit images"):
        parse_config(UnconditionalConfig, words, program="", description="")


@pytest.mark.parametrize(
    ("size", "resolution", "resized"),
    [((3, 5), 2, (2, 3)), ((5, 3), 2, (3, 2)), ((7, 9), 64, (64, 82)), ((101, 64), 64, (101, 64)), ((6, 6), 4, (4, 4))],
)
def test_resized_shape_is_torchvisions(size, resolution, resized):
    assert ImageTransform(resolution)._resized(*size) == resized


@pytest.mark.parametrize("precise", [False, True])
def test_resize_is_bilinear_with_antialias(precise):
    # 4 -> 2: triangle of half-width 2 around 1.0 weighs the pixels at 0.5, 1.5, 2.5 with 3/7, 3/7, 1/7.
    row = [0, 70, 140, 210]
    image = np.array([row, row], dtype=np.uint8)
    pixels = ImageTransform(1, channels=1, center_crop=True, preserve_input_precision=precise)(image, 0, 0)
    assert grays(pixels).flatten().tolist() == pytest.approx([(3 * 0 + 3 * 70 + 140) / 7], abs=1e-3)  # middle of 2, halves to even: left
    other = ImageTransform(1, channels=1, center_crop=True, preserve_input_precision=precise)(image[:, ::-1].copy(), 0, 0)
    assert grays(other).flatten().tolist() == pytest.approx([160], abs=1e-3)


@pytest.mark.parametrize(("width", "left"), [(3, 0), (4, 0), (5, 1), (6, 2), (7, 2)])
def test_center_crop_of_odd_sizes(width, left):
    image = np.tile(np.arange(width, dtype=np.uint8) * 20, (3, 1))
    pixels = ImageTransform(3, channels=1, center_crop=True)(image, 0, 0)
    assert grays(pixels)[0, 0].round().tolist() == [20 * (left + i) for i in range(3)]
    upright = ImageTransform(3, channels=1, center_crop=True)(image.T.copy(), 0, 0)
    assert torch.equal(upright, pixels.transpose(1, 2))


def test_bytes_map_as_to_tensor_and_normalize_do():
    image = np.arange(256, dtype=np.uint8).reshape(16, 16)
    pixels = ImageTransform(16, channels=1)(image, 0, 0)
    expected = (torch.from_numpy(image).to(torch.float32) / 255 - 0.5) / 0.5
    assert pixels.dtype == torch.float32 and pixels.shape == (1, 16, 16) and pixels.is_contiguous()
    assert torch.equal(pixels[0], expected)
    assert pixels.min() == -1 and pixels.max() == 1


def test_random_crops_cover_the_range_and_differ_between_epochs():
    image = np.tile(np.arange(10, dtype=np.uint8), (4, 1))
    transform = ImageTransform(4, channels=1, seed=3)
    lefts = [int(grays(transform(image, epoch, index))[0, 0, 0].round()) for epoch in range(2) for index in range(100)]
    assert set(lefts) == set(range(7))
    assert lefts[:100] != lefts[100:]
    assert lefts != [int(grays(replace(transform, seed=4)(image, e, i))[0, 0, 0].round()) for e in range(2) for i in range(100)]


def test_flip_mirrors_half_and_leaves_the_crop_alone():
    image = noise(9, 5)
    plain, flipping = ImageTransform(5, channels=1), ImageTransform(5, channels=1, random_flip=True)
    flipped = 0
    for index in range(200):
        a, b = plain(image, 0, index), flipping(image, 0, index)
        assert torch.equal(a, b) or torch.equal(a.flip(-1), b)
        flipped += not torch.equal(a, b)
    assert 70 < flipped < 130
    centered = [
        torch.equal(replace(flipping, center_crop=True)(image, 0, i), replace(plain, center_crop=True)(image, 0, i)) for i in range(50)
    ]
    assert centered == [torch.equal(flipping(image, 0, i), plain(image, 0, i)) for i in range(50)]  # nor the crop the flip


def test_flip_without_crop_is_an_exact_mirror():
    image = noise(6, 6, 3)
    results = {tuple(ImageTransform(6, random_flip=True)(image, 0, i).flatten().tolist()) for i in range(40)}
    plain = ImageTransform(6)(image, 0, 0)
    assert results == {tuple(plain.flatten().tolist()), tuple(plain.flip(-1).flatten().tolist())}


@pytest.mark.parametrize("precise", [False, True])
@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F"])
def test_modes_become_the_wanted_channels(mode, channels, precise):
    image = Image.new(mode, (9, 7))
    pixels = ImageTransform(4, channels, preserve_input_precision=precise)(image, 0, 0)
    assert pixels.shape == (channels, 4, 4) and pixels.dtype == torch.float32 and pixels.is_contiguous()
    if mode in ("I", "I;16", "F") and channels == 4:
        assert pixels[:3].eq(-1).all() and pixels[3].sub(1).abs().max() < 1e-6  # opaque


def test_colors_survive_the_conversion():
    color = (200, 100, 50)
    rgb = Image.new("RGB", (8, 8), color)
    for image in (rgb, rgb.convert("RGBA"), rgb.convert("P", palette=Image.Palette.ADAPTIVE), rgb.convert("CMYK")):
        assert grays(ImageTransform(8)(image, 0, 0))[:, 4, 4].tolist() == pytest.approx(color, abs=1)
    gray = ImageTransform(8)(Image.new("L", (8, 8), 77), 0, 0)
    assert grays(gray)[:, 0, 0].tolist() == pytest.approx([77, 77, 77], abs=1e-3)


@pytest.mark.filterwarnings("error")
def test_transparent_palette_gives_no_warning():
    image = Image.new("P", (4, 4))
    image.info["transparency"] = bytes([0, 128])
    assert ImageTransform(4)(image, 0, 0).shape == (3, 4, 4)


def test_sixteen_bits_are_kept_or_rounded_but_not_clipped(tmp_path):
    ramp = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    source = folder(tmp_path, {"ramp.png": ramp})
    assert source.load(0).mode == "I;16"
    precise = one_batch(source, ImageTransform(64, preserve_input_precision=True), [(0, 0)])["pixel_values"][0]
    assert len(precise[0].unique()) > 256
    assert torch.equal(precise[0], precise[1]) and torch.equal(precise[0], precise[2])
    assert torch.equal(precise[0], (torch.from_numpy(ramp.astype(np.float32)) / 65535 - 0.5) / 0.5)
    coarse = one_batch(source, ImageTransform(64), [(0, 0)])["pixel_values"][0]
    assert len(coarse[0].unique()) == 256
    assert (coarse - precise).abs().max() <= 1 / 255 + 1e-6


def test_precise_scales_of_32_bit_modes():
    transform = ImageTransform(2, channels=1, preserve_input_precision=True)
    integers = np.array([[0, 2**31 - 1], [2**30, 0]], dtype=np.int32)
    assert transform(integers, 0, 0).flatten().tolist() == pytest.approx([-1, 1, 0, -1], abs=1e-6)
    floats = np.array([[0, 1], [0.25, 1.5]], dtype=np.float32)
    assert transform(floats, 0, 0).flatten().tolist() == [-1, 1, -0.5, 2]


def test_precise_path_agrees_with_bytes_on_8_bit_images():
    image = noise(40, 31, 3)
    coarse, precise = (ImageTransform(16, center_crop=True, preserve_input_precision=p)(image, 0, 0) for p in (False, True))
    assert (coarse - precise).abs().max() < 2.5 / 255  # Pillow rounds after each of its two passes


@pytest.mark.parametrize("options", [{"channels": 2}, {"resolution": 0}])
def test_impossible_transforms(options):
    with pytest.raises(UserError):
        ImageTransform(**{"resolution": 8, **options})


def folder(path, images, **options):
    for name, array in images.items():
        save(path / name, array)
    return load_images(train_data_dir=str(path), **options)


def test_digits_are_the_real_ones():
    from sklearn.datasets import load_digits

    source, reference = load_images(), load_digits().images
    assert (len(source), source.channels) == (1797, 1)
    assert all(np.array_equal(source.load(i), np.round(reference[i] * 255 / 16)) for i in range(1797))
    assert source.load(0).dtype == np.uint8 and max(source.load(i).max() for i in range(9)) == 255
    assert ImageTransform(8, source.channels)(source.load(5), 0, 5).shape == (1, 8, 8)
    assert "1797" in source.description and source.name(3) == "image 3 of digits"


def test_photo_crops_are_a_function_of_the_index():
    source = load_images(bundled_data="photo_crops", resolution=32)
    assert (len(source), source.channels) == (8192, 3)
    before = [np.array(source.load(i)) for i in (0, 17, 8191)]
    torch.manual_seed(5)
    bundled._photographs.cache_clear()
    again = load_images(bundled_data="photo_crops", resolution=32)
    assert all(np.array_equal(a, again.load(i)) for a, i in zip(before, (0, 17, 8191), strict=True))
    pixels = [ImageTransform(32, seed=seed)(source.load(3), epoch, 3) for seed in (0, 1) for epoch in (0, 1)]
    assert pixels[0].numel() == 3072 and all(torch.equal(pixels[0], other) for other in pixels)
    assert len({np.array(source.load(i)).tobytes() for i in range(200)}) == 200
    assert again.fingerprint == source.fingerprint != load_images(bundled_data="photo_crops", resolution=16).fingerprint


def test_photo_crops_larger_than_the_photographs():
    source = load_images(bundled_data="photo_crops", resolution=700)
    assert [source.load(i).size for i in range(3)] == [(700, 700)] * 3


def test_missing_photographs_are_the_users_line(monkeypatch):
    monkeypatch.setattr(bundled, "PHOTOGRAPHS", {"skimage": ["data/no_such.png"]})
    bundled._photographs.cache_clear()
    with pytest.raises(UserError, match=r"photo_crops.*scikit-image"):
        load_images(bundled_data="photo_crops")
    bundled._photographs.cache_clear()


def test_unknown_bundled_data_lists_the_choices():
    with pytest.raises(UserError, match=", ".join(BUNDLED)):
        load_images(bundled_data="cats")


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
        assert ("1 images of" in caplog.text and "the first deep/2.png" in caplog.text) == (count == 2)
    (tmp_path / "metadata.jsonl").write_text(lines[0] + "{")
    with pytest.raises(UserError, match=r"cannot read its images and what their metadata\.jsonl says \(JSON parse error"):
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


def test_parquet_of_raw_bytes_in_a_named_column_and_an_empty_row(tmp_path):
    array = noise(4, 4)
    write_parquet(tmp_path / "a.parquet", picture=[encoded(array), None])
    source = load_images(train_data_dir=str(tmp_path), image_column="picture")
    assert np.array_equal(source.load(0), array)
    batch = one_batch(source, ImageTransform(4), [(0, 1)])
    assert batch["bad"] == [BadImage(f"row 1 of {tmp_path}", "the row holds no image")]


def test_sizes_of_cells_and_files(tmp_path):
    cells = [{"bytes": b"12345", "path": "x"}, None, {"bytes": None, "path": str(tmp_path / "absent")}]
    write_parquet(tmp_path / "table" / "a.parquet", image=cells)
    assert load_images(train_data_dir=str(tmp_path / "table")).sizes().tolist() == [5, -1, -1]
    source = folder(tmp_path / "files", {f"{i}.png": noise(8, 4 + i, 3) for i in range(3)})
    assert source.sizes().tolist() == [(tmp_path / "files" / f"{i}.png").stat().st_size for i in range(3)]


def test_captions_of_a_whole_table(tmp_path):
    cells = [{"bytes": b"", "path": None}] * 5
    write_parquet(tmp_path / "a.parquet", image=cells, text=["a", " \n", None, "b", ""], several=[["a", "b"], [], ["c", " "], None, ["d"]])
    for column, wanted in (("text", [["a"], None, None, ["b"], None]), ("several", [["a", "b"], None, None, None, ["d"]])):
        source = load_images(train_data_dir=str(tmp_path), caption_column=column)
        found = [None if isinstance(captions, ValueError) else captions for captions in source.all_captions(range(5))]
        assert found == wanted and [None if isinstance(e, ValueError) else e for e in source.all_captions(range(3, 4))] == wanted[3:4]
        with pytest.raises(ValueError, match=f"it has no caption in column '{column}'"):
            source.captions(2)


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


def test_two_sources_are_one_too_many(tmp_path):
    with pytest.raises(UserError, match=r"--dataset_name and --train_data_dir"):
        load_images(dataset_name="some/set", train_data_dir=str(tmp_path))


def test_max_train_samples():
    everything, some = load_images(), load_images(max_train_samples=100)
    assert len(load_images(max_train_samples=10**6)) == len(everything) == 1797
    assert load_images(max_train_samples=10**6).fingerprint == everything.fingerprint != some.fingerprint
    assert len(some) == 100 and some.channels == 1 and "100" in some.description
    again = load_images(max_train_samples=100)
    assert [some.name(i) for i in range(100)] == [again.name(i) for i in range(100)] != [everything.name(i) for i in range(100)]
    assert len({some.name(i) for i in range(100)}) == 100
    assert np.array_equal(some.load(7), everything.load(int(some.name(7).split()[1])))
    with pytest.raises(UserError, match="--max_train_samples 0"):
        load_images(max_train_samples=0)


# Classes


def test_labels_of_the_digits_are_sklearns_through_every_subset():
    from sklearn.datasets import load_digits

    target = load_digits().target
    source = load_images(labels_for="--class_conditional")
    assert list(source.class_names) == [str(digit) for digit in range(10)]
    assert [source.label(i) for i in range(1797)] == target.tolist() and type(source.label(0)) is int
    train, held_out = split_source(load_images(max_train_samples=200), 0.2)
    for part in (train, held_out):
        assert part.class_names == source.class_names
        assert [part.label(i) for i in range(len(part))] == [target[int(part.name(i).split()[1])] for i in range(len(part))]


def test_photo_crops_have_no_classes():
    source = load_images(bundled_data="photo_crops", resolution=8)
    assert source.class_names is None and Subset(source, [1]).class_names is None
    with pytest.raises(UserError, match=r"--class_conditional needs classes, and --bundled_data photo_crops has none"):
        load_images(bundled_data="photo_crops", labels_for="--class_conditional")
    with pytest.raises(UserError, match=r"class labels are asked for, and photo_crops .* has none"):
        ImageDataset(source, ImageTransform(8), with_labels=True)


def test_bundled_data_has_no_label_column():
    words = ["--bundled_data", "digits", "--label_column", "fine", "--class_conditional"]
    with pytest.raises(UserError, match=r"--label_column names a column of --dataset_name or --train_data_dir"):
        parse_config(UnconditionalConfig, words, program="train_unconditional.py", description="", no_data_config=Path("none.yaml"))


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


def labelled_batches(workers, start=0, with_labels=True):
    """Image i is of the gray i, and of class i * i modulo 7."""
    grays = np.arange(20, dtype=np.uint8)
    source = ArrayImages(np.tile(grays[:, None, None], (1, 8, 8)), "grays", labels=(np.arange(20) ** 2) % 7, class_names=list("abcdefg"))
    dataset = ImageDataset(source, ImageTransform(8, channels=1, random_flip=True), with_labels=with_labels)
    return list(images_of(build_loader(dataset, GlobalBatchOrder(20, 4, 5, start=start, stop=12), workers, CPU), False))


@pytest.mark.parametrize("workers", [0, 2])
def test_labels_stay_with_their_images(workers):
    batches = labelled_batches(workers)
    seen = []
    for x0, labels, _ in batches:
        numbers = grays(x0)[:, 0, 0, 0].round().long()
        assert labels.dtype == torch.int64 and torch.equal(labels, numbers**2 % 7)
        seen += numbers.tolist()
    assert sorted(seen[:20]) == list(range(20)) and seen[:20] != seen[20:40]  # shuffled, anew in each epoch
    for (x0, labels, _), (again, same, _) in zip(batches[7:], labelled_batches(workers, start=7), strict=True):
        assert torch.equal(x0, again) and torch.equal(labels, same)
    plain = labelled_batches(workers, with_labels=False)
    assert all(labels is None and torch.equal(x0, batch.x0) for (x0, labels, _), batch in zip(plain, batches, strict=True))


def test_a_substitute_brings_its_own_label(tmp_path):
    source = folder(tmp_path, {f"{'ab'[i % 2]}/{i}.png": np.full((8, 8), 10 * i, np.uint8) for i in range(6)})
    names = [Path(source.name(i)).name for i in range(6)]
    truncate(tmp_path / "a" / "4.png")  # before b/1.png
    dataset = ImageDataset(source, ImageTransform(8, channels=1), skip_bad_images=True, with_labels=True)
    batch = collate([dataset[0, i] for i in range(6)])
    numbers = (grays(batch["pixel_values"])[:, 0, 0, 0] / 10).round().long()
    assert numbers[names.index("4.png")] == 1 and len(numbers) == 6
    assert torch.equal(batch["labels"], numbers % 2)


def test_photographs_taken_sideways_are_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[274] = 6  # orientation: rotate by 90 degrees
    Image.new("RGB", (8, 4)).save(tmp_path / "a.jpg", exif=exif)
    assert load_images(train_data_dir=str(tmp_path)).load(0).size == (4, 8)


def test_broken_exif_data_spoils_no_image(tmp_path):
    Image.new("RGB", (8, 4)).save(tmp_path / "a.png", exif=b"Exif\0\0what is this")
    assert load_images(train_data_dir=str(tmp_path)).load(0).size == (8, 4)


@pytest.mark.parametrize("kind", ["png", "jpg"])
def test_truncated_image_is_named(tmp_path, kind):
    path = truncate(save(tmp_path / f"b.{kind}", noise(64, 64, 3)))
    source = folder(tmp_path, {"a.png": noise(8, 8, 3)})
    loader = build_loader(ImageDataset(source, ImageTransform(8)), GlobalBatchOrder(2, 2, 0, stop=1), 1, CPU)
    (batch,) = loader
    with pytest.raises(UserError, match=r"cannot read image .*; remove it or pass --skip_bad_images") as caught:
        check_batch(batch, skip_bad_images=False)
    assert str(path) in str(caught.value) and caught.value.exit_code == 1 and "\n" not in str(caught.value)


def test_file_that_is_no_image_and_file_that_is_gone(tmp_path):
    source = folder(tmp_path, {"a.png": noise(8, 8), "b.png": noise(8, 8), "c.png": noise(8, 8)})
    (tmp_path / "a.png").write_text("hello")
    (tmp_path / "b.png").unlink()
    batch = one_batch(source, ImageTransform(8), [(0, 0), (0, 1), (0, 2)])
    assert [Path(bad.name).name for bad in batch["bad"]] == ["a.png", "b.png"]
    assert [bad.reason for bad in batch["bad"]] == ["not an image format that Pillow knows", "No such file or directory"]
    assert batch["pixel_values"].shape == (1, 3, 8, 8)


@pytest.mark.parametrize("precise", [False, True])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_float_tiff_that_is_not_finite(tmp_path, value, precise):
    pixels = np.full((8, 8), 0.5, dtype=np.float32)
    pixels[3, 3] = value
    source = folder(tmp_path, {"a.tiff": pixels, "b.tiff": np.full((8, 8), 0.5, dtype=np.float32)})
    transform = ImageTransform(8, preserve_input_precision=precise)
    with pytest.raises(UserError, match=r"a\.tiff: it has NaN or infinite pixels"):
        check_batch(one_batch(source, transform, [(0, 0)]), skip_bad_images=False)
    good = one_batch(source, transform, [(0, 1)])
    assert check_batch(good, skip_bad_images=False) == []
    assert good["pixel_values"].abs().max() < 0.01


def test_skipping_puts_the_next_readable_image_and_counts(tmp_path):
    images = {f"{i}.png": noise(8, 8, 3) for i in range(5)}
    source = folder(tmp_path, images)
    for i in (1, 2, 4):
        truncate(tmp_path / f"{i}.png")
    batch = one_batch(source, ImageTransform(8), [(0, i) for i in range(5)], skip=True)
    skipped = check_batch(batch, skip_bad_images=True)
    assert sorted(Path(bad.name).name for bad in skipped) == ["1.png", "2.png", "4.png"]
    used = [images[f"{i}.png"] for i in (0, 3, 3, 3, 0)]
    assert torch.equal(batch["pixel_values"], torch.stack([ImageTransform(8)(image, 0, 0) for image in used]))


@pytest.mark.parametrize(("skip", "message"), [(True, "none of the images can be read"), (False, "cannot read image")])
def test_all_bad(tmp_path, skip, message):
    source = folder(tmp_path, {f"{i}.png": noise(8, 8, 3) for i in range(3)})
    for path in tmp_path.iterdir():
        truncate(path)
    batch = one_batch(source, ImageTransform(8), [(0, 0), (0, 1)], skip=skip)
    with pytest.raises(UserError, match=message) as caught:
        check_batch(batch, skip)
    assert caught.value.exit_code == 1


def test_unconvertible_mode_is_a_bad_image():
    class Lab(ArrayImages):
        def load(self, index):
            return Image.new("LAB", (8, 8))

    batch = one_batch(Lab(np.zeros((1, 8, 8), np.uint8), "lab"), ImageTransform(8, channels=1), [(0, 0)])
    assert "LAB" in batch["bad"][0].reason


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_global_rows_do_not_depend_on_the_ranks(ranks):
    per_rank = [list(GlobalBatchOrder(30, 8 // ranks, 7, stop=9, rank=r, num_processes=ranks)) for r in range(ranks)]
    merged = [[key for rows in per_rank for key in rows[m]] for m in range(9)]
    assert merged == list(GlobalBatchOrder(30, 8, 7, stop=9))


def test_epochs_are_permutations_without_their_last_short_batch():
    order = GlobalBatchOrder(30, 8, 7, stop=6)
    batches = list(order)
    assert order.batches_per_epoch == 3 and len(order) == len(batches) == 6
    assert [{epoch for epoch, _ in batch} for batch in batches] == [{0}] * 3 + [{1}] * 3
    for epoch in (0, 1):
        rows = [index for batch in batches[3 * epoch : 3 * epoch + 3] for _, index in batch]
        assert len(set(rows)) == 24 and set(rows) <= set(range(30))
    assert [i for _, i in batches[0]] != [i for _, i in batches[3]]
    assert batches != list(GlobalBatchOrder(30, 8, 8, stop=6))


@pytest.mark.parametrize("ranks", [1, 2])
def test_small_data_is_repeated(ranks):
    orders = [GlobalBatchOrder(3, 8 // ranks, 0, stop=2, rank=r, num_processes=ranks) for r in range(ranks)]
    assert all(order.batches_per_epoch == 1 for order in orders)
    first, second = ([index for part in parts for _, index in part] for parts in zip(*orders, strict=True))
    assert len(first) == len(second) == 8
    assert sorted(first[:3]) == sorted(second[:3]) == [0, 1, 2] and first == (first[:3] * 3)[:8]


@pytest.mark.parametrize("start", [0, 1, 3, 7, 9, 12])
def test_order_resumes_at_any_place(start):
    assert list(GlobalBatchOrder(30, 8, 7, start=start, stop=9)) == list(GlobalBatchOrder(30, 8, 7, stop=9))[start:]
    assert len(GlobalBatchOrder(30, 8, 7, start=start, stop=9)) == max(0, 9 - start)


def pixel_batches(workers, start=0):
    source = ArrayImages(np.random.default_rng(1).integers(0, 256, (20, 13, 9, 3), dtype=np.uint8), "noise")
    dataset = ImageDataset(source, ImageTransform(8, random_flip=True, seed=5))
    return [b["pixel_values"] for b in build_loader(dataset, GlobalBatchOrder(20, 4, 5, start=start, stop=12), workers, CPU)]


def test_batches_are_bit_equal_with_workers_and_after_a_resume():
    state = torch.get_rng_state()
    alone, helped = pixel_batches(0), pixel_batches(2)
    assert torch.equal(torch.stack(alone), torch.stack(helped))
    assert alone[0].shape == (4, 3, 8, 8) and alone[0].dtype == torch.float32 and alone[0].is_contiguous()
    for workers in (0, 2):
        assert torch.equal(torch.stack(alone[7:]), torch.stack(pixel_batches(workers, start=7)))
    assert torch.equal(state, torch.get_rng_state())


def load_in_a_group_of_its_own(pipe):
    os.setsid()
    torch.set_num_threads(1)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    dataset = ImageDataset(ArrayImages(np.zeros((64, 8, 8), np.uint8), "zeros"), ImageTransform(8))
    batches = iter(build_loader(dataset, GlobalBatchOrder(64, 4, 0, stop=10**9), 2, CPU))
    next(batches), next(batches)  # one of each worker
    pipe.send([worker.pid for worker in batches._workers])
    pipe.recv()
    pipe.send([len(next(batches)["pixel_values"]) for _ in range(50)])
    pipe.recv()
    globals()["kept"] = batches  # as an iterator that a traceback keeps: nobody closes the loader


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo") or not Path("/proc").is_dir(), reason="needs Linux")
@pytest.mark.parametrize("end", ["exits", "is killed"])
def test_workers_survive_a_signal_to_the_group_but_not_their_parent(end):
    pipe, other = multiprocessing.Pipe()
    parent = multiprocessing.get_context("fork").Process(target=load_in_a_group_of_its_own, args=(other,))
    parent.start()
    try:
        workers = pipe.recv()
        assert len(workers) == 2
        for number in (signal.SIGTERM, signal.SIGINT):
            os.killpg(parent.pid, number)
        time.sleep(0.3)
        pipe.send("go on")
        assert pipe.recv() == [4] * 50
        if end == "exits":
            pipe.send("end")
        else:
            parent.kill()
        parent.join(60)
        assert parent.exitcode == (0 if end == "exits" else -signal.SIGKILL)
        deadline = time.monotonic() + 60
        while any(map(alive, workers)) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not any(map(alive, workers))
    finally:
        parent.kill()
