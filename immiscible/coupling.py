"""Which noise belongs to which image: the joint law q(x0, noise) from which a training step draws its pairs.

A coupling is called as ``coupling(x0, noise=None, *, timesteps=None, labels=None, generator=None)`` and returns the noise of each
image, in x0's order, shape, dtype and device. With independent pairs the best prediction from pure noise points at the data's mean;
with a coupling it points at the mean weighted by q(x0 | noise), so that less of the first sampling steps is spent on averages
(Immiscible Diffusion, algorithm 1, read with its reviewers). To add one: a function or small dataclass with this call, and an entry
in `COUPLINGS`. One that gives images each other's noises says so by ``pairs_batch = True``, and can then be widened over a window; one that
carries something from batch to batch has ``state_dict`` and ``load_state_dict``; one that biases the noise a ``bias_notice``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from immiscible.assignment.conditions import CONDITIONS, centered, check_labels, conditioned_index
from immiscible.assignment.costs import check_names, cost_matrix
from immiscible.assignment.reservoir import ReservoirCoupling
from immiscible.assignment.solve import LARGEST_BLOCK, SOLVERS, assign, cost_dtype
from immiscible.choices import build_choice
from immiscible.errors import UserError

SCORES = ("l2", "dot")

TYPICAL_LENGTH = 0.55  # |x0| / sqrt(D) that `bias_notice` assumes: photographs scaled to [-1, 1] have about this


class Coupling(Protocol):
    """Anything that turns images and a pool of noises into one noise per image."""

    def __call__(
        self,
        x0: Tensor,
        noise: Tensor | None = None,
        *,
        timesteps: Tensor | None = None,
        labels: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """The noise of each image.

        Args:
            x0: images or latents [B, C, H, W], floating point, at the scale at which they are diffused.
            noise: the pool, standard normal, of x0's shape; drawn from ``generator`` if not given.
            timesteps: int64 [B], for couplings that act on some noise levels only.
            labels: for couplings that look at the condition: classes, int64 [B], or captions' pooled text states, floating [B, E].
            generator: for what the coupling draws itself, on x0's device; the global generator if not given.

        Returns:
            noise of x0's shape, dtype and device; ``result[i]`` is diffused into ``x0[i]`` and is its regression target too.
        """
        ...


class Stateless:
    """For couplings that carry nothing from batch to batch: what ``accelerator.register_for_checkpointing`` asks for."""

    def state_dict(self) -> dict[str, Tensor]:
        """Empty."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Nothing to restore.

        Raises:
            UserError: the state is another coupling's.
        """
        if state:
            raise UserError(f"{type(self).__name__} has no state, but {', '.join(state)} was saved: by another coupling")


@dataclass(frozen=True)
class IndependentCoupling(Stateless):
    """Plain diffusion: image i keeps noise i."""

    def __call__(
        self,
        x0: Tensor,
        noise: Tensor | None = None,
        *,
        timesteps: Tensor | None = None,
        labels: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """See `Coupling`."""
        return _drawn(x0, generator) if noise is None else noise


@dataclass
class AssignmentCoupling:
    """Immiscible Diffusion: the permutation of the batch's noises with the least summed distance to the images (algorithm 1).

    A permutation leaves the pool of noises as it is, so their marginal stays exactly standard normal. A batch of one has one
    permutation, the identity.

    Args:
        metric: ``l2`` (the paper), ``squared_l2`` or ``l1``.
        dtype: precision of the operands of the cost: ``float32``, ``float16`` or ``float8`` (the paper's quantized assignments),
            ``bfloat16``, ``int8`` or ``auto``; see `assign`.
        solver: ``exact``, ``auction``, ``auto`` or ``stable``; see `assign`.
        condition: what is done about the labels, so that the noise does not tell them: ``none``, ``within``, ``centered`` (experimental) or
            ``penalty``; see `immiscible.assignment.conditions`.
        condition_ratio: of ``penalty``, 0 to 1; see `penalty_weight`.
        state: what ``centered`` has learned of the conditions' means, empty otherwise. A call that changes it replaces it by a new mapping
            of new tensors, so one taken earlier stays as it was.
    """

    metric: str = "l2"
    dtype: str = "auto"
    solver: str = "auto"
    condition: str = "none"
    condition_ratio: float = 0.01
    state: Mapping[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)
    pairs_batch: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_names(self.metric, self.dtype)
        for argument, names in {"solver": SOLVERS, "condition": CONDITIONS}.items():
            if getattr(self, argument) not in names:
                raise UserError(f"`{argument}` {getattr(self, argument)!r} is unknown; known: {', '.join(names)}")
        if not 0 <= self.condition_ratio <= 1:
            raise UserError(f"`condition_ratio` must be from 0 to 1, not {self.condition_ratio}")

    def __call__(
        self,
        x0: Tensor,
        noise: Tensor | None = None,
        *,
        timesteps: Tensor | None = None,
        labels: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """See `Coupling`."""
        noise = _drawn(x0, generator) if noise is None else noise
        seen = self.cost_noise(noise)
        if self.condition == "none":
            return noise[assign(x0, seen, metric=self.metric, dtype=self.dtype, solver=self.solver)]
        labels = check_labels(labels, self.condition, len(x0))
        if self.condition == "centered":
            images, state = centered(x0, labels, self.state)
            index = assign(images, seen, metric=self.metric, dtype=self.dtype, solver=self.solver)
            self.state = state  # only now: a broken image raises above
            return noise[index]
        blocks = zip(x0.split(LARGEST_BLOCK), seen.split(LARGEST_BLOCK), labels.split(LARGEST_BLOCK), strict=True)
        return noise[torch.cat([LARGEST_BLOCK * number + self._conditioned(*block) for number, block in enumerate(blocks)])]

    def _conditioned(self, x0: Tensor, noise: Tensor, labels: Tensor) -> Tensor:
        """`conditioned_index` of at most `LARGEST_BLOCK` images."""
        for what, rows in (("image", x0), ("noise", noise)):
            length = torch.linalg.vector_norm(rows.detach().flatten(1).float(), dim=1)
            if not torch.isfinite(length).all():
                row = int((~torch.isfinite(length)).nonzero()[0])
                raise UserError(f"{what} {row} of the batch holds NaN, infinite or too large values; it has no distance")
        dtype = cost_dtype(self.dtype, self.solver, len(x0))
        cost = cost_matrix(x0.detach(), noise, metric=self.metric, dtype=dtype, whole=self.solver == "stable")
        return conditioned_index(cost, labels, self.condition, self.condition_ratio, self.solver)

    def cost_noise(self, noise: Tensor) -> Tensor:
        """What stands for the noises [N, ...] in the cost."""
        return noise

    def state_dict(self) -> dict[str, Tensor]:
        """`state`: ``mean`` and ``count`` of classes, ``gram`` and ``cross`` of text states, or nothing."""
        return dict(self.state)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Goes on from a `state_dict`.

        Raises:
            UserError: the state is another coupling's.
        """
        if set(state) not in (set(), {"mean", "count"}, {"gram", "cross"}):
            raise UserError(f"`condition` centered keeps mean and count, or gram and cross, but {', '.join(state)} was saved")
        self.state = dict(state)


@dataclass
class FlippedAssignmentCoupling(AssignmentCoupling):
    """The rebuttal's control: assign by the noises with their dimensions reversed, then use them unreversed.

    Images still get a noise of their own region of noise space (immiscible), but not a near one (no transport): the real distance
    falls by less than one per cent. What it gains over independent pairs is due to immiscibility alone.
    """

    def cost_noise(self, noise: Tensor) -> Tensor:
        """See `AssignmentCoupling.cost_noise`."""
        return noise.flatten(1).flip(1).view_as(noise)


@dataclass(frozen=True)
class NearestCoupling(Stateless):
    """Each image takes the best of k candidate noises (Improved Immiscible Diffusion, arXiv 2505.18521, algorithm 1).

    Needs no batch, but biases the marginal: ``l2`` picks short noises (variance 0.95 at D=3072, k=64), ``dot`` keeps their length and
    aligns more; both tilt the pool along the data's main directions (`bias_notice` says by how much). The first candidate is the given
    noise, so k=1 is independent.

    The other k - 1 candidates are never drawn: time and memory per image are O(D + k), not O(k D). With u = x0 / |x0|, a candidate is

        n = g u + sqrt(c) v,    g = u.n ~ N(0, 1),    c = |n - g u|^2 ~ chi2(D - 1),    v uniform on the unit sphere across u,

    with g, c and v independent. Both scores see (g, c) alone: ``l2`` wants the least |x0 - n|^2 - |x0|^2 = g^2 + c - 2|x0|g, ``dot``
    the largest x0.n = |x0|g. So which candidate wins is independent of every candidate's v, the winner's v is again uniform and independent
    of all (g_i, c_i), and any one v may stand for it: that of the given noise, which is left as it is if it wins, and otherwise gets
    the winner's g along u and the winner's length sqrt(c) across it. ``dot`` does not see c either, so there the given noise's c serves
    too and only the g_i are drawn. The result is exact in distribution, given x0; it is not draw for draw what k full noises of the
    same generator would give.

    Args:
        candidates: k >= 1.
        score: ``l2`` takes the nearest, ``dot`` the one of largest inner product.
    """

    candidates: int = 8
    score: str = "l2"

    def __post_init__(self) -> None:
        if self.candidates < 1:
            raise UserError(f"`candidates` must be at least 1, not {self.candidates}")
        if self.score not in SCORES:
            raise UserError(f"`score` {self.score!r} is unknown; known: {', '.join(SCORES)}")

    def __call__(
        self,
        x0: Tensor,
        noise: Tensor | None = None,
        *,
        timesteps: Tensor | None = None,
        labels: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """See `Coupling`."""
        noise = _drawn(x0, generator) if noise is None else noise
        if self.candidates == 1:
            return noise
        wide = torch.promote_types(noise.dtype, torch.float32)
        images, given = x0.detach().flatten(1).to(wide), noise.flatten(1).to(wide)  # [B,D]
        length = torch.linalg.vector_norm(images, dim=1, keepdim=True).double()  # [B,1] 0 also where the squares underflow
        per_length = (1 / length).masked_fill(length == 0, 0)  # u = per_length * images; 0 for an image of zeros: it has no direction
        work = images * given  # [B,D] the one buffer of this size
        along = work.sum(1, keepdim=True) * per_length  # [B,1] the given noise's g
        across = torch.mul(images, (-along * per_length).to(wide), out=work).add_(given)  # [B,D] its sqrt(c) v
        square = torch.linalg.vector_norm(across, dim=1, keepdim=True).double().square()  # [B,1] its c
        g, c, is_given = self._winner(length, along, square, images.shape[1], generator)
        c = torch.where(length == 0, g.square() + c, c)  # without a direction all of a noise is across
        stretch = (c / square.clamp(min=torch.finfo(torch.float32).tiny)).sqrt()
        realised = across.mul_(stretch.to(wide)).addcmul_((g * per_length).to(wide), images)
        return torch.where(is_given, given, realised, out=realised).to(noise.dtype).view_as(noise)

    def bias_notice(self, dimension: int) -> str:
        """See `bias_notice`; the numbers are means over simulated (g, c) of images of one typical length, from a fixed seed."""
        if self.candidates == 1:
            return ""
        generator = torch.Generator("cpu").manual_seed(0)
        images = max(1, min(2**16, 2**20 // self.candidates))
        length = torch.full((images, 1), TYPICAL_LENGTH * dimension**0.5, dtype=torch.float64, device="cpu")
        along, square = _components(images, 1, dimension, generator, length.device)
        g, c, _ = self._winner(length, along, square, dimension, generator)
        variance, mean, second = (float(values.mean()) for values in ((g.square() + c) / dimension, g, g.square()))
        exact = "build_coupling('assignment')"
        remedy = f"`score` dot keeps its length, {exact}" if self.score == "l2" else exact
        return (
            f"nearest of {self.candidates} by {self.score} does not keep the noise standard normal: with D = {dimension} and images of an "
            f"assumed length of {TYPICAL_LENGTH} sqrt(D), its variance is {variance:.3f} instead of 1 and its component along its image "
            f"has mean {mean:.2f} instead of 0 (mean square {second:.2f} instead of 1), which tilts it along directions that images share, "
            f"while sampling starts from standard normal noise. {remedy} keeps the noise exactly standard normal."
        )

    def _winner(
        self, length: Tensor, along: Tensor, square: Tensor, dimension: int, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The best candidate's g and c, [B, 1], and whether it is the given one, whose own g and c are ``along`` and ``square``."""
        batch, others = len(length), self.candidates - 1
        if self.score == "dot":
            g, c = torch.randn(batch, others, dtype=torch.float64, device=length.device, generator=generator), square.expand(-1, others)
        else:
            g, c = _components(batch, others, dimension, generator, length.device)
        g, c = torch.cat([along, g], 1), torch.cat([square, c], 1)  # [B,k] the given noise first: it wins ties
        best = (length * g).argmax(1, keepdim=True) if self.score == "dot" else (g.square() + c - 2 * length * g).argmin(1, keepdim=True)
        return g.gather(1, best), c.gather(1, best), best == 0


@dataclass(frozen=True)
class AboveTimestep:
    """Applies ``coupling`` to the images whose timestep is at least ``min_timestep``; the others keep their own noise.

    The inner coupling sees the sub-batch alone, so an assignment permutes the sub-batch's noises among themselves.
    """

    coupling: Coupling
    min_timestep: int

    @property
    def pairs_batch(self) -> bool:
        """As the inner coupling's."""
        return pairs_batch(self.coupling)

    def bias_notice(self, dimension: int) -> str:
        """As the inner coupling's, with the timesteps that it is about."""
        notice = bias_notice(self.coupling, dimension)
        return notice and f"from timestep {self.min_timestep} on, {notice}"

    def __call__(
        self,
        x0: Tensor,
        noise: Tensor | None = None,
        *,
        timesteps: Tensor | None = None,
        labels: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """See `Coupling`; here ``timesteps`` is required."""
        if timesteps is None:
            raise UserError("a coupling with `min_timestep` needs the timesteps: coupling(x0, noise, timesteps=t)")
        noise = _drawn(x0, generator) if noise is None else noise
        rows = (timesteps >= self.min_timestep).nonzero()[:, 0]
        if len(rows) == 0:
            return noise
        chosen = None if labels is None else labels[rows]
        paired = self.coupling(x0[rows], noise[rows], timesteps=timesteps[rows], labels=chosen, generator=generator)
        return noise.index_copy(0, rows, paired)

    def state_dict(self) -> dict[str, Tensor]:
        """The inner coupling's."""
        return dict(coupling_state(self.coupling))

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """As the inner coupling's."""
        restore_coupling(self.coupling, state)


COUPLINGS: dict[str, Callable[..., Coupling]] = {
    "independent": IndependentCoupling,
    "assignment": AssignmentCoupling,
    "nearest": NearestCoupling,
    "flipped_assignment": FlippedAssignmentCoupling,
    "reservoir": ReservoirCoupling,
}


def build_coupling(name: str, *, min_timestep: int = 0, **options: Any) -> Coupling:
    """The coupling called ``name``, with its own ``options`` (`metric`, `condition`, `candidates`, `score`, ...).

    Args:
        name: a key of `COUPLINGS`.
        min_timestep: pair only images at or above this (0-based) timestep; 0 pairs all.
        **options: the coupling's own options: what its constructor takes.

    Raises:
        UserError: an unknown name or option (the known ones are listed), or an option out of range.
    """
    coupling = build_choice(COUPLINGS, "build_coupling", name, **options)
    return AboveTimestep(coupling, min_timestep) if min_timestep > 0 else coupling


def pairs_batch(coupling: Coupling) -> bool:
    """Whether ``coupling`` pairs images of a batch with each other's noises, and so needs a batch of more than one."""
    return getattr(coupling, "pairs_batch", False)


def coupling_state(coupling: Coupling) -> Mapping[str, Tensor]:
    """What ``coupling`` carries from batch to batch, empty for most; the mapping stays as it is when the coupling goes on."""
    state: Mapping[str, Tensor] = coupling.state_dict() if hasattr(coupling, "state_dict") else {}
    return state


def restore_coupling(coupling: Coupling, state: Mapping[str, Tensor]) -> None:
    """Puts a `coupling_state` back."""
    if state or hasattr(coupling, "load_state_dict"):
        coupling.load_state_dict(state)  # type: ignore[attr-defined]


def bias_notice(coupling: Coupling, dimension: int) -> str:
    """What ``coupling`` does to the noise's marginal, with numbers, for a user to read once; empty if it leaves it standard normal.

    Args:
        coupling: any; one that biases the noise has a method ``bias_notice(dimension)``.
        dimension: D, the numbers in one image or latent.
    """
    notice: str = getattr(coupling, "bias_notice", lambda _: "")(dimension)
    return notice


def paired_together(coupling: Coupling, timesteps: Tensor) -> Tensor:
    """Among how many images ``coupling`` pairs at these timesteps [B]: 1 where each image is on its own; fp32 scalar."""
    if (planned := getattr(coupling, "paired_images", None)) is not None:
        return torch.tensor(planned, dtype=torch.float32, device=timesteps.device)
    if not pairs_batch(coupling):
        return torch.ones((), device=timesteps.device)
    return (timesteps >= getattr(coupling, "min_timestep", 0)).sum().clamp(min=1).float()


def coupling_statistics(x0: Tensor, drawn: Tensor, paired: Tensor) -> dict[str, Tensor]:
    """What a coupling did to one batch, as fp32 scalars on the device.

    ``pair_distance_drawn`` and ``pair_distance`` are mean L2 distances before and after; ``noise_variance`` and
    ``noise_norm`` (|n| / sqrt(D)) describe the paired noises, both 1 in expectation for a coupling that keeps the marginal, and
    the ``_drift`` entries are their change against the drawn pool: exactly 0 for a permutation, up to summation order.
    """
    images, before, after = x0.flatten(1).float(), drawn.flatten(1).float(), paired.flatten(1).float()
    root_d = before.shape[1] ** 0.5
    variance, norm = after.var(), after.norm(dim=1).mean() / root_d
    return {
        "pair_distance_drawn": (images - before).norm(dim=1).mean(),
        "pair_distance": (images - after).norm(dim=1).mean(),
        "noise_variance": variance,
        "noise_variance_drift": variance - before.var(),
        "noise_norm": norm,
        "noise_norm_drift": norm - before.norm(dim=1).mean() / root_d,
    }


def _drawn(x0: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.randn(x0.shape, dtype=x0.dtype, device=x0.device, generator=generator)


def _components(
    batch: int, candidates: int, dimension: int, generator: torch.Generator | None, device: torch.device
) -> tuple[Tensor, Tensor]:
    """g ~ N(0, 1) and c ~ chi2(D - 1), what noises have along a direction and, squared, across it; float64 [batch, candidates]."""
    g = torch.randn(batch, candidates, dtype=torch.float64, device=device, generator=generator)
    if dimension == 1:
        return g, torch.zeros_like(g)
    # chi2(m) is twice a gamma variable of shape m / 2. torch.distributions.Gamma draws from the global generator only; it calls this.
    return g, 2 * torch._standard_gamma(torch.full_like(g, (dimension - 1) / 2), generator=generator)
