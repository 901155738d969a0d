"""Model cards: how to sample what a run leaves, and how it was trained. And its upload, whose card names the repository."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from immiscible.errors import UserError, first_line
from immiscible.files import PARTIAL, replace
from immiscible.training.arguments import OWN_FILES, FolderArguments
from immiscible.training.markdown import inline, line, table_cell

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

TEMPLATES = Path(__file__).parent
TAG = "immiscible-diffusion"
SHOWN_CLASSES = 1000  # names of classes in a card
HERE = "THIS_FOLDER"  # stands in a card for where the model is; `name_repository` puts its repository there


def unconditional_card(
    *,
    title: str,
    pipeline: str,
    facts: Mapping[str, str],
    network: str = "UNet2DModel",
    own: bool = False,
    num_classes: int | None = None,
    class_names: Sequence[str] = (),
    guidance: tuple[float, Sequence[float] | None] | None = None,
) -> ModelCard:
    """The card of a pipeline without prompts.

    Args:
        title: the heading, the name of the run's folder.
        pipeline: the class of diffusers that samples it.
        facts: how it was trained, by name; ``inference_steps`` among them, which the example takes.
        network: its class in diffusers.
        own: whether our pipeline in the folder samples it, which it does wherever there are classes.
        num_classes: how many classes the network is told; None if it is told none, and then the card lists none.
        class_names: the data's names for them, by number, if it has any.
        guidance: scale and interval, if any, of the run's own samples; None for a network that cannot be guided.
    """
    return _card(
        "unconditional",
        {"pipeline_tag": "unconditional-image-generation", "tags": ["diffusers", "unconditional-image-generation", TAG]},
        title,
        facts,
        pipeline=pipeline,
        network=network,
        own=own,
        inference_steps=facts["inference_steps"],
        num_classes=num_classes,
        class_names=[] if num_classes is None else [line(name) for name in class_names[:SHOWN_CLASSES]],
        more_classes=max(0, len(class_names) - SHOWN_CLASSES),
        guidance="" if guidance is None else _guidance_words(*guidance),
    )


def text_to_image_card(
    *,
    title: str,
    facts: Mapping[str, str],
    base_model: str,
    adapters: bool = False,
    own: bool = False,
    pipeline: str = "StableDiffusionPipeline",
    tag: str = "stable-diffusion",
    absent: Sequence[str] = (),
    told: Mapping[str, Any] = MappingProxyType({}),
    resolution: int | None = None,
    prediction_type: str | None = None,
    grid: PurePath | None = None,
) -> ModelCard:
    """The card of a text-to-image pipeline, of LoRA weights for one, or of a transformer with the rest of one.

    Args:
        title: the heading, the name of the run's folder.
        facts: how it was trained, by name.
        base_model: the checkpoint that training began with; a name on the hub goes into the metadata, a folder here does not.
        adapters: whether these are weights for ``base_model`` and no whole pipeline.
        own: whether our pipeline in the folder samples it, as it does a transformer in a U-Net's place.
        pipeline: the class of diffusers that samples it otherwise.
        tag: of the metadata, which says of which family it is.
        absent: parts that the pipeline must be told are not there.
        told: what it is told beside the prompt.
        resolution: side in pixels of what the adapters were trained on; the base pipeline would sample at its own.
        prediction_type: of the adapters, where ``base_model`` has another.
        grid: samples of the prompts, relative to the card, if there are any.
    """
    return _card(
        "text_to_image",
        {
            "pipeline_tag": "text-to-image",
            "base_model": None if Path(base_model).exists() else base_model,  # the hub refuses a card with a path
            "tags": ["diffusers", *([] if own else [tag]), "text-to-image", *(["lora"] if adapters else []), TAG],
        },
        title,
        facts,
        base_model=_quoted(base_model),
        adapters=adapters,
        own=own,
        pipeline=pipeline,
        absent="".join(f", {part}=None" for part in absent),
        told="".join(f", {name}={value!r}" for name, value in told.items()),
        resolution=resolution,
        prediction_type=prediction_type,
        grid=grid.as_posix() if grid else None,
    )


def _card(template: str, metadata: Mapping[str, Any], title: str, facts: Mapping[str, str], **values: Any) -> ModelCard:
    from huggingface_hub import ModelCard, ModelCardData

    data = ModelCardData(library_name="diffusers", **metadata)
    rows = [f"| {table_cell(name.replace('_', ' '))} | {table_cell(value)} |" for name, value in facts.items()]
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATES / f"{template}_card.md.j2"),
        title=inline(title),
        model=_quoted(HERE),
        facts="\n".join(["| | |", "|---|---|", *rows]),
        **values,
    )


def _guidance_words(scale: float, interval: Sequence[float] | None) -> str:
    """The arguments of a call as Python source."""
    return f"guidance_scale={scale:g}, " + (f"guidance_interval=({interval[0]:g}, {interval[1]:g}), " if interval else "")


def _quoted(text: str) -> str:
    """A name as Python source on one line."""
    return json.dumps(text, ensure_ascii=False)


def check_hub(config: FolderArguments) -> None:
    """Creates the repository before the training, so that a missing token or network costs seconds and not the run.

    Raises:
        UserError: (exit code 1) it cannot be created.
    """
    try:
        _repository(config)
    except Exception as error:  # whatever the network, the hub or its client can do wrong; without a network it is no OSError
        raise UserError(
            f"--push_to_hub: the repository cannot be created ({first_line(error)}); check --hub_token, --hub_model_id and the network, or "
            f"leave the flag out and upload {config.folder} later by `hf upload`",
            exit_code=1,
        ) from None


def push_pipeline(config: FolderArguments, step: int) -> None:
    """Uploads the pipeline, samples, config and metrics, no checkpoints. The card then loads the model from its repository."""
    from huggingface_hub import upload_folder

    folder = config.folder
    try:
        repository = _repository(config)
        name_repository(folder / "README.md", repository)
        upload_folder(
            repo_id=repository,
            folder_path=folder,
            token=config.hub_token,
            commit_message=f"step {step}",
            allow_patterns=[f"{item}/**" if (folder / item).is_dir() else item for item in OWN_FILES if (folder / item).exists()],
        )
    except Exception as error:  # as in `check_hub`
        raise UserError(f"--push_to_hub failed ({first_line(error)}); the run is complete in {folder}", exit_code=1) from None


def _repository(config: FolderArguments) -> str:
    """The repository's full name; it is created if it is not there."""
    from huggingface_hub import create_repo

    name = config.hub_model_id or config.folder.resolve().name
    return str(create_repo(name, private=config.hub_private_repo or None, exist_ok=True, token=config.hub_token).repo_id)


def name_repository(card: Path, repo_id: str) -> None:
    """Lets a card's example load the model from the hub instead of from its folder."""
    partial = card.with_name(f"{PARTIAL}{card.name}")
    partial.write_text(card.read_text(encoding="utf-8").replace(_quoted(HERE), _quoted(repo_id)), encoding="utf-8")
    replace(partial, card)
