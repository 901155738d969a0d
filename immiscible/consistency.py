"""Consistency training (Song et al. 2023; improved: Song and Dhariwal 2024): a network that says from any noise level where its path ends.

Two noise levels that are neighbors in the current discretization share an image and its noise, the one that the coupling gave it. What the
network says at the noisier one is drawn towards what the teacher, without gradient, says at the other; at the least level both say the
image itself. How fine the discretization is, and how slowly an averaged teacher follows, are functions of the optimizer step alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from immiscible.edm import Karras, Scalings, SigmaProcess
from immiscible.errors import UserError
from immiscible.objectives import DenoisingObjective, Pairs
from immiscible.randomness import Draws, preserved_randomness

LPIPS_SIDE = 224  # pixels to which smaller images are enlarged, as the published code does


@dataclass(frozen=True)
class ConsistencyScalings:
    """Those by which the network's image at sigma_min is its input (Song et al. 2023, appendix C), as diffusers' sampler has them.

    ``skip = sigma_data^2 / ((sigma - sigma_min)^2 + sigma_data^2)``,
    ``out = (sigma - sigma_min) sigma_data / sqrt(sigma^2 + sigma_data^2)``; the network is told ``250 ln sigma``.
    """

    sigma_data: float = 0.5
    sigma_min: float = 0.002

    def __call__(self, sigma: Tensor) -> Scalings:
        """Of floating-point sigmas, at least sigma_min, of any shape."""
        above, total = sigma - self.sigma_min, (sigma**2 + self.sigma_data**2).sqrt()
        skip = self.sigma_data**2 / (above**2 + self.sigma_data**2)
        return Scalings(skip, above * self.sigma_data / total, 1 / total, 250 * sigma.log())


@dataclass(frozen=True)
class Discretization:
    """How many noise levels there are at an optimizer step.

    Args:
        curriculum: a key of `CURRICULA`.
        first: s0, of which there is one more at the beginning (but see `square_root`).
        last: s1, of which there is one more at the end.
        steps: K, the optimizer steps of the whole course; it stays at its end after them.
    """

    curriculum: str
    first: int
    last: int
    steps: int

    def __call__(self, step: int) -> int:
        """N(k), at step k, counted from 0."""
        return CURRICULA[self.curriculum](min(step, self.steps), self.first, self.last, self.steps)


def doubling(step: int, first: int, last: int, steps: int) -> int:
    """``min(s0 2^floor(k / K'), s1) + 1`` with ``K' = floor(K / (log2(floor(s1 / s0)) + 1))`` (Song and Dhariwal 2024)."""
    period = max(1, math.floor(steps / (math.log2(last // first) + 1)))
    return int(min(first * 2 ** min(step // period, 64), last)) + 1


def square_root(step: int, first: int, last: int, steps: int) -> int:
    """``ceil(sqrt(k / K ((s1 + 1)^2 - s0^2) + s0^2) - 1) + 1`` (Song et al. 2023, appendix C), which begins with s0 levels."""
    return math.ceil(math.sqrt(step / steps * ((last + 1) ** 2 - first**2) + first**2) - 1) + 1


def constant(step: int, first: int, last: int, steps: int) -> int:
    """``s0 + 1`` throughout."""
    return first + 1


CURRICULA: dict[str, Callable[[int, int, int, int], int]] = {"doubling": doubling, "square_root": square_root, "constant": constant}


def pseudo_huber(output: Tensor, target: Tensor, huber_c: float | None = None) -> Tensor:
    """``sqrt(|d|^2 + c^2) - c`` of an image's whole difference d, fp32 [B]; c is ``0.00054 sqrt(C H W)`` if not given."""
    difference = (output - target).flatten(1)
    c = 0.00054 * math.sqrt(difference.shape[1]) if huber_c is None else huber_c
    return (difference.square().sum(1) + c**2).sqrt() - c


def l2(output: Tensor, target: Tensor) -> Tensor:
    """The mean squared difference of each image, fp32 [B]."""
    return (output - target).square().flatten(1).mean(1)


class LPIPS:
    """The perceptual distance of Zhang et al. 2018, by the package ``lpips``, of images in [-1, 1] with three channels.

    Args:
        device: where the images are.

    Raises:
        UserError: the package is not there.
    """

    def __init__(self, device: torch.device) -> None:
        try:
            from lpips import LPIPS as Network
        except ImportError:
            raise UserError(
                "--consistency_distance lpips needs the packages lpips and torchvision, and VGG's weights: install them (pip install lpips "
                "torchvision), or give pseudo_huber"
            ) from None
        self._network = Network(net="vgg", verbose=False).to(device).requires_grad_(False)

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        """fp32 [B]; smaller images are enlarged first."""
        if output.shape[1] != 3:
            raise UserError(f"--consistency_distance lpips is of images with three channels, not {output.shape[1]}; give pseudo_huber")
        if output.shape[-1] < LPIPS_SIDE:
            output, target = (nn.functional.interpolate(each, size=LPIPS_SIDE, mode="bilinear") for each in (output, target))
        distance: Tensor = self._network(output, target)
        return distance.flatten()


class AveragedTeacher:
    """The network whose answers are aimed at, as an average of the one in training: ``mu teacher + (1 - mu) network`` after each step.

    ``mu(k) = exp(s0 ln(mu0) / N(k))`` (Song et al. 2023, appendix C). It is brought up to date when it is first asked in a step, which is
    after the step before. As an object that accelerate keeps (`register_for_checkpointing`) it is in every checkpoint.

    Args:
        discretization: gives s0 and N.
        decay: mu0.
        unwrap: the bare network of a prepared one.
    """

    def __init__(self, discretization: Discretization, decay: float, unwrap: Callable[[nn.Module], nn.Module]) -> None:
        self._discretization, self._decay, self._unwrap = discretization, decay, unwrap
        self._weights: dict[str, Tensor] = {}
        self._step = -1  # up to which it has followed

    def mu(self, step: int) -> float:
        """How much of the teacher stays after optimizer step ``step``."""
        return math.exp(self._discretization.first * math.log(self._decay) / self._discretization(step))

    def __call__(self, model: nn.Module, step: int) -> Callable[..., Any]:
        """The teacher of an optimizer step, to be called as the network is."""
        network = self._unwrap(model)
        current = dict(network.named_parameters())
        if not self._weights:
            self._weights = {name: weight.detach().clone() for name, weight in current.items()}
        elif step > self._step:
            share = 1 - self.mu(self._step)
            for name, weight in current.items():
                self._weights[name] = self._weights[name].to(weight.device).lerp(weight.detach(), share)
        self._step = step
        return lambda *inputs, **told: functional_call(network, self._weights, inputs, told)

    def state_dict(self) -> dict[str, Any]:
        """The average and the step up to which it has followed."""
        return {"step": self._step, "weights": self._weights}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a `state_dict`."""
        self._step, self._weights = int(state["step"]), dict(state["weights"])


def student(model: nn.Module, step: int) -> Callable[..., Any]:
    """The network as its own teacher (Song and Dhariwal 2024)."""
    return model


@dataclass(frozen=True)
class ConsistencyObjective(DenoisingObjective):
    """The consistency loss of a batch, ``weight(sigma) d(f(x at the noisier level), teacher(x at the level below))``.

    The level below is the one of the discretization beneath a sigma that is drawn from the process: from the log-normal proposal
    (improved) the chance of a pair is the proposal's between its levels, from `Karras` (original) each pair's is the same. Teacher and
    network drop out the same units.

    Args:
        levels: the noise levels at shares 0 to 1, by which N of them are laid out.
        discretization: how many there are.
        distance: of outputs and targets, fp32 [B].
        teacher: ``teacher(model, step)``, called as the network is.
        by_gap: weigh by one over the distance between the two sigmas; otherwise by one.
        skip_steps: how many levels apart the two are.
    """

    levels: Karras = field(default_factory=Karras)
    discretization: Discretization = field(default_factory=lambda: Discretization("doubling", 10, 1280, 1))
    distance: Callable[[Tensor, Tensor], Tensor] = pseudo_huber
    teacher: Callable[[nn.Module, int], Callable[..., Any]] = student
    by_gap: bool = True
    skip_steps: int = 1

    def loss(self, model: nn.Module, pairs: Pairs, draws: Draws) -> Tensor:
        """The loss of each image, fp32 [B]; see `DenoisingObjective.loss`."""
        x0, noise = pairs.x0, pairs.noise  #                                   [B,C,H,W]
        below, above = self.pair_of_levels(pairs.timesteps, draws)  #          [B], [B]
        with torch.no_grad(), preserved_randomness(x0.device):
            target = self.denoised(self.teacher(model, draws.step), x0, noise, below, pairs.condition)
        output = self.denoised(model, x0, noise, above, pairs.condition)  #    [B,C,H,W] of the same noise
        weights = self.weights[pairs.timesteps] / ((above - below).float() if self.by_gap else 1.0)
        return weights * self.distance(output, target)

    def grid(self, step: int) -> Tensor:
        """The noise levels of an optimizer step, float64 [N], increasing, with their ends exactly at sigma_min and sigma_max."""
        count = self.discretization(step)
        sigmas = self.levels(torch.linspace(0, 1, count, dtype=torch.float64, device="cpu"))
        sigmas[0], sigmas[-1] = self.levels.sigma_min, self.levels.sigma_max
        return sigmas

    def pair_of_levels(self, t: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """The lower and the higher sigma of each image, [B] on the device of ``t``."""
        assert isinstance(self.process, SigmaProcess)
        drawn = self.process.drawn_sigma(t, draws)
        grid = self.grid(draws.step).to(drawn)
        skip = min(self.skip_steps, len(grid) - 1)
        index = (torch.searchsorted(grid, drawn, right=True) - 1).clamp(0, len(grid) - 1 - skip)
        return grid[index], grid[index + skip]

    def denoised(self, network: Callable[..., Any], x0: Tensor, noise: Tensor, sigma: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        """The image that a network says for ``x0 + sigma n``, fp32 [B, C, H, W]."""
        assert isinstance(self.process, SigmaProcess)
        scalings = self.process.scalings(sigma)
        skip, out, scale = (each.float().view(-1, 1, 1, 1) for each in scalings[:3])
        x = x0.float() + sigma.float().view(-1, 1, 1, 1) * noise.float()
        return skip * x + out * network(scale * x, scalings.time.float(), **condition).sample.float()
