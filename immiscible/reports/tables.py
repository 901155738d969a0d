"""A report's numbers as tables of text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from immiscible.evaluation.metrics import METRICS
from immiscible.reports.arms import Report
from immiscible.reports.clock import WALL
from immiscible.reports.comparison import Comparison
from immiscible.reports.ratios import NOTHING, UNKNOWN, Curve, Interval, middle
from immiscible.reports.runs import HELD_OUT, differing_flags
from immiscible.training.markdown import inline, table_cell


@dataclass(frozen=True)
class Table:
    """Cells of text under a caption."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        """The table in Markdown, its columns aligned, so that it reads in a terminal too."""
        rows = [[table_cell(cell) for cell in row] for row in (self.columns, *self.rows)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(self.columns))]
        lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows]
        lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
        return f"**{inline(self.caption)}**\n\n" + "\n".join(lines) + "\n"


def summary_table(comparison: Comparison, inference_steps: int) -> Table:
    """One row per arm: the verdict, the ratios, and what they were computed from, for one number of inference steps."""
    rows, digits, clock = [], _seconds_digits(comparison), comparison.clock
    least = min(abs(run.curve(inference_steps)[-1][1]) for run in comparison.runs)
    places = 2 if least >= 1 else 4  # of distances below 1 two digits after the point say too little
    for name, arm in comparison.arms.items():
        finals = [run.curve(inference_steps)[-1][1] for run in arm.runs.values()]
        by_time = [comparison.ratios(name, inference_steps, time) for time in ("step", clock.total)]
        reached = [
            (comparison.times(name, inference_steps), 0),
            *([(comparison.images(name, inference_steps), 0)] if comparison.unequal_steps else []),
            (comparison.times(name, inference_steps, clock.total), digits),
        ]
        rows.append(
            [
                name,
                comparison.verdict(name, inference_steps),
                *(spread(ratios, 2, "x") for ratios in by_time),
                spread({seed: Interval(value, value) for seed, value in enumerate(finals)}, places),
                *(middle(times.values()).show(count) if times else NOTHING for times, count in reached),
                str(len(arm.runs)) + (f" of {len(arm.runs) + len(arm.problems)}" if arm.problems else ""),
            ]
        )
    columns = ["arm", "verdict", "sooner in steps", f"sooner in {clock.unit}", f"final {comparison.feature}", "steps to it"]
    columns += [*(["images to it"] if comparison.unequal_steps else []), f"{clock.unit} to it", "seeds"]
    threshold = comparison.threshold(inference_steps)
    goal = NOTHING if threshold is None else f"{threshold:.3g}, its mean over seeds"
    return Table(
        f"At {inference_steps} inference steps: how soon each arm reaches the baseline's final {comparison.feature} of {goal} (lower is "
        "better). Median over seeds, least to greatest in brackets",
        columns,
        rows,
    )


def guidance_table(comparison: Comparison) -> Table | None:
    """The last distance at every guidance scale and number of inference steps that all runs measured; None where there is one scale."""
    runs = comparison.runs
    scales = sorted(set.intersection(*(run.guidance_scales for run in runs)))
    if len(scales) < 2:
        return None
    of_scale = {scale: set.intersection(*(set(run.evaluations[-1]["by_guidance"][scale]) for run in runs)) for scale in scales}
    measured = [(scale, steps) for scale in scales for steps in sorted(of_scale[scale])]
    places = 2 if min(abs(run.final(*where)) for run in runs for where in measured) >= 1 else 4
    rows = []
    for name, arm in comparison.arms.items():
        finals = [{seed: run.final(*where) for seed, run in arm.runs.items()} for where in measured]
        rows.append([name, *(spread({seed: Interval(value, value) for seed, value in of_arm.items()}, places) for of_arm in finals)])
    return Table(
        f"Final {comparison.feature} by guidance scale w (1 is no guidance) and number of inference steps. Median over seeds, least to "
        "greatest in brackets",
        ["arm", *(f"w {scale:g}, {steps} steps" for scale, steps in measured)],
        rows,
    )


def metric_table(comparison: Comparison, inference_steps: int) -> Table | None:
    """What else was measured of each arm's last samples, for one number of inference steps; None if nothing was."""
    last = {name: [run.evaluations[-1] for run in arm.runs.values()] for name, arm in comparison.arms.items()}
    lines = [line for of_arm in last.values() for line in of_arm]
    names = list(dict.fromkeys(name for line in lines for name, of in line.get("metrics", {}).items() if inference_steps in of))
    if not names:
        return None
    real: dict[str, float] = {name: value for line in lines for name, value in line.get("metrics_real", {}).items()}
    goals = {name: f"real images {real[name]:.3g}" if name in real else f"best {METRICS[name].best}" for name in names if name in METRICS}
    rows = []
    for arm, of_arm in last.items():
        found = [
            [of[inference_steps] for line in of_arm if inference_steps in (of := line.get("metrics", {}).get(name, {}))] for name in names
        ]
        rows.append([arm, *(f"{median(values):.3g}" if values else NOTHING for values in found)])
    return Table(
        f"Other metrics of the same samples at {inference_steps} inference steps by the features of {comparison.feature}, at the last "
        "step; medians over seeds, and in brackets what the best samples have",
        ["arm", *(f"{name} ({goals[name]})" if name in goals else name for name in names)],
        rows,
    )


def cost_table(comparison: Comparison) -> Table:
    """What a step costs in each arm, and what its coupling did to the pairs and to the noise."""
    clock = comparison.clock
    metrics = {
        clock.step: (f"{clock.prefix}ms per step", 1000, "", 1),
        **({"coupling_seconds": ("of it coupling, ms", 1000, "", 2)} if clock is WALL else {}),  # wall time
        "distance_reduction_percent": ("pair distance reduced by, %", 1, "+", 2),
        "noise_variance_drift": ("noise variance drift", 1, "+", 4),
        "noise_norm_drift": ("noise norm drift", 1, "+", 4),
        "paired_images": ("images paired together", 1, "", 0),
    }
    means: dict[str, dict[str, float | None]] = {}
    for name, arm in comparison.arms.items():
        of_runs = {metric: [value for run in arm.runs.values() if (value := run.mean(metric)) is not None] for metric in metrics}
        means[name] = {metric: median(values) if values else None for metric, values in of_runs.items()}
    reference = means[comparison.baseline][clock.step]
    rows = []
    for name, of_arm in means.items():
        cells = [
            NOTHING if (value := of_arm[metric]) is None else f"{round(value * scale, digits) + 0.0:{sign}.{digits}f}"  # no -0.0000
            for metric, (_, scale, sign, digits) in metrics.items()
        ]
        seconds = of_arm[clock.step]
        cells.insert(1, NOTHING if not seconds or not reference else f"{100 * (seconds / reference - 1):+.1f} %")
        rows.append([name, *cells])
    columns = ["arm", *(column for column, *_ in metrics.values())]
    columns.insert(2, "against baseline")
    return Table(
        "What a step costs, and what the coupling did (medians over seeds; drift is 0 for noise that stays standard normal)",
        columns,
        rows,
    )


def validation_table(comparison: Comparison) -> Table | None:
    """The held-out loss of each arm's last step per range of timesteps; None if no run has it."""
    levels = list(dict.fromkeys(level for run in comparison.runs for level in run.evaluations[-1].get("validation_loss") or {}))
    if not levels:
        return None
    rows = []
    for name, arm in comparison.arms.items():
        last = [run.evaluations[-1].get("validation_loss") or {} for run in arm.runs.values()]
        values = [[losses[level] for losses in last if level in losses] for level in levels]
        rows.append([name, *(f"{median(value):.4g}" if value else NOTHING for value in values)])
    return Table(
        "Held-out loss per range of timesteps (low is little noise) at the last step: images not trained on, fixed independent noises, "
        "unweighted; medians over seeds",
        ["arm", *levels],
        rows,
    )


def held_out_table(comparison: Comparison) -> Table | None:
    """Each arm's last distances from the training images and from those held out, and the ratio for copies; None if no run has them."""
    last = {name: [run.evaluations[-1] for run in arm.runs.values()] for name, arm in comparison.arms.items()}
    if not any(name in line for lines in last.values() for line in lines for name in HELD_OUT):
        return None
    rows = []
    for name, lines in last.items():
        for steps in comparison.inference_steps:
            of_seeds = [[line[measure][steps] for line in lines if steps in line.get(measure, {})] for measure in HELD_OUT]
            distances = [run.curve(steps)[-1][1] for run in comparison.arms[name].runs.values()]
            rows.append([name, str(steps), *(f"{median(values):.4g}" if values else NOTHING for values in (distances, *of_seeds))])
    return Table(
        f"Whether samples are copies, at the last step: their {comparison.feature} from the images trained on and from others held out, "
        "and how far they are from the nearest image trained on over how far from the nearest of as many held out (1: no nearer; 0: each "
        "is a copy); medians over seeds",
        ["arm", "inference steps", "from images trained on", "from images held out", "nearest-neighbor ratio"],
        rows,
    )


def seed_table(comparison: Comparison, inference_steps: int) -> Table:
    """Every seed of every arm with its own goal, so that each ratio can be computed again by hand."""
    rows, digits, clock = [], _seconds_digits(comparison), comparison.clock
    for name, arm in comparison.arms.items():
        ratios = [comparison.ratios(name, inference_steps, time) for time in ("step", clock.total)]
        reached = [comparison.times(name, inference_steps, time) for time in ("step", clock.total)]
        for seed, run in arm.runs.items():
            goal = comparison.goal(seed, inference_steps)
            times = [values[seed].show(places) if seed in values else NOTHING for values, places in zip(reached, (1, digits), strict=True)]
            shown = [values[seed].show(3) if seed in values else NOTHING for values in ratios]
            final = run.curve(inference_steps)[-1][1]
            trained = f"{run.evaluations[-1][clock.total]:.{digits}f}" if clock.total else NOTHING
            goal_shown = NOTHING if goal is None else f"{goal:.4g}"
            rows.append([name, str(seed), f"{final:.4g}", goal_shown, *times, *shown, str(run.last_step), trained])
    return Table(
        f"Every seed at {inference_steps} inference steps",
        [
            "arm",
            "seed",
            "final",
            "goal",
            "steps to goal",
            f"{clock.unit} to goal",
            "sooner in steps, x",
            f"sooner in {clock.unit}, x",
            "steps trained",
            f"{clock.unit} trained",
        ],
        rows,
    )


def _seconds_digits(comparison: Comparison) -> int:
    """Digits after the point with which seconds of training keep about four that count."""
    longest = max(run.evaluations[-1][comparison.clock.total or "train_seconds"] for run in comparison.runs)
    return 2 if longest < 100 else 1 if longest < 1000 else 0


def curve_table(comparison: Comparison, inference_steps: int, most: int = 10) -> Table:
    """The curves as numbers: each arm's median over seeds at up to ``most`` of the evaluated steps, the last among them."""
    caption = f"{comparison.feature} at {inference_steps} inference steps after so many training steps (medians)"
    return median_table(caption, {name: comparison.curves(name, inference_steps) for name in comparison.arms}, most)


def median_table(caption: str, curves: Mapping[str, Sequence[Curve]], most: int = 10) -> Table:
    """Each arm's median over its curves at up to ``most`` of their steps, the last among them."""
    steps = sorted({step for of_arm in curves.values() for curve in of_arm for step, _ in curve})
    stride = math.ceil(len(steps) / most) if steps else 1
    shown = steps[::-1][::stride][::-1]
    rows = []
    for name, of_arm in curves.items():
        by_step = [dict(curve) for curve in of_arm]
        values = [[curve[step] for curve in by_step if step in curve] for step in shown]
        rows.append([name, *(f"{median(value):.3g}" if value else NOTHING for value in values)])
    return Table(caption, ["arm", *(f"{step:.0f}" for step in shown)], rows)


def arm_table(report: Report) -> Table:
    """What each arm is: the flags in which the arms differ, and the images of a step where these differ."""
    configs = {name: run.config for name, arm in report.arms.items() for run in (*arm.runs.values(), *arm.unfinished)}
    flags = differing_flags(list(configs.values()))
    rows = []
    for name, arm in report.arms.items():
        images = [", ".join(map(str, arm.images_a_step))] if report.unequal_steps else []
        rows.append([name, *images, *("" if (value := configs.get(name, {}).get(flag)) is None else str(value) for flag in flags)])
    columns = ["arm", *(["images a step"] if report.unequal_steps else []), *flags]
    return Table("The flags in which the arms differ; all others are equal", columns, rows)


def spread(values: Mapping[int, Interval], digits: int, unit: str = "") -> str:
    """``median (least to greatest)``, or what is known of them."""
    if not values:
        return NOTHING
    center = middle(values.values()).show(digits)
    center += unit if center != UNKNOWN else ""
    low, high = min(value.low for value in values.values()), max(value.high for value in values.values())
    if len(set(values.values())) == 1 or f"{low:.{digits}f}" == f"{high:.{digits}f}":
        return center
    if low <= 0 and math.isinf(high):
        return f"{center} (neither end known)"
    if low <= 0 or math.isinf(high):
        return f"{center} (up to {high:.{digits}f})" if low <= 0 else f"{center} ({low:.{digits}f} and more)"
    return f"{center} ({low:.{digits}f} to {high:.{digits}f})"
