"""``--coupling_window epoch`` through the scripts: the pairs are those of a direct assignment, whoever trains and however often killed."""

import shutil
from pathlib import Path

import pytest
import torch
from kills import final_hashes, finish, kill, lines, metrics, start
from latent_caches import PRECOMPUTE
from launch import flags, tiny
from pictures import colored
from safetensors import safe_open
from tars import png, write_tar
from tiny_text import SCRATCH, data_folder, model_folder

import immiscible
from immiscible.configs import UnconditionalConfig
from immiscible.data.batches import GlobalBatchOrder, ImageDataset, Images
from immiscible.data.loading import training_source
from immiscible.data.transforms import image_transform
from immiscible.encoding.encoders import LatentEncoder
from immiscible.flags import parse_config
from immiscible.networks.latents import load_vae
from immiscible.training.planning import PLAN_FILE

EPOCH = {"noise_coupling": "assignment", "coupling_window": "epoch", "max_train_samples": 70}  # 4 batches of 16 an epoch, 6 images left out
WITHIN = {**EPOCH, "class_conditional": True, "coupling_condition": "within", "use_ema": True}
PHOTOS = {"bundled_data": "photo_crops", "resolution": 8, "random_flip": True}
LATENTS = {**PHOTOS, "resolution": 32}


def plan_of(folder: Path) -> tuple[int, torch.Tensor]:
    """The epoch and the plan that a run has left."""
    with safe_open(folder / PLAN_FILE, framework="pt") as file:
        return int(file.get_tensor("epoch")), file.get_tensor("numbers")


class Direct:
    """The images of a run's epochs, loaded one by one."""

    def __init__(self, words: list[str], expected=lambda images: images) -> None:
        config = parse_config(UnconditionalConfig, words, program="", description="")
        self.source = training_source(config, config.labels_for)
        self.transform = image_transform(config, 1 if config.bundled_data == "digits" else 3, 0)
        self.order, self.expected = GlobalBatchOrder(len(self.source), 16, 0, stop=0), expected

    def images(self, epoch: int) -> torch.Tensor:
        dataset = ImageDataset(self.source, self.transform)
        pixels = [dataset[epoch, index]["pixel_values"] for index in self.order.permutation(epoch)[:64].tolist()]
        return self.expected(torch.stack(pixels))

    def plan(self, epoch: int, within: bool = False) -> torch.Tensor:
        labels = torch.tensor([self.source.label(index) for index in self.order.permutation(epoch)[:64].tolist()]) if within else None
        return immiscible.plan_epoch(self.images(epoch), seed=0, epoch=epoch, labels=labels)


@pytest.mark.parametrize("words", [{}, PHOTOS, {"image_scale": 2, "look_ahead": False}], ids=["digits", "flips and crops", "scale"])
def test_pairs_are_those_of_a_direct_assignment(script, tmp_path, words):
    argv = tiny(tmp_path / "run", **{**EPOCH, **words}, max_train_steps=7, checkpointing_steps=1000)
    finish(start(script, argv, 1))
    direct, scale, steps = Direct(argv), words.get("image_scale", 1), metrics(tmp_path / "run")
    epoch, numbers = plan_of(tmp_path / "run")
    for number in range(2):
        images = scale * direct.images(number)
        plan = immiscible.plan_epoch(images, seed=0, epoch=number)
        noises = immiscible.epoch_noise(plan, *images.shape[1:], seed=0, epoch=number)
        distances = (images - noises).flatten(1).double().norm(dim=1).view(4, 16).mean(1)
        for place, line in enumerate(steps[4 * number : 4 * number + 4]):
            assert line["pair_distance"] == pytest.approx(float(distances[place]), rel=1e-5)
            assert line["pair_distance"] < line["pair_distance_drawn"] and line["paired_images"] == 64
    assert epoch == 1 and torch.equal(numbers, plan)


def test_classes_are_assigned_whatever_is_in_a_batch(script, tmp_path):
    argv = tiny(tmp_path / "run", **WITHIN, log_class_leak=True, max_train_steps=8)
    finish(start(script, argv, 1))
    assert torch.equal(plan_of(tmp_path / "run")[1], Direct(argv).plan(1, within=True))
    assert 5 < metrics(tmp_path / "run")[-1]["paired_images"] < 10


@pytest.mark.slow
def test_latents_are_assigned_by_what_is_expected_of_them(script, tmp_path):
    common = {**EPOCH, **LATENTS, "vae_model_name_or_path": model_folder(), "max_train_steps": 2}
    argv = tiny(tmp_path / "run", **common)
    finish(start(script, argv, 1))
    vae = load_vae(str(model_folder()), resolution=32)
    encode = LatentEncoder(vae, torch.device("cpu"))
    direct = Direct(argv, lambda images: torch.cat([encode.expected(Images(part)) for part in images.split(64)]))
    assert torch.equal(plan_of(tmp_path / "run")[1], direct.plan(0))

    cached = {**common, "center_crop": True, "cache_latents": True, "latent_cache_dir": tmp_path / "cache"}
    finish([script.start(tiny(tmp_path / "cached", **cached), program=PRECOMPUTE)])
    finish(start(script, tiny(tmp_path / "cached", **cached), 1))
    finish(start(script, tiny(tmp_path / "uncached", **common, center_crop=True), 1))
    of_cache, of_vae = (plan_of(tmp_path / name)[1] for name in ("cached", "uncached"))
    assert (of_cache == of_vae).double().mean() > 0.8  # the cache rounds to fp16


def test_shards_with_an_index_are_planned_by_class(script, tmp_path):
    members = {
        f"{number:03}.{kind}": content
        for number in range(70)
        for kind, content in (("png", png(seed=number)), ("cls", b"%d" % (number % 3)))
    }
    folder = write_tar(tmp_path / "shards" / "0.tar", members).parent
    finish(start(script, tiny(tmp_path / "run", train_data_dir=folder, **WITHIN, dataloader_num_workers=1), 1))
    assert torch.equal(plan_of(tmp_path / "run")[1].sort().values, torch.arange(64))


@pytest.mark.slow
def test_captioned_images_are_planned(script, tmp_path):
    words = {"pretrained_model_name_or_path": model_folder(), "train_data_dir": data_folder(), "resolution": 32, "train_batch_size": 4}
    more = {"max_train_steps": 5, "lr_warmup_steps": 0, "report_to": "none", "seed": 0, "output_dir": tmp_path / "run"}
    coupled = {"noise_coupling": "assignment", "coupling_window": "epoch"}
    finish([script.start(flags({**words, **more, **coupled}), program=SCRATCH)])
    epoch, numbers = plan_of(tmp_path / "run")
    assert epoch == 1 and torch.equal(numbers.sort().values, torch.arange(16))
    clustered = {**words, **more, **coupled, "coupling_condition": "within", "output_dir": tmp_path / "clusters"}
    result = finish([script.start(flags(clustered), program=SCRATCH)])[0]
    assert "16 captions fall into 1 clusters" in result.stderr and "experimental" in result.stderr
    assert torch.equal(plan_of(tmp_path / "clusters")[1], numbers)  # of so few images: one cluster is all of them


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_any_number_of_processes_pairs_alike(script, tmp_path, processes):
    words = {**WITHIN, "max_train_steps": 6, "random_flip": True}
    finish(start(script, tiny(tmp_path / "one", **words, train_batch_size=16), 1))
    finish(start(script, tiny(tmp_path / "more", **words, train_batch_size=16 // processes), processes))
    assert torch.equal(plan_of(tmp_path / "one")[1], plan_of(tmp_path / "more")[1])
    for one, more in zip(metrics(tmp_path / "one"), metrics(tmp_path / "more"), strict=True):
        assert more["pair_distance"] == pytest.approx(one["pair_distance"], rel=1e-6)
        assert more["loss"] == pytest.approx(one["loss"], rel=1e-5) and more["assignment_kept"] == one["assignment_kept"]


@pytest.mark.parametrize("loss", ["kept", *(pytest.param(loss, marks=pytest.mark.slow) for loss in ("damaged", "lost", "another's"))])
def test_killed_and_resumed_is_never_killed(script, tmp_path, loss):
    words = {**WITHIN, "gradient_accumulation_steps": 3, "max_train_steps": 7, "checkpointing_steps": 1, "resume_from_checkpoint": "latest"}
    if loss == "damaged":  # one epoch: it is surely that in which the run goes on
        words["max_train_samples"] = None
    finish(start(script, tiny(tmp_path / "whole", **words), 1))
    runs = start(script, tiny(tmp_path / "cut", **words), 1)
    runs[0].wait_until(lambda: lines(tmp_path / "cut") >= 4)
    kill(runs)
    path = tmp_path / "cut" / PLAN_FILE
    assert path.exists()
    if loss == "lost":
        path.unlink()
    elif loss == "damaged":
        bits = bytearray(path.read_bytes())
        bits[-100] ^= 1
        path.write_bytes(bits)
    elif loss == "another's":
        finish(start(script, tiny(tmp_path / "other", **{**words, "max_train_steps": 5, "seed": 1}), 1))
        shutil.copy(tmp_path / "other" / PLAN_FILE, path)
    result = finish(start(script, tiny(tmp_path / "cut", **words), 1))[0]
    assert ("is made anew" in result.stderr) == (loss == "damaged")
    assert final_hashes(tmp_path / "cut", 7) == final_hashes(tmp_path / "whole", 7)
    assert plan_of(tmp_path / "cut")[0] == plan_of(tmp_path / "whole")[0] == (0 if loss == "damaged" else 5)
    for one, other in zip(metrics(tmp_path / "whole"), metrics(tmp_path / "cut"), strict=True):
        names = [name for name in one if not name.endswith(("seconds", "second", "began", "ended", "mib"))]
        assert [one[name] for name in names] == [other[name] for name in names]


def test_the_plan_says_what_planning_takes(script, tmp_path):
    result = script(tiny(tmp_path / "run", **EPOCH, plan=True))
    assert result.code == 0 and "assigning an epoch of 64 images takes" in result.stdout and not (tmp_path / "run").exists()


def test_an_image_that_cannot_be_read_ends_the_run_before_it_trains(script, tmp_path):
    folder = colored(tmp_path / "photos", count=20)
    (folder / "broken.png").write_bytes(b"\x89PNG broken")
    words = {**EPOCH, "train_data_dir": folder, "train_batch_size": 7, "max_train_samples": None}
    result = script(tiny(tmp_path / "run", **words))
    assert result.code == 1 and "broken.png" in result.error and "before the first step" in result.error
    runs = script.start_ranks(tiny(tmp_path / "two", **{**words, "train_batch_size": 3}))
    results = [run.wait() for run in runs]
    assert [each.code for each in results] == [1, 1] and "broken.png" in results[0].error
    finish(start(script, tiny(tmp_path / "run", **words, skip_bad_images=True), 1))  # the corrected command begins


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ({"coupling_window": "epok"}, "--coupling_window must be a whole number or epoch, not 'epok'"),
        ({"coupling_window": "0"}, "--coupling_window must be at least 1"),
        ({"noise_coupling": "nearest"}, "--coupling_window is for couplings that pair"),
        ({"coupling_condition": "centered", "class_conditional": True}, "--coupling_condition centered is of a batch"),
        ({"coupling_condition": "penalty", "class_conditional": True}, "--coupling_condition penalty is of a batch"),
        ({"coupling_min_timestep": 5}, "--coupling_min_timestep is of a batch"),
        ({"train_data_dir": "somewhere", "streaming": True}, "--streaming reads in passing"),
    ],
)
def test_what_does_not_go_with_epochs(script, tmp_path, words, line):
    result = script(tiny(tmp_path / "run", **{**EPOCH, "max_train_samples": None, **words}))
    assert result.code == 2 and line in result.error and not (tmp_path / "run").exists()
