"""A comparison in sentences: what happened, what all arms share, and how to read its numbers."""

from __future__ import annotations

import math
from collections.abc import Callable

from immiscible.reports.comparison import Comparison
from immiscible.reports.ratios import GAIN, HARM, NO_EFFECT, RULE, UNCLEAR, UNKNOWN, Interval, middle
from immiscible.reports.runs import differing_flags
from immiscible.sampling.pipelines import told

FEW_SEEDS = 3  # with two, an arm without effect has a verdict in half of all comparisons


def headline(comparison: Comparison) -> list[str]:
    """What happened, in plain sentences; the first names the best arm or says that nothing helped."""
    quality = f"{comparison.baseline}'s final {comparison.feature}"
    others = [name for name in comparison.arms if name != comparison.baseline]
    words = {(name, steps): comparison.verdict(name, steps) for name in others for steps in comparison.inference_steps}

    def factor(name: str, steps: int, time: str = "step") -> Interval:
        return middle(comparison.ratios(name, steps, time).values())

    def saving(name: str, steps: int) -> str:
        fewer, less = (factor(name, steps, time).show(2).replace("> ", "over ") for time in ("step", "train_seconds"))
        time = "" if less == UNKNOWN else f" ({less}x less time)"
        return f"{fewer}x fewer training steps{time} at {steps} inference steps"

    def at(name: str, word: str, text: Callable[[int], str]) -> str:
        return " and ".join(text(steps) for steps in comparison.inference_steps if words[name, steps] == word)

    def merit(name: str) -> tuple[int, float]:
        lows = [max(factor(name, steps).low, 0.01) for steps in comparison.inference_steps]
        return -sum(words[name, steps] == HARM for steps in comparison.inference_steps), math.prod(lows)

    gaining = [name for name in others if any(words[name, steps] == GAIN for steps in comparison.inference_steps)]
    sentences = []
    if not any(comparison.arms[name].runs for name in others) or not comparison.arms[comparison.baseline].runs:
        sentences.append("Nothing can be said yet: it takes a finished run of the baseline and one of another arm.")
    elif gaining:
        best = max(gaining, key=merit)
        seeds = len(comparison.arms[best].runs)
        gains = at(best, GAIN, lambda steps: saving(best, steps))
        sentences.append(f"Best arm: {best} reached {quality} in {gains} ({_basis(seeds)}).")
    elif set(words.values()) != {UNKNOWN}:
        sentences.append(f"Nothing helped: no arm reached {quality} sooner with every seed.")
    harmed = [
        f"{name} at {at(name, HARM, str)} inference steps"
        for name in others
        if HARM in {words[name, s] for s in comparison.inference_steps}
    ]
    if harmed:
        seeds = len(comparison.arms[comparison.baseline].runs)
        chance = f" ({_basis(seeds)})" if seeds < FEW_SEEDS else ""
        sentences.append(f"Harm, slower than {comparison.baseline} with every seed: {', '.join(harmed)}{chance}.")
    for title, verdicts in (("No clear effect", (UNCLEAR, NO_EFFECT)), ("Not known, for want of earlier evaluations", (UNKNOWN,))):
        places = {
            name: " and ".join(str(steps) for steps in comparison.inference_steps if words[name, steps] in verdicts) for name in others
        }
        if any(places.values()):
            listed = ", ".join(f"{name} at {where} inference steps" for name, where in places.items() if where)
            sentences.append(f"{title}: {listed}.")
    failures = sum(len(arm.problems) for arm in comparison.arms.values())
    if failures:
        sentences.append(f"Not counted: {failures} {'run' if failures == 1 else 'runs'}, named below.")
    return sentences


def _basis(seeds: int) -> str:
    """On how much a verdict rests; see `reading_guide` for how often an arm without effect would have it."""
    if seeds < FEW_SEEDS:
        return "one seed only, so this may be chance" if seeds == 1 else f"{seeds} seeds only, so this may be chance"
    return f"medians of {seeds} seeds"


def title(comparison: Comparison, most: int = 3) -> str:
    """What is compared with what; more than ``most`` arms are counted, not named."""
    arms = [arm for arm in comparison.arms if arm != comparison.baseline]
    return f"{', '.join(arms) if len(arms) <= most else f'{len(arms)} arms'} against {comparison.baseline}"


def setting(comparison: Comparison) -> str:
    """What all arms share, in one line."""
    run, line = comparison.runs[0], comparison.runs[0].evaluations[0]
    differing = differing_flags([run.config for run in comparison.runs])
    config = {name: value for name, value in run.config.items() if name not in differing and value is not None}
    source = next((str(config[name]) for name in ("bundled_data", "dataset_name", "train_data_dir") if config.get(name)), "")
    part = {"pretrained_model_name_or_path": "checkpoint", "vae_model_name_or_path": "latents of"}
    condition = f" ({told(run.config)})" if told(run.config) else ""
    seeds = sorted({run.seed for run in comparison.runs})
    parts = [
        f"{source} {config['resolution']}x{config['resolution']}" if source and "resolution" in config else source,
        *(f"{what} {config[name]}" for name, what in part.items() if config.get(name)),
        str(config.get("prediction_type", "")),
        f"{config['sampling_scheduler']} sampling, {config.get('timestep_spacing', '')} spacing" if "sampling_scheduler" in config else "",
        f"{config['max_train_steps']} steps" if "max_train_steps" in config else "",
        f"batch {config['train_batch_size']}" if "train_batch_size" in config else "",
        f"seeds {', '.join(map(str, seeds))}",
        f"{comparison.feature} of {line['samples']} samples{condition} against {line['reference_images']} reference images",
        "EMA weights" if line.get("weights") == "ema" else "",
        f"data {line['data']}",
    ]
    return "; ".join(part for part in parts if part)


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
        "The goal is the baseline's final quality: the mean over seeds of its last distance. 'Steps to it' is when a run first gets there; "
        "between two evaluations the logarithm of the distance is taken as a straight line. '> n' means not within the n steps trained; "
        "it may stand for the baseline too, of which some seeds end above their mean.",
        "'Fewer steps' is the baseline's steps to the goal over the arm's, seed by seed: 2 means half as many, below 1 means more. A seed "
        "whose baseline ends above the goal has that last distance as its own goal, shown under 'Every seed'. '< n' means that the arm "
        "never got there and its ratio is below n; '> n' that it was there before its first evaluation. 'Less time' is the same in seconds "
        "of training.",
        RULE + chance + " No confidence interval is given: so few seeds do not carry one.",
        "Seconds are those of this machine as busy as it was; runs that train side by side slow one another. They leave evaluation out.",
        "The baseline compares with itself: its ratio is 1 by definition. Equal seeds share initial weights, batches and noises.",
    ]
