"""The noise process: how much of the image and how much of the noise there is at each of the T training timesteps.

Every diffusers training scheduler in scope reduces to three vectors over T: the signal's coefficient, the noise's coefficient and the
time that the network is told. Timestep laws (`timesteps`) and loss weights (`weighting`) are functions of these vectors.

Indices are diffusers' 0-based ones, from least to most noise, for every process: index i is step t = i + 1 of the papers. (Flow-matching
papers write x_0 for noise; here ``x0`` is data.)
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from immiscible.errors import UserError

PREDICTION_TYPES: dict[str, tuple[str, ...]] = {"ddpm": ("epsilon", "sample", "v_prediction"), "flow": ("flow_prediction",)}


BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")


@dataclass(frozen=True, eq=False)
class NoiseProcess:
    """``xt = signal[t] * x0 + noise[t] * n`` over T timesteps, with what training derives from it.

    Args:
        kind: "ddpm" (variance preserving, read from betas) or "flow" (straight lines from data to noise).
        signal: the image's coefficient, fp32 [T].
        noise: the noise's coefficient, fp32 [T]; its square is the noise's variance.
        model_time: what the network is told [T]: int64 0..T-1 ("ddpm") or the scheduler's fp32 timesteps ("flow").
        alpha_bar: SNR / (1 + SNR), float64 [T], on the CPU. For "ddpm" this is the papers' alpha-bar. For "flow" it is that of the
            variance-preserving process of equal SNR for data of unit variance: SpeeD gives no rule for flow matching, this one is ours.
        diffusers_snr: signal-to-noise ratio, fp32 [T], rounded as the diffusers examples round it.
    """

    kind: Literal["ddpm", "flow"]
    signal: Tensor
    noise: Tensor
    model_time: Tensor
    alpha_bar: Tensor
    diffusers_snr: Tensor

    @classmethod
    def from_scheduler(cls, scheduler: Any) -> NoiseProcess:
        """Reads a diffusers scheduler that has betas (DDPM, DDIM, PNDM, ...) or a `FlowMatchEulerDiscreteScheduler`.

        Raises:
            UserError: the scheduler is of neither kind.
        """
        betas, alphas_cumprod = getattr(scheduler, "betas", None), getattr(scheduler, "alphas_cumprod", None)
        if isinstance(betas, Tensor) and isinstance(alphas_cumprod, Tensor) and not _config_value(scheduler, "use_flow_sigmas"):
            return cls._from_betas(betas.cpu(), alphas_cumprod.cpu().float())
        if _is_flow_match_euler(scheduler):
            # Built anew from its config: a scheduler that has sampled holds the few sigmas of its last sampling run. The config's private
            # note of default values is left out, because diffusers counts positional arguments as defaults and would drop them.
            fresh = type(scheduler).from_config({key: value for key, value in scheduler.config.items() if key != "_use_default_values"})
            return cls._from_sigmas(fresh.sigmas.flip(0), fresh.timesteps.flip(0))
        raise UserError(
            f"{type(scheduler).__name__} gives no noise process to train on: use a scheduler with betas, such as DDPMScheduler, "
            "or FlowMatchEulerDiscreteScheduler"
        )

    @classmethod
    def _from_betas(cls, betas: Tensor, alphas_cumprod: Tensor) -> NoiseProcess:
        return cls(
            kind="ddpm",
            signal=alphas_cumprod**0.5,
            noise=(1 - alphas_cumprod) ** 0.5,
            model_time=torch.arange(len(betas)),
            # Not from the fp32 product: its last digits are lost where laws and weights divide by it.
            alpha_bar=(1 - betas.double()).cumprod(0),
            diffusers_snr=alphas_cumprod / (1 - alphas_cumprod),
        )

    @classmethod
    def _from_sigmas(cls, sigmas: Tensor, timesteps: Tensor) -> NoiseProcess:
        signal, exact = 1.0 - sigmas, sigmas.double()
        return cls(
            kind="flow",
            signal=signal,
            noise=sigmas,
            model_time=timesteps,
            alpha_bar=(1 - exact) ** 2 / ((1 - exact) ** 2 + exact**2),
            diffusers_snr=signal**2 / sigmas**2,
        )

    @property
    def num_timesteps(self) -> int:
        """T."""
        return len(self.alpha_bar)

    @property
    def snr(self) -> Tensor:
        """Signal-to-noise ratio for data of unit variance, float64 [T]."""
        return self.alpha_bar / (1 - self.alpha_bar)

    def to(self, device: torch.device | str) -> NoiseProcess:
        """The same process with the vectors that a batch needs on ``device``.

        ``alpha_bar`` stays on the CPU: laws and weights are computed from it once, and some accelerators have no float64.
        """
        return replace(
            self,
            signal=self.signal.to(device),
            noise=self.noise.to(device),
            model_time=self.model_time.to(device),
            diffusers_snr=self.diffusers_snr.to(device),
        )

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """``signal[t] * x0 + noise[t] * n``, in fp32 whatever comes in; bit-equal to diffusers on fp32 input.

        Args:
            x0: images or latents [B, ...], any floating dtype.
            noise: standard normal, of x0's shape.
            t: int64 [B], indices in [0, T).

        Returns:
            fp32, of x0's shape. (diffusers first casts alpha-bar to x0's dtype: in bf16 the first steps then get no noise at all.)
        """
        return _at(self.signal, t, x0) * x0.float() + _at(self.noise, t, x0) * noise.float()

    def target(self, x0: Tensor, noise: Tensor, t: Tensor, prediction_type: str) -> Tensor:
        """What the network is to predict, fp32, of x0's shape.

        epsilon: n; sample: x0; v_prediction: ``signal[t] * n - noise[t] * x0`` (Salimans & Ho 2022, diffusers' `get_velocity`);
        flow_prediction: ``n - x0``, the velocity of the straight line (diffusers' SD3 examples).

        Raises:
            UserError: the process cannot be trained with this prediction type.
        """
        check_prediction_type(self.kind, prediction_type)
        x0, noise = x0.float(), noise.float()
        if prediction_type == "epsilon":
            return noise
        if prediction_type == "sample":
            return x0
        if prediction_type == "v_prediction":
            return _at(self.signal, t, x0) * noise - _at(self.noise, t, x0) * x0
        return noise - x0

    def predict_x0(self, xt: Tensor, output: Tensor, t: Tensor, prediction_type: str) -> Tensor:
        """The image that a network's ``output`` at ``xt`` stands for: the inverse of `target`, fp32, of xt's shape.

        Under epsilon it is divided by ``signal[t]``, hence infinite where a schedule ends with no signal at all.

        Raises:
            UserError: the process cannot be trained with this prediction type.
        """
        check_prediction_type(self.kind, prediction_type)
        xt, output = xt.float(), output.float()
        if prediction_type == "sample":
            return output
        signal, noise = _at(self.signal, t, xt), _at(self.noise, t, xt)
        if prediction_type == "epsilon":
            return (xt - noise * output) / signal
        if prediction_type == "v_prediction":
            return signal * xt - noise * output
        return xt - noise * output

    def change_rate(self) -> Tensor:
        """How fast the noise's share grows: d(1 - alpha_bar)/dt per index, float64 [T], central differences as `numpy.gradient`.

        SpeeD's derivative of the increments' variance bound (theorem 1 and section 3.3) up to a factor of two.
        """
        if self.num_timesteps == 1:
            return torch.zeros_like(self.alpha_bar)
        return torch.gradient(1 - self.alpha_bar)[0]

    def convergence_step(self, r: float) -> int:
        """SpeeD's tau without its closed form: the first step t with alpha_bar <= 1/r, so that at most 1/r of the image's variance is left.

        It is the paper's 1-based t, which is also a count: indices 0..tau-1 come up to it and index tau is the first one beyond.
        On diffusers' linear schedule r = 143.55 gives the released code's tau = 700.

        Raises:
            UserError: r is not above 1, or the process never gets there.
        """
        if not r > 1:
            raise UserError(f"--asymmetric_r {r:g} is out of range: it divides the image's variance, so it must be above 1")
        reached = (self.alpha_bar <= 1 / r).nonzero()
        if len(reached) == 0:
            raise UserError(
                f"--asymmetric_r {r:g} is never reached by this noise process: give at most {_floor(1 / float(self.alpha_bar[-1])):g}, "
                "or name the step with --asymmetric_tau"
            )
        return int(reached[0]) + 1

    def peak_step(self) -> int:
        """The index at which `change_rate` is largest: the border of SpeeD's acceleration and deceleration areas."""
        return int(self.change_rate().argmax())

    def areas(self, tau: int) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
        """SpeeD's acceleration, deceleration and convergence areas as ``(start, stop)`` index ranges that tile 0..T.

        Convergence always starts at ``tau``; where that comes before the peak, there is no deceleration area.
        """
        peak = min(self.peak_step(), tau)
        return (0, peak), (peak, tau), (tau, self.num_timesteps)


def as_process(process_or_scheduler: Any) -> NoiseProcess:
    """A `NoiseProcess` as it is, a diffusers scheduler read by `NoiseProcess.from_scheduler`."""
    if isinstance(process_or_scheduler, NoiseProcess):
        return process_or_scheduler
    return NoiseProcess.from_scheduler(process_or_scheduler)


def check_prediction_type(noise_process: str, prediction_type: str) -> None:
    """Allows only the pairs that plain diffusers pipelines can sample.

    Raises:
        UserError: ``noise_process`` is unknown or does not go with ``prediction_type``.
    """
    if noise_process not in PREDICTION_TYPES:
        raise UserError(f"--noise_process {noise_process!r} is unknown; known: {', '.join(PREDICTION_TYPES)}")
    allowed = PREDICTION_TYPES[noise_process]
    if prediction_type not in allowed:
        raise UserError(
            f"--noise_process {noise_process} needs --prediction_type {' or '.join(allowed)}, not {prediction_type!r}: "
            "plain diffusers could not sample anything else"
        )


def _at(vector: Tensor, t: Tensor, like: Tensor) -> Tensor:
    """``vector[t]`` as fp32 [B, 1, ...] on the device of ``like`` [B, ...]."""
    return vector.to(like.device)[t.to(like.device)].view(-1, *[1] * (like.ndim - 1))


def _config_value(scheduler: Any, name: str) -> Any:
    return getattr(getattr(scheduler, "config", None), name, None)


def _is_flow_match_euler(scheduler: Any) -> bool:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return isinstance(scheduler, FlowMatchEulerDiscreteScheduler)


def _floor(value: float) -> float:
    """Rounded down to four digits, so that the value a message recommends is one that works."""
    unit = 10.0 ** (len(str(int(value))) - 4)
    return value // unit * unit
