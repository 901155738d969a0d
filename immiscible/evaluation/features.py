"""Feature networks: what turns images into the vectors that a distance compares."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, cross_entropy
from tqdm import tqdm

from immiscible.choices import option_names, used_options
from immiscible.data.bundled import load_digits
from immiscible.errors import UserError
from immiscible.evaluation.efficientnet import EfficientNetFeatures
from immiscible.evaluation.inception import InceptionFeatures
from immiscible.evaluation.pretrained import local_features, published_features
from immiscible.files import cache_folder
from immiscible.kept import read_kept, write_kept
from immiscible.randomness import preserved_randomness, seeded_generator

logger = logging.getLogger(__name__)


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
        path = (cache_dir or cache_folder()) / "digits-classifier-1.safetensors"
        with preserved_randomness():
            self._network = _digits_network()
            if not read_kept(path, self._use):
                logger.info("training the digits classifier that %s needs, once; it is kept in %s", self.name, path)
                self._use(_train_digits_classifier())
                write_kept(path, self._tensors, "the digits classifier")

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


class PrincipalDirections:
    """Another network's features along the directions in which those of reference images vary most: fewer images fill their covariance.

    Args:
        features: the other network.
        reference: its features of the reference images, float64 [N, F].
        directions: how many, at most F.

    Raises:
        UserError: there are not so many.
    """

    def __init__(self, features: FeatureNetwork, reference: Tensor, directions: int) -> None:
        most = min(features.num_features, len(reference) - 1)
        if directions > most:
            raise UserError(
                f"--eval_feature_directions {directions}: {features.name} has {features.num_features} features, and {len(reference)} "
                f"reference images vary in {len(reference) - 1} directions; give at most {most}"
            )
        self.name, self.num_features = f"{features.name}-PCA{directions}", directions
        self._features = features
        self._directions = torch.linalg.eigh(reference.T.cov()).eigenvectors[:, -directions:]  # [F, directions]

    def __call__(self, images: Tensor) -> Tensor:
        """float64 [N, directions] of uint8 [N, C, H, W]."""
        return self.along(self._features(images))

    def along(self, features: Tensor) -> Tensor:
        """float64 [N, directions] of the other network's features [N, F]."""
        return features @ self._directions


# By what --eval_features calls them; each takes by name what it needs of `build_features`.
FEATURES: dict[str, Callable[..., FeatureNetwork]] = {
    "digits": lambda: DigitsFeatures(),
    "pixels": lambda channels, resolution: PixelFeatures(channels, resolution),
    "efficientnet": lambda device: EfficientNetFeatures(device),
    "inception": lambda device, weights, resize: InceptionFeatures(weights, device, resize or "tf-bilinear"),
    "clip": lambda device, weights, resize: published_features("clip", weights, device, resize),
    "clip-l14-336": lambda device, weights, resize: published_features("clip-l14-336", weights, device, resize),
    "dinov2": lambda device, weights, resize: published_features("dinov2", weights, device, resize),
}


def build_features(
    name: str, *, channels: int, resolution: int, device: torch.device, weights: Path | None = None, resize: str | None = None
) -> FeatureNetwork:
    """The entry of `FEATURES`, or the network of a file or folder, for images of these channels and this side in pixels.

    Args:
        name: the entry; or the path of what `local_features` takes.
        channels: of the images.
        resolution: their side.
        device: where the network may compute.
        weights: the network's file or folder, where it is not looked for in the cache folders.
        resize: an entry of `RESIZES`, for a network that is used with several; None for its own.

    Raises:
        UserError: the name is unknown, its network takes no weights or has one way of resizing, or what the network raises.
    """
    if name not in FEATURES:
        if weights is None and Path(name).exists():
            return local_features(Path(name), resolution, device, resize)
        raise UserError(f"the features {name!r} are unknown; known: {', '.join(FEATURES)}, and paths of networks")
    known = option_names(FEATURES[name])
    if weights is not None and "weights" not in known:
        raise UserError(f"--feature_weights {weights}: the features {name} take no weights; leave it out")
    if resize is not None and "resize" not in known:
        raise UserError(f"the features {name} resize images in their own way, not by {resize}")
    options = {"channels": channels, "resolution": resolution, "device": device, "weights": weights, "resize": resize}
    return FEATURES[name](**used_options(FEATURES[name], options))


def features_of(features: FeatureNetwork, batches: Iterable[Tensor], *, keep: bool = False) -> Tensor:
    """float64 [N, F] of batches of images, uint8 [B, C, H, W]; [0, F] of none.

    With ``keep`` a network that has a method ``kept``, as slow ones have, is asked by that: for images that other runs measure too.
    """
    ask = getattr(features, "kept", features) if keep else features
    return torch.cat([torch.zeros(0, features.num_features, dtype=torch.float64), *map(ask, batches)])


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


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
