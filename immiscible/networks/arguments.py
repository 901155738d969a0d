"""The flags of networks and of their optimization."""

from __future__ import annotations

from dataclasses import dataclass

from immiscible.flags import flag
from immiscible.networks.unet import PRESETS
from immiscible.process import BETA_SCHEDULES

LR_SCHEDULERS = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")


@dataclass
class ModelArguments:
    """The network and the noise process it learns to reverse."""

    _argument_group_name = "model and noise process"

    model_config_name_or_path: str | None = flag(None, "a UNet2DModel configuration: folder, file, or name on the hub")
    model_preset: str | None = flag(
        None, "a U-Net by name; by default the diffusers example's where the resolution divides by 32, else unet-small", choices=PRESETS
    )
    vae_model_name_or_path: str | None = flag(
        None,
        "diffuse the latents of this VAE instead of pixels: an AutoencoderKL of diffusers, or a checkpoint that has one in its folder "
        "`vae`, on the hub or local; it stays as it is",
    )
    class_conditional: bool = flag(False, "tell the network the class of each image; the data must have classes")
    dropout: float | None = flag(None, "dropout in the U-Net; by default what the configuration says")
    prediction_type: str = flag("epsilon", "what the network predicts", choices=("epsilon", "sample", "v_prediction", "flow_prediction"))
    noise_process: str = flag("ddpm", "ddpm, or flow: x_t = (1-s) x0 + s noise (needs flow_prediction)", choices=("ddpm", "flow"))
    ddpm_num_steps: int = flag(1000, "T: the number of noise levels, of either process")
    ddpm_beta_schedule: str = flag(
        "linear",
        "the noise schedule; the papers' quadratic is scaled_linear, Stable Diffusion's too with betas 0.00085 and 0.012",
        choices=BETA_SCHEDULES,
    )
    ddpm_beta_start: float = flag(1e-4, "beta of the first step")
    ddpm_beta_end: float = flag(0.02, "beta of the last step")
    image_scale: float = flag(
        1.0,
        "c: diffuse c times the image (the paper's image projection); x_t is divided by its deviation, which multiplies the "
        "signal-to-noise ratio by c^2 and lets plain diffusers sample the result",
    )


@dataclass
class OptimizationArguments:
    """Batches, optimizer, EMA and precision."""

    _argument_group_name = "optimization"

    seed: int | None = flag(None, "seed of everything drawn; if not given one is drawn, printed and written into the run's config")
    train_batch_size: int = flag(16, "images per process and micro-batch")
    num_epochs: int = flag(100, "passes over the data")
    max_train_steps: int | None = flag(None, "optimizer steps; overrides --num_epochs")
    gradient_accumulation_steps: int = flag(1, "micro-batches per optimizer step")
    learning_rate: float = flag(1e-4, "peak learning rate of AdamW")
    lr_scheduler: str = flag("cosine", "the learning rate's course over the optimizer steps", choices=LR_SCHEDULERS)
    lr_warmup_steps: int = flag(500, "optimizer steps over which the learning rate rises")
    adam_beta1: float = flag(0.95, "AdamW's beta1")
    adam_beta2: float = flag(0.999, "AdamW's beta2")
    adam_weight_decay: float = flag(1e-6, "AdamW's weight decay")
    adam_epsilon: float = flag(1e-8, "AdamW's epsilon")
    max_grad_norm: float = flag(1.0, "gradients are clipped to this norm; 0 does not clip")
    use_ema: bool = flag(False, "keep an exponential moving average of the weights; samples and the final pipeline use it")
    ema_inv_gamma: float = flag(1.0, "warm-up of the EMA decay 1 - (1 + step / inv_gamma)^-power: inverse gamma")
    ema_power: float = flag(0.75, "warm-up of the EMA decay: power")
    ema_max_decay: float = flag(0.9999, "where the EMA decay stops rising")
    mixed_precision: str = flag("no", "precision inside the network; the noise process stays in fp32", choices=("no", "fp16", "bf16"))
    gradient_checkpointing: bool = flag(False, "recompute activations in the backward pass to save memory")
    channels_last: bool = flag(False, "channels-last memory format for the network")
    look_ahead: bool = flag(True, "load and pair the next step's batches on another thread while this step runs; changes no number")
    torch_compile: bool = flag(False, "compile the network with torch.compile")
    torch_compile_backend: str = flag("inductor", "the backend of --torch_compile")
    allow_tf32: bool = flag(False, "TF32 matrix products on Ampere GPUs and later")
    enable_xformers_memory_efficient_attention: bool = flag(False, "attention by xformers; torch's own is used otherwise")
    local_rank: int = flag(-1, "set by old distributed launchers; goes into LOCAL_RANK if the environment has none")


@dataclass
class TextModelArguments:
    """The checkpoint that gives VAE, text encoder, tokenizer, scheduler and the U-Net or its configuration."""

    _argument_group_name = "model"

    pretrained_model_name_or_path: str | None = flag(None, "a Stable Diffusion 1.x or 2.x checkpoint, on the hub or in a folder; required")
    revision: str | None = flag(None, "the checkpoint's revision on the hub")
    variant: str | None = flag(None, "the checkpoint's variant, such as fp16")
    non_ema_revision: str | None = flag(None, "the revision that holds the non-EMA U-Net")
    prediction_type: str | None = flag(
        None, "what the network predicts; by default what the checkpoint's scheduler says", choices=("epsilon", "sample", "v_prediction")
    )
    use_lora: bool = flag(False, "train low-rank adapters of the attention and leave the rest of the U-Net as it is (finetune_sd.py)")
    rank: int = flag(4, "rank of the adapters")


@dataclass
class TextOptimizationArguments:
    """Batches, optimizer, EMA and precision."""

    _argument_group_name = "optimization"

    seed: int | None = flag(None, "seed of everything drawn; if not given one is drawn, printed and written into the run's config")
    train_batch_size: int = flag(16, "images per process and micro-batch")
    num_train_epochs: int = flag(100, "passes over the data")
    max_train_steps: int | None = flag(None, "optimizer steps; overrides --num_train_epochs")
    gradient_accumulation_steps: int = flag(1, "micro-batches per optimizer step")
    gradient_checkpointing: bool = flag(False, "recompute activations in the backward pass to save memory")
    learning_rate: float = flag(1e-4, "peak learning rate of AdamW")
    scale_lr: bool = flag(False, "multiply the learning rate by accumulation, batch size and processes")
    lr_scheduler: str = flag("constant", "the learning rate's course over the optimizer steps", choices=LR_SCHEDULERS)
    lr_warmup_steps: int = flag(500, "optimizer steps over which the learning rate rises")
    use_8bit_adam: bool = flag(False, "AdamW with 8-bit states (bitsandbytes)")
    adam_beta1: float = flag(0.9, "AdamW's beta1")
    adam_beta2: float = flag(0.999, "AdamW's beta2")
    adam_weight_decay: float = flag(1e-2, "AdamW's weight decay")
    adam_epsilon: float = flag(1e-8, "AdamW's epsilon")
    max_grad_norm: float = flag(1.0, "gradients are clipped to this norm; 0 does not clip")
    use_ema: bool = flag(False, "keep an exponential moving average of the weights; samples and the final pipeline use it")
    offload_ema: bool = flag(False, "keep the average in host memory between steps")
    foreach_ema: bool = flag(False, "update the average with one call for all weights")
    mixed_precision: str | None = flag(
        None, "precision inside the networks; by default what accelerate is configured for", choices=("no", "fp16", "bf16")
    )
    allow_tf32: bool = flag(False, "TF32 matrix products on Ampere GPUs and later")
    enable_xformers_memory_efficient_attention: bool = flag(False, "attention by xformers; torch's own is used otherwise")
    channels_last: bool = flag(False, "channels-last memory format for the network")
    look_ahead: bool = flag(True, "load, encode and pair the next step's batches on another thread while this step runs")
    torch_compile: bool = flag(False, "compile the network with torch.compile")
    torch_compile_backend: str = flag("inductor", "the backend of --torch_compile")
    dream_training: bool = flag(False, "DREAM: correct noise and target by what the network itself would get wrong, for another forward")
    dream_detail_preservation: float = flag(1.0, "p of DREAM")
    local_rank: int = flag(-1, "set by old distributed launchers; goes into LOCAL_RANK if the environment has none")
