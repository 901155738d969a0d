"""Networks larger than one device: FSDP2 (torch's `fully_shard`, by accelerate) leaves on each process its part of every weight, of its
gradient, of its average and of the optimizer's state; a block's weights are gathered while it computes.

The loop does not know of it: optimizer and average work on the parts. What rank 0 does alone with the network, which is to sample it, to
measure it and to save it, it does with a whole copy in host memory, filled from all parts when it is needed.
"""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from immiscible.errors import UserError, first_line
from immiscible.networks.arguments import TrainingArguments
from immiscible.networks.optimization import build_ema, build_optimizer, tuned
from immiscible.networks.weights import PRECISIONS
from immiscible.training.zero2 import by_zero2, split_optimizer

if TYPE_CHECKING:
    from accelerate import Accelerator
    from diffusers import ModelMixin
    from diffusers.training_utils import EMAModel

logger = logging.getLogger(__name__)

BLOCKS = ("BasicTransformerBlock", "JointTransformerBlock", "ResnetBlock2D")  # gathered one at a time; all else is while the network works
ELEMENTWISE = ("adamw", "radam")  # optimizers to which a part of a weight is a weight


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether each process holds a part of what is trained."""
    return by_zero2(accelerator) or _by_fsdp2(accelerator)


def _by_fsdp2(accelerator: Accelerator) -> bool:
    return bool(getattr(accelerator, "is_fsdp2", False))  # which older versions do not know, as they do not FSDP2


class Whole:
    """The network as rank 0 samples, measures and saves it; here each process holds all of it.

    Args:
        ema: the average of its weights, or None.
    """

    def __init__(self, ema: EMAModel | None) -> None:
        self._ema = ema

    @contextmanager
    def at(self, step: int) -> Iterator[EMAModel | None]:
        """Inside the block the network that the task holds has the weights of ``step``; every rank calls it and gets their average."""
        yield self._ema


class Gathered(Whole):
    """The same of a network of which each process holds a part.

    Args:
        network: the task's, with all its weights in host memory on rank 0, and with no values on other ranks.
        model: what is trained, with the same weights in the same order, each a `DTensor`.
        shards: the average of its weights, or None.
        ema: that of ``network``, or None.
        device: where rank 0 samples.
    """

    def __init__(self, network: nn.Module, model: nn.Module, shards: EMAModel | None, ema: EMAModel | None, device: torch.device) -> None:
        super().__init__(ema)
        self._network, self._model, self._shards, self._device = network, model, shards, device
        self._step: int | None = None

    @contextmanager
    def at(self, step: int) -> Iterator[EMAModel | None]:
        """See `Whole.at`; the parts are gathered once for all that is done at a step."""
        if step != self._step:
            _gather(self._model.parameters(), self._network.parameters())
            if self._shards is not None and self._ema is not None:
                _gather(self._shards.shadow_params, self._ema.shadow_params)
            self._step = step
        here = not next(self._network.parameters()).is_meta
        if here:
            self._network.to(self._device)
        try:
            yield self._ema
        finally:
            if here:
                self._network.to("cpu")


@torch.no_grad()
def _gather(parts: Iterable[Tensor], whole: Iterable[Tensor]) -> None:
    """Fills the tensors of rank 0, one after the other; those of other ranks have no values to be filled."""
    for part, tensor in zip(parts, whole, strict=True):
        tensor.copy_(part.full_tensor())  # type: ignore[attr-defined]


def prepared(network: ModelMixin, arguments: TrainingArguments, accelerator: Accelerator) -> tuple[nn.Module, Any, EMAModel | None, Whole]:
    """What trains a network: itself as it is called, its optimizer, the average of its weights or None, and the way to see it whole.

    Args:
        network: of a task, with the same weights on every rank; of a run that shards it, a copy is trained.
        arguments: the flags.
        accelerator: of the run.

    Raises:
        UserError: the flags ask for what cannot be done with parts of a network, or with this one.
    """
    device = accelerator.device
    if is_sharded(accelerator):
        _check(arguments, accelerator)
    if not _by_fsdp2(accelerator):
        bare = build_optimizer(network, arguments)
        ema = build_ema(network, arguments, device, bare)
        ready = tuned(network, arguments, device)
        if by_zero2(accelerator):
            _autocast(ready, accelerator)
            model, optimizer = split_optimizer(ready, bare, arguments, accelerator)
        else:
            model, optimizer = accelerator.prepare(ready, bare)
        return model, optimizer, ema, Whole(ema)
    copied: Any = copy.deepcopy(network.to("cpu"))  # in host memory: the device never holds all of it
    _shard_shared(copied)
    model, optimizer = _shard(tuned(copied, arguments, device), build_optimizer(copied, arguments), accelerator)
    shards = build_ema(model, arguments, device)
    whole = build_ema(network, arguments, torch.device("cpu"))
    for each in (model, network):
        _autocast(each, accelerator)
    if not accelerator.is_main_process:
        network.to("meta")
        if whole is not None:
            whole.to("meta")
    return model, optimizer, shards, Gathered(network, model, shards, whole, device)


def _autocast(network: nn.Module, accelerator: Accelerator) -> None:
    """Computes a network in the run's precision and gives its output in fp32, as accelerate has it in DDP."""
    from accelerate.utils import convert_outputs_to_fp32

    if accelerator.mixed_precision != "no":
        autocast = torch.autocast(accelerator.device.type, dtype=PRECISIONS[accelerator.mixed_precision])
        network.forward = convert_outputs_to_fp32(autocast(network.forward))


def _check(arguments: TrainingArguments, accelerator: Accelerator) -> None:
    """Refuses what the parts of a weight cannot do, or what nobody has tried with them."""
    refused = {
        f"--optimizer {arguments.optimizer}": arguments.optimizer not in ELEMENTWISE,
        "--use_8bit_adam": arguments.use_8bit_adam,
        "--offload_ema": arguments.offload_ema,
        "--channels_last": arguments.channels_last,
        "--torch_compile": arguments.torch_compile,
        "--mixed_precision fp16": accelerator.mixed_precision == "fp16",
    }
    if asked := [flag for flag, given in refused.items() if given]:
        raise UserError(
            f"{asked[0]} does not go with FSDP2 or DeepSpeed, which split weights or what is kept of them: leave it out (optimizers "
            f"{', '.join(ELEMENTWISE)}; precisions no, bf16), or launch with --multi_gpu"
        )


def _shard_shared(network: nn.Module) -> None:
    """Makes blocks of their own of the modules that several blocks share, of which none could have them; gathered once for all."""
    from torch.distributed.fsdp import fully_shard

    seen: set[nn.Module] = set()
    taken: set[nn.Module] = set()
    for _, module in network.named_modules(remove_duplicate=False):  # the outer ones first
        if module in seen and module not in taken and any(True for _ in module.parameters()):
            taken.update(module.modules())
            fully_shard(module, reshard_after_forward=False)
        seen.add(module)


def _shard(model: ModelMixin, optimizer: torch.optim.Optimizer, accelerator: Accelerator) -> tuple[nn.Module, Any]:
    """Both as accelerate shards them; weights are gathered and gradients reduced in fp32."""
    from torch.distributed.fsdp import MixedPrecisionPolicy
    from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

    plugin = accelerator.state.fsdp_plugin
    plugin.mixed_precision_policy = MixedPrecisionPolicy()
    plugin.auto_wrap_policy = transformer_auto_wrap_policy
    if not plugin.transformer_cls_names_to_wrap:
        kinds = Counter(type(module).__name__ for module in model.modules())
        # One block alone would spare nothing, and diffusers' DiT calls a module in the midst of its first, which several blocks share.
        plugin.transformer_cls_names_to_wrap = [name for name in BLOCKS if kinds[name] > 1]
    logger.info("%-18s FSDP2 over %d processes, in blocks of %s", "split", accelerator.num_processes, plugin.transformer_cls_names_to_wrap)
    try:
        sharded, prepared_optimizer = accelerator.prepare(model, optimizer)
    except ValueError as error:  # accelerate's word for blocks that the network does not have
        raise UserError(f"FSDP2 cannot split this network by fsdp_transformer_layer_cls_to_wrap: {first_line(error)}") from None
    return sharded, prepared_optimizer
