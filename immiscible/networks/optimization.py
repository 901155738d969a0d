"""How a network is trained: its average, optimizer and learning rate, and the options of speed and memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from immiscible.errors import UserError, first_line
from immiscible.networks.arguments import TrainingArguments

if TYPE_CHECKING:
    from diffusers import ModelMixin
    from diffusers.training_utils import EMAModel

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "radam": partial(torch.optim.RAdam, decoupled_weight_decay=True),  # AdamW with the rectification of Liu et al. 2020
}


def build_ema(network: ModelMixin, arguments: TrainingArguments, device: torch.device) -> EMAModel | None:
    """The moving average of the network's weights that the flags ask for, or None.

    Args:
        network: of diffusers; its class and configuration are saved with the average.
        arguments: ``ema_settings`` say how the decay rises and where it stops.
        device: where the average lives; with ``offload_ema`` that is host memory, which it leaves for its update alone.
    """
    from diffusers.training_utils import EMAModel

    if not arguments.use_ema:
        return None
    kind = _offloaded_ema() if arguments.offload_ema else EMAModel
    ema: EMAModel = kind(network.parameters(), model_cls=type(network), model_config=network.config, **arguments.ema_settings)
    ema.to("cpu" if arguments.offload_ema else device)
    return ema


@cache
def _offloaded_ema() -> type[EMAModel]:
    """Made when it is asked for: diffusers takes seconds to import."""
    from diffusers.training_utils import EMAModel

    class OffloadedEMA(EMAModel):
        """An average that lives in host memory and visits the weights' device for its update, where it is quick."""

        def step(self, parameters: Iterable[nn.Parameter]) -> None:
            weights = list(parameters)
            self.to(weights[0].device)
            super().step(weights)
            self.to("cpu")

    return OffloadedEMA


def build_optimizer(network: nn.Module, arguments: TrainingArguments) -> torch.optim.Optimizer:
    """The optimizer of the weights that are trained, those that require a gradient; with 8-bit states if the flags ask for them.

    Raises:
        UserError: bitsandbytes is asked for and not installed.
    """
    kind: Any = OPTIMIZERS[arguments.optimizer_type]
    if arguments.use_8bit_adam:
        if find_spec("bitsandbytes") is None:
            raise UserError("--use_8bit_adam needs bitsandbytes: `pip install bitsandbytes`")
        kind = import_module("bitsandbytes").optim.AdamW8bit
    optimizer: torch.optim.Optimizer = kind(
        [parameter for parameter in network.parameters() if parameter.requires_grad],
        lr=arguments.learning_rate,
        betas=(arguments.adam_beta1, arguments.adam_beta2),
        weight_decay=arguments.adam_weight_decay,
        eps=arguments.adam_epsilon,
    )
    return optimizer


def learning_rate(
    arguments: TrainingArguments, optimizer: torch.optim.Optimizer, max_steps: int, processes: int = 1
) -> Callable[[int], float]:
    """The rate of optimizer step s, from 0: diffusers' schedule, counted in optimizer steps whatever the accumulation and the ranks.

    Args:
        arguments: with ``scale_lr`` the rate is multiplied by the images of a step.
        optimizer: whose rate it is.
        max_steps: optimizer steps of the whole run.
        processes: of the run.

    Raises:
        UserError: the polynomial schedule would end above its beginning.
    """
    from diffusers.optimization import get_scheduler

    peak = arguments.learning_rate
    if arguments.lr_scheduler == "polynomial" and peak <= 1e-7:  # where diffusers' polynomial ends
        raise UserError(f"--lr_scheduler polynomial falls to 1e-7: --learning_rate must be above that, not {peak}")
    scheduler = get_scheduler(
        arguments.lr_scheduler,
        getattr(optimizer, "optimizer", optimizer),
        num_warmup_steps=arguments.lr_warmup_steps,
        num_training_steps=max_steps,
    )
    share = scheduler.lr_lambdas[0]
    images = arguments.gradient_accumulation_steps * arguments.train_batch_size * processes
    factor = images if arguments.scale_lr else 1
    return lambda step: factor * (peak * share(step))


def tuned(network: ModelMixin, arguments: TrainingArguments, device: torch.device) -> nn.Module:
    """The network with the speed and memory options of the flags switched on.

    Args:
        network: of diffusers, wherever it is.
        arguments: the flags.
        device: where it will train.

    Raises:
        UserError: xformers is not installed or does not go with this network, or the compiler's backend is unknown, or wrong on a CPU.
    """
    if arguments.gradient_checkpointing:
        network.enable_gradient_checkpointing()
    if arguments.channels_last:
        network.to(memory_format=torch.channels_last)
    if arguments.enable_xformers_memory_efficient_attention:
        if find_spec("xformers") is None:  # diffusers notices it only on networks with attention
            raise UserError(
                "--enable_xformers_memory_efficient_attention: xformers is not installed: `pip install xformers`, "
                "or leave the flag out for torch's own attention"
            )
        try:
            network.enable_xformers_memory_efficient_attention()
        except (ImportError, ValueError) as error:
            raise UserError(
                f"--enable_xformers_memory_efficient_attention: {first_line(error)}; without it torch's own attention is used"
            ) from None
    if arguments.torch_compile:
        backends = torch.compiler.list_backends(exclude_tags=())
        if arguments.torch_compile_backend not in backends:
            raise UserError(f"--torch_compile_backend {arguments.torch_compile_backend!r} is unknown; known: {', '.join(backends)}")
        # With torch 2.13 (x86, AVX2) 74 of 104 gradients of unet-tiny and 161 of 268 of unet-small are wrong, most of these exactly 0;
        # the loss is right, so that nothing shows it. By aot_eager all are right.
        if device.type == "cpu" and arguments.torch_compile_backend == "inductor":
            raise UserError(
                "--torch_compile: on a CPU torch's inductor loses gradients of these networks without a word, and they train wrongly; "
                "leave it out there (--torch_compile_backend aot_eager is right, and no faster)"
            )
        compiled: nn.Module = torch.compile(network, backend=arguments.torch_compile_backend)  # type: ignore[assignment]
        return compiled
    return network
