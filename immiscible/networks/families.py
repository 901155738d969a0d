"""Which family a text-to-image checkpoint is of, by what it says of itself, and its parts as one run wants them."""

from __future__ import annotations

from dataclasses import replace as replace_fields
from pathlib import Path
from typing import Any

from immiscible.errors import UserError, first_line
from immiscible.networks.arguments import TextModelArguments
from immiscible.networks.checkpoint_parts import CheckpointParts, unvaried
from immiscible.networks.latents import latent_downsampling
from immiscible.networks.single_file import in_a_folder, is_single_file
from immiscible.networks.stable_diffusion import StableDiffusion
from immiscible.networks.stable_diffusion_3 import StableDiffusion3
from immiscible.networks.stable_diffusion_xl import StableDiffusionXL
from immiscible.networks.weights import LOAD_ERRORS

TEXT_PIPELINE = "PooledTextPipeline"  # ours, of a transformer in the U-Net's place: `immiscible.sampling.text_pipeline`
FAMILIES: dict[str, type[CheckpointParts]] = {  # ``_class_name`` in a checkpoint's model_index.json -> its family
    StableDiffusion.pipeline_class: StableDiffusion,
    StableDiffusionXL.pipeline_class: StableDiffusionXL,
    StableDiffusion3.pipeline_class: StableDiffusion3,
    TEXT_PIPELINE: StableDiffusion,
}
PIPELINES = [kind for kind in FAMILIES if kind != TEXT_PIPELINE]  # of diffusers


def load_checkpoint(arguments: TextModelArguments, *, resolution: int, cache_dir: str | None, from_scratch: bool) -> CheckpointParts:
    """The checkpoint of ``--pretrained_model_name_or_path``, on the CPU.

    Args:
        arguments: which checkpoint, and what it shall predict; with ``use_lora`` the digest is of the network's own weights too.
        resolution: of the run's images. The network's ``sample_size`` becomes its, at which pipelines then sample by default.
        cache_dir: where models of the hub are kept.
        from_scratch: gives the network fresh weights, drawn from the global generator. A transformer in a U-Net's place has no others.

    Raises:
        UserError: it cannot be loaded, is of no family that is trained here, or does not go with the flags.
    """
    arguments = with_folder(arguments, cache_dir)
    name = str(arguments.pretrained_model_name_or_path)
    options = {"revision": arguments.revision, "cache_dir": cache_dir, "variant": arguments.variant}
    family, index = _look_at(name, unvaried(options), with_network=not arguments.model_preset)
    present = [part for part in index if part[0] != "_" and _is_there(name, part, index[part])]
    if family is not StableDiffusion3:
        arguments.refuse_sd3(f"{name} is {family.family}")
    try:
        parts = family.load(arguments, options, present, resolution=resolution, from_scratch=from_scratch)
    except UserError:
        raise
    except LOAD_ERRORS as error:
        raise UserError(f"--pretrained_model_name_or_path {name}: cannot be loaded ({first_line(error)})", exit_code=1) from None
    if arguments.prediction_type is not None:
        parts.predict(arguments.prediction_type)
    parts.index, parts.from_scratch = index, from_scratch
    parts.check()
    factor = latent_downsampling(parts.vae)
    if resolution % factor:
        raise UserError(f"--resolution {resolution} must be a multiple of {factor}, by which the VAE of {name} divides images")
    parts.network.register_to_config(sample_size=resolution // factor)
    parts.digest = parts.digest_of(network=arguments.use_lora)
    return parts


def with_folder(arguments: TextModelArguments, cache_dir: str | None) -> TextModelArguments:
    """The same with a checkpoint that is a folder of parts or a name on the hub; one that is a file is converted, if it was not before.

    Raises:
        UserError: see `in_a_folder`; or flags are given that are not of a file.
    """
    name = str(arguments.pretrained_model_name_or_path)
    if not is_single_file(name):
        if arguments.single_file_config:
            raise UserError(f"--single_file_config is of a checkpoint in one file, and {name} is none: leave it out")
        return arguments
    for option in ("revision", "variant", "non_ema_revision"):
        if value := getattr(arguments, option):
            raise UserError(f"--{option} {value} is of a checkpoint of several files, and {name} is one: leave it out")
    folder = in_a_folder(name, arguments.single_file_config, {kind: FAMILIES[kind] for kind in PIPELINES}, cache_dir=cache_dir)
    return replace_fields(arguments, pretrained_model_name_or_path=folder)


def family_of(kind: str, parts: Any) -> type[CheckpointParts] | None:
    """The family of a checkpoint.

    Args:
        kind: what it says it is, its ``_class_name``.
        parts: the names of what it lists.

    Returns:
        None if it is none of these. Further pipelines of one U-Net and one text encoder are Stable Diffusion 1.x or 2.x.
    """
    if kind in FAMILIES:
        return FAMILIES[kind]
    return None if {"text_encoder_2", "transformer"} & set(parts) else StableDiffusion


def _look_at(name: str, options: dict[str, Any], *, with_network: bool) -> tuple[type[CheckpointParts], dict[str, Any]]:
    """The family of the checkpoint, and what it says of itself; it has all parts that a run needs. Loads nothing."""
    import diffusers

    try:
        found = diffusers.DiffusionPipeline.load_config(name, **options)
    except (OSError, ValueError) as error:
        raise UserError(
            f"--pretrained_model_name_or_path {name}: no diffusers checkpoint found there ({first_line(error)}); check the name and, "
            f"for one on the hub, the network",
            exit_code=1,
        ) from None
    kind = found.get("_class_name", "an unnamed pipeline")
    family = family_of(kind, found)
    if family is None:
        trained = ", ".join(PIPELINES)
        raise UserError(
            f"--pretrained_model_name_or_path {name} is a {kind}; trained here are {trained}. Another family needs a class of its own in "
            f"immiscible/networks, which says what it loads and what its network is told; in another trainer's loop the library's "
            f"three lines do (README, Use it in your own training loop)"
        )
    # A tokenizer that is not there would be made up without words.
    wanted = family.required(with_network=with_network)
    if missing := [part for part in wanted if not _is_there(name, part, found.get(part))]:
        raise UserError(
            f"--pretrained_model_name_or_path {name} is a {kind} without {', '.join(missing)}; {family.family} has {', '.join(wanted)}"
        )
    if not hasattr(diffusers, found["scheduler"][1]):
        raise UserError(f"--pretrained_model_name_or_path {name}: diffusers has no {found['scheduler'][1]}, with which it would be sampled")
    return family, found


def _is_there(name: str, part: str, listed: Any) -> bool:
    """Whether a part is listed with its class and, in a folder here, has files."""
    return isinstance(listed, list) and all(listed) and not (Path(name).is_dir() and not any(Path(name, part).glob("*")))


def initial_weights(name: str, *, from_scratch: bool, adapters: str | None, preset: str | None = None) -> str:
    """With which weights a network begins, in words, for the start of the run and the model card.

    Args:
        name: of the checkpoint.
        from_scratch: whether it has fresh ones.
        adapters: of which only these are trained, in words; None without.
        preset: of a transformer in the U-Net's place; None of a U-Net.
    """
    if preset:
        return f"random, of {preset}, which is told the pooled text state in the place of the U-Net of {name}"
    if from_scratch:
        return f"random, not those of {name}, with which finetune_sd.py begins"
    return f"those of {name}" + ("" if adapters is None else f", frozen, with {adapters}")
