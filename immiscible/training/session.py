"""The accelerator of a process, from its launch to its end."""

from __future__ import annotations

import ctypes
import logging
import os
import re
import secrets
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm.contrib.logging import logging_redirect_tqdm

from immiscible.errors import PeerLost, UserError, first_line
from immiscible.training.checkpoints import read_state
from immiscible.training.zero2 import check_zero2

if TYPE_CHECKING:
    from accelerate import Accelerator

    from immiscible.training.arguments import RunConfig

logger = logging.getLogger(__name__)

RENDEZVOUS = timedelta(minutes=5)  # in which all processes must have come
PATIENCE = timedelta(hours=2)  # with which ranks wait for rank 0, which samples and measures alone
GRACE = 20.0  # seconds in which a process whose partner is gone must have ended
PR_SET_PDEATHSIG = 1


@contextmanager
def session(config: RunConfig) -> Iterator[Accelerator]:
    """The accelerator of this process, set up as the flags say, and ended on every path; rank 0 alone logs notices."""
    if config.local_rank != -1 and "RANK" in os.environ:  # without a launcher it means nothing, as in the diffusers script
        os.environ.setdefault("LOCAL_RANK", str(config.local_rank))
    from accelerate.utils import GradientAccumulationPlugin, ProjectConfiguration

    _check_tracker(config.tracker, config.tracker_flag)
    if config.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
    with (
        _threads_of_trackers(),
        joined(
            config.mixed_precision,
            # A plugin, because accelerate lets the environment overrule a plain number.
            gradient_accumulation_plugin=GradientAccumulationPlugin(
                num_steps=config.gradient_accumulation_steps, sync_with_dataloader=False
            ),
            log_with=None if config.tracker == "none" else config.tracker,
            project_config=ProjectConfiguration(
                project_dir=config.output_dir, logging_dir=os.path.join(config.output_dir or "", config.logging_dir)
            ),
        ) as accelerator,
    ):
        package_logger = logging.getLogger("immiscible")
        package_logger.setLevel(logging.INFO if accelerator.is_main_process else logging.ERROR)
        if not package_logger.handlers:
            package_logger.addHandler(logging.StreamHandler())
        with logging_redirect_tqdm([package_logger]):
            yield accelerator


@contextmanager
def _threads_of_trackers() -> Iterator[None]:
    """Inside the block a thread that cannot write says nothing itself: a tracker raises in the main thread, too, what its own has met."""

    def tell(met: threading.ExceptHookArgs) -> None:
        if not isinstance(met.exc_value, OSError):
            before(met)

    before, threading.excepthook = threading.excepthook, tell
    try:
        yield
    finally:
        threading.excepthook = before


@contextmanager
def joined(mixed_precision: str | None, patience: timedelta = PATIENCE, **settings: Any) -> Iterator[Accelerator]:
    """The accelerator of this process, which has met all others of its launch, and is ended on every path.

    Args:
        mixed_precision: what ``--mixed_precision`` says.
        patience: with which a process waits for another once all have come.
        settings: further arguments of `Accelerator`.

    Raises:
        UserError: the launch or the precision is none that is served here.
        PeerLost: another process never came, or has ended.
    """
    from accelerate import Accelerator, InitProcessGroupKwargs

    _check_launcher()
    _end_with_the_launcher()
    try:
        accelerator = Accelerator(mixed_precision=mixed_precision, kwargs_handlers=[InitProcessGroupKwargs(timeout=RENDEZVOUS)], **settings)
    except ValueError as error:  # accelerate's word for a precision that this device lacks
        raise UserError(f"--mixed_precision {mixed_precision}: {error}") from None
    except RuntimeError as error:
        raise _lost(error) from None
    _check_processes(accelerator, patience)
    _split_on_cpus(accelerator)
    try:
        _check_precision(accelerator)
        yield accelerator
        accelerator.wait_for_everyone()
    except UserError as error:
        traceback.clear_frames(error.__traceback__)  # they hold the model
        accelerator.wait_for_everyone()  # raised by all ranks alike
        raise
    except RuntimeError as error:
        if accelerator.num_processes == 1:
            raise
        threading.Thread(target=_end_in, args=(GRACE,), daemon=True).start()  # the end of a process group may wait for the dead, too
        raise _lost(error) from None
    finally:
        accelerator.free_memory()  # DDP must be gone before its process group is, whose end it can deadlock otherwise (gloo, torch 2.13)
        try:
            accelerator.end_training()
        except OSError as error:  # of a tracker, which may be why this ends
            logger.error("the last lines for the tracker cannot be written: %s", error.strerror or error)
            accelerator.state.destroy_process_group()


def _check_precision(accelerator: Accelerator) -> None:
    """Refuses what accelerate would overrule without a word."""
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launched not in ("no", accelerator.mixed_precision):
        raise UserError(
            f"accelerate is launched with mixed precision {launched} and --mixed_precision is {accelerator.mixed_precision}: give "
            f"--mixed_precision {launched} to the script, or launch with --mixed_precision no"
        )
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":  # accelerate would compute in fp32
        raise UserError("--mixed_precision fp16 needs a GPU; on a CPU give bf16 or no")


def _lost(error: RuntimeError) -> Exception:
    """What torch.distributed raises where a process is gone or never came, as a line; any other error as it is."""
    kinds = tuple(getattr(torch.distributed, name) for name in ("DistBackendError", "DistNetworkError", "DistStoreError"))
    if not isinstance(error, kinds) and not re.search(r"gloo|NCCL|[Cc]onnection (closed|reset)|timed? ?out", str(error)):
        return error
    return PeerLost(
        f"another process of this launch has ended, or never came ({first_line(error)[:120]}); what is saved is whole: start all processes "
        f"again, a training with --resume_from_checkpoint latest"
    )


def _end_in(seconds: float) -> None:
    time.sleep(seconds)
    os._exit(1)


def _end_with_the_launcher() -> None:
    """Lets a launcher's death reach this process as SIGHUP, so that it saves: `docker stop` and `kill` end the launcher alone."""
    if sys.platform == "linux" and {"ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"} & os.environ.keys():
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGHUP)


def _check_processes(accelerator: Accelerator, patience: timedelta) -> None:
    """Refuses a launch in which each process would work by itself in one folder; and sets the patience of those that wait for another.

    Raises:
        UserError: the launcher has started another number of processes than accelerate sees.
    """
    started = int(os.environ.get("WORLD_SIZE") or 1)
    if started != accelerator.num_processes:
        raise UserError(
            f"the launcher started {started} processes (WORLD_SIZE) and accelerate sees {accelerator.num_processes}: each would work by "
            f"itself in one folder; on CPUs set ACCELERATE_USE_CPU=true for all of them, on GPUs launch with accelerate launch --multi_gpu"
        )
    if accelerator.num_processes > 1:
        torch.distributed.distributed_c10d._set_pg_timeout(patience)  # no public call changes what the rendezvous began with


# What accelerate's settings may not ask of FSDP2, as it puts them into the environment, and what is right.
FSDP2_ONLY = {
    "FSDP_VERSION": ("2", "fsdp_version: 2 (FSDP1 is not served)"),
    "FSDP_OFFLOAD_PARAMS": ("false", "fsdp_offload_params: false"),
    "FSDP_CPU_RAM_EFFICIENT_LOADING": ("false", "fsdp_cpu_ram_efficient_loading: false"),
    "FSDP_ACTIVATION_CHECKPOINTING": ("false", "fsdp_activation_checkpointing: false, and --gradient_checkpointing"),
}


def _check_launcher() -> None:
    """Refuses what splits the network over the processes in another way than `immiscible.training.sharding` does."""
    from accelerate.utils import parse_flag_from_env

    if parse_flag_from_env("ACCELERATE_USE_MEGATRON_LM"):
        raise UserError(
            "accelerate is configured for MEGATRON_LM, under which this script neither trains nor saves what it should; launch it with "
            "--multi_gpu or, to split the network over the processes, by FSDP2 (configs/accelerate/fsdp2.yaml)"
        )
    if parse_flag_from_env("ACCELERATE_USE_FSDP") or parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        _check_versions()
    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        check_zero2(os.environ)
    if parse_flag_from_env("ACCELERATE_USE_FSDP"):
        for name, (right, words) in FSDP2_ONLY.items():
            given = os.environ.get(name, "1" if name == "FSDP_VERSION" else "false")
            if given.lower() != right:
                raise UserError(
                    f"accelerate is configured for FSDP with {name}={given}: set {words}, as configs/accelerate/fsdp2.yaml does"
                )


def _check_versions() -> None:
    """Refuses what would fail at the first checkpoint, or train by FSDP1: the scripts' lowest versions are older than FSDP2."""
    from accelerate import Accelerator
    from torch.distributed import checkpoint

    if not hasattr(Accelerator, "is_fsdp2") or not hasattr(checkpoint, "HuggingFaceStorageWriter"):
        raise UserError(
            "FSDP2 and DeepSpeed need a newer torch or accelerate than these, such as constraints.txt names; or launch with --multi_gpu"
        )


def _split_on_cpus(accelerator: Accelerator) -> None:
    """accelerate splits networks on accelerators alone and falls back to DDP without a word; FSDP2 and DeepSpeed work on CPUs, too."""
    from accelerate import PartialState
    from accelerate.utils import DeepSpeedPlugin, DistributedType, FullyShardedDataParallelPlugin, parse_flag_from_env

    asked = [DistributedType(name) for name in ("FSDP", "DEEPSPEED") if parse_flag_from_env(f"ACCELERATE_USE_{name}")]
    if not asked or accelerator.distributed_type in asked:
        return
    if accelerator.num_processes == 1:
        logger.warning("accelerate is configured for %s, and there is one process, which holds the whole network", asked[0].value)
        return
    state, precision = accelerator.state, accelerator.mixed_precision
    if asked[0] is DistributedType.FSDP:
        state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    else:
        plugin = DeepSpeedPlugin()
        plugin.set_mixed_precision(precision)
        plugin.select(_from_accelerator_state=True)
        state.deepspeed_plugins = plugin
    state.distributed_type = PartialState().distributed_type = asked[0]


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

    origin = ""
    if config.seed is None:
        shared = [read_state(resumed)["identity"]["--seed"] if resumed else secrets.randbelow(2**31)]
        config.seed = int(broadcast_object_list(shared)[0])
        origin = " (the resumed run's)" if resumed else " (drawn; pass --seed to repeat this run)"
    logger.info("%-18s %d%s", "seed", config.seed, origin)
    return config.seed
