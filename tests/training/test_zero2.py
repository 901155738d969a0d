"""DeepSpeed's ZeRO-2 against DDP on CPUs, where it is installed; what it is asked for, by a stub, where it is not."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from kills import finish, metrics
from launch import ROOT, accelerate_launch, free_port, run_command, tiny
from test_sharding import EMA, averaged, difference, losses_differ, split, whole
from tiny_text import ADAPTERS, FINETUNE, tiny_text

from immiscible.errors import UserError
from immiscible.networks.arguments import OptimizationArguments
from immiscible.training import zero2
from immiscible.training.session import _check_launcher
from immiscible.training.zero2 import split_optimizer

ZERO2 = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2", "DS_ACCELERATOR": "cpu"}
FLAGS = {**EMA, "model_preset": "dit-tiny", "max_train_steps": 6, "checkpointing_steps": 3, "learning_rate": 1e-4}


class StubEngine(torch.nn.Module):
    """What of an engine is used; it says what it is called for."""

    def __init__(self, network, optimizer, calls):
        super().__init__()
        self.module, self.calls = network, calls
        self.optimizer = SimpleNamespace(optimizer=optimizer, scaled_global_norm=lambda: torch.tensor(2.0))

    def set_gradient_accumulation_boundary(self, is_boundary):
        self.calls.append(("boundary", is_boundary))

    def backward(self, loss):
        self.calls.append(("backward", loss))

    def step(self):
        self.calls.append(("step",))


def test_the_engine_steps_when_the_optimizer_does():
    """And not in the backward pass, in which accelerate lets it; clipping, accumulation and batch are the flags'."""
    Accelerator(cpu=True)  # its optimizers look for one
    network, calls = torch.nn.Linear(2, 2), []
    optimizer = torch.optim.AdamW(network.parameters())
    config = {"bf16": {"enabled": True}, "gradient_clipping": "auto"}
    accelerator = SimpleNamespace(num_processes=3, state=SimpleNamespace(deepspeed_plugin=SimpleNamespace(deepspeed_config=config)))
    asked = {}

    def prepare(network, optimizer):
        asked.update(config)
        return StubEngine(network, optimizer, calls), None

    accelerator.prepare = prepare
    arguments = OptimizationArguments(train_batch_size=4, gradient_accumulation_steps=2, max_grad_norm=0.5)
    engine, stepped = split_optimizer(network, optimizer, arguments, accelerator)
    sizes = {"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2, "train_batch_size": 24}
    assert asked == {**sizes, "gradient_clipping": 0.5} and config["bf16"] == {"enabled": True}  # it computes in fp32, by autocast
    for last in (False, True):
        accelerator.deepspeed_engine_wrapped.backward("loss", sync_gradients=last)
    assert accelerator.deepspeed_engine_wrapped.get_global_grad_norm() == 2.0 and accelerator.deepspeed_engine_wrapped.engine is engine
    assert calls == [("boundary", False), ("backward", "loss"), ("boundary", True), ("backward", "loss")]
    stepped.param_groups[0]["lr"] = 0.25
    stepped.step()
    stepped.zero_grad(set_to_none=True)
    assert calls[4:] == [("step",)] and optimizer.param_groups[0]["lr"] == 0.25 and accelerator._optimizers == [stepped]


@pytest.mark.parametrize(
    ("name", "value"),
    [("ZERO_STAGE", "3"), ("OFFLOAD_OPTIMIZER_DEVICE", "cpu"), ("OFFLOAD_PARAM_DEVICE", "nvme"), ("CONFIG_FILE", "ds.json")],
)
def test_what_deepspeed_may_not_be_asked_is_one_line(monkeypatch, name, value):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setattr(zero2, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"DEEPSPEED, which is not installed: `pip install deepspeed`, or launch by FSDP2"):
        _check_launcher()
    monkeypatch.setattr(zero2, "find_spec", lambda name: name)
    _check_launcher()
    monkeypatch.setenv(f"ACCELERATE_DEEPSPEED_{name}", value)
    with pytest.raises(UserError, match=rf"DeepSpeed with {name.lower()} {value}: stage 2 .*deepspeed_zero2.yaml"):
        _check_launcher()


# With DeepSpeed


@pytest.fixture(scope="module")
def six(script, tmp_path_factory):
    """The same six steps by ZeRO-2 and by DDP: their folders."""
    pytest.importorskip("deepspeed")
    folder = tmp_path_factory.mktemp("six")
    finish(script.start_ranks(tiny(folder / "zero2", **FLAGS), env=ZERO2))
    whole(script, tiny(folder / "ddp", **FLAGS))
    return folder


@pytest.mark.slow
def test_losses_weights_and_their_average_are_those_of_ddp(six):
    assert len(metrics(six / "zero2")) == 6 and losses_differ(six / "zero2", six / "ddp") < 1e-5
    assert difference(six / "zero2", six / "ddp", *averaged("transformer")) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize(("how", "bound"), [("zero2", 0), ("fsdp2", 1e-6), ("one", 1e-6)])
def test_a_checkpoint_goes_on_by_any_launch(script, six, tmp_path, how, bound):
    changes = {"train_batch_size": 16} if how == "one" else {}
    words = tiny(tmp_path / "run", **{**FLAGS, **changes}, resume_from_checkpoint=six / "zero2/checkpoint-3")
    if how == "zero2":
        finish(script.start_ranks(words, env=ZERO2))
    else:
        whole(script, words, 1) if how == "one" else split(script, words)
    assert [line["loss"] for line in metrics(tmp_path / "run")] == pytest.approx(
        [line["loss"] for line in metrics(six / "ddp")][3:], abs=1e-6
    )
    assert difference(tmp_path / "run", six / "zero2", *averaged("transformer")) <= bound


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes", [{"mixed_precision": "bf16"}, {"gradient_accumulation_steps": 2}, {"max_grad_norm": 0.05}, {"gradient_checkpointing": True}]
)
def test_the_options_of_a_step_are_those_of_ddp(script, six, tmp_path, changes):
    finish(script.start_ranks(tiny(tmp_path / "zero2", **FLAGS, **changes), env=ZERO2))
    whole(script, tiny(tmp_path / "ddp", **FLAGS, **changes))
    assert losses_differ(tmp_path / "zero2", tmp_path / "ddp") < 1e-5
    assert difference(tmp_path / "zero2", tmp_path / "ddp", *averaged("transformer")) < 1e-6


@pytest.mark.slow
def test_adapters_beside_frozen_weights(script, six, tmp_path):
    flags = {"use_lora": True, "max_train_steps": 4, "checkpointing_steps": 2, "train_batch_size": 2, "learning_rate": 1e-4}
    finish(script.start_ranks(tiny_text(tmp_path / "zero2", **flags), program=FINETUNE, env=ZERO2))
    goes_on = {**flags, "train_batch_size": 4, "resume_from_checkpoint": tmp_path / "zero2/checkpoint-2"}
    whole(script, tiny_text(tmp_path / "one", **goes_on), 1, program=FINETUNE)
    assert difference(tmp_path / "one", tmp_path / "zero2", ADAPTERS) < 1e-6


@pytest.mark.slow
def test_launched_by_the_settings(tmp_path):
    pytest.importorskip("deepspeed")
    settings = ("--config_file", ROOT / "configs/accelerate/deepspeed_zero2.yaml", "--num_processes", 2, "--main_process_port", free_port())
    result = run_command([*accelerate_launch(*settings), *tiny(tmp_path / "run", **EMA)], timeout=300, DS_ACCELERATOR="cpu")
    assert result.code == 0 and "8 images x 2 processes" in result.stderr, result.stderr
    assert "ZeRO-2 over 2 processes" in result.stderr and (tmp_path / "run/model_index.json").exists()
