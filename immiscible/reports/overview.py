"""Runs that were not measured -> what there is of them: losses, times and samples, as an HTML and a Markdown file.

Nothing here says which arm is better: that takes the distances of a `immiscible.reports.comparison.Comparison`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from immiscible.reports.arms import Arm, Report, chosen_baseline, notes_on_images
from immiscible.reports.figures import crowded, loss_figure
from immiscible.reports.page import commands, markdown_page, template, warnings, write_pages
from immiscible.reports.ratios import Curve, Interval
from immiscible.reports.runs import command_of, measured_again, read_run, script_of
from immiscible.reports.samples import samples_of
from immiscible.reports.sentences import trained_on
from immiscible.reports.tables import Table, arm_table, median_table, spread
from immiscible.training.markdown import inline, line

logger = logging.getLogger(__name__)

MOST_POINTS = 200  # of a curve of losses
CAUTION = (
    "Losses of arms of different weighting or coupling are not comparable: an assigned noise makes the loss lower without the samples "
    "being better."
)


def look_over(arms: Mapping[str, Sequence[Path]], *, baseline: str | None = None) -> Report:
    """Reads the arms' runs, of which all count, finished or not.

    Args:
        arms: folders by the arm's name, in the order in which they are to be shown.
        baseline: the arm that is drawn in the page's text color; by default the first.

    Raises:
        UserError: what `read_run` raises; two runs of one seed in an arm; an unknown baseline.
    """
    report = Report({name: Arm(name) for name in arms}, chosen_baseline(arms, baseline))
    for name, folders in arms.items():
        for run in map(read_run, folders):
            report.arms[name].count(run)
            report.arms[name].commands.append(command_of(run.config, script_of(run)))
            if not run.finished:
                asked, reached = run.config.get("max_train_steps"), run.logged("step")[-1:]
                where = f"at step {reached[0]:.0f}" + (f" of {asked}" if asked else "") if reached else "before its first line"
                report.notes.append(f"{run.folder.name} is not finished: its log ends {where}.")
    report.notes += notes_on_images(report)
    for text in report.notes:
        logger.warning("%s", text)
    return report


def sentences(report: Report) -> list[str]:
    """What this report can say and what it cannot, and what it would take."""
    return [
        "No run was measured while it trained, so nothing here says which arm is better.",
        f"For distances train each run again with --eval_steps, as {measured_again(report.runs[0].folder)}.",
        report.clock.why,
    ]


def title(report: Report, most: int = 4) -> str:
    """Whose losses, times and samples these are; more than ``most`` arms are counted, not named."""
    names = list(report.arms)
    return f"{', '.join(names) if len(names) <= most else f'{len(names)} arms'}: losses, times and samples"


def totals_table(report: Report) -> Table:
    """How far each arm went, how long it took, and its last loss."""
    clock = report.clock
    trained, per_step = f"{clock.unit} trained", f"{clock.prefix}ms per step"
    columns: dict[str, list[list[float]]] = {"steps trained": [], "images seen": [], trained: [], per_step: [], "last loss": []}
    for arm in report.arms.values():
        runs = arm.runs.values()
        columns["steps trained"].append([step for run in runs for step in run.logged("step")[-1:]])
        columns["images seen"].append([step * run.images_a_step for run in runs for step in run.logged("step")[-1:]])
        columns[trained].append([seconds for run in runs for seconds in run.logged(clock.total)[-1:]])
        columns[per_step].append([1000 * seconds for run in runs if (seconds := run.mean(clock.step)) is not None])
        columns["last loss"].append([loss for run in runs for loss in run.logged("loss")[-1:]])
    digits = {name: 0 if name in ("steps trained", "images seen") else _digits(values) for name, values in columns.items()}
    rows = []
    for number, (name, arm) in enumerate(report.arms.items()):
        known = {column: {seed: Interval(value, value) for seed, value in enumerate(values[number])} for column, values in columns.items()}
        rows.append([name, str(len(arm.runs)), *(spread(values, digits[column]) for column, values in known.items())])
    return Table(
        "Median over seeds, least to greatest in brackets; times are without sampling and saving; the last loss is the mean since the line "
        "before it in metrics.jsonl",
        ["arm", "seeds", *columns],
        rows,
    )


def _digits(values: Sequence[Sequence[float]]) -> int:
    """Digits after the point with which the least of these numbers keeps three that count."""
    least = min((abs(value) for of_arm in values for value in of_arm if value and math.isfinite(value)), default=1.0)
    return min(max(2 - math.floor(math.log10(least)), 0), 9)


def loss_curves(report: Report) -> dict[str, list[Curve]]:
    """The losses of each arm's runs, neighboring lines of their logs taken together so that no curve has more than `MOST_POINTS`."""
    together = math.ceil(max(len(run.metrics) for run in report.runs) / MOST_POINTS) or 1
    return {name: [curve for run in arm.runs.values() if (curve := run.losses(together))] for name, arm in report.arms.items()}


def html_report(report: Report) -> str:
    """The report as one HTML page that needs nothing but itself."""
    curves = loss_curves(report)
    return template("overview.html.j2").render(
        title=title(report),
        setting=trained_on(report),
        sentences=sentences(report),
        warnings=warnings(report),
        totals=totals_table(report),
        caution=CAUTION,
        lines="Medians over seeds." if crowded(report) else "Thin: every seed. Thick: the median of an arm.",
        figure=loss_figure(report, curves) if any(curves.values()) else None,
        samples=samples_of(report),
        arms=arm_table(report),
        commands={arm.name: arm.commands for arm in report.arms.values()},
    )


def markdown_report(report: Report) -> str:
    """The report's words and numbers in Markdown; the curves are a table."""
    return markdown_page(
        [
            f"# {inline(title(report))}",
            "\n".join(map(line, sentences(report))),
            line(trained_on(report)),
            *(f"> {line(text)}" for text in warnings(report)),
            "## How far it went",
            totals_table(report).markdown(),
            "## Loss while training",
            line(CAUTION),
            median_table("Training loss after so many steps (medians)", loss_curves(report)).markdown(),
            "## The arms",
            arm_table(report).markdown(),
            *commands(report),
        ]
    )


def summary(report: Report) -> str:
    """What a terminal shows."""
    return "\n".join([*sentences(report), "", totals_table(report).markdown(), CAUTION])


def write_report(report: Report, folder: Path) -> Path:
    """Writes the report as `write_pages` does."""
    return write_pages(folder, html=html_report(report), markdown=markdown_report(report))
