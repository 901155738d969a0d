"""Runs whose processes hold a part of the network each, against those whose processes hold all of it. FSDP2 on CPUs speaks gloo."""

from __future__ import annotations

import json
import re
import shutil
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import psutil
import pytest
import torch
from kills import finish, kill, metrics
from launch import ROOT, accelerate_launch, free_port, run_command, tiny
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_text import ADAPTERS, FINETUNE, tiny_text

from immiscible.errors import UserError
from immiscible.files import file_facts
from immiscible.networks.arguments import OptimizationArguments
from immiscible.tasks.from_run import load_model
from immiscible.training.checkpoints import STATE_FILE, check_identity
from immiscible.training.session import FSDP2_ONLY, _check_launcher
from immiscible.training.sharding import _check
from immiscible.training.shards import SHARDS

WEIGHTS = "diffusion_pytorch_model.safetensors"
FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
EMA = {"use_ema": True, "train_batch_size": 8}


def split(script, words, processes=2, code=0, **options):
    return finish(script.start_ranks(words, processes, env=FSDP2, **options), code)


def whole(script, words, processes=2, **options):
    finish(script.start_ranks(words, processes, **options) if processes > 1 else [script.start(words, **options)])


def difference(one, other, *files):
    """The largest of all numbers in the files."""
    found = 0.0
    for name in files:
        a, b = load_file(one / name), load_file(other / name)
        assert a.keys() == b.keys()
        found = max(found, *(float((a[key] - b[key]).abs().max()) for key in a))
    return found


def averaged(part="unet"):
    """The average, which a pipeline has, and the weights beside it."""
    return f"{part}/{WEIGHTS}", f"{part}_non_ema/{WEIGHTS}"


def losses_differ(one, other):
    lines = list(zip(metrics(one), metrics(other), strict=True))
    return max(abs(a[name] - b[name]) for a, b in lines for name in ("loss", "grad_norm"))


@pytest.fixture
def two_layers(tmp_path):
    """A transformer of two blocks: FSDP2's first look at every operation on every shape takes longer than the steps."""
    path = tmp_path / "config.json"
    settings = {"num_layers": 2, "num_attention_heads": 1, "attention_head_dim": 8, "patch_size": 4, "norm_num_groups": 1}
    path.write_text(json.dumps({"_class_name": "DiTTransformer2DModel", **settings}))
    return {"model_preset": None, "model_config_name_or_path": path, "max_train_steps": 2}


def test_two_processes_with_a_part_each_train_what_one_trains(script, two_layers, tmp_path):
    split(script, tiny(tmp_path / "two", **two_layers, **EMA))
    whole(script, tiny(tmp_path / "one", **two_layers, use_ema=True, train_batch_size=16), 1)
    assert losses_differ(tmp_path / "two", tmp_path / "one") < 1e-6
    assert difference(tmp_path / "two", tmp_path / "one", *averaged("transformer")) < 1e-6
    files = {path.name for path in (tmp_path / "two/checkpoint-2").rglob("*") if path.is_file()}
    assert files == {STATE_FILE, *(f"shard-{rank:05}-model-00001-of-00001.safetensors" for rank in (1, 2))}  # and no pickle


@pytest.mark.slow
def test_a_transformer_of_one_block_is_one_group(script, two_layers, tmp_path):
    """Diffusers' DiT calls what embeds the time in the midst of its first block, which no other has then."""
    path = two_layers["model_config_name_or_path"]
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_layers": 1}))
    split(script, tiny(tmp_path / "two", **two_layers, **EMA))
    whole(script, tiny(tmp_path / "one", **two_layers, use_ema=True, train_batch_size=16), 1)
    assert losses_differ(tmp_path / "two", tmp_path / "one") < 1e-6
    assert difference(tmp_path / "two", tmp_path / "one", *averaged("transformer")) < 1e-6


# Ten steps of a U-Net

TEN = {**EMA, "max_train_steps": 10, "checkpointing_steps": 5, "learning_rate": 1e-4}


@pytest.fixture(scope="module")
def ten(script, tmp_path_factory):
    """The same run with FSDP2 and with DDP: its folders."""
    folder = tmp_path_factory.mktemp("ten")
    split(script, tiny(folder / "fsdp", **TEN))
    whole(script, tiny(folder / "ddp", **TEN))
    return folder


@pytest.mark.slow
def test_losses_weights_and_their_average_are_those_of_ddp(ten):
    assert len(metrics(ten / "fsdp")) == 10 and losses_differ(ten / "fsdp", ten / "ddp") < 1e-5
    assert difference(ten / "fsdp", ten / "ddp", *averaged()) < 1e-6


@pytest.mark.slow
def test_plain_diffusers_samples_the_pipeline(ten):
    program = (
        f"from diffusers import DDPMPipeline as P; print(P.from_pretrained({str(ten / 'fsdp')!r})(num_inference_steps=2).images[0].size)"
    )
    result = run_command([sys.executable, "-c", program], PYTHONPATH="")
    assert "(8, 8)" in result.stdout, result.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "sharded", "changes", "bound"),
    [
        (2, True, {}, 0),
        (2, False, {}, 1e-6),
        (1, False, {"train_batch_size": 16}, 1e-6),
        (1, False, {"gradient_accumulation_steps": 2}, 1e-6),
        (4, True, {"train_batch_size": 4}, 1e-6),
    ],
)
def test_a_checkpoint_goes_on_by_any_number_of_processes(script, ten, tmp_path, processes, sharded, changes, bound):
    words = tiny(tmp_path / "run", **{**TEN, **changes}, resume_from_checkpoint=ten / "fsdp/checkpoint-5")
    (split if sharded else whole)(script, words, processes)
    assert [line["step"] for line in metrics(tmp_path / "run")] == [6, 7, 8, 9, 10]
    for line, before in zip(metrics(tmp_path / "run"), metrics(ten / "fsdp")[5:], strict=True):
        assert line["loss"] == pytest.approx(before["loss"], abs=bound)
    assert difference(tmp_path / "run", ten / "fsdp", *averaged()) <= bound


@pytest.mark.slow
def test_what_is_read_is_what_was_saved(script, ten, tmp_path):
    """Weights, average and the optimizer's state, to the last bit: by one process, which then saves them whole, at the same step."""
    words = tiny(
        tmp_path / "run", **{**TEN, "train_batch_size": 16, "max_train_steps": 5}, resume_from_checkpoint=ten / "fsdp/checkpoint-5"
    )
    whole(script, words, 1)
    assert (tmp_path / "run/model_index.json").exists()
    parts = [load_file(path) for path in sorted((ten / "fsdp/checkpoint-5" / SHARDS).iterdir())]
    optimizer = torch.load(tmp_path / "run/checkpoint-5/optimizer.bin", weights_only=True)["state"]
    for group, folder in (("weights", "unet"), ("average.weights", "unet_ema")):
        loaded = load_file(tmp_path / "run/checkpoint-5" / folder / WEIGHTS)
        for name, tensor in loaded.items():
            assert torch.equal(tensor, torch.cat([part[f"{group}.{name}"] for part in parts if f"{group}.{name}" in part]))
    moments = [torch.cat([part[key] for part in parts if key in part]) for key in sorted(parts[0]) if ".exp_avg_sq." in key]
    wanted = sorted(float(state["exp_avg_sq"].double().sum()) for state in optimizer.values())
    assert sorted(float(moment.double().sum()) for moment in moments) == wanted and len(moments) == len(optimizer)
    assert {int(state["step"]) for state in optimizer.values()} == {5}
    assert json.loads((tmp_path / "run/checkpoint-5/unet_ema/config.json").read_text())["optimization_step"] == 5


def without(part, checkpoint, copy):
    """The checkpoint without the tensors whose names begin so, sealed again."""
    shutil.copytree(checkpoint, copy)
    state = json.loads((copy / STATE_FILE).read_text())
    for path in (copy / SHARDS).iterdir():
        with safe_open(path, framework="pt") as file:
            kept = {name: file.get_tensor(name) for name in file.keys() if not name.startswith(part)}  # noqa: SIM118 (not a dict)
            metadata = file.metadata()
        save_file(kept, path, metadata=metadata)
        state["files"][f"{SHARDS}/{path.name}"] = file_facts(path)
    (copy / STATE_FILE).write_text(json.dumps(state))
    return copy


@pytest.mark.slow
def test_what_cannot_go_on_is_one_line(script, ten, tmp_path):
    words = tiny(tmp_path / "run", **TEN, resume_from_checkpoint=ten / "ddp/checkpoint-5")
    first, _ = split(script, words, code=2)
    assert re.search(
        r"checkpoint-5 holds the whole network, as DDP and one process save it: resume it without FSDP2 and DeepSpeed", first.error
    )
    for part, wanted in (
        ("weights.conv_in.bias", "Missing key.*weights.conv_in.bias"),
        ("optimizer.", "no state of an optimizer that has taken 5"),
    ):
        other = without(part, ten / "fsdp/checkpoint-5", tmp_path / part / "checkpoint-5")
        words = tiny(tmp_path / "one", **{**TEN, "train_batch_size": 16}, resume_from_checkpoint=other)
        (result,) = finish([script.start(words)], code=1)
        assert re.search(f"{SHARDS} .*{wanted}", result.error)
    with pytest.raises(
        UserError, match=r"is of a run split by FSDP2 or DeepSpeed, in parts; resumed with --max_train_steps 5, .* writes the pipeline"
    ):
        load_model(str(ten / "fsdp/checkpoint-5"))


@pytest.mark.slow
def test_killed_and_resumed_to_the_bit(script, ten, tmp_path):
    runs = script.start_ranks(tiny(tmp_path / "run", **TEN), env=FSDP2)
    runs[0].wait_until(lambda: (tmp_path / "run/checkpoint-5").exists())
    kill(runs)
    split(script, tiny(tmp_path / "run", **TEN, resume_from_checkpoint="latest"))
    for name in [*averaged(), *(f"checkpoint-10/{SHARDS}/shard-{rank:05}-model-00001-of-00001.safetensors" for rank in (1, 2))]:
        one, other = (load_file(folder / name) for folder in (tmp_path / "run", ten / "fsdp"))
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one), name


@pytest.mark.slow
def test_a_signal_is_answered_by_a_checkpoint(script, tmp_path):
    runs = script.start_ranks(tiny(tmp_path / "run", **{**TEN, "max_train_steps": 1000, "checkpointing_steps": 1000}), env=FSDP2)
    runs[0].wait_until(lambda: (tmp_path / "run/metrics.jsonl").exists() and len(metrics(tmp_path / "run")) > 2)
    runs[1].send(signal.SIGTERM)
    finish(runs, code=128 + signal.SIGTERM)
    assert len(list(tmp_path.glob(f"run/checkpoint-*/{SHARDS}/*.safetensors"))) == 2


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(psutil.Process, "rlimit"), reason="no limit on file sizes here")
def test_a_disk_that_fails_while_the_parts_are_saved_is_one_line(script, tmp_path):
    folder = tmp_path / "run"
    runs = script.start_ranks(tiny(folder, **{**TEN, "max_train_steps": 4000, "checkpointing_steps": 4}), env=FSDP2)
    runs[0].wait_until(lambda: (folder / "checkpoint-4").exists())
    psutil.Process(runs[1].pid).rlimit(psutil.RLIMIT_FSIZE, (50_000, 50_000))
    results = [run.wait() for run in runs]
    assert [result.code for result in results] == [1, 1]
    assert f"cannot write {folder / '.partial-checkpoint-'}" in results[0].error and "File too large" in results[0].error
    assert not list(folder.glob(".partial-*"))


# Options of a step

OPTIONS = {
    "bf16": {"mixed_precision": "bf16"},
    "accumulation": {"gradient_accumulation_steps": 2},
    "clipping": {"max_grad_norm": 0.05},
    "recomputed": {"gradient_checkpointing": True},
    "global": {"noise_coupling": "assignment", "coupling_scope": "global"},
    "radam": {"optimizer": "radam"},
    "masked": {"model_preset": "mdt-tiny", "mask_ratio": [0.3]},
}


@pytest.mark.slow
@pytest.mark.parametrize("changes", OPTIONS.values(), ids=OPTIONS.keys())
def test_the_options_of_a_step_are_those_of_ddp(script, tmp_path, changes):
    """On transformers, whose blocks share an embedder; with what is sampled and measured on the way."""
    flags = {**EMA, "model_preset": "dit-tiny", "max_train_steps": 4, "learning_rate": 1e-4, **changes}
    measured = {"eval_steps": 2, "eval_samples": 16, "eval_inference_steps": [2], "validation_split": 0.2, "eval_features": "pixels"}
    words = [tiny(tmp_path / name, **flags, **measured, save_images_epochs=1, max_train_samples=160) for name in ("fsdp", "ddp")]
    split(script, words[0])
    whole(script, words[1])
    assert losses_differ(tmp_path / "fsdp", tmp_path / "ddp") < 1e-5
    assert difference(tmp_path / "fsdp", tmp_path / "ddp", *averaged("transformer")) < 1e-6
    one, other = (
        [json.loads(line) for line in (tmp_path / name / "evaluation.jsonl").read_text().splitlines()] for name in ("fsdp", "ddp")
    )
    assert [line["step"] for line in one] == [0, 2, 4][-len(one) :]
    for line, wanted in zip(one, other, strict=True):
        assert line["frechet_distance"]["2"] == pytest.approx(wanted["frechet_distance"]["2"], rel=1e-3)
    if "noise_coupling" in changes:
        assert [line["pair_distance"] for line in metrics(tmp_path / "fsdp")] == [
            line["pair_distance"] for line in metrics(tmp_path / "ddp")
        ]


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"train_text_encoder": True, "lora_alpha": 8}], ids=["network", "and text encoder"])
def test_adapters_beside_frozen_weights(script, tmp_path, changes):
    flags = {"use_lora": True, "max_train_steps": 4, "checkpointing_steps": 2, "train_batch_size": 2, "learning_rate": 1e-4, **changes}
    split(script, tiny_text(tmp_path / "fsdp", **flags), program=FINETUNE)
    whole(script, tiny_text(tmp_path / "ddp", **flags), program=FINETUNE)
    assert losses_differ(tmp_path / "fsdp", tmp_path / "ddp") < 1e-5 and difference(tmp_path / "fsdp", tmp_path / "ddp", ADAPTERS) < 1e-6
    saved = [name for path in (tmp_path / "fsdp/checkpoint-2" / SHARDS).iterdir() for name in load_file(path)]
    assert saved and all("lora" in name for name in saved)  # what is frozen is where it came from
    goes_on = {**flags, "train_batch_size": 4, "resume_from_checkpoint": tmp_path / "fsdp/checkpoint-2"}
    whole(script, tiny_text(tmp_path / "one", **goes_on), 1, program=FINETUNE)
    assert difference(tmp_path / "one", tmp_path / "fsdp", ADAPTERS) < 1e-6


# Launches


@pytest.mark.slow
@pytest.mark.parametrize("name", ["multi_node", "fsdp2"])
def test_two_nodes_on_one_machine(tmp_path, name):
    """Two launches, each of which knows of the other by address and port alone."""
    port = free_port()
    words = tiny(tmp_path / "run", **EMA, noise_coupling="assignment", coupling_scope="global")
    settings = ("--config_file", ROOT / f"configs/accelerate/{name}.yaml", "--num_machines", 2, "--num_processes", 2)
    rendezvous = ("--main_process_ip", "127.0.0.1", "--main_process_port", port, "--machine_rank")
    with ThreadPoolExecutor(2) as pool:
        nodes = [pool.submit(run_command, [*accelerate_launch(*settings, *rendezvous, rank), *words], timeout=300) for rank in (0, 1)]
    results = [node.result() for node in nodes]
    assert [result.code for result in results] == [0, 0], results
    assert "8 images x 2 processes" in results[0].stderr and results[0].stdout.count("Finished.") == 1
    assert ("FSDP2 over 2 processes" in results[0].stderr) == (name == "fsdp2") and metrics(tmp_path / "run")[0]["paired_images"] == 16


@pytest.mark.slow
@pytest.mark.parametrize(("block", "code"), [("Attention", 0), ("Nope", 2)])
def test_blocks_are_those_of_the_settings(script, two_layers, tmp_path, block, code):
    env = {**FSDP2, "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_TRANSFORMER_CLS_TO_WRAP": block}
    first, _ = finish(script.start_ranks(tiny(tmp_path / "run", **two_layers, **EMA), env=env), code)
    assert f"in blocks of ['{block}']" in first.stderr
    assert code == 0 or re.search(r"FSDP2 cannot split this network by fsdp_transformer_layer_cls_to_wrap: .*Nope", first.error)


def test_megatron_is_one_line(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_MEGATRON_LM", "true")
    with pytest.raises(UserError, match=r"MEGATRON_LM.*--multi_gpu or.*fsdp2.yaml"):
        _check_launcher()


def test_versions_before_fsdp2_are_one_line(monkeypatch):
    from accelerate import Accelerator

    for name, value in FSDP2.items():
        monkeypatch.setenv(name, value)
    _check_launcher()
    monkeypatch.delattr(Accelerator, "is_fsdp2")
    with pytest.raises(UserError, match=r"need a newer torch or accelerate than these, such as constraints.txt names"):
        _check_launcher()


@pytest.mark.parametrize("name", FSDP2_ONLY)
def test_what_fsdp_may_not_be_asked_is_one_line(monkeypatch, name):
    for each, value in {**FSDP2, name: "1" if name == "FSDP_VERSION" else "true"}.items():
        monkeypatch.setenv(each, value)
    with pytest.raises(UserError, match=rf"FSDP with {name}=\w+: set fsdp_\w+: (false|2)"):
        _check_launcher()
    monkeypatch.setenv(name, FSDP2_ONLY[name][0])
    _check_launcher()


@pytest.mark.parametrize("changes", [{"optimizer": "muon"}, {"use_8bit_adam": True}, {"channels_last": True}, {"torch_compile": True}])
def test_flags_that_do_not_go_with_parts_are_one_line(changes):
    ((name, value),) = changes.items()
    flag = f"--{name}" if value is True else f"--{name} {value}"
    with pytest.raises(UserError, match=f"^{flag} does not go with FSDP2 or DeepSpeed.*adamw, radam.*--multi_gpu"):
        _check(OptimizationArguments(**changes), SimpleNamespace(mixed_precision="no"))
    with pytest.raises(UserError, match=r"^--mixed_precision fp16 does not go with FSDP2"):
        _check(OptimizationArguments(), SimpleNamespace(mixed_precision="fp16"))


# What may differ when a run goes on

SPLIT = {"processes": 2, "--train_batch_size": 8, "--gradient_accumulation_steps": 1}


@pytest.mark.parametrize(
    ("own", "changes", "wanted"),
    [
        ({}, {"processes": 1, "--train_batch_size": 16}, None),
        ({}, {"processes": 1, "--gradient_accumulation_steps": 2}, None),
        ({}, {"processes": 1}, "steps of 16 images .*, and these are of 8"),
        ({}, {"--seed": 1}, "another run: --seed was 0, is now 1"),
        ({"--streaming": True}, {"processes": 1, "--train_batch_size": 16}, "--streaming True is of each process"),
        ({"--coupling_window": "epoch"}, {"processes": 4, "--train_batch_size": 4}, "--coupling_window epoch is of each process"),
        ({"--streaming": True}, {}, None),
    ],
)
def test_a_steps_images_may_be_split_in_another_way(tmp_path, own, changes, wanted):
    before = {**SPLIT, "--seed": 0, **own}
    (tmp_path / STATE_FILE).write_text(json.dumps({"step": 1, "identity": before, "files": {}}))
    if changes and not wanted:
        with pytest.raises(UserError, match="another run: processes was 2"):  # what DDP saved
            check_identity(tmp_path, {**before, **changes}, {})
    (tmp_path / SHARDS).mkdir()
    if wanted:
        with pytest.raises(UserError, match=wanted):
            check_identity(tmp_path, {**before, **changes}, {})
    else:
        check_identity(tmp_path, {**before, **changes}, {})


def test_what_a_coupling_remembers_is_of_as_many_processes(tmp_path):
    (tmp_path / SHARDS).mkdir()
    (tmp_path / STATE_FILE).write_text(json.dumps({"step": 1, "identity": SPLIT, "coupling": ["coupling-0.safetensors"], "files": {}}))
    check_identity(tmp_path, SPLIT, {})
    with pytest.raises(UserError, match="what its coupling remembers is of each process"):
        check_identity(tmp_path, {**SPLIT, "processes": 1, "--train_batch_size": 16}, {})
