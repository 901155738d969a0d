"""One assignment over all images of an epoch: the pairing of a batch at the scale of the data.

    plan = immiscible.plan_epoch(latents, seed=0, epoch=epoch, labels=classes)                   # once an epoch, [N]
    noise = immiscible.epoch_noise(plan[rows], *latents.shape[1:], seed=0, epoch=epoch)          # for the images of a step

The larger the pool, the nearer the noise that an image can get: within N points the noise still leaves about N^(-1/r) of the image open,
r being the data's intrinsic dimension (arXiv 2506.05526, prop. 2), and more steps do not make up for it. An epoch is the largest pool in
which each image is used once. So are its noises: every one belongs to exactly one image, and the pool stays exactly standard normal. With
``labels`` the images of each class share out their own noises, however few of them are in a batch, so the noise tells nothing of the class.

Nothing of a plan is random but its pool and its blocks, which are functions of (seed, epoch); a run that goes on plans again what it had.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import numpy
import torch
from torch import Tensor

from immiscible.assignment.ranks import AnotherRankFailed, Ranks
from immiscible.assignment.solve import LARGEST_BLOCK, Assignment, assign, record_solution, recorded_solutions
from immiscible.coupling import AssignmentCoupling, Coupling, Stateless
from immiscible.errors import UserError
from immiscible.randomness import PoolDraws, derive_seed, seeded_generator

CACHE = -1  # the epoch of whose pool the noises are that images keep
SEEDS = 2**32  # of torch's CPU generator, which takes no more bits of a seed


def epoch_noise(numbers: Tensor, *shape: int, seed: int, epoch: int) -> Tensor:
    """The noises of an epoch's pool with these numbers, drawn on the CPU, so that they are the same whatever trains.

    Noise p comes from a generator of its own, so a step costs what its own noises cost. The generators' seeds are a permutation of all
    `SEEDS`, another one in each epoch: no noise of an epoch comes twice.

    Args:
        numbers: p, int64 [B], each at least 0 and below `SEEDS`.
        shape: of one noise.
        seed: the run's.
        epoch: from 0.

    Returns:
        fp32 [B, *shape] on the CPU.
    """
    noises = torch.empty(len(numbers), *shape, device="cpu")
    generator = torch.Generator("cpu")
    first = derive_seed(seed, "epoch noise", epoch) % SEEDS
    for noise, own in zip(noises, _mixed(numbers.cpu().numpy(), first).tolist(), strict=True):
        noise.normal_(generator=generator.manual_seed(own))
    return noises


def _mixed(numbers: numpy.ndarray, first: int) -> numpy.ndarray:
    """uint32 [B], distinct for distinct numbers: each step is invertible modulo 2^32, and mixes as the finalizer of MurmurHash3 does."""
    mixed = (numbers.astype(numpy.uint64) + first).astype(numpy.uint32)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        mixed ^= mixed >> numpy.uint32(shift)
        mixed *= numpy.uint32(factor)
    return mixed ^ (mixed >> numpy.uint32(16))


def epoch_problems(count: int, *, seed: int, epoch: int, labels: Tensor | None = None) -> list[Tensor]:
    """Which images of an epoch are assigned together: all of them, or those of a class, in random blocks of at most `LARGEST_BLOCK`.

    Args:
        count: N, images of the epoch.
        seed: the run's.
        epoch: from 0; each has blocks of its own.
        labels: classes, int64 [N]; a negative one has no class, and its image keeps its own noise.

    Returns:
        positions in the epoch, int64, in ascending order of the class; an image that is alone in its class is in none of them.
    """
    order = torch.randperm(count, generator=seeded_generator(seed, "epoch blocks", epoch), device="cpu")
    groups: Sequence[Tensor] = [order]
    if labels is not None:
        order = order[labels[order] >= 0]
        order = order[labels[order].argsort(stable=True)]
        groups = order.split(labels[order].unique_consecutive(return_counts=True)[1].tolist())
    blocks = [block for group in groups for block in group.tensor_split(-(-len(group) // LARGEST_BLOCK) or 1)]
    return [block for block in blocks if len(block) > 1]


@dataclass(frozen=True)
class EpochPlan:
    """Which noise of its epoch's pool each image gets, and how well that was solved.

    Args:
        numbers: int64 [N], a permutation: the image at position i of the epoch gets the noise `epoch_noise` of ``numbers[i]``.
        kept: of each problem, float64 [P], see `Assignment`; -1 before it is solved, as for ``bids`` and ``relaxations``.
        bids: int64 [P].
        relaxations: int64 [P].
        together: among how many images an image was assigned, the mean over the epoch.
    """

    numbers: Tensor
    kept: Tensor
    bids: Tensor
    relaxations: Tensor
    together: float

    @classmethod
    def unsolved(cls, count: int, problems: Sequence[Tensor]) -> EpochPlan:
        """Every image of no problem has its own noise already; the others have -1."""
        numbers, sizes = torch.arange(count, device="cpu"), torch.tensor([len(problem) for problem in problems], device="cpu").double()
        for problem in problems:
            numbers[problem] = -1
        open_numbers = torch.full((len(problems),), -1, device="cpu")
        together = float((sizes.square().sum() + count - sizes.sum()) / max(count, 1))
        return cls(numbers, open_numbers.double(), open_numbers.clone(), open_numbers.clone(), together)

    def put(self, number: int, problem: Tensor, solutions: Sequence[Assignment], index: Tensor) -> None:
        """Enters a problem's solution."""
        self.numbers[problem] = problem[index.cpu()]
        self.kept[number] = min(solution.kept for solution in solutions)
        self.bids[number] = sum(solution.bids for solution in solutions)
        self.relaxations[number] = sum(solution.relaxations for solution in solutions)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What it consists of, by name."""
        return {name: getattr(self, name) for name in ("numbers", "kept", "bids", "relaxations")}

    @cached_property
    def solution(self) -> Assignment:
        """All problems as one, for the statistics of every step; of a plan that is whole."""
        kept = float(self.kept.min()) if len(self.kept) else 1.0
        return Assignment(self.numbers, 0.0, kept, int(self.bids.sum()), int(self.relaxations.sum()))


def plan_epoch(
    images: Tensor | Callable[[Tensor], Tensor],
    count: int | None = None,
    *,
    seed: int,
    epoch: int,
    labels: Tensor | None = None,
    coupling: AssignmentCoupling | None = None,
) -> Tensor:
    """Assigns the noises of an epoch's pool to its images.

    Time is that of the blocks, O(N * LARGEST_BLOCK * D) at most; memory O(N), and one block's images, noises and costs.

    Args:
        images: [N, ...], at the scale at which they are diffused, or a function that gives those at some positions, int64 [n] -> [n, ...].
        count: N, where ``images`` is a function.
        seed: the run's.
        epoch: from 0.
        labels: classes, int64 [N], within which noises are shared out; see `epoch_problems`.
        coupling: with its metric, precision and solver.

    Returns:
        int64 [N], a permutation, for `epoch_noise`.

    Raises:
        UserError: a coupling with another condition than none or within, labels of another kind, or an image without a distance.
    """
    rule = coupling or AssignmentCoupling()
    check_rule(rule)
    if isinstance(images, Tensor):
        count = len(images)
    elif count is None:
        raise UserError("plan_epoch needs `count`, the number of images, where `images` is a function")
    if labels is not None and (labels.dtype != torch.int64 or labels.shape != (count,)):
        raise UserError(f"labels must be classes, int64 [{count}], not {labels.dtype} {list(labels.shape)}")
    problems = epoch_problems(count, seed=seed, epoch=epoch, labels=None if labels is None else labels.cpu())
    plan = EpochPlan.unsolved(count, problems)
    for number, problem in enumerate(problems):
        rows = images[problem.to(images.device)] if isinstance(images, Tensor) else images(problem)
        plan.put(number, problem, *solve_problem(rule, rows, problem, seed=seed, epoch=epoch))
    return plan.numbers


def solve_problem(rule: AssignmentCoupling, images: Tensor, problem: Tensor, *, seed: int, epoch: int) -> tuple[list[Assignment], Tensor]:
    """One problem's solutions, and its permutation, int64 [n]: image i gets the noise of the problem's image ``index[i]``.

    Raises:
        UserError: (exit code 1) an image holds NaN or infinite values; its position in the epoch is named.
    """
    finite = torch.isfinite(images.flatten(1)).all(1)
    if not finite.all():
        row = int(problem[int((~finite).nonzero()[0])])
        raise UserError(f"image {row} of epoch {epoch} holds NaN or infinite values; it has no distance", exit_code=1)
    noises = epoch_noise(problem, *images.shape[1:], seed=seed, epoch=epoch).to(images.device)
    with recorded_solutions() as solutions:
        index = assign(images.float(), rule.cost_noise(noises), metric=rule.metric, dtype=rule.dtype, solver=rule.solver)
    return solutions, index


def check_rule(coupling: Coupling) -> AssignmentCoupling:
    """The coupling, if it can be widened to an epoch.

    Raises:
        UserError: it cannot.
    """
    if not isinstance(coupling, AssignmentCoupling):
        raise UserError("an epoch is planned for a coupling that pairs images with each other's noises, at every timestep: assignment")
    if coupling.condition not in ("none", "within"):
        raise UserError(f"`condition` {coupling.condition} is of a batch; an epoch is planned with none, or within each class")
    return coupling


@dataclass(frozen=True)
class PlannedRows:
    """A coupling of some images of an epoch, whose noises have been found.

    Args:
        numbers: in the pool, int64 [B].
        seed: the run's.
        epoch: from 0.
        plan: of the epoch.
    """

    numbers: Tensor
    seed: int
    epoch: int
    plan: EpochPlan

    @property
    def paired_images(self) -> float:
        """Among how many images each was assigned, on average."""
        return self.plan.together

    def __call__(self, x0: Tensor, noise: Tensor | None = None, **options: Any) -> Tensor:
        """See `Coupling`; only the shape, the dtype and the device of ``x0`` matter."""
        record_solution(self.plan.solution)
        return epoch_noise(self.numbers, *x0.shape[1:], seed=self.seed, epoch=self.epoch).to(x0.device, x0.dtype, non_blocking=True)


@dataclass
class EpochCoupling(Stateless):
    """``coupling`` over whole epochs of a run of the scripts, where a step looks up what was planned: call ``at(draws)``, not this.

    Args:
        coupling: an `AssignmentCoupling` with its metric, precision, solver and condition, none or within.
        plans: gives the rows' numbers, epoch and plan of a micro-batch's draws; set when the run knows its images.
        ranks: the processes of the run, where there are several.

    Raises:
        UserError: another coupling.
    """

    coupling: Coupling
    plans: Callable[[PoolDraws], PlannedRows] | None = field(default=None, repr=False)
    ranks: Ranks | None = field(default=None, repr=False)
    pairs_batch: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_rule(self.coupling)

    def at(self, draws: PoolDraws) -> PlannedRows:
        """The coupling of a micro-batch."""
        if self.plans is None:
            raise UserError("EpochCoupling has no plans yet; in a loop of your own use plan_epoch and epoch_noise")
        return self.plans(draws)

    def __call__(self, x0: Tensor, noise: Tensor | None = None, **options: Any) -> Tensor:
        """Which rows these are cannot be known here.

        Raises:
            UserError: always.
        """
        raise UserError("EpochCoupling is asked with `at(draws)`; in a loop of your own use plan_epoch and epoch_noise")


@dataclass
class CachedCoupling(EpochCoupling):
    """``coupling`` among noises that images keep from epoch to epoch, which a run of the scripts asks for with ``at(draws)`` (LOOM-CFM,
    arXiv 2603.15279).

    Each image has a noise of its own in each of ``caches`` caches. The images of a micro-batch exchange those of one cache, drawn for it,
    by assignment, and keep what they get. So pairs get nearer from epoch to epoch, across all images, however small the batch: the noise
    that an image brings is the best that its batches have found so far. A cache is always a permutation of its pool, which stays as it is
    through the run: C N noises in all and none beside them, by which a long run on little data may learn its noises by heart.

    A noise is a number of the pool (`epoch_noise`), so the state is C N integers; each rank keeps its own images' up to date, and at the
    end of an epoch, within which no two ranks have an image in common, they tell each other.

    Args:
        caches: C, at least 1.

    Raises:
        UserError: a coupling that does not assign within the batch, or one with a condition.
    """

    caches: int = 1
    seed: int = field(default=0, init=False)
    numbers: Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.int64, device="cpu"), init=False, repr=False)  # [N,C]
    epoch: int = field(default=-1, init=False)
    place: Callable[[PoolDraws], tuple[int, Tensor]] | None = field(default=None, init=False, repr=False)
    owned: Callable[[int], Tensor] | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        rule = check_rule(self.coupling)
        if rule.condition != "none":
            raise UserError(f"`condition` {rule.condition}: noises that images keep pass between classes; give `condition` none")

    def begin(self, count: int, seed: int, place: Callable[[PoolDraws], tuple[int, Tensor]], owned: Callable[[int], Tensor]) -> None:
        """Makes it ready for a run, with the noises of a restored state if there is one.

        Args:
            count: N, the images.
            seed: the run's.
            place: gives a micro-batch's epoch and its images, int64 [B], each at most once in an epoch over all ranks.
            owned: gives this rank's images of an epoch, int64.
        """
        self.seed, self.place, self.owned = seed, place, owned
        if not len(self.numbers):
            self.numbers = torch.arange(self.caches * count, device="cpu").view(self.caches, count).T.contiguous()

    def at(self, draws: PoolDraws) -> _CachedRows:  # type: ignore[override]
        """The coupling of a micro-batch. The first of an epoch learns what the other ranks did in the one before it."""
        if self.place is None or self.owned is None:
            raise UserError("CachedCoupling has no images yet; the scripts give it theirs")
        epoch, images = self.place(draws)
        if epoch != self.epoch and self.epoch >= 0 and self.ranks is not None:
            own = self.owned(self.epoch)
            told = torch.full_like(self.numbers, -1)
            told[own] = self.numbers[own]
            told = self.ranks.merged(told)
            self.numbers = torch.where(told < 0, self.numbers, told)
        self.epoch = epoch
        cache = int(torch.randint(self.caches, (1,), generator=_of(draws), device="cpu"))
        return _CachedRows(self, images, cache)

    def state_dict(self) -> dict[str, Tensor]:
        """Which noises the images have, [N, C], and in which epoch; a call replaces them, so that one taken earlier stays."""
        return {"numbers": self.numbers, "epoch": torch.tensor(self.epoch, device="cpu")} if len(self.numbers) else {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Goes on from a `state_dict`.

        Raises:
            UserError: the state is another coupling's.
        """
        if set(state) != {"numbers", "epoch"} or state["numbers"].dim() != 2 or state["numbers"].shape[1] != self.caches:
            raise UserError(f"CachedCoupling keeps numbers of {self.caches} noises an image, but {', '.join(state) or 'nothing'} was saved")
        self.numbers, self.epoch = state["numbers"], int(state["epoch"])


@dataclass(frozen=True)
class _CachedRows:
    """A `CachedCoupling` of some images, int64 [B], by one of its caches."""

    cached: CachedCoupling
    images: Tensor
    cache: int
    pairs_batch: ClassVar[bool] = True

    def __call__(self, x0: Tensor, noise: Tensor | None = None, **options: Any) -> Tensor:
        """See `Coupling`; the noises are those that the images have."""
        cached, rule = self.cached, check_rule(self.cached.coupling)
        own = cached.numbers[self.images, self.cache]  # [B]
        noises = epoch_noise(own, *x0.shape[1:], seed=cached.seed, epoch=CACHE).to(x0.device, x0.dtype)
        failure: UserError | None = None
        try:
            index = assign(x0, rule.cost_noise(noises), metric=rule.metric, dtype=rule.dtype, solver=rule.solver)
        except UserError as error:
            failure = error
        if cached.ranks is not None and cached.ranks.any_failed(failure is not None):
            raise failure or AnotherRankFailed("another process stopped")
        if failure is not None:
            raise failure
        numbers = cached.numbers.clone()
        numbers[self.images, self.cache] = own[index.cpu()]
        cached.numbers = numbers
        return noises[index]


def _of(draws: PoolDraws) -> torch.Generator:
    """Of what is drawn for a micro-batch on the CPU, whatever trains."""
    part = draws.parts[0]
    return seeded_generator(part.seed, "noise cache", part.step, part.first_row)
