"""The flags of ``train_text_to_image.py`` and ``finetune_sd.py``: diffusers' own, with their meaning and default, and this suite's.

With ``--use_lora`` the flags and defaults of diffusers' LoRA example hold too.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import PurePath
from typing import Any

from immiscible.data.arguments import DataArguments, TextDataArguments
from immiscible.encoding.arguments import LatentCacheArguments
from immiscible.errors import UserError
from immiscible.evaluation.arguments import EvaluationArguments
from immiscible.method import MethodArguments
from immiscible.networks.arguments import ModelArguments, OptimizationArguments, TextModelArguments, TextOptimizationArguments
from immiscible.training.arguments import RunArguments, TextRunArguments
from immiscible.training.folder import OWN_FILES


@dataclass
class UnconditionalConfig(
    EvaluationArguments, RunArguments, OptimizationArguments, MethodArguments, ModelArguments, LatentCacheArguments, DataArguments
):
    """Every flag of ``train_unconditional.py``."""

    @property
    def image_interpolation_mode(self) -> str:
        """How images are resized; a flag of diffusers' other script."""
        return "bilinear"

    @property
    def free_on_resume(self) -> frozenset[str]:
        """The flags that may differ between a checkpoint and the run that resumes it."""
        return FREE_ON_RESUME

    @staticmethod
    def settle(values: dict[str, Any]) -> None:
        """Nothing here: no flag of this script switches another on."""

    def check(self) -> None:
        """What only this script's flags can get wrong.

        Raises:
            UserError: the flags contradict each other.
        """
        if self.coupling_min_timestep >= self.ddpm_num_steps:
            raise UserError(
                f"--coupling_min_timestep must be below --ddpm_num_steps {self.ddpm_num_steps}, not {self.coupling_min_timestep}"
            )
        if self.ddpm_num_inference_steps > self.ddpm_num_steps:
            raise UserError(f"--ddpm_num_inference_steps {self.ddpm_num_inference_steps} exceeds --ddpm_num_steps {self.ddpm_num_steps}")
        if self.eval_steps and any(not 1 <= steps <= self.ddpm_num_steps for steps in self.eval_inference_steps):
            raise UserError(
                f"--eval_inference_steps {self.eval_inference_steps}: each must be from 1 to --ddpm_num_steps {self.ddpm_num_steps}"
            )
        if self.model_preset and self.model_config_name_or_path:
            raise UserError("--model_preset and --model_config_name_or_path are given together; choose one")
        if self.label_column and self.bundled_data:
            raise UserError("--label_column names a column of --dataset_name or --train_data_dir; bundled data needs none")
        if self.crop == "adm" and self.preserve_input_precision:
            raise UserError("--crop adm is defined for 8-bit images, which --preserve_input_precision avoids; leave one of them out")
        if self.cache_latents and not self.vae_model_name_or_path:
            raise UserError("--cache_latents needs --vae_model_name_or_path, whose latents they are")
        if self.vae_model_name_or_path and self.noise_process == "flow":
            raise UserError(
                "--vae_model_name_or_path with --noise_process flow: diffusers has no pipeline that samples such a network; "
                "train latents with --noise_process ddpm"
            )

    @property
    def labels_for(self) -> str | None:
        """The flag that needs the images' classes, if any does."""
        needed = {
            "--class_conditional": self.class_conditional,
            f"--coupling_condition {self.coupling_condition}": self.coupling_condition != "none",
            "--log_class_leak": self.log_class_leak,
        }
        return next((flag for flag, given in needed.items() if given), None)


# What may differ between a checkpoint and the run that resumes it. All else defines the run. Data and
# network are compared by what they are (fingerprint, configuration), not by the flags that name them.
FREE_ON_RESUME = frozenset(
    [
        "max_train_steps",
        "num_epochs",
        "learning_rate",
        "lr_scheduler",
        "lr_warmup_steps",
        "torch_compile",
        "torch_compile_backend",
        "allow_tf32",
        "enable_xformers_memory_efficient_attention",
        "gradient_checkpointing",
        "channels_last",
        "look_ahead",
        "local_rank",
        "dataloader_num_workers",
        "cache_dir",
        "skip_bad_images",
        "dataset_name",
        "dataset_config_name",
        "train_data_dir",
        "bundled_data",
        "max_train_samples",
        "train_subset_fraction",
        "model_config_name_or_path",
        "model_preset",
        "vae_model_name_or_path",
        "latent_cache_dir",
    ]
) | {item.name for group in (RunArguments, EvaluationArguments) for item in fields(group)}


def _validate(config: UnconditionalConfig) -> None:
    """Ranges of every flag, also of methods that are not on; what depends on the schedule is checked where the method is built."""
    given = [f"--{name}" for name in ("dataset_name", "train_data_dir", "bundled_data") if getattr(config, name, None)]
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)} are given together; choose one source of images")
    for names, least in ((_AT_LEAST_ONE, 1), (_NOT_NEGATIVE, 0)):
        for name in names.split():
            value = getattr(config, name, None)
            if value is not None and not value >= least:
                raise UserError(f"--{name} must be at least {least}, not {value}")
    for name in ("ema_inv_gamma", "image_scale", "logit_std", "snr_gamma"):
        value = getattr(config, name, None)
        if value is not None and not value > 0:
            raise UserError(f"--{name} must be above 0, not {value}")
    if not 0 <= config.coupling_condition_ratio <= 1:
        raise UserError(f"--coupling_condition_ratio must be from 0 to 1, not {config.coupling_condition_ratio}")
    if not 0.5 <= config.change_aware_lambda <= 1:
        raise UserError(f"--change_aware_lambda must be from 0.5 to 1, not {config.change_aware_lambda}")
    if config.asymmetric_tau is not None and config.asymmetric_r is not None:
        raise UserError("--asymmetric_tau and --asymmetric_r both say where SpeeD's threshold is; give one of them")
    logs = PurePath(config.logging_dir)
    if logs.is_absolute() or not logs.parts or ".." in logs.parts or logs.parts[0] in OWN_FILES:
        raise UserError(f"--logging_dir {config.logging_dir} must be a folder of its own inside --output_dir, such as logs")
    for name in ("adam_beta1", "adam_beta2", "ema_max_decay", "dropout"):
        value = getattr(config, name, None)
        if value is not None and not 0 <= value < 1:
            raise UserError(f"--{name} must be at least 0 and below 1, not {value}")
    assigns = config.noise_coupling in ("independent", "assignment", "flipped_assignment")
    if config.train_subset_fraction is not None:
        if not 0 < config.train_subset_fraction <= 1:
            raise UserError(f"--train_subset_fraction must be above 0 and at most 1, not {config.train_subset_fraction}")
        if config.max_train_samples is not None:
            raise UserError("--train_subset_fraction and --max_train_samples both say how many images are used; give one of them")
    if config.streaming:
        if not (config.dataset_name or config.train_data_dir):
            raise UserError("--streaming is for --dataset_name or --train_data_dir; leave it out")
        if config.max_train_steps is None:
            raise UserError("--streaming needs --max_train_steps: how many images a stream holds is not known beforehand")
        for name in ("eval_steps", "max_train_samples", "train_subset_fraction", "cache_latents"):
            if getattr(config, name, None):
                raise UserError(f"--{name} needs images in any order, which --streaming does not give; leave out one of them")
    for name, default in (("coupling_scope", "process"), ("coupling_window", 1), ("coupling_condition", "none")):
        if getattr(config, name) != default and not assigns:
            raise UserError(
                f"--{name} is for couplings that pair the images of a batch with each other (--noise_coupling assignment or "
                f"flipped_assignment); {config.noise_coupling} serves each image on its own"
            )
    if config.latent_cache_dir is not None and not config.cache_latents:
        raise UserError("--latent_cache_dir names a cache that is not used; add --cache_latents, or leave it out")
    if config.cache_latents and config.latent_cache_dir is None:
        raise UserError("--cache_latents needs --latent_cache_dir, the folder that scripts/precompute_latents.py filled")
    if config.cache_latents and config.crop != "adm" and not config.center_crop:
        raise UserError("--cache_latents needs --center_crop or --crop adm: a random crop is another one in every epoch")
    if config.validation_split is not None and config.eval_steps is None:
        raise UserError("--validation_split holds images out for evaluation: give --eval_steps too")
    if config.snr_gamma is not None and config.loss_weighting != "min_snr":
        raise UserError(f"--snr_gamma belongs to --loss_weighting min_snr, not to {config.loss_weighting}")
    if config.resume_from_checkpoint and config.overwrite_output_dir:
        raise UserError("--resume_from_checkpoint continues a run and --overwrite_output_dir deletes it; choose one")
    if not isinstance(config.seed, int | None) or (config.seed is not None and config.seed < 0):
        raise UserError(f"--seed must be at least 0, not {config.seed}")
    config.check()


_AT_LEAST_ONE = (
    "resolution train_batch_size num_epochs num_train_epochs max_train_steps gradient_accumulation_steps checkpointing_steps "
    "checkpoints_total_limit eval_batch_size ddpm_num_steps ddpm_num_inference_steps logging_steps max_train_samples eval_steps "
    "eval_samples coupling_candidates coupling_window coupling_reservoir asymmetric_k asymmetric_r asymmetric_tau rank "
    "num_validation_images validation_epochs validation_steps validation_inference_steps shuffle_buffer"
)


_NOT_NEGATIVE = (
    "lr_warmup_steps learning_rate adam_epsilon adam_weight_decay max_grad_norm save_images_epochs save_model_epochs "
    "dataloader_num_workers coupling_min_timestep coupling_start_step noise_offset input_perturbation p2_k p2_gamma ema_power "
    "dream_detail_preservation"
)


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
