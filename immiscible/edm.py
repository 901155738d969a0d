"""EDM: noise levels as a continuum of sigmas, and networks whose input and output are preconditioned (Karras et al. 2022).

A run has no list of T noise levels here but a proposal for sigma, such as EDM's log-normal. Its T levels are ranges of equal probability
under the proposal, and an image's sigma lies anywhere in its range. So the uniform timestep law is the proposal itself, and what the other
axes know of timesteps holds on the axis of sigma too: SpeeD's step lies where sigma = sigma_data sqrt(r - 1), its change-aware weight
follows the rate at which the noise's share grows per share of the proposal. SpeeD's paper gives no rule for EDM; this one is ours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from immiscible.errors import UserError
from immiscible.objectives import DenoisingObjective, Pairs
from immiscible.process import NoiseLevels, NoiseProcess, check_prediction_type, rows_at
from immiscible.randomness import Draws


class Scalings(NamedTuple):
    """What stands around a network F: the denoised image is ``skip x + out F(input x, time)``, x being ``x0 + sigma n``.

    Each has the shape of sigma.
    """

    skip: Tensor
    out: Tensor
    input: Tensor
    time: Tensor


@dataclass(frozen=True)
class EDMScalings:
    """EDM's preconditioning (Karras et al. 2022, table 1), by which input and target of the network have unit variance.

    Args:
        sigma_data: standard deviation of the data.
    """

    sigma_data: float = 0.5

    def __call__(self, sigma: Tensor) -> Scalings:
        """Of floating-point sigmas above 0, of any shape."""
        total = (sigma**2 + self.sigma_data**2).sqrt()
        return Scalings(self.sigma_data**2 / total**2, sigma * self.sigma_data / total, 1 / total, sigma.log() / 4)


@dataclass(frozen=True)
class MomentumScalings(EDMScalings):
    """FDM's (Wu et al. 2023): as EDM's, but the input is scaled as a critically damped process with momentum shrinks the image.

    ``s = (1 + B) exp(-B)``, which solves ``s'' + 2 s' + s = 0`` with s(0) = 1 and s'(0) = 0, where
    ``B = 0.1 t + 19.9 t^2 / 2`` is the integral of VP's beta and ``t = (sigma - sigma_min) / (sigma_max - sigma_min)``.

    Args:
        sigma_min: where t is 0, which it is below, too.
        sigma_max: where t is 1.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0

    def __call__(self, sigma: Tensor) -> Scalings:
        """See `EDMScalings`."""
        t = ((sigma - self.sigma_min) / (self.sigma_max - self.sigma_min)).clamp(min=0)
        spent = 0.1 * t + 19.9 * t**2 / 2
        return super().__call__(sigma)._replace(input=(1 + spent) * (-spent).exp())


@dataclass(frozen=True)
class LogNormal:
    """``ln sigma ~ N(mean, std^2)``, cut to the range from ``low`` to ``high``: its quantile function."""

    mean: float
    std: float
    low: float = 0.0
    high: float = float("inf")

    def __call__(self, share: Tensor) -> Tensor:
        """The sigmas, float64, below which these shares of the proposal lie; shares from 0 to 1."""
        ends = ((torch.tensor([self.low, self.high], dtype=torch.float64, device="cpu")).log() - self.mean) / self.std
        below, upto = torch.special.ndtr(ends).tolist()
        least = torch.finfo(share.dtype).eps / 2  # where quantiles end, as those of shares 0 and 1 would be infinite
        position = (below + (upto - below) * share).clamp(least, 1 - least)
        return (self.mean + self.std * torch.special.ndtri(position)).exp().clamp(self.low, self.high)


@dataclass(frozen=True)
class Karras:
    """``sigma^(1/rho)`` is uniform between its ends: the levels of EDM's sampler, with the quantile function
    ``(sigma_min^(1/rho) + share (sigma_max^(1/rho) - sigma_min^(1/rho)))^rho``.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    def __call__(self, share: Tensor) -> Tensor:
        """As `LogNormal`'s."""
        first, last = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        return ((first + share * (last - first)) ** self.rho).clamp(self.sigma_min, self.sigma_max)


@dataclass(frozen=True, eq=False, repr=False)
class SigmaProcess(NoiseProcess):
    """``xt = input(sigma) (x0 + sigma n)`` over a continuum of sigmas, and what the preconditioned network is to say there.

    Its ``alpha_bar`` is that of the variance-preserving process of equal SNR, ``1 / (1 + sigma^2 / sigma_data^2)``.

    Args:
        proposal: the quantile function of sigma: of shares in [0, 1], float64, any shape.
        scalings: of the network.
        sigma_data: standard deviation of the data.
        exact_sigma: the middle of each level's range, float64 [T], on the CPU.
        of_image: the image's coefficient in the network's target, fp32 [T].
        of_noise: the noise's, fp32 [T].
    """

    proposal: Callable[[Tensor], Tensor]
    scalings: Callable[[Tensor], Scalings]
    sigma_data: float
    exact_sigma: Tensor
    of_image: Tensor
    of_noise: Tensor

    @classmethod
    def build(
        cls, proposal: Callable[[Tensor], Tensor], scalings: Callable[[Tensor], Scalings], *, sigma_data: float, num_levels: int
    ) -> SigmaProcess:
        """With ``num_levels`` ranges of equal probability."""
        shares = (torch.arange(num_levels, dtype=torch.float64, device="cpu") + 0.5) / num_levels
        return cls._of(proposal(shares), proposal, scalings, sigma_data)

    @classmethod
    def _of(
        cls, sigma: Tensor, proposal: Callable[[Tensor], Tensor], scalings: Callable[[Tensor], Scalings], sigma_data: float
    ) -> SigmaProcess:
        skip, out, scale, time = scalings(sigma)
        return cls(
            kind="preconditioned",
            signal=scale.float(),
            noise=(scale * sigma).float(),
            model_time=time.float(),
            alpha_bar=1 / (1 + (sigma / sigma_data) ** 2),
            diffusers_snr=((sigma_data / sigma) ** 2).float(),
            proposal=proposal,
            scalings=scalings,
            sigma_data=sigma_data,
            exact_sigma=sigma,
            of_image=((1 - skip) / out).float(),
            of_noise=(-skip * sigma / out).float(),
        )

    @property
    def sigma(self) -> Tensor:
        """The standard deviation of the noise in ``x0 + sigma n``, fp32 [T], increasing."""
        return self.exact_sigma.float()

    @property
    def log_snr(self) -> Tensor:
        """See `NoiseProcess.log_snr`: ``-2 ln sigma``, whatever sigma_data is."""
        return -2 * self.exact_sigma.log()

    def to(self, device: torch.device | str) -> SigmaProcess:
        """See `NoiseProcess.to`."""
        moved = super().to(device)
        assert isinstance(moved, SigmaProcess)
        return replace(moved, of_image=self.of_image.to(device), of_noise=self.of_noise.to(device))

    def levels(self, t: Tensor, within: Tensor | None = None) -> NoiseLevels:
        """See `NoiseProcess.levels`; between the ends of a level's range sigma follows the proposal."""
        t = t.cpu()
        sigma = self.exact_sigma[t] if within is None else self.proposal((t + within.cpu()) / self.num_timesteps)
        return NoiseLevels(sigma.float(), self.scalings(sigma).time.float(), self.num_timesteps - 1 - t)

    def drawn_sigma(self, t: Tensor, draws: Draws) -> Tensor:
        """The sigma of each image of a micro-batch, float64 [B] on the device of ``t`` (fp32 where that has no float64)."""
        wide = torch.float32 if t.device.type == "mps" else torch.float64
        within = draws.uniform("level", len(t)).to(t.device, wide)
        return self.proposal((t + within) / self.num_timesteps)

    def drawn(self, t: Tensor, draws: Draws) -> tuple[NoiseProcess, Tensor]:
        """See `NoiseProcess.drawn`; the vectors are on the device of ``t``."""
        own = self._of(self.drawn_sigma(t, draws), self.proposal, self.scalings, self.sigma_data)
        return own, torch.arange(len(t), device=t.device)

    def target(self, x0: Tensor, noise: Tensor, t: Tensor, prediction_type: str) -> Tensor:
        """``(x0 - skip (x0 + sigma n)) / out``: what the network must say for the denoised image to be x0; fp32, of x0's shape."""
        check_prediction_type(self.kind, prediction_type)
        return rows_at(self.of_image, t, x0) * x0.float() + rows_at(self.of_noise, t, x0) * noise.float()

    def predict_x0(self, xt: Tensor, output: Tensor, t: Tensor, prediction_type: str) -> Tensor:
        """See `NoiseProcess.predict_x0`: ``skip x + out F``."""
        check_prediction_type(self.kind, prediction_type)
        skip, out, scale, _ = self.scalings(self.exact_sigma)
        return rows_at((skip / scale).float(), t, xt) * xt.float() + rows_at(out.float(), t, xt) * output.float()

    def noise_error(self, prediction_type: str) -> Tensor:
        """See `NoiseProcess.noise_error`: ``(out / sigma)^2``; with EDM's scalings that is alpha_bar."""
        check_prediction_type(self.kind, prediction_type)
        return (self.scalings(self.exact_sigma).out / self.exact_sigma) ** 2


@dataclass(frozen=True)
class MomentumObjective(DenoisingObjective):
    """The loss of FDM: EDM's, of which no sigma counts more than a cap that rises while training begins.

    EDM's weight on the denoised image's error, ``(sigma^2 + sigma_data^2) / (sigma sigma_data)^2``, is cut to a cap that goes in a straight
    line from ``first_cap`` to ``last_cap`` (FDM's code: from 5 to 500). What remains of it multiplies the loss.

    Args:
        warmup_steps: optimizer steps until ``last_cap``; 0 begins with it.
        first_cap: at step 0.
        last_cap: from ``warmup_steps`` on.
    """

    warmup_steps: int = 0
    first_cap: float = 5.0
    last_cap: float = 500.0

    def __post_init__(self) -> None:
        if not isinstance(self.process, SigmaProcess):
            raise UserError("MomentumObjective needs a SigmaProcess, whose sigmas its cap is on")

    def cap(self, step: int) -> float:
        """At an optimizer step, counted from 0."""
        share = min(1.0, step / self.warmup_steps) if self.warmup_steps else 1.0
        return self.first_cap + share * (self.last_cap - self.first_cap)

    def loss(self, model: nn.Module, pairs: Pairs, draws: Draws) -> Tensor:
        """See `DenoisingObjective.loss`."""
        process = self.process
        assert isinstance(process, SigmaProcess)
        sigma = process.drawn_sigma(pairs.timesteps, draws)
        weight = (sigma**2 + process.sigma_data**2) / (sigma * process.sigma_data) ** 2
        kept = (self.cap(draws.step) / weight).clamp(max=1).float()
        return kept * super().loss(model, pairs, draws)
