"""How often each noise level is trained: a timestep law is one probability vector over the T steps.

To add a law: a function ``law(process, *, <options>) -> TimestepSampler`` and an entry in `TIMESTEP_SAMPLINGS`; its options are known
by its signature. Indices are 0-based, from least to most noise; SpeeD's paper counts steps from 1. Laws that change in a run are made of
the samplers in `samplers`.

Laws of a continuum, of flow time s, sigma or log-SNR, are cut to the noise levels that a process has: a step stands for the flow time of
its SNR, ``s = 1 / (1 + sqrt(SNR))``, and gets the law's mass between the midpoints to its neighbors. What lies beyond would otherwise pile
up on the ends: 39 % of the draws of `logit_normal` on the last step of a linear schedule of 100.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from immiscible.choices import build_choice
from immiscible.errors import UserError
from immiscible.process import NoiseProcess, as_process
from immiscible.samplers import LossHistory, LossSampler, RampedSampler
from immiscible.samplers import TimestepSampler as TimestepSampler

DEFAULT_R = 143.55  # the r at which the linear schedule gives the released code's tau; the paper names none
RELEASED_TAU = 700


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
    P_std). On a shifted flow s is the time after the shift; diffusers' SD3 scripts draw the one before it: `sd3_logit_normal`, whose
    ``logit_mean`` of 0 is ln(shift) here.

    Args:
        process: the noise process.
        logit_mean: the mean of logit(s); above 0 is noisier.
        logit_std: its standard deviation, above 0.

    Raises:
        UserError: a value is out of range, or the law has no mass on the process's noise levels.
    """
    _check(logit_mean=logit_mean)
    _check_positive(logit_std=logit_std)
    edges = _flow_edges(process.snr)
    masses = torch.special.ndtr((edges.logit() - logit_mean) / logit_std).diff()
    return _on_levels(masses, f"`logit_mean` {logit_mean:g} with `logit_std` {logit_std:g}")


def edm_log_normal(process: NoiseProcess, *, edm_mean: float = -1.2, edm_std: float = 1.2, edm_sigma_data: float = 0.5) -> TimestepSampler:
    """EDM's law (Karras et al. 2022, table 1): ``ln sigma ~ N(-1.2, 1.2^2)``.

    Sigma is the noise's deviation over the signal's coefficient: ``sqrt((1 - alpha_bar) / alpha_bar)`` of betas, ``s / (1 - s)`` of a flow.
    EDM's numbers are for data of deviation 0.5; of other data sigma is as many times larger, so that the SNR's law stays.

    Args:
        process: the noise process.
        edm_mean: P_mean; above is noisier.
        edm_std: P_std, above 0.
        edm_sigma_data: the data's standard deviation, above 0: 0.5 leaves the law as it is written, 1 adds ln 2 to its mean.

    Raises:
        UserError: a value is out of range, or the law has no mass on the process's noise levels.
    """
    _check(edm_mean=edm_mean)
    _check_positive(edm_std=edm_std, edm_sigma_data=edm_sigma_data)
    mean = edm_mean + math.log(edm_sigma_data / 0.5)
    edges = _flow_edges(process.log_snr.exp())  # of sigma itself also where a process states its SNR for another deviation
    return _on_levels(torch.special.ndtr((edges.logit() - mean) / edm_std).diff(), f"`edm_mean` {edm_mean:g} with `edm_std` {edm_std:g}")


def mode(process: NoiseProcess, *, mode_scale: float = 1.29) -> TimestepSampler:
    """SD3's mode law with heavy tails (Esser et al. 2024, eq. 20): flow time ``1 - u - c (cos^2(pi u / 2) - 1 + u)`` of uniform u.

    Unlike `logit_normal` it leaves the ends some of the draws.

    Args:
        process: the noise process.
        mode_scale: c, from -1 (the ends most) to 2 / (pi - 2), where that is monotone; 0 is uniform in flow time. SD3's best is 1.29.

    Raises:
        UserError: c is out of range.
    """
    return _on_levels(_mode_masses(_flow_edges(process.snr), mode_scale), f"`mode_scale` {mode_scale:g}")


def sd3_logit_normal(process: NoiseProcess, *, logit_mean: float = 0.0, logit_std: float = 1.0) -> TimestepSampler:
    """What diffusers' SD3 scripts draw as "logit_normal": logit(u) is normal, u being the place among the T levels, most noise first.

    That is `logit_normal` before the scheduler's shift, with a mean of the other sign.

    Args:
        process: the noise process.
        logit_mean: the mean of logit(u); above 0 is less noisy.
        logit_std: its standard deviation, above 0.

    Raises:
        UserError: a value is out of range, or the law has no mass on the process's noise levels.
    """
    _check(logit_mean=logit_mean)
    _check_positive(logit_std=logit_std)
    masses = torch.special.ndtr((_places(process).logit() - logit_mean) / logit_std).diff().flip(0)
    return _on_levels(masses, f"`logit_mean` {logit_mean:g} with `logit_std` {logit_std:g}")


def sd3_mode(process: NoiseProcess, *, mode_scale: float = 1.29) -> TimestepSampler:
    """What diffusers' SD3 scripts draw as "mode": the number that `mode` takes for flow time is the place among the T levels.

    Args:
        process: the noise process.
        mode_scale: c, as of `mode`.

    Raises:
        UserError: c is out of range.
    """
    return _on_levels(_mode_masses(_places(process), mode_scale).flip(0), f"`mode_scale` {mode_scale:g}")


def laplace(process: NoiseProcess, *, laplace_mean: float = 0.0, laplace_scale: float = 0.5) -> TimestepSampler:
    """The Laplace law on log-SNR (Hang et al. 2024, arXiv 2407.03297): ``p(l) = exp(-|l - mu| / b) / (2 b)`` of ``l = ln SNR``.

    Args:
        process: the noise process.
        laplace_mean: mu; above 0 is less noisy.
        laplace_scale: b, above 0.

    Raises:
        UserError: a value is out of range, or the law has no mass on the process's noise levels.
    """
    _check(laplace_mean=laplace_mean)
    _check_positive(laplace_scale=laplace_scale)
    distance = (-2 * _flow_edges(process.snr).logit() - laplace_mean) / laplace_scale  # falls from index to index
    tail = (-distance.abs()).exp() / 2
    return _on_levels(
        torch.where(distance > 0, tail, 1 - tail).diff(), f"`laplace_mean` {laplace_mean:g} with `laplace_scale` {laplace_scale:g}"
    )


def beta(process: NoiseProcess, *, beta_a: float = 0.8, beta_b: float = 1.0) -> TimestepSampler:
    """B-TTDM (Zheng et al. 2024): ``t / T ~ Beta(a, b)``; index i has the mass from i / T to (i + 1) / T.

    Args:
        process: the noise process.
        beta_a: above 0; below 1 the least noise most.
        beta_b: above 0; below 1 the most noise most.

    Raises:
        UserError: a value is out of range.
    """
    from scipy.special import betainc

    _check_positive(beta_a=beta_a, beta_b=beta_b)
    shares = torch.arange(process.num_timesteps + 1, dtype=torch.float64, device="cpu") / process.num_timesteps
    masses = torch.from_numpy(betainc(beta_a, beta_b, shares.numpy())).diff()
    return _on_levels(masses.to(process.alpha_bar.device), f"`beta_a` {beta_a:g} with `beta_b` {beta_b:g}")


def log_normal_released(process: NoiseProcess) -> TimestepSampler:
    """What SpeeD's released code draws as its rival "log-normal", which is neither EDM's law nor SD3's.

    ``p ~ n / (1 - n) pi(n)`` of ``n = sqrt(1 - alpha_bar)`` on the grid of timesteps, pi being the density of `logit_normal` with mean 0
    and deviation 1: SD3's loss weight of that law, taken for a law. It leaves both ends next to nothing.
    """
    n = (1 - process.alpha_bar).sqrt()
    logarithm = -2 * (-n).log1p() - n.logit() ** 2 / 2  # n / (1 - n) over n (1 - n), and the normal density of logit n
    return _on_levels(torch.where(n < 1, logarithm.exp(), 0.0), "log_normal_released")


def clts(process: NoiseProcess, *, clts_mean: float = 0.3, clts_std: float = 1.0, clts_ramp_steps: int = 50_000) -> TimestepSampler:
    """CLTS (Xu et al. 2024, arXiv 2404.07946): from uniform to a Gaussian in t, ``P_n(t) = (1 - g_n) / T + g_n N(t; mu, sigma^2)``.

    The Gaussian is normalized over t = 1..T, and g_n = n / ramp at optimizer step n, 1 from the ramp's end on. (In the code that SpeeD
    released g goes on to grow, until probabilities are negative.) Neither sigma nor the ramp is published: the defaults are those of that
    code, whose Gaussian reads as if sigma = T was meant.

    Args:
        process: the noise process.
        clts_mean: mu as a share of T.
        clts_std: sigma as a share of T, above 0.
        clts_ramp_steps: optimizer steps until the Gaussian alone is left, at least 1.

    Raises:
        UserError: a value is out of range, or the Gaussian has no mass on the timesteps.
    """
    _check(clts_mean=clts_mean)
    _check_positive(clts_std=clts_std, clts_ramp_steps=clts_ramp_steps)
    steps = process.num_timesteps
    t = torch.arange(1, steps + 1, dtype=torch.float64, device=process.alpha_bar.device)
    gaussian = _on_levels(
        (-(((t / steps - clts_mean) / clts_std) ** 2) / 2).exp(), f"`clts_mean` {clts_mean:g} with `clts_std` {clts_std:g}"
    )
    return RampedSampler(uniform(process).probabilities, target=gaussian.probabilities, ramp_steps=clts_ramp_steps)


def loss_second_moment(process: NoiseProcess) -> TimestepSampler:
    """IDDPM's importance sampling (Nichol and Dhariwal 2021, eq. 18): ``p_t ~ sqrt(E[L_t^2])``, each loss weighted by ``1 / (T p_t)``.

    The mean is of each timestep's last ten losses: see `LossHistory`. In a loop of one's own: ``law = sampler.at(step)``,
    ``t = law(n)``, and ``loss = sampler.settled(step, t, loss)`` of the loss of each image.
    """
    return LossSampler(uniform(process).probabilities, losses=LossHistory(process.num_timesteps))


TIMESTEP_SAMPLINGS: dict[str, Callable[..., TimestepSampler]] = {
    "uniform": uniform,
    "asymmetric": asymmetric,
    "asymmetric_released": asymmetric_released,
    "logit_normal": logit_normal,
    "edm_log_normal": edm_log_normal,
    "mode": mode,
    "sd3_logit_normal": sd3_logit_normal,
    "sd3_mode": sd3_mode,
    "laplace": laplace,
    "beta": beta,
    "log_normal_released": log_normal_released,
    "clts": clts,
    "loss_second_moment": loss_second_moment,
}


def timestep_sampler(name: str, process_or_scheduler: Any, *, timestep_shift: float = 1.0, **options: Any) -> TimestepSampler:
    """The named law of `TIMESTEP_SAMPLINGS` for a `NoiseProcess` or a diffusers scheduler, with the law's own options.

    Args:
        name: a key of `TIMESTEP_SAMPLINGS`.
        process_or_scheduler: the noise process.
        timestep_shift: m: the law is pushed forward by `shifted`; 1 leaves it as it is.
        **options: of the law.

    Raises:
        UserError: the name or an option is unknown (the known ones are listed), an option is out of range, or the scheduler has no noise
            process.
    """
    process = as_process(process_or_scheduler)
    sampler = build_choice(TIMESTEP_SAMPLINGS, "timestep_sampler", name, process, **options)
    _check_positive(timestep_shift=timestep_shift)
    if timestep_shift != 1:
        sampler = sampler.mapped(partial(shifted, process, timestep_shift))
    return replace(sampler, process=process)


def shifted(process: NoiseProcess, timestep_shift: float, probabilities: Tensor) -> Tensor:
    """SD3's resolution shift of a law (Esser et al. 2024, eq. 23): flow time ``s -> m s / (1 + (m - 1) s)``, where sigma is m times itself.

    The process stays what it is; m = sqrt(D / D0) makes up for D pixels or latent numbers in the place of D0, as what averages over more
    of them sees less noise. The law is taken to be even between the midpoints of levels, and what is pushed beyond the process's levels is
    cut off.

    Args:
        process: the noise process.
        timestep_shift: m, above 0; above 1 is noisier.
        probabilities: the law, float64 [T].

    Returns:
        float64 [T], sums to 1.

    Raises:
        UserError: nothing of the law is left on the process's noise levels.
    """
    edges = _flow_edges(process.snr)
    cumulative = torch.cat([torch.zeros_like(probabilities[:1]), probabilities.cumsum(0)])
    before = edges / (timestep_shift - (timestep_shift - 1) * edges)  # what is pushed to the edges
    right = torch.searchsorted(edges, before).clamp(1, len(edges) - 1)
    share = ((before - edges[right - 1]) / (edges[right] - edges[right - 1])).clamp(0, 1)
    masses = torch.lerp(cumulative[right - 1], cumulative[right], share).diff()
    return _on_levels(masses, f"`timestep_shift` {timestep_shift:g}").probabilities


def _flow_edges(snr: Tensor) -> Tensor:
    """Between which flow times each level stands, float64 [T + 1]; the ends are as far out as the midpoints next to them lie inside."""
    flow_time = 1 / (1 + snr.sqrt())
    midpoints = (flow_time[1:] + flow_time[:-1]) / 2
    if not len(midpoints):
        return flow_time.new_tensor([0.0, 1.0])
    return torch.cat([2 * flow_time[:1] - midpoints[:1], midpoints, 2 * flow_time[-1:] - midpoints[-1:]]).clamp(0, 1)


def _places(process: NoiseProcess) -> Tensor:
    """The ends of T even parts of [0, 1], float64 [T + 1]."""
    return torch.arange(process.num_timesteps + 1, dtype=torch.float64, device=process.alpha_bar.device) / process.num_timesteps


def _mode_masses(edges: Tensor, mode_scale: float) -> Tensor:
    """The share of uniform u whose ``1 - u - c (cos^2(pi u / 2) - 1 + u)`` lies between two ``edges``, float64 [N], of [N + 1] in [0, 1].

    Raises:
        UserError: c is out of range.
    """
    most = 2 / (math.pi - 2)
    if not -1 <= mode_scale <= most:
        raise UserError(f"`mode_scale` {mode_scale:g} is out of range: it must be from -1 to {most:.4g}")
    low, high = torch.zeros_like(edges), torch.ones_like(edges)
    for _ in range(60):  # bisection to the last bit: it falls as u grows
        u = (low + high) / 2
        above = 1 - u - mode_scale * ((math.pi / 2 * u).cos() ** 2 - 1 + u) > edges
        low, high = torch.where(above, u, low), torch.where(above, high, u)
    return (1 - (low + high) / 2).diff()


def _on_levels(masses: Tensor, options: str) -> TimestepSampler:
    """The law of these masses.

    Raises:
        UserError: it has none, for which ``options`` are to blame.
    """
    masses = masses.clamp(min=0)  # differences of a distribution function that rises by less than its last digit
    if not masses.sum() > 0:
        raise UserError(f"{options} is off this noise process, whose levels get no draws: bring it nearer to the default")
    return _normalized(masses)


def _check(**options: float) -> None:
    for name, value in options.items():
        if not math.isfinite(value):
            raise UserError(f"`{name}` {value:g} is out of range: it must be finite")


def _check_positive(**options: float) -> None:
    for name, value in options.items():
        if not 0 < value < math.inf:
            raise UserError(f"`{name}` {value:g} is out of range: it must be above 0")


def _normalized(masses: Tensor, reflect_at: int | None = None) -> TimestepSampler:
    return TimestepSampler(masses / masses.sum(), reflect_at)


def _boosted(process: NoiseProcess, k: float, tau: int) -> Tensor:
    if not 1 <= k < math.inf:
        raise UserError(f"`asymmetric_k` {k:g} is out of range: it must be at least 1 (1 is uniform)")
    masses = torch.ones_like(process.alpha_bar)
    masses[:tau] = k
    return masses
