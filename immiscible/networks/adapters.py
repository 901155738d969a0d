"""Low-rank adapters (LoRA, Hu et al. 2106.09685; DoRA, Liu et al. 2402.09353): peft adds them, diffusers saves and loads them.

A weight W becomes ``W + alpha / rank * B A`` with B [out, rank] and A [rank, in], both fp32, B from 0; with DoRA its columns are scaled to
trained lengths, too. Alpha stands in the file's metadata where it is not the rank, as diffusers' ``load_lora_weights`` reads it.

Text encoders that are adapted, too, become submodules of the network that is trained: so whatever is done with its parameters (gradients
over all processes, clipping, evaluation mode, memory) is done with theirs, and its ``forward`` takes token ids in the place of text states.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from immiscible.errors import UserError
from immiscible.networks.arguments import RANK, AdapterArguments
from immiscible.networks.kinds import part_of

if TYPE_CHECKING:
    from diffusers import ModelMixin
    from peft import LoraConfig

NAME = "default"  # of the adapters, in peft
ADAPTERS = "pytorch_lora_weights.safetensors"
TEXT_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")  # of CLIP's attention, as in diffusers' examples
VECTOR = "lora_magnitude_vector"  # DoRA's
TOKENS = "token_ids:"  # before the name of a tokenizer, whose ids a network is told in the place of text states, int64 [B, L]
Told = Callable[[Mapping[str, nn.Module], Mapping[str, Tensor]], Mapping[str, Tensor]]


def adapted(network: nn.Module) -> bool:
    """Whether the network has low-rank adapters, which alone are trained then."""
    return bool(getattr(network, "peft_config", None))


def adapted_encoders(network: nn.Module) -> dict[str, nn.Module]:
    """The text encoders that are trained inside a network, by their names in a pipeline."""
    return {name: module for name, module in network.named_children() if name.startswith("text_encoder")}


def add_adapters(
    network: Any, arguments: AdapterArguments, *, targets: Sequence[str], dtype: torch.dtype, encoders: Mapping[str, Any] | None = None
) -> None:
    """Freezes the network and text encoders in ``dtype`` and gives them trainable adapters: fresh ones, drawn from the global generator.

    Args:
        network: of diffusers, bare.
        arguments: rank, alpha, dropout, DoRA and what is adapted in the network.
        targets: what is adapted in it if the flags name nothing.
        dtype: of what is frozen.
        encoders: the text encoders that get adapters in their attention, by their names in a pipeline.

    Raises:
        UserError: peft is not installed; or a name is that of no module that can be adapted.
    """
    check_peft()
    named = _target_modules(network, arguments.lora_target_modules)
    for module in (network, *(encoders or {}).values()):
        freeze(module, dtype)
        inject(module, arguments, (named or list(targets)) if module is network else list(TEXT_TARGETS))


def check_peft() -> None:
    """Whether peft is installed.

    Raises:
        UserError: it is not.
    """
    if find_spec("peft") is None:
        raise UserError("--use_lora needs peft: `pip install peft`")


def freeze(module: nn.Module, dtype: torch.dtype) -> None:
    """Without gradient, in ``dtype``."""
    nn.Module.to(module.requires_grad_(False), dtype=dtype)  # diffusers' own `to` warns of every cast, naming an empty list of modules


def inject(module: Any, arguments: AdapterArguments, adapt: list[str] | str) -> None:
    """Gives a module fresh adapters where peft's ``target_modules`` are ``adapt``."""
    from diffusers.training_utils import cast_training_params
    from peft import LoraConfig

    rank, alpha = arguments.rank or RANK, arguments.lora_alpha
    module.add_adapter(
        LoraConfig(
            r=rank,
            lora_alpha=rank if alpha is None else alpha,  # type: ignore[arg-type] # which may be any number
            lora_dropout=arguments.lora_dropout,
            use_dora=arguments.use_dora,
            init_lora_weights="gaussian",
            target_modules=adapt,
        )
    )
    cast_training_params(module, dtype=torch.float32)


def _target_modules(network: nn.Module, names: Sequence[str] | None) -> list[str] | str | None:
    """What peft is told of ``--lora_target_modules``: the ends of modules' names, or one regular expression of whole names.

    Raises:
        UserError: a name is that of no module that can be adapted; with the last parts of the names that are.
    """
    if not names:
        return None
    words = [word for name in names for word in name.split(",") if word]
    known = [name for name, module in network.named_modules() if isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding)]
    if words == ["all-linear"]:
        return "all-linear"
    expression = names[0] if len(names) == 1 and not re.fullmatch(r"[\w.,-]+", names[0]) else None
    try:
        found = {expression: any(re.fullmatch(expression, name) for name in known)} if expression else {}
    except re.error as error:
        raise UserError(f"--lora_target_modules {expression}: no regular expression ({error})") from None
    found = found or {word: any(f".{name}".endswith(f".{word}") for name in known) for word in words}
    if missing := [word for word, there in found.items() if not there]:
        ends = sorted({_end(name) for name in known})
        raise UserError(
            f"--lora_target_modules {missing[0]} is no module of the {type(network).__name__} that can be adapted; there are "
            f"{', '.join(ends)}, more of a name such as {known[-1]}, or a regular expression of whole names"
        )
    return expression or words


def _end(name: str) -> str:
    """The last part of a module's name, or the last two where it is a number."""
    parts = name.split(".")
    return ".".join(parts[-2:] if parts[-1].isdigit() else parts[-1:])


def train_inside(network: nn.Module, encoders: Mapping[str, nn.Module], told: Told) -> None:
    """Makes text encoders submodules of a network, which from then on takes token ids in the place of text states, or these as before.

    Args:
        network: what is trained.
        encoders: with adapters.
        told: given the text encoders that are in the network, or in a copy of it, makes what it is told of what it is called with, `TOKENS`
            among it.
    """
    for name, encoder in encoders.items():
        network.add_module(name, encoder)

    def tell(inside: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return arguments, dict(told(adapted_encoders(inside), named)) if any(name.startswith(TOKENS) for name in named) else named

    network.register_forward_pre_hook(tell, with_kwargs=True, prepend=True)  # before a family's own, which wants text states


def freeze_unreached(encoders: Iterable[nn.Module], states: Iterable[Tensor]) -> None:
    """Leaves those adapters out of training that no text state depends on, as of a layer behind the last that is read: over several
    processes each weight that is trained must have a gradient.

    Args:
        encoders: with adapters.
        states: what the network is told of some caption, with their graph.
    """
    torch.stack([each.float().sum() for each in states if each.requires_grad]).sum().backward()
    for weight in (weight for encoder in encoders for weight in encoder.parameters() if weight.requires_grad):
        weight.requires_grad_(weight.grad is not None)
        weight.grad = None


def adapters_in_words(network: nn.Module) -> str:
    """Such as ``adapters of rank 4, alpha 8``."""
    config = config_of(network)
    alpha = config.lora_alpha if config.lora_alpha != config.r or config.alpha_pattern else None
    words = [f"{'DoRA ' if config.use_dora else ''}adapters of rank {config.r}"]
    words += [] if alpha is None else [f"alpha {alpha:g}"]
    words += ["of several ranks"] if config.rank_pattern else []
    words += [f"dropout {config.lora_dropout:g}"] if config.lora_dropout else []
    return ", ".join(words) + "".join(f", of its {name}, too" for name in adapted_encoders(network))


def config_of(module: Any) -> LoraConfig:
    """Peft's configuration of the adapters of a module."""
    found: LoraConfig = module.peft_config[NAME]
    return found


# Files


def save_adapters(network: ModelMixin, folder: Path) -> None:
    """Writes the adapters, those of text encoders among them, as diffusers' ``load_lora_weights`` reads them: `ADAPTERS`, fp32."""
    modules = _modules(network)
    layers: dict[str, Any] = {f"{name}_lora_layers": _written(name, own_adapters(module)) for name, module in modules.items()}
    configs = {name: config_of(module) for name, module in modules.items()}
    if any(config.lora_alpha != config.r or config.alpha_pattern != config.rank_pattern for config in configs.values()):
        # Then of all: where there is some, diffusers takes none for a configuration of defaults.
        layers |= {f"{name}_lora_adapter_metadata": settings_of(config) for name, config in configs.items()}
    _pipeline(network).save_lora_weights(folder, **layers)


def load_adapters(network: ModelMixin, folder: Path) -> None:
    """Puts what `save_adapters` wrote into a network that has adapters of the same shapes.

    Raises:
        UserError: (exit code 1) they are not those of this network.
    """
    from peft.utils import set_peft_model_state_dict

    state = _pipeline(network).lora_state_dict(folder)
    state = state[0] if isinstance(state, tuple) else state  # with alphas of kohya's format, which this is not
    for name, module in _modules(network).items():
        layers = read_layers(name, module, state)
        check_shapes(folder, layers, own_adapters(module))
        set_peft_model_state_dict(module, layers, adapter_name=NAME)


def _modules(network: ModelMixin) -> dict[str, nn.Module]:
    """What has adapters, by its name in a pipeline."""
    return {part_of(network): network, **adapted_encoders(network)}


def _pipeline(network: ModelMixin) -> Any:
    """A class of diffusers that writes and reads what has adapters."""
    import diffusers

    if part_of(network) == "transformer":
        return diffusers.StableDiffusion3Pipeline
    return diffusers.StableDiffusionXLPipeline if "text_encoder_2" in adapted_encoders(network) else diffusers.StableDiffusionPipeline


def check_shapes(file: Path, layers: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Whether what a file holds are just the adapters that are wanted.

    Raises:
        UserError: (exit code 1) they are not; with the first that is another.
    """
    shapes = [{name: tensor.shape for name, tensor in tensors.items()} for tensors in (layers, wanted)]
    if different := [name for name in sorted({**layers, **wanted}) if shapes[0].get(name) != shapes[1].get(name)]:
        raise UserError(
            f"{file} holds other adapters than this network's: {different[0]} is missing, surplus or of another shape", exit_code=1
        )


def _written(part: str, layers: dict[str, Tensor]) -> dict[str, Tensor]:
    """By the names that diffusers writes of a part of a pipeline."""
    from diffusers.utils import convert_state_dict_to_diffusers

    if part == "transformer":
        return layers
    layers = convert_state_dict_to_diffusers(layers)
    # transformers 5 looks for DoRA's vectors by the names that they have in the module, diffusers by those that peft writes.
    return {name + (".weight" if part != "unet" and name.endswith(VECTOR) else ""): value for name, value in layers.items()}


def read_layers(part: str, module: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of a file's tensors those of a part of a pipeline, by the names that peft has for them in its module."""
    from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_peft, convert_unet_state_dict_to_peft

    layers: dict[str, Tensor] = {name.removeprefix(f"{part}."): value for name, value in state.items() if name.startswith(f"{part}.")}
    if not layers or part == "transformer":
        return layers
    if part == "unet":
        return dict(convert_unet_state_dict_to_peft(layers))
    layers = convert_state_dict_to_peft(convert_state_dict_to_diffusers(layers))
    before = "" if hasattr(module, "text_model") else "text_model."  # which older versions of transformers had in all of CLIP
    return {name.removeprefix(before).removesuffix(".weight" if VECTOR in name else ""): value for name, value in layers.items()}


def own_adapters(module: nn.Module) -> dict[str, Tensor]:
    """Of a network without those of its text encoders, by peft's names."""
    from peft.utils import get_peft_model_state_dict

    encoders = tuple(f"{name}." for name in adapted_encoders(module))
    state = {name: value for name, value in module.state_dict().items() if not (encoders and name.startswith(encoders))}
    found: dict[str, Tensor] = get_peft_model_state_dict(module, state_dict=state, save_embedding_layers=False)
    return found


def adapter_settings(network: ModelMixin) -> dict[str, Any]:
    """Rank, alpha and modules of all that has adapters, by its name in a pipeline: JSON values."""
    return {name: settings_of(config_of(module)) for name, module in _modules(network).items()}


def settings_of(config: LoraConfig) -> dict[str, Any]:
    """Of a configuration, what a reader needs; all of it would bind the file to peft's version."""
    targets: Any = config.target_modules
    return {
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "rank_pattern": config.rank_pattern or {},
        "alpha_pattern": config.alpha_pattern or {},
        "target_modules": targets if isinstance(targets, str) else sorted(targets or ()),
        "use_dora": config.use_dora,
    }
