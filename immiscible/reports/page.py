"""A comparison as a page: one self-contained HTML file, from a template that escapes what it is given, and one Markdown file.

What the pages of other reports need too is here as well.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from immiscible.errors import UserError
from immiscible.files import PARTIAL, replace
from immiscible.reports.arms import Report
from immiscible.reports.comparison import Comparison
from immiscible.reports.evidence import evidence_table
from immiscible.reports.figures import arm_figure, crowded, curve_figure, inference_figure, ratio_figure
from immiscible.reports.ratios import GAIN, HARM, NO_EFFECT, RULE, UNCLEAR
from immiscible.reports.samples import samples_of
from immiscible.reports.sentences import headline, reading_guide, setting, title
from immiscible.reports.tables import (
    arm_table,
    cost_table,
    curve_table,
    guidance_table,
    held_out_table,
    metric_table,
    seed_table,
    summary_table,
    validation_table,
)
from immiscible.training.markdown import fenced, inline, line

MARKS = {word: word[2:].replace(" ", "-") for word in (GAIN, HARM, UNCLEAR, NO_EFFECT)}  # the class of a verdict's cell


def html_report(comparison: Comparison) -> str:
    """The report as one HTML page that needs nothing but itself: no scripts, no addresses."""
    steps, others = comparison.inference_steps, [arm for arm in comparison.arms if arm != comparison.baseline]
    drawn: dict[str, Any] = {
        "ratio_figures": [ratio_figure(comparison, count) for count in steps if others and comparison.arms[comparison.baseline].runs],
        "curve_figures": [curve_figure(comparison, count) for count in steps],
        "panels": {count: {arm: arm_figure(comparison, arm, count) for arm in others} for count in (steps if crowded(comparison) else [])},
        "inference_figure": inference_figure(comparison) if len(steps) > 1 else None,
        "samples": samples_of(comparison),
    }
    return template("page.html.j2").render(
        title=title(comparison),
        sentences=headline(comparison),
        setting=setting(comparison),
        warnings=warnings(comparison),
        baseline=comparison.baseline,
        feature=comparison.feature,
        rule=RULE,
        seconds=comparison.clock.why,
        summaries=[summary_table(comparison, count) for count in steps],
        evidence=[evidence_table(comparison, count) for count in steps],
        guidance=guidance_table(comparison),
        metrics=[table for count in steps if (table := metric_table(comparison, count))],
        costs=cost_table(comparison),
        held_out=[table for table in (held_out_table(comparison), validation_table(comparison)) if table],
        arms=arm_table(comparison),
        seeds=[seed_table(comparison, count) for count in steps],
        guide=reading_guide(comparison),
        commands={arm.name: arm.commands for arm in comparison.arms.values()},
        **drawn,
    )


def template(name: str) -> Template:
    """A page's template, with what those of all pages use."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"pieces": _pieces, "bracketed": _bracketed, "flags_apart": _flags_apart}
    environment.globals["marks"] = MARKS
    return environment.get_template(name)


def _pieces(name: str) -> list[str]:
    """An arm's name where it may go to a new line: after ``+``, ``_`` and ``=``."""
    return re.split(r"(?<=[+_=])", name)


def _bracketed(cell: str) -> tuple[str, str]:
    """A cell's text and what it has in brackets at its end, which may go to a second line on a phone."""
    found = re.fullmatch(r"(.*?) (\(.*\))", cell)
    return (found[1], found[2]) if found else (cell, "")


def _flags_apart(command: str) -> list[tuple[str, bool]]:
    """A command's text in pieces, and which of them are flags, in which no line breaks."""
    return [(text, number % 2 == 1) for number, text in enumerate(re.split(r"(?<=\s)(--\S+)", command))]


def warnings(report: Report) -> list[str]:
    """What a reader must know before the numbers."""
    return [*report.notes, *(f"Not counted: {problem}" for arm in report.arms.values() for problem in arm.problems)]


def markdown_report(comparison: Comparison) -> str:
    """The report's words and numbers in Markdown, names escaped; the curves are tables."""
    steps = comparison.inference_steps
    guidance = guidance_table(comparison)
    metrics = [table.markdown() for count in steps if (table := metric_table(comparison, count))]
    held_out = [table.markdown() for table in (held_out_table(comparison), validation_table(comparison)) if table]
    parts = [
        f"# {inline(title(comparison))}",
        "\n".join(map(line, headline(comparison))),
        line(setting(comparison)),
        *(f"> {line(text)}" for text in warnings(comparison)),
        "## How many steps and seconds it saves",
        line(comparison.clock.why),
        *(summary_table(comparison, count).markdown() for count in steps),
        *(evidence_table(comparison, count).markdown() for count in steps),
        f"## {inline(comparison.feature)} while training",
        *(curve_table(comparison, count).markdown() for count in steps),
        *(["## Quality against guidance", guidance.markdown()] if guidance else []),
        *(["## Other metrics", *metrics] if metrics else []),
        "## What it costs and what it does",
        cost_table(comparison).markdown(),
        *held_out,
        "## The arms",
        arm_table(comparison).markdown(),
        "## Every seed",
        *(seed_table(comparison, count).markdown() for count in steps),
        "## How to read this",
        "\n".join(f"- {line(text)}" for text in reading_guide(comparison)),
        *commands(comparison),
    ]
    return markdown_page(parts)


def commands(report: Report) -> list[str]:
    """The parts of a Markdown page that hold every arm's commands."""
    return ["## Commands", *(f"{line(arm.name)}:\n\n{fenced(chr(10).join(arm.commands))}" for arm in report.arms.values())]


def markdown_page(parts: Sequence[str]) -> str:
    """A Markdown page of these parts, with an empty line between any two."""
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def summary(comparison: Comparison) -> str:
    """What a terminal shows: the sentences and the tables of ratios."""
    tables = [summary_table(comparison, count).markdown() for count in comparison.inference_steps]
    return "\n".join([*headline(comparison), comparison.clock.why, "", *tables])


def write_report(comparison: Comparison, folder: Path) -> Path:
    """Writes a comparison as `write_pages` does."""
    return write_pages(folder, html=html_report(comparison), markdown=markdown_report(comparison))


def write_pages(folder: Path, *, html: str, markdown: str) -> Path:
    """Writes ``report.html`` and ``report.md`` into ``folder``, each complete or not at all; returns the path of the first.

    Raises:
        UserError: (exit code 1) the folder cannot be written.
    """
    texts = {"report.md": markdown, "report.html": html}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            partial = folder / f"{PARTIAL}{name}"
            partial.write_text(text, encoding="utf-8")
            replace(partial, folder / name)
    except OSError as error:
        raise UserError(f"the report cannot be written to {folder}: {error.strerror or error}", exit_code=1) from None
    return folder / "report.html"
