"""The run's folder: whose it is, whether it may be written, and what must be equal for a run in it to go on."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from immiscible.errors import UserError
from immiscible.files import clean_up, discard, lock
from immiscible.processes import on_main_process
from immiscible.training.arguments import OWN_FILES
from immiscible.training.checkpoints import NAME, checkpoints, is_complete, is_ours, resolve_checkpoint, step_of

if TYPE_CHECKING:
    from accelerate import Accelerator

    from immiscible.training.arguments import RunConfig

logger = logging.getLogger(__name__)

MARKER = ".immiscible-run"  # a folder without it is nobody's run, whatever names it holds
FINISHED = "a finished run"


def check_folder(config: RunConfig) -> Path | None:
    """The checkpoint to resume, or None for a fresh start; touches nothing.

    Raises:
        UserError: the output folder holds a run and neither resuming nor overwriting is asked for, or the checkpoint is missing or
            incomplete.
    """
    folder = config.folder
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output_dir {folder} is a file; give a folder")
    if folder.is_symlink() and not folder.exists():
        raise UserError(f"--output_dir {folder} is a link to {os.readlink(folder)}, which is not there; give a folder")
    if not config.plan:
        _check_apart(config)
    held = _run_in(folder)
    foreign = [path for path in checkpoints(folder) if not is_ours(path)]  # another trainer's, or the user's own
    strange = [name for name in (*OWN_FILES, config.logging_dir) if os.path.lexists(folder / name)] + [path.name for path in foreign]
    if not held and strange and not config.plan:
        raise UserError(
            f"--output_dir {folder} holds {', '.join(strange)} of something else, which a run would overwrite; give another folder"
        )
    resumed = resolve_checkpoint(folder, config.resume_from_checkpoint)
    # Of this run, also where it is a link to where there is more room.
    own = resumed is not None and folder.resolve() in (resumed.resolve().parent, resumed.parent.resolve())
    begun = step_of(resumed) if resumed and own else 0
    in_the_way = [path.name for path in foreign if step_of(path) > begun]
    if in_the_way and not config.plan:
        raise UserError(
            f"--output_dir {folder} holds {', '.join(in_the_way)}, no checkpoints of this suite, where its own would be; move them"
        )
    asked = config.overwrite_output_dir or config.plan or config.resume_from_checkpoint is not None
    if held and not asked and not _is_barren(folder):
        raise UserError(
            f"--output_dir {folder} holds {held}: continue it with --resume_from_checkpoint latest, delete it with "
            f"--overwrite_output_dir, or choose another folder"
        )
    if config.resume_from_checkpoint == "latest" and resumed is None:
        if held == FINISHED:
            raise UserError(
                f"--resume_from_checkpoint latest: the finished run in {folder} has no complete checkpoint left; "
                f"delete it with --overwrite_output_dir or choose another --output_dir"
            )
        logger.warning("--resume_from_checkpoint latest: %s holds no checkpoint; starting anew", folder)
    if resumed and own:
        later = [path.name for path in checkpoints(folder) if step_of(path) > step_of(resumed) and is_complete(path)]
        if later and config.resume_from_checkpoint != "latest":  # which has found them damaged
            raise UserError(
                f"--resume_from_checkpoint {config.resume_from_checkpoint}: {folder} holds later checkpoints ({', '.join(later)}), "
                f"which the resumed run would mix with its own; give another --output_dir to branch off, or `latest`"
            )
    elif resumed and held and not config.plan:
        raise UserError(f"--output_dir {folder} holds {held} of its own; resume {resumed} into its own folder or into a new one")
    return resumed


def _check_apart(config: RunConfig) -> None:
    """Whether the run's folder is neither inside of its data nor, to be overwritten, around them in what is deleted then."""
    place = config.folder.resolve()
    for flag in ("train_data_dir", "eval_data_dir"):
        name = getattr(config, flag)
        data = Path(name).expanduser().resolve() if name else None
        if data in (place, *place.parents):
            raise UserError(f"--output_dir {config.folder} lies inside --{flag} {name}, whose images it would join; give another")
        inside = data.relative_to(place).parts[0] if data and place in data.parents else ""
        if config.overwrite_output_dir and (inside in (*OWN_FILES, config.logging_dir) or NAME.fullmatch(inside)):
            raise UserError(f"--overwrite_output_dir deletes {config.folder / inside}, where --{flag} {name} lies; move the images")


def run_identity(config: RunConfig, *, data: str, network: dict[str, Any], processes: int) -> dict[str, Any]:
    """What must be equal for a checkpoint to be continued: every flag not in ``free_on_resume``, the data, the network, the ranks."""
    flags = {f"--{name}": value for name, value in asdict(config).items() if name not in config.free_on_resume}
    return json.loads(json.dumps({**flags, "data": data, "network": network, "processes": processes}))


def folder_state(folder: Path) -> tuple[str, list[str]]:
    """What of runs a folder holds, to notice one that came between `check_folder` and the lock."""
    return _run_in(folder), [path.name for path in checkpoints(folder)]


def prepare_folder(config: RunConfig, accelerator: Accelerator, seen: tuple[str, list[str]]) -> Any:
    """Creates the output folder and locks it; removes what a killed run left half written and, to overwrite, the old run.

    Returns:
        the lock, on rank 0, to be held as long as the run writes.

    Raises:
        UserError: another run holds the lock, or has been there since the folder was ``seen`` by `check_folder`.
    """
    folder, locks = config.folder, []

    def prepare() -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--output_dir {folder} cannot be written: {error.strerror}", exit_code=1) from None
        locks.append(lock(folder, "--output_dir"))
        if folder_state(folder) != seen:
            raise UserError(f"--output_dir {folder} has been written by another run meanwhile; start again", exit_code=1)
        clean_up(folder)
        if config.overwrite_output_dir and _run_in(folder):
            own = (folder / name for name in (*OWN_FILES, config.logging_dir))
            for path in filter(os.path.lexists, [*own, *filter(is_ours, checkpoints(folder))]):
                discard(path)
        (folder / MARKER).touch()

    on_main_process(accelerator, prepare)
    return locks


def _is_barren(folder: Path) -> bool:
    """Whether the run in a folder ended before its first step, so that nothing is lost if another begins there."""
    metrics = folder / "metrics.jsonl"
    return not checkpoints(folder) and not (folder / "summary.json").exists() and not (metrics.exists() and metrics.stat().st_size)


def _run_in(folder: Path) -> str:
    """What of ours the folder holds, in words, or an empty string: the marker is written by every run, before anything else."""
    if not (folder / MARKER).exists():
        return ""
    return FINISHED if (folder / "summary.json").exists() else "an unfinished run"
