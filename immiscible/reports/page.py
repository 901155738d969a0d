"""A comparison as a page: its sentences and tables, in one self-contained HTML file and one Markdown file."""

from __future__ import annotations

import base64
import html
import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from immiscible.errors import UserError
from immiscible.files import PARTIAL, replace
from immiscible.reports.comparison import (
    GAIN,
    HARM,
    NO_EFFECT,
    NOTHING,
    RULE,
    UNCLEAR,
    UNKNOWN,
    Arm,
    Comparison,
    Interval,
    Run,
    crossing,
    differing_flags,
    middle,
)
from immiscible.reports.figures import arm_figure, crowded, curve_figure, inference_figure, ratio_figure
from immiscible.sampling.pipelines import told

if TYPE_CHECKING:
    from PIL import Image

FEW_SEEDS = 3  # with two, an arm without effect has a verdict in half of all comparisons
RATIOS_LEGEND = "A mark is one seed. An open arrow to the left: its ratio is below the mark; to the right: above it."
MEDIANS_LEGEND = "Lower is better. Medians over seeds; every seed is drawn below."
SEEDS_LEGEND = (
    "Lower is better. Thin: every seed. Thick: the median of an arm. Dotted: a run that was not finished. Dashed: the baseline's final "
    "value; ticks on it: where a seed reaches it."
)


@dataclass(frozen=True)
class Table:
    """Cells of text under a caption."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        """The table in Markdown, its columns aligned, so that it reads in a terminal too."""
        rows = [[cell.replace("|", "\\|") for cell in row] for row in (self.columns, *self.rows)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(self.columns))]
        lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows]
        lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
        return f"**{self.caption}**\n\n" + "\n".join(lines) + "\n"

    def html(self) -> str:
        """The table in a box in which it scrolls sideways if it must."""

        def cell(tag: str, text: str) -> str:
            mark = f' class="{text[2:].replace(" ", "-")}"' if text in (GAIN, HARM, UNCLEAR, NO_EFFECT) else ""
            shown = re.sub(r" (\(.*\))$", r" <small>\1</small>", html.escape(text))  # brackets may go to a second line on a phone
            return f"<{tag}{mark}>{shown}</{tag}>"

        def cells(tag: str, row: Sequence[str]) -> str:
            scope = "col" if tag == "th" else "row"
            return f'<th scope="{scope}">{_breakable(row[0])}</th>' + "".join(cell(tag, text) for text in row[1:])

        body = "".join(f"<tr>{cells('td', row)}</tr>" for row in self.rows)
        head = f"<thead><tr>{cells('th', self.columns)}</tr></thead>"
        return (
            f'<figure><figcaption>{html.escape(self.caption)}</figcaption><div class="scroll" tabindex="0"><table>{head}'
            f"<tbody>{body}</tbody></table></div></figure>"
        )


def _breakable(name: str) -> str:
    """An arm's name in HTML that may go to a new line after ``+``, ``_`` and ``=``."""
    return re.sub(r"([+_=])", r"\1<wbr>", html.escape(name))


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


def summary_table(comparison: Comparison, inference_steps: int) -> Table:
    """One row per arm: the verdict, the ratios, and what they were computed from, for one number of inference steps."""
    rows, digits = [], _seconds_digits(comparison)
    least = min(abs(run.curve(inference_steps)[-1][1]) for run in comparison.runs)
    places = 2 if least >= 1 else 4  # of distances below 1 two digits after the point say too little
    for name, arm in comparison.arms.items():
        finals = [run.curve(inference_steps)[-1][1] for run in arm.runs.values()]
        by_time = [comparison.ratios(name, inference_steps, time) for time in ("step", "train_seconds")]
        reached = [comparison.crossings(name, inference_steps, time) for time in ("step", "train_seconds")]
        rows.append(
            [
                name,
                comparison.verdict(name, inference_steps),
                *(_spread(ratios, 2, "x") for ratios in by_time),
                _spread({seed: Interval(value, value) for seed, value in enumerate(finals)}, places),
                *(middle(times.values()).show(count) if times else NOTHING for times, count in zip(reached, (0, digits), strict=True)),
                str(len(arm.runs)) + (f" of {len(arm.runs) + len(arm.problems)}" if arm.problems else ""),
            ]
        )
    threshold = comparison.threshold(inference_steps)
    goal = NOTHING if threshold is None else f"{threshold:.3g}"
    return Table(
        f"At {inference_steps} inference steps: how soon each arm reaches the baseline's final {comparison.feature} of {goal} (lower is "
        "better). Median over seeds, least to greatest in brackets",
        ["arm", "verdict", "fewer steps", "less time", f"final {comparison.feature}", "steps to it", "seconds to it", "seeds"],
        rows,
    )


def cost_table(comparison: Comparison) -> Table:
    """What a step costs in each arm, and what its coupling did to the pairs and to the noise."""
    metrics = {
        "step_seconds": ("ms per step", 1000, "", 1),
        "coupling_seconds": ("of it coupling, ms", 1000, "", 2),
        "distance_reduction_percent": ("pair distance reduced by, %", 1, "+", 2),
        "noise_variance_drift": ("noise variance drift", 1, "+", 4),
        "noise_norm_drift": ("noise norm drift", 1, "+", 4),
        "paired_images": ("images paired together", 1, "", 0),
    }
    means: dict[str, dict[str, float | None]] = {}
    for name, arm in comparison.arms.items():
        of_runs = {metric: [value for run in arm.runs.values() if (value := run.mean(metric)) is not None] for metric in metrics}
        means[name] = {metric: median(values) if values else None for metric, values in of_runs.items()}
    reference = means[comparison.baseline]["step_seconds"]
    rows = []
    for name, of_arm in means.items():
        cells = [
            NOTHING if (value := of_arm[metric]) is None else f"{round(value * scale, digits) + 0.0:{sign}.{digits}f}"  # no -0.0000
            for metric, (_, scale, sign, digits) in metrics.items()
        ]
        seconds = of_arm["step_seconds"]
        cells.insert(1, NOTHING if not seconds or not reference else f"{100 * (seconds / reference - 1):+.1f} %")
        rows.append([name, *cells])
    columns = ["arm", *(column for column, *_ in metrics.values())]
    columns.insert(2, "against baseline")
    return Table(
        "What a step costs, and what the coupling did (medians over seeds; drift is 0 for noise that stays standard normal)", columns, rows
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


def seed_table(comparison: Comparison, inference_steps: int) -> Table:
    """Every seed of every arm with its own goal, so that each ratio can be computed again by hand."""
    rows, digits = [], _seconds_digits(comparison)
    for name, arm in comparison.arms.items():
        ratios = [comparison.ratios(name, inference_steps, time) for time in ("step", "train_seconds")]
        for seed, run in arm.runs.items():
            goal, times = comparison.goal(seed, inference_steps), [NOTHING, NOTHING]
            if goal is not None:
                steps, seconds = (crossing(run.curve(inference_steps, time), goal) for time in ("step", "train_seconds"))
                times = [steps.show(1), seconds.show(digits)]
            shown = [values[seed].show(3) if seed in values else NOTHING for values in ratios]
            final, trained = run.curve(inference_steps)[-1][1], f"{run.evaluations[-1]['train_seconds']:.{digits}f}"
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
            "seconds to goal",
            "fewer steps, x",
            "less time, x",
            "steps trained",
            "seconds trained",
        ],
        rows,
    )


def _seconds_digits(comparison: Comparison) -> int:
    """Digits after the point with which seconds of training keep about four that count."""
    longest = max(run.evaluations[-1]["train_seconds"] for run in comparison.runs)
    return 2 if longest < 100 else 1 if longest < 1000 else 0


def curve_table(comparison: Comparison, inference_steps: int, most: int = 10) -> Table:
    """The curves as numbers: each arm's median over seeds at up to ``most`` of the evaluated steps, the last among them."""
    steps = sorted({line["step"] for arm in comparison.arms.values() for run in arm.runs.values() for line in run.evaluations})
    stride = math.ceil(len(steps) / most) if steps else 1
    shown = steps[::-1][::stride][::-1]
    rows = []
    for name, arm in comparison.arms.items():
        curves = [dict(run.curve(inference_steps)) for run in arm.runs.values()]
        values = [[curve[step] for curve in curves if step in curve] for step in shown]
        rows.append([name, *(f"{median(value):.3g}" if value else NOTHING for value in values)])
    return Table(
        f"{comparison.feature} at {inference_steps} inference steps after so many training steps (medians)", ["arm", *map(str, shown)], rows
    )


def arm_table(comparison: Comparison) -> Table:
    """What each arm is: the flags in which the arms differ."""
    configs = {name: run.config for name, arm in comparison.arms.items() for run in (*arm.runs.values(), *arm.unfinished)}
    flags = differing_flags(list(configs.values()))
    rows = [
        [name, *("" if (value := configs.get(name, {}).get(flag)) is None else str(value) for flag in flags)] for name in comparison.arms
    ]
    return Table("The flags in which the arms differ; all others are equal", ["arm", *flags], rows)


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


def _spread(values: Mapping[int, Interval], digits: int, unit: str = "") -> str:
    """``median (least to greatest)``."""
    if not values:
        return NOTHING
    center = middle(values.values()).show(digits)
    center += unit if center != UNKNOWN else ""
    least = Interval(min(value.low for value in values.values()), min(value.high for value in values.values()))
    greatest = Interval(max(value.low for value in values.values()), max(value.high for value in values.values()))
    if len(values) == 1 or least == greatest:
        return center
    return f"{center} ({least.show(digits)} to {greatest.show(digits)})"


def _grid_prompts(config: Mapping[str, Any]) -> list[str]:
    """What a text run's grids are of, an image each; empty for other runs."""
    if one := config.get("validation_prompt"):
        return [one] * int(config.get("num_validation_images") or 1)
    return list(config.get("validation_prompts") or [])


def _grid_words(config: Mapping[str, Any]) -> str:
    """What a run's grids are of, where that is not the data as such."""
    if prompts := list(dict.fromkeys(_grid_prompts(config))):
        return f"Guidance {config.get('guidance_scale')}; row by row: {'; '.join(prompts)}."
    return "In the order of classes." if config.get("class_conditional") else ""


def _sample_grids(comparison: Comparison, most_pixels: int = 1024) -> tuple[str, list[tuple[str, str]]]:
    """The seed that most arms have, with what all its grids are of, and each arm's last grid of it as a data address."""
    from PIL import Image

    grids: dict[int, list[tuple[str, Run, Path]]] = {}
    for name, arm in comparison.arms.items():
        for seed, run in sorted(arm.runs.items()):
            if pictures := sorted((run.folder / "samples").glob("step-[0-9]*.png")):
                grids.setdefault(seed, []).append((name, run, pictures[-1]))
    if not grids:
        return "", []
    seed = max(sorted(grids), key=lambda number: len(grids[number]))
    words = {name: _grid_words(run.config) for name, run, _ in grids[seed]}
    common = next(iter(words.values())) if len(set(words.values())) == 1 else ""
    shown = []
    for name, run, path in grids[seed]:
        try:
            with Image.open(path) as picture:
                spaced = _spaced(picture, len(_grid_prompts(run.config)) or int(run.config.get("eval_batch_size") or 1))
        except OSError:
            raise UserError(f"{path}: no picture that can be read; the report shows it, so repair or delete it", exit_code=1) from None
        spaced.thumbnail((most_pixels, most_pixels))
        data = io.BytesIO()
        spaced.save(data, format="PNG", optimize=True)
        caption = f"{name}, step {int(path.stem.partition('-')[2])}{'' if common else f'. {words[name]}'.rstrip('. ')}"
        shown.append((caption, base64.b64encode(data.getvalue()).decode()))
    return f"Seed {seed}: the same starting noises in every grid, at the end of training. {common}".rstrip(), shown


def _spaced(grid: Image.Image, images: int) -> Image.Image:
    """A grid as square as possible of so many ``images`` with white between them, where dark backgrounds would run together."""
    from PIL import Image

    columns = math.ceil(math.sqrt(images))
    rows = math.ceil(images / columns)
    width, height = grid.width // columns, grid.height // rows
    if (width * columns, height * rows) != grid.size:
        return grid.copy()
    gap = max(1, width // 16)
    spaced = Image.new("RGB", (grid.width + gap * (columns - 1), grid.height + gap * (rows - 1)), "white")
    for row, column in product(range(rows), range(columns)):
        cell = grid.crop((column * width, row * height, (column + 1) * width, (row + 1) * height))
        spaced.paste(cell, (column * (width + gap), row * (height + gap)))
    return spaced


STYLE = """
:root{color-scheme:light dark;--back:#fff;--ink:#1a1a1a;--soft:#666;--line:#d0d0d0;--box:#f5f5f5;--gain:#00694d;--harm:#b34700}
@media(prefers-color-scheme:dark){:root{--back:#16181b;--ink:#e6e6e6;--soft:#a0a0a0;--line:#3c4046;--box:#202327;--gain:#3fcf9f;--harm:#ff9750}}
*{box-sizing:border-box}
body{margin:0 auto;padding:1rem;max-width:76rem;font:1rem/1.5 system-ui,sans-serif;background:var(--back);color:var(--ink)}
h1{font-size:1.4rem;line-height:1.25;margin:.2rem 0;overflow-wrap:anywhere}
h2{font-size:1.1rem;margin:2rem 0 .5rem;border-bottom:1px solid var(--line)}
p,li{max-width:50rem;overflow-wrap:anywhere}
.lead{font-size:1.15rem;font-weight:600;line-height:1.4}
.soft,figcaption{color:var(--soft);font-size:.9rem}
.warning{border-left:4px solid var(--harm);padding:.2rem .8rem;background:var(--box)}
figure{margin:.8rem 0}
.scroll{overflow-x:auto;background:linear-gradient(90deg,var(--back) 40%,transparent) 0 0/2.5rem 100% no-repeat local,
linear-gradient(270deg,var(--back) 40%,transparent) 100% 0/2.5rem 100% no-repeat local,
linear-gradient(270deg,#8889,transparent) 100% 0/1rem 100% no-repeat scroll}
table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{padding:.3rem .7rem;text-align:right;white-space:nowrap;border-bottom:1px solid var(--line)}
small{white-space:nowrap}
thead th{vertical-align:bottom;white-space:normal;border-bottom:2px solid var(--ink)}
th:first-child{text-align:left;position:sticky;left:0;background:var(--back)}
tbody th{font-weight:600}
td[class]{font-weight:700;white-space:normal;min-width:5.5em}
.gain{color:var(--gain)}
.harm{color:var(--harm)}
.figures{display:grid;gap:1rem 2rem;grid-template-columns:repeat(auto-fit,minmax(min(100%,27rem),1fr));align-items:start}
.figures svg{display:block;width:100%;max-width:32rem;height:auto}
.panels{display:grid;gap:.4rem;grid-template-columns:repeat(auto-fill,minmax(min(46%,14rem),1fr));align-items:end}
.panels svg{display:block;width:100%;height:auto}
.figures figure,.panels figure{margin:0}
.panels figcaption{overflow-wrap:anywhere;color:var(--ink);line-height:1.2}
.grids{display:grid;gap:.8rem;grid-template-columns:repeat(auto-fill,minmax(min(46%,16rem),1fr));overflow-wrap:anywhere}
.grids figure{margin:0}
.grids img{width:100%;display:block;border:1px solid var(--line);image-rendering:pixelated;background:#fff}
pre{background:var(--box);padding:.5rem .6rem;margin:.4rem 0;font-size:.8rem;white-space:pre-wrap;overflow-wrap:anywhere}
pre span{white-space:nowrap}
h3{font-size:1rem;margin:1rem 0 .3rem;overflow-wrap:anywhere}
@media(max-width:30rem){body{padding:.7rem}th,td{padding:.3rem .4rem}table{font-size:.82rem}.lead{font-size:1.05rem}
tbody th{white-space:normal;overflow-wrap:anywhere;min-width:6.8rem;max-width:8rem}small{display:block;font-size:.72rem}}
@media print{:root{color-scheme:light;--back:#fff;--ink:#000;--soft:#444;--line:#bbb;--box:#fff;--gain:#000;--harm:#000}
html{font-size:9.5pt}body{max-width:none;padding:0}.scroll{overflow:visible;background:none}
table{font-size:7.5pt}th,td{padding:.1rem .3rem;white-space:normal}tbody th{overflow-wrap:anywhere}th:first-child{position:static}
pre{padding:.2rem 0;border-top:1px solid var(--line)}
figure,tr,pre{break-inside:avoid}h2,h3,p.soft,figcaption{break-after:avoid}small{display:block}
.figures{grid-template-columns:1fr 1fr}.panels{grid-template-columns:repeat(4,1fr)}.grids{grid-template-columns:repeat(3,1fr)}}
"""


def html_report(comparison: Comparison) -> str:
    """The report as one HTML page that needs nothing but itself: no scripts, no addresses."""
    sentences = headline(comparison)
    problems = [problem for arm in comparison.arms.values() for problem in arm.problems]
    warnings = [*comparison.notes, *(f"Not counted: {problem}" for problem in problems)]
    arms = [arm for arm in comparison.arms if arm != comparison.baseline]
    steps, many = comparison.inference_steps, crowded(comparison)
    legend, grids = _sample_grids(comparison)
    validation = validation_table(comparison)

    def figures(legend: str, *drawn: str) -> str:
        explained = f'<p class="soft">{html.escape(legend)}</p>' if legend else ""
        return f'{explained}<div class="figures">' + "".join(f"<figure>{svg}</figure>" for svg in drawn) + "</div>"

    def panels(count: int) -> str:
        drawn = (f"<figure><figcaption>{_breakable(arm)}</figcaption>{arm_figure(comparison, arm, count)}</figure>" for arm in arms)
        return f'<h3>{count} inference steps</h3><div class="panels">{"".join(drawn)}</div>'

    def commands(arm: Arm) -> str:
        lines = (re.sub(r"(?<=\s)(--\S+)", r"<span>\1</span>", html.escape(command)) for command in arm.commands)
        return f"<h3>{_breakable(arm.name)}</h3>" + "".join(f"<pre>{line}</pre>" for line in lines)

    parts = [
        f"<h1>{_breakable(title(comparison))}</h1>",
        f'<p class="soft">{html.escape(setting(comparison))}</p>',
        *(f'<p class="lead">{html.escape(sentence)}</p>' for sentence in sentences),
        *(f'<p class="warning">{html.escape(text)}</p>' for text in warnings),
        "<h2>How many steps and seconds it saves</h2>",
        *(summary_table(comparison, count).html() for count in steps),
        f'<p class="soft">{html.escape(RULE)}</p>',
        figures(RATIOS_LEGEND, *(ratio_figure(comparison, count) for count in steps))
        if arms and comparison.arms[comparison.baseline].runs
        else "",
        f"<h2>{html.escape(comparison.feature)} while training</h2>",
        figures(MEDIANS_LEGEND if many else SEEDS_LEGEND, *(curve_figure(comparison, count) for count in steps)),
        f'<p class="soft">Each arm beside {html.escape(comparison.baseline)}, against training steps. {SEEDS_LEGEND}</p>' if many else "",
        *(panels(count) for count in (steps if many else [])),
        "<h2>Quality against inference steps</h2>" + figures("", inference_figure(comparison)) if len(steps) > 1 else "",
    ]
    if grids:
        parts.append(f'<h2>Samples</h2><p class="soft">{html.escape(legend)}</p>')
        cells = (
            f'<figure><img alt="samples of {html.escape(name)}" src="data:image/png;base64,{data}"><figcaption>{_breakable(name)}'
            "</figcaption></figure>"
            for name, data in grids
        )
        parts.append(f'<div class="grids">{"".join(cells)}</div>')
    parts += [
        "<h2>What it costs and what it does</h2>",
        cost_table(comparison).html(),
        validation.html() if validation else "",
        "<h2>The arms</h2>",
        arm_table(comparison).html(),
        "<h2>Every seed</h2>",
        *(seed_table(comparison, count).html() for count in steps),
        "<h2>How to read this</h2>",
        "<ul>" + "".join(f"<li>{html.escape(text)}</li>" for text in reading_guide(comparison)) + "</ul>",
        "<h2>Commands</h2>",
        *(commands(arm) for arm in comparison.arms.values()),
    ]
    body = "\n".join(part for part in parts if part)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{html.escape(sentences[0])}</title><style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def markdown_report(comparison: Comparison) -> str:
    """The report's words and numbers in Markdown; the curves are tables."""
    steps = comparison.inference_steps
    problems = [problem for arm in comparison.arms.values() for problem in arm.problems]
    validation = validation_table(comparison)
    parts = [
        f"# {title(comparison)}",
        "\n".join(headline(comparison)),
        setting(comparison),
        *(f"> {text}" for text in comparison.notes),
        *(f"> Not counted: {problem}" for problem in problems),
        "## How many steps and seconds it saves",
        *(summary_table(comparison, count).markdown() for count in steps),
        f"## {comparison.feature} while training",
        *(curve_table(comparison, count).markdown() for count in steps),
        "## What it costs and what it does",
        cost_table(comparison).markdown(),
        *([validation.markdown()] if validation else []),
        "## The arms",
        arm_table(comparison).markdown(),
        "## Every seed",
        *(seed_table(comparison, count).markdown() for count in steps),
        "## How to read this",
        "\n".join(f"- {text}" for text in reading_guide(comparison)),
        "## Commands",
        *(f"{arm.name}:\n\n```\n{chr(10).join(arm.commands)}\n```" for arm in comparison.arms.values()),
    ]
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def summary(comparison: Comparison) -> str:
    """What a terminal shows: the sentences and the tables of ratios."""
    tables = [summary_table(comparison, count).markdown() for count in comparison.inference_steps]
    return "\n".join([*headline(comparison), "", *tables])


def write_report(comparison: Comparison, folder: Path) -> Path:
    """Writes ``report.html`` and ``report.md`` into ``folder``, each complete or not at all; returns the path of the first.

    Raises:
        UserError: (exit code 1) the folder cannot be written.
    """
    texts = {"report.md": markdown_report(comparison), "report.html": html_report(comparison)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            partial = folder / f"{PARTIAL}{name}"
            partial.write_text(text, encoding="utf-8")
            replace(partial, folder / name)
    except OSError as error:
        raise UserError(f"the report cannot be written to {folder}: {error.strerror or error}", exit_code=1) from None
    return folder / "report.html"
