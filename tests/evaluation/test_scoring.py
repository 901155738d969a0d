"""Samples in files against real images: read in parts, measured once, scored the same however they are shared out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from measured import DIGITS
from PIL import Image

from immiscible.data.bundled import load_digits
from immiscible.errors import UserError
from immiscible.evaluation.features import PixelFeatures
from immiscible.evaluation.image_files import open_samples
from immiscible.evaluation.image_sets import ImageSet
from immiscible.evaluation.kept_features import MeasuredImages, given_by, measure
from immiscible.evaluation.metrics import clip_score, compute
from immiscible.evaluation.protocols import PROTOCOLS
from immiscible.evaluation.real_images import open_real
from immiscible.evaluation.scoring import (
    available,
    check_available,
    check_fid,
    chosen_metrics,
    fields_needed,
    moments_needed,
    rows_needed,
    score,
    table,
)
from immiscible.evaluation.statistics import Statistics, key_of, write_reference

ALONE = SimpleNamespace(process_index=0, num_processes=1, is_main_process=True)
LABELS = torch.from_numpy(load_digits().labels)
NAMES = ["precision", "inception_score", "sfid", "per_class_frechet_distance", "recall", "frechet_distance", "nearest_neighbor_ratio"]


class Several(PixelFeatures):
    """Pixels that say all that Inception says, and count how often they are asked."""

    calls = 0

    def outputs(self, images):
        self.calls += 1
        found = self(images)
        return {"features": found, "spatial": found[:, :9] ** 2, "probabilities": (found[:, 20:30] * 3).softmax(1)}


class Captioned(PixelFeatures):
    """Embeds images by their pixels and captions by their letters."""

    def outputs(self, images):
        return {"features": self(images), "image_embeddings": self(images)}

    def texts(self, captions):
        return torch.tensor([[float(text.count(letter)) for letter in "abcdefgh" * 8] for text in captions], dtype=torch.float64)


def write(folder: Path, images, labels=None) -> Path:
    """A folder as sample.py leaves it."""
    folder.mkdir(exist_ok=True)
    for number, image in enumerate(images):
        Image.fromarray(image.squeeze(0).numpy()).save(folder / f"{number:06}.png")
    if labels is not None:
        lines = [json.dumps({"file_name": f"{number:06}.png", "label": int(label)}) for number, label in enumerate(labels)]
        (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    manifest = {"num_images": len(images), "complete": True, "labels": None if labels is None else "class numbers"}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    """300 digits, which are two parts, the last a smaller one."""
    return write(tmp_path_factory.mktemp("samples") / "images", DIGITS[:300], LABELS[:300])


def known(images, folder, fields=("features",), ranks=1, network=None):
    network = network or Several(1, 8)
    parts = [part for rank in range(ranks) for part in measure(images, network, fields, folder, rank=rank, ranks=ranks)]
    return MeasuredImages(folder, sorted(parts, key=lambda part: part.number))


def test_scores_are_those_of_all_features_at_once_and_the_same_on_two_ranks(samples, tmp_path):
    images = open_samples(samples, with_labels=True, with_captions=False)
    assert [len(part.images) for part in images.parts()] == [256, 44]
    reference = open_real("digits", "--reference", side=8, channels=1, with_labels=True).images
    fields = ("features", "spatial", "probabilities")
    found = []
    for ranks in (1, 2):
        sets = [known(each, tmp_path / str(ranks), fields, ranks) for each in (images, reference, reference)]
        found.append(score(NAMES, *sets))
    network = Several(1, 8)
    of = [ImageSet(**network.outputs(rows), labels=labels) for rows, labels in ((DIGITS[:300], LABELS[:300]), (DIGITS, LABELS))]
    wanted = compute(NAMES, of[0], of[1], of[1])
    # torchmetrics takes roots of what is singular here, some pixels being black in all images
    assert list(found[0].values) == NAMES and found[0].values == pytest.approx(wanted.values, rel=1e-6)
    assert found[0].intervals == wanted.intervals and sorted(found[0].warnings) == sorted(wanted.warnings)
    assert found[1] == found[0]


def test_what_is_measured_is_not_measured_again_and_what_is_broken_is(samples, tmp_path, caplog):
    images, network = open_samples(samples, with_labels=False, with_captions=False), Several(1, 8)
    whole = known(images, tmp_path, network=network)
    assert network.calls == 2
    (tmp_path / whole.parts[0].file).unlink()
    broken = tmp_path / whole.parts[1].file
    broken.write_bytes(broken.read_bytes()[:-8])
    again = known(images, tmp_path, network=network)
    assert network.calls == 4 and again == whole and "is broken" in caplog.text
    assert again.rows(["features"]).features.equal(network(DIGITS[:300]))  # not a digit is lost on the way
    other = write(tmp_path / "other", 255 - DIGITS[:300])
    known(open_samples(other, with_labels=False, with_captions=False), tmp_path, network=network)
    assert network.calls == 6  # of equal names, and other pixels


def test_an_npz_is_read_as_the_folder_it_was_made_of(samples, tmp_path):
    path = tmp_path / "samples.npz"
    np.savez(path, arr_0=DIGITS[:300].permute(0, 2, 3, 1).numpy(), arr_1=LABELS[:300].numpy())
    for ranks in (1, 2):
        for rank in range(ranks):
            parts = [list(open_samples(each, with_labels=True, with_captions=False).parts(rank, ranks)) for each in (samples, path)]
            assert [part.digest for part in parts[0]] == [part.digest for part in parts[1]]
            assert all(torch.equal(a.labels, b.labels) and a.number == b.number for a, b in zip(*parts, strict=True))


def test_captions_of_sample_py_are_embedded_and_their_scores_have_an_interval(tmp_path):
    folder, captions = write(tmp_path / "images", DIGITS[:40]), ["a bad face", "a deaf dad", "beef", "he had a cab"] * 10
    lines = [json.dumps({"file_name": f"{number:06}.png", "text": text}) for number, text in enumerate(captions)]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    network, images = Captioned(1, 8), open_samples(folder, with_labels=False, with_captions=True)
    given = given_by(network, 1, 8)
    for captioned in (images, open_samples(folder, with_labels=False, with_captions=False)):
        sets = {"samples": available(captioned.named, given, labels=False, captions=captioned.has_captions)}
        if captioned.has_captions:
            check_available(["clip_score"], sets, network)
        else:
            with pytest.raises(UserError, match=r"clip_score needs the caption of each sample, and --samples .*images has none"):
                check_available(["clip_score"], sets, network)
    found = known(images, tmp_path / "work", ("image_embeddings", "text_embeddings"), network=network)
    scores = score(["clip_score"], found, found, found)
    wanted = clip_score(network(DIGITS[:40]), network.texts(captions)).mean()
    low, high = scores.intervals["clip_score"]
    assert scores.values["clip_score"] == pytest.approx(float(wanted), rel=1e-12) and low < wanted < high
    (folder / "metadata.jsonl").write_text("\n".join(line.replace("beef", "egg") for line in lines) + "\n")
    other = known(
        open_samples(folder, with_labels=False, with_captions=True),
        tmp_path / "work",
        ("image_embeddings", "text_embeddings"),
        network=network,
    )
    assert score(["clip_score"], other, other, other).values != scores.values


def test_statistics_of_the_reference_are_kept_by_the_pixels(samples, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    network, folders = Several(1, 8), [samples, write(tmp_path / "other", 255 - DIGITS[:300])]

    def measured(folder, **options):
        real = open_real(str(folder), "--reference", side=8, channels=1)

        def key(read):
            facts = {"data": f"{real.images.fingerprint}, {read.pixels}", "split": "train", "crop": "diffusers", "resolution": 8}
            return key_of(network, **facts, count=300, protocol="default")

        return real.measure(ALONE, network, tmp_path / "work", moments={"features"}, key=key, **options)

    first = measured(folders[0], rows=()).moments("features")
    for path in (tmp_path / "work").iterdir():
        path.unlink()
    again = measured(folders[0], rows=())
    assert network.calls == 2 and torch.equal(again.moments("features").covariance, first.covariance)
    assert not torch.equal(measured(folders[1], rows=()).moments("features").mean, first.mean) and network.calls == 4
    assert measured(folders[0], rows={"features"}).rows(["features"]).features.shape == (300, 64)


def test_published_statistics_and_images_of_one_file_are_both_used(tmp_path):
    path = tmp_path / "reference.npz"
    features = Several(1, 8)(DIGITS)
    np.savez(path, mu=features.mean(0).numpy(), sigma=features.T.cov().numpy(), arr_0=DIGITS[:300].permute(0, 2, 3, 1).numpy())
    real = open_real(str(path), "--reference", side=8, channels=1)
    found = real.measure(ALONE, Several(1, 8), tmp_path / "work", rows={"features"}, moments={"features"}, key=lambda read: None)
    assert torch.equal(found.moments("features").mean, features.mean(0)) and len(found.rows(["features"]).features) == 300
    assert real.facts()["images"] == 300 and len(real.facts()["sha256"]) == 64


def test_what_metrics_need_is_told_apart():
    assert rows_needed(["frechet_distance", "sfid"], "reference") == set() and rows_needed(["kid", "sfid"], "samples") == {"features"}
    assert moments_needed(["kid", "sfid"], "reference") == {"spatial"}
    assert fields_needed(["per_class_frechet_distance", "clip_score"], "samples") == {
        "features", "labels", "image_embeddings", "text_embeddings",
    }  # fmt: skip
    assert given_by(PixelFeatures(3, 8), 3, 8) == {"features"}
    assert given_by(Several(1, 8), 1, 8) == {"features", "spatial", "probabilities"}


def test_metrics_are_those_of_the_protocol_or_those_asked_for():
    for protocol in PROTOCOLS.values():
        assert chosen_metrics(None, protocol) == list(protocol.metrics)
    assert chosen_metrics(["fid", "kid", "frechet_distance"], PROTOCOLS["default"]) == ["frechet_distance", "kid"]
    with pytest.raises(UserError, match=r"--metrics: metric 'fdi' is unknown; known: frechet_distance, .*nearest_neighbor_ratio, and fid"):
        chosen_metrics(["fdi"], PROTOCOLS["default"])
    with pytest.raises(UserError, match=r"fid is of --features inception alone; .* here FD-pixels-8x8"):
        check_fid(["fid"], PixelFeatures())


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("kid", "kid needs --reference"),
        ("inception_score", "needs probabilities, and the features are FD-pixels-8x8"),
        ("alignment", "alignment needs the class of each image, and --samples S has none"),
        ("clip_score", "needs image embeddings, and the features are FD-pixels-8x8"),
    ],
)
def test_what_is_missing_is_said_before_anything_is_measured(name, says):
    with pytest.raises(UserError, match=says):
        check_available([name], {"samples": available("--samples S", {"features"}, labels=False, captions=False)}, PixelFeatures())


def test_statistics_alone_serve_a_frechet_distance_and_nothing_else(tmp_path):
    features = PixelFeatures(1, 8)
    rows, path = features(DIGITS), tmp_path / "own.npz"
    key = key_of(features, data="digits", split="train", crop="diffusers", resolution=8, count=len(rows), protocol="default")
    write_reference(path, key, {"features": Statistics(rows.mean(0), rows.T.cov(), len(rows))})
    real = open_real(str(path), "--reference", side=8, channels=1)
    sets = {"samples": available("--samples S", {"features"}, labels=False, captions=False), "reference": real.available({"features"})}
    check_available(["frechet_distance"], sets, features)
    with pytest.raises(UserError, match=r"kid needs the images themselves, and --reference .*own\.npz holds statistics alone"):
        check_available(["kid"], sets, features)
    found = real.measure(ALONE, features, tmp_path / "work", rows=(), moments={"features"}, key=lambda read: key)
    ours = MeasuredImages(tmp_path, statistics={"features": Statistics(rows.mean(0), rows.T.cov(), 60)})
    scores = score(["frechet_distance"], ours, found, found)
    assert scores.values["frechet_distance"] == pytest.approx(0, abs=1e-9)
    assert scores.warnings == [
        "frechet_distance: 60 images are too few for a covariance of 64 features, which needs at least 65 on each side"
    ]
    assert "| frechet_distance (FD-x) | " in table(scores, "FD-x") and "warning: frechet_distance: 60 images" in table(scores, "FD-x")


def other_size(folder):
    Image.new("L", (9, 9)).save(folder / "000300.png")


def not_square(folder):
    Image.new("L", (8, 6)).save(folder / "000000.png")


def cut_short(folder):
    (folder / "manifest.json").write_text(json.dumps({"num_images": 3, "complete": False}))


def no_image(folder):
    (folder / "000005.png").write_text("no image")


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (other_size, "cannot read .*000300.png: it is 9x9 and the first is 8x8; samples must be of one size"),
        (not_square, "000000.png is 8x6; only square images are scored"),
        (cut_short, "is not complete: its manifest.json says so"),
        (no_image, "cannot read .*000005.png: not an image format"),
    ],
)
def test_bad_samples_are_one_line(tmp_path, spoil, says):
    folder = write(tmp_path / "images", DIGITS[:301])
    spoil(folder)
    with pytest.raises(UserError, match=f"--samples {folder}.*{says}") as error:
        list(open_samples(folder, with_labels=False, with_captions=False).parts())
    assert "\n" not in str(error.value)


def test_what_is_no_folder_of_images_is_one_line(tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "notes.doc").write_text("no image")
    with pytest.raises(UserError, match=r"--samples .*text: no images found in it"):
        open_samples(tmp_path / "text", with_labels=False, with_captions=False)
    (tmp_path / "broken.npz").write_text("no archive")
    with pytest.raises(UserError, match=r"broken\.npz holds no images that can be read"):
        open_samples(tmp_path / "broken.npz", with_labels=False, with_captions=False)
    np.savez(tmp_path / "large.npz", arr_0=np.zeros((2, 16, 16, 1), np.uint8))
    with pytest.raises(UserError, match="holds images of 16x16 with 1 channels, the samples are 8x8 with 3"):
        open_real(str(tmp_path / "large.npz"), "--reference", side=8, channels=3)
    with pytest.raises(UserError, match="--reference nowhere: no such folder"):
        open_real("nowhere", "--reference", side=8, channels=3)


def test_a_class_short_of_images_is_told_in_the_warnings(samples, tmp_path):
    images = open_samples(samples, with_labels=True, with_captions=False)
    found = known(images, tmp_path)
    one = replace(found.parts[0], labels=[11, *found.parts[0].labels[1:]])
    scores = score(["alignment"], MeasuredImages(tmp_path, [one, *found.parts[1:]]), found, found)
    assert scores.warnings == ["alignment: 1 of 11 classes are left out, having fewer than 2 images"]
