"""How good a run is while it trains: Frechet distances of its samples, and its loss per noise level on images held out.

The measured number depends on the feature network, so every network names the number that it gives, and that name goes into every
table. What is drawn here is drawn from fixed seeds that are not the run's: every evaluation of every run samples from the same noises
and takes the loss on the same images, noises and timesteps. Nothing here leaves a trace in training: weights, gradients, modes and
global generators are afterwards what they were.
"""

from __future__ import annotations

import hashlib
import logging
import os
import random
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypedDict

import numpy
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, cross_entropy
from tqdm import tqdm

from immiscible.choices import build_choice
from immiscible.data.sources import ImageDataset, Images, ImageSource, ImageTransform, Subset, check_batch, collate, load_digits
from immiscible.errors import UserError
from immiscible.objectives import weighted_mse
from immiscible.process import NoiseProcess
from immiscible.randomness import Draws, seeded_generator
from immiscible.sampling.pipelines import evaluation_weights, sample_images
from immiscible.training import checkpoints

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from diffusers.training_utils import EMAModel

logger = logging.getLogger(__name__)

EVALUATION_SEED = 0  # of the samples' noises and of the held-out loss: one constant for all runs, whatever their seeds
REFERENCE_IMAGES = 10_000  # at most; more would cost time and hardly move the reference's mean and covariance
BATCH_SIZE = 256  # of small images; see `images_together`


class FeatureNetwork(Protocol):
    """What turns images into the vectors whose means and covariances a Frechet distance compares. Any object of this shape will do."""

    @property
    def name(self) -> str:
        """What tables call the distance between these features. "FID" is that of the published Inception network and no other."""

    @property
    def num_features(self) -> int:
        """F."""

    def __call__(self, images: Tensor) -> Tensor:
        """float64 [N, F] of uint8 [N, C, H, W], both on the CPU; row n depends on image n alone and nothing is drawn."""


class PixelFeatures:
    """The image itself, average-pooled to at most 8x8 per channel and scaled to [-1, 1]: needs no weights and knows no semantics.

    The distance sees the colors, the layout and the contrast of an image and is blind to detail finer than an eighth of its side. It
    ranks runs that are far from the data; for the last bit of quality a trained network is needed.
    """

    name = "FD-pixels-8x8"

    def __init__(self, channels: int = 3, resolution: int = 8) -> None:
        self.num_features = channels * min(8, resolution) ** 2

    def __call__(self, images: Tensor) -> Tensor:
        """float64 [N, F] of uint8 [N, C, H, W].

        Raises:
            UserError: the images have other channels, or are smaller than 8x8 and not of the resolution given.
        """
        pooled = adaptive_avg_pool2d(images.float(), (min(8, images.shape[-2]), min(8, images.shape[-1]))).flatten(1)
        if pooled.shape[1] != self.num_features:
            raise UserError(f"{self.name} was made for {self.num_features} features; these images have {pooled.shape[1]}")
        return pooled.double() / 127.5 - 1


class DigitsFeatures:
    """The 64 penultimate features of a small classifier of scikit-learn's 1,797 digits, for gray images of 8x8.

    It is trained once (seconds on one core) on 80 % of the digits, from a fixed seed on one thread, and kept in a cache folder; the
    features are scaled so that their variances over all digits sum to 100. On one machine it is the same to the last bit however
    often it is trained; another processor or torch may round otherwise, so compare runs that were measured by the same file.

    Args:
        cache_dir: where the trained classifier is kept; None for ``immiscible`` in ``$XDG_CACHE_HOME`` or ``~/.cache``. A file that is
            broken is replaced, and where none can be written the classifier is trained anew each time.

    Attributes:
        accuracy: on the 20 % that it was not trained on, in [0, 1].
    """

    name = "FD-digits"
    num_features = 64

    def __init__(self, cache_dir: Path | None = None) -> None:
        path = (cache_dir or _cache_folder()) / "digits-classifier-1.safetensors"
        with _preserved_randomness():
            self._network = _digits_network()
            if not self._read(path):
                logger.info("training the digits classifier that %s needs, once; it is kept in %s", self.name, path)
                self._use(_train_digits_classifier())
                self._write(path)

    def __call__(self, images: Tensor) -> Tensor:
        """float64 [N, 64] of uint8 [N, 1, 8, 8].

        Raises:
            UserError: the images are not 1x8x8.
        """
        if images.shape[1:] != (1, 8, 8):
            shape = "x".join(map(str, images.shape[1:]))
            raise UserError(f"--eval_features digits measures gray images of 1x8x8, not {shape}; use --eval_features pixels")
        with torch.no_grad():
            return self._network[:-1](_unit_range(images)).double() * self._scale

    def _use(self, tensors: dict[str, Tensor]) -> None:
        self._tensors = tensors
        self._network.load_state_dict({name: value for name, value in tensors.items() if name not in ("scale", "accuracy")})
        self._network.eval().requires_grad_(False)
        self._scale, self.accuracy = float(tensors["scale"]), float(tensors["accuracy"])

    def _read(self, path: Path) -> bool:
        """Whether there is a classifier at ``path``, and it is what was written."""
        if not path.exists():
            return False
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
                if (file.metadata() or {}).get("sha256") != _digest(tensors):
                    raise ValueError("its contents do not match their hash")
            self._use(tensors)
        except (OSError, SafetensorError, ValueError, KeyError, RuntimeError) as error:
            logger.warning("%s is broken (%s) and is made anew", path, str(error).partition("\n")[0])
            return False
        return True

    def _write(self, path: Path) -> None:
        """One key of metadata, for safetensors writes several in any order. Two processes write equal files; the later one stands."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, partial = tempfile.mkstemp(dir=path.parent, prefix=checkpoints.PARTIAL)
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(save(self._tensors, metadata={"sha256": _digest(self._tensors)}))
                checkpoints.replace(Path(partial), path)
            finally:
                with suppress(FileNotFoundError):
                    os.unlink(partial)
        except OSError as error:
            logger.warning("cannot keep the digits classifier in %s (%s): it will be trained again", path.parent, error.strerror)


FEATURES: dict[str, Callable[..., FeatureNetwork]] = {"digits": DigitsFeatures, "pixels": PixelFeatures}


def build_features(name: str, *, channels: int, resolution: int) -> FeatureNetwork:
    """The entry of `FEATURES` for images of these channels and this side in pixels.

    Raises:
        UserError: the name is unknown.
    """
    return build_choice(FEATURES, "--eval_features", name, channels=channels, resolution=resolution)


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "immiscible"


def _digest(tensors: dict[str, Tensor]) -> str:
    return hashlib.sha256(save(tensors)).hexdigest()


def _digits_network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),  #  [N,16,8,8]
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),  # [N,32,8,8]
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, 64),  #       [N,64]
        nn.SiLU(),  # not ReLU, which leaves some features at zero for every image
        nn.Linear(64, 10),
    )


def _train_digits_classifier(epochs: int = 12, batch_size: int = 32) -> dict[str, Tensor]:
    """The network's tensors, with ``scale`` and ``accuracy`` (float64, 0-d)."""
    digits = load_digits()
    images, labels = _unit_range(torch.from_numpy(digits.images)[:, None]), torch.from_numpy(digits.labels)
    generator = seeded_generator("digits classifier")
    shuffled = torch.randperm(len(images), generator=generator)
    test, train = shuffled[: len(images) // 5], shuffled[len(images) // 5 :]
    with _one_thread(), torch.enable_grad():
        torch.default_generator.manual_seed(0)  # the CPU's alone; torch.manual_seed would reach the GPUs' generators
        network = _digits_network()
        optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
        steps = epochs * (len(train) // batch_size)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in tqdm(range(epochs), desc="digits classifier", unit="epoch", delay=2, leave=False, disable=None):
            order = train[torch.randperm(len(train), generator=generator)]
            for batch in order.split(batch_size)[: steps // epochs]:
                loss = cross_entropy(network(images[batch]), labels[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
        with torch.no_grad():
            features = network[:-1](images)
            accuracy = (network[-1](features[test]).argmax(1) == labels[test]).double().mean()
            scale = (100 / features.double().var(0).sum()).sqrt()
    return {**network.state_dict(), "scale": scale, "accuracy": accuracy}


def _unit_range(images: Tensor) -> Tensor:
    """fp32 in [-1, 1] of uint8."""
    return images.float() / 127.5 - 1


class FrechetDistance:
    """The squared Frechet distance between the Gaussians that fit the features of reference images and of other images.

    ``|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))`` (Heusel et al. 2017, eq. 6), by torchmetrics, in float64. It falls with the number
    of images on either side: compare only distances of equal numbers. The reference's features are computed here and only here.

    Args:
        features: the feature network.
        reference: batches of reference images, uint8 [B, C, H, W].

    Attributes:
        reference_images: how many there were.

    Raises:
        UserError: torchmetrics cannot be imported, or there are fewer than 2 images.
    """

    def __init__(self, features: FeatureNetwork, reference: Iterable[Tensor]) -> None:
        self.features = features
        # Not summed over processes: one of them may measure while the others wait elsewhere.
        self._metric = _torchmetrics_fid()(_Extractor(features), reset_real_features=False, sync_on_compute=False)
        self.reference_images = self._update(reference, real=True)
        if self.reference_images < 2:
            raise UserError(f"{features.name} needs at least 2 reference images, not {self.reference_images}")

    def __call__(self, images: Iterable[Tensor]) -> float:
        """The distance of these images, given as batches uint8 [B, C, H, W], from the reference; exactly 0 where rounding goes below.

        Raises:
            UserError: there are fewer than 2 images.
        """
        self._metric.reset()
        count = self._update(images, real=False)
        if count < 2:
            raise UserError(f"{self.features.name} needs at least 2 images, not {count}")
        return max(0.0, float(self._metric.compute()))

    def _update(self, batches: Iterable[Tensor], *, real: bool) -> int:
        count = 0
        for batch in batches:
            self._metric.update(batch, real=real)
            count += len(batch)
        return count


class _Extractor(nn.Module):
    """A feature network in the shape that torchmetrics wants; torchmetrics calls ``train()`` on it, which a network must not follow."""

    def __init__(self, features: FeatureNetwork) -> None:
        super().__init__()
        self.features = features
        self.num_features = features.num_features

    def forward(self, images: Tensor) -> Tensor:
        return self.features(images)

    def train(self, mode: bool = True) -> _Extractor:
        return self


def _torchmetrics_fid() -> Callable[..., Any]:
    try:
        return import_module("torchmetrics.image.fid").FrechetInceptionDistance  # its own module needs no torch-fidelity
    except Exception as error:  # torch-fidelity without torchvision, or with one for another torch, fails in several types
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"the Frechet distance needs torchmetrics, which cannot be imported ({reason}): "
            "`pip install torchmetrics`; where torch-fidelity is installed it needs a torchvision that fits torch",
            exit_code=1,
        ) from error


class EvaluationResult(TypedDict):
    """One evaluation, ready for JSON.

    ``feature`` is the distance's name, ``samples`` and ``reference_images`` the numbers of images that it compares, and
    ``frechet_distance`` its value for each number of inference steps, as text: ``{"5": 12.3, "20": 4.5}``.
    """

    feature: str
    samples: int
    reference_images: int
    frechet_distance: dict[str, float]


class Evaluation:
    """Frechet distances of a pipeline's samples at several numbers of inference steps, always from the same noises.

    It samples in the calling process alone; in a run of several ranks rank 0 evaluates and the others wait. A class-conditional
    network is sampled with every class equally often, also where the reference's classes are not.

    Args:
        features: from `build_features`, or any `FeatureNetwork`.
        reference: batches of reference images, uint8 [B, C, H, W], usually `fixed_images` through `to_uint8`; read once, here.
        samples: images to sample per number of inference steps; at least 2, and more than the features are many.
        inference_steps: the numbers of inference steps, each at least 1.
        batch_size: images sampled together.
        prompts: sample i is of prompt i modulo their number, for a text-to-image pipeline; without guidance.

    Raises:
        UserError: a number is out of range, or what `FrechetDistance` raises.
    """

    def __init__(
        self,
        features: FeatureNetwork,
        reference: Iterable[Tensor],
        *,
        samples: int,
        inference_steps: Iterable[int],
        batch_size: int = BATCH_SIZE,
        prompts: Sequence[str] = (),
    ) -> None:
        self.prompts = prompts
        self.samples, self.inference_steps, self.batch_size = samples, sorted(set(inference_steps)), batch_size
        if samples < 2:
            raise UserError(f"--eval_samples {samples} is too small: a covariance needs 2, a meaningful one {features.num_features + 1}")
        if not self.inference_steps or self.inference_steps[0] < 1:
            raise UserError("--eval_inference_steps needs numbers of at least 1")
        with _preserved_randomness():
            self.distance = FrechetDistance(features, reference)
        for count, what in ((samples, "--eval_samples"), (self.distance.reference_images, "the number of reference images")):
            if count <= features.num_features:
                logger.warning(
                    "%s is %d: too few for the %d features of %s, whose covariance needs at least %d (and says more with ten times that)",
                    what,
                    count,
                    features.num_features,
                    features.name,
                    features.num_features + 1,
                )

    def __call__(self, pipeline: DiffusionPipeline, ema: EMAModel | None = None) -> EvaluationResult:
        """Samples and measures; image i starts from the same noise at every call, for every run and number of inference steps.

        Args:
            pipeline: from `build_pipeline`; its ``unet`` may be the network in training.
            ema: the averaged weights to sample with, swapped in for the time of the call.

        Raises:
            UserError: (exit code 1) the samples hold NaN values.
        """
        total = self.samples * len(self.inference_steps)
        with (
            _preserved_randomness(pipeline.unet.device),
            evaluation_weights(pipeline.unet, ema),
            tqdm(total=total, desc="evaluating", unit="sample", delay=2, leave=False, disable=None) as bar,
        ):
            distances = {str(steps): self.distance(self._sample(pipeline, steps, bar)) for steps in self.inference_steps}
        return {
            "feature": self.distance.features.name,
            "samples": self.samples,
            "reference_images": self.distance.reference_images,
            "frechet_distance": distances,
        }

    def _sample(self, pipeline: DiffusionPipeline, steps: int, bar: tqdm) -> Iterator[Tensor]:
        for first in range(0, self.samples, self.batch_size):
            count = min(self.batch_size, self.samples - first)
            images = sample_images(
                pipeline,
                count,
                steps=steps,
                seed=EVALUATION_SEED,
                batch_size=count,
                device=pipeline.unet.device,
                first=first,
                prompts=self.prompts,
                guidance_scale=1.0,
            )
            yield torch.from_numpy(images).permute(0, 3, 1, 2)
            bar.update(count)


def validation_loss(
    model: nn.Module,
    images: Tensor,
    process: NoiseProcess,
    prediction_type: str,
    *,
    condition: Mapping[str, Tensor] | None = None,
    ema: EMAModel | None = None,
    levels: int = 10,
    batch_size: int = BATCH_SIZE,
) -> dict[str, float]:
    """The mean squared error per noise level on images that were not trained on, unweighted, in the model's own prediction type.

    The T timesteps are cut into equal ranges and each is measured at its middle, with independent noises that depend on the range and
    the image's row alone: whatever the coupling, weighting and timestep law of training, this number is comparable between runs of one
    process and prediction type. Drawn on the CPU, so the device does not matter either.

    Args:
        model: called as ``model(xt, time, **condition)``, returns an object with ``sample``; measured in evaluation mode.
        images: pixels or latents, fp32 [N, C, H, W], N at least 1.
        process: the noise process of training, on the model's device.
        prediction_type: what the model predicts.
        condition: keyword arguments of the model, each [N, ...].
        ema: the averaged weights to measure with, swapped in for the time of the call.
        levels: the number of ranges; at most T of them are made.
        batch_size: images measured together.

    Returns:
        The loss per element of each range of timesteps, e.g. ``{"0-99": 0.4, ...}``, ordered from little noise to much.
    """
    device = process.signal.device
    levels = min(levels, process.num_timesteps)
    edges = [level * process.num_timesteps // levels for level in range(levels + 1)]
    losses = {}
    with _preserved_randomness(device), evaluation_weights(model, ema), torch.no_grad():
        for level, (start, stop) in enumerate(pairwise(edges)):
            total = 0.0
            for first in range(0, len(images), batch_size):
                x0 = images[first : first + batch_size].to(device)
                noise = Draws(EVALUATION_SEED, level, first, torch.device("cpu")).normal("validation", *x0.shape).to(device)
                t = torch.full((len(x0),), (start + stop) // 2, device=device)
                told = {name: value[first : first + batch_size].to(device) for name, value in (condition or {}).items()}
                output = model(process.add_noise(x0, noise, t), process.model_time[t], **told).sample
                target = process.target(x0, noise, t, prediction_type)
                total += float(weighted_mse(output, target, torch.ones(len(x0), device=device)).sum())
            losses[f"{start}-{stop - 1}"] = total / len(images)
    return losses


def split_source(source: ImageSource, fraction: float) -> tuple[Subset, Subset]:
    """``source`` as images to train on and images to hold out, the same ones whatever the run's seed.

    Args:
        source: all images.
        fraction: the share to hold out, rounded to whole images.

    Raises:
        UserError: one of the two would be empty.
    """
    count = round(len(source) * fraction) if 0 < fraction < 1 else 0
    if not 0 < count < len(source):
        raise UserError(f"--validation_split {fraction:g} of {len(source)} images leaves none on one side; give a share between 0 and 1")
    shuffled = torch.randperm(len(source), generator=seeded_generator("validation_split"))
    return Subset(source, shuffled[count:].sort().values.tolist()), Subset(source, shuffled[:count].sort().values.tolist())


def fixed_images(
    source: ImageSource,
    transform: ImageTransform,
    *,
    limit: int = REFERENCE_IMAGES,
    skip_bad_images: bool = False,
    with_labels: bool = False,
    with_captions: bool = False,
) -> Iterator[Images]:
    """Images as training sees them but cut from the middle and never flipped: the same ones for every run of this data.

    Args:
        source: the images.
        transform: training's; its crop and flip are overridden.
        limit: at most this many, a fixed random choice.
        skip_bad_images: leave unreadable images out.
        with_labels: give their classes too.
        with_captions: give a caption of each too.

    Yields:
        `Images`, in the order of ``source``.

    Raises:
        UserError: an image cannot be read and ``skip_bad_images`` is off.
    """
    fixed = replace(transform, center_crop=True, random_flip=False)
    dataset = ImageDataset(source, fixed, with_labels=with_labels, with_captions=with_captions)
    chosen = torch.randperm(len(source), generator=seeded_generator("fixed_images"))[:limit].sort().values
    with tqdm(total=len(chosen), desc="reading images", unit="image", delay=2, leave=False, disable=None) as bar:
        for indices in chosen.split(images_together(transform.resolution)):
            items = [dataset[0, index] for index in indices.tolist()]
            batch = collate(items)
            if not skip_bad_images:
                check_batch(batch, skip_bad_images)
            if len(batch["pixel_values"]):
                yield Images(batch["pixel_values"], batch["labels"], batch["captions"])
            bar.update(len(items))


def images_together(resolution: int) -> int:
    """How many images of this size are sampled, encoded or measured at once: `BATCH_SIZE` up to 64 pixels a side, as many pixels above."""
    return max(1, min(BATCH_SIZE, BATCH_SIZE * 64**2 // resolution**2))


def to_uint8(images: Tensor) -> Tensor:
    """uint8 of floats in [-1, 1], rounded to the nearest of 0..255: what comes out for an 8-bit image is what went in."""
    return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


@contextmanager
def _preserved_randomness(device: torch.device | None = None) -> Iterator[None]:
    """After the block the global generators of Python, NumPy, the CPU and, if it is a GPU, ``device`` are what they were before."""
    python, array = random.getstate(), numpy.random.get_state()
    gpus = [device] if device is not None and device.type == "cuda" else []
    try:
        with torch.random.fork_rng(gpus):
            yield
    finally:
        random.setstate(python)
        numpy.random.set_state(array)


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
