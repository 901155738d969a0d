"""What a run uploads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from immiscible.errors import UserError
from immiscible.training.folder import OWN_FILES

if TYPE_CHECKING:
    from immiscible.configs import AnyConfig


def push_pipeline(config: AnyConfig, step: int) -> None:
    """Uploads the pipeline, samples, config and metrics, no checkpoints."""
    from huggingface_hub import create_repo, upload_folder

    folder = Path(config.output_dir or "")
    try:
        name = config.hub_model_id or folder.resolve().name
        repository = create_repo(name, private=config.hub_private_repo or None, exist_ok=True, token=config.hub_token).repo_id
        upload_folder(
            repo_id=repository,
            folder_path=folder,
            token=config.hub_token,
            commit_message=f"step {step}",
            allow_patterns=[f"{item}/**" if (folder / item).is_dir() else item for item in OWN_FILES if (folder / item).exists()],
        )
    except Exception as error:  # whatever the network, the hub or its client can do wrong; without a network it is no OSError
        first_line = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"--push_to_hub failed ({first_line}); the run is complete in {folder}", exit_code=1) from None
