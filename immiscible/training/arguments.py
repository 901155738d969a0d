"""The flags of a run."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from immiscible.flags import flag

logger = logging.getLogger(__name__)


SPACINGS = ("leading", "trailing", "linspace")


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
