"""The accelerator of a process, from its launch to its end."""

from __future__ import annotations

import logging
import os
import secrets
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tqdm.contrib.logging import logging_redirect_tqdm

from immiscible.errors import UserError
from immiscible.training.checkpoints import read_state

if TYPE_CHECKING:
    from accelerate import Accelerator

    from immiscible.training.arguments import RunConfig


logger = logging.getLogger(__name__)


@contextmanager
def session(config: RunConfig) -> Iterator[Accelerator]:
    """The accelerator of this process, set up as the flags say, and ended on every path; rank 0 alone logs notices."""
    if config.local_rank != -1 and "RANK" in os.environ:  # without a launcher it means nothing, as in the diffusers script
        os.environ.setdefault("LOCAL_RANK", str(config.local_rank))
    from accelerate import Accelerator, InitProcessGroupKwargs
    from accelerate.utils import GradientAccumulationPlugin, ProjectConfiguration

    _check_launcher()
    _check_tracker(config.tracker, config.tracker_flag)
    if config.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
    try:
        accelerator = Accelerator(
            # A plugin, because accelerate lets the environment overrule a plain number.
            gradient_accumulation_plugin=GradientAccumulationPlugin(
                num_steps=config.gradient_accumulation_steps, sync_with_dataloader=False
            ),
            mixed_precision=config.mixed_precision,
            log_with=None if config.tracker == "none" else config.tracker,
            project_config=ProjectConfiguration(
                project_dir=config.output_dir, logging_dir=os.path.join(config.output_dir or "", config.logging_dir)
            ),
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=2))],
        )
    except ValueError as error:  # accelerate's word for a precision that this device lacks
        raise UserError(f"--mixed_precision {config.mixed_precision}: {error}") from None
    package_logger = logging.getLogger("immiscible")
    package_logger.setLevel(logging.INFO if accelerator.is_main_process else logging.ERROR)
    if not package_logger.handlers:
        package_logger.addHandler(logging.StreamHandler())
    try:
        if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":  # accelerate would train in fp32 without a word
            raise UserError("--mixed_precision fp16 needs a GPU; on a CPU give bf16 or no")
        with logging_redirect_tqdm([package_logger]):
            yield accelerator
        accelerator.wait_for_everyone()
    except UserError as error:
        traceback.clear_frames(error.__traceback__)  # they hold the model
        accelerator.wait_for_everyone()  # raised by all ranks alike
        raise
    finally:
        accelerator.free_memory()  # DDP must be gone before its process group is, whose end it can deadlock otherwise (gloo, torch 2.13)
        accelerator.end_training()


def _check_launcher() -> None:
    """Refuses what splits the network over the processes: rank 0 alone samples it and saves it, as it holds it."""
    from accelerate.utils import parse_flag_from_env

    for name in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        if parse_flag_from_env(f"ACCELERATE_USE_{name}"):
            raise UserError(
                f"accelerate is configured for {name}, under which this script neither trains nor saves what it should; launch it with "
                f"--multi_gpu, as configs/accelerate/4xa6000.yaml does: every process then holds the whole network (DDP)"
            )


def _check_tracker(name: str, flag: str) -> None:
    from accelerate.tracking import get_available_trackers
    from accelerate.utils import LoggerType

    known = [kind.value for kind in LoggerType]
    if name not in (*known, "none"):
        raise UserError(f"{flag} {name!r} is unknown; known: {', '.join(known)}, none")
    if name not in ("all", "none") and name not in [kind.value for kind in get_available_trackers()]:
        raise UserError(f"{flag} {name} is not installed: `pip install {name}`, or {flag} none (metrics.jsonl is always written)")


def settle_seed(config: RunConfig, resumed: Path | None) -> int:
    """The run's seed: as given, else the resumed checkpoint's, else drawn by rank 0 and shared. It is written into ``config``."""
    from accelerate.utils import broadcast_object_list

    if config.seed is None:
        shared = [read_state(resumed)["identity"]["--seed"] if resumed else secrets.randbelow(2**31)]
        config.seed = int(broadcast_object_list(shared)[0])
        logger.info("seed %d%s", config.seed, " (the resumed run's)" if resumed else " (drawn; pass --seed to repeat this run)")
    return config.seed
