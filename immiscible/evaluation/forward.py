"""How a pretrained network is asked for features: in parts, on its device, in fp32, without a trace."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from immiscible.errors import UserError
from immiscible.files import cache_folder
from immiscible.kept import read_kept, write_kept

TOGETHER_ON_CPU, TOGETHER = 8, 64  # images in a forward pass: more leave a CPU's cache, and take twice as long


class PretrainedFeatures(ABC):
    """A `FeatureNetwork` whose weights somebody else trained. Nothing is drawn; convolutions are deterministic, in fp32.

    Attributes:
        name: what tables call the distance between its features.
        num_features: F.
        weights_sha256: of the weights; with ``resize`` and ``side`` it says which features these are.
        resize: how images come to its side: an entry of `RESIZES`, or what says that they do not.
        side: in pixels, of what it sees.
    """

    name: str
    num_features: int
    weights_sha256: str
    resize: str
    side: int
    _device: torch.device

    @abstractmethod
    def _of(self, images: Tensor) -> dict[str, Tensor]:
        """Of uint8 [B, 3, H, W] on the device: what `outputs` returns, on any device, ``features`` in fp32."""

    def __call__(self, images: Tensor) -> Tensor:
        """float64 [N, F] on the CPU of uint8 [N, C, H, W], C being 1 or 3; gray images have three equal channels.

        Raises:
            UserError: the images have other channels.
        """
        return self.outputs(images)["features"]

    def outputs(self, images: Tensor) -> dict[str, Tensor]:
        """All that one pass gives, float64 on the CPU: ``features`` [N, F] and what else the network names.

        Raises:
            UserError: the images have other channels than 1 or 3.
        """
        if images.shape[1] not in (1, 3):
            raise UserError(f"{self.name} measures images of 1 or 3 channels, not {images.shape[1]}; --eval_features pixels measures any")
        together = TOGETHER_ON_CPU if self._device.type == "cpu" else TOGETHER
        with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            parts = [self._of(part.to(self._device).expand(-1, 3, -1, -1)) for part in images.split(together)]
            return {name: torch.cat([part[name].double().cpu() for part in parts]) for name in parts[0]}

    def kept(self, images: Tensor) -> Tensor:
        """`__call__` of images that other runs measure too: what was found is kept in the cache folder, by the images themselves."""
        facts = (self.weights_sha256, self.resize, self.side, self._device.type, images.shape)
        digest = hashlib.blake2b(repr(facts).encode(), digest_size=16)
        digest.update(images.contiguous().numpy().tobytes())
        path = cache_folder() / "features" / f"{digest.hexdigest()}.safetensors"
        found: dict[str, Tensor] = {}
        if not read_kept(path, lambda tensors: found.update(features=tensors["features"])):
            found["features"] = self(images).float()  # exact: they were computed in fp32
            write_kept(path, found, "the features of reference images")
        return found["features"].double()
