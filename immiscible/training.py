"""The training loop: a generator that yields once per optimizer step, after the EMA update."""

from __future__ import annotations

import math
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .errors import UserError
from .objectives import DenoisingObjective, Pairs
from .randomness import Draws, reseed_globally

if TYPE_CHECKING:
    from accelerate import Accelerator
    from diffusers.training_utils import EMAModel


@dataclass(frozen=True)
class StepStats:
    """One optimizer step, averaged over micro-batches and ranks.

    Args:
        step: optimizer steps taken so far; a checkpoint written now bears this number.
        metrics: ``loss``, ``learning_rate``, ``grad_norm`` (before clipping), ``step_seconds`` (this rank's,
            loading included), ``wait_seconds`` (of it, for batches and pairs) and the pairs' statistics.
    """

    step: int
    metrics: dict[str, float]


class StopRequest:
    """Turns SIGTERM and SIGINT into a wish that all ranks agree on at a step boundary; a second SIGINT interrupts at once.

    ``reason`` says what stopped the run, ``error`` is set if that is a failure.
    """

    def __init__(self) -> None:
        self.reason = ""
        self.error = ""

    def __enter__(self) -> StopRequest:
        self._previous = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.reason:
            raise KeyboardInterrupt
        self.reason = signal.Signals(number).name

    def fail(self, error: UserError) -> None:
        """A rank met a user's mistake outside any collective call, such as an image that cannot be read."""
        self.reason = self.error = str(error)

    def agreed(self, accelerator: Accelerator) -> bool:
        """Whether any rank wants to stop: one reduced number. Every rank learns the reason."""
        wishes = accelerator.reduce(torch.tensor(float(bool(self.reason)), device=accelerator.device), reduction="sum")
        if not wishes.item():
            return False
        if accelerator.num_processes > 1:
            from accelerate.utils import gather_object

            told = gather_object([(self.error, self.reason)])
            self.error, self.reason = max(told, key=lambda pair: (bool(pair[0]), bool(pair[1])))
        return True


def train(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    objective: DenoisingObjective,
    batches: Iterator[Tensor],
    *,
    seed: int,
    start_step: int,
    max_steps: int,
    learning_rate: Callable[[int], float],
    max_grad_norm: float,
    ema: EMAModel | None,
    stop: StopRequest,
    ahead: bool = False,
) -> Iterator[StepStats]:
    """Trains ``model`` from ``start_step`` to ``max_steps``.

    Args:
        accelerator: its ``gradient_accumulation_steps`` micro-batches make one optimizer step.
        model: prepared by ``accelerator``, in train mode.
        optimizer: likewise.
        objective: the loss of a micro-batch.
        batches: this rank's micro-batches, fp32 [B, C, H, W], all of one size; may raise `UserError`.
        seed: of every draw; step s of a resumed run draws what step s of an uninterrupted one draws.
        start_step: optimizer steps already taken.
        max_steps: optimizer steps in all.
        learning_rate: the rate of step s (from 0): a function, so that there is no scheduler state to restore.
        max_grad_norm: gradients are clipped to it; 0 does not clip.
        ema: updated after each step, on ``model``'s parameters.
        stop: ends the loop at a step boundary, when all ranks have learned of it.
        ahead: load and pair the next step's batches on another thread while this step runs; the numbers are the same.

    Yields:
        `StepStats`, when weights, optimizer and EMA are at the state that a checkpoint should hold.

    Raises:
        UserError: (exit code 1) the loss or the gradient is NaN or infinite; the step is not taken, the weights are those before it.
    """
    accumulation = accelerator.gradient_accumulation_steps
    micro_batches = _paired(accelerator, objective, batches, seed, start_step)
    if ahead:
        micro_batches = _look_ahead(micro_batches, accumulation, accelerator.device)
    for step in range(start_step, max_steps):
        start = time.perf_counter()
        fetched = _fetch(micro_batches, accumulation, stop)
        waited = time.perf_counter() - start
        if stop.agreed(accelerator):
            return
        reseed_globally(seed, "library", step, accelerator.process_index)
        collected = []
        for draws, pairs in fetched:
            with accelerator.accumulate(model):
                loss = objective(model, pairs, draws).mean()
                accelerator.backward(loss)
            collected.append({"loss": loss.detach(), **pairs.statistics})
        grad_norm = accelerator.clip_grad_norm_(model.parameters(), max_grad_norm or math.inf)
        metrics = _average(accelerator, collected) | {"learning_rate": learning_rate(step), "grad_norm": float(grad_norm)}
        _check_finite(metrics, step, loss_scaled=accelerator.scaler is not None)
        for group in optimizer.param_groups:
            group["lr"] = metrics["learning_rate"]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if ema is not None:
            ema.step(model.parameters())
        yield StepStats(step + 1, metrics | {"wait_seconds": waited, "step_seconds": time.perf_counter() - start})


def _paired(
    accelerator: Accelerator, objective: DenoisingObjective, batches: Iterator[Tensor], seed: int, start_step: int
) -> Iterator[tuple[Draws, Pairs]]:
    """Each micro-batch with its random numbers, timesteps and paired noises, on the device."""
    for count, x0 in enumerate(batches, start=start_step * accelerator.gradient_accumulation_steps):
        step, micro = divmod(count, accelerator.gradient_accumulation_steps)
        first_row = (micro * accelerator.num_processes + accelerator.process_index) * len(x0)
        draws = Draws(seed, step, first_row, accelerator.device)
        yield draws, objective.pair(x0.to(accelerator.device, non_blocking=True), draws)


def _look_ahead(items: Iterator[tuple[Draws, Pairs]], depth: int, device: torch.device) -> Iterator[tuple[Draws, Pairs]]:
    """The same items, ``depth`` of them made on a worker thread while the caller works; on a GPU on a stream of their own.

    The first item is made at once by the caller, so that loader processes are forked from the main thread.
    """
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def make() -> tuple[Draws, Pairs] | None:
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
                    _hand_over(item[1], torch.cuda.current_stream(device))
                yield item
                waiting.append(worker.submit(make))
                item = waiting.popleft().result()
        finally:
            worker.shutdown(cancel_futures=True)


def _hand_over(pairs: Pairs, stream: torch.cuda.Stream) -> None:
    """Tells the allocator that another stream's tensors are used on this one, so that their memory is not given away too early."""
    for tensor in (pairs.x0, pairs.timesteps, pairs.noise, *pairs.statistics.values()):
        tensor.record_stream(stream)


def _fetch(micro_batches: Iterator[tuple[Draws, Pairs]], count: int, stop: StopRequest) -> list[tuple[Draws, Pairs]]:
    """This step's micro-batches; a failure is kept for the other ranks to learn of instead of leaving them in a collective call."""
    try:
        return [next(micro_batches) for _ in range(count)]
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
                f"try a lower --learning_rate, more --lr_warmup_steps or --mixed_precision no",
                exit_code=1,
            )
