"""What draws timesteps: from one law, from laws that change with the optimizer step, or from one that follows the losses.

The laws themselves are in `timesteps`. Whatever a sampler is, a run asks it twice in a step: `TimestepSampler.at` for the law of the step,
which may be asked ahead on another thread, and `TimestepSampler.settled` with the losses that came of it. Most do nothing in either.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from immiscible.errors import UserError
from immiscible.process import NoiseLevels, NoiseProcess

LAG = 2  # steps until a law may depend on a loss: while a step trains, the next one's timesteps are already drawn


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
        return f"{type(self).__name__}({len(self.probabilities)} timesteps, moves {self.moved_share():.1%} of the draws{reflected})"

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

    def at(self, step: int) -> TimestepSampler:
        """The sampler of an optimizer step, counted from 0: this one, where the law stays the same."""
        return self

    def settled(self, step: int, t: Tensor, loss: Tensor) -> Tensor:
        """The losses to take the mean of, fp32 [B]: as they are, unless the law goes by them.

        Args:
            step: the optimizer step; every rank calls this once for each of its micro-batches.
            t: the timesteps, int64 [B].
            loss: of each image, fp32 [B].
        """
        return loss

    def mapped(self, change: Callable[[Tensor], Tensor]) -> TimestepSampler:
        """The sampler whose laws are what ``change`` makes of them.

        Raises:
            UserError: draws are reflected, which another law does not know of.
        """
        if self.reflect_at is not None:
            raise UserError("`timestep_shift` does not go with reflected draws: use timestep_sampler('asymmetric')")
        return replace(self, probabilities=change(self.probabilities))

    @property
    def history(self) -> LossHistory | None:
        """What the law must remember for a run that goes on; None for a law that does not go by losses."""
        return None

    @property
    def course(self) -> str:
        """What becomes of the law in a run, in words; empty where it stays the same."""
        return ""

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


@dataclass(frozen=True, eq=False, repr=False)
class RampedSampler(TimestepSampler):
    """A law that turns into another one in a straight line: ``(1 - g) probabilities + g target``, ``g = min(step / ramp_steps, 1)``.

    Asked without a step it is the law of step 0.

    Args:
        target: the law from ``ramp_steps`` on, float64 [T].
        ramp_steps: optimizer steps until it is reached, at least 1.

    Raises:
        UserError: either is no law.
    """

    target: Tensor = field(kw_only=True)
    ramp_steps: int = field(kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        TimestepSampler(self.target)

    def at(self, step: int) -> TimestepSampler:
        """See `TimestepSampler.at`."""
        share = min(step / self.ramp_steps, 1.0)
        return TimestepSampler((1 - share) * self.probabilities + share * self.target, process=self.process)

    def mapped(self, change: Callable[[Tensor], Tensor]) -> TimestepSampler:
        """See `TimestepSampler.mapped`."""
        return replace(self, probabilities=change(self.probabilities), target=change(self.target))

    @property
    def course(self) -> str:
        """See `TimestepSampler.course`."""
        ends = [self.moved_share(), TimestepSampler(self.target).moved_share()]
        return f"moves {100 * ends[0]:.1f} to {100 * ends[1]:.1f} % of the draws over {self.ramp_steps:,} optimizer steps"


@dataclass(frozen=True, eq=False, repr=False)
class TwoPhases(TimestepSampler):
    """One law for the first part of training, another after: curriculum sampling (arXiv 2603.12517) of any two laws.

    Args:
        first: until the switch; asked without a step, this is it.
        second: from the switch on; its own steps are counted from there.
        switch: the first optimizer step of the second phase, at least 1.
    """

    first: TimestepSampler = field(kw_only=True)
    second: TimestepSampler = field(kw_only=True)
    switch: int = field(kw_only=True)

    @classmethod
    def of(cls, first: TimestepSampler, second: TimestepSampler, switch: int) -> TwoPhases:
        """Of two samplers of one process."""
        return cls(first.probabilities, first.reflect_at, first.process, first=first, second=second, switch=switch)

    def _phase(self, step: int) -> tuple[TimestepSampler, int]:
        return (self.first, step) if step < self.switch else (self.second, step - self.switch)

    def at(self, step: int) -> TimestepSampler:
        """See `TimestepSampler.at`."""
        sampler, own_step = self._phase(step)
        return sampler.at(own_step)

    def settled(self, step: int, t: Tensor, loss: Tensor) -> Tensor:
        """See `TimestepSampler.settled`."""
        sampler, own_step = self._phase(step)
        return sampler.settled(own_step, t, loss)

    @property
    def history(self) -> LossHistory | None:
        """See `TimestepSampler.history`."""
        return self.first.history or self.second.history


class LossHistory:
    """The last losses of each timestep, and the law that follows from them (Nichol and Dhariwal 2021, section 3.3).

    ``p_t ~ sqrt(mean of L_t^2)`` over the last ten losses, of which a thousandth is uniform; uniform altogether until every timestep has
    ten. That is IDDPM's code. One thing is ours: the law of step n knows the losses of the steps up to n - 2, with `--look_ahead` and
    without, because the timesteps of a step are drawn while the one before it trains. So a run that goes on from a checkpoint draws what
    it would have drawn. Losses of all ranks count, in the order of ranks, so that the law is the same on each.

    Args:
        num_timesteps: T.
        length: how many losses of a timestep count.
        uniform: the uniform law's share.
    """

    def __init__(self, num_timesteps: int, length: int = 10, uniform: float = 0.001) -> None:
        self.gather: Callable[[Tensor], Tensor] = lambda rows: rows  # over ranks, along the first dimension
        self._uniform = uniform
        self._losses = torch.zeros(num_timesteps, length, dtype=torch.float64, device="cpu")  # each row a ring
        self._counts = torch.zeros(num_timesteps, dtype=torch.int64, device="cpu")  # of all losses so far
        self._waiting: dict[int, list[Tensor]] = {}  # what later laws will know: timesteps and losses [N, 2] by step
        self._laws: dict[int, Tensor] = {}  # of the steps under way
        self._lock = Lock()

    def law(self, step: int) -> Tensor:
        """The law of an optimizer step, float64 [T]; steps are asked for in their order, each as often as one likes until two later."""
        with self._lock:
            if step not in self._laws:
                for known in sorted(each for each in self._waiting if each <= step - LAG):
                    self._add(torch.cat(self._waiting.pop(known)).cpu())
                under_way = {each: law for each, law in self._laws.items() if each >= step - LAG}
                self._laws = under_way | {step: self._probabilities()}
            return self._laws[step]

    def record(self, step: int, t: Tensor, loss: Tensor) -> None:
        """Takes the losses fp32 [B] of a micro-batch of timesteps int64 [B]; every rank calls it."""
        rows = self.gather(torch.stack([t.float(), loss.detach().float()], dim=1))
        with self._lock:
            self._waiting.setdefault(step, []).append(rows)

    def state_dict(self) -> dict[str, Any]:
        """Everything that the laws to come depend on."""
        with self._lock:
            waiting = {step: torch.cat(rows).cpu() for step, rows in self._waiting.items()}
            return {"losses": self._losses.clone(), "counts": self._counts.clone(), "waiting": waiting}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a `state_dict`."""
        with self._lock:
            self._losses, self._counts = state["losses"].clone(), state["counts"].clone()
            self._waiting = {int(step): [rows] for step, rows in state["waiting"].items()}
            self._laws = {}

    def _add(self, rows: Tensor) -> None:
        losses, counts, length = self._losses.numpy(), self._counts.numpy(), self._losses.shape[1]
        for t, loss in zip(rows[:, 0].long().tolist(), rows[:, 1].tolist(), strict=True):
            losses[t, counts[t] % length] = loss
            counts[t] += 1

    def _probabilities(self) -> Tensor:
        steps, length = self._losses.shape
        if bool((self._counts < length).any()):
            return torch.full_like(self._losses[:, 0], 1 / steps)
        weights = self._losses.square().mean(1).sqrt()
        return (1 - self._uniform) * weights / weights.sum() + self._uniform / steps


@dataclass(frozen=True, eq=False, repr=False)
class LossSampler(TimestepSampler):
    """The law of a `LossHistory`, and importance weights ``1 / (T p_t)`` on the losses, by which their mean stays that of uniform draws.

    Asked without a step it is uniform.

    Args:
        losses: shared with whatever keeps it in checkpoints.
    """

    losses: LossHistory = field(kw_only=True)

    def at(self, step: int) -> TimestepSampler:
        """See `TimestepSampler.at`."""
        return TimestepSampler(self.losses.law(step), process=self.process)

    def settled(self, step: int, t: Tensor, loss: Tensor) -> Tensor:
        """See `TimestepSampler.settled`: remembers the losses as they are, and returns them weighted."""
        self.losses.record(step, t, loss)
        return loss / (len(self.probabilities) * self.losses.law(step)).float().to(t.device)[t]

    def mapped(self, change: Callable[[Tensor], Tensor]) -> TimestepSampler:
        """See `TimestepSampler.mapped`.

        Raises:
            UserError: always.
        """
        raise UserError("`timestep_shift` is of laws that are given: one that follows the losses finds its own; leave it out")

    @property
    def history(self) -> LossHistory:
        """See `TimestepSampler.history`."""
        return self.losses

    @property
    def course(self) -> str:
        """See `TimestepSampler.course`."""
        return "follows the losses once every timestep has ten"
