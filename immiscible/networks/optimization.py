"""How a network is trained: optimizer, learning rate, average, speed and memory options."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from diffusers.training_utils import EMAModel
from torch import nn

from immiscible.errors import UserError

if TYPE_CHECKING:
    from accelerate import Accelerator
    from diffusers import ModelMixin, UNet2DConditionModel, UNet2DModel

    from immiscible.configs import AnyConfig, TextToImageConfig, UnconditionalConfig


def build_ema(unet: UNet2DModel, config: UnconditionalConfig, device: torch.device) -> EMAModel | None:
    """The moving average of ``unet``'s weights that the flags ask for, with the decay's warm-up, or None."""
    from diffusers.training_utils import EMAModel

    if not config.use_ema:
        return None
    ema = EMAModel(
        unet.parameters(),
        decay=config.ema_max_decay,
        use_ema_warmup=True,
        inv_gamma=config.ema_inv_gamma,
        power=config.ema_power,
        foreach=True,
        model_cls=type(unet),
        model_config=unet.config,
    )
    ema.to(device)
    return ema


def build_optimizer(unet: UNet2DModel, config: UnconditionalConfig) -> torch.optim.Optimizer:
    """AdamW as the flags say."""
    betas = (config.adam_beta1, config.adam_beta2)
    return torch.optim.AdamW(
        unet.parameters(), lr=config.learning_rate, betas=betas, weight_decay=config.adam_weight_decay, eps=config.adam_epsilon
    )


def learning_rate(config: AnyConfig, optimizer: torch.optim.Optimizer, max_steps: int) -> Callable[[int], float]:
    """The rate of optimizer step s, from 0: diffusers' schedule, counted in optimizer steps whatever the accumulation and the ranks."""
    from diffusers.optimization import get_scheduler

    if config.lr_scheduler == "polynomial" and config.learning_rate <= 1e-7:  # where diffusers' polynomial ends
        raise UserError(f"--lr_scheduler polynomial falls to 1e-7: --learning_rate must be above that, not {config.learning_rate}")
    scheduler = get_scheduler(
        config.lr_scheduler,
        getattr(optimizer, "optimizer", optimizer),
        num_warmup_steps=config.lr_warmup_steps,
        num_training_steps=max_steps,
    )
    factor = scheduler.lr_lambdas[0]
    return lambda step: config.learning_rate * factor(step)


def tuned(unet: ModelMixin, config: AnyConfig) -> nn.Module:
    """The network with the speed and memory options of the flags switched on."""
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if config.channels_last:
        unet.to(memory_format=torch.channels_last)
    if config.enable_xformers_memory_efficient_attention:
        if find_spec("xformers") is None:  # diffusers notices it only on networks with attention
            raise UserError(
                "--enable_xformers_memory_efficient_attention: xformers is not installed: `pip install xformers`, "
                "or leave the flag out for torch's own attention"
            )
        try:
            unet.enable_xformers_memory_efficient_attention()
        except (ImportError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"--enable_xformers_memory_efficient_attention: {reason}; without it torch's own attention is used") from None
    if config.torch_compile:
        backends = torch.compiler.list_backends(exclude_tags=())
        if config.torch_compile_backend not in backends:
            raise UserError(f"--torch_compile_backend {config.torch_compile_backend!r} is unknown; known: {', '.join(backends)}")
        compiled: nn.Module = torch.compile(unet, backend=config.torch_compile_backend)  # type: ignore[assignment]
        return compiled
    return unet


def build_text_optimizer(unet: nn.Module, config: TextToImageConfig, accelerator: Accelerator) -> torch.optim.Optimizer:
    """AdamW of the trained weights, with 8-bit states if the flags ask for them.

    Raises:
        UserError: bitsandbytes is not installed.
    """
    kind: Any = torch.optim.AdamW
    if config.use_8bit_adam:
        if find_spec("bitsandbytes") is None:
            raise UserError("--use_8bit_adam needs bitsandbytes: `pip install bitsandbytes`")
        kind = import_module("bitsandbytes").optim.AdamW8bit
    trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    betas = (config.adam_beta1, config.adam_beta2)
    optimizer: torch.optim.Optimizer = kind(
        trained, lr=config.learning_rate, betas=betas, weight_decay=config.adam_weight_decay, eps=config.adam_epsilon
    )
    return optimizer


def text_learning_rate(
    config: TextToImageConfig, optimizer: torch.optim.Optimizer, max_steps: int, processes: int
) -> Callable[[int], float]:
    """As `learning_rate`, times the images of a step with ``--scale_lr``."""
    rate = learning_rate(config, optimizer, max_steps)
    factor = config.gradient_accumulation_steps * config.train_batch_size * processes if config.scale_lr else 1
    return lambda step: factor * rate(step)


class _OffloadedEMA(EMAModel):
    """An average that lives in host memory and visits the weights' device for its update, where it is quick."""

    def step(self, parameters: Iterable[nn.Parameter]) -> None:
        weights = list(parameters)
        self.to(weights[0].device)
        super().step(weights)
        self.to("cpu")


def build_text_ema(unet: UNet2DConditionModel, config: TextToImageConfig, device: torch.device) -> EMAModel | None:
    """The moving average of diffusers' text-to-image example, or None: decay ``(1 + n) / (10 + n)`` up to 0.9999."""
    if not config.use_ema:
        return None
    kind: Any = _OffloadedEMA if config.offload_ema else EMAModel
    ema: EMAModel = kind(unet.parameters(), model_cls=type(unet), model_config=unet.config, foreach=config.foreach_ema)
    ema.to("cpu" if config.offload_ema else device)
    return ema
