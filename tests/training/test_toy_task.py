"""A task of another network and another encoder, written here and nowhere else: trained, killed, resumed and sampled by what all tasks use.

This file is the script too: ``python tests/training/test_toy_task.py --flags`` trains it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy
import pytest
import torch
from diffusers import DDPMPipeline, ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from kills import final_hashes, finish, kill, start
from launch import tiny
from PIL import Image
from torch import Tensor, nn

from immiscible.configs import UnconditionalConfig
from immiscible.data.batches import Images
from immiscible.data.loading import training_source
from immiscible.data.transforms import image_transform
from immiscible.encoding.encoders import Encoded
from immiscible.errors import run_script
from immiscible.flags import parse_config
from immiscible.method import build_objective
from immiscible.networks.weights import evaluation_weights
from immiscible.objective_choice import training_scheduler
from immiscible.randomness import Draws, reseed_globally
from immiscible.sampling.pipelines import sample_images
from immiscible.training.cards import unconditional_card
from immiscible.training.run import run
from immiscible.training.session import session
from immiscible.training.summary import method_facts
from immiscible.training.task import TrainingData

PROGRAM = "tests/training/test_toy_task.py"


class Pointwise(ModelMixin, ConfigMixin):
    """Each pixel by itself, with the time as one channel more."""

    @register_to_config
    def __init__(self, sample_size: int = 4, in_channels: int = 1, width: int = 16, num_class_embeds: int | None = None) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(in_channels + 1, width, 1), nn.SiLU(), nn.Dropout(0.1), nn.Conv2d(width, in_channels, 1))

    def forward(self, sample: Tensor, timestep: Any, **told: Tensor) -> SimpleNamespace:
        time = torch.as_tensor(timestep, dtype=sample.dtype, device=sample.device).expand(len(sample)).view(-1, 1, 1, 1) / 1000
        return SimpleNamespace(sample=self.layers(torch.cat([sample, time.expand(-1, 1, *sample.shape[2:])], 1)))


class Halved:
    """Images at half their side are what is diffused."""

    def __call__(self, batch: Images, draws: Draws) -> Encoded:
        return Encoded(nn.functional.avg_pool2d(batch.x0, 2), None, {})


@dataclass
class ToyTask:
    config: UnconditionalConfig
    scheduler: Any
    objective: Any
    data: TrainingData
    network: Pointwise
    encode: Halved
    encode_held_out: Halved
    facts: dict[str, str]
    identity: Mapping[str, Any]
    part: ClassVar[str] = "unet"
    features: ClassVar[str] = "pixels"
    grid_name: ClassVar[str] = "toys"
    num_classes: ClassVar[None] = None
    shape: ClassVar[tuple[int, int, int]] = (1, 4, 4)

    def told_apart(self, images: float) -> tuple[int, bool]:
        return 0, False

    def prompts(self, count: int) -> Sequence[str]:
        return ()

    def pipeline(self) -> DDPMPipeline:
        return DDPMPipeline(self.network, self.scheduler)

    def samples(self, ema: Any) -> numpy.ndarray:
        with evaluation_weights(self.network, ema):
            return sample_images(self.pipeline(), 4, steps=3, seed=0, batch_size=4, device=self.network.device)

    def save(self, folder: Path, ema: Any) -> None:
        with evaluation_weights(self.network, ema):
            self.pipeline().save_pretrained(folder)

    def card(self, title: str, facts: Mapping[str, str], grid: Path | None) -> Any:
        return unconditional_card(title=title, pipeline="DDPMPipeline", facts=facts)


def toy_task(config: UnconditionalConfig, accelerator: Any, seed: int) -> ToyTask:
    scheduler = training_scheduler(config)
    objective = build_objective(config, scheduler, accelerator)
    data = TrainingData(training_source(config, config.labels_for), None, image_transform(config, 1, seed))
    reseed_globally(seed, "network")
    facts = method_facts(config, objective, schedule=config.ddpm_beta_schedule, inference_steps=3)
    return ToyTask(config, scheduler, objective, data, Pointwise(), Halved(), Halved(), facts, {"kind": "pointwise"})


def main(argv: Sequence[str]) -> None:
    config = parse_config(UnconditionalConfig, argv, program=Path(__file__).name, description="")
    with session(config) as accelerator:
        run(config, accelerator, partial(toy_task, config, accelerator))


def toy_flags(folder: Path, **changes: Any) -> list[str]:
    return tiny(folder, **{"max_train_steps": 60, "checkpointing_steps": 10, "use_ema": True, "noise_coupling": "assignment", **changes})


@pytest.mark.slow
def test_it_is_trained_and_sampled_by_the_script_that_samples_all(script, tmp_path):
    folder, samples = tmp_path / "run", tmp_path / "samples"
    result = script(toy_flags(folder, max_train_steps=300, learning_rate=0.01), program=PROGRAM)
    assert result.code == 0, result.stderr
    losses = [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert numpy.mean(losses[-50:]) < 0.9 * numpy.mean(losses[:10])
    assert "1x4x4" in result.stderr and "Pointwise" in result.stderr
    pipeline = DDPMPipeline.from_pretrained(folder)
    assert type(pipeline.unet).__name__ == "Pointwise"
    words = ["--model", folder, "--num_images", 5, "--num_inference_steps", 3, "--output_dir", samples]
    assert script(words, program="scripts/sample.py").code == 0
    assert sorted(path.name for path in samples.glob("*.png")) == [f"{number:06}.png" for number in range(5)]
    with Image.open(samples / "000000.png") as image:
        assert image.size == (4, 4)
    assert (folder / "samples" / "step-0000300.png").exists() and "assignment" in (folder / "README.md").read_text()


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_killed_and_resumed_it_is_what_it_would_have_been(script, tmp_path, processes):
    program = partial(start_toy, script, processes=processes)
    finish(program(toy_flags(tmp_path / "whole")))
    runs = program(toy_flags(tmp_path / "killed"))
    runs[0].wait_until((tmp_path / "killed" / "checkpoint-20").exists)
    kill(runs)
    finish(program(toy_flags(tmp_path / "killed", resume_from_checkpoint="latest")))
    assert final_hashes(tmp_path / "killed", 60) == final_hashes(tmp_path / "whole", 60)


def start_toy(script: Any, argv: list[str], processes: int) -> list[Any]:
    return start(script, argv, processes, program=PROGRAM)


if __name__ == "__main__":
    sys.exit(run_script(main))
