"""The process increment of SpeeD's theorem 1 and table 1: how the step from one noise level to the next is distributed.

A process is ``x_t = s x0 + s sigma n`` with a scale s and a noise level sigma that depend on the time t (the paper's section 2.3). Its
increment ``x_{t+} - x_t`` is, in the paper, that of two noisy images with independent noises: the mean is ``(s_+ - s) x0`` and the variance
``s_+^2 sigma_+^2 + s^2 sigma^2``, theorem 1's Psi. Along the Markov chain the two share most of their noise, and the variance is another
one, about beta for "ddpm"; `increments` gives both. What theorem 1 says is that the noise's share of x_t saturates.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from immiscible.errors import UserError

COSINE_OFFSET = 0.008  # of Nichol & Dhariwal 2021, as in diffusers' squaredcos_cap_v2


class Increments(NamedTuple):
    """The increments between neighboring noise levels, float64 [T - 1]; the variance is the same for every pixel."""

    mean: Tensor  # times x0
    variance: Tensor  # of independent noises: the paper's
    chain_variance: Tensor  # of the Markov chain, given x0


def increments(signal: Tensor, noise: Tensor) -> Increments:
    """The increments of ``x_t = signal[t] x0 + noise[t] n``.

    Independent noises (theorem 1, Psi_t): ``noise[t+1]^2 + noise[t]^2``; with betas that is ``2 - alpha_bar_t (1 + alpha_{t+1})``.
    The Markov chain, with ``a = signal[t+1] / signal[t]``: ``(a - 1)^2 noise[t]^2 + noise[t+1]^2 - a^2 noise[t]^2``, where what is added
    to ``a x_t`` is the last difference; with betas that is beta_{t+1}.

    Args:
        signal: the image's coefficient, float64 [T], above 0 but for the last.
        noise: the noise's coefficient, float64 [T].
    """
    signal, noise = signal.double(), noise.double()
    before, after = noise[:-1].square(), noise[1:].square()
    kept = signal[1:] / signal[:-1]
    return Increments(signal.diff(), before + after, (kept - 1).square() * before + after - kept.square() * before)


class Ingredients(NamedTuple):
    """The columns of table 1 at some times: s, sigma^2 and their derivatives by the time, float64 of the times' shape."""

    s: Tensor
    variance: Tensor
    s_rate: Tensor
    variance_rate: Tensor


@dataclass(frozen=True, eq=False)
class ContinuousProcess:
    """``x_t = s x0 + s sigma n`` over a time, with SpeeD's areas where the paper's definition gives them.

    Args:
        ingredients: times to the columns of table 1.
        time_of: the time at which sigma^2 has a value.
        times: the first time and the last.
        peak: t_ad, the time at which `increment_variance` changes fastest, the border of acceleration and deceleration; it may lie outside
            of ``times``. None where the paper's definition gives no areas.
        no_areas: why it gives none; empty where it does.
    """

    ingredients: Callable[[Tensor], Ingredients]
    time_of: Callable[[float], float]
    times: tuple[float, float]
    peak: float | None = None
    no_areas: str = ""

    def grid(self, n: int) -> Tensor:
        """n times from the first on, up to but without the last, float64; in equal ratios where the first is above 0."""
        first, last = self.times
        position = torch.arange(n, dtype=torch.float64, device="cpu") / n
        return first * (last / first) ** position if first > 0 else first + (last - first) * position

    def increment_variance(self, t: Tensor) -> Tensor:
        """Sigma of table 1 for neighboring times: ``2 s^2 sigma^2``. With betas it is theorem 1's bound ``2 - 2 exp(-B)``."""
        at = self.ingredients(t.double())
        return 2 * at.s.square() * at.variance

    def increment_variance_rate(self, t: Tensor) -> Tensor:
        """Its derivative by the time, ``2 (2 s s' sigma^2 + s^2 (sigma^2)')``. With betas it is theorem 1's ``2 beta exp(-B)``."""
        at = self.ingredients(t.double())
        return 2 * (2 * at.s * at.s_rate * at.variance + at.s.square() * at.variance_rate)

    def mean_bound(self, t: Tensor, largest_beta: float) -> Tensor:
        """Theorem 1's bound on the mean's squared length over that of x0, ``beta_max exp(-B)``; for processes of betas alone."""
        return largest_beta * self.ingredients(t.double()).s.square()

    def tau(self, r: float, sigma_data: float = 1.0) -> float | None:
        """The time from which at most 1/r of the signal is left, ``1 / (1 + sigma^2 / sigma_data^2) <= 1 / r``; None beyond the last.

        With betas and data of unit variance this is the paper's tau. The paper has none where `no_areas`: there, and for other data, the
        rule is ours, the variance-preserving process of equal signal-to-noise ratio, ``sigma = sigma_data sqrt(r - 1)``.

        Raises:
            UserError: r is not above 1 or sigma_data not above 0.
        """
        if not 1 < r < math.inf:
            raise UserError(f"`r` {r:g} is out of range: it divides the image's variance, so it must be above 1")
        if not 0 < sigma_data < math.inf:
            raise UserError(f"`sigma_data` {sigma_data:g} is out of range: it is the images' standard deviation, so it must be above 0")
        time = self.time_of(sigma_data**2 * (r - 1))
        return time if time <= self.times[1] else None


def vp(beta: float, slope: float, last: float = 1.0) -> ContinuousProcess:
    """Table 1's VP, of linear betas: ``beta(t) = beta + slope t``, ``B = beta t + slope t^2 / 2``, ``s^2 = exp(-B)``, sigma^2 = exp(B) - 1.

    Args:
        beta: the paper's beta_min.
        slope: its beta_d, at least 0.
        last: the last time; Song et al. 2021 have 1 with beta 0.1 and slope 19.9.
    """

    def integral(t: Tensor) -> tuple[Tensor, Tensor]:
        return beta * t + slope * t.square() / 2, beta + slope * t

    def time_of(variance: float) -> float:
        exponent = math.log1p(variance)
        return 2 * exponent / (beta + math.sqrt(beta**2 + 2 * slope * exponent))  # the root that does not divide by the slope

    # beta' = beta^2; of even betas the variance changes fastest at the start
    peak = (math.sqrt(slope) - beta) / slope if slope > 0 else 0.0
    return _of_betas(integral, time_of, last, peak)


def ve(first: float = 0.02, last: float = 100.0) -> ContinuousProcess:
    """Table 1's VE: s = 1, sigma^2 = t; from and to Karras et al.'s sigmas."""
    reason = "its variance grows evenly and without end, so that no step changes it most and none has nearly all of it"
    return ContinuousProcess(lambda t: _unscaled(t, torch.ones_like(t)), lambda variance: variance, (first**2, last**2), no_areas=reason)


def edm(first: float = 0.002, last: float = 80.0) -> ContinuousProcess:
    """Table 1's EDM: s = 1, sigma = t; from and to Karras et al.'s sigmas."""
    reason = "its variance grows ever faster and without end"
    return ContinuousProcess(lambda t: _unscaled(t.square(), 2 * t), math.sqrt, (first, last), no_areas=reason)


def flow() -> ContinuousProcess:
    """Straight lines ``(1 - t) x0 + t n``, which table 1 leaves out: s = 1 - t, sigma = t / (1 - t)."""

    def ingredients(t: Tensor) -> Ingredients:
        return Ingredients(1 - t, (t / (1 - t)).square(), -torch.ones_like(t), 2 * t / (1 - t) ** 3)

    def time_of(variance: float) -> float:
        return math.sqrt(variance) / (1 + math.sqrt(variance))

    return ContinuousProcess(ingredients, time_of, (0.0, 1.0), no_areas="its variance grows ever faster up to the last level")


def ddpm(beta_schedule: str, steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> ContinuousProcess:
    """The closed form of a schedule of betas in the paper's steps t = 1..T, index t - 1 elsewhere.

    "linear" is theorem 1 (``beta_0 = beta_1 - (beta_T - beta_1) / T``, appendix A.8.1). The others are ours, in the same manner:
    "scaled_linear" and "quadratic", ``beta = (a + b t)^2``, where exp(-B) bounds alpha_bar from above as in lemma 1, because
    ``log(1 - beta) <= -beta`` and the sum of growing betas is at least their integral; and "squaredcos_cap_v2", where exp(-B) is alpha_bar
    itself up to the cap of the last step.

    Raises:
        UserError: the schedule has no closed form here.
    """
    if beta_schedule == "squaredcos_cap_v2":
        return _cosine(steps)
    if beta_schedule not in ("linear", "scaled_linear", "quadratic"):
        raise UserError(
            f"the beta schedule {beta_schedule!r} has no closed form; known: linear, scaled_linear, squaredcos_cap_v2, quadratic"
        )
    if beta_schedule == "linear" or beta_start == beta_end or steps == 1:
        slope = (beta_end - beta_start) / steps
        return vp(beta_start - slope, slope, last=steps)
    b = (math.sqrt(beta_end) - math.sqrt(beta_start)) / (steps - 1)
    a = math.sqrt(beta_start) - b

    def integral(t: Tensor) -> tuple[Tensor, Tensor]:
        return ((a + b * t) ** 3 - a**3) / (3 * b), (a + b * t).square()

    def time_of(variance: float) -> float:
        cube = a**3 + 3 * b * math.log1p(variance)
        return (math.copysign(abs(cube) ** (1 / 3), cube) - a) / b

    return _of_betas(integral, time_of, steps, ((2 * b) ** (1 / 3) - a) / b)


def _cosine(steps: int) -> ContinuousProcess:
    """``alpha_bar = cos^2(angle) / cos^2(angle at 0)``, where ``angle = pi / 2 (t / T + offset) / (1 + offset)``."""
    turn = math.pi / 2 / (1 + COSINE_OFFSET)
    at_start = math.cos(turn * COSINE_OFFSET) ** 2

    def integral(t: Tensor) -> tuple[Tensor, Tensor]:
        angle = turn * (t / steps + COSINE_OFFSET)
        return math.log(at_start) - 2 * angle.cos().log(), 2 * turn / steps * angle.tan()

    def time_of(variance: float) -> float:
        return steps * (math.acos(math.sqrt(at_start / (1 + variance))) / turn - COSINE_OFFSET)

    return _of_betas(integral, time_of, steps, steps * (1 - COSINE_OFFSET) / 2)


def _of_betas(
    integral: Callable[[Tensor], tuple[Tensor, Tensor]], time_of: Callable[[float], float], last: float, peak: float
) -> ContinuousProcess:
    """A variance-preserving process, ``s^2 = exp(-B)``, from times to B and its derivative beta."""

    def ingredients(t: Tensor) -> Ingredients:
        exponent, beta = integral(t)
        s, variance = (-exponent / 2).exp(), exponent.expm1()
        return Ingredients(s, variance, -beta * s / 2, beta * (variance + 1))

    return ContinuousProcess(ingredients, time_of, (0.0, last), peak)


def _unscaled(variance: Tensor, variance_rate: Tensor) -> Ingredients:
    return Ingredients(torch.ones_like(variance), variance, torch.zeros_like(variance), variance_rate)
