"""A run's folder and its life: opening it safely, logging, saving the pipeline with its method, the final summary."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

from torch import Tensor
from tqdm import tqdm

from immiscible.errors import UserError
from immiscible.evaluation.leakage import ClassLeak
from immiscible.training.log import RunLog
from immiscible.training.loop import StepStats, StopRequest

if TYPE_CHECKING:
    from accelerate import Accelerator

    from immiscible.configs import AnyConfig


logger = logging.getLogger(__name__)


def follow(
    steps: Iterator[StepStats],
    config: AnyConfig,
    accelerator: Accelerator,
    log: RunLog,
    stop: StopRequest,
    *,
    start_step: int,
    max_steps: int,
    state: Mapping[str, Tensor],
    saved: bool,
    leak: ClassLeak | None,
    measure: Callable[[int], None],
    save: Callable[[int, Mapping[str, Tensor]], None],
    show: Callable[[int], None],
) -> bool:
    """Takes a run's steps: shows progress, writes lines, saves a checkpoint when one is due and at the end.

    Args:
        steps: from `train`.
        config: the run's flags.
        accelerator: every rank calls this.
        log: of the run.
        stop: what may end the run early.
        start_step: optimizer steps taken before.
        max_steps: the last step.
        state: the coupling's at ``start_step``.
        saved: whether the run's folder holds a checkpoint of ``start_step``.
        leak: what is logged of the classes in the noise, if anything.
        measure: called with each step before it may be saved, so that a run that goes on from there has its measurements.
        save: writes a checkpoint of a step and its coupling state.
        show: called with each step but the last after it may have been saved, for samples.

    Returns:
        whether the last step was reached; if not, a signal stopped the run, and it has said so.

    Raises:
        UserError: a rank met one; everything up to the last step is saved.
    """
    step = start_step
    main = accelerator.is_main_process
    with stop, tqdm(total=max_steps, initial=start_step, desc="training", unit="step", disable=not main) as bar:
        for stats in steps:
            step, state, last = stats.step, stats.coupling_state, stats.step == max_steps
            checkpoint_due = step % config.checkpointing_steps == 0
            means = log.add(step, stats.metrics, write=step % config.logging_steps == 0 or checkpoint_due or last, leak=leak)
            bar.update()
            bar.set_postfix(loss=f"{means['loss']:.4f}", refresh=False)
            measure(step)
            if checkpoint_due:
                save(step, state)
            saved = checkpoint_due
            if not last:
                show(step)
    if not saved:
        save(step, state)
    if stop.error:
        raise UserError(f"{stop.error} (stopped and saved at step {step})", exit_code=1)
    if step < max_steps:
        accelerator.print(f"Stopped by {stop.reason} at step {step} of {max_steps}; continue with --resume_from_checkpoint latest")
    return step == max_steps
