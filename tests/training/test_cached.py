"""``--coupling_caches`` through the scripts: pairs are those of the rule applied by hand, also resumed and over two processes."""

from pathlib import Path

import pytest
import torch
from kills import final_hashes, finish, metrics, start
from launch import tiny
from safetensors.torch import load_file
from scipy.optimize import linear_sum_assignment

import immiscible
from immiscible.configs import UnconditionalConfig
from immiscible.data.batches import GlobalBatchOrder, ImageDataset
from immiscible.data.loading import training_source
from immiscible.data.transforms import image_transform
from immiscible.epoch import CACHE, CachedCoupling
from immiscible.errors import UserError
from immiscible.flags import parse_config
from immiscible.training.planning import EpochLayout, _begin

CACHED = {"noise_coupling": "assignment", "coupling_caches": 1, "max_train_samples": 70, "checkpointing_steps": 1}  # 4 batches an epoch
OWN = torch.arange(70)[:, None]


def state_of(folder: Path, step: int) -> list[dict[str, torch.Tensor]]:
    """What each process has kept at a step."""
    return [load_file(path) for path in sorted((folder / f"checkpoint-{step}").glob("coupling*.safetensors"))]


def test_pairs_are_exchanged_and_kept(script, tmp_path):
    argv = tiny(tmp_path / "run", **CACHED, max_train_steps=10)
    finish(start(script, argv, 1))
    config = parse_config(UnconditionalConfig, argv, program="", description="")
    source, order = training_source(config, None), GlobalBatchOrder(70, 16, 0, stop=10)
    dataset, numbers = ImageDataset(source, image_transform(config, 1, 0)), torch.arange(70)
    distances = []
    for line, keys in zip(metrics(tmp_path / "run"), order, strict=True):
        images = torch.stack([dataset[key]["pixel_values"] for key in keys]).flatten(1).double()
        rows = torch.tensor([index for _, index in keys])
        noises = immiscible.epoch_noise(numbers[rows], 64, seed=0, epoch=CACHE).double()
        cost = torch.cdist(images, noises)
        index = linear_sum_assignment(cost.numpy())[1]
        numbers[rows] = numbers[rows][index]
        distances.append(float(cost[range(16), index].mean()))
        assert line["pair_distance"] == pytest.approx(distances[-1], rel=1e-5) and line["paired_images"] == 16
    (state,) = state_of(tmp_path / "run", 10)
    assert torch.equal(state["numbers"][:, 0], numbers) and torch.equal(numbers.sort().values, OWN[:, 0]) and state["epoch"] == 2
    assert sum(distances[8:]) / 2 < sum(distances[:4]) / 4  # nearer than in the first epoch


def test_a_resumed_run_goes_on_exactly(script, tmp_path):
    words = {**CACHED, "coupling_caches": 3, "lr_scheduler": "constant", "use_ema": True, "resume_from_checkpoint": "latest"}
    finish(start(script, tiny(tmp_path / "whole", **words, max_train_steps=7), 1))
    for last in (3, 7):
        finish(start(script, tiny(tmp_path / "parts", **words, max_train_steps=last, look_ahead=last == 7), 1))
    (whole,), (parts,) = (state_of(tmp_path / name, 7) for name in ("whole", "parts"))
    assert whole["numbers"].shape == (70, 3) and torch.equal(whole["numbers"], parts["numbers"])
    assert torch.equal(whole["numbers"].T.sort().values.flatten(), torch.arange(210))  # each cache keeps its pool
    assert final_hashes(tmp_path / "whole", 7) == final_hashes(tmp_path / "parts", 7)


def test_processes_tell_each_other_at_the_end_of_an_epoch(script, tmp_path):
    finish(start(script, tiny(tmp_path / "two", **CACHED, train_batch_size=8, max_train_steps=5), 2))
    first, second = (state["numbers"] for state in state_of(tmp_path / "two", 4))
    changed, changed_elsewhere = first != OWN, second != OWN
    assert changed.any() and changed_elsewhere.any() and not (changed & changed_elsewhere).any()
    together = torch.where(changed, first, second)
    assert torch.equal(together.sort(0).values, OWN)
    batch = GlobalBatchOrder(70, 16, 0, stop=5).permutation(1)[:16]
    for rank, state in enumerate(state_of(tmp_path / "two", 5)):
        new = torch.ones(70, dtype=torch.bool)
        new[batch[8 * rank : 8 * rank + 8]] = False
        assert torch.equal(state["numbers"][new], together[new]) and torch.equal(state["numbers"].sort(0).values, OWN)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ({"noise_coupling": "nearest"}, "--coupling_caches is for couplings that pair the images of a batch"),
        ({"coupling_window": "epoch"}, "--coupling_window has no meaning with --coupling_caches"),
        ({"coupling_scope": "global"}, "--coupling_scope has no meaning with --coupling_caches"),
        ({"coupling_condition": "within", "class_conditional": True}, "--coupling_condition has no meaning with --coupling_caches"),
        ({"coupling_min_timestep": 5}, "--coupling_min_timestep has no meaning with --coupling_caches"),
        ({"train_data_dir": "somewhere", "streaming": True}, "which --streaming does not give"),
        ({"coupling_caches": 65}, "--coupling_caches must be at most 64"),
    ],
)
def test_what_does_not_go_with_caches(tmp_path, words, line):
    argv = tiny(tmp_path / "run", **{**CACHED, "max_train_samples": None, **words})
    with pytest.raises((UserError, SystemExit), match=line):
        parse_config(UnconditionalConfig, argv, program="", description="")


def test_another_state_and_too_few_images_are_refused():
    cached = CachedCoupling(immiscible.AssignmentCoupling(), caches=2)
    assert cached.state_dict() == {}
    for state in ({}, {"seed": OWN}, {"numbers": OWN, "epoch": OWN}):
        with pytest.raises(UserError, match="CachedCoupling keeps numbers of 2 noises an image"):
            cached.load_state_dict(state)
    with pytest.raises(UserError, match="`condition` within"):
        CachedCoupling(immiscible.AssignmentCoupling(condition="within"))
    few = EpochLayout(GlobalBatchOrder(10, 8, 0, stop=1, num_processes=2), accumulation=1, seed=0, max_steps=1)
    with pytest.raises(UserError, match="a global batch of 16 takes an image of 10 twice"):
        _begin(cached, few)
