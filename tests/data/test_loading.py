"""From flags to batches: which images are used, and the loader with its workers."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import grays

from immiscible.data.batches import GlobalBatchOrder, ImageDataset
from immiscible.data.loading import build_loader, images_of, load_images
from immiscible.data.sources import ArrayImages
from immiscible.data.transforms import ImageTransform
from immiscible.errors import UserError

CPU = torch.device("cpu")


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
    for x0, labels, *_ in batches:
        numbers = grays(x0)[:, 0, 0, 0].round().long()
        assert labels.dtype == torch.int64 and torch.equal(labels, numbers**2 % 7)
        seen += numbers.tolist()
    assert sorted(seen[:20]) == list(range(20)) and seen[:20] != seen[20:40]  # shuffled, anew in each epoch
    for (x0, labels, *_), (again, same, *_) in zip(batches[7:], labelled_batches(workers, start=7), strict=True):
        assert torch.equal(x0, again) and torch.equal(labels, same)
    plain = labelled_batches(workers, with_labels=False)
    assert all(labels is None and torch.equal(x0, batch.x0) for (x0, labels, *_), batch in zip(plain, batches, strict=True))


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


@pytest.mark.slow
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
