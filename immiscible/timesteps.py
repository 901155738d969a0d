"""How often each noise level is trained: a timestep law is one probability vector over the T steps.

To add a law: a function ``law(process, *, <options>) -> TimestepSampler`` and an entry in `TIMESTEP_SAMPLINGS`; its options are known
by its signature. Indices are 0-based, from least to most noise; SpeeD's paper counts steps from 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from immiscible.choices import build_choice
from immiscible.errors import UserError
from immiscible.process import NoiseLevels, NoiseProcess, as_process

DEFAULT_R = 143.55  # the r at which the linear schedule gives the released code's tau; the paper names none
RELEASED_TAU = 700


@dataclass(frozen=True, eq=False, repr=False)
class TimestepSampler:
    """Draws timesteps from a law; to be used in the place of ``torch.randint``, or by `levels` in a loop that wants sigmas.

    Args:
        probabilities: the law p, float64 [T], sums to 1.
        reflect_at: the m of SpeeD's released draw rule, in [1, T): half of a batch, n // 2 + 1 rows, is drawn from p, and the rest are
            the reflections of these rows, t -> |t - m|. None for independent draws from p.
        process: the noise process whose steps these are, for `levels`; `timestep_sampler` fills it in.

    Raises:
        UserError: ``probabilities`` is no such vector, ``reflect_at`` is out of range, or the process has another number of steps.
    """

    probabilities: Tensor
    reflect_at: int | None = None
    process: NoiseProcess | None = None

    def __post_init__(self) -> None:
        p = self.probabilities
        if p.dtype != torch.float64 or p.ndim != 1 or len(p) == 0:
            raise UserError(f"timestep probabilities must be a float64 vector over the timesteps, not {p.dtype} {list(p.shape)}")
        if not (bool((p >= 0).all()) and abs(float(p.sum()) - 1) < 1e-9):
            raise UserError(f"timestep probabilities must be at least 0 and sum to 1; their sum is {float(p.sum()):g}")
        if self.reflect_at is not None and not 1 <= self.reflect_at < len(p):
            raise UserError(f"`reflect_at` {self.reflect_at} is out of range: it must be in [1, {len(p)})")
        if self.process is not None and self.process.num_timesteps != len(p):
            raise UserError(f"{len(p)} timestep probabilities do not go with a noise process of {self.process.num_timesteps} timesteps")

    def __repr__(self) -> str:
        reflected = "" if self.reflect_at is None else f", reflected at {self.reflect_at}"
        return f"TimestepSampler({len(self.probabilities)} timesteps, moves {self.moved_share():.1%} of the draws{reflected})"

    def __call__(self, n: int, device: torch.device | str | None = None, generator: torch.Generator | None = None) -> Tensor:
        """Draws n timesteps.

        Args:
            n: how many: the batch size. With ``reflect_at`` the rows of one call depend on each other; across ranks each rank reflects
                its own rows.
            device: where the result is to be; the generator's device if not given.
            generator: drawn from on its own device; the global CPU generator if not given, so that a seed gives the same timesteps
                whatever the device.

        Returns:
            int64 [n], in [0, T): 0 is the least noise. With betas this is the timestep of diffusers' schedulers and of the network; flow
            and EDM schedulers count the other way, and `levels` gives what their loops want.
        """
        source = generator.device if generator is not None else torch.device("cpu")
        uniforms = torch.rand(n, dtype=torch.float64, device=source, generator=generator)
        return self.from_uniforms(uniforms).to(device if device is not None else source)

    def levels(
        self,
        n: int,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
        *,
        ndim: int = 1,
        continuous: bool = False,
    ) -> NoiseLevels:
        """Draws n noise levels and gives them as loops over flows and EDM write them.

        For diffusers' flow scripts ``sigmas, timesteps, indices = sampler.levels(n, ndim=x0.ndim)`` stands for drawing ``indices``,
        ``timesteps = scheduler.timesteps[indices]`` and ``sigmas = get_sigmas(timesteps)``, to the last bit.

        Args:
            n: how many: the batch size.
            device: as in a call of the sampler.
            generator: as in a call of the sampler, which draws the same indices from it.
            ndim: of the images; sigma is [n, 1, ...] with so many dimensions, and broadcasts against them.
            continuous: any value instead of the T levels: the law is spread evenly over each level's bin (`NoiseProcess.levels`).

        Returns:
            ``sigma`` fp32 [n, 1, ...], ``time`` [n], and ``index`` int64 [n] into the scheduler (of the bin, if continuous).

        Raises:
            UserError: the sampler was made without a noise process.
        """
        if self.process is None:
            raise UserError("this law knows no noise process, so it has no noise levels: give TimestepSampler its `process`")
        source = generator.device if generator is not None else torch.device("cpu")
        t = self(n, generator=generator)
        within = torch.rand(n, dtype=torch.float64, device=source, generator=generator) if continuous else None
        sigma, time, index = self.process.levels(t, within)
        target = device if device is not None else source
        return NoiseLevels(sigma.view(-1, *[1] * (ndim - 1)).to(target), time.to(target), index.to(target))

    def from_uniforms(self, uniforms: Tensor) -> Tensor:
        """The timesteps that uniform numbers stand for, by the inverse of the law's distribution function.

        Args:
            uniforms: float64 [n], in [0, 1). With ``reflect_at`` only the first n // 2 + 1 are used.

        Returns:
            int64 [n] on the device of ``uniforms``; steps of probability zero are never among them.
        """
        cumulative = self.probabilities.cumsum(0)
        # Divided by its end, which rounding leaves beside 1: then a uniform below 1 cannot fall beyond the last possible step.
        cumulative = (cumulative / cumulative[-1]).to(uniforms.device)
        t = torch.searchsorted(cumulative, uniforms.double().clamp(max=1 - 2**-53), right=True)
        if self.reflect_at is None:
            return t
        direct = t[: len(t) // 2 + 1]
        return torch.cat([direct, (direct - self.reflect_at).abs()])[: len(t)]

    def marginal(self, n: int | None = None) -> Tensor:
        """The probability of each timestep in a batch of n, averaged over its rows, float64 [T].

        It is p itself for independent draws. With ``reflect_at`` it depends on n, and n=None gives the limit of large batches:
        half p and half p reflected.
        """
        p = self.probabilities
        if self.reflect_at is None:
            return p
        direct_share = 0.5 if n is None else min(n, n // 2 + 1) / n
        images = (torch.arange(len(p), device=p.device) - self.reflect_at).abs()
        reflected = torch.zeros_like(p).index_add(0, images, p)
        return direct_share * p + (1 - direct_share) * reflected

    def moved_share(self) -> float:
        """The share of draws that the law moves elsewhere than uniform draws would go: their total variation distance, in [0, 1)."""
        marginal = self.marginal()
        return 0.5 * float((marginal - 1 / len(marginal)).abs().sum())


def threshold(process: NoiseProcess, asymmetric_r: float | None = None, asymmetric_tau: int | None = None) -> int:
    """SpeeD's tau, the number of steps before the convergence area: as given, or from r by `NoiseProcess.convergence_step`.

    Raises:
        UserError: both are given, tau is not in (0, T], or r is not reached.
    """
    if asymmetric_tau is None:
        return process.convergence_step(DEFAULT_R if asymmetric_r is None else asymmetric_r)
    if asymmetric_r is not None:
        raise UserError("`asymmetric_tau` and `asymmetric_r` both say where the convergence area begins: give one of them")
    if not 0 < asymmetric_tau <= process.num_timesteps:
        raise UserError(f"`asymmetric_tau` {asymmetric_tau} is out of range: it must be from 1 to {process.num_timesteps}, the timesteps")
    return asymmetric_tau


def released_threshold(process: NoiseProcess, asymmetric_tau: int | None = None) -> int:
    """The tau of SpeeD's released code: 700 on every schedule, unless given.

    Raises:
        UserError: tau is not in (0, T].
    """
    if asymmetric_tau is None and process.num_timesteps < RELEASED_TAU:
        raise UserError(
            f"the released SpeeD code has its threshold at {RELEASED_TAU}, beyond this process's {process.num_timesteps} timesteps: "
            "give `asymmetric_tau`"
        )
    return threshold(process, asymmetric_tau=RELEASED_TAU if asymmetric_tau is None else asymmetric_tau)


def uniform(process: NoiseProcess) -> TimestepSampler:
    """Every timestep equally often: ``P(t) = 1 / T``."""
    return _normalized(torch.ones_like(process.alpha_bar))


def asymmetric(
    process: NoiseProcess, *, asymmetric_k: float = 5.0, asymmetric_r: float | None = None, asymmetric_tau: int | None = None
) -> TimestepSampler:
    """SpeeD's asymmetric sampling (eq. 3): steps up to tau k times as often as the steps of the convergence area.

    ``P(t) = k / (T + tau (k - 1))`` for indices 0..tau-1, and ``1 / (T + tau (k - 1))`` from tau on.

    Args:
        process: the noise process.
        asymmetric_k: k >= 1; 1 is uniform.
        asymmetric_r: tau is the first step at which at most 1/r of the image's variance is left; 143.55 if neither is given.
        asymmetric_tau: tau itself, 1 to T, in the place of r.

    Raises:
        UserError: a value is out of range, or both tau and r are given.
    """
    return _normalized(_boosted(process, asymmetric_k, threshold(process, asymmetric_r, asymmetric_tau)))


def asymmetric_released(process: NoiseProcess, *, asymmetric_k: float = 5.0, asymmetric_tau: int | None = None) -> TimestepSampler:
    """What SpeeD's released code draws, which its paper does not describe: a fixed tau, and half of each batch reflected.

    tau is 700 on every schedule unless given, and m is the first index at which sqrt(1 - alpha_bar) grows by less than 1e-4 per step,
    plus one. See `TimestepSampler` for the reflection and `TimestepSampler.marginal` for the law that results.

    Raises:
        UserError: k is below 1, tau is not in (0, T], or the process has no such m.
    """
    boosted = _boosted(process, asymmetric_k, released_threshold(process, asymmetric_tau))
    deviation = (1 - process.alpha_bar).sqrt()
    flat = torch.gradient(deviation)[0] < 1e-4 if process.num_timesteps > 1 else deviation < 0
    first_flat = int(flat.long().argmax())
    if not flat.any() or first_flat + 1 == process.num_timesteps:
        raise UserError(
            "timestep_sampler('asymmetric_released') needs a noise process whose noise level flattens out before its end "
            "(by less than 1e-4 per step): use timestep_sampler('asymmetric')"
        )
    return _normalized(boosted, reflect_at=first_flat + 1)


def logit_normal(process: NoiseProcess, *, logit_mean: float = 0.0, logit_std: float = 1.0) -> TimestepSampler:
    """SD3's law (Esser et al. 2024): logit(s) is normal, where s is the time of the flow ``(1 - s) x0 + s n``.

    Since logit(s) is the logarithm of the noise over the signal, this is EDM's law too: ln(sigma) is normal (Karras et al. 2022, P_mean and
    P_std). On a shifted flow s is the time after the shift; diffusers' SD3 scripts draw the one before it, for which ``logit_mean`` is
    ln(shift) larger (and counts their indices, from most to least noise, so that their mean has the opposite sign).

    A step of any process stands for the flow time of its SNR, s = 1 / (1 + sqrt(SNR)), and gets the law's mass between the midpoints to
    its neighbors. The law is cut to the noise levels that the process has: what lies beyond would otherwise pile up on its ends, 39 %
    of the draws on the last step of a linear schedule of 100.

    Args:
        process: the noise process.
        logit_mean: the mean of logit(s); above 0 is noisier.
        logit_std: its standard deviation, above 0.

    Raises:
        UserError: a value is out of range, or the law has no mass on the process's noise levels.
    """
    if not math.isfinite(logit_mean):
        raise UserError(f"`logit_mean` {logit_mean:g} is out of range: it must be finite")
    if not 0 < logit_std < math.inf:
        raise UserError(f"`logit_std` {logit_std:g} is out of range: it must be above 0")
    flow_time = 1 / (1 + process.snr.sqrt())
    midpoints = (flow_time[1:] + flow_time[:-1]) / 2
    ends = (2 * flow_time[:1] - midpoints[:1], 2 * flow_time[-1:] - midpoints[-1:])  # as far out as the midpoints lie inside
    edges = torch.cat([ends[0], midpoints, ends[1]]).clamp(0, 1) if len(midpoints) else flow_time.new_tensor([0.0, 1.0])
    masses = torch.special.ndtr((edges.logit() - logit_mean) / logit_std).diff()
    if not masses.sum() > 0:
        raise UserError(f"`logit_mean` {logit_mean:g} with `logit_std` {logit_std:g} is off this noise process: bring the mean nearer to 0")
    return _normalized(masses)


TIMESTEP_SAMPLINGS: dict[str, Callable[..., TimestepSampler]] = {
    "uniform": uniform,
    "asymmetric": asymmetric,
    "asymmetric_released": asymmetric_released,
    "logit_normal": logit_normal,
}


def timestep_sampler(name: str, process_or_scheduler: Any, **options: Any) -> TimestepSampler:
    """The named law of `TIMESTEP_SAMPLINGS` for a `NoiseProcess` or a diffusers scheduler, with the law's own options.

    Raises:
        UserError: the name or an option is unknown (the known ones are listed), an option is out of range, or the scheduler has no noise
            process.
    """
    process = as_process(process_or_scheduler)
    sampler = build_choice(TIMESTEP_SAMPLINGS, "timestep_sampler", name, process, **options)
    return replace(sampler, process=process)


def _normalized(masses: Tensor, reflect_at: int | None = None) -> TimestepSampler:
    return TimestepSampler(masses / masses.sum(), reflect_at)


def _boosted(process: NoiseProcess, k: float, tau: int) -> Tensor:
    if not 1 <= k < math.inf:
        raise UserError(f"`asymmetric_k` {k:g} is out of range: it must be at least 1 (1 is uniform)")
    masses = torch.ones_like(process.alpha_bar)
    masses[:tau] = k
    return masses
