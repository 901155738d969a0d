"""What is trained: all that one run differs from another by, apart from its flags. `immiscible.training.run` does with it what every
run does.

A new system is a class of this shape in `immiscible.tasks`, or in your own file: no script, loop or checkpoint knows which one it is.
Noise and time are drawn by its objective (`immiscible.objectives`), which `immiscible.method.build_objective` makes of the flags.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from immiscible.data.buckets import Buckets
from immiscible.data.sources import ImageSource
from immiscible.data.streaming import Stream
from immiscible.data.transforms import ImageTransform
from immiscible.encoding.encoders import Encoder
from immiscible.objectives import Objective

if TYPE_CHECKING:
    import numpy
    from diffusers import DiffusionPipeline, ModelMixin
    from diffusers.training_utils import EMAModel
    from huggingface_hub import ModelCard


@dataclass(frozen=True)
class TrainingData:
    """The images of a run, and how they are loaded.

    Args:
        source: those to train on; the reference of the distances that are measured.
        held_out: those to measure the loss on, or None.
        transform: what makes pixels of them.
        loaded: what is loaded in the place of ``source``, such as a cache's moments; by default itself.
        augment: what goes with ``loaded``; by default ``transform``.
        with_captions: whether each image's caption is loaded too.
        with_geometry: whether each image's `ImageTransform.geometry` is.
        buckets: to which ``images`` are cropped in training; None for the transform's squares.
        groups: inside which images of an epoch are assigned, int64 [N], -1 of none; by default their classes.
    """

    source: ImageSource | Stream
    held_out: ImageSource | None
    transform: ImageTransform
    loaded: ImageSource | Stream | None = None
    augment: ImageTransform | None = None
    with_captions: bool = False
    with_geometry: bool = False
    buckets: Buckets | None = None
    groups: Tensor | None = None

    @property
    def images(self) -> ImageSource | Stream:
        """What the loader reads; its fingerprint and description are the run's."""
        return self.loaded or self.source


class Task(Protocol):
    """What is trained.

    Attributes:
        data: its images.
        network: what is trained, bare, in train mode, on the accelerator's device or to be moved there by it: a diffusers model.
        part: what the network is in a pipeline: the name of its folder there and in a checkpoint; `immiscible.sampling` knows ``unet`` and
            ``transformer``.
        identity: JSON values that tell this network from others; a checkpoint of another one is not continued.
        objective: the loss; it pairs images with noises and draws timesteps.
        encode: a loaded batch to what is diffused and what the network is told.
        encode_held_out: the same for images that are measured on, not loaded from a cache, with nothing dropped.
        shape: channels, height and width of what is diffused.
        num_classes: how many classes the network is told, None without.
        facts: what is trained and how, in words by name, for the start of the run, the card and the weights' metadata.
        features: the feature network by which samples are measured if the flags name none.
        grid_name: what a tracker calls the sample grids.
    """

    data: TrainingData
    network: ModelMixin
    part: str
    identity: Mapping[str, Any]
    objective: Objective
    encode: Encoder
    encode_held_out: Encoder
    shape: tuple[int, int, int]
    num_classes: int | None
    facts: dict[str, str]
    features: str
    grid_name: str

    def told_apart(self, images: float) -> tuple[int, bool]:
        """How many conditions the network tells apart in a run that sees ``images`` images, and whether they are captions."""

    def prompts(self, count: int) -> Sequence[str]:
        """At most ``count`` prompts, whose samples are measured; none for a network without prompts."""

    def pipeline(self) -> DiffusionPipeline:
        """What samples the network in training."""

    def samples(self, ema: EMAModel | None) -> numpy.ndarray | None:
        """The samples of a grid, uint8 [N, H, W, C], from the same noises at every call; None if none are asked for."""

    def save(self, folder: Path, ema: EMAModel | None) -> None:
        """Leaves in ``folder``, which is new, what plain diffusers samples."""

    def card(self, title: str, facts: Mapping[str, str], grid: Path | None) -> ModelCard:
        """The model card; ``grid`` is the newest grid of samples, relative to it."""


BuildTask = Callable[[int], Task]  # of the run's seed
