"""Plans of whole epochs: each is made on a thread of its own while the epoch before it trains, and the first before step 1.

Ranks share out an epoch's problems and exchange what they have found when the epoch begins, so that all of them look up one plan. The
images come from loaders of their own, by the keys of the run's order, so they are what will be diffused: flipped, cropped, or expected
latents. The plan in use lies in a file of the run's folder, for a run that goes on in the middle of an epoch; without it, or where it is
damaged or another run's, the epoch is planned again, with the same result.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from immiscible.assignment.ranks import AnotherRankFailed, Ranks
from immiscible.coupling import AssignmentCoupling
from immiscible.data.batches import GlobalBatchOrder
from immiscible.data.loading import build_loader, training_images, unlabelled_images
from immiscible.data.sources import ImageSource
from immiscible.data.stream_order import StreamOrder
from immiscible.data.streaming import Stream
from immiscible.epoch import CachedCoupling, EpochCoupling, EpochPlan, PlannedRows, check_rule, epoch_problems, solve_problem
from immiscible.errors import UserError
from immiscible.kept import read_kept, write_kept
from immiscible.randomness import PoolDraws
from immiscible.training.stop import StopRequest
from immiscible.training.task import Task, TrainingData

if TYPE_CHECKING:
    from accelerate import Accelerator

    from immiscible.training.arguments import RunConfig

PLAN_FILE = "coupling_plan.safetensors"
LOADED_TOGETHER = 64  # images of a loader's batch
LOOK = 0.2  # seconds between looks at how far a plan has come

Key = tuple[int, int]


@dataclass
class EpochLayout:
    """Where the images of each micro-batch are in their epoch.

    Args:
        order: of the run's images.
        accumulation: micro-batches of an optimizer step.
        seed: the run's.
        max_steps: optimizer steps in all.
    """

    order: GlobalBatchOrder
    accumulation: int
    seed: int
    max_steps: int

    @property
    def count(self) -> int:
        """N, images of an epoch; those of its last, short batch are left out."""
        return self.order.batches_per_epoch * self.order.global_batch_size

    @property
    def last_epoch(self) -> int:
        """The epoch in which the run ends."""
        return (self.max_steps * self.accumulation - 1) // self.order.batches_per_epoch

    def place(self, draws: PoolDraws) -> tuple[int, slice]:
        """A micro-batch's epoch, and the positions of its images in it."""
        part, together = draws.parts[0], self.order.global_batch_size
        micro, row = divmod(part.first_row, together)
        epoch, batch = divmod(part.step * self.accumulation + micro, self.order.batches_per_epoch)
        return epoch, slice(batch * together + row, batch * together + row + draws.batch_size)

    def images(self, draws: PoolDraws) -> tuple[int, Tensor]:
        """A micro-batch's epoch, and its images, int64 [B]."""
        epoch, rows = self.place(draws)
        return epoch, self._permutation(epoch)[rows]

    def owned(self, epoch: int) -> Tensor:
        """All images that this rank has in an epoch, int64."""
        order = self.order
        batches = self._permutation(epoch)[: self.count].view(order.batches_per_epoch, -1, order.batch_size)  # [.,W,B]
        return batches[:, order.rank].flatten()

    @cached_property
    def _permutation(self) -> Callable[[int], Tensor]:
        return lru_cache(maxsize=1)(self.order.permutation)


class EpochPlans:
    """A run's plans, one after the other; every rank asks for each epoch, in order, before any image of it is trained on.

    Args:
        rule: the coupling, with its metric, precision, solver and condition.
        layout: of the run.
        labels: inside which classes and buckets noises are assigned, int64 [N] of the images, -1 of none; None for all together.
        load: given the keys of batches, gives their images, expected latents where these are diffused, scaled as they are diffused,
            fp32 on the CPU [n, C, h, w], batch by batch.
        ranks: the processes of the run.
        identity: of the run, by which its file is known.
        folder: of the run, where rank 0 keeps the file; None keeps none.
        stopping: whether the run has been asked to end; then nobody waits for a plan.
    """

    def __init__(
        self,
        rule: AssignmentCoupling,
        layout: EpochLayout,
        labels: Tensor | None,
        load: Callable[[Iterator[list[Key]]], Iterator[Tensor]],
        *,
        ranks: Ranks | None,
        identity: Mapping[str, Any],
        folder: Path | None,
        stopping: Callable[[], bool],
    ) -> None:
        self._rule, self._layout, self._load, self._ranks = rule, layout, load, ranks or Ranks()
        self._path = folder / PLAN_FILE if folder and self._ranks.rank == 0 else None
        self._stopping, self._labels = stopping, labels
        told = json.dumps([identity, layout.count, str(rule)], sort_keys=True)
        self._fingerprint = torch.tensor(list(hashlib.sha256(told.encode()).digest()), dtype=torch.uint8, device="cpu")
        self._current: tuple[int, EpochPlan] | None = None
        self._making: _Making | None = None
        self.seconds = 0.0  # of the last plan that was made here

    def __call__(self, draws: PoolDraws) -> PlannedRows:
        """A micro-batch's noises. The first of an epoch waits for its plan, and has the next one begun.

        Raises:
            UserError: an image cannot be read or has no distance; on every rank.
        """
        epoch, rows = self._layout.place(draws)
        if self._current is None or self._current[0] != epoch:
            self._current = epoch, self._next(epoch)
        plan = self._current[1]
        return PlannedRows(plan.numbers[rows], self._layout.seed, epoch, plan)

    def words(self) -> str:
        """What a plan costs, for a user who asks beforehand."""
        layout = self._layout
        steps = layout.order.batches_per_epoch / layout.accumulation
        return (
            f"assigning an epoch of {layout.count:,} images takes {self.seconds:.1f} s, before the first step and then while the {steps:g} "
            f"steps of the epoch before are taken"
        )

    def close(self) -> None:
        """Ends what is being made."""
        if self._making:
            self._making.cancel()
            self._making = None

    def _next(self, epoch: int) -> EpochPlan:
        """The plan of an epoch, from the file or from what has been made, and the next one begun."""
        plan = self._kept(epoch) if self._making is None else None
        if plan is None:
            making = self._making or self._begin(epoch)
            failure = making.wait(self._stopping)
            if self._ranks.any_failed(failure is not None):
                raise failure or AnotherRankFailed("another process stopped")
            self.seconds = making.seconds
            plan = self._exchanged(making.plan)
            if self._path is not None:
                write_kept(self._path, {**plan.tensors, **self._marks(epoch)}, "the plan of an epoch")
        if epoch < self._layout.last_epoch:
            if self._making is None:
                self._begin(epoch + 1)
            else:
                self._making.go_on()
        return plan

    def _begin(self, epoch: int) -> _Making:
        """Starts the making of all plans from an epoch on."""
        self._making = _Making(epoch, self._layout.last_epoch, self._rule, self._share, self._load, self._layout)
        return self._making

    def _problems(self, epoch: int) -> list[Tensor]:
        labels = None if self._labels is None else self._labels[self._layout.order.permutation(epoch)[: self._layout.count]]
        return epoch_problems(self._layout.count, seed=self._layout.seed, epoch=epoch, labels=labels)

    def _share(self, epoch: int) -> tuple[list[Tensor], list[int]]:
        """All problems of an epoch, and which of them this rank solves: the largest first, each to the rank that has least to do."""
        problems, work = self._problems(epoch), [0.0] * self._ranks.count
        own = []
        for number in sorted(range(len(problems)), key=lambda each: (-len(problems[each]), each)):
            rank = work.index(min(work))
            work[rank] += len(problems[number]) ** 2
            own += [number] if rank == self._ranks.rank else []
        return problems, own

    def _exchanged(self, plan: EpochPlan) -> EpochPlan:
        """What all ranks have found, of whom each has -1 where another has solved."""
        merged: dict[str, Any] = {name: self._ranks.merged(tensor) for name, tensor in plan.tensors.items()}
        return replace(plan, **merged)

    def _kept(self, epoch: int) -> EpochPlan | None:
        """The plan of an epoch in the file; None if there is none, or that of another epoch or run."""
        found: dict[str, Any] = {}
        marks = self._marks(epoch)
        there = self._path is not None and read_kept(self._path, found.update)
        is_this = there and all(name in found and torch.equal(found.pop(name), mark) for name, mark in marks.items())
        if not self._ranks.largest(is_this)[0]:  # rank 0 alone reads
            return None
        blank = EpochPlan.unsolved(self._layout.count, self._problems(epoch))
        return self._exchanged(replace(blank, **found) if is_this else blank)

    def _marks(self, epoch: int) -> dict[str, Tensor]:
        """By which the file is known to be of this run and epoch."""
        return {"run": self._fingerprint, "epoch": torch.tensor(epoch, device="cpu")}


class _Making:
    """The plans of this rank's share of the problems, epoch after epoch, each begun when the one before it has been taken.

    Args:
        first: the epoch to begin with.
        last: the epoch to end with.
        rule: the coupling.
        share: gives an epoch's problems and which of them are solved here.
        load: see `EpochPlans`.
        layout: of the run.
    """

    def __init__(
        self,
        first: int,
        last: int,
        rule: AssignmentCoupling,
        share: Callable[[int], tuple[list[Tensor], list[int]]],
        load: Callable[[Iterator[list[Key]]], Iterator[Tensor]],
        layout: EpochLayout,
    ) -> None:
        self._epochs, self._rule, self._layout = range(first, last + 1), rule, layout
        self._share = lru_cache(maxsize=2)(share)  # asked for by the loader, which may be an epoch ahead, and for the solutions
        self._go, self._ready, self._cancelled = threading.Semaphore(1), threading.Event(), False
        self._epoch, self._solved, self.seconds = first, 0, 0.0
        self._failure: UserError | None = None
        self._error: BaseException | None = None
        self.plan = EpochPlan.unsolved(0, [])
        self._images = load(self._keys())
        self._thread = threading.Thread(target=self._work, name="epoch plans", daemon=True)
        self._thread.start()

    def wait(self, stopping: Callable[[], bool]) -> UserError | None:
        """Until the plan is made, with a progress bar; what is wrong if it is not, and `AnotherRankFailed` if nobody wants it any more."""
        what = f"planning epoch {self._epoch}"
        with tqdm(total=self._layout.count, desc=what, unit="image", delay=2, leave=False, disable=None) as bar:
            while not self._ready.wait(LOOK):
                bar.update(self._solved - bar.n)
                if stopping():
                    return AnotherRankFailed("the run is to stop")
        if self._error is not None:
            raise self._error
        self._ready.clear()
        return self._failure

    def go_on(self) -> None:
        """Begins the next epoch's plan; the one before has been taken."""
        self._go.release()

    def cancel(self) -> None:
        """Ends it soon: after the problem that is being solved."""
        self._cancelled = True
        self._go.release()
        self._thread.join(60)

    def _keys(self) -> Iterator[list[Key]]:
        """The keys of the images, in the order in which they are assigned."""
        for epoch in self._epochs:
            order = self._layout.order.permutation(epoch)
            problems, own = self._share(epoch)
            for number in own:
                for part in problems[number].split(LOADED_TOGETHER):
                    yield [(epoch, index) for index in order[part].tolist()]

    def _work(self) -> None:
        try:
            for epoch in self._epochs:
                self._go.acquire()
                if self._cancelled:
                    return
                self._epoch, self._solved, start = epoch, 0, time.perf_counter()
                self._make(epoch)
                if self._cancelled:
                    return
                self.seconds = time.perf_counter() - start
                self._ready.set()
        except UserError as error:
            self._failure = error
            self._ready.set()
        except BaseException as error:  # raised where the plan is waited for, with the place where it came up
            self._error = error
            self._ready.set()

    def _make(self, epoch: int) -> None:
        problems, own = self._share(epoch)
        plan = EpochPlan.unsolved(self._layout.count, problems)
        for number in own:
            problem = problems[number]
            parts = []
            for _ in range(-(-len(problem) // LOADED_TOGETHER)):
                if self._cancelled:
                    return
                parts.append(next(self._images))
            images = torch.cat(parts)
            plan.put(number, problem, *solve_problem(self._rule, images, problem, seed=self._layout.seed, epoch=epoch))
            self._solved += len(problem)
        self.plan = plan


@contextmanager
def epoch_plans(
    config: RunConfig,
    accelerator: Accelerator,
    task: Task,
    order: GlobalBatchOrder | StreamOrder,
    max_steps: int,
    identity: Mapping[str, Any],
    stop: StopRequest,
) -> Iterator[EpochPlans | None]:
    """Inside the block the run's coupling looks up plans, if it is one over whole epochs; otherwise there are none.

    Args:
        config: the run's flags.
        accelerator: of the run.
        task: what is trained.
        order: of its images.
        max_steps: optimizer steps in all.
        identity: what must be equal for the run to be continued.
        stop: what may end it.

    Raises:
        UserError: classes are needed, and the images have none.
    """
    objective, data = task.objective, task.data
    coupling = objective.coupling
    if not isinstance(coupling, EpochCoupling):
        yield None
        return
    assert isinstance(order, GlobalBatchOrder) and not isinstance(data.images, Stream)  # the flags refuse a stream
    layout = EpochLayout(order, config.gradient_accumulation_steps, int(config.seed or 0), max_steps)
    coupling.ranks = Ranks(accelerator.process_index, accelerator.num_processes) if accelerator.num_processes > 1 else None
    if isinstance(coupling, CachedCoupling):
        _begin(coupling, layout)
        yield None
        return
    dataset = training_images(data.images, data.augment or data.transform, skip_bad_images=config.skip_bad_images, buckets=data.buckets)

    def load(keys: Iterator[list[Key]]) -> Iterator[Tensor]:
        loader = build_loader(dataset, keys, config.dataloader_num_workers, accelerator.device)
        images = unlabelled_images(iter(loader), config.skip_bad_images)  # its processes are forked here, on the thread that asks
        return (task.encode.expected(batch).float().cpu() * objective.image_scale for batch in images)

    rule = check_rule(coupling.coupling)
    plans = EpochPlans(
        rule,
        layout,
        _groups(rule, data),
        load,
        ranks=coupling.ranks,
        identity=identity,
        folder=None if config.plan else config.folder,
        stopping=lambda: bool(stop.reason),
    )
    coupling.plans = plans
    try:
        yield plans
    finally:
        plans.close()


def _begin(coupling: CachedCoupling, layout: EpochLayout) -> None:
    """Gives the coupling the run's images.

    Raises:
        UserError: they are too few for a batch of all processes.
    """
    order = layout.order
    if order.global_batch_size > order.num_images:
        raise UserError(
            f"--coupling_caches: a global batch of {order.global_batch_size} takes an image of {order.num_images} twice; lower it"
        )
    coupling.begin(order.num_images, layout.seed, layout.images, layout.owned)


def _groups(rule: AssignmentCoupling, data: TrainingData) -> Tensor | None:
    """Inside which images noises are assigned, int64 [N], -1 of none: those of a class, and of one shape; None for all of them.

    Raises:
        UserError: classes are needed, and the images have none.
    """
    labels, buckets = data.groups, data.buckets
    if rule.condition == "within" and labels is None:
        images: Any = data.images  # no stream, which the flags refuse
        labels = classes_of(images)
    if buckets is None:
        return labels
    if labels is None:
        return buckets.of
    return (labels * len(buckets.sizes) + buckets.of).masked_fill((labels < 0) | (buckets.of < 0), -1)


def classes_of(source: ImageSource) -> Tensor:
    """Every image's class, int64 [N]; -1 for one that cannot be read, which then keeps its own noise.

    Raises:
        UserError: there are none.
    """
    if source.class_names is None:
        raise UserError(
            "--coupling_window epoch with --coupling_condition within needs classes, and these images have none; give "
            "--coupling_condition none"
        )
    labels = torch.full((len(source),), -1, device="cpu")
    for index in tqdm(range(len(source)), desc="reading classes", unit="image", delay=2, leave=False, disable=None):
        try:
            labels[index] = source.label(index)
        except (OSError, ValueError, KeyError):
            continue
    return labels
