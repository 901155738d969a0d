"""The flags of a run, and all flags that the life of a run reads."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePath

from immiscible.data.arguments import ImageArguments
from immiscible.encoding.arguments import LatentCacheArguments
from immiscible.errors import UserError
from immiscible.evaluation.arguments import EvaluationArguments
from immiscible.flags import flag
from immiscible.method import MethodArguments
from immiscible.networks.arguments import TrainingArguments
from immiscible.objective_choice import SAMPLING_STEPS

SPACINGS = ("leading", "trailing", "linspace")

# Everything a run writes into its folder, beside checkpoints, logs and its marker. Nothing else there is ever touched.
OWN_FILES = (
    "config.yaml",
    "metrics.jsonl",
    "evaluation.jsonl",
    "summary.json",
    "coupling_plan.safetensors",
    "samples",
    "model_index.json",
    "unet",
    "unet_non_ema",
    "transformer",
    "transformer_non_ema",
    "scheduler",
    "vae",
    "vqvae",
    "pipeline.py",
    *(f"{part}{after}" for part in ("text_encoder", "tokenizer") for after in ("", "_2", "_3")),
    "pytorch_lora_weights.safetensors",
    "model.safetensors",
    "README.md",
)


def calls_in_a_step(guidance_scale: float, interval: tuple[float, float] = (0.0, 1.0)) -> float:
    """Calls of the network that a step of the sampler takes: guidance takes two inside its interval, of which 0 and 1 need one alone."""
    return 1.0 if guidance_scale in (0, 1) else 1.0 + interval[1] - interval[0]


@dataclass
class FolderArguments:
    """Where a run goes, what it leaves, and how it continues: what all scripts share."""

    output_dir: str | None = flag(None, "the run's folder")
    overwrite_output_dir: bool = flag(False, "delete the run that --output_dir holds (its own files only) and start anew", saved=False)
    resume_from_checkpoint: str | None = flag(None, "`latest`, or a checkpoint's path; continues bit-exactly", saved=False)
    checkpointing_steps: int = flag(500, "optimizer steps between checkpoints; one is always left at the end", least=1)
    checkpoints_total_limit: int | None = flag(None, "keep this many checkpoints, the newest", least=1)
    eval_batch_size: int = flag(16, "samples drawn together", least=1, most=2**14)
    logging_dir: str = flag("logs", "the tracker's folder, inside --output_dir")
    tracker_project_name: str = flag("immiscible", "the project in the tracker")
    logging_steps: int = flag(10, "optimizer steps between lines of metrics.jsonl", least=1)
    push_to_hub: bool = flag(False, "upload the pipeline, or the adapters, to the hub")
    hub_token: str | None = flag(None, "the token for --push_to_hub", saved=False)
    hub_model_id: str | None = flag(None, "the repository for --push_to_hub; by default the name of --output_dir")
    hub_private_repo: bool = flag(False, "create the repository private; one that exists stays as it is")
    plan: bool = flag(False, "print what would run, with sizes and an estimate after a few timed steps, and exit")

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.output_dir or "")

    @property
    @abstractmethod
    def tracker(self) -> str:
        """The experiment tracker's name, of accelerate's, or none."""

    @property
    @abstractmethod
    def tracker_flag(self) -> str:
        """The flag that names it."""

    @abstractmethod
    def grid_is_due(self, step: int, passed: Callable[[int], bool]) -> bool:
        """Whether samples are drawn after ``step``, not the last one; ``passed(epochs)``: whether a multiple of that ended in it."""

    @abstractmethod
    def grids(self, max_steps: int, epochs: float) -> int:
        """How many grids a run of so many steps and epochs draws, the last one included."""

    @property
    @abstractmethod
    def grid_calls(self) -> int:
        """Calls of the network, counted for one image, that a grid takes."""

    @property
    def interval(self) -> tuple[float, float]:
        """The noise levels at which samples are guided: all, where no flag says otherwise."""
        return 0.0, 1.0

    @abstractmethod
    def pipeline_is_due(self, passed: Callable[[int], bool]) -> bool:
        """Whether the pipeline is saved, likewise."""

    def check(self) -> None:
        """What these flags can get wrong.

        Raises:
            UserError: they contradict each other.
        """
        logs = PurePath(self.logging_dir)
        taken = logs.parts[:1] and (logs.parts[0] in OWN_FILES or logs.parts[0].startswith(("checkpoint-", ".")))
        if logs.is_absolute() or not logs.parts or ".." in logs.parts or taken:
            raise UserError(f"--logging_dir {self.logging_dir} must be a folder of its own inside --output_dir, such as logs")
        project = PurePath(self.tracker_project_name)
        if project.is_absolute() or ".." in project.parts:  # tensorboard makes a folder of it inside --logging_dir
            raise UserError(f"--tracker_project_name {self.tracker_project_name} must be a name, without a way out of --logging_dir")
        if self.resume_from_checkpoint and self.overwrite_output_dir:
            raise UserError("--resume_from_checkpoint continues a run and --overwrite_output_dir deletes it; choose one")


@dataclass
class RunArguments(FolderArguments):
    """Where the run goes, what it leaves, and how it continues, for ``train_unconditional.py``."""

    _argument_group_name = "run"
    tracker_flag = "--logger"

    output_dir: str = flag("ddpm-model-64", "the run's folder")
    save_images_epochs: int = flag(10, "epochs between sample grids; 0 samples at the end only", least=0)
    validation_steps: int | None = flag(
        None, "optimizer steps between sample grids, instead of --save_images_epochs, as --streaming counts no epochs", least=1
    )
    save_model_epochs: int = flag(10, "epochs between saves of the pipeline; 0 saves at the end only", least=0)
    eval_batch_size: int = flag(16, "images in a sample grid", least=1, most=2**14)
    ddpm_num_inference_steps: int | None = flag(
        None, "steps with which samples are drawn; 1000 by default, 18 for edm, 1 for consistency", least=1, most=10**5
    )
    sampling_scheduler: str = flag(
        "ddpm", "sampler of a ddpm process, in the run and in the saved pipeline (ddim has eta 0)", choices=("ddpm", "ddim")
    )
    timestep_spacing: str = flag("leading", "which of the T steps the sampler visits", choices=SPACINGS)
    guidance_scale: float = flag(
        1.0, "guidance of the sample grids, with --class_dropout_prob: 1 is none, 0 samples no class", least=0, most=100
    )
    guidance_interval: list[float] | None = flag(  # noqa: RUF009 (a field)
        None,
        "LOW and HIGH: only steps at a noise level between them are guided, here and in evaluations; the level is the timestep's share of "
        "all, near 0 for an image and near 1 for noise; by default all",
        least=0,
        most=1,
    )
    logger: str = flag(
        "tensorboard",
        "experiment tracker; metrics.jsonl is written with each",
        choices=("tensorboard", "wandb", "none"),
        alias="report_to",
    )

    @property
    def tracker(self) -> str:
        """See `FolderArguments.tracker`."""
        return self.logger

    def grid_is_due(self, step: int, passed: Callable[[int], bool]) -> bool:
        """See `FolderArguments.grid_is_due`."""
        return step % self.validation_steps == 0 if self.validation_steps else passed(self.save_images_epochs)

    @property
    def interval(self) -> tuple[float, float]:
        """See `FolderArguments.interval`."""
        low, high = self.guidance_interval or super().interval
        return low, high

    def grids(self, max_steps: int, epochs: float) -> int:
        """See `FolderArguments.grids`."""
        if self.validation_steps:
            return 1 + max_steps // self.validation_steps
        return 1 + (int(epochs) // self.save_images_epochs if self.save_images_epochs else 0)

    @property
    def sampling_steps(self) -> int:
        """Steps with which samples are drawn."""
        return self.ddpm_num_inference_steps or SAMPLING_STEPS["denoising"]

    @property
    def grid_calls(self) -> int:
        """See `FolderArguments.grid_calls`."""
        return round(self.eval_batch_size * self.sampling_steps * calls_in_a_step(self.guidance_scale, self.interval))

    def pipeline_is_due(self, passed: Callable[[int], bool]) -> bool:
        """See `FolderArguments.pipeline_is_due`."""
        return passed(self.save_model_epochs)

    def check(self) -> None:
        """See `FolderArguments.check`."""
        super().check()
        interval = self.guidance_interval
        if interval is not None and (len(interval) != 2 or interval[0] > interval[1]):
            given = " ".join(f"{end:g}" for end in interval)
            raise UserError(f"--guidance_interval must be two numbers, the lower one first, such as 0.2 0.8, not {given}")


@dataclass
class TextRunArguments(FolderArguments):
    """Where the run goes, what it leaves, and how it continues, for the Stable Diffusion scripts."""

    _argument_group_name = "run"
    tracker_flag = "--report_to"

    output_dir: str | None = flag(None, "the run's folder; by default sd-model-finetuned, with --use_lora sd-model-finetuned-lora")
    validation_prompts: list[str] | None = flag(None, "prompts of the sample grids", prose=True)  # noqa: RUF009 (a field)
    validation_prompt: str | None = flag(None, "one prompt, of which --num_validation_images samples are drawn", prose=True)
    num_validation_images: int = flag(4, "samples of --validation_prompt; 0 draws none", least=0, most=2**12)
    validation_epochs: int | None = flag(None, "epochs between sample grids; by default 5, with --use_lora 1", least=1)
    validation_steps: int | None = flag(
        None, "optimizer steps between sample grids, instead of --validation_epochs, which --streaming does not count", least=1
    )
    validation_inference_steps: int = flag(20, "steps with which samples are drawn", least=1, most=10**5)
    guidance_scale: float = flag(7.5, "guidance of the samples; 1 samples without", least=0, most=100)
    report_to: str = flag(
        "tensorboard",
        "experiment tracker, of accelerate's, or none; metrics.jsonl is written with each; tensorboard and wandb show the samples",
    )
    tracker_project_name: str = flag("text2image-fine-tune", "the project in the tracker")
    save_single_file: bool = flag(
        False, "write model.safetensors beside the pipeline too: the whole checkpoint in one file, as ComfyUI and A1111 read it"
    )

    @property
    def tracker(self) -> str:
        """See `FolderArguments.tracker`."""
        return self.report_to

    @property
    def prompts(self) -> list[str]:
        """Whose samples the grids hold."""
        if self.validation_prompt is not None:
            return [self.validation_prompt] * self.num_validation_images
        return self.validation_prompts or []

    def grid_is_due(self, step: int, passed: Callable[[int], bool]) -> bool:
        """See `FolderArguments.grid_is_due`."""
        return step % self.validation_steps == 0 if self.validation_steps else passed(self.validation_epochs or 1)

    def grids(self, max_steps: int, epochs: float) -> int:
        """See `FolderArguments.grids`."""
        return 1 + (max_steps // self.validation_steps if self.validation_steps else int(epochs) // (self.validation_epochs or 1))

    @property
    def grid_calls(self) -> int:
        """See `FolderArguments.grid_calls`; guidance takes two calls."""
        return len(self.prompts) * self.validation_inference_steps * (2 if self.guidance_scale > 1 else 1)

    def pipeline_is_due(self, passed: Callable[[int], bool]) -> bool:
        """Only at the end."""
        return False

    def check(self) -> None:
        """See `FolderArguments.check`."""
        super().check()
        if self.validation_prompt is not None and self.validation_prompts is not None:
            raise UserError("--validation_prompt and --validation_prompts are given together; choose one")


class RunConfig(EvaluationArguments, FolderArguments, TrainingArguments, MethodArguments, LatentCacheArguments, ImageArguments):
    """The flags that the life of a run reads, whatever is trained; `immiscible.configs` adds those of networks and samples."""

    @property
    @abstractmethod
    def free_on_resume(self) -> frozenset[str]:
        """The flags that may differ between a checkpoint and the run that resumes it."""

    @property
    @abstractmethod
    def labels_for(self) -> str | None:
        """The flag that needs the images' classes, if any does."""
