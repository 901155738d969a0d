"""A report's figures, each an SVG element for a page: curves, ratios, quality against inference steps, and losses.

They take the page's text color and refer to nothing outside. All are drawn at one scale, so that their letters have one size.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

from markupsafe import Markup

from immiscible.reports.arms import Report
from immiscible.reports.comparison import Comparison
from immiscible.reports.ratios import UNKNOWN, Curve

WIDTH, PANEL_WIDTH = 4.4, 2.2  # inches of a figure and of a small panel
CROWD = 3  # arms beside the baseline of which every seed can still be told apart in one figure
MOST_MARKS = 8  # on a median's line
INK = "#123457"  # stands for the page's text color, light or dark
# Okabe and Ito's colors, which color-blind readers tell apart; dashes and markers do it in print. No two of 66 arms share all three.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DASHES: tuple[Any, ...] = ("-", "--", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (3, 1)), (0, (1, 1)))
MARKERS = "os^DvP*X<>h"
FIGURE_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "immiscible",
    "text.parse_math": False,  # an arm may be called $x
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "legend.frameon": False,
    "legend.fontsize": 9,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color"), INK),
}


def crowded(report: Report) -> bool:
    """Whether the arms are too many for one figure with every seed; `curve_figure` then holds medians, `arm_figure` the seeds."""
    return len(report.arms) - 1 > CROWD


def looks(report: Report) -> dict[str, dict[str, Any]]:
    """Color, dashes and marker of each arm; the baseline has the page's text color."""
    others = [name for name in report.arms if name != report.baseline]
    chosen: dict[str, dict[str, Any]] = {report.baseline: {"color": INK, "linestyle": "-", "marker": "x"}}
    for number, name in enumerate(others):
        again = number // len(COLORS)  # a color that comes again comes with the next dashes
        dashes, marker = DASHES[(number + again) % len(DASHES)], MARKERS[number % len(MARKERS)]
        chosen[name] = {"color": COLORS[number % len(COLORS)], "linestyle": dashes, "marker": marker}
    return chosen


def _svg(draw: Callable[[Any], None], title: str, height: float, width: float = WIDTH) -> Markup:
    """What ``draw(axes)`` draws, ``width`` x ``height`` inches, as an SVG element with ``title`` for those who do not see it."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context(FIGURE_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure.subplots())
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    svg = text.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg)
    svg = re.sub(r' id="[A-Za-z0-9]+_\d+"', "", svg)  # groups' names, which would be repeated from figure to figure
    size = re.search(r'viewBox="([^"]*)"', svg)
    start = Markup('<svg role="img" aria-label="{}" viewBox="{}">').format(title, size[1] if size else "")
    return start + Markup(svg[svg.index(">") + 1 :].replace(INK, "currentColor"))


def _plain_ticks(axis: Any, ticks: Sequence[float] | None = None) -> None:
    """Ticks of a logarithmic axis as plain numbers: where ``ticks`` says or at 1, 2 and 5 times powers of ten.

    Where these are more than seven the powers alone, where they are less than three equally far apart.
    """
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

    def seen(locator: Any) -> list[float]:
        low, high = axis.get_view_interval()
        return [tick for tick in locator.tick_values(low, high) if low <= tick <= high]

    if ticks is None:
        ticks = seen(LogLocator(subs=(1, 2, 5)))
        if len(ticks) > 7:
            ticks = seen(LogLocator())
        elif len(ticks) < 3:
            ticks = seen(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _wrapped(name: str, width: int) -> str:
    """An arm's name on lines of ``width`` characters where it can be broken, after ``+``, ``_``, ``=`` or a space."""
    lines = [""]
    for piece in re.findall(r"[^+_= ]*[+_= ]*", name):
        if lines[-1] and len(lines[-1] + piece.rstrip()) > width:
            lines.append("")
        lines[-1] += piece
    return "\n".join(line.rstrip() for line in lines)


def _columns(labels: Sequence[str]) -> int:
    return 2 if max(map(len, labels)) <= 20 else 1


def _legend_height(labels: Sequence[str]) -> float:
    """Inches that `_legend` needs below the axes."""
    return 0.19 * math.ceil(sum(label.count("\n") + 1 for label in labels) / _columns(labels))


def _legend(axes: Any) -> None:
    lines, labels = axes.get_legend_handles_labels()
    if labels:
        axes.figure.legend(lines, labels, loc="outside lower left", ncol=_columns(labels), handlelength=3.2, columnspacing=1.2)


def _label(name: str) -> str:
    return _wrapped(name, 44)


def _draw_seeds(axes: Any, comparison: Comparison, name: str, inference_steps: int) -> None:
    """Every run's curve of an arm, thin, and ticks where its seeds reach the baseline's final value."""
    arm, color, threshold = comparison.arms[name], looks(comparison)[name]["color"], comparison.threshold(inference_steps)
    for runs, dashes, width in ((arm.runs.values(), "-", 0.6), (arm.unfinished, ":", 1.2)):
        for run in runs:
            axes.plot(*zip(*run.curve(inference_steps), strict=True), color=color, linewidth=width, alpha=0.7, linestyle=dashes)
    times = [time.low for time in comparison.crossings(name, inference_steps).values() if time.low == time.high]
    if threshold is not None:
        axes.plot(times, [threshold] * len(times), color=color, marker="|", markersize=9, markeredgewidth=1.5, linestyle="none")


def _draw_median(axes: Any, name: str, curves: Sequence[Curve], look: Mapping[str, Any]) -> None:
    """The median of an arm's curves, thick, at the steps that all of them have."""
    by_step: dict[float, list[float]] = {}
    for step, value in (point for curve in curves for point in curve):
        by_step.setdefault(step, []).append(value)
    shared = sorted(step for step, values in by_step.items() if len(values) == len(curves))
    medians = [median(by_step[step]) for step in shared]
    stride = math.ceil(len(shared) / MOST_MARKS) or 1
    marked = ((len(shared) - 1) % stride, stride)  # counted from the last point, which always has its mark
    axes.plot(shared, medians, linewidth=2, markersize=5, markevery=marked, label=_label(name), **look)


def _draw_goal(axes: Any, comparison: Comparison, inference_steps: int) -> None:
    threshold = comparison.threshold(inference_steps)
    if threshold is not None:
        label = f"{comparison.baseline}'s final value, {threshold:.3g}"
        axes.axhline(threshold, color=INK, linewidth=0.8, linestyle=(0, (4, 3)), label=_label(label))


def curve_figure(comparison: Comparison, inference_steps: int) -> Markup:
    """Distance against training steps: thin lines are seeds, left out where `crowded`, thick ones medians, dashes the goal."""

    def draw(axes: Any) -> None:
        for name in comparison.arms:
            if not crowded(comparison):
                _draw_seeds(axes, comparison, name, inference_steps)
            _draw_median(axes, name, comparison.curves(name, inference_steps), looks(comparison)[name])
        _draw_goal(axes, comparison, inference_steps)
        axes.set(yscale="log", xlim=(0, None), xlabel="training steps", ylabel=f"{comparison.feature} (log)")
        axes.set_title(f"{inference_steps} inference steps", loc="left")
        axes.grid(axis="y", alpha=0.2, linewidth=0.6)
        _plain_ticks(axes.yaxis)
        _legend(axes)

    title = f"{comparison.feature} at {inference_steps} inference steps against training steps"
    return _svg(draw, title, 2.9 + _legend_height([*map(_label, comparison.arms), ""]))


def arm_figure(comparison: Comparison, arm: str, inference_steps: int) -> Markup:
    """One arm's seeds and median beside the baseline's, small and untitled; such figures of all arms share their axes."""
    curves = [run.curve(inference_steps) for run in comparison.runs]
    values = [value for curve in curves for _, value in curve if 0 < value < math.inf]

    def draw(axes: Any) -> None:
        for name in (comparison.baseline, arm):
            _draw_seeds(axes, comparison, name, inference_steps)
            _draw_median(axes, name, comparison.curves(name, inference_steps), looks(comparison)[name])
        _draw_goal(axes, comparison, inference_steps)
        axes.set(yscale="log", xlim=(0, max(curve[-1][0] for curve in curves)))
        if values:
            axes.set_ylim(min(values) / 1.1, max(values) * 1.1)
        axes.locator_params(axis="x", nbins=4)
        axes.grid(axis="y", alpha=0.2, linewidth=0.6)
        _plain_ticks(axes.yaxis)

    title = f"{arm} and {comparison.baseline}: {comparison.feature} at {inference_steps} inference steps against training steps"
    return _svg(draw, title, 1.6, PANEL_WIDTH)


def ratio_figure(comparison: Comparison, inference_steps: int) -> Markup:
    """The acceleration ratios: a mark per seed, a bar from the least to the greatest that are known, arrows for bounds, a line at 1."""
    look = looks(comparison)
    others = [name for name in comparison.arms if name != comparison.baseline]
    ratios = {(name, steps): comparison.ratios(name, steps).values() for name in others for steps in comparison.inference_steps}
    ends = [end for values in ratios.values() for value in values for end in (value.low, value.high) if 0 < end < math.inf]
    labels = [_wrapped(name, 22) for name in others]

    def draw(axes: Any) -> None:
        axes.axvline(1, color=INK, linewidth=1)
        for height, name in enumerate(others):
            color, values = look[name]["color"], ratios[name, inference_steps]
            known = [value.low for value in values if value.low == value.high]
            axes.plot(known, [height] * len(known), color=color, linewidth=1, marker=look[name]["marker"], markersize=6, alpha=0.8)
            above = [value.low for value in values if value.low < value.high and value.low > 0]
            axes.plot(above, [height] * len(above), color=color, linestyle="none", marker=">", markersize=8, fillstyle="none")
            below = [value.high for value in values if value.low < value.high < math.inf]
            axes.plot(below, [height] * len(below), color=color, linestyle="none", marker="<", markersize=8, fillstyle="none")
            if not known + above + below:
                axes.text(1, height, f" {UNKNOWN if values else 'no finished run'}", verticalalignment="center")
        axes.set(xscale="log", ylim=(len(others) - 0.4, -0.6))
        axes.set_xlabel("times sooner in training steps (left of 1: harm)", loc="right")  # wider than the axes beside long names
        axes.set_xlim(min([0.8, *ends]) / 1.08, max([1.25, *ends]) * 1.08)
        axes.set_yticks(range(len(others)), labels)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x", alpha=0.2, linewidth=0.6)
        axes.set_title(f"{inference_steps} inference steps", loc="left")
        _plain_ticks(axes.xaxis)

    title = f"Ratio of training steps per seed at {inference_steps} inference steps"
    return _svg(draw, title, 0.8 + 0.19 * sum(1.4 + label.count("\n") for label in labels))


def inference_figure(comparison: Comparison) -> Markup:
    """The last distance against the number of inference steps, lines as in `curve_figure`."""
    look, steps = looks(comparison), comparison.inference_steps

    def draw(axes: Any) -> None:
        for name, arm in comparison.arms.items():
            finals = [[run.curve(count)[-1][1] for count in steps] for run in arm.runs.values()]
            for values in [] if crowded(comparison) else finals:
                axes.plot(steps, values, color=look[name]["color"], linewidth=0.6, alpha=0.7)
            if finals:
                medians = [median(values) for values in zip(*finals, strict=True)]
                axes.plot(steps, medians, linewidth=2, markersize=5, label=_label(name), **look[name])
        axes.set(xscale="log", yscale="log", xlabel="inference steps (log)", ylabel=f"{comparison.feature} at the end (log)")
        axes.grid(axis="y", alpha=0.2, linewidth=0.6)
        _plain_ticks(axes.xaxis, steps)
        _plain_ticks(axes.yaxis)
        _legend(axes)

    title = f"{comparison.feature} at the end of training against inference steps"
    return _svg(draw, title, 2.7 + _legend_height([*map(_label, comparison.arms)]))


def loss_figure(report: Report, curves: Mapping[str, Sequence[Curve]]) -> Markup:
    """Each arm's losses against training steps: thin lines are seeds, left out where `crowded`, thick ones medians."""
    look = looks(report)

    def draw(axes: Any) -> None:
        for name, of_arm in curves.items():
            for curve in [] if crowded(report) else of_arm:
                axes.plot(*zip(*curve, strict=True), color=look[name]["color"], linewidth=0.6, alpha=0.7)
            _draw_median(axes, name, of_arm, look[name])
        axes.set(yscale="log", xlim=(0, None), xlabel="training steps", ylabel="training loss (log)")
        axes.grid(axis="y", alpha=0.2, linewidth=0.6)
        _plain_ticks(axes.yaxis)
        _legend(axes)

    return _svg(draw, "Training loss against training steps", 2.7 + _legend_height([*map(_label, curves)]))
