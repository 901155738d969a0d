"""The configurations of the training scripts: which argument groups each is made of, and what only their combination can get wrong.

A flag stands in the wing that it is about, with its checks. Those of diffusers' scripts keep their name, meaning and default; with
``--use_lora`` the flags and defaults of diffusers' LoRA example hold too.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from immiscible.data.arguments import DataArguments, TextDataArguments
from immiscible.encoding.arguments import CaptionArguments, LatentCacheArguments
from immiscible.errors import UserError
from immiscible.evaluation.arguments import EvaluationArguments
from immiscible.method import MethodArguments
from immiscible.networks.arguments import (
    RANK,
    AdapterArguments,
    ModelArguments,
    OptimizationArguments,
    TextModelArguments,
    TextOptimizationArguments,
)
from immiscible.networks.sd3_arguments import SD3_FOREIGN, settle_scheme
from immiscible.networks.sdxl_flags import XL_FOREIGN
from immiscible.objective_choice import SAMPLED_LEVELS, ObjectiveArguments, settle_objective
from immiscible.training.arguments import RunArguments, RunConfig, TextRunArguments

LEAST_FP32 = 1.2e-38  # numbers below lose their digits in fp32, and then are 0


@dataclass
class UnconditionalConfig(
    RunConfig,
    EvaluationArguments,
    RunArguments,
    OptimizationArguments,
    MethodArguments,
    ObjectiveArguments,
    ModelArguments,
    LatentCacheArguments,
    DataArguments,
):
    """Every flag of ``train_unconditional.py``."""

    names_data = ("dataset_name", "train_data_dir", "bundled_data")

    @staticmethod
    def settle(values: dict[str, Any]) -> None:
        """Defaults that depend on the objective; `label` is where a flag that needs classes looks for them, named or not."""
        settle_objective(values)
        if values["label_column"] == "label":
            values["label_column"] = None

    @property
    def free_on_resume(self) -> frozenset[str]:
        """See `RunConfig.free_on_resume`."""
        return FREE_ON_RESUME

    @property
    def labels_for(self) -> str | None:
        """See `RunConfig.labels_for`."""
        needed = {
            "--class_conditional": self.class_conditional,
            f"--coupling_condition {self.coupling_condition}": self.coupling_condition != "none",
            "--log_class_leak": self.log_class_leak,
        }
        return next((flag for flag, given in needed.items() if given), None)

    def check(self) -> None:
        """What only these flags together can get wrong.

        Raises:
            UserError: they contradict each other.
        """
        _check_together(self)
        _check_epsilon(self, "--class_conditional, as classes that a batch lacks have no gradient" if self.class_conditional else None)
        steps = self.ddpm_num_steps
        if self.coupling_min_timestep >= steps:
            raise UserError(f"--coupling_min_timestep must be below --ddpm_num_steps {steps}, not {self.coupling_min_timestep}")
        self._check_sampling()
        self._check_guidance()
        if self.objective != "denoising":
            self._check_sigmas()
        if self.cache_latents and not self.vae_model_name_or_path:
            raise UserError("--cache_latents needs --vae_model_name_or_path, whose latents they are")
        if self.noise_process == "flow" and self.sampling_scheduler != "ddpm":
            raise UserError(
                f"--sampling_scheduler {self.sampling_scheduler} samples a ddpm process; leave it out with --noise_process flow, which "
                "has a sampler of its own"
            )

    def _check_sampling(self) -> None:
        """More steps than a sampler has levels; EDM's lays out as many as there are steps."""
        steps, levels = self.ddpm_num_steps, f"--ddpm_num_steps {self.ddpm_num_steps}"
        if self.objective == "edm":
            return
        if self.objective == "consistency":
            steps, levels = SAMPLED_LEVELS, f"{SAMPLED_LEVELS}, the levels of a consistency model's sampler"
        if self.learned_sigma and self.sampling_scheduler != "ddpm":
            raise UserError(f"--sampling_scheduler {self.sampling_scheduler} has no variance to learn; leave it out with --learned_sigma")
        if self.learned_sigma and self.timestep_spacing == "trailing":  # which does not end at the first timestep
            raise UserError("--timestep_spacing trailing adds a learned variance to the last step's image; take linspace or leading")
        if self.sampling_steps > steps:
            raise UserError(f"--ddpm_num_inference_steps {self.sampling_steps} exceeds {levels}")
        if self.eval_steps and not all(each <= steps for each in self.eval_inference_steps):
            raise UserError(f"--eval_inference_steps {self.eval_inference_steps}: each must be from 1 to {levels}")

    def _check_sigmas(self) -> None:
        """What has no meaning on an axis of sigma, which has samplers of its own."""
        objective = f"--objective {self.objective}"
        if self.vae_model_name_or_path:
            raise UserError(f"--vae_model_name_or_path with {objective}: it is trained on pixels here; leave one of them out")
        if self.objective == "edm":
            return
        if self.loss_weighting != "none":
            raise UserError(
                f"--loss_weighting {self.loss_weighting} weighs an error of the noise, which {objective} does not have; "
                f"--level_weighting is its own"
            )
        for name in ("noise_offset", "input_perturbation"):
            if getattr(self, name):
                raise UserError(f"--{name} is of --objective denoising and edm, not of consistency: leave it out")

    def _check_guidance(self) -> None:
        """Samples are guided away from those of no class, which only a network that was trained without classes too can give."""
        scales = {"--guidance_scale": [self.guidance_scale], "--eval_guidance_scales": self.eval_guidance_scales}
        guided = {flag: [scale for scale in of_flag if scale != 1] for flag, of_flag in scales.items()}
        asked = [f"{flag} {found[0]:g}" for flag, found in guided.items() if found]
        if asked and not self.class_dropout_prob:
            raise UserError(f"{asked[0]} guides samples by those of no class: train with --class_conditional --class_dropout_prob 0.1, say")
        if self.guidance_interval is not None and not asked:
            raise UserError("--guidance_interval is for guided samples: give --guidance_scale or --eval_guidance_scales other than 1 too")


@dataclass
class TextToImageConfig(
    RunConfig,
    EvaluationArguments,
    TextRunArguments,
    TextOptimizationArguments,
    MethodArguments,
    AdapterArguments,
    TextModelArguments,
    LatentCacheArguments,
    CaptionArguments,
    TextDataArguments,
):
    """Every flag of ``train_text_to_image.py`` and ``finetune_sd.py``."""

    names_data = ("dataset_name", "train_data_dir")
    foreign = {**XL_FOREIGN, **SD3_FOREIGN}

    @staticmethod
    def settle(values: dict[str, Any]) -> None:
        """``--snr_gamma`` alone switches min-SNR weighting on, as in diffusers' scripts; defaults that depend on other flags."""
        if values["snr_gamma"] is not None and values["loss_weighting"] == "none":
            values["loss_weighting"] = "min_snr"
        settle_scheme(values)
        if values["output_dir"] is None:
            values["output_dir"] = "sd-model-finetuned-lora" if values["use_lora"] else "sd-model-finetuned"
        if values["rank"] is None and not values["network_weights"]:
            values["rank"] = RANK
        if values["validation_epochs"] is None:
            values["validation_epochs"] = 1 if values["use_lora"] else 5

    @property
    def free_on_resume(self) -> frozenset[str]:
        """See `RunConfig.free_on_resume`."""
        return TEXT_FREE_ON_RESUME

    @property
    def labels_for(self) -> str | None:
        """See `RunConfig.labels_for`; here the classes are wanted as numbers."""
        if self.log_class_leak:
            return "--log_class_leak"
        within = self.coupling_condition == "within" and not self.by_epoch  # an epoch's plan takes captions for classes, too
        return "--coupling_condition within" if within else None

    def check(self) -> None:
        """What only these flags together can get wrong.

        Raises:
            UserError: they contradict each other.
        """
        _check_together(self)
        if self.use_lora and self.use_ema:
            raise UserError("--use_ema averages the whole U-Net, which --use_lora leaves as it is; choose one")
        _check_epsilon(self, "--use_lora, whose first gradients are 0" if self.use_lora else None)
        if self.save_single_file and (self.use_lora or self.model_preset):
            why = "adapters are one file already" if self.use_lora else f"--model_preset {self.model_preset} has no such layout"
            raise UserError(f"--save_single_file is of a whole Stable Diffusion checkpoint, and {why}: leave it out")
        if self.use_lora and self.dream_training:
            raise UserError("--dream_training is for the whole U-Net; leave out --use_lora")
        self._check_captions()
        self._check_text_encoder()
        unguided = [scale for scale in self.eval_guidance_scales if scale < 1]
        if unguided and not self.model_preset:  # diffusers' pipeline would take it for 1, and ours of a transformer does not
            raise UserError(f"--eval_guidance_scales must be at least 1 for prompts, not {unguided[0]:g}")
        if self.buckets and self.model_preset:
            raise UserError(f"--model_preset {self.model_preset} is a network of squares; leave out it or --buckets")
        if self.buckets and self.coupling_condition == "centered":
            raise UserError("--coupling_condition centered keeps means of images of one size; with --buckets give penalty, within or none")
        if self.buckets:
            from immiscible.data.buckets import bucket_sizes  # it imports torch, which --help does without

            bucket_sizes(self)
        if self.dream_training and self.prediction_type not in (None, "epsilon"):
            raise UserError(f"--dream_training needs epsilon-prediction, not {self.prediction_type}")

    def _check_captions(self) -> None:
        """Text states on disk are of captions as they were when the cache was made."""
        if self.cache_latents and self.shuffle_captions:
            raise UserError(
                "--shuffle_captions tells other captions at each step, and --cache_latents holds text states of one; leave one out"
            )

    def _check_text_encoder(self) -> None:
        """Text states that change while a run trains are taken for nothing else."""
        for name in ("text_encoder_lr", "adam_weight_decay_text_encoder"):
            if (value := getattr(self, name)) is not None and not self.train_text_encoder:
                raise UserError(f"--{name} {value:g} is of --train_text_encoder: give it too, or leave this out")
        if not self.train_text_encoder:
            return
        if self.cache_latents:
            raise UserError(
                "--train_text_encoder changes the text states, and --cache_latents holds those of before; leave one of them out"
            )
        if self.coupling_condition in ("centered", "penalty"):
            raise UserError(
                f"--coupling_condition {self.coupling_condition} takes the text states for labels, which --train_text_encoder changes; "
                f"leave one of them out"
            )


def _check_epsilon(config: RunConfig, zeros: str | None) -> None:
    """AdamW divides by the root of the squared gradient's average plus epsilon; ``zeros`` says why some of that is 0."""
    if zeros and config.adam_epsilon < LEAST_FP32:
        raise UserError(f"--adam_epsilon must be at least {LEAST_FP32:g} with {zeros}: 0 / 0 is NaN; not {config.adam_epsilon}")


def _check_together(config: RunConfig) -> None:
    """What flags of several wings get wrong in all scripts alike."""
    if config.streaming:
        if config.max_train_steps is None:
            raise UserError("--streaming needs --max_train_steps: how many images a stream holds is not known beforehand")
        for name in ("eval_steps", "cache_latents"):
            if getattr(config, name):
                raise UserError(f"--{name} needs images in any order, which --streaming does not give; leave out one of them")
        if config.by_epoch:
            raise UserError(
                "--coupling_window epoch assigns all images of an epoch, which --streaming reads in passing; leave out one of them"
            )
        if config.coupling_caches:
            raise UserError("--coupling_caches needs images that can be told again, which --streaming does not give; leave out one of them")
    if config.eval_raw_weights and not config.use_ema:
        raise UserError("--eval_raw_weights measures them beside their average; without --use_ema they are what is measured: leave it out")
    if config.cache_latents and config.crop != "adm" and not config.center_crop:
        raise UserError("--cache_latents needs --center_crop or --crop adm: a random crop is another one in every epoch")


# What may differ between a checkpoint and the run that resumes it. All else defines the run. Data and
# network are compared by what they are (fingerprint, configuration), not by the flags that name them.
FREE_ON_RESUME = frozenset(
    [
        "max_train_steps",
        "num_epochs",
        "edm_sampler",
        "learning_rate",
        "scale_lr",
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
        "num_classes",
        "class_embed_type",
        "vae_model_name_or_path",
        "latent_cache_dir",
    ]
) | {item.name for group in (RunArguments, EvaluationArguments) for item in fields(group)}
TEXT_FREE_ON_RESUME = (
    FREE_ON_RESUME
    | {"num_train_epochs", "pretrained_model_name_or_path", "pretrained_vae_model_name_or_path", "revision", "variant", "non_ema_revision"}
    | {"single_file_config", "offload_ema", "foreach_ema", "network_weights", "text_encoder_lr"}
    | {item.name for item in fields(TextRunArguments)}
)
