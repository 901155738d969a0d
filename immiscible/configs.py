"""The flags of ``train_text_to_image.py`` and ``finetune_sd.py``: diffusers' own, with their meaning and default, and this suite's.

With ``--use_lora`` the flags and defaults of diffusers' LoRA example hold too.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from immiscible.errors import UserError
from immiscible.flags import (
    CROPS,
    FREE_ON_RESUME,
    LR_SCHEDULERS,
    EvaluationArguments,
    LatentCacheArguments,
    MethodArguments,
    UnconditionalConfig,
    flag,
)

INTERPOLATIONS = ("nearest", "nearest_exact", "bilinear", "bicubic", "box", "hamming", "lanczos")


@dataclass
class TextDataArguments:
    """Which images and captions, and how the images are cropped."""

    _argument_group_name = "data"

    dataset_name: str | None = flag(None, "a data set on the hub (its `train` split), or a local folder that `datasets` can load")
    dataset_config_name: str | None = flag(None, "the configuration of --dataset_name")
    train_data_dir: str | None = flag(
        None, "a folder of images with a metadata.jsonl that has their captions, of parquet files, or of WebDataset shards (.tar)"
    )
    image_column: str = flag("image", "the column of the data set that holds the images")
    caption_column: str = flag(
        "text",
        "the column of the captions: text, a list of texts of which each epoch takes one, or classes (ClassLabel), whose names become "
        "the prompts, by number; for .tar shards `text` is the .txt member, any other name a key of the .json member",
    )
    proportion_empty_prompts: float = flag(0.0, "share of the images that are trained without their caption, for guidance")
    cache_dir: str | None = flag(None, "where downloaded data sets and models are kept")
    resolution: int = flag(512, "images are resized and cropped to this many pixels a side")
    center_crop: bool = flag(False, "crop the center instead of a random place")
    random_flip: bool = flag(False, "flip half of the images left to right")
    image_interpolation_mode: str = flag("lanczos", "how images are resized", choices=INTERPOLATIONS)
    crop: str = flag(
        "diffusers",
        "diffusers: resize the short side, then cut; adm: halve by box filters, then bicubic, and cut the center, as ImageNet papers do",
        choices=CROPS,
    )
    max_train_samples: int | None = flag(None, "train on at most this many images, a fixed random subset")
    train_subset_fraction: float | None = flag(
        None, "train on this share of the images, a fixed random subset that does not depend on --seed"
    )
    skip_bad_images: bool = flag(False, "replace unreadable images by the next one and count them, instead of stopping")
    streaming: bool = flag(
        False,
        "read .tar or .parquet shards from front to back, over the network if --dataset_name is on the hub, and keep nothing on disk; "
        "epochs are not counted, so give --max_train_steps",
    )
    shuffle_buffer: int = flag(1000, "with --streaming: images of one shard that are shuffled together")
    dataloader_num_workers: int = flag(0, "processes that decode images; 0 decodes in the training process")


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


@dataclass
class TextRunArguments:
    """Where the run goes, what it leaves, and how it continues."""

    _argument_group_name = "run"

    output_dir: str | None = flag(None, "the run's folder; by default sd-model-finetuned, with --use_lora sd-model-finetuned-lora")
    overwrite_output_dir: bool = flag(False, "delete the run that --output_dir holds (its own files only) and start anew")
    resume_from_checkpoint: str | None = flag(None, "`latest`, or a checkpoint's path; continues bit-exactly")
    checkpointing_steps: int = flag(500, "optimizer steps between checkpoints; one is always left at the end")
    checkpoints_total_limit: int | None = flag(None, "keep this many checkpoints, the newest")
    validation_prompts: list[str] | None = flag(None, "prompts of the sample grids")  # noqa: RUF009 (a field)
    validation_prompt: str | None = flag(None, "one prompt, of which --num_validation_images samples are drawn")
    num_validation_images: int = flag(4, "samples of --validation_prompt")
    validation_epochs: int | None = flag(None, "epochs between sample grids; by default 5, with --use_lora 1")
    validation_steps: int | None = flag(
        None, "optimizer steps between sample grids, instead of --validation_epochs, which --streaming does not count"
    )
    validation_inference_steps: int = flag(20, "steps with which samples are drawn")
    guidance_scale: float = flag(7.5, "guidance of the samples; 1 samples without")
    eval_batch_size: int = flag(16, "samples drawn together")
    report_to: str = flag(
        "tensorboard",
        "experiment tracker, of accelerate's, or none; metrics.jsonl is written with each; tensorboard and wandb show the samples",
    )
    tracker_project_name: str = flag("text2image-fine-tune", "the project in the tracker")
    logging_dir: str = flag("logs", "the tracker's folder, inside --output_dir")
    logging_steps: int = flag(10, "optimizer steps between lines of metrics.jsonl")
    push_to_hub: bool = flag(False, "upload the pipeline, or the adapters, to the hub")
    hub_token: str | None = flag(None, "the token for --push_to_hub")
    hub_model_id: str | None = flag(None, "the repository for --push_to_hub; by default the name of --output_dir")
    hub_private_repo: bool = flag(False, "create the repository private; one that exists stays as it is")
    plan: bool = flag(False, "print what would run, with sizes and an estimate after a few timed steps, and exit")


@dataclass
class TextToImageConfig(
    EvaluationArguments,
    TextRunArguments,
    TextOptimizationArguments,
    MethodArguments,
    TextModelArguments,
    LatentCacheArguments,
    TextDataArguments,
):
    """Every flag of ``train_text_to_image.py`` and ``finetune_sd.py``."""

    @staticmethod
    def settle(values: dict[str, Any]) -> None:
        """``--snr_gamma`` alone switches min-SNR weighting on, as in diffusers' scripts."""
        if values["snr_gamma"] is not None and values["loss_weighting"] == "none":
            values["loss_weighting"] = "min_snr"

    @property
    def free_on_resume(self) -> frozenset[str]:
        """The flags that may differ between a checkpoint and the run that resumes it."""
        return TEXT_FREE_ON_RESUME

    @property
    def logger(self) -> str:
        """The tracker's name; what diffusers' other script calls ``--logger``."""
        return self.report_to

    @property
    def num_epochs(self) -> int:
        """Passes over the data."""
        return self.num_train_epochs

    @property
    def preserve_input_precision(self) -> bool:
        """Images are 8-bit here; the flag is of diffusers' other script."""
        return False

    @property
    def labels_for(self) -> str | None:
        """The flag that needs the images' classes as numbers, if any does."""
        if self.log_class_leak:
            return "--log_class_leak"
        return "--coupling_condition within" if self.coupling_condition == "within" else None

    def check(self) -> None:
        """What only these scripts' flags can get wrong; fills in the defaults that depend on other flags.

        Raises:
            UserError: something required is missing, or flags contradict each other.
        """
        if self.pretrained_model_name_or_path is None:
            raise UserError("--pretrained_model_name_or_path is required: a Stable Diffusion checkpoint, on the hub or in a folder")
        if self.dataset_name is None and self.train_data_dir is None:
            raise UserError("--dataset_name or --train_data_dir is required: images with captions")
        if not 0 <= self.proportion_empty_prompts <= 1:
            raise UserError(f"--proportion_empty_prompts must be from 0 to 1, not {self.proportion_empty_prompts}")
        if self.eval_steps and min(self.eval_inference_steps) < 1:
            raise UserError(f"--eval_inference_steps {self.eval_inference_steps}: each must be at least 1")
        if self.validation_prompt is not None and self.validation_prompts is not None:
            raise UserError("--validation_prompt and --validation_prompts are given together; choose one")
        if self.use_lora and self.use_ema:
            raise UserError("--use_ema averages the whole U-Net, which --use_lora leaves as it is; choose one")
        if self.use_lora and self.dream_training:
            raise UserError("--dream_training is for the whole U-Net; leave out --use_lora")
        if self.dream_training and self.prediction_type not in (None, "epsilon"):
            raise UserError(f"--dream_training needs epsilon-prediction, not {self.prediction_type}")
        if self.output_dir is None:
            self.output_dir = "sd-model-finetuned-lora" if self.use_lora else "sd-model-finetuned"
        if self.validation_epochs is None:
            self.validation_epochs = 1 if self.use_lora else 5

    @property
    def prompts(self) -> list[str]:
        """Whose samples the grids hold."""
        if self.validation_prompt is not None:
            return [self.validation_prompt] * self.num_validation_images
        return self.validation_prompts or []


# What may differ between a checkpoint and the run that resumes it: as for the other script, under these scripts' names.
TEXT_FREE_ON_RESUME = (
    FREE_ON_RESUME
    | {"num_train_epochs", "pretrained_model_name_or_path", "revision", "variant", "non_ema_revision"}
    | {"offload_ema", "foreach_ema"}
    | {item.name for item in fields(TextRunArguments)}
)

AnyConfig = UnconditionalConfig | TextToImageConfig
