"""How a network is trained: its average, optimizer and learning rate, and the options of speed and memory."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from immiscible.errors import UserError, first_line
from immiscible.networks.arguments import TrainingArguments

if TYPE_CHECKING:
    from diffusers import ModelMixin
    from diffusers.training_utils import EMAModel

Groups = list[dict[str, Any]]  # an optimizer's groups of weights
GROUP = "rate_group"  # under which one with a rate of its own has its name
TEXT_ENCODER = "text_encoder"  # how the weights of those begin that are trained inside a network


def _as_it_is(kind: Any, groups: Groups, **settings: Any) -> torch.optim.Optimizer:
    optimizer: torch.optim.Optimizer = kind(groups, **settings)
    return optimizer


def _adafactor(kind: Any, groups: Groups, *, lr: float, weight_decay: float, **adam: Any) -> torch.optim.Optimizer:
    """Shazeer and Stern 2018; its betas and epsilons are its own."""
    return _as_it_is(kind, groups, lr=lr, weight_decay=weight_decay)


def _prodigy(kind: Any, groups: Groups, **settings: Any) -> torch.optim.Optimizer:
    """Mishchenko and Defazio 2023, set as in diffusers' examples, which learn with a warm-up too."""
    with redirect_stdout(io.StringIO()):  # it prints that the weight decay is apart
        return _as_it_is(kind, groups, **settings, decouple=True, use_bias_correction=True, safeguard_warmup=True)


def _schedule_free(kind: Any, groups: Groups, **settings: Any) -> torch.optim.Optimizer:
    """AdamW of Defazio et al. 2024. The network always holds y, where the gradient is taken; `build_ema` gives their x."""
    optimizer: Any = _as_it_is(kind, groups, **settings)
    optimizer.train()
    return optimizer


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon for the groups that say so, AdamW for the others, at one learning rate: Muon's step has the size of AdamW's (2502.16982).

    One optimizer to whoever sets rates, clips, scales or saves: both work on the groups and the state of this one.

    Args:
        muon: `torch.optim.Muon`.
        groups: each with ``use_muon``.
        lr: of both.
        betas: of AdamW.
        weight_decay: of both, apart from the gradient.
        eps: of AdamW.
    """

    def __init__(self, muon: Any, groups: Groups, *, lr: float, betas: tuple[float, float], weight_decay: float, eps: float) -> None:
        kinds = {
            True: partial(muon, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
            False: partial(torch.optim.AdamW, lr=lr, betas=betas, weight_decay=weight_decay, eps=eps),
        }
        chosen = {use_muon: [group for group in groups if group["use_muon"] is use_muon] for use_muon in kinds}
        self._parts: dict[bool, Any] = {use_muon: kinds[use_muon](own) for use_muon, own in chosen.items() if own}
        super().__init__([group for part in self._parts.values() for group in part.param_groups], {})

    def step(self, closure: Any = None) -> Any:
        """See `torch.optim.Optimizer.step`."""
        loss = None if closure is None else closure()
        for use_muon, part in self._parts.items():
            part.param_groups = [group for group in self.param_groups if group["use_muon"] is use_muon]  # loading makes new ones
            part.state = self.state
            part.step()
        return loss


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "radam": partial(torch.optim.RAdam, decoupled_weight_decay=True),  # AdamW with the rectification of Liu et al. 2020
    "adamw_8bit": _as_it_is,
    "adafactor": _adafactor,
    "muon": MuonWithAdamW,
    "prodigy": _prodigy,
    "schedule_free": _schedule_free,
}
CLASSES = {  # first argument of those above that every torch does not have: the package that has it, and where
    "adamw_8bit": ("bitsandbytes", "optim.AdamW8bit"),
    "adafactor": ("torch>=2.5", "optim.Adafactor"),
    "muon": ("torch>=2.9", "optim.Muon"),
    "prodigy": ("prodigyopt", "Prodigy"),
    "schedule_free": ("schedulefree", "AdamWScheduleFree"),
}


def build_ema(
    network: ModelMixin, arguments: TrainingArguments, device: torch.device, optimizer: torch.optim.Optimizer | None = None
) -> EMAModel | None:
    """The moving average of the network's weights that the flags ask for, or None.

    Args:
        network: of diffusers; its class and configuration are saved with the average.
        arguments: ``ema_settings`` say how the decay rises and where it stops.
        device: where the average lives; with ``offload_ema`` that is host memory, which it leaves for its update alone.
        optimizer: from `build_optimizer`, before accelerate wraps it; schedule-free has the average already.
    """
    from diffusers.training_utils import EMAModel

    if not arguments.use_ema:
        return None
    kind: Any = _offloaded_ema() if arguments.offload_ema else EMAModel
    if arguments.optimizer == "schedule_free":
        kind = partial(_schedule_free_average(), optimizer)
    ema: EMAModel = kind(network.parameters(), model_cls=_Alike(network), model_config=network.config, **arguments.ema_settings)
    ema.to("cpu" if arguments.offload_ema else device)
    return ema


@dataclass(frozen=True)
class _Alike:
    """In the place of a network's class, where an average is saved: builds one with the network's buffers too, which are not averaged.

    Their first values need not be those of its configuration: Stable Diffusion 3's positions are those of the checkpoint's own size.
    """

    network: ModelMixin

    def from_config(self, config: Mapping[str, Any]) -> ModelMixin:
        built: ModelMixin = type(self.network).from_config(config)
        for name, buffer in self.network.named_buffers():
            built.get_buffer(name).copy_(buffer)
        return built


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


@cache
def _schedule_free_average() -> Any:
    """Made when it is asked for, as `_offloaded_ema` is."""
    from diffusers.training_utils import EMAModel

    class ScheduleFreeAverage(EMAModel):
        """x of schedule-free, the average it evaluates, from the network's y and the optimizer's z: ``y = (1 - beta1) z + beta1 x``."""

        def __init__(self, optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter], **settings: Any) -> None:
            super().__init__(parameters, **settings)
            self._optimizer = optimizer

        @torch.no_grad()
        def step(self, parameters: Iterable[nn.Parameter]) -> None:
            beta1, _ = self._optimizer.param_groups[0]["betas"]
            for x, y in zip(self.shadow_params, parameters, strict=True):
                z = self._optimizer.state[y]["z"] if y in self._optimizer.state else y  # of what is not trained
                x.copy_(y.lerp(z, 1 - 1 / beta1))

    return ScheduleFreeAverage


def build_optimizer(network: nn.Module, arguments: TrainingArguments) -> torch.optim.Optimizer:
    """The optimizer that the flags name, of the weights that are trained, those that require a gradient.

    Raises:
        UserError: what it needs is not installed, or it refuses the settings.
    """
    name = "adamw_8bit" if arguments.use_8bit_adam else arguments.optimizer
    flag = "--use_8bit_adam" if arguments.use_8bit_adam else f"--optimizer {name}"
    kind: Any = OPTIMIZERS[name]
    if name in CLASSES:
        kind = partial(kind, _imported(flag, *CLASSES[name]))
    groups = _groups(network, arguments, hidden_matrices(network) if name == "muon" else None)
    if name == "prodigy" and (odd := [each for each in rate_factors(groups, arguments).items() if each[1] not in (0, 1)]):
        raise UserError(f"--optimizer prodigy has one rate for all, and 0: {odd[0][0]} cannot have {odd[0][1]:g} times of it")
    if name == "muon" and not any(group["use_muon"] for group in groups):
        raise UserError("--optimizer muon is for matrices, and the network has none but in its first and last layer; choose another")
    settings = {"betas": (arguments.adam_beta1, arguments.adam_beta2), "weight_decay": arguments.adam_weight_decay}
    try:
        optimizer: torch.optim.Optimizer = kind(groups, lr=arguments.learning_rate, **settings, eps=arguments.adam_epsilon)
    except ValueError as error:
        raise UserError(f"{flag}: {first_line(error)}") from None
    return optimizer


def _imported(flag: str, package: str, path: str) -> Any:
    name = package.partition(">")[0]
    found = import_module(name) if find_spec(name) else None
    for part in path.split("."):
        found = getattr(found, part, None)
    if found is None:
        raise UserError(f"{flag} needs {package}: `pip install {package if package == name else repr(package)}`")
    return found


def hidden_matrices(network: nn.Module) -> list[Tensor]:
    """What Muon is for: the weights of linear layers, but for the network's first and last layer. Embeddings and convolutions are not."""
    layers = [module for module in network.modules() if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)]
    return [layer.weight for layer in layers[1:-1] if isinstance(layer, nn.Linear)]


def _groups(network: nn.Module, arguments: TrainingArguments, hidden: Sequence[Tensor] | None) -> Groups:
    """The trained weights by what is done with them; vectors, which norms and biases are, decay only if all do.

    Args:
        network: whose weights they are.
        arguments: which have a rate of their own, and which decay.
        hidden: those that get ``use_muon``; None, and no group says anything of it.

    Raises:
        UserError: a pattern of ``--learning_rate_groups`` is that of no weight that is trained.
    """
    muon, patterns = {id(weight) for weight in hidden or ()}, arguments.rate_patterns
    found: dict[tuple[str, bool, bool, bool], list[nn.Parameter]] = {}
    unmet = dict.fromkeys(patterns)
    for name, weight in network.named_parameters():
        if not weight.requires_grad:
            continue
        told = name.startswith(TEXT_ENCODER)
        pattern = next((each for each in patterns if fnmatchcase(f".{name}.", f"*.{each}.*")), None)
        unmet.pop(pattern or "", None)
        group = " ".join([*([TEXT_ENCODER] if told else []), *([pattern] if pattern else [])])
        key = (group, id(weight) in muon, arguments.decay_norms_and_biases or weight.dim() > 1, told)
        found.setdefault(key, []).append(weight)
    for pattern in unmet:
        parts = sorted({part for name, weight in network.named_parameters() if weight.requires_grad for part in name.split(".")})
        raise UserError(
            f"--learning_rate_groups {pattern}: no weight that is trained has that in its name and is of no pattern before; the parts of "
            f"their names are {', '.join(part for part in parts if not part.isdigit())}"
        )
    text_decay = arguments.adam_weight_decay_text_encoder
    return [
        {
            "params": weights,
            **({GROUP: group} if group else {}),
            **({"weight_decay": 0.0} if not decays else {"weight_decay": text_decay} if told and text_decay is not None else {}),
            **({} if hidden is None else {"use_muon": use_muon}),
        }
        for (group, use_muon, decays, told), weights in found.items()
    ]


def rate_factors(groups: Groups, arguments: TrainingArguments) -> dict[str, float]:
    """By what the learning rate is multiplied, for each name of an optimizer's groups that have one; the others have the rate itself."""
    text = 1.0 if arguments.text_encoder_lr is None else arguments.text_encoder_lr / (arguments.learning_rate or 1.0)
    factors = {"": 1.0, **arguments.rate_patterns}
    found = {}
    for name in (str(group.get(GROUP, "")) for group in groups):
        pattern = name.removeprefix(TEXT_ENCODER).strip() if name.startswith(TEXT_ENCODER) else name
        found[name] = factors[pattern] * (text if name.startswith(TEXT_ENCODER) else 1.0)
    return {name: factor for name, factor in found.items() if name}


def set_rates(groups: Groups, rate: float, factors: Mapping[str, float]) -> dict[str, float]:
    """Sets each group's rate; returns those that differ from ``rate``, by the groups' names."""
    for group in groups:
        group["lr"] = rate * factors.get(group.get(GROUP, ""), 1.0)
    return {name: rate * factor for name, factor in factors.items() if factor != 1}


def rates_in_words(groups: Groups, arguments: TrainingArguments) -> str:
    """Each group's name, how many weights it has, in millions, and its peak rate; empty where all have one."""
    factors = rate_factors(groups, arguments)
    if all(factor == 1 for factor in factors.values()):
        return ""
    counts: dict[str, int] = {}
    for group in groups:
        name = group.get(GROUP, "")
        counts[name] = counts.get(name, 0) + sum(weight.numel() for weight in group["params"])
    return ", ".join(
        f"{name or 'others'} {arguments.learning_rate * factors.get(name, 1.0):g} ({count / 1e6:.2f} million)"
        for name, count in counts.items()
    )


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
