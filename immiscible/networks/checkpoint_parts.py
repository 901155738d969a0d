"""The parts of a text-to-image checkpoint, and what one family of checkpoints differs from another by.

A family is a class of this shape: a table of the parts that it loads, the text states of captions, and what its network is told of them.
Tasks, loop, cache and pipelines know `CheckpointParts` alone; `immiscible.networks.families` finds the class by what the checkpoint says of
itself.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn

from immiscible.errors import UserError
from immiscible.networks.arguments import TextModelArguments
from immiscible.networks.kinds import part_of
from immiscible.networks.latents import latent_downsampling, open_vae
from immiscible.networks.weights import weights_digest

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, ModelMixin, SchedulerMixin
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

VAE_FLAG = "--pretrained_vae_model_name_or_path"
LEAST_SIGNAL = 1e-6  # of alpha_bar at the last step; Stable Diffusion's is 0.0047


@dataclass(kw_only=True)
class CheckpointParts(ABC):
    """The parts of a checkpoint; VAE and text encoders are frozen.

    Args:
        network: what is trained, fp32, called as ``network(xt, time, **told)`` with what `told` gives; of its U-Net or transformer with
            adapters the own weights are frozen.
        vae: images to latents and back.
        encoders: token ids to text states, by their names in the checkpoint.
        tokenizers: of the text encoders, likewise.
        scheduler: the noise process, with the prediction type that is trained.
        name: where the checkpoint is.
        options: ``revision``, ``variant`` and ``cache_dir`` for loading further parts.
        vae_name: where the VAE is, if it is not the checkpoint's own.
        index: what the checkpoint says of itself: the classes of its parts, and settings of its pipeline.
        from_scratch: whether the network began with random weights.
        digest: tells the weights that stay as they are from others, so that a run is not resumed on another checkpoint.
        pretrained_prediction: the checkpoint's own prediction type.
    """

    network: ModelMixin
    vae: AutoencoderKL
    encoders: dict[str, PreTrainedModel]
    tokenizers: dict[str, PreTrainedTokenizerBase]
    scheduler: SchedulerMixin
    name: str
    options: dict[str, Any]
    vae_name: str | None = None
    index: Mapping[str, Any] = field(default_factory=dict)
    from_scratch: bool = False
    digest: str = ""
    pretrained_prediction: str = "epsilon"

    family: ClassVar[str]  # in words
    pipeline_class: ClassVar[str]  # of diffusers: samples it, and is what a run leaves
    tag: ClassVar[str]  # of the model card
    default_resolution: ClassVar[int] = 512  # of diffusers' scripts for it
    told_geometry: ClassVar[bool] = False  # whether the network is told where the crops lie
    network_class: ClassVar[str] = "UNet2DConditionModel"
    network_part: ClassVar[str] = "unet"
    scheduler_class: ClassVar[str] = "DDPMScheduler"  # of training
    encoder_classes: ClassVar[Mapping[str, str]]  # part -> its class in transformers
    tokenizer_classes: ClassVar[Mapping[str, str]]
    in_single_file: ClassVar[Mapping[str, str]]  # text encoder -> what its tensors' names begin with in a file of the whole checkpoint
    optional: ClassVar[tuple[str, ...]] = ()  # text encoders and tokenizers that a checkpoint may lack
    lora_targets: ClassVar[Sequence[str]] = ("to_k", "to_q", "to_v", "to_out.0")  # what diffusers' LoRA examples adapt
    adapted_texts: ClassVar[Sequence[str]] = ("text_encoder",)  # what of the text encoders --train_text_encoder adapts

    # What a family says

    def tokens(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """The token ids of captions, by their tokenizers' names, each int64 [B, L] on the CPU, cut off where the text encoders end."""
        return {name: token_ids(tokenizer, captions) for name, tokenizer in self.tokenizers.items()}

    @abstractmethod
    def encode(self, tokens: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The text states of `tokens`, which are on the encoders' device, by name, each [B, ...]; the cache keeps them as they are.

        ``pooled`` [B, E] is always there: one vector of a caption, by which couplings tell captions apart.
        """

    @property
    @abstractmethod
    def text_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of what `texts` gives of one caption."""

    @property
    @abstractmethod
    def states_told(self) -> tuple[str, ...]:
        """Which of the text states the network is told."""

    @abstractmethod
    def told(self, texts: Mapping[str, Tensor], geometry: Tensor | None) -> dict[str, Tensor]:
        """The network's keyword arguments, each [B, ...].

        Args:
            texts: those of `states_told`, at least.
            geometry: int64 [B, 6] of the images: height and width of the original, top and left of the crop, height and width that are
                trained; None where all are whole images of the run's resolution.
        """

    @abstractmethod
    def check(self) -> None:
        """Whether the parts go together, and are what is trained here.

        Raises:
            UserError: they do not, or are not.
        """

    @property
    def pipeline_settings(self) -> dict[str, Any]:
        """What the pipeline is built with beside its parts."""
        return {}

    @property
    def schedule(self) -> str:
        """What the noise schedule is called, for who reads of the run."""
        return str(self.scheduler.config.beta_schedule)

    def predict(self, prediction_type: str) -> None:
        """Lets the network be trained for another prediction type than the checkpoint's.

        Raises:
            UserError: of a family that has one alone.
        """
        self.scheduler.register_to_config(prediction_type=prediction_type)

    def sampler(self, kind: str) -> SchedulerMixin:
        """The checkpoint's sampler, of the class ``kind`` in diffusers, told the prediction type that is trained.

        One that cannot sample that type (PNDM and "sample") gives way to DDIM.
        """
        import diffusers

        options: dict[str, Any] = {"prediction_type": self.prediction_type}
        if self.prediction_type == "sample" and kind == "PNDMScheduler":
            kind, options = "DDIMScheduler", {**options, "clip_sample": False}
        scheduler: SchedulerMixin = getattr(diffusers, kind).from_pretrained(
            self.name, subfolder="scheduler", **unvaried(self.options), **options
        )
        return scheduler

    @classmethod
    def build_network(
        cls,
        arguments: TextModelArguments,
        options: dict[str, Any],
        vae: AutoencoderKL,
        encoders: Mapping[str, PreTrainedModel],
        *,
        resolution: int,
        from_scratch: bool,
    ) -> ModelMixin:
        """The checkpoint's network, or one of its configuration with fresh weights; a family may know others by ``--model_preset``.

        Args:
            arguments: which checkpoint.
            options: of the revision, variant and cache of the network.
            vae: of whose latents it is.
            encoders: of whose text states it is told.
            resolution: of the run's images.
            from_scratch: draw the weights from the global generator.

        Raises:
            UserError: the family has no such preset.
        """
        import diffusers

        kind, name = getattr(diffusers, cls.network_class), str(arguments.pretrained_model_name_or_path)
        if arguments.model_preset:
            raise UserError(
                f"--model_preset {arguments.model_preset} takes the place of a U-Net of Stable Diffusion 1.x and 2.x, and {name} is "
                f"{cls.family}: leave it out"
            )
        network: ModelMixin
        if from_scratch:
            network = kind.from_config(kind.load_config(name, subfolder=cls.network_part, **unvaried(options)))
        else:
            network = kind.from_pretrained(name, subfolder=cls.network_part, **options)
        return network

    @classmethod  # noqa: B027 (most families need nothing)
    def fit(cls, network: ModelMixin, arguments: TextModelArguments, vae: AutoencoderKL, *, resolution: int) -> None:
        """Lets a network that was built be called as ``network(xt, time, **told)``, where diffusers has its arguments in another way.

        Raises:
            UserError: it cannot take images of this resolution.
        """

    def place_frozen(self, device: torch.device, dtype: torch.dtype) -> None:
        """Moves VAE and text encoders to ``device``, in ``dtype``."""
        for part in self.frozen.values():
            nn.Module.to(part, device=device, dtype=dtype)  # diffusers' own `to` warns of every cast, naming an empty list of modules

    # What all have

    def texts(self, captions: Sequence[str], device: torch.device) -> dict[str, Tensor]:
        """The text states of captions, as `encode` gives them; the text encoders are on ``device``."""
        return self.encode({name: ids.to(device) for name, ids in self.tokens(captions).items()})

    @classmethod
    def load(
        cls, arguments: TextModelArguments, options: dict[str, Any], parts: Sequence[str], *, resolution: int, from_scratch: bool
    ) -> Self:
        """The parts as they are in the checkpoint, on the CPU, with the network in fp32.

        Args:
            arguments: which checkpoint.
            options: of its revision, variant and cache.
            parts: the names of those that it has.
            resolution: of the run's images.
            from_scratch: see `build_network`.
        """
        import diffusers
        import transformers

        name = str(arguments.pretrained_model_name_or_path)
        noise = getattr(diffusers, cls.scheduler_class)
        _check_noise(name, cls.family, cls.scheduler_class, noise.load_config(name, subfolder="scheduler", **unvaried(options)))
        scheduler = noise.from_pretrained(name, subfolder="scheduler", **unvaried(options))
        tokenizers = {
            part: getattr(transformers, kind).from_pretrained(name, subfolder=part, **unvaried(options))
            for part, kind in cls.tokenizer_classes.items()
            if part in parts
        }
        vae_name = arguments.pretrained_vae_model_name_or_path
        vae, encoders = cls.load_frozen(name, options, parts, vae_name)
        for tokenizer, encoder in zip(tokenizers.values(), encoders.values(), strict=True):
            limit_length(tokenizer, encoder)
        own = {**options, "revision": arguments.non_ema_revision or arguments.revision}
        network = cls.build_network(arguments, own, vae, encoders, resolution=resolution, from_scratch=from_scratch)
        cls.fit(network, arguments, vae, resolution=resolution)
        loaded = cls(
            network=network.float(),
            vae=vae,
            encoders=encoders,
            tokenizers=tokenizers,
            scheduler=scheduler,
            name=name,
            options=options,
            vae_name=vae_name,
        )
        loaded.pretrained_prediction = loaded.prediction_type
        return loaded

    @classmethod
    def load_frozen(
        cls, name: str, options: dict[str, Any], parts: Sequence[str] | None = None, vae_name: str | None = None
    ) -> tuple[AutoencoderKL, dict[str, PreTrainedModel]]:
        """VAE and text encoders of a checkpoint, fp32, without gradient, on the CPU.

        Args:
            name: of the checkpoint.
            options: as in the class.
            parts: the names of those that it has; None for all of the family.
            vae_name: where the VAE is, if it is not the checkpoint's own.

        Raises:
            UserError: another VAE does not fit this checkpoint.
        """
        import transformers
        from diffusers import AutoencoderKL

        if vae_name is None:
            vae = AutoencoderKL.from_pretrained(name, subfolder="vae", **options)
        else:
            vae = open_vae(VAE_FLAG, vae_name, cache_dir=options.get("cache_dir"))
            _check_vae(vae, vae_name, AutoencoderKL.load_config(name, subfolder="vae", **unvaried(options)), name)
        encoders = {
            part: getattr(transformers, kind).from_pretrained(name, subfolder=part, **options)
            for part, kind in cls.encoder_classes.items()
            if parts is None or part in parts
        }
        for part in (vae, *encoders.values()):
            part.float().requires_grad_(False).eval()
        return vae, encoders

    def in_full_precision(self) -> Self:
        """The same with VAE and text encoders in fp32: those that a run rounded are loaded anew from the checkpoint."""
        if all(part.dtype == torch.float32 for part in self.frozen.values()):
            return self
        vae, encoders = self.load_frozen(self.name, self.options, tuple(self.encoders), self.vae_name)
        return replace(self, vae=vae, encoders=encoders)

    @classmethod
    def required(cls, *, with_network: bool = True) -> tuple[str, ...]:
        """The names of the parts that a checkpoint must have; its network is not always wanted."""
        texts = [part for part in (*cls.encoder_classes, *cls.tokenizer_classes) if part not in cls.optional]
        return (*([cls.network_part] if with_network else []), "vae", *texts, "scheduler")

    @property
    def text_encoder(self) -> PreTrainedModel:
        """The first of the text encoders."""
        return self.encoders["text_encoder"]

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The first of the tokenizers."""
        return self.tokenizers["tokenizer"]

    @property
    def reader(self) -> PreTrainedTokenizerBase:
        """The tokenizer that reads the most of a caption, as many tokens as its ``model_max_length``."""
        return max(self.tokenizers.values(), key=lambda tokenizer: int(tokenizer.model_max_length))

    @property
    def frozen(self) -> dict[str, Any]:
        """The networks that stay as they are, by their names."""
        return {"vae": self.vae, **self.encoders}

    @property
    def components(self) -> dict[str, Any]:
        """The parts of a pipeline, by their names, but for its sampler. Tokenizers are copies: they have state, and the look-ahead thread
        uses its own.
        """
        return {**self.frozen, **copy.deepcopy(self.tokenizers), part_of(self.network): self.network}

    @property
    def prediction_type(self) -> str:
        """Diffusers' name of what the network predicts; a scheduler of flows knows but one."""
        return str(self.scheduler.config.get("prediction_type", "flow_prediction"))

    @property
    def resolution(self) -> int:
        """The side of the run's images, in pixels."""
        return int(self.network.config.sample_size * latent_downsampling(self.vae))

    @property
    def text_notes(self) -> tuple[str, ...]:
        """What text states depend on beside encoders and tokenizers, in words, by which caches are told apart."""
        return ()

    @property
    def latent_shift(self) -> float:
        """What is taken from a latent before it is scaled."""
        return float(self.vae.config.shift_factor or 0)

    @property
    def identity(self) -> dict[str, Any]:
        """What tells these parts from another checkpoint's, wherever they were loaded from."""
        configs = {part_of(self.network): self.network.config, "vae": self.vae.config, "scheduler": self.scheduler.config}
        settings = {part: {name: value for name, value in config.items() if not name.startswith("_")} for part, config in configs.items()}
        return {**settings, "frozen": self.digest}

    def digest_of(self, *, network: bool) -> str:
        """Of the weights that stay as they are, with ``network`` also of its own."""
        return " ".join(map(weights_digest, [*self.frozen.values(), *([self.network] if network else [])]))

    @property
    def named(self) -> str:
        """The flag and its value, with which a line on these parts begins."""
        return f"--pretrained_model_name_or_path {self.name}"


def _check_noise(name: str, family: str, trained: str, settings: Mapping[str, Any]) -> None:
    """Whether a checkpoint's sampler is of the kind of noise that its family is trained with; another's settings would be passed over.

    Raises:
        UserError: it is not.
    """
    kinds = {"Flow": "flows", "EDM": "EDM's sigmas"}
    own = str(settings.get("_class_name", trained))
    found, wanted = (next((what for word, what in kinds.items() if word in each), "noise with betas") for each in (own, trained))
    if found != wanted:
        raise UserError(
            f"--pretrained_model_name_or_path {name}: its scheduler, {own}, is of {found}, and {family} is trained with {wanted} here"
        )


def _check_vae(vae: AutoencoderKL, vae_name: str, own: Mapping[str, Any], name: str) -> None:
    """Whether latents of another VAE are those that a checkpoint's network knows, by the settings of its own VAE.

    Raises:
        UserError: they are not.
    """
    blocks = {"block_out_channels": len} | dict.fromkeys(("latent_channels", "scaling_factor", "shift_factor"), lambda value: value)
    for setting, of_value in blocks.items():
        there, wanted = (of_value(value) if value else value for value in (vae.config.get(setting), own.get(setting, vae.config[setting])))
        if there != wanted:
            what = "blocks" if of_value is len else setting
            raise UserError(f"{VAE_FLAG} {vae_name} does not fit {name}: its {what} is {there}, and {wanted} in the VAE of the checkpoint")


def unvaried(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of parts that have no variants."""
    return {key: value for key, value in options.items() if key != "variant"}


def limit_length(tokenizer: PreTrainedTokenizerBase, text_encoder: PreTrainedModel) -> None:
    """Lets a tokenizer cut at what the text encoder reads; some name no length, which `transformers` takes for 10**30."""
    longest = getattr(text_encoder.config, "max_position_embeddings", None)
    if longest is not None:  # encoders of other families have none
        tokenizer.model_max_length = min(tokenizer.model_max_length, longest)


def token_ids(tokenizer: PreTrainedTokenizerBase, captions: Sequence[str]) -> Tensor:
    """The tokens of captions, int64 [B, L], filled up and cut off at the tokenizer's length."""
    options: dict[str, Any] = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    ids: Tensor = tokenizer(list(captions), max_length=tokenizer.model_max_length, **options).input_ids
    return ids


def check_unet(parts: CheckpointParts, width: int) -> None:
    """Whether the U-Net takes the VAE's latents and text states of this width, and no classes or images.

    Raises:
        UserError: it does not.
    """
    unet: Any = parts.network
    channels, latent_channels = unet.config.in_channels, parts.vae.config.latent_channels
    if channels != latent_channels or unet.config.class_embed_type or unet.config.num_class_embeds:
        raise UserError(
            f"{parts.named}: its U-Net takes {channels} channels or class labels, not the VAE's {latent_channels} "
            f"channels and a prompt alone; these scripts train text-to-image checkpoints, not inpainting, upscaling or depth models"
        )
    wanted = unet.config.cross_attention_dim
    if isinstance(wanted, int) and width != wanted:
        raise UserError(f"{parts.named}: its U-Net takes text states of width {wanted}, its text encoder gives {width}")


def check_words(parts: CheckpointParts) -> None:
    """Whether the tokenizers know words: one is made up where the files of words are not there.

    Raises:
        UserError: (exit code 1) one knows none.
    """
    for tokenizer in parts.tokenizers.values():
        if set(tokenizer("a photograph").input_ids) <= set(tokenizer.all_special_ids):
            raise UserError(f"{parts.named}: its tokenizer knows no words; is its vocabulary there?", exit_code=1)


def check_end(parts: CheckpointParts) -> None:
    """Whether the last noise level of a process with betas leaves something to predict.

    Raises:
        UserError: it does not.
    """
    if parts.prediction_type == "epsilon" and float(parts.scheduler.alphas_cumprod[-1]) < LEAST_SIGNAL:
        raise UserError(
            f"{parts.named}: its scheduler ends in pure noise (rescale_betas_zero_snr), where epsilon tells nothing of the image; give "
            f"--prediction_type v_prediction, or set rescale_betas_zero_snr to false in its scheduler/scheduler_config.json"
        )
