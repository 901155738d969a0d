"""Feature networks from the user's own files: CLIP, DINOv2, any vision model of transformers, any TorchScript file.

Nothing is downloaded: a network comes from a folder, or by its published name from the cache of the Hugging Face hub.
**Untested: parity with published numbers**, for want of the weights; tested is the arithmetic, on small random models.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from immiscible.errors import UserError, first_line
from immiscible.evaluation.forward import PretrainedFeatures
from immiscible.evaluation.resize import RESIZES, center_square
from immiscible.files import file_facts
from immiscible.randomness import preserved_randomness

TOGETHER = 64  # texts in a forward pass
PATTERNS = ("*.safetensors", "*.bin", "*.json")  # of a model's folder, what decides what it computes


@dataclass(frozen=True)
class Published:
    """A network that papers name.

    Attributes:
        repository: on the Hugging Face hub.
        shape: what the vision part's configuration says of it.
    """

    repository: str
    shape: Mapping[str, int]


PUBLISHED = {
    "clip": Published("openai/clip-vit-base-patch32", {"hidden_size": 768, "num_hidden_layers": 12, "patch_size": 32, "image_size": 224}),
    "clip-l14-336": Published(
        "openai/clip-vit-large-patch14-336", {"hidden_size": 1024, "num_hidden_layers": 24, "patch_size": 14, "image_size": 336}
    ),
    "dinov2": Published("facebook/dinov2-large", {"hidden_size": 1024, "num_hidden_layers": 24, "patch_size": 14}),
}


class TransformersFeatures(PretrainedFeatures):
    """A vision model of transformers: its pooled output, or the mean of its last states where the folder's weights pool nothing.

    Images become squares of ``side`` by ``resize``, the whole image, and are normalized as ``preprocessor_config.json`` says.

    Args:
        folder: what `from_pretrained` loads.
        device: where the network computes.
        resize: one of `RESIZES`.

    Raises:
        UserError: (exit code 1) the folder holds no such model, or not all of its weights; it does not say how images are normalized.
    """

    architecture = "AutoModel"
    mean: Sequence[float]
    std: Sequence[float]

    def __init__(self, folder: Path, device: torch.device | None = None, resize: str = "pillow-bicubic") -> None:
        if resize not in RESIZES:
            raise UserError(f"images cannot be resized by {resize!r}; known: {', '.join(RESIZES)}")
        self.name, self.resize, self.weights_sha256 = f"FD-{model_name(folder)}", resize, folder_sha256(folder)
        self._folder, self._device = folder, device or torch.device("cpu")
        network, missing = _load(folder, self.architecture)
        if lost := [key for key in missing if not key.startswith("pooler.")]:
            raise UserError(f"{folder} lacks weights of {self.architecture}: {lost[0]} and {len(lost) - 1} others", exit_code=1)
        self._network, self._pools = network.to(self._device), not missing
        self._prepare(self._network.config)
        probe = torch.zeros(1, 3, self.side, self.side, dtype=torch.uint8)
        self.num_features = self(probe).shape[1]

    def _prepare(self, config: Any) -> None:
        """Sets ``side``, ``mean`` and ``std``."""
        told = _read_json(self._folder / "preprocessor_config.json")
        size = told.get("crop_size") or told.get("size") or getattr(config, "image_size", None)
        side = (size.get("height") or size.get("shortest_edge")) if isinstance(size, dict) else size
        if not isinstance(side, int) or not isinstance(told.get("image_mean"), list) or not isinstance(told.get("image_std"), list):
            raise UserError(f"{self._folder}/preprocessor_config.json must say size, image_mean and image_std", exit_code=1)
        self.side, self.mean, self.std = side, told["image_mean"], told["image_std"]

    def _of(self, images: Tensor) -> dict[str, Tensor]:
        found = self._network(pixel_values=self._pixels(images))
        pooled = found.get("pooler_output") if self._pools else None
        if pooled is None:
            states = found.last_hidden_state  # [B,T,F] of transformers, [B,F,h,w] of convolutions
            pooled = states.mean(1) if states.ndim == 3 else states.mean((2, 3))
        return {"features": pooled.flatten(1)}

    def _pixels(self, images: Tensor) -> Tensor:
        x = RESIZES[self.resize](images, self.side) / 255
        mean, std = (torch.tensor(values, device=x.device).view(-1, 1, 1) for values in (self.mean, self.std))
        return (x - mean) / std


class DinoFeatures(TransformersFeatures):
    """DINOv2 (Oquab et al. 2023): the class token after the last normalization, for FD-DINOv2 (Stein et al. 2023): 1,024 for ViT-L/14.

    The whole image becomes 224x224, by Pillow's bicubic on 8 bits, as in dgm-eval, and is normalized as for ImageNet. transformers
    brings the position embeddings from 37x37 to 16x16 with other rounding than the original code, by what is not known here.
    """

    architecture = "Dinov2Model"

    def _prepare(self, config: Any) -> None:
        from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

        self.side, self.mean, self.std = 224, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
        if not _other_shape(config, PUBLISHED["dinov2"].shape):
            self.name = "FD-DINOv2"


class ClipFeatures(TransformersFeatures):
    """CLIP (Radford et al. 2021): embeddings of images and texts, of length 1, for CMMD (Jayasumana et al. 2024) and the CLIP score.

    The middle square of an image is resized by Pillow's bicubic on 8 bits, as CMMD does; CLIP's own code crops after resizing, which is
    the same for square images. The cosine of an image and a text is the inner product of their rows.
    """

    architecture = "CLIPModel"

    def _prepare(self, config: Any) -> None:
        from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

        self.side, self.mean, self.std = config.vision_config.image_size, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    def _of(self, images: Tensor) -> dict[str, Tensor]:
        # By its parts: what `get_image_features` returns changed with versions of transformers.
        pooled = self._network.vision_model(pixel_values=self._pixels(center_square(images))).pooler_output
        embeddings = normalize(self._network.visual_projection(pooled), dim=1)
        return {"features": embeddings, "image_embeddings": embeddings}

    def texts(self, texts: Sequence[str]) -> Tensor:
        """float64 [N, F] on the CPU of N texts, each cut to what the model reads (77 tokens).

        Raises:
            UserError: (exit code 1) the folder holds no tokenizer.
        """
        from transformers import CLIPTokenizer

        with _told(self._folder, "a tokenizer of CLIP"):
            tokenizer = CLIPTokenizer.from_pretrained(self._folder, local_files_only=True)
        most = self._network.config.text_config.max_position_embeddings
        found = [torch.zeros(0, self.num_features, dtype=torch.float64)]
        for first in range(0, len(texts), TOGETHER):
            part = list(texts[first : first + TOGETHER])
            tokens = tokenizer(part, padding="max_length", truncation=True, max_length=most, return_tensors="pt").to(self._device)
            with torch.no_grad():
                pooled = self._network.text_model(**tokens).pooler_output
                found.append(normalize(self._network.text_projection(pooled), dim=1).double().cpu())
        return torch.cat(found)


class TorchScriptFeatures(PretrainedFeatures):
    """A TorchScript file: float32 [N, 3, H, W] in 0..255 at the images' own size goes in, [N, F] comes out; it resizes by itself.

    Args:
        path: the file.
        resolution: of the images, in pixels.
        device: where it computes.

    Raises:
        UserError: (exit code 1) it is none, or takes or gives something else.
    """

    resize = "own"

    def __init__(self, path: Path, resolution: int, device: torch.device | None = None) -> None:
        self._device, self.name, self.side = device or torch.device("cpu"), f"FD-{path.stem}", resolution
        with _told(path, "a network in TorchScript for RGB images of 0..255"):
            self.weights_sha256 = file_facts(path)["sha256"]
            self._network = torch.jit.load(str(path), map_location=self._device).eval()
            self.num_features = self(torch.zeros(2, 3, resolution, resolution, dtype=torch.uint8)).shape[1]

    def _of(self, images: Tensor) -> dict[str, Tensor]:
        found = self._network(images.float())
        if not isinstance(found, Tensor) or found.ndim != 2 or len(found) != len(images):
            raise ValueError("it does not give a row of features per image")
        return {"features": found.float()}


def published_features(name: str, folder: Path | None, device: torch.device, resize: str | None = None) -> TransformersFeatures:
    """An entry of `PUBLISHED`, from a folder or the hub's cache.

    Raises:
        UserError: (exit code 1) it is not there; the line says what to fetch and how; or the folder holds another network.
    """
    known = PUBLISHED[name]
    folder = folder or cached_folder(name, known.repository)
    with _told(folder, f"a configuration as of {known.repository}"):
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    if other := _other_shape(getattr(config, "vision_config", config), known.shape):
        raise UserError(f"--feature_weights {folder} does not hold {known.repository}: {other}", exit_code=1)
    constructor = DinoFeatures if name == "dinov2" else ClipFeatures
    return constructor(folder, device, resize or "pillow-bicubic")


def local_features(path: Path, resolution: int, device: torch.device, resize: str | None = None) -> PretrainedFeatures:
    """The network for images of this side in a folder of transformers (CLIP, DINOv2, any vision model) or in a TorchScript file.

    Raises:
        UserError: (exit code 1) it is neither, or what the network's class raises.
    """
    if path.is_file():
        if resize is not None:
            raise UserError(f"a TorchScript file such as {path} resizes images by itself, not by {resize}")
        return TorchScriptFeatures(path, resolution, device)
    kind = _read_json(path / "config.json").get("model_type")
    constructor = {"clip": ClipFeatures, "dinov2": DinoFeatures}.get(str(kind), TransformersFeatures)
    return constructor(path, device, resize or "pillow-bicubic")


def cached_folder(name: str, repository: str) -> Path:
    """Where the hub's cache keeps a repository.

    Raises:
        UserError: (exit code 1) it does not.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repository, local_files_only=True))
    except (LocalEntryNotFoundError, OSError) as error:
        from huggingface_hub.constants import HF_HUB_CACHE

        raise UserError(
            f"the features {name} need {repository}, which is not in {HF_HUB_CACHE}, and nothing is downloaded unasked: "
            f"`hf download {repository}` fetches it from https://huggingface.co/{repository}; or give its folder by --feature_weights",
            exit_code=1,
        ) from error


def model_name(folder: Path) -> str:
    """What a folder is called; in the hub's cache (``models--owner--name/snapshots/...``), what its repository is called."""
    folder = folder.resolve()
    cached = [part for part in folder.parts if part.startswith("models--")]
    return cached[-1].rsplit("--", 1)[-1] if cached else folder.name


def folder_sha256(folder: Path) -> str:
    """Of the names and contents of a model's files."""
    digest = hashlib.sha256()
    for path in sorted({path for pattern in PATTERNS for path in folder.glob(pattern)}):
        digest.update(f"{path.name} {file_facts(path)['sha256']}\n".encode())
    return digest.hexdigest()


def _load(folder: Path, architecture: str) -> tuple[Any, list[str]]:
    """The model in fp32, on the CPU, in evaluation mode, and which of its weights the folder lacks: transformers draws them and goes on."""
    import transformers
    from transformers.utils import logging

    bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        with preserved_randomness(), _told(folder, f"a model that transformers loads as {architecture}"):
            network, told = getattr(transformers, architecture).from_pretrained(
                folder, local_files_only=True, dtype=torch.float32, output_loading_info=True
            )
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
    return network.eval().requires_grad_(False), sorted(told["missing_keys"])


@contextmanager
def _told(folder: Path, what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # of json, safetensors, pickle, tokenizers or transformers
        raise UserError(f"{folder} does not hold {what} ({first_line(error)})", exit_code=1) from error


def _other_shape(config: Any, shape: Mapping[str, int]) -> str:
    """Where a configuration is not of this shape; nothing where it is."""
    return ", ".join(f"its {key} is {found}, not {value}" for key, value in shape.items() if (found := getattr(config, key, None)) != value)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({first_line(error)}); a folder of transformers has it", exit_code=1) from error
    if not isinstance(found, dict):
        raise UserError(f"{path} is no JSON object", exit_code=1)
    return found
