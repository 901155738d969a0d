"""What an error at each noise level costs: a loss weighting is one vector over the T steps.

Methods state their weight for the error of the predicted noise. An error of the network means different errors of the noise, the image
and the velocity, so `from_epsilon` turns such a weight into the one on the mean squared error of the type that is trained; the objective
is then the same whatever the network predicts. To add a weighting: a function ``weighting(process, prediction_type, *, <options>)`` that
returns float64 [T], and an entry in `LOSS_WEIGHTINGS`; its options are known by its signature.
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
from immiscible.process import NoiseProcess, as_process, check_prediction_type
from immiscible.timesteps import released_threshold


@dataclass(frozen=True, eq=False, repr=False)
class LossWeights:
    """What an error costs at each noise level: ``weights[t]`` for timesteps, ``weights.at(sigma)`` for any noise level.

    Either gives fp32 on the device of what it is asked for. `to` moves the weights there once; otherwise each call does.

    Args:
        vector: the weight of each index from least to most noise, [T].
        log_snr: the logarithm of the signal-to-noise ratio at each index, float64 [T], decreasing; minus infinity without signal.
        kind: of the `NoiseProcess`: what is meant by a sigma.
    """

    vector: Tensor
    log_snr: Tensor
    kind: str

    def __len__(self) -> int:
        """T."""
        return len(self.vector)

    def __repr__(self) -> str:
        return f"LossWeights({self.kind}, {len(self)} timesteps, {float(self.vector.min()):.3g} to {float(self.vector.max()):.3g})"

    def __getitem__(self, t: Any) -> Tensor:
        """The weights of indices, 0 being the least noise: diffusers' timesteps of schedulers with betas.

        Args:
            t: int64 [B] on any device, or any other index of a vector.

        Returns:
            fp32 [B], on the device of ``t``.

        Raises:
            UserError: ``t`` is floating point, as the timesteps of flow and EDM schedulers are.
        """
        vector = self.vector
        if isinstance(t, Tensor):
            if t.is_floating_point():
                raise UserError(f"weights are indexed by int64 timesteps, not by {t.dtype}: for noise levels use weights.at(sigma)")
            vector = vector.to(t.device)
        return vector[t].float()

    def at(self, sigma: Tensor) -> Tensor:
        """The weights of noise levels, linear in the logarithm of the SNR between the T levels, and constant beyond them.

        Args:
            sigma: floating point of any shape and on any device, in the terms of `NoiseProcess.sigma`: s of the flow
                ``(1 - s) x0 + s n``, or the noise's deviation over the signal's coefficient ("edm", "ddpm").

        Returns:
            fp32, of sigma's shape and on its device: [B, 1, 1, 1] broadcasts against images as sigma does.
        """
        wide = torch.float32 if sigma.device.type == "mps" else torch.float64  # that device has no float64
        vector, levels = (rows.to(sigma.device, wide) for rows in (self.vector, -self.log_snr))  # [T], increasing
        exact = sigma.detach().to(wide)
        level = 2 * (exact.logit() if self.kind == "flow" else exact.log())
        right = torch.searchsorted(levels, level).clamp(1, max(1, len(levels) - 1)).clamp(max=len(levels) - 1)
        left = (right - 1).clamp(min=0)
        share = ((level - levels[left]) / (levels[right] - levels[left])).clamp(0, 1)
        share = torch.where(level >= levels[right], 1.0, share)  # also at a last level without signal, where this was inf / inf
        return torch.lerp(vector[left], vector[right], share).float()

    def to(self, device: torch.device | str) -> LossWeights:
        """The same weights on ``device``."""
        wide = torch.float32 if torch.device(device).type == "mps" else None
        return replace(self, vector=self.vector.to(device, wide), log_snr=self.log_snr.to(device, wide))

    def float(self) -> LossWeights:
        """The same weights with the vector in fp32: what they give stays the same, and a GPU has less to do."""
        return replace(self, vector=self.vector.float())


def from_epsilon(weights: Tensor, process: NoiseProcess, prediction_type: str) -> Tensor:
    """Turns weights on the squared error of the noise into equivalent ones on that of ``prediction_type``.

    The factor is `NoiseProcess.noise_error`.

    Args:
        weights: float64 [T].
        process: the noise process.
        prediction_type: what the network predicts.

    Returns:
        float64 [T].

    Raises:
        UserError: the process cannot be trained with this prediction type.
    """
    return weights * process.noise_error(prediction_type)


def none(process: NoiseProcess, prediction_type: str) -> Tensor:
    """One: the plain mean squared error of whatever is predicted."""
    return torch.ones_like(process.alpha_bar)


def change_aware(process: NoiseProcess, prediction_type: str, *, change_aware_lambda: float = 0.6) -> Tensor:
    """SpeeD's change-aware weighting (section 3.3): more where the noise's share changes faster.

    ``w = (1 - l) + (2 l - 1) (g - g_min) / (g_max - g_min)`` on the noise's error, g = `NoiseProcess.change_rate`,
    g_max = min(1, max g) and g_min = max(0, min g), so from 1 - l to l.

    Args:
        process: the noise process.
        prediction_type: what the network predicts.
        change_aware_lambda: l, in [0.5, 1]; 0.5 weighs every step by one half.

    Raises:
        UserError: l is out of range, or the process changes at one constant rate.
    """
    return from_epsilon(_change_aware(process, change_aware_lambda), process, prediction_type)


def change_aware_released(
    process: NoiseProcess, prediction_type: str, *, change_aware_lambda: float = 0.6, asymmetric_tau: int | None = None
) -> Tensor:
    """What SpeeD's released code weighs by: `change_aware` below tau (700 unless given) and, unlike the paper, 1 from index tau on.

    Raises:
        UserError: l or tau is out of range.
    """
    weights = _change_aware(process, change_aware_lambda)
    weights[released_threshold(process, asymmetric_tau) :] = 1.0
    return from_epsilon(weights, process, prediction_type)


def min_snr(process: NoiseProcess, prediction_type: str, *, snr_gamma: float = 5.0) -> Tensor:
    """Min-SNR-gamma (Hang et al. 2023): ``min(SNR, gamma) / SNR`` on the noise's error, so ``min(SNR, gamma)`` on the image's.

    Raises:
        UserError: gamma is not above 0.
    """
    if not 0 < snr_gamma < math.inf:
        raise UserError(f"`snr_gamma` {snr_gamma:g} is out of range: it must be above 0")
    return from_epsilon((snr_gamma / process.snr).clamp(max=1), process, prediction_type)


def min_snr_released(process: NoiseProcess, prediction_type: str) -> Tensor:
    """What SpeeD's released code weighs by as its rival "min-SNR": ``5 / (1 + SNR)`` on the noise's error, five times P2.

    It divides the least noisy step's min(SNR, 5) by each step's SNR plus one.
    """
    return from_epsilon(5 / (1 + process.snr), process, prediction_type)


def soft_min_snr(process: NoiseProcess, prediction_type: str, *, snr_gamma: float = 4.0) -> Tensor:
    """Soft-min-SNR (Crowson et al. 2024, arXiv 2401.11605): ``1 / (sigma^2 + 1 / gamma)`` on the image's error, sigma^2 = 1 / SNR.

    So ``gamma / (SNR + gamma)`` on the noise's.

    Raises:
        UserError: gamma is not above 0.
    """
    if not 0 < snr_gamma < math.inf:
        raise UserError(f"`snr_gamma` {snr_gamma:g} is out of range: it must be above 0")
    return from_epsilon(snr_gamma / (snr_gamma + process.snr), process, prediction_type)


def debiased(process: NoiseProcess, prediction_type: str, *, debiased_cap: float | None = None) -> Tensor:
    """Debiased estimation (Yu et al. 2023, arXiv 2310.08442): ``1 / sqrt(SNR)`` on the noise's error.

    Args:
        process: the noise process.
        prediction_type: what the network predicts.
        debiased_cap: SNRs above it count as it does, above 0; kohya's scripts have 1000, the paper has none.

    Raises:
        UserError: the cap is not above 0, or the weight is infinite under epsilon on a process that ends without signal.
    """
    if debiased_cap is not None and not 0 < debiased_cap < math.inf:
        raise UserError(f"`debiased_cap` {debiased_cap:g} is out of range: it must be above 0")
    weights = process.snr.clamp(max=debiased_cap if debiased_cap else math.inf) ** -0.5
    return _from_unbounded(weights, process, prediction_type, "debiased", 0.0)


def cosmap(process: NoiseProcess, prediction_type: str) -> Tensor:
    """SD3's cosmap (Esser et al. 2024, eq. 21): ``2 / (pi - 2 pi s + 2 pi s^2)`` on the error of the flow's velocity, at flow time s.

    A step of another process stands for the flow time of its SNR; the velocity's error is the noise's over ``1 - s``.

    Raises:
        UserError: the weight is infinite under epsilon on a process that ends without signal.
    """
    return _on_velocity(_cosmap, process, prediction_type, "cosmap")


def cosmap_image(process: NoiseProcess, prediction_type: str) -> Tensor:
    """The numbers of `cosmap` on the image's error, as diffusers' SD3 scripts have them with ``--precondition_outputs``.

    Raises:
        UserError: the weight is infinite under epsilon on a process that ends without signal.
    """
    return _on_velocity(lambda flow_time: flow_time**2 * _cosmap(flow_time), process, prediction_type, "cosmap_image")


def sigma_sqrt(process: NoiseProcess, prediction_type: str) -> Tensor:
    """What diffusers' SD3 scripts call so: ``1 / s^2`` on the error of the flow's velocity, at flow time s.

    With their ``--precondition_outputs`` it is on the image's error, which makes it `none`.

    Raises:
        UserError: the weight is infinite under epsilon on a process that ends without signal.
    """
    return _on_velocity(lambda flow_time: flow_time**-2, process, prediction_type, "sigma_sqrt")


def image(process: NoiseProcess, prediction_type: str) -> Tensor:
    """One on the image's error, whatever is predicted: ``1 / SNR`` on the noise's, ``s^2`` on that of the flow's velocity.

    As diffusers' SD3 scripts have it with ``--precondition_outputs``.

    Raises:
        UserError: the weight is infinite under epsilon on a process that ends without signal.
    """
    return _from_unbounded(1 / process.snr, process, prediction_type, "image", 1.0)


def edm(process: NoiseProcess, prediction_type: str, *, edm_sigma_data: float = 0.5) -> Tensor:
    """EDM's (Karras et al. 2022, table 1): ``(sigma^2 + d^2) / (sigma d)^2`` on the image's error.

    So ``1 + sigma^2 / d^2`` on the noise's. Sigma is the noise's deviation over the signal's coefficient.

    Args:
        process: the noise process.
        prediction_type: what the network predicts.
        edm_sigma_data: d, the data's standard deviation, above 0.

    Raises:
        UserError: d is not above 0, or the weight is infinite under epsilon on a process that ends without signal.
    """
    if not 0 < edm_sigma_data < math.inf:
        raise UserError(f"`edm_sigma_data` {edm_sigma_data:g} is out of range: it must be above 0")
    weights = 1 + (-process.log_snr).exp() / edm_sigma_data**2
    return _from_unbounded(weights, process, prediction_type, "edm", 1 / edm_sigma_data**2)


def snr(process: NoiseProcess, prediction_type: str) -> Tensor:
    """One on the noise's error, whatever is predicted: SNR under sample, SNR / (SNR + 1) under v_prediction.

    Under sample this is the weighting of diffusers' unconditional example.
    """
    if prediction_type == "sample":
        check_prediction_type(process.kind, prediction_type)
        return process.diffusers_snr.cpu().double()  # the example's own fp32 rounding, so that runs agree bit by bit
    return from_epsilon(torch.ones_like(process.alpha_bar), process, prediction_type)


def p2(process: NoiseProcess, prediction_type: str, *, p2_k: float = 1.0, p2_gamma: float = 1.0) -> Tensor:
    """P2 (Choi et al. 2022): ``1 / (k + SNR)^gamma`` on the noise's error.

    Raises:
        UserError: k or gamma is negative, or k is 0 on a process that ends without signal.
    """
    if not 0 <= p2_k < math.inf:
        raise UserError(f"`p2_k` {p2_k:g} is out of range: it must be at least 0")
    if not 0 <= p2_gamma < math.inf:
        raise UserError(f"`p2_gamma` {p2_gamma:g} is out of range: it must be at least 0")
    if p2_k == 0 and bool((process.snr == 0).any()):
        raise UserError("`p2_k` 0 divides by zero on this noise process, which ends without signal: give a `p2_k` above 0")
    return from_epsilon((p2_k + process.snr) ** -p2_gamma, process, prediction_type)


def velocity(process: NoiseProcess, prediction_type: str, *, velocity_cap: float = 10.0) -> Tensor:
    """``min(1 / alpha_bar, cap)`` on the noise's error: one on the velocity's, with an end to how much more the noisiest levels cost.

    Without the cap it is 1 under v_prediction. Under epsilon it gives the noisiest levels the weight that the plain loss takes from them.

    Raises:
        UserError: the cap is below 1.
    """
    if not 1 <= velocity_cap < math.inf:
        raise UserError(f"`velocity_cap` {velocity_cap:g} is out of range: it must be at least 1")
    return from_epsilon((1 / process.alpha_bar).clamp(max=velocity_cap), process, prediction_type)


LOSS_WEIGHTINGS: dict[str, Callable[..., Tensor]] = {
    "none": none,
    "change_aware": change_aware,
    "change_aware_released": change_aware_released,
    "min_snr": min_snr,
    "snr": snr,
    "p2": p2,
    "velocity": velocity,
    "soft_min_snr": soft_min_snr,
    "min_snr_released": min_snr_released,
    "debiased": debiased,
    "cosmap": cosmap,
    "cosmap_image": cosmap_image,
    "sigma_sqrt": sigma_sqrt,
    "image": image,
    "edm": edm,
}


def loss_weights(name: str, process_or_scheduler: Any, prediction_type: str, **options: Any) -> LossWeights:
    """The named weighting of `LOSS_WEIGHTINGS` on the squared error of ``prediction_type``, with the weighting's own options.

    Args:
        name: a key of `LOSS_WEIGHTINGS`.
        process_or_scheduler: a `NoiseProcess` or a diffusers scheduler.
        prediction_type: "epsilon", "sample", "v_prediction" or "flow_prediction".
        **options: the weighting's options.

    Returns:
        the weights, float64, on the CPU.

    Raises:
        UserError: a name or an option is unknown (the known ones are listed), an option is out of range, or the process and the prediction
            type do not go together.
    """
    process = as_process(process_or_scheduler)
    check_prediction_type(process.kind, prediction_type)
    vector = build_choice(LOSS_WEIGHTINGS, "loss_weights", name, process, prediction_type, **options)
    return LossWeights(vector, process.log_snr, process.kind)


def _cosmap(flow_time: Tensor) -> Tensor:
    """SD3's eq. 21."""
    return 2 / (math.pi * (1 - 2 * flow_time + 2 * flow_time**2))


def _on_velocity(weight: Callable[[Tensor], Tensor], process: NoiseProcess, prediction_type: str, name: str) -> Tensor:
    """Weights on the error of the flow's velocity, which is the noise's over ``1 - s``, as a function of flow time s, finite at 1."""
    flow_time = 1 / (1 + process.snr.sqrt())
    at_the_end = float(weight(torch.ones((), dtype=torch.float64, device="cpu")))
    return _from_unbounded(weight(flow_time) / (1 - flow_time) ** 2, process, prediction_type, name, at_the_end)


def _from_unbounded(weights: Tensor, process: NoiseProcess, prediction_type: str, name: str, without_signal: float) -> Tensor:
    """`from_epsilon` of weights that are infinite where no signal is left; under other types there is a limit there.

    Raises:
        UserError: epsilon is trained there.
    """
    ends = process.snr == 0
    if prediction_type == "epsilon" and bool(ends.any()):
        raise UserError(
            f"loss_weights({name!r}) is infinite under `prediction_type` epsilon on a noise process that ends without signal: predict "
            "something else"
        )
    return torch.where(ends, without_signal, from_epsilon(weights, process, prediction_type))


def _change_aware(process: NoiseProcess, change_aware_lambda: float) -> Tensor:
    """The weights on the noise's error, float64 [T]."""
    if not 0.5 <= change_aware_lambda <= 1:
        raise UserError(f"`change_aware_lambda` {change_aware_lambda:g} is out of range: it must be from 0.5 to 1")
    rate = process.change_rate()
    most, least = min(1.0, float(rate.max())), max(0.0, float(rate.min()))
    if not most > least:
        raise UserError("loss_weights('change_aware') needs a noise process whose rate of change varies: this one's is constant")
    return (1 - change_aware_lambda) + (2 * change_aware_lambda - 1) * (rate - least) / (most - least)
