"""Latents and text states on disk, so that training calls neither the VAE nor the text encoder.

They are of the parts of a text-to-image checkpoint, or of a VAE alone, whose cache has no texts. A cache is a folder of

    manifest.json                what it was made of, and the size and SHA-256 of every other file
    latents-00000.safetensors    ``moments`` fp16 [n, F, 2, C, h, w]: mean and log-variance of the VAE's posterior of n images; F is 2 if
                                 the mirrored image is there too, after the image
    texts-00000.safetensors      ``states`` fp16 [n, L, E], ``pooled`` fp16 [n, E], and what else a family has, of n distinct captions
    index.safetensors            ``digests`` uint64 [M], ascending: which caption each row of the texts is; ``sizes`` int64 [N]: the bytes
                                 of each encoded image, by which an edited one is noticed; ``shapes`` int64 [N, 2]: its height and width,
                                 0 of one that could not be read; ``rows`` int64 [N], of a cache in buckets: where each image is

Shard i holds rows ``i * rows_per_shard`` on, encoded in batches of one size from its first row, so a shard is the same to the last bit
whoever makes it: one process or many, at once or after a kill. In buckets the images of each stand together, in shards of their own. A
shard is written under another name and renamed, and remembers which images or captions it was made of; the manifest lists files only while
all are there and none is being made anew.

Training maps the shards into memory and draws a fresh latent each time, ``scaling_factor * (mean + exp(log_variance / 2) * normal)``
with the normal numbers of the uncached run, which it so repeats up to the rounding to fp16.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import load_file
from torch import Tensor, nn

from immiscible.data.arguments import ImageArguments, TextDataArguments
from immiscible.data.buckets import Buckets, assigned_buckets, bucket_sizes, check_multiple
from immiscible.data.image_sizes import encoded_bytes
from immiscible.data.sources import ImageSource, Subset
from immiscible.data.tables import TableImages
from immiscible.data.transforms import ImageTransform
from immiscible.encoding.cache_manifest import FORMAT, INDEX, check_files, read_manifest, settings_that_differ, shard_name
from immiscible.encoding.encoders import LatentEncoder
from immiscible.encoding.texts import TextToImageEncoder
from immiscible.errors import UserError
from immiscible.networks.checkpoint_parts import CheckpointParts
from immiscible.networks.latents import latent_downsampling
from immiscible.networks.weights import PRECISIONS, weights_digest

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

    Parts: TypeAlias = CheckpointParts | AutoencoderKL


@dataclass(frozen=True)
class LatentCache:
    """A whole cache, mapped into memory shard by shard as rows are asked for.

    Args:
        folder: where it is.
        manifest: the content of its `MANIFEST`.
    """

    folder: Path
    manifest: Mapping[str, Any]

    @property
    def fingerprint(self) -> str:
        """Tells this cache from one that holds other bits."""
        return str(self.manifest["fingerprint"])

    def images(self, source: ImageSource) -> ImageSource:
        """``source`` with moments in the place of images: what the cache was made of, or a `Subset` of it, as `open_cache` has seen."""
        if source.fingerprint == self.manifest["settings"]["data"]:
            return CachedImages(source, self)
        assert isinstance(source, Subset)
        return replace(source, source=self.images(source.source))

    def transform(self, transform: ImageTransform) -> CachedTransform:
        """What goes with `images` where ``transform`` goes with the source: the same flips."""
        return CachedTransform(**vars(transform))

    def encoder(self, encoder: LatentEncoder | TextToImageEncoder) -> CachedLatentEncoder | CachedTextEncoder:
        """What goes with `images` where ``encoder`` goes with the source: the same draws."""
        if isinstance(encoder, LatentEncoder):
            return CachedLatentEncoder(**vars(encoder))
        return CachedTextEncoder(**vars(encoder), cache=self)

    def moments(self, index: int) -> np.ndarray:
        """Mean and log-variance of an image's latent, and of its mirror image's if the cache has flips: fp16 [F, 2, C, h, w].

        Raises:
            ValueError: the image could not be read when the cache was made.
        """
        reason = self.manifest["bad"].get(str(index))
        if reason is not None:
            raise ValueError(reason)
        rows = self._index.get("rows")
        return self._row("latents", "moments", index if rows is None else int(rows[index]))

    def shape(self, index: int) -> tuple[int, int] | None:
        """Height and width of the image that was encoded; None if the cache is of a version that does not say."""
        shapes = self._index.get("shapes")
        return None if shapes is None else (int(shapes[index, 0]), int(shapes[index, 1]))

    def texts(self, captions: Sequence[str], name: str) -> Tensor:
        """The text states of captions that have this name, such as ``pooled``, fp16 [B, ...]; raises as `rows_of`."""
        return torch.from_numpy(np.stack([self._row("texts", name, row) for row in self.rows_of(captions)]))

    def rows_of(self, captions: Sequence[str]) -> list[int]:
        """Where the captions' texts are.

        Raises:
            ValueError: a caption is not in the cache.
        """
        digests = np.array([caption_digest(caption) for caption in captions], dtype=np.uint64)
        held = self._index["digests"]
        rows = np.minimum(np.searchsorted(held, digests), len(held) - 1)
        for caption, missing in zip(captions, held[rows] != digests, strict=True):
            if missing:
                raise ValueError(f"its caption {caption!r} is not in the latent cache: the captions have changed since")
        return rows.tolist()

    def check_data(self, source: ImageSource) -> None:
        """Looks for images and captions that were edited since; captions in tars, which would have to be read, are looked up when used.

        Args:
            source: what the cache was made of, by its name.

        Raises:
            ValueError: some were.
        """
        edited = np.flatnonzero(encoded_bytes(source) != self._index["sizes"])
        if len(edited):
            raise ValueError(f"{len(edited):,} of its images have been edited since, the first {source.name(int(edited[0]))}")
        if isinstance(source, TableImages) and source.texts is not None:
            found = (captions for captions in source.all_captions(range(len(source))) if not isinstance(captions, ValueError))
            self.rows_of(list(dict.fromkeys(chain.from_iterable(found))))

    @cached_property
    def _index(self) -> dict[str, np.ndarray]:
        return load_file(self.folder / INDEX)

    def _row(self, kind: str, name: str, row: int) -> np.ndarray:
        shard, place = divmod(row, self.manifest["rows_per_shard"])
        return _mapped(f"{self.folder}/{shard_name(kind, shard)}", name, self.fingerprint)[place]


@lru_cache(maxsize=8192)
def _mapped(path: str, name: str, fingerprint: str) -> Any:
    """A tensor of a shard, of which rows are read from the mapped file; ``fingerprint`` keeps apart caches that followed on one path."""
    return safe_open(path, framework="numpy").get_slice(name)


def caption_digest(caption: str) -> int:
    """64 bits that stand for a caption."""
    return int.from_bytes(hashlib.blake2b(caption.encode(errors="surrogatepass"), digest_size=8).digest(), "little")


class Moments(NamedTuple):
    """What stands for a decoded image: its moments, fp16 [F, 2, C, h, w], and whose they are."""

    values: np.ndarray
    source: CachedImages
    row: int


@dataclass(frozen=True)
class CachedImages:
    """A source whose images are moments of a cache; labels and captions are the source's own.

    Args:
        source: what the cache was made of.
        cache: with an image for each of the source's.
    """

    source: ImageSource
    cache: LatentCache

    @property
    def channels(self) -> int:
        """Those of the source's images."""
        return self.source.channels

    @property
    def description(self) -> str:
        """One line for summaries."""
        return f"{self.source.description}, latents from {self.cache.folder}"

    @property
    def fingerprint(self) -> str:
        """See `ImageSource`."""
        return f"{self.source.fingerprint}, latents {self.cache.fingerprint}"

    @property
    def class_names(self) -> Sequence[str] | None:
        """Those of the source."""
        return self.source.class_names

    def __len__(self) -> int:
        return len(self.source)

    def load(self, index: int) -> Any:
        """`Moments`; see `LatentCache.moments`."""
        return Moments(self.cache.moments(index), self, index)

    def size(self, index: int) -> tuple[int, int]:
        """See `ImageSource`."""
        return self.cache.shape(index) or self.source.size(index)

    def name(self, index: int) -> str:
        """The name in the source."""
        return self.source.name(index)

    def label(self, index: int) -> int:
        """See `ImageSource`."""
        return self.source.label(index)

    def captions(self, index: int) -> Sequence[str]:
        """Those of the source, all of which are in the cache; others make it a `BadImage`, as a missing caption does."""
        captions = self.source.captions(index)
        if getattr(self.source, "texts", None) is None:  # else the start has looked them up
            self.cache.rows_of(captions)
        return captions


@dataclass(frozen=True)
class CachedTransform(ImageTransform):
    """Of the moments of an image and its mirror image, [F, 2, C, h, w], those that the epoch's flip asks for: fp16 [2, C, h, w]."""

    def decode(self, image: Any) -> Image.Image | Tensor:
        """The moments as a tensor."""
        return torch.from_numpy(image.values)

    def is_laid_upon(self, image: Any) -> bool:
        """It was told when the cache was made."""
        return False

    def original_size(self, image: Any) -> tuple[int, int]:
        """Of the image whose moments these are."""
        return image.source.size(image.row)

    def augment(self, pixels: Image.Image | Tensor, epoch: int, index: int, size: tuple[int, int] | None = None) -> Tensor:
        """The moments of the image, or of its mirror image where the uncached run mirrors it."""
        assert isinstance(pixels, Tensor)
        return pixels[int(self.flips(epoch, index))]


class _FromMoments:
    """An encoder of moments [B, 2, C, h, w] in the place of images."""

    device: torch.device

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance, as they are."""
        mean, log_variance = images.to(self.device, non_blocking=True).unbind(1)
        return mean, log_variance


class CachedLatentEncoder(_FromMoments, LatentEncoder):
    """As `LatentEncoder`, without its VAE."""


@dataclass(frozen=True)
class CachedTextEncoder(_FromMoments, TextToImageEncoder):
    """As `TextToImageEncoder`, without its networks.

    Args:
        cache: of the text states.
    """

    cache: LatentCache | None = None

    def texts(self, captions: Sequence[str]) -> Mapping[str, Tensor]:
        """See `TextToImageEncoder`; in the precision that the text encoders would give."""
        assert self.cache is not None
        dtype = self.parts.text_encoder.dtype
        needed = dict.fromkeys([*self.parts.states_told, *(["pooled"] if self.pooled_labels else [])])
        return {name: self.cache.texts(captions, name).to(self.device, dtype, non_blocking=True) for name in needed}


def open_cache(
    folder: Path, data: ImageArguments, parts: Parts, source: ImageSource, *, precision: str | None, trigger: str | None = None
) -> LatentCache:
    """The cache in a folder, for a run that is to take its latents from there.

    A cache of all images serves a run on some of them, one with flips a run without, one in fp32 a run in any precision.

    Args:
        folder: of ``--latent_cache_dir``.
        data: the run's flags of the data.
        parts: as loaded: their weights are hashed.
        source: the run's images, or a `Subset` of those that the cache was made of.
        precision: what ``--mixed_precision`` of the run says, or None.
        trigger: the word that its captions are told with.

    Raises:
        UserError: there is no cache, it is not whole, or it is not what this run would encode; the line says what differs.
    """
    manifest = read_manifest(folder)
    make = "run scripts/precompute_latents.py with this run's flags and"
    again = f"{make} --latent_cache_dir {folder}"
    if manifest is None:
        raise UserError(f"--latent_cache_dir {folder} holds no latent cache; {again}")
    wanted = cache_settings(data, parts, source, trigger)
    inner: ImageSource = source
    while inner.fingerprint != manifest["settings"]["data"] and isinstance(inner, Subset):
        inner = inner.source
    wanted["data"] = inner.fingerprint
    found = settings_that_differ(manifest["settings"], wanted)
    if data.random_flip and not manifest["settings"]["flips"]:
        found.append("--random_flip is off in the cache and on here")
    here = precision_name(precision)
    if manifest["precision"] not in ("float32", here):
        found.append(f"it was encoded in {manifest['precision']} and this run would encode in {here} (--mixed_precision)")
    if found:
        raise UserError(f"--latent_cache_dir {folder} was not made for this run: {'; '.join(found)}; {make} another --latent_cache_dir")
    check_files(folder, manifest, again)
    cache = LatentCache(folder, manifest)
    try:
        cache.check_data(inner)
    except ValueError as error:
        raise UserError(f"--latent_cache_dir {folder}: {error}; {again} to mend it") from None
    return cache


def cache_settings(data: ImageArguments, parts: Parts, source: ImageSource, trigger: str | None) -> dict[str, Any]:
    """What the bits of a cache depend on, under the keys of `MUST_AGREE` and ``flips``. Of the VAE that is its encoder alone."""
    vae, adm = vae_of(parts), data.crop == "adm"
    interpolation = data.image_interpolation_mode + (" at the images' precision" if data.preserve_input_precision else "")
    return {
        "format": FORMAT,
        "vae": weights_digest(nn.ModuleList([vae.encoder, vae.quant_conv or nn.Identity()])),
        "scaling_factor": vae.config.scaling_factor,
        "text_encoder": _text_digest(parts) if isinstance(parts, CheckpointParts) else None,
        "resolution": data.resolution,
        "buckets": _bucket_names(data),
        "crop": ("adm" if adm else "center") + (f", transparent images upon {data.alpha_color}" if data.alpha_color else ""),
        "interpolation": None if adm else interpolation,
        "flips": data.random_flip,
        "image_column": data.image_column,
        "caption_column": data.caption_column,
        "trigger_word": trigger,
        "data": source.fingerprint,
    }


def _bucket_names(data: ImageArguments) -> list[str] | None:
    """Height and width of each; None without."""
    if not isinstance(data, TextDataArguments) or data.buckets is None:
        return None
    return [f"{height},{width}" for height, width in bucket_sizes(data)]


def buckets_of(source: ImageSource, data: TextDataArguments, parts: CheckpointParts) -> Buckets:
    """The bucket of each image, or of what stands for it in a cache.

    Raises:
        UserError: the sizes do not go with the parts, or as `assigned_buckets`.
    """
    sizes = bucket_sizes(data)
    network = parts.network.config
    multiple = latent_downsampling(parts.vae) * int(network.get("patch_size") or 1)
    check_multiple(sizes, data, multiple, parts.name)
    most = multiple * int(network.get("pos_embed_max_size") or 2**31)
    if max(map(max, sizes)) > most:
        raise UserError(f"--buckets has a side of {max(map(max, sizes))}, and the network of {parts.name} knows no positions beyond {most}")
    return assigned_buckets(source, sizes, data)


def vae_of(parts: Parts) -> AutoencoderKL:
    """Of a checkpoint, or itself."""
    return parts.vae if isinstance(parts, CheckpointParts) else parts


def _text_digest(parts: CheckpointParts) -> str:
    digests = [*map(weights_digest, parts.encoders.values()), *map(_words_digest, parts.tokenizers.values())]
    return " ".join([*digests, *parts.text_notes])


def _words_digest(tokenizer: Any) -> str:
    words = json.loads(tokenizer.backend_tokenizer.to_str())
    words |= {"truncation": tokenizer.model_max_length, "padding": None}  # set anew by every call
    return hashlib.blake2b(json.dumps(words).encode(), digest_size=8).hexdigest()


def precision_name(mixed_precision: str | None) -> str:
    """Torch's name for what ``--mixed_precision`` says."""
    return str(PRECISIONS.get(mixed_precision or "no", torch.float32)).removeprefix("torch.")
