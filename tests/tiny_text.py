"""A Stable Diffusion checkpoint and captioned images of a second, and the two scripts run on them up to their training loop."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from launch import ROOT, flags
from PIL import Image

sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]
SCRATCH, FINETUNE = "train_text_to_image.py", "finetune_sd.py"
WEIGHTS, ADAPTERS = "diffusion_pytorch_model.safetensors", "pytorch_lora_weights.safetensors"
_FOLDER = tempfile.TemporaryDirectory(prefix="tiny-text-")


@cache
def model_folder(version: int | str = 1) -> Path:
    """A checkpoint with every part of Stable Diffusion 1, of 2, which predicts v, or of "xl", "3", "3.5" or "3.5-without-t5"."""
    from make_tiny_sd import make_model

    folder = Path(_FOLDER.name) / f"model-{version}"
    name, _, without = str(version).partition("-")
    make_model(folder, int(name) if name in ("1", "2") else name, **({"with_t5": False} if without else {}))
    return folder


@cache
def data_folder(images: int = 16) -> Path:
    """Images of 40x48 noise with two captions each."""
    folder = Path(_FOLDER.name) / f"data-{images}"
    folder.mkdir()
    draw = numpy.random.default_rng(0)
    lines = []
    for number in range(images):
        Image.fromarray(draw.integers(0, 256, (48, 40, 3), dtype=numpy.uint8)).save(folder / f"{number:03}.png")
        lines.append(json.dumps({"file_name": f"{number:03}.png", "text": [f"thing {number}", f"a {number}"]}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def class_folder(folder: Path, names: Sequence[str], column: str = "kind", each: int = 4) -> Path:
    """Images in a parquet file with a column of classes; those of a class are of one grey."""
    import datasets

    greys = [int(255 * (number % len(names)) / len(names)) for number in range(each * len(names))]
    table = {
        "image": [Image.new("RGB", (32, 32), (grey, grey, grey)) for grey in greys],
        column: [number % len(names) for number in range(each * len(names))],
    }
    features = datasets.Features({"image": datasets.Image(), column: datasets.ClassLabel(names=list(names))})
    folder.mkdir()
    datasets.Dataset.from_dict(table, features=features).to_parquet(folder / "train-0.parquet")
    return folder


def tiny_text(output_dir: Path | str, **changes: Any) -> list[str]:
    """The flags of a run of a second; ``name=None`` takes a flag out."""
    values = {
        "pretrained_model_name_or_path": None if "pretrained_model_name_or_path" in changes else model_folder(),
        "train_data_dir": None if {"train_data_dir", "dataset_name"} & changes.keys() else data_folder(),
        "resolution": 32,
        "train_batch_size": 4,
        "max_train_steps": 4,
        "learning_rate": 1e-3,
        "lr_warmup_steps": 0,
        "report_to": "none",
        "logging_steps": 1,
        "validation_inference_steps": 2,
        "seed": 0,
        "output_dir": output_dir,
        **changes,
    }
    return flags(values)


@dataclass
class Reached:
    """What a script gave to its training loop, and what the loop's first steps did.

    Args:
        options: the loop's arguments, by name.
        losses: one per step.
        pairs: one per micro-batch.
        before: the network's weights by name, before the first step.
        after: the same after the last.
        grad_norms: of the gradients that the optimizer was given, one per step.
    """

    options: dict[str, Any]
    losses: list[float] = field(default_factory=list)
    pairs: list[Any] = field(default_factory=list)
    before: dict[str, torch.Tensor] = field(default_factory=dict)
    after: dict[str, torch.Tensor] = field(default_factory=dict)
    grad_norms: list[float] = field(default_factory=list)

    def __getattr__(self, name: str) -> Any:
        return self.options[name]

    def take(self, steps: int, arguments: Sequence[Any], options: dict[str, Any]) -> None:
        """Takes ``steps`` of the loop that the script was about to begin."""
        from immiscible.training.loop import train

        network, watch = self.accelerator.unwrap_model(self.model), self.watch

        def note(pairs: Any) -> None:
            self.pairs.append(pairs)
            if watch:
                watch(pairs)

        def note_gradients(optimizer: Any, *_: Any) -> None:
            gradients = [weight.grad for group in optimizer.param_groups for weight in group["params"] if weight.grad is not None]
            self.grad_norms.append(float(torch.nn.utils.get_total_norm(gradients)))

        self.optimizer.optimizer.register_step_pre_hook(note_gradients)
        self.before = {name: value.clone() for name, value in network.state_dict().items()}
        loop = train(*arguments, **{**options, "watch": note})
        self.losses = [next(loop).metrics["loss"] for _ in range(steps)]
        loop.close()
        self.after = {name: value.clone() for name, value in network.state_dict().items()}


class _Stop(Exception):
    pass


def reach(
    monkeypatch: pytest.MonkeyPatch,
    argv: Sequence[str],
    *,
    from_scratch: bool = False,
    steps: int = 0,
    inspect: Callable[[Reached], None] | None = None,
) -> Reached:
    """Runs ``train_text_to_image.py`` in this process up to its training loop and takes ``steps`` of it; nothing is written.

    Args:
        monkeypatch: pytest's.
        argv: the command line.
        from_scratch: as ``train_text_to_image.py`` does; otherwise as ``finetune_sd.py``.
        steps: optimizer steps to take.
        inspect: called before the first step.
    """
    from accelerate.state import AcceleratorState, GradientState

    import immiscible.training.run as life
    from immiscible.configs import TextToImageConfig
    from immiscible.flags import parse_config
    from immiscible.tasks.text_to_image import text_to_image_task
    from immiscible.training.session import session

    def reset() -> None:
        AcceleratorState._reset_state(True)
        GradientState._reset_state()

    names = ("accelerator", "model", "optimizer", "objective", "batches", "encode")
    found: list[Reached] = []
    tasks: list[Any] = []

    def build(seed: int) -> Any:
        tasks.append(text_to_image_task(config, accelerator, seed, from_scratch=from_scratch))
        return tasks[-1]

    def stand_in(*arguments: Any, **options: Any) -> None:
        reached = Reached({**dict(zip(names, arguments, strict=True)), **options, "task": tasks[-1]})
        found.append(reached)
        if inspect:
            inspect(reached)
        reached.take(steps, arguments, options)
        raise _Stop

    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(life, "train", stand_in)
    config = parse_config(TextToImageConfig, [str(word) for word in argv], program="a script", description="")
    reset()  # another test of this process may have left a precision behind
    try:
        with pytest.raises(_Stop), session(config) as accelerator:
            life.run(config, accelerator, build)
    finally:
        reset()
    return found[0]
