"""The flags of networks and of their optimization."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from immiscible.errors import UserError, short
from immiscible.flags import Names, flag
from immiscible.networks.sd3_arguments import SD3Arguments

RANK = 4  # of adapters, if nothing says another
LR_SCHEDULERS = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")


@dataclass
class ModelArguments:
    """The network of ``train_unconditional.py``."""

    _argument_group_name = "model"

    model_config_name_or_path: str | None = flag(
        None, "a configuration of a UNet2DModel, a DiTTransformer2DModel or an MDTTransformer2DModel: folder, file, or name on the hub"
    )
    model_preset: str | None = flag(
        None,
        "a U-Net, diffusion transformer (DiT) or masked one (MDT) by name; by default the diffusers example's where the resolution "
        "divides by 32, else unet-small",
        choices=Names("immiscible.networks.presets", "PRESETS"),
    )
    vae_model_name_or_path: str | None = flag(
        None,
        "diffuse the latents of this VAE instead of pixels: an AutoencoderKL of diffusers, or a checkpoint that has one in its folder "
        "`vae`, on the hub or local; it stays as it is",
    )
    class_conditional: bool = flag(False, "tell the network the class of each image; the data must have classes")
    num_classes: int | None = flag(None, "the number of classes: the data must have this many; by default what it has", least=1)
    class_embed_type: str | None = flag(
        None,
        "timestep: a class is embedded as a timestep is; by default what the configuration says, else a learned embedding",
        choices=("timestep",),
    )
    class_dropout_prob: float = flag(
        0.0, "share of the images, drawn for each, whose class the network is not told, so that its samples can be guided", least=0, below=1
    )
    mask_ratio: list[float] | None = flag(  # noqa: RUF009 (a field)
        None,
        "of a masked transformer (MDT): the share of an image's patches that its second pass does not see, 0.3 by default; two numbers: "
        "drawn between them in each step, as 0.3 0.5 of MDTv2",
        least=0,
        below=1,
    )
    dropout: float | None = flag(None, "dropout in the network; by default what the configuration says", least=0, below=1)

    def check(self) -> None:
        """What these flags can get wrong.

        Raises:
            UserError: they contradict each other.
        """
        if self.model_preset and self.model_config_name_or_path:
            raise UserError("--model_preset and --model_config_name_or_path are given together; choose one")
        if self.mask_ratio and (len(self.mask_ratio) > 2 or sorted(self.mask_ratio) != self.mask_ratio):
            given = " ".join(f"{each:g}" for each in self.mask_ratio)
            raise UserError(f"--mask_ratio must be one number or two, the lower one first, such as 0.3 0.5, not {given}")
        if self.class_conditional:
            return
        if self.class_dropout_prob:
            raise UserError(f"--class_dropout_prob {self.class_dropout_prob:g} needs --class_conditional: no class is told without it")
        for name in ("num_classes", "class_embed_type"):
            if (value := getattr(self, name)) is not None:
                raise UserError(f"--{name} {value} needs --class_conditional: no class is told without it")


@dataclass
class TextModelArguments(SD3Arguments):
    """The checkpoint that gives VAE, text encoder, tokenizer, scheduler and, without a preset, the U-Net or its configuration."""

    _argument_group_name = "model"

    pretrained_model_name_or_path: str | None = flag(
        None,
        "a checkpoint of Stable Diffusion, on the hub, in a folder or in one file (.safetensors, .ckpt); it says itself which one it is; "
        "required",
    )
    single_file_config: str | None = flag(
        None,
        "of a checkpoint in one file: a diffusers checkpoint, on the hub or in a folder, of which all but the weights is taken; by default "
        "the one on the hub that diffusers takes for such files",
    )
    revision: str | None = flag(None, "the checkpoint's revision on the hub")
    variant: str | None = flag(None, "the checkpoint's variant, such as fp16")
    pretrained_vae_model_name_or_path: str | None = flag(
        None,
        "another VAE than the checkpoint's, of the same latents, on the hub or in a folder, such as SDXL's that is mended for fp16; SDXL's "
        "own encodes and decodes in fp32",
    )
    non_ema_revision: str | None = flag(None, "the revision that holds the non-EMA U-Net")
    prediction_type: str | None = flag(
        None, "what the network predicts; by default what the checkpoint's scheduler says", choices=("epsilon", "sample", "v_prediction")
    )
    model_preset: str | None = flag(
        None,
        "a diffusion transformer (DiT) by name in the place of the checkpoint's U-Net, from random weights, told the text encoder's pooled "
        "state (train_text_to_image.py)",
        choices=Names("immiscible.networks.dit", "TEXT_PRESETS"),
    )
    use_lora: bool = flag(False, "train low-rank adapters of the attention and leave the rest of the U-Net as it is (finetune_sd.py)")

    def check(self) -> None:
        """What these flags can get wrong.

        Raises:
            UserError: the checkpoint is not named, or flags contradict each other.
        """
        SD3Arguments.check(self)
        if self.pretrained_model_name_or_path is None:
            raise UserError(
                "--pretrained_model_name_or_path is required: a Stable Diffusion checkpoint, on the hub, in a folder or in one file"
            )
        folder = Path(self.pretrained_model_name_or_path).expanduser()
        if self.single_file_config and (folder / "model_index.json").exists():
            raise UserError(f"--single_file_config is of a checkpoint in one file, and {folder} is a folder of parts: leave it out")
        preset = f"--model_preset {self.model_preset}"
        if self.model_preset and self.use_lora:
            raise UserError(f"--use_lora adapts pretrained weights, which {preset} does not have; choose one")
        if self.model_preset and self.non_ema_revision:
            raise UserError(f"--non_ema_revision is of the checkpoint's U-Net, whose place {preset} takes; choose one")


@dataclass
class AdapterArguments:
    """Low-rank adapters (LoRA), with --use_lora."""

    _argument_group_name = "adapters"

    rank: int | None = flag(None, "rank of the adapters; by default 4, or that of --network_weights", least=1, most=2**12)
    lora_alpha: float | None = flag(
        None, "adapters are multiplied by alpha / rank; by default the rank, or that of --network_weights", above=0, most=2**16
    )
    lora_target_modules: list[str] | None = flag(  # noqa: RUF009 (a field)
        None,
        "what is adapted of the network, by the ends of its modules' names (to_q ff.net.2, or with commas between), all-linear, or one "
        "regular expression of whole names, as peft takes them; by default to_q, to_k, to_v and to_out.0 of the attention",
        alias="lora_layers",
    )
    lora_dropout: float = flag(0.0, "share of the adapters' inputs that is dropped in training", least=0, below=1)
    use_dora: bool = flag(False, "DoRA: train the lengths of a weight's columns apart from their directions")
    train_text_encoder: bool = flag(False, "adapt the text encoder's attention too; of several, all of CLIP")
    network_weights: str | None = flag(
        None, "go on from the adapters in this file or folder, in diffusers' format or kohya's, with their rank, alpha and modules"
    )

    if TYPE_CHECKING:  # of `TextModelArguments`
        use_lora: bool = False

    def check(self) -> None:
        """What these flags can get wrong.

        Raises:
            UserError: they contradict each other, or there are no adapters.
        """
        blank = AdapterArguments()
        if self.rank == RANK:  # which it becomes where it is not given
            blank.rank = RANK
        given = [item.name for item in fields(AdapterArguments) if getattr(self, item.name) != getattr(blank, item.name)]
        if given and not self.use_lora:
            raise UserError(f"--{given[0]} is of adapters: give --use_lora too, or leave it out")
        if self.network_weights and self.lora_target_modules:
            raise UserError("--network_weights says which modules are adapted; leave --lora_target_modules out")


@dataclass
class TrainingArguments:
    """Batches, optimizer, EMA and precision: what all scripts share.

    What only some of them have a flag for stands here as what it is for the others.
    """

    seed: int | None = flag(
        None, "seed of everything drawn; if not given one is drawn, printed and written into the run's config", least=0, most=2**63 - 1
    )
    train_batch_size: int = flag(16, "images per process and micro-batch", least=1, most=2**16)
    max_train_steps: int | None = flag(None, "optimizer steps; overrides the number of epochs", least=1)
    gradient_accumulation_steps: int = flag(1, "micro-batches per optimizer step", least=1, most=2**16)
    gradient_checkpointing: bool = flag(False, "recompute activations in the backward pass to save memory")
    learning_rate: float = flag(1e-4, "peak learning rate", least=0, most=1000)
    learning_rate_groups: list[str] | None = flag(  # noqa: RUF009 (a field)
        None,
        "weights with a rate of their own, as PATTERN=FACTOR of --learning_rate: a pattern is a part of a weight's name between dots, or "
        "several (attn2, mid_block.*.to_q, lora_B); of several that fit the first counts; 0 leaves them as they are",
    )
    scale_lr: bool = flag(False, "multiply the learning rate by accumulation, batch size and processes")
    lr_scheduler: str = flag("cosine", "the learning rate's course over the optimizer steps", choices=LR_SCHEDULERS)
    lr_warmup_steps: int = flag(500, "optimizer steps over which the learning rate rises", least=0)
    optimizer: str = flag(
        "adamw",
        "adamw; adamw_8bit (needs bitsandbytes); radam: its first steps are shorter where the average of squared gradients is still "
        "uncertain (improved consistency training has it); adafactor: --learning_rate is relative to a weight's size; muon: torch's Muon "
        "for the matrices of linear layers, AdamW for the rest; prodigy (prodigyopt): finds its rate, which --learning_rate 1 multiplies; "
        "schedule_free (schedulefree): AdamW whose own average is that of --use_ema; weight decay is apart from the gradient in all",
        choices=Names("immiscible.networks.optimization", "OPTIMIZERS"),
        alias="optimizer_type",
    )
    use_8bit_adam: bool = flag(False, "the same as --optimizer adamw_8bit")
    decay_norms_and_biases: bool = flag(True, "weight decay for vectors too: norms and biases")
    adam_beta1: float = flag(0.95, "the optimizer's beta1", least=0, below=1)
    adam_beta2: float = flag(0.999, "the optimizer's beta2", least=0, below=1)
    adam_weight_decay: float = flag(1e-6, "the optimizer's weight decay", least=0, most=1000)
    adam_epsilon: float = flag(1e-8, "the optimizer's epsilon", least=0, most=1)
    max_grad_norm: float = flag(1.0, "gradients are clipped to this norm; 0 does not clip", least=0, most=1e12)
    use_ema: bool = flag(False, "keep an exponential moving average of the weights; samples and the final pipeline use it")
    mixed_precision: str | None = flag(
        None, "precision inside the networks; by default what accelerate is configured for", choices=("no", "fp16", "bf16")
    )
    allow_tf32: bool = flag(False, "TF32 matrix products on Ampere GPUs and later")
    enable_xformers_memory_efficient_attention: bool = flag(False, "attention by xformers; torch's own is used otherwise")
    channels_last: bool = flag(False, "channels-last memory format for the network")
    look_ahead: bool = flag(True, "load, encode and pair the next step's batches on another thread while this step runs; changes no number")
    torch_compile: bool = flag(False, "compile the network with torch.compile, on a GPU")
    torch_compile_backend: str = flag("inductor", "the backend of --torch_compile")
    local_rank: int = flag(-1, "set by old distributed launchers; goes into LOCAL_RANK if the environment has none", least=-1)

    if TYPE_CHECKING:  # flags of one of the subclasses, constants of the other
        offload_ema: bool = False
        text_encoder_lr: float | None = None
        adam_weight_decay_text_encoder: float | None = None

    @property
    def rate_patterns(self) -> dict[str, float]:
        """The factors of ``learning_rate_groups``, by pattern."""
        return dict(_rate_pattern(each) for each in self.learning_rate_groups or ())

    @property
    @abstractmethod
    def epochs(self) -> int:
        """Passes over the data."""

    @property
    @abstractmethod
    def ema_settings(self) -> dict[str, Any]:
        """What `diffusers.training_utils.EMAModel` is built with."""

    def check(self) -> None:
        """What these flags can get wrong.

        Raises:
            UserError: they contradict each other.
        """
        if self.use_8bit_adam and self.optimizer not in ("adamw", "adamw_8bit"):
            raise UserError(f"--use_8bit_adam is AdamW with 8-bit states; leave it or --optimizer {self.optimizer} out")
        if len(self.rate_patterns) < len(self.learning_rate_groups or ()):
            raise UserError(
                f"--learning_rate_groups {' '.join(self.learning_rate_groups or ())}: one pattern is given twice; leave one out"
            )
        if self.text_encoder_lr and not self.learning_rate:
            raise UserError(
                f"--text_encoder_lr {self.text_encoder_lr:g} with --learning_rate 0: give a rate, and --learning_rate_groups for 0"
            )
        if self.optimizer == "prodigy" and self.learning_rate < 0.1:
            raise UserError(f"--optimizer prodigy finds its rate, and --learning_rate multiplies it: give 1, not {self.learning_rate:g}")
        if self.torch_compile_backend != "inductor" and not self.torch_compile:
            raise UserError(f"--torch_compile_backend {self.torch_compile_backend} is of --torch_compile: give it too, or leave this out")
        if self.optimizer == "schedule_free":
            self._check_schedule_free()

    def _check_schedule_free(self) -> None:
        if not self.use_ema:
            raise UserError(
                "--optimizer schedule_free trains one point and keeps another, their average, for use: give --use_ema (adapters have no "
                "average: choose another optimizer for them)"
            )
        if not self.lr_scheduler.startswith("constant"):
            raise UserError(f"--optimizer schedule_free has no schedule: --lr_scheduler constant_with_warmup, not {self.lr_scheduler}")
        if not self.adam_beta1:
            raise UserError("--optimizer schedule_free: --adam_beta1 must be above 0")


def _rate_pattern(text: str) -> tuple[str, float]:
    pattern, _, factor = text.rpartition("=")
    try:
        value = float(factor)
    except ValueError:
        value = -1.0
    if not pattern.strip() or not 0 <= value < float("inf"):
        raise UserError(f"--learning_rate_groups {short(text)!r} must be PATTERN=FACTOR with a factor of at least 0, such as attn2=0.5")
    return pattern, value


@dataclass
class OptimizationArguments(TrainingArguments):
    """Batches, optimizer, EMA and precision of ``train_unconditional.py``."""

    _argument_group_name = "optimization"
    offload_ema = False
    text_encoder_lr = adam_weight_decay_text_encoder = None

    num_epochs: int = flag(100, "passes over the data", least=1, alias="num_train_epochs")
    use_ema_warmup: bool = flag(
        True, "raise the EMA decay by the next two flags; off, it is (1 + step) / (10 + step), up to --ema_max_decay as well"
    )
    ema_inv_gamma: float = flag(1.0, "warm-up of the EMA decay 1 - (1 + step / inv_gamma)^-power: inverse gamma", above=0, most=1e6)
    ema_power: float = flag(0.75, "warm-up of the EMA decay: power", least=0, most=10)
    ema_max_decay: float = flag(0.9999, "where the EMA decay stops rising", least=0, most=1)
    ema_min_decay: float | None = flag(
        None,
        "the least EMA decay after the first update; by default 0, and not --ema_max_decay, which cancels the warm-up in the diffusers "
        "consistency example",
        least=0,
        most=1,
    )
    mixed_precision: str = flag("no", "precision inside the network; the noise process stays in fp32", choices=("no", "fp16", "bf16"))

    @property
    def epochs(self) -> int:
        """Passes over the data."""
        return self.num_epochs

    @property
    def ema_settings(self) -> dict[str, Any]:
        """As in diffusers' unconditional example."""
        warm_up = {"use_ema_warmup": self.use_ema_warmup, "inv_gamma": self.ema_inv_gamma, "power": self.ema_power}
        return {"decay": self.ema_max_decay, "min_decay": self.ema_min_decay or 0.0, **warm_up, "foreach": True}

    def check(self) -> None:
        """See `TrainingArguments.check`."""
        super().check()
        if self.ema_min_decay is not None and self.ema_min_decay > self.ema_max_decay:
            raise UserError(f"--ema_min_decay {self.ema_min_decay:g} must not be above --ema_max_decay {self.ema_max_decay:g}")


@dataclass
class TextOptimizationArguments(TrainingArguments):
    """Batches, optimizer, EMA and precision of the Stable Diffusion scripts."""

    _argument_group_name = "optimization"

    num_train_epochs: int = flag(100, "passes over the data", least=1)
    lr_scheduler: str = flag("constant", "the learning rate's course over the optimizer steps", choices=LR_SCHEDULERS)
    adam_beta1: float = flag(0.9, "the optimizer's beta1", least=0, below=1)
    text_encoder_lr: float | None = flag(
        None, "peak learning rate of text encoders, with --train_text_encoder; by default --learning_rate", least=0, most=1000
    )
    adam_weight_decay: float = flag(1e-2, "the optimizer's weight decay", least=0, most=1000)
    adam_weight_decay_text_encoder: float | None = flag(
        None, "weight decay of text encoders, with --train_text_encoder; by default --adam_weight_decay", least=0, most=1000
    )
    offload_ema: bool = flag(False, "keep the average in host memory between steps")
    foreach_ema: bool = flag(False, "update the average with one call for all weights")
    dream_training: bool = flag(False, "DREAM: correct noise and target by what the network itself would get wrong, for another forward")
    dream_detail_preservation: float = flag(1.0, "p of DREAM", least=0, most=1000)

    @property
    def epochs(self) -> int:
        """Passes over the data."""
        return self.num_train_epochs

    @property
    def ema_settings(self) -> dict[str, Any]:
        """As in diffusers' text-to-image example: decay ``(1 + n) / (10 + n)`` up to 0.9999."""
        return {"foreach": self.foreach_ema}

    @property
    def dream_power(self) -> float | None:
        """p of DREAM, None without it."""
        return self.dream_detail_preservation if self.dream_training else None
