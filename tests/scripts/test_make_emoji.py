"""The data set of emoji: from stand-ins for the two packages, which are too large for a test; the true ones where there is a network."""

import importlib.util
import io
import json
import os
import shutil
import sys
import tarfile
from dataclasses import replace

import numpy as np
import pytest
from launch import ROOT
from PIL import Image

from immiscible.data.loading import load_images
from immiscible.errors import UserError

_spec = importlib.util.spec_from_file_location("make_emoji", ROOT / "scripts" / "make_emoji.py")
assert _spec and _spec.loader
script = importlib.util.module_from_spec(_spec)
sys.modules["make_emoji"] = script  # where its dataclasses look
_spec.loader.exec_module(script)

TABLE = [  # name, code points, category, code points by skin tone
    ("GRINNING FACE", "1F600", "Smileys & Emotion", {}),
    ("WHITE FROWNING FACE", "2639-FE0F", "Smileys & Emotion", {}),
    ("MAGE", "1F9D9", "People & Body", {"1F3FB": "1F9D9-1F3FB", "1F3FF": "1F9D9-1F3FF"}),
    ("WOMAN MAGE", "1F9D9-200D-2640-FE0F", "People & Body", {"1F3FF": "1F9D9-1F3FF-200D-2640-FE0F"}),
    ("COOK", "1F9D1-200D-1F373", "People & Body", {}),
    ("MAN COOK", "1F468-200D-1F373", "People & Body", {}),
    ("TWO MEN", "1F46C", "People & Body", {"1F3FB-1F3FE": "1F468-1F3FB-200D-1F91D-200D-1F468-1F3FE"}),
    ("Nigeria Flag", "1F1F3-1F1EC", "Flags", {}),
    ("Copy of Nigeria Flag", "1F1F3-1F1EA", "Flags", {}),
    ("Wales Flag", "1F3F4-E0067-E0062-E0077-E006C-E0073-E007F", "Flags", {}),
    ("SKIN", "1F3FB", "Component", {}),
]
TRANSPARENT = (0, 0, 0, 0)


def encoded(color, size, kind):
    """A picture of one color with a transparent left half."""
    image = Image.new("RGBA", size, TRANSPARENT)
    image.paste(color, (size[0] // 2, 0, *size))
    file = io.BytesIO()
    image.save(file, kind, **({"lossless": True} if kind == "WEBP" else {}))
    return file.getvalue()


def write_tarball(path, files):
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache that holds stand-ins for both packages, whose hashes are those that the script asks for."""
    folder = tmp_path / "cache"
    folder.mkdir()
    table, noto, fluent = [], {}, {}
    for number, (name, unified, category, tones) in enumerate(TABLE):
        variants = {tone: {"unified": points} for tone, points in tones.items()}
        entry = {"name": name, "unified": unified, "category": category}
        table.append({**entry, "skin_variations": variants} if tones else entry)
        for tone, points in enumerate([unified, *tones.values()]):
            shade = 7 if name.startswith("Copy") else number
            noto[f"{script.NOTO.folder}{points.lower()}.png"] = encoded((20 * shade, 50 * tone, 0, 255), (64, 64), "PNG")
            stem = points.lower().removesuffix("-e007f").replace("-e00", "_e00").replace("1f3f4_", "1f3f4-")
            size = (256, 264) if name == "WOMAN MAGE" else (256, 256)
            if not name.startswith("Copy"):
                fluent[f"{script.FLUENT.folder}{stem}.webp"] = encoded((20 * number, 50 * tone, 90, 255), size, "WEBP")
    fluent[f"{script.FLUENT.folder}2639.webp"] = encoded((1, 1, 1, 255), (256, 256), "WEBP")  # a second picture of 2639-fe0f
    write_tarball(folder / script.NOTO.file, {script.TABLE: json.dumps(table).encode(), **noto})
    write_tarball(folder / script.FLUENT.file, fluent)
    for name in ("NOTO", "FLUENT"):
        package = getattr(script, name)
        monkeypatch.setattr(script, name, replace(package, integrity=script.integrity(folder / package.file)))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))  # without npm, unless a test puts one there
    return folder


def make(output, cache, *words):
    script.main([str(output), "--cache_dir", str(cache), *words])
    return output


def sources(output, **options):
    return {side: load_images(train_data_dir=str(output / side), **options) for side in ("train", "held_out")}


def test_pictures_classes_and_captions_are_read_as_they_are(cache, tmp_path, capsys):
    output = make(tmp_path / "emoji", cache, "--side", "16")
    assert "pictures of 16x16 to train on" in capsys.readouterr().out
    by_caption = {}
    for side, source in sources(output, labels_for="--class_conditional", caption_column="text").items():
        assert source.class_names == ["Flags", "People & Body", "Smileys & Emotion"]
        for row in range(len(source)):
            (caption,) = source.captions(row)
            assert caption not in by_caption
            by_caption[caption] = side, source.class_names[source.label(row)], np.asarray(source.load(row))
    assert len(by_caption) == 26  # 14 of Noto, of which two are equal, and 13 of Fluent
    assert {
        "grinning face emoji, Noto style",
        "mage emoji, dark skin tone, Fluent 3D style",
        "woman mage emoji, dark skin tone, Noto style",
        "two men emoji, light and medium-dark skin tones, Noto style",
        "Nigeria Flag emoji, Noto style",
        "Wales Flag emoji, Fluent 3D style",
    } < by_caption.keys()
    assert not any("skin emoji" in caption or "Copy" in caption for caption in by_caption)
    _, label, pixels = by_caption["Nigeria Flag emoji, Fluent 3D style"]
    assert label == "Flags" and pixels.shape == (16, 16, 3) and pixels.dtype == np.uint8
    assert (pixels[:, :8] == 255).all() and (pixels[:, 8:] == (140, 0, 90)).all()  # transparent is white
    _, _, tall = by_caption["woman mage emoji, Fluent 3D style"]
    assert (tall[:, :7] == 255).all() and tall[:, 9].std(0).max() == 0 and (tall[:, 15] > (60, 0, 90)).any()  # white at both sides
    styles = load_images(train_data_dir=str(output / "train"), labels_for="--class_conditional", label_column="style")
    assert styles.class_names == ["Fluent 3D", "Noto"]


def test_a_concept_is_on_one_side_alone(cache, tmp_path):
    import datasets

    output = make(tmp_path / "emoji", cache)
    tables = {side: datasets.load_dataset("parquet", data_dir=str(output / side), split="train") for side in ("train", "held_out")}
    concepts = {side: set(table["concept"]) for side, table in tables.items()}
    assert not concepts["train"] & concepts["held_out"] and len(concepts["train"] | concepts["held_out"]) == 7
    mages = [(side, text) for side, table in tables.items() for text in table["text"] if "mage" in text]
    assert len(mages) == 10 and len({side for side, _ in mages}) == 1  # two genders, skin tones, two styles
    assert script.concept_of("1F468-200D-1F373") == script.concept_of("1F9D1-200D-1F373") != script.concept_of("1F9D1-200D-1F33E")
    assert script.concept_of("1F3C3-200D-2640-FE0F-200D-27A1-FE0F") == script.concept_of("1F3C3") == "1f3c3"
    assert script.concept_of("1F1F3-1F1EC") == "1f1f3-1f1ec"


def test_each_class_is_split_by_the_share():
    sizes = np.random.default_rng(0).integers(1, 13, (2, 100))  # pictures of the concepts of two classes
    found = [
        {"concept": f"{label}-{number}", "label": label}
        for label in (0, 1)
        for number, size in enumerate(sizes[label])
        for _ in range(size)
    ]
    for share in (0.2, 0.5):
        apart = script.held_out_concepts(found, share)
        assert apart == script.held_out_concepts(found[::-1], share)
        for label in (0, 1):
            of_class = [row["concept"] in apart for row in found if row["label"] == label]
            assert abs(sum(of_class) - share * len(of_class)) <= 6  # half of the largest concept


def test_the_same_bytes_every_time_and_other_sides(cache, tmp_path):
    first, second = (make(tmp_path / name, cache) for name in ("first", "second"))
    assert (first / script.SEAL).read_text() == (second / script.SEAL).read_text()
    assert load_images(train_data_dir=str(make(first, cache, "--side", "64") / "train")).load(0).size == (64, 64)  # its own folder, anew
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "first", "second"]  # nothing half written beside


def test_a_folder_of_something_else_is_left_alone(cache, tmp_path):
    output = tmp_path / "emoji"
    output.mkdir()
    make(output, cache)  # an empty folder is nobody's
    (output / "train" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="emoji is there and is not what this script wrote; remove it or choose another folder"):
        make(output, cache)
    assert (output / "train" / "notes.txt").read_text() == "mine"
    (output / "train" / "notes.txt").unlink()
    (output / "train" / "emoji.parquet").write_bytes(b"edited")
    with pytest.raises(UserError, match="not what this script wrote"):
        make(output, cache)
    for share in ("0", "1", "nan"):
        with pytest.raises(UserError, match="--held_out_share must be above 0 and below 1"):
            make(tmp_path / "other", cache, "--held_out_share", share)
    with pytest.raises(UserError, match=r"--held_out_share 1e-09 leaves no picture in held_out"):
        make(tmp_path / "other", cache, "--held_out_share", "1e-9")
    assert not (tmp_path / "other").exists()


def pretend_npm(cache, source):
    """An npm that packs what lies in ``source``, if it lies there."""
    folder = cache.parent / "bin"
    folder.mkdir()
    npm = folder / "npm"
    body = [
        f"#!{sys.executable}",
        "import os, shutil, sys",
        f"name = sys.argv[2].lstrip('@').replace('/', '-').replace('@', '-') + '.tgz'; path = os.path.join({str(source)!r}, name)",
        "assert sys.argv[1] == 'pack'",
        "if not os.path.exists(path): sys.exit('npm error code ENOTFOUND\\nnpm error network no such host')",
        "shutil.copy(path, name)",
    ]
    npm.write_text("\n".join(body) + "\n")
    npm.chmod(0o755)


def test_packages_are_fetched_once_and_damaged_ones_again(cache, tmp_path, capsys):
    registry = tmp_path / "registry"
    shutil.copytree(cache, registry)
    pretend_npm(cache, registry)
    (cache / script.NOTO.file).unlink()
    (cache / script.FLUENT.file).write_bytes(b"cut off")
    make(tmp_path / "emoji", cache)
    said = capsys.readouterr().out
    assert (
        "fetching emoji-datasource-google@16.0.0 by npm, 74 MB" in said and f"{script.FLUENT.file} is damaged: it is fetched again" in said
    )
    assert sorted(os.listdir(cache)) == sorted(os.listdir(registry))
    shutil.rmtree(registry)
    make(tmp_path / "emoji", cache)  # nothing is asked of npm
    assert "fetching" not in capsys.readouterr().out


def test_what_cannot_be_fetched_is_one_line(cache, tmp_path):
    registry = tmp_path / "registry"
    (cache / script.NOTO.file).rename(tmp_path / "kept")
    with pytest.raises(UserError, match=rf"npm, which fetches .*, is not installed: .* or put {script.NOTO.file} into {cache}"):
        make(tmp_path / "emoji", cache)
    pretend_npm(cache, registry)
    with pytest.raises(UserError, match=r"`npm pack emoji-datasource-google@16.0.0` failed \(npm error code ENOTFOUND; npm error network"):
        make(tmp_path / "emoji", cache)
    registry.mkdir()
    (registry / script.NOTO.file).write_bytes(b"something else")
    with pytest.raises(UserError, match=r"gave another file than .* with the hash sha512-") as error:
        make(tmp_path / "emoji", cache)
    assert error.value.exit_code == 1 and not (tmp_path / "emoji").exists()
    assert os.listdir(cache) == [script.FLUENT.file]


@pytest.mark.slow
def test_the_true_packages(tmp_path):
    if not shutil.which("npm"):
        pytest.skip("npm is not installed")
    try:
        output = make(tmp_path / "emoji", script.cache_folder())
    except UserError as error:
        if "failed" in str(error):
            pytest.skip(f"no network: {error}")
        raise
    found = sources(output, labels_for="--class_conditional", caption_column="text")
    assert sum(map(len, found.values())) == 7136 and all(len(source.class_names) == 9 for source in found.values())
    assert abs(len(found["train"]) - 3568) < 60
    captions = {caption for source in found.values() for row in range(len(source)) for caption in source.captions(row)}
    assert "woman mage emoji, dark skin tone, Noto style" in captions and len(captions) == 7124
