"""VAEs: they make latents of images and images of latents, and stay as they are."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from immiscible.errors import UserError, first_line
from immiscible.networks.weights import LOAD_ERRORS, weights_digest

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

SINGLE_FILES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")


def load_vae(name_or_path: str, *, resolution: int, cache_dir: str | None = None) -> AutoencoderKL:
    """The VAE of ``--vae_model_name_or_path``, frozen, fp32, on the CPU.

    Args:
        name_or_path: a folder or a name on the hub: an `AutoencoderKL`, or a checkpoint with one in its subfolder ``vae``.
        resolution: of the images.
        cache_dir: where models of the hub are kept.

    Raises:
        UserError: there is none, it is another kind of model, or it cannot halve images of this resolution as often as it must.
    """
    flag = f"--vae_model_name_or_path {name_or_path}"
    vae = open_vae("--vae_model_name_or_path", name_or_path, cache_dir=cache_dir)
    if vae.config.shift_factor or vae.config.latents_mean:
        raise UserError(f"{flag} shifts its latents, which diffusers' unconditional pipeline does not undo; take one as Stable Diffusion's")
    if resolution % latent_downsampling(vae):
        raise UserError(
            f"{flag} halves the image {len(vae.config.block_out_channels) - 1} times: --resolution {resolution} must be a multiple of "
            f"{latent_downsampling(vae)}"
        )
    return vae.float().requires_grad_(False).eval()


def open_vae(flag: str, name_or_path: str, *, cache_dir: str | None = None) -> AutoencoderKL:
    """An `AutoencoderKL` as it is in its folder, or in the folder ``vae`` of a checkpoint, on the CPU.

    Args:
        flag: that names it.
        name_or_path: a folder or a name on the hub.
        cache_dir: where models of the hub are kept.

    Raises:
        UserError: there is none, or it is another kind of model.
    """
    from diffusers import AutoencoderKL

    refuse_single_file(flag, name_or_path, "AutoencoderKL")
    flag = f"{flag} {name_or_path}"
    try:
        options: dict[str, Any] = {"cache_dir": cache_dir}
        try:
            settings = AutoencoderKL.load_config(name_or_path, **options)
        except OSError:
            options["subfolder"] = "vae"
            settings = AutoencoderKL.load_config(name_or_path, **options)
        kind = settings.get("_class_name", "an unnamed model")
        if kind != "AutoencoderKL":
            raise UserError(f"{flag} is a {kind}, not an AutoencoderKL; give a VAE, or a checkpoint that has one in its folder `vae`")
        return AutoencoderKL.from_pretrained(name_or_path, **options)
    except UserError:
        raise
    except LOAD_ERRORS as error:
        raise UserError(f"{flag}: no AutoencoderKL found there, nor in a folder `vae` of it ({first_line(error)})") from None


def refuse_single_file(flag: str, name: str, kind: str) -> None:
    """Names the conversion of a network that is one file; its configuration, which it lacks, comes from elsewhere.

    Args:
        flag: that names it.
        name: of the network.
        kind: the class of diffusers that converts it.

    Raises:
        UserError: ``name`` is that of a file.
    """
    path = Path(name).expanduser()
    if not path.is_file() and path.suffix not in SINGLE_FILES:
        return
    folder = path.with_suffix("")
    there = "" if path.is_file() else " (and is not there)"
    raise UserError(
        f"{flag} {name} is a single file{there}, and a folder in the format of diffusers is read: convert it once by "
        f'`python -c "from diffusers import {kind}; {kind}.from_single_file({str(path)!r}).save_pretrained({str(folder)!r})"`'
        f" and give {flag} {folder}"
    )


def latent_downsampling(vae: AutoencoderKL) -> int:
    """The side of an image divided by that of its latent."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


def vae_identity(vae: AutoencoderKL) -> dict[str, Any]:
    """What tells this VAE from others wherever it was loaded from: its settings and a digest of its weights."""
    return {**{name: value for name, value in vae.config.items() if not name.startswith("_")}, "weights": weights_digest(vae)}
