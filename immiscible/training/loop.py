"""The training loop: a generator that yields once per optimizer step, after the EMA update."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import count, islice
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from immiscible.assignment.ranks import AnotherRankFailed
from immiscible.coupling import coupling_state
from immiscible.encoding.encoders import Encoder
from immiscible.epoch import EpochCoupling
from immiscible.errors import UserError
from immiscible.method import naming_flags
from immiscible.networks.optimization import set_rates
from immiscible.objectives import Objective, Pairs
from immiscible.pools import GlobalCoupling
from immiscible.randomness import Draws, PoolDraws, reseed_globally
from immiscible.training.stop import StopRequest

if TYPE_CHECKING:
    from accelerate import Accelerator
    from diffusers.training_utils import EMAModel


@dataclass(frozen=True)
class StepStats:
    """One optimizer step, averaged over micro-batches and ranks.

    Args:
        step: optimizer steps taken so far; a checkpoint written now bears this number.
        metrics: ``loss``, ``learning_rate`` and those of groups that have another, ``grad_norm`` (before clipping), ``step_seconds``
            (this rank's, loading included), ``wait_seconds`` (of it, for batches and pairs), on a CPU ``step_cpu_seconds`` (of this
            process with all its threads, without loader processes) and the pairs' statistics.
        coupling_state: what the coupling must remember for a run that continues here, for a checkpoint; empty for most.
    """

    step: int
    metrics: dict[str, float]
    coupling_state: Mapping[str, Tensor]


class Item(NamedTuple):
    """A micro-batch ready for the network, and the coupling's state to save if it is the last of its step."""

    draws: Draws
    pairs: Pairs
    coupling_state: Mapping[str, Tensor]


def train(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    objective: Objective,
    batches: Iterator[Any],
    encode: Encoder,
    *,
    batch_size: int,
    seed: int,
    start_step: int,
    max_steps: int,
    learning_rate: Callable[[int], float],
    max_grad_norm: float,
    ema: EMAModel | None,
    stop: StopRequest,
    factors: Mapping[str, float] | None = None,
    ahead: bool = False,
    window: int = 1,
    mixed_shapes: bool = False,
    watch: Callable[[Pairs], None] | None = None,
) -> Iterator[StepStats]:
    """Trains ``model``, prepared and in train mode as ``optimizer`` is, from ``start_step`` to ``max_steps``.

    Args:
        accelerator: its ``gradient_accumulation_steps`` micro-batches make one optimizer step.
        model: called by ``objective``.
        optimizer: its rate is set in each step.
        objective: pairs a micro-batch and gives its loss.
        batches: this rank's micro-batches, from the window on in which ``start_step`` begins; may raise `UserError`.
        encode: turns one into what is diffused and what the network is told.
        batch_size: images of a micro-batch.
        seed: of every draw; step s of a resumed run draws what step s of an uninterrupted one draws.
        start_step: optimizer steps already taken.
        max_steps: optimizer steps in all.
        learning_rate: the rate of step s (from 0): a function, so that there is no scheduler state to restore.
        max_grad_norm: gradients are clipped to it; 0 does not clip.
        ema: updated after each step, on ``model``'s parameters.
        stop: ends the loop at a step boundary, when all ranks have learned of it.
        factors: of the rate, for those of the optimizer's groups that have a name.
        ahead: load and pair the next step's batches on another thread while this step runs; the numbers are the same.
        window: micro-batches that are paired at once, whether or not they belong to one step.
        mixed_shapes: whether windows differ in the shape of their images.
        watch: called with each of this rank's micro-batches before the network sees it.

    Yields:
        `StepStats`, when weights, optimizer and EMA are at the state that a checkpoint should hold.

    Raises:
        UserError: (exit code 1) the loss or the gradient is NaN or infinite; the step is not taken, the weights are those before it.
    """
    accumulation = accelerator.gradient_accumulation_steps
    micro_batches = _paired(accelerator, objective, batches, encode, batch_size, seed, start_step, window, mixed_shapes)
    if ahead:
        depth = accumulation if window == 1 else accumulation + window  # a window is begun when the one before it is under way
        micro_batches = _look_ahead(micro_batches, depth, accelerator.device)
    update = partial(
        _update, accelerator, model, optimizer, objective, max_grad_norm=max_grad_norm, ema=ema, watch=watch, factors=factors or {}
    )
    return _steps(accelerator, micro_batches, update, range(start_step, max_steps), seed, learning_rate, stop)


def _steps(
    accelerator: Accelerator,
    micro_batches: Iterator[Item],
    update: Callable[[Sequence[Item], int, float], dict[str, float]],
    steps: range,
    seed: int,
    learning_rate: Callable[[int], float],
    stop: StopRequest,
) -> Iterator[StepStats]:
    """See `train`; ``update(fetched, step, rate)`` takes an optimizer step."""
    for step in steps:
        start, cpu_start = time.perf_counter(), time.process_time()
        fetched = _fetch(micro_batches, accelerator.gradient_accumulation_steps, stop)
        waited = time.perf_counter() - start
        if stop.agreed(accelerator):
            return
        reseed_globally(seed, "library", step, accelerator.process_index)
        metrics = update(fetched, step, learning_rate(step))
        metrics |= {"wait_seconds": waited, "step_seconds": time.perf_counter() - start}
        if accelerator.device.type == "cpu":  # elsewhere it says how long Python waited for the device
            metrics["step_cpu_seconds"] = time.process_time() - cpu_start
        yield StepStats(step + 1, metrics, fetched[-1].coupling_state)


def _update(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    objective: Objective,
    fetched: Sequence[Item],
    step: int,
    rate: float,
    *,
    max_grad_norm: float,
    ema: EMAModel | None,
    watch: Callable[[Pairs], None] | None,
    factors: Mapping[str, float],
) -> dict[str, float]:
    """One optimizer step, from micro-batches to the EMA; returns its metrics."""
    collected = []
    for draws, pairs, _ in fetched:
        if watch:
            watch(pairs)
        with accelerator.accumulate(model):
            loss = objective(model, pairs, draws).mean()
            accelerator.backward(loss)
        collected.append({"loss": loss.detach(), **pairs.statistics})
    grad_norm = accelerator.clip_grad_norm_(model.parameters(), max_grad_norm or math.inf)
    metrics = _average(accelerator, collected) | {"learning_rate": rate, "grad_norm": float(grad_norm)}
    _check_finite(metrics, step, loss_scaled=accelerator.scaler is not None)
    own_rates = set_rates(optimizer.param_groups, rate, factors)
    metrics |= {f"learning_rate_{name.replace(' ', '_')}": own for name, own in own_rates.items()}
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if ema is not None:
        ema.step(model.parameters())
    return metrics


def whole_windows(start: int, stop: int, window: int) -> tuple[int, int]:
    """The micro-batches that a run from ``start`` to ``stop`` must load so that its first and last window are whole."""
    return start - start % window, stop + -stop % window


def _paired(
    accelerator: Accelerator,
    objective: Objective,
    batches: Iterator[Any],
    encode: Encoder,
    batch_size: int,
    seed: int,
    start_step: int,
    window: int,
    mixed_shapes: bool,
) -> Iterator[Item]:
    """Each micro-batch with its random numbers, timesteps and paired noises, on the device.

    Windows of ``window`` micro-batches are paired at once. They are counted from the run's beginning, so that a run which resumes
    within one (``batches`` then begins where the window does) pairs it again as it was.
    """
    accumulation, processes, rank = accelerator.gradient_accumulation_steps, accelerator.num_processes, accelerator.process_index
    ranks = objective.coupling.ranks if isinstance(objective.coupling, GlobalCoupling | EpochCoupling) else None
    start = start_step * accumulation
    for first in count(start - start % window, window):
        steps = [divmod(micro_batch, accumulation) for micro_batch in range(first, first + window)]
        rows = [(step, (micro * processes + rank) * batch_size) for step, micro in steps]
        draws = [Draws(seed, step, row, accelerator.device, by_shape=mixed_shapes) for step, row in rows]
        try:
            encoded = list(map(encode, islice(batches, window), draws))
        except UserError:
            if ranks:
                ranks.any_failed(True)
            raise
        if ranks and ranks.any_failed(False):
            raise AnotherRankFailed("another process stopped")
        if not encoded:
            return
        draws = draws[: len(encoded)]
        pool = PoolDraws(tuple(draws), batch_size, rank, processes if isinstance(objective.coupling, GlobalCoupling) else 1)
        x0, labels, condition = (_joined(column) for column in zip(*encoded, strict=True))
        before = coupling_state(objective.coupling)
        with naming_flags():
            parts = objective.pair(x0, pool, labels, condition).split(batch_size)
        # Who continues within a window pairs all of it again, and so needs the state before it.
        states = [before] * (len(parts) - 1) + [coupling_state(objective.coupling)]
        yield from list(map(Item, draws, parts, states))[max(0, start - first) :]


def _joined(column: Sequence[Any]) -> Any:
    """The rows of several micro-batches as one: tensors, mappings of them, or Nones."""
    if len(column) == 1 or column[0] is None:
        return column[0]
    if isinstance(column[0], Tensor):
        return torch.cat(list(column))
    return {name: torch.cat([part[name] for part in column]) for name in column[0]}


def _look_ahead(items: Iterator[Item], depth: int, device: torch.device) -> Iterator[Item]:
    """The same items, ``depth`` of them made on a worker thread while the caller works; on a GPU on a stream of their own.

    The first item is made at once by the caller, so that loader processes are forked from the main thread. What was begun is finished
    before this ends, on every rank, because another rank may wait for its part in it.
    """
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    if stream is not None:
        stream.wait_stream(torch.cuda.current_stream(device))  # frozen networks may still be on their way to the device

    def make() -> Item | None:
        with torch.cuda.stream(stream):  # no stream, no effect
            item = next(items, None)
            if stream is not None:
                stream.synchronize()
        return item

    item = make()
    with ThreadPoolExecutor(1, thread_name_prefix="look-ahead") as worker:
        waiting = deque(worker.submit(make) for _ in range(depth))
        try:
            while item is not None:
                if stream is not None:
                    _hand_over(item.pairs, torch.cuda.current_stream(device))
                yield item
                waiting.append(worker.submit(make))
                item = waiting.popleft().result()
        finally:
            worker.shutdown()


def _hand_over(pairs: Pairs, stream: torch.cuda.Stream) -> None:
    """Tells the allocator that another stream's tensors are used on this one, so that their memory is not given away too early."""
    for tensor in (pairs.x0, pairs.timesteps, pairs.noise, pairs.labels, *pairs.condition.values(), *pairs.statistics.values()):
        if tensor is not None:
            tensor.record_stream(stream)


def _fetch(micro_batches: Iterator[Item], number: int, stop: StopRequest) -> list[Item]:
    """This step's micro-batches; a failure is kept for the other ranks to learn of instead of leaving them in a collective call."""
    try:
        return [next(micro_batches) for _ in range(number)]
    except AnotherRankFailed:
        return []
    except UserError as error:
        stop.fail(error)
        return []


def _average(accelerator: Accelerator, collected: list[dict[str, Tensor]]) -> dict[str, float]:
    """Means over micro-batches and ranks: one collective call and one transfer to the host."""
    table = torch.stack([torch.stack([value.float() for value in row.values()]) for row in collected])
    means = accelerator.reduce(table.mean(0), reduction="mean")
    return dict(zip(collected[0], means.tolist(), strict=True))


def _check_finite(metrics: dict[str, float], step: int, *, loss_scaled: bool) -> None:
    """Under fp16 an infinite gradient is the loss scaler's business: it skips the step and lowers the scale."""
    for name in ("loss",) if loss_scaled else ("loss", "grad_norm"):
        if not math.isfinite(metrics[name]):
            raise UserError(
                f"{name} is {metrics[name]} at step {step + 1}: stopped before the weights were touched, existing checkpoints are kept; "
                f"try a lower --learning_rate, more --lr_warmup_steps, a larger --adam_epsilon or --mixed_precision no",
                exit_code=1,
            )
