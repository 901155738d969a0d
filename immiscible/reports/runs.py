"""A run's folder as a comparison reads it, and the arms that runs form by their flags."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import fmean, median
from typing import Any, TypeGuard

import yaml

from immiscible.configs import TextToImageConfig, UnconditionalConfig
from immiscible.errors import UserError
from immiscible.files import read_lines
from immiscible.flags import defaults_of
from immiscible.method import MethodArguments
from immiscible.reports.ratios import BASELINE, Curve
from immiscible.training.arguments import RunArguments, TextRunArguments
from immiscible.training.checkpoints import checkpoints, is_complete, read_state

# What may differ between two runs of one arm: the seed, and what says where a run goes and not what it learns.
NOT_THE_METHOD = {item.name for group in (RunArguments, TextRunArguments) for item in fields(group)}
NOT_THE_METHOD -= {"sampling_scheduler", "timestep_spacing"}
NOT_THE_METHOD |= {"seed", "cache_dir", "cache_latents", "latent_cache_dir", "dataloader_num_workers", "local_rank"}

# What lines of evaluation.jsonl have where images were held out, by number of inference steps as ``frechet_distance``.
HELD_OUT = ("frechet_distance_held_out", "nearest_neighbor_ratio")
DIVERGED = 1e30  # a distance that no image could have; figures have no room for what is far above


@dataclass(frozen=True)
class Run:
    """One run's folder as it was read.

    Attributes:
        folder: where it is.
        config: its flags.
        evaluations: the lines of ``evaluation.jsonl``, one per step, in order; distances by number of inference steps: those at the
            guidance scale that was asked for as ``frechet_distance``, those at each scale as ``by_guidance``. Empty for a run that was not
            measured, which has neither curves nor a `last_step`. Other metrics likewise, by name in ``metrics``.
        metrics: the lines of ``metrics.jsonl``.
        finished: whether ``summary.json`` says that the last step was taken.
        ended: when ``summary.json`` was written, in seconds since 1970; None where it does not say.
        identity: what its newest complete checkpoint says of it (`immiscible.training.folder.run_identity`); empty without one.
    """

    folder: Path
    config: Mapping[str, Any]
    evaluations: Sequence[Mapping[str, Any]]
    metrics: Sequence[Mapping[str, float]]
    finished: bool
    ended: float | None
    identity: Mapping[str, Any]

    @property
    def seed(self) -> int:
        """The seed of everything that the run drew."""
        return int(self.config.get("seed") or 0)

    @property
    def processes(self) -> int | None:
        """On how many processes it trained; None if no checkpoint is left that says it."""
        said = self.identity.get("processes")
        return said if isinstance(said, int) else None

    @property
    def images_a_step(self) -> int:
        """The images of an optimizer step on all processes, or on one where nothing says how many these were."""
        flags = ("train_batch_size", "gradient_accumulation_steps")
        batch, accumulation = (int(self.config.get(flag) or _defaults(self.config)[flag]) for flag in flags)
        return batch * accumulation * (self.processes or 1)

    @property
    def inference_steps(self) -> set[int]:
        """The numbers of inference steps at which every evaluation measured."""
        return set.intersection(*(set(line["frechet_distance"]) for line in self.evaluations))

    @property
    def guidance_scales(self) -> set[float]:
        """The guidance scales at which every evaluation measured; 1 is no guidance."""
        return set.intersection(*(set(line["by_guidance"]) for line in self.evaluations))

    @property
    def last_step(self) -> int:
        """The last step that was evaluated."""
        return int(self.evaluations[-1]["step"])

    def curve(self, inference_steps: int, time: str = "step") -> Curve:
        """The Frechet distance against ``step`` or a time of training; values beyond `DIVERGED` or NaN count as infinitely bad."""
        return [(float(line[time]), _finite(line["frechet_distance"][inference_steps])) for line in self.evaluations]

    def final(self, guidance_scale: float, inference_steps: int) -> float:
        """The last distance at any guidance scale, as `curve` gives it at the one that was asked for."""
        return _finite(self.evaluations[-1]["by_guidance"][guidance_scale][inference_steps])

    def mean(self, metric: str) -> float | None:
        """The mean of a metric over ``metrics.jsonl``; the median for seconds, which a slow first step must not move."""
        values = self.logged(metric)
        return (median if metric.endswith("seconds") else fmean)(values) if values else None

    def logged(self, metric: str) -> list[float]:
        """The values of a metric in ``metrics.jsonl``, of those lines that have one."""
        return [value for line in self.metrics if is_number(value := line.get(metric))]

    def losses(self, together: int = 1) -> Curve:
        """The training loss against steps: means over so many lines of ``metrics.jsonl`` at a time, each at the step of its last line."""
        points = [(line["step"], line["loss"]) for line in self.metrics if all(is_number(line.get(name)) for name in ("step", "loss"))]
        groups = [points[first : first + together] for first in range(0, len(points), together)]
        return [(float(group[-1][0]), fmean(loss for _, loss in group)) for group in groups]


def check_measured(folders: Sequence[Path]) -> None:
    """Whether these are runs that were measured while they trained, before any of them is read.

    Raises:
        UserError: a folder is no run (exit code 2), or some hold no evaluations (1); all of these are named.
    """
    if not all_measured(folders):
        raise _unmeasured(folders)


def all_measured(folders: Sequence[Path]) -> bool:
    """Whether these runs were measured while they trained, all of them or none, before any of them is read.

    Raises:
        UserError: a folder is no run (exit code 2), or some hold evaluations and others, which are named, do not (1).
    """
    _check_folders(folders)
    files = {folder: folder / "evaluation.jsonl" for folder in folders}
    unmeasured = [folder for folder, file in files.items() if not file.exists() or not file.stat().st_size]
    if 0 < len(unmeasured) < len(folders):
        raise _unmeasured(unmeasured)
    return not unmeasured


def _check_folders(folders: Sequence[Path]) -> None:
    for folder in folders:
        if not (folder / "config.yaml").is_file():
            what = "no such folder" if not folder.exists() else "not a run's folder: it holds no config.yaml"
            if inside := sorted(path.parent.name for path in folder.glob("*/config.yaml")):
                what += f", but runs; name them, as {folder / inside[0]}"
            raise UserError(f"{folder}: {what}")


def measured_again(folder: Path) -> str:
    """The flags that train a run again and measure it."""
    return f"--config {folder / 'config.yaml'} --output_dir ANOTHER_FOLDER --eval_steps N"


def _unmeasured(folders: Sequence[Path]) -> UserError:
    it = "it" if len(folders) == 1 else "each of them"
    return UserError(
        f"{', '.join(map(str, folders))}: evaluation.jsonl is missing or empty, so there is nothing to compare; a run can be compared "
        f"if it was trained with --eval_steps: train {it} again, as {measured_again(folders[0])}",
        exit_code=1,
    )


def read_run(folder: Path, guidance_scale: float = 1.0) -> Run:
    """Reads a run's folder; where it was not measured, its evaluations are empty.

    Args:
        folder: where it is.
        guidance_scale: at which the distances are wanted.

    Raises:
        UserError: the folder is no run (exit code 2), or holds broken files (1).
    """
    _check_folders([folder])
    with _reading(folder / "config.yaml") as path:
        config = yaml.safe_load(path.read_text())
        if not isinstance(config, dict) or not all(isinstance(name, str) for name in config):
            raise ValueError("expected lines of `flag: value`")
        numbers = ("max_train_steps", "seed", "train_batch_size", "gradient_accumulation_steps")
        asked, *_ = (int(config.get(flag) or 0) for flag in numbers)
    with _reading(folder / "metrics.jsonl") as path:
        metrics = [dict(line) for line in read_lines(path)]
    with _reading(folder / "summary.json") as path:
        summary = yaml.safe_load(path.read_text()) if path.exists() else {"step": -1}
        finished, ended = int(summary["step"]) >= asked, summary.get("ended")
    with _reading(folder / "evaluation.jsonl") as path:
        evaluations = {line["step"]: line for line in (_measured(line, guidance_scale) for line in read_lines(path))}
    in_order = [evaluations[step] for step in sorted(evaluations)]
    return Run(folder, config, in_order, metrics, finished, ended if is_number(ended) else None, _identity(folder))


def read_measured(folder: Path, guidance_scale: float = 1.0) -> Run:
    """Reads the folder of a run that was measured, as `read_run` does.

    Raises:
        UserError: what `read_run` raises; it holds no evaluations that can be compared (exit code 1).
    """
    run = read_run(folder, guidance_scale)
    if not run.evaluations:
        raise _unmeasured([folder])
    if guidance_scale not in run.guidance_scales:
        known = ", ".join(f"{scale:g}" for scale in sorted(run.guidance_scales)) or "none"
        raise UserError(f"{folder} was not measured at guidance scale {guidance_scale:g}; --guidance_scale takes one that was: {known}")
    if not run.inference_steps:
        raise UserError(f"{folder / 'evaluation.jsonl'}: no number of inference steps was measured at every step", exit_code=1)
    return run


def _finite(distance: float) -> float:
    return distance if abs(distance) < DIVERGED else math.inf  # NaN is not below it either


def is_number(value: Any) -> TypeGuard[float]:
    """Whether it is a finite number."""
    return isinstance(value, int | float) and math.isfinite(value)


@contextmanager
def _reading(path: Path) -> Iterator[Path]:
    """Turns what goes wrong with a file of a run into one line that names it."""
    try:
        yield path
    except UserError:
        raise  # names the file already
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError, yaml.YAMLError) as error:
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: cannot be read ({first_line})", exit_code=1) from None


def _measured(line: Mapping[str, Any], guidance_scale: float) -> dict[str, Any]:
    """A line of ``evaluation.jsonl`` whose numbers are numbers; see `Run.evaluations`."""
    needed = ("step", "train_seconds", "feature", "samples", "reference_images", "data", "frechet_distance")
    if missing := sorted(set(needed) - line.keys()):
        raise ValueError(f"lines without {', '.join(missing)}")
    counts = {name: int(line[name]) for name in ("step", "samples", "reference_images")}
    if not (counts["step"] > 0 and min(counts.values()) >= 0 and is_number(line["train_seconds"]) and line["train_seconds"] >= 0):
        raise ValueError(f"line of step {line['step']}: counts and seconds are below 0 or no numbers")
    if not (isinstance(line["data"], str) and isinstance(line["feature"], str)):
        raise ValueError(f"line of step {line['step']}: data and feature are no texts")
    by_guidance = _by_guidance(line, "frechet_distance")
    chosen: dict[str, Any] = {
        name: _by_guidance(line, name).get(guidance_scale, {}) for name in ("frechet_distance", *HELD_OUT) if name in line
    }
    if "metrics" in line:
        names = [name for name in line["metrics"] if not name.endswith("_guided")]
        chosen["metrics"] = {name: _by_guidance(line["metrics"], name).get(guidance_scale, {}) for name in names}
        chosen["metrics_real"] = {name: float(value) for name, value in line.get("metrics_real", {}).items()}
    return {**line, **counts, "train_seconds": float(line["train_seconds"]), **chosen, "by_guidance": by_guidance}


def _by_guidance(line: Mapping[str, Any], name: str) -> dict[float, dict[int, float]]:
    """A measure by guidance scale and number of inference steps; one that is ``null`` was not finite."""
    by_scale = {1.0: line[name], **{float(scale): of for scale, of in line.get(f"{name}_guided", {}).items()}}
    return {
        scale: {int(steps): math.nan if value is None else float(value) for steps, value in of_scale.items()}
        for scale, of_scale in by_scale.items()
        if of_scale != {}
    }


def differing_flags(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The flags that say what is learnt and are not equal in all configs."""
    names = dict.fromkeys(name for config in configs for name in config if name not in NOT_THE_METHOD)
    return [name for name in names if any(config.get(name) != configs[0].get(name) for config in configs)]


def group_runs(folders: Sequence[Path]) -> dict[str, list[Path]]:
    """Runs of one script that differ in their seeds alone form an arm, named by its flags that differ from other arms' and the defaults.

    Raises:
        UserError: what `all_measured` and `read_run` raise.
    """
    all_measured(folders)  # which raises where some are and some are not
    runs = {folder: read_run(folder) for folder in folders}
    configs: dict[Path, dict[str, Any]] = {folder: {**run.config, "script": script_of(run)} for folder, run in runs.items()}
    differing = differing_flags(list(configs.values()))
    defaults = _defaults(next(iter(configs.values()), {}))
    method = {item.name for item in fields(MethodArguments)}
    arms: dict[str, list[Path]] = {}
    for folder, config in configs.items():
        parts = [
            str(value) if isinstance(value, str) and name in method else f"{name}={value}"
            for name in differing
            if (value := config.get(name)) != defaults.get(name) and value is not None
        ]
        arms.setdefault(" + ".join(parts) or BASELINE, []).append(folder)
    return arms


def command_of(config: Mapping[str, Any], script: str = "train_unconditional.py") -> str:
    """The command line that gives this config: every flag whose value is not the default."""
    defaults = _defaults(config)
    words = ["python", script]
    for name, value in config.items():
        if value is None or value == defaults.get(name) or name in ("resume_from_checkpoint", "overwrite_output_dir", "hub_token"):
            continue
        words.append(f"--{name}")
        if value is not True:
            words += [str(item) for item in (value if isinstance(value, list) else [value])]
    return shlex.join(words)


def script_of(run: Run) -> str:
    """The script that trained a run. The flags of a text run do not say whether it began with random weights; its checkpoints do."""
    if "pretrained_model_name_or_path" not in run.config:
        return "train_unconditional.py"
    from_scratch = run.identity.get("network", {}).get("from_scratch")
    return "train_text_to_image.py" if from_scratch else "finetune_sd.py"


def _identity(folder: Path) -> Mapping[str, Any]:
    newest = next((path for path in reversed(checkpoints(folder)) if is_complete(path)), None)
    return read_state(newest)["identity"] if newest else {}


def _defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """Of the script whose flags these are."""
    return defaults_of(TextToImageConfig if "pretrained_model_name_or_path" in config else UnconditionalConfig)
