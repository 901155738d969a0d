"""A comparison in sentences: what happened, what all arms share, and how to read its numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from immiscible.reports.arms import Report
from immiscible.reports.clock import SECONDS_RULE
from immiscible.reports.comparison import Comparison
from immiscible.reports.ratios import GAIN, HARM, NO_EFFECT, RULE, UNCLEAR, UNKNOWN, Interval, middle
from immiscible.reports.runs import differing_flags
from immiscible.sampling.pipelines import told

FEW_SEEDS = 3  # with two, an arm without effect has a verdict in half of all comparisons


def headline(comparison: Comparison) -> list[str]:
    """What happened, in plain sentences; the first names the best arm or says that nothing helped."""
    failures = sum(len(arm.problems) for arm in comparison.arms.values())
    return [
        *_best(comparison),
        *_harm(comparison),
        *_listed(comparison, "No clear effect", (UNCLEAR, NO_EFFECT)),
        *_listed(comparison, "Not known, for want of earlier evaluations", (UNKNOWN,)),
        *([f"Not counted: {failures} {'run' if failures == 1 else 'runs'}, named below."] if failures else []),
    ]


def _others(comparison: Comparison) -> list[str]:
    return [name for name in comparison.arms if name != comparison.baseline]


def _where(comparison: Comparison, arm: str, *verdicts: str) -> list[int]:
    """The numbers of inference steps at which an arm has one of these verdicts."""
    return [steps for steps in comparison.inference_steps if comparison.verdict(arm, steps) in verdicts]


def _factor(comparison: Comparison, arm: str, inference_steps: int, time: str = "step") -> Interval:
    return middle(comparison.ratios(arm, inference_steps, time).values() or [Interval(0.0, math.inf)])


def _best(comparison: Comparison) -> list[str]:
    """The arm that gains most over all numbers of inference steps, and any that gains more at one of them."""
    others, quality = _others(comparison), f"{comparison.baseline}'s final {comparison.feature}"
    if not any(comparison.arms[name].runs for name in others) or not comparison.arms[comparison.baseline].runs:
        return ["Nothing can be said yet: it takes a finished run of the baseline and one of another arm."]
    if all(comparison.verdict(name, steps) == UNKNOWN for name in others for steps in comparison.inference_steps):
        return []
    gaining = {name: where for name in others if (where := _where(comparison, name, GAIN))}
    if not gaining:
        return [f"Nothing helped: no arm reached {quality} sooner with every seed."]

    def merit(name: str) -> tuple[int, float]:
        lows = [max(_factor(comparison, name, steps).low, 0.01) for steps in comparison.inference_steps]
        return -len(_where(comparison, name, HARM)), math.prod(lows)

    best = max(gaining, key=merit)
    better: dict[int, str] = {}
    for steps in comparison.inference_steps:
        lows = {name: _factor(comparison, name, steps).low for name, where in gaining.items() if steps in where}
        if lows and lows.get(best, 0.0) < max(lows.values()):
            better[steps] = max(lows, key=lambda name: lows[name])
    together = f" over {numbers(comparison.inference_steps)} inference steps together" if better else ""
    gains = " and ".join(f"{_gain(comparison, best, steps)} at {steps} inference steps" for steps in gaining[best])
    return [
        f"Best arm{together}: {best} reached {quality} {gains} ({_basis(len(comparison.arms[best].runs))}).",
        *(
            f"Best at {steps} inference steps alone: {name}, {_gain(comparison, name, steps)} ({_basis(len(comparison.arms[name].runs))})."
            for steps, name in better.items()
        ),
    ]


def _gain(comparison: Comparison, arm: str, steps: int) -> str:
    clock = comparison.clock
    by_step, by_second = (_factor(comparison, arm, steps, time) for time in ("step", clock.total))
    sooner, seconds = (factor.show(2).replace("> ", "over ") for factor in (by_step, by_second))
    time = "" if seconds == UNKNOWN else f" ({seconds} in {clock.unit}{', which is later' if by_second.high < 1 else ''})"
    return f"{sooner} times sooner in training steps{time}"


def numbers(values: Sequence[int]) -> str:
    """``5``, ``5 and 20``, ``1, 5 and 20``."""
    *before, last = map(str, values)
    return f"{', '.join(before)} and {last}" if before else last


def _harm(comparison: Comparison) -> list[str]:
    harmed = {name: where for name in _others(comparison) if (where := _where(comparison, name, HARM))}
    if not harmed:
        return []
    seeds = len(comparison.arms[comparison.baseline].runs)
    chance = f" ({_basis(seeds)})" if seeds < FEW_SEEDS else ""
    return [f"Harm, slower than {comparison.baseline} with every seed: {_places(harmed)}{chance}."]


def _listed(comparison: Comparison, words: str, verdicts: Sequence[str]) -> list[str]:
    found = {name: where for name in _others(comparison) if (where := _where(comparison, name, *verdicts))}
    return [f"{words}: {_places(found)}."] if found else []


def _places(arms: Mapping[str, Sequence[int]]) -> str:
    return ", ".join(f"{name} at {numbers(where)} inference steps" for name, where in arms.items())


def _basis(seeds: int) -> str:
    """On how much a verdict rests; see `reading_guide` for how often an arm without effect would have it."""
    if seeds < FEW_SEEDS:
        return "one seed only, so this may be chance" if seeds == 1 else f"{seeds} seeds only, so this may be chance"
    return f"medians of {seeds} seeds"


def title(comparison: Comparison, most: int = 3) -> str:
    """What is compared with what; more than ``most`` arms are counted, not named."""
    arms = [arm for arm in comparison.arms if arm != comparison.baseline]
    guidance = f" at guidance scale {comparison.guidance_scale:g}" if comparison.guidance_scale != 1 else ""
    return f"{', '.join(arms) if len(arms) <= most else f'{len(arms)} arms'} against {comparison.baseline}{guidance}"


def setting(comparison: Comparison) -> str:
    """What all arms share, in one line."""
    run, line = comparison.runs[0], comparison.runs[0].evaluations[0]
    words = told(run.config, comparison.guidance_scale)
    condition = f" ({words})" if words else ""
    parts = [
        trained_on(comparison),
        f"{comparison.feature} of {line['samples']} samples{condition} against {line['reference_images']} reference images",
        "EMA weights" if line.get("weights") == "ema" else "",
        f"data {line['data']}",
    ]
    return "; ".join(part for part in parts if part)


def trained_on(report: Report) -> str:
    """What the training of all arms shares, in one line."""
    run = report.runs[0]
    differing = differing_flags([run.config for run in report.runs])
    config = {name: value for name, value in run.config.items() if name not in differing and value is not None}
    source = next((str(config[name]) for name in ("bundled_data", "dataset_name", "train_data_dir") if config.get(name)), "")
    part = {"pretrained_model_name_or_path": "checkpoint", "vae_model_name_or_path": "latents of"}
    seeds = sorted({run.seed for run in report.runs})
    parts = [
        f"{source} {config['resolution']}x{config['resolution']}" if source and "resolution" in config else source,
        *(f"{what} {config[name]}" for name, what in part.items() if config.get(name)),
        *_predicted_and_sampled(report, config),
        f"{config['max_train_steps']} steps" if "max_train_steps" in config else "",
        f"batch {config['train_batch_size']}" if "train_batch_size" in config else "",
        f"seeds {', '.join(map(str, seeds))}",
    ]
    return "; ".join(part for part in parts if part)


def _predicted_and_sampled(report: Report, shared: Mapping[str, Any]) -> list[str]:
    """What all networks predict and how they are sampled, as far as it is one for all; flags of denoising are not read elsewhere."""
    objectives = {run.config.get("objective", "denoising") for run in report.runs}
    if objectives == {"denoising"}:
        sampler, spacing = shared.get("sampling_scheduler"), shared.get("timestep_spacing", "")
        return [str(shared.get("prediction_type", "")), f"{sampler} sampling, {spacing} spacing" if sampler else ""]
    if objectives == {"edm"}:
        sampler = shared.get("edm_sampler")
        return ["edm with momentum" if shared.get("momentum") else "edm", f"{sampler} sampling" if sampler else ""]
    return sorted(objectives) if len(objectives) == 1 else []


def reading_guide(comparison: Comparison) -> list[str]:
    """How every number is defined, in plain words."""
    seeds = len(comparison.arms[comparison.baseline].runs)
    chance = (
        f" With {seeds} seeds an arm without any effect is called a gain or a harm in 1 of {2 ** (seeds - 1)} comparisons."
        if seeds > 1
        else ""
    )
    return [
        f"The distance is {comparison.feature}, named by its feature network; it is comparable only within this report. Lower is better.",
        "The goal is the baseline's final quality: the mean over seeds of its last distance. A seed whose baseline ends above the goal has "
        "that last distance as its own goal, shown under 'Every seed', so that every baseline reaches its goal. 'Steps to it' is when a "
        "run first gets there; between two evaluations the logarithm of the distance is taken as a straight line. '> n' means not within "
        "the n steps trained.",
        "'Sooner in steps' is the baseline's steps to the goal over the arm's, seed by seed: 2x means in half as many, below 1x means in "
        "more. '< n' means that the arm never got there and its ratio is below n; '> n' that it was there before its first evaluation. "
        "In brackets are the least and the greatest of the seeds: 'up to n' where the least is unknown, 'n and more' where the greatest "
        f"is. 'Sooner in {comparison.clock.unit}' is the same in time of training.",
        RULE + chance,
        "Under 'How sure it is': p is of a paired t-test of the logarithms of the final distances, and the interval resamples the seeds; "
        "of three seeds it is narrower than it says. The highest ratio of steps is the greatest over all qualities that the baseline "
        "passes, as papers quote it: of many noisy ratios the greatest flatters, so compare it with published ones alone.",
        SECONDS_RULE,
        "The baseline compares with itself: its ratio is 1 by definition. Equal seeds share initial weights, batches and noises.",
    ]
