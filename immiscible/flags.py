"""Flags: flat dataclasses whose field names are the flag names, ``--config`` files on top, one resolved file per run.

Flags that the diffusers example scripts have keep their name, meaning and default. A ``--config a.yaml b.yaml`` puts ``--key value``
for each key before the command line, so that files apply from left to right and the command line wins. Each file is checked alone
first: a misspelt key, a wrong choice or a wrong type is an error that names the file.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path, PurePath
from typing import Any, NoReturn, TypeVar

import yaml
from transformers.hf_argparser import HfArgumentParser

from immiscible.assignment.conditions import CONDITIONS
from immiscible.assignment.ranks import SCOPES
from immiscible.assignment.solve import COST_DTYPES, METRICS, SOLVERS
from immiscible.coupling import COUPLINGS, SCORES
from immiscible.data.sources import BUNDLED
from immiscible.errors import UserError
from immiscible.evaluation.metrics import FEATURES
from immiscible.networks.unet import PRESETS
from immiscible.process import BETA_SCHEDULES
from immiscible.timesteps import TIMESTEP_SAMPLINGS
from immiscible.weighting import LOSS_WEIGHTINGS

LR_SCHEDULERS = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")
CROPS = ("diffusers", "adm")
SPACINGS = ("leading", "trailing", "linspace")


# Everything a run writes into its folder, beside checkpoints, logs and its marker. Nothing else there is ever touched.
OWN_FILES = (
    "config.yaml",
    "metrics.jsonl",
    "evaluation.jsonl",
    "summary.json",
    "samples",
    "model_index.json",
    "unet",
    "unet_non_ema",
    "scheduler",
    "vae",
    "vqvae",
    "text_encoder",
    "tokenizer",
    "pytorch_lora_weights.safetensors",
    "README.md",
)


def flag(default: Any, text: str, **options: Any) -> Any:
    """A field whose name is the flag's."""
    return field(default=default, metadata={"help": text.replace("%", "%%"), **options})


@dataclass
class DataArguments:
    """Which images, and how they are cropped."""

    _argument_group_name = "data"

    dataset_name: str | None = flag(None, "a data set on the hub (its `train` split), or a local folder that `datasets` can load")
    dataset_config_name: str | None = flag(None, "the configuration of --dataset_name")
    train_data_dir: str | None = flag(None, "a folder of images (subfolders allowed), of parquet files or of WebDataset shards (.tar)")
    bundled_data: str | None = flag(
        None, "real images that install with the packages: 1,797 digits of 8x8, or random crops of photographs", choices=BUNDLED
    )
    image_column: str = flag("image", "the column of the data set that holds the images")
    label_column: str | None = flag(
        None, "the column of the data set that holds the classes (ClassLabel), where a flag needs them; by default `label`"
    )
    cache_dir: str | None = flag(None, "where downloaded data sets are kept")
    resolution: int = flag(64, "images are resized and cropped to this many pixels a side")
    center_crop: bool = flag(False, "crop the center instead of a random place")
    random_flip: bool = flag(False, "flip half of the images left to right")
    crop: str = flag(
        "diffusers",
        "diffusers: resize the short side, then cut; adm: halve by box filters, then bicubic, and cut the center, as ImageNet papers do",
        choices=CROPS,
    )
    preserve_input_precision: bool = flag(False, "keep 16 and 32-bit images at their precision instead of converting to 8-bit")
    max_train_samples: int | None = flag(None, "train on at most this many images, a fixed random subset")
    train_subset_fraction: float | None = flag(
        None, "train on this share of the images, a fixed random subset that does not depend on --seed: 0.1 is the paper's 10 % of ImageNet"
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
class LatentCacheArguments:
    """Whether latents come from disk."""

    _argument_group_name = "latent cache"

    cache_latents: bool = flag(
        False,
        "take latents, and of captions the text states, from --latent_cache_dir, which scripts/precompute_latents.py fills: training then "
        "calls neither the VAE's encoder nor a text encoder",
    )
    latent_cache_dir: str | None = flag(None, "the folder of the cache")


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
class MethodArguments:
    """How noise and time are drawn, and what an error costs: the axes this suite adds to the diffusers scripts."""

    _argument_group_name = "method"

    noise_coupling: str = flag(
        "independent",
        "which noise belongs to which image: assignment is Immiscible Diffusion, nearest takes the best of k "
        "(biases the noise), reservoir keeps noises between steps (for batches of 1 to 8), flipped_assignment is the rebuttal's control",
        choices=COUPLINGS,
    )
    coupling_metric: str = flag("l2", "the distance that the assignment minimizes", choices=METRICS)
    coupling_dtype: str = flag(
        "auto",
        "precision of the operands of the assignment's cost; the paper quantizes to float16; auto is bfloat16 where the hardware has it",
        choices=COST_DTYPES,
    )
    coupling_solver: str = flag(
        "auto",
        "exact, or an auction that keeps more than 99.9 % of the reduction in a fraction of the time; auto is exact below 128 images",
        choices=SOLVERS,
    )
    coupling_scope: str = flag(
        "process",
        "global assigns over the batches of all processes at once (one gather of the cost's rows in 16 bits), process over each one's own",
        choices=SCOPES,
    )
    coupling_window: int = flag(
        1, "assign over this many micro-batches at once, accumulated or of successive steps: the remedy for small batches"
    )
    coupling_condition: str = flag(
        "none",
        "so that the noise does not tell the class: assign within each class; centered, after taking each class's mean so far from its "
        "images (experimental; of use with few images of a class in a batch); or with a penalty for exchanges between classes (C2OT)",
        choices=CONDITIONS,
    )
    coupling_condition_ratio: float = flag(
        0.01, "r of --coupling_condition penalty: the share of all pairs of a batch that may still be better than an image's own noise"
    )
    coupling_reservoir: int = flag(256, "noises that the reservoir coupling keeps")
    coupling_candidates: int = flag(8, "k of the nearest coupling")
    coupling_score: str = flag("l2", "nearest by l2, or by dot (keeps the length of the noise)", choices=SCORES)
    coupling_min_timestep: int = flag(0, "pair only images at or above this timestep; the others keep their own noise")
    coupling_start_step: int = flag(
        0, "train with independent noise until this optimizer step; a window is paired if it begins at or after it"
    )
    timestep_sampling: str = flag(
        "uniform",
        "how often each noise level is trained: asymmetric is SpeeD's eq. 3, asymmetric_released what its code does",
        choices=TIMESTEP_SAMPLINGS,
    )
    asymmetric_k: float = flag(5.0, "k of SpeeD: steps before the threshold are drawn k times as often as those after")
    asymmetric_r: float | None = flag(
        None,
        "r of SpeeD: the threshold tau is the first step with alpha_bar <= 1/r; 143.55 (tau = 700 on the linear schedule) if "
        "neither this nor --asymmetric_tau is given",
    )
    asymmetric_tau: int | None = flag(None, "tau of SpeeD, directly: steps 0..tau-1 are boosted; not together with --asymmetric_r")
    logit_mean: float = flag(0.0, "m of logit_normal; positive means noisier")
    logit_std: float = flag(1.0, "s of logit_normal")
    loss_weighting: str = flag(
        "none",
        "what an error at each level costs: none is the plain MSE, change_aware SpeeD's, snr the diffusers script's for "
        "--prediction_type sample",
        choices=LOSS_WEIGHTINGS,
    )
    change_aware_lambda: float = flag(0.6, "lambda of SpeeD's weighting, 0.5 (flat) to 1")
    snr_gamma: float | None = flag(None, "gamma of min_snr; 5 if not given")
    p2_k: float = flag(1.0, "k of p2")
    p2_gamma: float = flag(1.0, "gamma of p2")
    noise_offset: float = flag(0.0, "add this times a normal number per image and channel to the noise, after the coupling")
    log_class_leak: bool = flag(
        False, "log how well a linear probe reads the class from the paired noise (of the last 4,096 images), beside chance"
    )
    input_perturbation: float = flag(0.0, "perturb the noise by this in x_t but not in the target, after coupling and offset")


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
class RunArguments:
    """Where the run goes, what it leaves, and how it continues."""

    _argument_group_name = "run"

    output_dir: str = flag("ddpm-model-64", "the run's folder")
    overwrite_output_dir: bool = flag(False, "delete the run that --output_dir holds (its own files only) and start anew")
    resume_from_checkpoint: str | None = flag(None, "`latest`, or a checkpoint's path; continues bit-exactly")
    checkpointing_steps: int = flag(500, "optimizer steps between checkpoints; one is always left at the end")
    checkpoints_total_limit: int | None = flag(None, "keep this many checkpoints, the newest")
    save_images_epochs: int = flag(10, "epochs between sample grids; 0 samples at the end only")
    save_model_epochs: int = flag(10, "epochs between saves of the pipeline; 0 saves at the end only")
    eval_batch_size: int = flag(16, "images in a sample grid")
    ddpm_num_inference_steps: int = flag(1000, "steps with which samples are drawn")
    sampling_scheduler: str = flag(
        "ddpm", "sampler of a ddpm process, in the run and in the saved pipeline (ddim has eta 0)", choices=("ddpm", "ddim")
    )
    timestep_spacing: str = flag("leading", "which of the T steps the sampler visits", choices=SPACINGS)
    logger: str = flag("tensorboard", "experiment tracker; metrics.jsonl is written with each", choices=("tensorboard", "wandb", "none"))
    logging_dir: str = flag("logs", "the tracker's folder, inside --output_dir")
    logging_steps: int = flag(10, "optimizer steps between lines of metrics.jsonl")
    push_to_hub: bool = flag(False, "upload the pipeline to the hub")
    hub_token: str | None = flag(None, "the token for --push_to_hub")
    hub_model_id: str | None = flag(None, "the repository for --push_to_hub; by default the name of --output_dir")
    hub_private_repo: bool = flag(False, "create the repository private")
    plan: bool = flag(False, "print what would run, with sizes and an estimate after a few timed steps, and exit")


@dataclass
class EvaluationArguments:
    """What is measured while training. Evaluation draws nothing from training's randomness: weights come out bit-equal without it."""

    _argument_group_name = "evaluation"

    eval_steps: int | None = flag(None, "optimizer steps between evaluations, into evaluation.jsonl; not given, nothing is evaluated")
    eval_inference_steps: list[int] = field(
        default_factory=lambda: [5, 20], metadata={"help": "numbers of inference steps at which samples are compared with the data"}
    )
    eval_samples: int = flag(1500, "samples per number of inference steps, from the same noises in every run")
    eval_features: str | None = flag(
        None,
        "what the Frechet distance compares: digits (a classifier of the bundled digits; FD-digits) or pixels (8x8 pooled; "
        "FD-pixels-8x8); by default digits for the bundled digits and pixels for other data. Neither is FID",
        choices=FEATURES,
    )
    validation_split: float | None = flag(None, "share of the images to hold out for a loss per noise level, at --eval_steps")


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

Config = TypeVar("Config", bound=UnconditionalConfig)


class _TextLoader(yaml.BaseLoader):
    """Keeps `no` and `1e-4` as they are written; an unquoted null is an empty value, which means not given."""


_TextLoader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"(?:~|null|Null|NULL)$"), list("~nN"))
_TextLoader.add_constructor("tag:yaml.org,2002:null", lambda loader, node: "")


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults beside the flags, and the script's own lines as they are."""


class _Parser(HfArgumentParser):
    """argparse that raises, so that the caller can say which file an error is in."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def parse_config(
    config_class: type[Config], argv: Sequence[str], *, program: str, description: str, no_data_config: Path | None = None
) -> Config:
    """Reads ``argv`` and the ``--config`` files it names into a ``config_class``.

    Args:
        config_class: a dataclass made of argument groups (its dataclass bases).
        argv: the command line without the program.
        program: the script's name, for ``--help``.
        description: what the script does, for ``--help``.
        no_data_config: a config file that stands first when neither files nor command line name any data.

    Raises:
        UserError: anything wrong with a flag or a file.
    """
    groups = [base for base in reversed(config_class.__mro__) if base.__name__.endswith("Arguments")]
    usage = f"{program} [--config FILE ...] [--flag value ...]"
    parser = _Parser(groups, prog=program, usage=usage, description=description, allow_abbrev=False, formatter_class=_Help)
    for action in parser._actions:
        if action.option_strings and action.option_strings[0].startswith("--no_"):
            action.help = f"switches --{action.dest} off"
    parser.add_argument(
        "--config", nargs="+", default=[], metavar="FILE", help="YAML files of flags, applied left to right before the command line"
    )
    paths = [Path(path) for path in parser.parse_args(argv).config]
    arguments = [word for path in paths for word in _file_arguments(path, parser)]
    namespace = vars(parser.parse_args([*arguments, *argv]))
    if no_data_config and not any(namespace[name] for name in ("dataset_name", "train_data_dir", "bundled_data")):
        namespace = vars(parser.parse_args([*_file_arguments(no_data_config, parser), *arguments, *argv]))
    namespace.pop("config")
    config_class.settle(namespace)
    config = config_class(**namespace)
    _validate(config)
    return config


def flag_value(argv: Sequence[str], name: str) -> str | None:
    """One flag's value on a command line, or in the ``--config`` files it names, whose other flags are not looked at."""
    parser = _Parser([], add_help=False, allow_abbrev=False)
    parser.add_argument("--config", nargs="+", default=[])
    parser.add_argument(f"--{name}")
    paths = parser.parse_known_args(argv)[0].config
    words = [word for path in paths for word in _file_words(Path(path))]
    value: str | None = getattr(parser.parse_known_args([*words, *argv])[0], name)
    return value


def given(config: Any, group: type) -> dict[str, Any]:
    """The values of one argument group, without those that are not given, for functions that have a default of their own."""
    values = {item.name: getattr(config, item.name) for item in fields(group)}
    return {name: value for name, value in values.items() if value is not None}


def save_config(config: Any, path: Path) -> None:
    """Writes every flag's value; a run restarts from the file by ``--config``. A flag that is not given has an empty value."""
    values = {item.name: getattr(config, item.name) for item in fields(config)}
    values["hub_token"] = None  # a secret stays out of files
    values |= {"overwrite_output_dir": False, "resume_from_checkpoint": None}  # a restart deletes nothing and continues nothing
    lines = yaml.safe_dump(values, sort_keys=False).replace(": null\n", ":\n")
    path.write_text(f"# Every flag of this run; restart it with --config {path.name} --output_dir ANOTHER_FOLDER\n{lines}")


def _file_arguments(path: Path, parser: _Parser) -> list[str]:
    """The file's keys as ``--key value`` words, checked by parsing them alone."""
    words = _file_words(path)
    try:
        parser.parse_args(words)
    except UserError as error:
        raise UserError(f"--config {path}: {error}") from None
    return words


def _file_words(path: Path) -> list[str]:
    """The file's keys as ``--key value`` words."""
    try:
        content = yaml.load(path.read_text(), Loader=_TextLoader)
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise UserError(f"--config {path}: not a text file") from None
    except yaml.YAMLError as error:
        raise UserError(f"--config {path}: not valid YAML: {error}") from None
    if content is None or content == "":
        return []
    if not isinstance(content, dict):
        raise UserError(f"--config {path}: expected lines of `flag: value`")
    words: list[str] = []
    for key, value in content.items():
        if isinstance(value, dict):
            raise UserError(f"--config {path}: {key} holds a mapping; flags are flat, one `flag: value` a line")
        if value != "":
            words += [f"--{key}", *value] if isinstance(value, list) else [f"--{key}={value}"]  # "=": values like -1e-3 are no flags
    if "config" in content:
        raise UserError(f"--config {path}: a config file cannot name further config files; give them all on the command line")
    if {"help", "h"} & content.keys():
        raise UserError(f"--config {path}: help belongs on the command line")
    return words


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
