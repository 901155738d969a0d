"""A latent cache in buckets: a shard holds one shape, and a run from it sees what an uncached one does."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from bucketed import BUCKETS, mixed_folder
from latent_caches import close, hashes, precompute
from PIL import Image
from safetensors import safe_open
from tiny_text import model_folder, tiny_text

from immiscible.configs import TextToImageConfig
from immiscible.data.batches import BucketOrder, ImageDataset
from immiscible.data.buckets import bucket_sizes
from immiscible.data.image_sizes import image_shapes
from immiscible.data.loading import build_loader, captioned_source, images_of, with_held_out
from immiscible.data.transforms import image_transform
from immiscible.encoding.cache import buckets_of, open_cache
from immiscible.encoding.cache_manifest import read_manifest
from immiscible.encoding.texts import TextToImageEncoder
from immiscible.errors import UserError
from immiscible.flags import parse_config
from immiscible.networks.families import load_checkpoint
from immiscible.randomness import Draws

CPU = torch.device("cpu")
CACHED = {**BUCKETS, "center_crop": True, "random_flip": True, "cache_latents": True}


def words(images: Path, cache: Path, **changes: Any) -> list[str]:
    return tiny_text("x", **{"train_data_dir": images, **CACHED, "latent_cache_dir": cache, **changes})


def made(images: Path, cache: Path, **changes: Any) -> Path:
    precompute(words(images, cache, **changes), rows_per_shard=4)
    return cache


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return made(mixed_folder(), tmp_path_factory.mktemp("buckets") / "cache")


def opened(images: Path, cache: Path, **changes: Any):
    """A run's flags, images, parts and opened cache."""
    argv = [str(word) for word in words(images, cache, **changes)]
    config = parse_config(TextToImageConfig, argv, program="", description="")
    source, _ = with_held_out(captioned_source, config, None, share=config.validation_split, folder=None)
    parts = load_checkpoint(config, resolution=config.resolution, cache_dir=None, from_scratch=True)
    return config, source, parts, open_cache(cache, config, parts, source, precision=None)


@pytest.mark.parametrize("changes", [{}, {"max_train_samples": 20}, {"validation_split": 0.2, "eval_steps": 9}])
def test_batches_are_those_of_the_uncached_run(cache, changes):
    config, source, parts, found = opened(mixed_folder(), cache, **changes)
    transform, plain = image_transform(config, 3, 5), TextToImageEncoder(parts, CPU)
    runs = []
    for images, augment, encode in ((source, transform, plain), (found.images(source), found.transform(transform), found.encoder(plain))):
        buckets = buckets_of(images, config, parts)
        dataset = ImageDataset(images, augment, with_captions=True, with_geometry=True, buckets=buckets)
        order = BucketOrder(buckets, 2, 5, stop=20)
        batches = list(images_of(build_loader(dataset, order, 0, CPU), skip_bad_images=False))
        runs.append([(batch, encode(batch, Draws(5, step, 0, CPU))) for step, batch in enumerate(batches)])
    assert len({tuple(encoded.x0.shape) for _, encoded in runs[0]}) == 3
    for (batch, wanted), (same, encoded) in zip(*runs, strict=True):
        assert batch.captions == same.captions and torch.equal(batch.geometry, same.geometry)
        assert encoded.x0.shape == wanted.x0.shape and close(encoded.x0, wanted.x0)


def test_a_shard_holds_one_bucket_and_every_image_is_in_one(cache):
    manifest = read_manifest(cache)
    assert manifest["bucket_images"] == [9, 12, 6] and manifest["settings"]["buckets"] == ["16,32", "32,32", "32,16"]
    rows, shapes = [], []
    for path in sorted(cache.glob("latents-*")):
        with safe_open(path, framework="pt") as file:
            count, *shape = file.get_slice("moments").get_shape()
        rows.append(count)
        shapes.append(tuple(shape[-2:]))
    assert rows == [4, 4, 1, 4, 4, 4, 4, 2]
    assert shapes == [(2, 4)] * 3 + [(4, 4)] * 3 + [(4, 2)] * 2
    _, source, _, found = opened(mixed_folder(), cache)
    assert [found.images(source).size(index) for index in range(27)] == [source.size(index) for index in range(27)]
    assert len({found.moments(index).tobytes() for index in range(27)}) == 27


def test_a_cache_of_other_buckets_is_refused(cache, tmp_path):
    for buckets in (None, "16,32;32,32", "auto"):
        step = {"bucket_step": 8} if buckets == "auto" else {}
        with pytest.raises(UserError, match=r"the buckets \(--buckets, .*\) was \['16,32', '32,32', '32,16'\] in the cache and is"):
            opened(mixed_folder(), cache, buckets=buckets, **step)
    square = made(mixed_folder(), tmp_path / "square", buckets=None)
    assert "bucket_images" not in read_manifest(square)
    with pytest.raises(UserError, match=r"the buckets .* was None in the cache and is \['16,32'"):
        opened(mixed_folder(), square)


@pytest.mark.parametrize(
    ("counts", "told"),
    [
        ([9, 12], "its bucket_images are 21 together, and its images 27"),
        ([27], "files are not the"),
        ([9, "12", 6], "its bucket_images is"),
        (7, "its bucket_images is 7"),
    ],
)
def test_a_manifest_with_other_counts_is_none(cache, tmp_path, counts, told):
    shutil.copytree(cache, tmp_path / "cache")
    path = tmp_path / "cache" / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "bucket_images": counts}))
    with pytest.raises(UserError, match=re.escape(told)):
        read_manifest(tmp_path / "cache")


def test_an_image_that_came_into_another_bucket_is_noticed_and_encoded_anew(tmp_path, capsys):
    images, cache = tmp_path / "images", tmp_path / "cache"
    shutil.copytree(mixed_folder(), images)
    made(images, cache)
    before = hashes(cache)
    _, source, _, _ = opened(images, cache)
    flat = next(index for index in range(27) if source.size(index) == (32, 64))
    Image.new("RGB", (40, 40), (10, 200, 30)).save(source.name(flat))
    with pytest.raises(UserError, match=r"1 of its images have been edited since, the first .*\.png"):
        opened(images, cache)
    made(images, cache)
    config, source, parts, found = opened(images, cache)
    assert read_manifest(cache)["bucket_images"] == [8, 13, 6] and found.moments(flat).shape == (2, 2, 4, 4, 4)
    texts = {name: digest for name, digest in before.items() if name.startswith("texts")}
    assert texts.items() <= hashes(cache).items()
    assert made(images, tmp_path / "fresh") and hashes(cache) == hashes(tmp_path / "fresh")
    assert image_shapes(found.images(source), None)[flat].tolist() == [40, 40]
    assert buckets_of(found.images(source), config, parts).of[flat] == bucket_sizes(config).index((32, 32))


def test_bad_images_are_in_no_batch_as_in_the_uncached_run(tmp_path):
    """One that is no image, which is in no bucket, and one that is cut off, in whose place comes the next of its own."""
    images, cache = tmp_path / "images", tmp_path / "cache"
    shutil.copytree(mixed_folder(), images)
    (images / "003.png").write_text("no image")
    (images / "011.png").write_bytes((images / "011.png").read_bytes()[:500])
    made(images, cache, skip_bad_images=True)
    config, source, parts, found = opened(images, cache, skip_bad_images=True)
    transform, runs = image_transform(config, 3, 5), []
    for loaded, augment in ((source, transform), (found.images(source), found.transform(transform))):
        buckets = buckets_of(loaded, config, parts)
        assert (buckets.of < 0).nonzero().flatten().tolist() == [3]
        dataset = ImageDataset(loaded, augment, skip_bad_images=True, with_captions=True, buckets=buckets)
        batches = images_of(build_loader(dataset, BucketOrder(buckets, 2, 5, stop=12), 0, CPU), skip_bad_images=True)
        runs.append([batch.captions for batch in batches])
    assert runs[0] == runs[1]


def test_steps_that_the_vae_cannot_divide_are_refused_before_anything_is_made(tmp_path):
    with pytest.raises(UserError, match=f"--bucket_step 4 must be a multiple of 8, by which .*{model_folder().name} divides images"):
        made(mixed_folder(), tmp_path / "cache", buckets="auto", bucket_step=4)
    assert not (tmp_path / "cache").exists()
