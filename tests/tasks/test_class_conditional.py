"""Class-conditional training: labels reach the network and the coupling, leaks are told, means survive a resume."""

import pytest
import torch
from kills import final_hashes, finish, kill, metrics, start
from launch import tiny

from immiscible.data.batches import Images
from immiscible.encoding.encoders import PixelEncoder
from immiscible.randomness import Draws

COMMON = {"class_conditional": True, "class_dropout_prob": 0.3, "noise_coupling": "assignment", "use_ema": True}


def test_the_encoder_tells_the_network_the_class():
    batch, draws = Images(torch.zeros(2, 1, 4, 4), torch.tensor([3, 1])), Draws(0, 0, 0, torch.device("cpu"))
    told = PixelEncoder(torch.device("cpu"), class_conditional=True)(batch, draws)
    assert torch.equal(told.condition["class_labels"], batch.labels) and torch.equal(told.labels, batch.labels)
    untold = PixelEncoder(torch.device("cpu"))(batch, draws)
    assert not untold.condition and torch.equal(untold.labels, batch.labels)


@pytest.mark.parametrize("condition", ["none", "within", *(pytest.param(name, marks=pytest.mark.slow) for name in ("centered", "penalty"))])
def test_plain_assignment_leaks_the_class_and_says_so(script, tmp_path, condition):
    words = {"coupling_condition": condition, "log_class_leak": True, "train_batch_size": 64, "max_train_steps": 12, "logging_steps": 12}
    result = script(tiny(tmp_path / "run", **COMMON, **words))
    assert result.code == 0, result.stderr
    assert ("--coupling_condition within" in result.stderr) == (condition == "none")
    line = metrics(tmp_path / "run")[-1]
    assert line["distance_reduction_percent"] > 0
    if condition == "none":
        assert line["class_leak_accuracy"] > 0.3 > 2 * line["class_leak_chance"]
    else:
        assert line["class_leak_accuracy"] < 0.3


@pytest.mark.slow
def test_the_classes_means_go_on_where_they_were_cut(script, tmp_path):
    """They are state, and the worker that looks ahead has changed them already when a checkpoint is written."""
    words = {**COMMON, "coupling_condition": "centered", "coupling_window": 2, "max_train_steps": 9, "checkpointing_steps": 1}
    words["resume_from_checkpoint"] = "latest"
    finish(start(script, tiny(tmp_path / "whole", **words), 1))
    runs = start(script, tiny(tmp_path / "cut", **words), 1)
    runs[0].wait_until((tmp_path / "cut" / "checkpoint-5").is_dir)
    kill(runs)
    finish(start(script, tiny(tmp_path / "cut", **words), 1))
    assert final_hashes(tmp_path / "cut", 9) == final_hashes(tmp_path / "whole", 9)


def test_two_ranks_pair_within_the_classes_of_both(script, tmp_path):
    words = {**COMMON, "coupling_condition": "within", "coupling_scope": "global"}
    finish(start(script, tiny(tmp_path / "one", **words, train_batch_size=32), 1))
    finish(start(script, tiny(tmp_path / "two", **words, train_batch_size=16), 2))
    for one, two in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-6)
        assert two["pair_distance"] == pytest.approx(one["pair_distance"], rel=1e-6)
        assert one["pair_distance"] < one["pair_distance_drawn"]


def test_conditions_need_classes(script, tmp_path):
    for words in ({"class_conditional": True}, {"coupling_condition": "within", "noise_coupling": "assignment"}, {"log_class_leak": True}):
        result = script(tiny(tmp_path / "run", bundled_data="photo_crops", **words))
        assert result.code == 2 and f"--{next(iter(words))}" in result.error and "has none" in result.error
    result = script(tiny(tmp_path / "run", noise_coupling="nearest", coupling_condition="within"))
    assert result.code == 2 and "--coupling_condition is for couplings that pair" in result.error
    result = script(tiny(tmp_path / "run", coupling_condition_ratio=2))
    assert result.code == 2 and "--coupling_condition_ratio must be from 0 to 1, not 2" in result.error
