"""Runs on buckets of aspect ratios: which images are paired, what is said of them, and what a kill changes, which is nothing."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pytest
import torch
from bucketed import BUCKETS, SHAPES, mixed_folder
from kills import final_hashes, finish, kill, lines, metrics, start
from latent_caches import PRECOMPUTE
from safetensors import safe_open
from tiny_text import FINETUNE, SCRATCH, model_folder, reach, tiny_text

import immiscible
from immiscible.configs import TextToImageConfig
from immiscible.data.batches import BucketOrder, ImageDataset, Images
from immiscible.data.buckets import assigned_buckets, bucket_sizes
from immiscible.data.loading import captioned_source
from immiscible.data.transforms import image_transform
from immiscible.encoding.texts import TextToImageEncoder
from immiscible.errors import UserError
from immiscible.flags import parse_config
from immiscible.networks.families import load_checkpoint
from immiscible.randomness import Draws, PoolDraws
from immiscible.training.planning import PLAN_FILE

LATENT_SHAPES = {(4, 2, 4), (4, 4, 4), (4, 4, 2)}
CPU = torch.device("cpu")


def words(folder: Path, **changes) -> list[str]:
    return tiny_text(folder, **{"train_data_dir": mixed_folder(), **BUCKETS, **changes})


def shapes_of(reached) -> list[tuple[int, ...]]:
    return [tuple(pairs.x0.shape[1:]) for pairs in reached.pairs]


@pytest.mark.parametrize("window", [1, 3])
def test_images_are_paired_within_a_window_of_one_shape(monkeypatch, tmp_path, window):
    """A window of 3 over steps of 2 micro-batches: the noises of its images are those of a direct assignment among themselves."""
    changes = {"noise_coupling": "assignment", "coupling_window": window, "random_flip": True, "max_train_steps": 6}
    reached = reach(monkeypatch, words(tmp_path, **changes), steps=6)
    shapes = shapes_of(reached)
    assert len(shapes) == 12 and len(set(shapes)) > 1 and set(shapes) <= LATENT_SHAPES
    moved = 0
    for first in range(0, 12, window):
        assert len(set(shapes[first : first + window])) == 1
        parts = [Draws(0, *divmod(number, 2), CPU, by_shape=True) for number in range(first, first + window)]
        parts = tuple(Draws(0, part.step, 2 * part.first_row, CPU, by_shape=True) for part in parts)
        pool = PoolDraws(parts, 2).normal("noise", *shapes[first])
        x0, noise = (torch.cat([getattr(pairs, name) for pairs in reached.pairs[first : first + window]]) for name in ("x0", "noise"))
        assert torch.equal(noise, immiscible.AssignmentCoupling()(x0, pool))
        moved += not torch.equal(noise, pool)
    assert moved > 0
    assert all(torch.tensor(reached.losses).isfinite())


def test_each_shape_has_a_reservoir_of_its_own(monkeypatch, tmp_path):
    reached = reach(monkeypatch, words(tmp_path, noise_coupling="reservoir", coupling_reservoir=6, max_train_steps=6), steps=6)
    kept = reached.objective.coupling.state_dict().values()
    assert {tuple(noise.shape) for noise in kept} == set(shapes_of(reached)) == LATENT_SHAPES and len(kept) == 18


@pytest.mark.slow
def test_sdxl_is_told_the_size_of_the_bucket_and_where_its_crop_was(monkeypatch, tmp_path):
    """In time ids: the height and width of the original, top and left of the crop, height and width of the bucket."""
    changes = {"pretrained_model_name_or_path": model_folder("xl"), "max_train_steps": 6}
    reached = reach(monkeypatch, words(tmp_path, **changes), steps=6)
    offsets = set()
    for pairs in reached.pairs:
        height, width = (8 * side for side in pairs.x0.shape[2:])
        for tall, wide, top, left, *target in pairs.condition["time_ids"].int().tolist():
            assert target == [height, width] and (tall, wide) in SHAPES
            scale = max(height / tall, width / wide)
            assert 0 <= top <= int(tall * scale) - height and 0 <= left <= int(wide * scale) - width
            offsets.add((top, left))
    assert len(offsets) > 3


def test_sizes_that_the_vae_cannot_divide_are_one_line(monkeypatch, tmp_path):
    with pytest.raises(UserError, match=r"--buckets: the sides of 12,32 must be multiples of 8, by which .* divides images"):
        reach(monkeypatch, words(tmp_path, buckets="12,32;32,32"))


def test_a_run_that_goes_on_ends_with_the_same_bits_and_counts_its_buckets(script, tmp_path):
    """Cut in the second of its epochs of 6.5 steps; evaluated and sampled at the square."""
    held = {"validation_prompts": ["a cat"], "validation_epochs": 1000, "use_ema": True, "noise_coupling": "reservoir", "random_flip": True}
    held |= {"checkpointing_steps": 1000, "coupling_reservoir": 8}
    results = finish([script.start(words(tmp_path / "whole", **held, max_train_steps=10), program=SCRATCH)])
    finish([script.start(words(tmp_path / "cut", **held, max_train_steps=8), program=SCRATCH)])
    going_on = {"max_train_steps": 10, "resume_from_checkpoint": "latest", "dataloader_num_workers": 1}
    finish([script.start(words(tmp_path / "cut", **held, **going_on), program=SCRATCH)])
    assert final_hashes(tmp_path / "cut", 10) == final_hashes(tmp_path / "whole", 10)
    said = [re.sub(" +", " ", line).strip() for line in results[0].stderr.splitlines()]
    first = said.index("buckets 3, height x width; samples, and images that are measured on, are squares")
    assert said[first + 1 : first + 5] == [
        "16 x 32: 9 images, 4 batches an epoch",
        "32 x 32: 12 images, 6 batches an epoch",
        "32 x 16: 6 images, 3 batches an epoch",
        "1 of 27 images are left out of each epoch, as buckets hold whole batches",
    ]


def hashes(folder: Path, step: int) -> dict[str, str]:
    """Of all that a checkpoint holds of weights, of adapters too."""
    files = sorted((folder / f"checkpoint-{step}").rglob("*.safetensors"))
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("version", "processes", "cached", "kind"),
    [
        *((1, processes, cached, {"use_ema": True}) for processes in (1, 2) for cached in (False, True)),
        *(("xl", 1, cached, {"use_ema": True}) for cached in (False, True)),
        *((version, processes, True, {"use_lora": True}) for version in ("xl", "3.5-without-t5") for processes in (1, 2)),
    ],
)
def test_killed_and_resumed_is_never_killed(script, tmp_path, version, processes, cached, kind):
    """From the checkpoint's own weights, pairs over all processes and windows of two."""
    changes = {"noise_coupling": "assignment", "coupling_window": 2, "checkpointing_steps": 2, "max_train_steps": 16, **kind}
    changes |= {"pretrained_model_name_or_path": model_folder(version)}
    changes |= {"resume_from_checkpoint": "latest", "random_flip": True, "center_crop": True, "train_batch_size": 2 // processes}
    changes |= {"coupling_scope": "global"} if processes > 1 else {}
    if cached:
        changes |= {"cache_latents": True, "latent_cache_dir": tmp_path / "cache"}
        finish([script.start([*words(tmp_path / "x", **changes), "--rows_per_shard", 4], program=PRECOMPUTE)])

    def begin(name: str):
        return start(script, words(tmp_path / name, **changes), processes, program=FINETUNE)

    finish(begin("whole"))
    runs = begin("killed")
    runs[0].wait_until(lambda: lines(tmp_path / "killed") > 8)
    kill(runs)
    assert not (tmp_path / "killed" / "checkpoint-16").exists()
    finish(begin("killed"))
    whole = hashes(tmp_path / "whole", 16)
    assert hashes(tmp_path / "killed", 16) == whole and len(whole) == (2 if "use_ema" in kind else 1)


@pytest.mark.slow
def test_two_processes_pair_the_images_that_one_would(script, tmp_path):
    common = {"noise_coupling": "assignment", "coupling_scope": "global", "max_train_steps": 6, "center_crop": True}
    finish(start(script, words(tmp_path / "one", **common, train_batch_size=4), 1, program=SCRATCH))
    finish(start(script, words(tmp_path / "two", **common, train_batch_size=2), 2, program=SCRATCH))
    for one, two in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert two["pair_distance"] == pytest.approx(one["pair_distance"], rel=1e-5) and two["paired_images"] == 4


@pytest.mark.slow
def test_an_epoch_is_planned_within_each_shape(script, tmp_path):
    argv = words(tmp_path / "run", noise_coupling="assignment", coupling_window="epoch", max_train_steps=8)
    finish(start(script, argv, 1, program=SCRATCH))
    config = parse_config(TextToImageConfig, [str(word) for word in argv], program="", description="")
    source = captioned_source(config, None)
    encode = TextToImageEncoder(load_checkpoint(config, resolution=32, cache_dir=None, from_scratch=True), CPU)
    buckets = assigned_buckets(source, bucket_sizes(config), config)
    dataset, order = ImageDataset(source, image_transform(config, 3, 0), buckets=buckets), BucketOrder(buckets, 2, 0, stop=0).permutation(1)

    def latents(problem: torch.Tensor) -> torch.Tensor:
        return encode.expected(Images(torch.stack([dataset[1, index]["pixel_values"] for index in order[problem].tolist()])))

    with safe_open(tmp_path / "run" / PLAN_FILE, framework="pt") as file:
        epoch, numbers = int(file.get_tensor("epoch")), file.get_tensor("numbers")
    of = buckets.of[order]
    assert epoch == 1 and len(numbers) == 26 and torch.equal(of, of[numbers]) and not torch.equal(numbers, torch.arange(26))
    assert torch.equal(numbers, immiscible.plan_epoch(latents, 26, seed=0, epoch=1, labels=of))


@pytest.mark.slow
@pytest.mark.parametrize("method", [{"coupling_caches": 2}, {"coupling_condition": "penalty"}, {"coupling_min_timestep": 300}])
def test_other_couplings_train(script, tmp_path, method):
    finish(start(script, words(tmp_path / "run", noise_coupling="assignment", **method, max_train_steps=9), 1, program=FINETUNE))
    assert len(metrics(tmp_path / "run")) == 9


@pytest.mark.slow
def test_measured_distances_are_those_of_squares(script, tmp_path):
    """A held-out share, whose images have every shape, and samples at --resolution."""
    changes = {"eval_steps": 2, "eval_samples": 8, "eval_inference_steps": 2, "validation_split": 0.3, "max_train_steps": 2}
    finish(start(script, words(tmp_path / "run", **changes), 1, program=FINETUNE))
    assert "validation_loss" in (tmp_path / "run" / "evaluation.jsonl").read_text()
