"""The Frechet distance of two sets of features."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from torch import Tensor, nn

from immiscible.errors import UserError, first_line


class FrechetDistance:
    """The squared Frechet distance between the Gaussians that fit reference features and other features.

    ``|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))`` (Heusel et al. 2017, eq. 6), by torchmetrics, in float64. It falls with the number
    of images on either side: compare only distances of equal numbers.

    Args:
        name: of the distance, for errors.
        reference: features of reference images, float64 [N, F].

    Raises:
        UserError: torchmetrics cannot be imported, or there are fewer than 2 images.
    """

    def __init__(self, name: str, reference: Tensor) -> None:
        self.name = name
        # Not summed over processes: one of them may measure while the others wait elsewhere.
        self._metric = _torchmetrics_fid()(_Given(reference.shape[1]), reset_real_features=False, sync_on_compute=False)
        if len(reference) < 2:
            raise UserError(f"{name} needs at least 2 reference images, not {len(reference)}")
        self._metric.update(reference, real=True)

    def __call__(self, features: Tensor) -> float:
        """The distance of these features, float64 [M, F], from the reference; exactly 0 where rounding goes below.

        Raises:
            UserError: there are fewer than 2 images.
        """
        if len(features) < 2:
            raise UserError(f"{self.name} needs at least 2 images, not {len(features)}")
        self._metric.reset()
        self._metric.update(features, real=False)
        return max(0.0, float(self._metric.compute()))


class _Given(nn.Module):
    """What torchmetrics takes for a feature network, where features are what it is given."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def _torchmetrics_fid() -> Callable[..., Any]:
    try:
        return import_module("torchmetrics.image.fid").FrechetInceptionDistance  # its own module needs no torch-fidelity
    except Exception as error:  # torch-fidelity without torchvision, or with one for another torch, fails in several types
        raise UserError(
            f"the Frechet distance needs torchmetrics, which cannot be imported ({first_line(error)}): "
            "`pip install torchmetrics`; where torch-fidelity is installed it needs a torchvision that fits torch",
            exit_code=1,
        ) from error
