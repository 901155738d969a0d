"""ZeRO stage 2 of DeepSpeed: each process has all weights and their average, and its part of the gradient and of the optimizer's state.

accelerate lets DeepSpeed take its step inside the backward pass. Here it is taken where the loop takes it, when the step's rate is set and
its gradient known to be finite.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from immiscible.errors import UserError
from immiscible.networks.arguments import TrainingArguments

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)


def by_zero2(accelerator: Accelerator) -> bool:
    """Whether DeepSpeed trains."""
    return str(accelerator.distributed_type.value) == "DEEPSPEED"


def check_zero2(settings: Mapping[str, str]) -> None:
    """Refuses what accelerate's settings may ask of DeepSpeed beside stage 2.

    Args:
        settings: the environment, where accelerate's launcher leaves them.

    Raises:
        UserError: DeepSpeed is not there, or would do something else.
    """
    if find_spec("deepspeed") is None:
        raise UserError("accelerate is configured for DEEPSPEED, which is not installed: `pip install deepspeed`, or launch by FSDP2")
    wanted = {"ZERO_STAGE": "2", "OFFLOAD_OPTIMIZER_DEVICE": "none", "OFFLOAD_PARAM_DEVICE": "none", "CONFIG_FILE": "none"}
    for name, right in wanted.items():
        given = settings.get(f"ACCELERATE_DEEPSPEED_{name}", right)
        if given.lower() != right:
            raise UserError(
                f"accelerate is configured for DeepSpeed with {name.lower()} {given}: stage 2 without offloading or a file of its own is "
                f"what these scripts train by (configs/accelerate/deepspeed_zero2.yaml); to split the weights as well launch by FSDP2"
            )


def split_optimizer(
    network: nn.Module, optimizer: torch.optim.Optimizer, arguments: TrainingArguments, accelerator: Accelerator
) -> tuple[nn.Module, Any]:
    """DeepSpeed's engine, which is called as the network is, and the optimizer whose step is the engine's.

    The network stays in fp32: DeepSpeed's own bf16 would leave bf16 weights alone to be averaged.
    """
    config = accelerator.state.deepspeed_plugin.deepspeed_config
    own = config.pop("bf16", None)
    micro, accumulation = arguments.train_batch_size, arguments.gradient_accumulation_steps
    config |= {"train_micro_batch_size_per_gpu": micro, "gradient_accumulation_steps": accumulation}
    config |= {"train_batch_size": micro * accumulation * accelerator.num_processes, "gradient_clipping": arguments.max_grad_norm}
    logger.info("%-18s ZeRO-2 over %d processes", "split", accelerator.num_processes)
    engine, _ = accelerator.prepare(network, optimizer)
    if own is not None:
        config["bf16"] = own  # by which accelerate knows the precision
    accelerator.deepspeed_engine_wrapped = _Engine(engine)
    stepped = _stepped(engine)
    accelerator._optimizers = [stepped]
    return engine, stepped


class _Engine:
    """What accelerate's backward pass and clipping call; the clipping itself is the engine's, in its step."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine

    def backward(self, loss: Tensor, sync_gradients: bool = True, **options: Any) -> None:
        """Adds the gradient of one micro-batch; that of a step is averaged over the processes with its last one."""
        self.engine.set_gradient_accumulation_boundary(is_boundary=sync_gradients)
        self.engine.backward(loss, **options)

    def get_global_grad_norm(self) -> float:
        """Of the gradient that waits for its step."""
        return float(self.engine.optimizer.scaled_global_norm())


def _stepped(engine: Any) -> Any:
    from accelerate.optimizer import AcceleratedOptimizer

    class EngineOptimizer(AcceleratedOptimizer):
        """The optimizer of this process's part of the weights, whose step also clips, and gathers the new weights."""

        def step(self, closure: Any = None) -> None:
            engine.step()

        def zero_grad(self, set_to_none: bool | None = None) -> None:
            """The engine does it in its step."""

    return EngineOptimizer(engine.optimizer.optimizer, device_placement=False)


def whole_state(engine: Any, weights: Iterable[nn.Parameter]) -> Iterator[dict[str, Tensor]]:
    """The optimizer's state of each weight, put together from all processes, on the CPU; every rank calls it.

    Counts of steps are the same for all weights.
    """
    from deepspeed.utils import safe_get_full_optimizer_state

    counts, kinds = _state_of_parts(engine)
    for weight in weights:
        whole = {kind: safe_get_full_optimizer_state(weight, kind).cpu() for kind in kinds}
        yield whole | {kind: count.clone() for kind, count in counts.items()}  # files hold no tensor twice


def put_state(engine: Any, states: Mapping[nn.Parameter, Mapping[str, Tensor]]) -> None:
    """Gives each process its part of the state of all weights, and of the weights, which the network holds already."""
    from deepspeed.utils import safe_set_full_optimizer_state

    optimizer = engine.optimizer
    optimizer.refresh_fp32_params()
    kinds = next(iter(states.values()), {})  # none, where no step was taken
    for part in optimizer.single_partition_of_fp32_groups if kinds else []:
        for kind, value in kinds.items():
            optimizer.optimizer.state[part][kind] = torch.zeros_like(part) if value.ndim else value.clone()
    if kinds:
        optimizer._lazy_init_hp_params_optimizer_state()
    for weight, state in states.items():
        for kind, value in state.items():
            if value.ndim:
                safe_set_full_optimizer_state(weight, value.to(weight.device), kind)


def _state_of_parts(engine: Any) -> tuple[dict[str, Tensor], list[str]]:
    state = engine.optimizer.optimizer.state
    first: dict[str, Tensor] = next(iter(state.values()), {})
    return {kind: value for kind, value in first.items() if not value.ndim}, [kind for kind, value in first.items() if value.ndim]
