"""The noise process: how much of the image and how much of the noise there is at each of the T training timesteps.

Every diffusers training scheduler in scope reduces to three vectors over T: the signal's coefficient, the noise's coefficient and the
time that the network is told. Timestep laws (`timesteps`) and loss weights (`weighting`) are functions of these vectors.

Indices are 0-based, from least to most noise, for every process: index i is step t = i + 1 of the papers. With betas this is diffusers'
timestep; its flow and EDM schedulers list their noise levels from most to least instead: `NoiseProcess.levels` gives their index.
(Flow-matching papers write x_0 for noise; here ``x0`` is data.)
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from immiscible.errors import UserError
from immiscible.randomness import Draws

PREDICTION_TYPES: dict[str, tuple[str, ...]] = {"ddpm": ("epsilon", "sample", "v_prediction"), "flow": ("flow_prediction",)}
EDM_PREDICTION_TYPES = ("epsilon", "sample")  # of loops with a scheduler of their own; the scripts train the kinds above
PRECONDITIONED = "preconditioned"  # the kind of the processes in `immiscible.edm`, and what a network predicts there

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "quadratic")

EDM_SCHEDULERS = {"EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"}


class NoiseLevels(NamedTuple):
    """Noise levels in the three forms in which training loops want them, a row for each image.

    Args:
        sigma: fp32, the noise level as schedulers of this kind write it; see `NoiseProcess.sigma`.
        time: what the network is told, [n]: `NoiseProcess.model_time`, or an fp32 value between two of its entries.
        index: int64 [n], where diffusers' scheduler holds the level in ``timesteps`` and ``sigmas`` as it is after its construction (flow
            and EDM, from most noise to least) or in ``alphas_cumprod`` (with betas, from least to most).
    """

    sigma: Tensor
    time: Tensor
    index: Tensor  # type: ignore[assignment]  # a tuple's method of that name is not missed


@dataclass(frozen=True, eq=False, repr=False)
class NoiseProcess:
    """``xt = signal[t] * x0 + noise[t] * n`` over T timesteps, with what training derives from it.

    Args:
        kind: "ddpm" (variance preserving, read from betas), "flow" (straight lines from data to noise, ``(1 - sigma) x0 + sigma n``) or
            "edm" (variance exploding, ``x0 + sigma n``; Karras et al. 2022), or "preconditioned" (`immiscible.edm.SigmaProcess`).
        signal: the image's coefficient, fp32 [T].
        noise: the noise's coefficient, fp32 [T]; its square is the noise's variance.
        model_time: what the network is told [T]: int64 0..T-1 ("ddpm") or the scheduler's fp32 timesteps ("flow"; "edm": ln(sigma) / 4).
        alpha_bar: SNR / (1 + SNR), float64 [T], on the CPU. For "ddpm" this is the papers' alpha-bar. For the others it is that of the
            variance-preserving process of equal SNR for data of unit variance: SpeeD gives no rule for them, this one is ours.
        diffusers_snr: signal-to-noise ratio, fp32 [T], rounded as the diffusers examples round it.
    """

    kind: Literal["ddpm", "flow", "edm", "preconditioned"]
    signal: Tensor
    noise: Tensor
    model_time: Tensor
    alpha_bar: Tensor
    diffusers_snr: Tensor

    @classmethod
    def from_scheduler(cls, scheduler: Any) -> NoiseProcess:
        """Reads a diffusers scheduler, or anything with the same attributes; diffusers itself is not imported.

        Known are schedulers with betas (DDPM, DDIM, PNDM, Euler, ...), `FlowMatchEulerDiscreteScheduler`, those with betas that are
        configured by ``use_flow_sigmas`` for a flow network (DPMSolverMultistep, UniPC, ...; T levels of shift ``flow_shift``), and
        `EDMEulerScheduler` and `EDMDPMSolverMultistepScheduler` (from sigma_min to sigma_max, Karras or exponential). What a scheduler
        does for sampling, such as Karras sigmas on betas or a number of inference steps, does not matter.

        Raises:
            UserError: the scheduler is of none of these kinds.
        """
        names = {base.__name__ for base in type(scheduler).__mro__}
        if "FlowMatchEulerDiscreteScheduler" in names:
            fresh = _built_anew(scheduler)
            return cls._from_flow_sigmas(fresh.sigmas.flip(0), fresh.timesteps.flip(0))
        if names & EDM_SCHEDULERS:
            fresh = _built_anew(scheduler)  # sigmas end with the 0 that sampling ends at
            return cls._from_edm_sigmas(fresh.sigmas[: len(fresh.timesteps)].flip(0), fresh.timesteps.flip(0))
        if _config_value(scheduler, "use_flow_sigmas"):
            steps = int(_config_value(scheduler, "num_train_timesteps"))
            shift = 1.0 if _config_value(scheduler, "use_dynamic_shifting") else float(_config_value(scheduler, "flow_shift") or 1)
            times = torch.arange(1, steps + 1, dtype=torch.float32, device="cpu") / steps
            sigmas = shift * times / (1 + (shift - 1) * times)
            return cls._from_flow_sigmas(sigmas, sigmas * steps)
        betas, alphas_cumprod = getattr(scheduler, "betas", None), getattr(scheduler, "alphas_cumprod", None)
        if isinstance(betas, Tensor) and isinstance(alphas_cumprod, Tensor):
            return cls._from_betas(betas.cpu(), alphas_cumprod.cpu().float())
        raise UserError(
            f"{type(scheduler).__name__} gives no noise process to train on: use a scheduler with betas, such as DDPMScheduler, "
            "FlowMatchEulerDiscreteScheduler, or an EDM scheduler"
        )

    @classmethod
    def _from_betas(cls, betas: Tensor, alphas_cumprod: Tensor) -> NoiseProcess:
        return cls(
            kind="ddpm",
            signal=alphas_cumprod**0.5,
            noise=(1 - alphas_cumprod) ** 0.5,
            model_time=torch.arange(len(betas), device="cpu"),
            # Not from the fp32 product: its last digits are lost where laws and weights divide by it.
            alpha_bar=(1 - betas.double()).cumprod(0),
            diffusers_snr=alphas_cumprod / (1 - alphas_cumprod),
        )

    @classmethod
    def _from_flow_sigmas(cls, sigmas: Tensor, timesteps: Tensor) -> NoiseProcess:
        signal, exact = 1.0 - sigmas, sigmas.double()
        return cls(
            kind="flow",
            signal=signal,
            noise=sigmas,
            model_time=timesteps,
            alpha_bar=(1 - exact) ** 2 / ((1 - exact) ** 2 + exact**2),
            diffusers_snr=signal**2 / sigmas**2,
        )

    @classmethod
    def _from_edm_sigmas(cls, sigmas: Tensor, timesteps: Tensor) -> NoiseProcess:
        return cls(
            kind="edm",
            signal=torch.ones_like(sigmas),
            noise=sigmas,
            model_time=timesteps,
            alpha_bar=1 / (1 + sigmas.double() ** 2),
            diffusers_snr=1 / sigmas**2,
        )

    def __repr__(self) -> str:
        return f"NoiseProcess({self.kind}, {self.num_timesteps} timesteps)"

    @property
    def num_timesteps(self) -> int:
        """T."""
        return len(self.alpha_bar)

    @property
    def snr(self) -> Tensor:
        """Signal-to-noise ratio for data of unit variance, float64 [T]."""
        return self.alpha_bar / (1 - self.alpha_bar)

    @property
    def sigma(self) -> Tensor:
        """The noise level as diffusers' schedulers of this kind write it, fp32 [T], increasing, on the CPU.

        "flow": the flow time s of ``(1 - s) x0 + s n``. "edm": the standard deviation of the noise in ``x0 + sigma n``. "ddpm":
        ``sqrt((1 - alpha_bar) / alpha_bar)``, that of xt divided by the signal, as in k-diffusion and diffusers' Euler schedulers; infinite
        where no signal is left.
        """
        if self.kind == "ddpm":
            return ((1 - self.alpha_bar) / self.alpha_bar).sqrt().float()
        return self.noise.cpu()

    @property
    def log_snr(self) -> Tensor:
        """The logarithm of the SNR of data of unit variance, by which `LossWeights.at` finds a sigma: float64 [T], decreasing."""
        return self.snr.log()

    def levels(self, t: Tensor, within: Tensor | None = None) -> NoiseLevels:
        """The noise levels of indices ``t`` in the scheduler's own terms.

        Args:
            t: int64 [n], in [0, T).
            within: None for the levels themselves. Float64 [n] in [0, 1): where between the midpoints to its neighbors, in terms of the
                index, each level lies instead; the first and the last level are never exceeded. Between two levels sigma is linear
                ("flow"), log sigma is ("edm") or alpha_bar is ("ddpm").

        Returns:
            on the CPU; sigma [n].
        """
        t = t.cpu()
        index = t if self.kind == "ddpm" else self.num_timesteps - 1 - t
        if within is None:
            return NoiseLevels(self.sigma[t], self.model_time.cpu()[t], index)
        last = self.num_timesteps - 1
        start, stop = (t.double() - 0.5).clamp(min=0), (t.double() + 0.5).clamp(max=last)
        position = start + (stop - start) * within.cpu()
        if self.kind == "ddpm":
            alpha_bar = _interpolated(self.alpha_bar, position)
            return NoiseLevels(((1 - alpha_bar) / alpha_bar).sqrt().float(), position.float(), index)
        time = _interpolated(self.model_time.cpu().double(), position).float()
        exact = self.noise.cpu().double()
        sigma = _interpolated(exact.log(), position).exp() if self.kind == "edm" else _interpolated(exact, position)
        return NoiseLevels(sigma.float(), time, index)

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
        return rows_at(self.signal, t, x0) * x0.float() + rows_at(self.noise, t, x0) * noise.float()

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
            return rows_at(self.signal, t, x0) * noise - rows_at(self.noise, t, x0) * x0
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
        signal, noise = rows_at(self.signal, t, xt), rows_at(self.noise, t, xt)
        if prediction_type == "epsilon":
            return (xt - noise * output) / signal
        if prediction_type == "v_prediction":
            return signal * xt - noise * output
        return xt - noise * output

    def noise_error(self, prediction_type: str) -> Tensor:
        """What a squared error of one in the network's output is as one of the noise, at a given xt: float64 [T], on the CPU.

        1 (epsilon), SNR (sample), signal^2 = SNR / (SNR + 1) (v_prediction), and signal^2 (flow_prediction, where n = xt + (1 - sigma) f).

        Raises:
            UserError: the process cannot be trained with this prediction type.
        """
        check_prediction_type(self.kind, prediction_type)
        if prediction_type == "epsilon":
            return torch.ones_like(self.alpha_bar)
        if prediction_type == "sample":
            return self.snr
        return self.alpha_bar if prediction_type == "v_prediction" else self.signal.cpu().double() ** 2

    def drawn(self, t: Tensor, draws: Draws) -> tuple[NoiseProcess, Tensor]:
        """The process of a micro-batch and where its images stand in it: of a process of T levels, itself and ``t``.

        One of a continuum of levels has, by ``draws``, one for each image.
        """
        return self, t

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
            raise UserError(f"`asymmetric_r` {r:g} is out of range: it divides the image's variance, so it must be above 1")
        reached = (self.alpha_bar <= 1 / r).nonzero()
        if len(reached) == 0:
            raise UserError(
                f"`asymmetric_r` {r:g} is never reached by this noise process: give at most {_floor(1 / float(self.alpha_bar[-1])):g}, "
                "or name the step by `asymmetric_tau`"
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


def check_prediction_type(kind: str, prediction_type: str) -> None:
    """Allows only what the kind of noise process can be trained for; "ddpm" and "flow" only what plain diffusers pipelines can sample.

    Raises:
        UserError: ``kind`` is unknown or does not go with ``prediction_type``.
    """
    known = {**PREDICTION_TYPES, "edm": EDM_PREDICTION_TYPES, PRECONDITIONED: (PRECONDITIONED,)}
    if kind not in known:
        raise UserError(f"the noise process {kind!r} is unknown; known: {', '.join(known)}")
    if prediction_type not in known[kind]:
        reason = ": plain diffusers could not sample anything else" if kind in PREDICTION_TYPES else ""
        raise UserError(f"the noise process {kind!r} needs `prediction_type` {' or '.join(known[kind])}, not {prediction_type!r}{reason}")


def rows_at(vector: Tensor, t: Tensor, like: Tensor) -> Tensor:
    """``vector[t]`` as fp32 [B, 1, ...] on the device of ``like`` [B, ...]."""
    return vector.to(like.device)[t.to(like.device)].view(-1, *[1] * (like.ndim - 1))


def _config_value(scheduler: Any, name: str) -> Any:
    return getattr(getattr(scheduler, "config", None), name, None)


def _built_anew(scheduler: Any) -> Any:
    """The scheduler as its config describes it: one that has sampled holds the few noise levels of its last sampling run.

    The config's private note of default values is left out, because diffusers counts positional arguments as defaults and would drop them.
    """
    settings = {key: value for key, value in scheduler.config.items() if key != "_use_default_values"}
    with torch.device("cpu"):  # whatever the caller's default
        return type(scheduler).from_config(settings)


def _interpolated(vector: Tensor, position: Tensor) -> Tensor:
    """A float64 vector [T] at fractional indices float64 [n], in [0, T - 1]."""
    left = position.long()
    return torch.lerp(vector[left], vector[(left + 1).clamp(max=len(vector) - 1)], position - left)


def _floor(value: float) -> float:
    """Rounded down to four digits, so that the value a message recommends is one that works."""
    unit = 10.0 ** (len(str(int(value))) - 4)
    return value // unit * unit
