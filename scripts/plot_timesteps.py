"""Draws a noise process with SpeeD's three areas, the timestep laws and the loss weightings on it: look before you train.

    python scripts/plot_timesteps.py --ddpm_beta_schedule scaled_linear --timestep_sampling uniform asymmetric --output laws.png

A law or weighting that is not asked for by name is left out where it does not apply; laws that change in a run are drawn as they end.
With --increments it draws and tabulates what the areas come from instead, the process increments of SpeeD's theorem 1 and table 1:

    python scripts/plot_timesteps.py --increments ddpm vp ve edm flow --output increments.png
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from immiscible.choices import used_options
from immiscible.errors import UserError, run_script
from immiscible.increments import ContinuousProcess, Increments, ddpm, edm, flow, increments, ve, vp
from immiscible.method import naming_flags
from immiscible.process import BETA_SCHEDULES, PREDICTION_TYPES, NoiseProcess, as_process
from immiscible.schedulers import build_scheduler
from immiscible.timesteps import TIMESTEP_SAMPLINGS, TimestepSampler, threshold, timestep_sampler
from immiscible.weighting import LOSS_WEIGHTINGS, loss_weights

AREAS = {"acceleration": "tab:green", "deceleration": "tab:orange", "convergence": "tab:red"}
SIX = ("tab:gray", "tab:blue", "tab:purple", "tab:cyan", "tab:olive", "tab:pink")  # apart from the areas' colors
INCREMENTS = ("ddpm", "vp", "ve", "edm", "flow")
RATIOS = (10, 100, 1000)  # r, one magnitude after the other; the paper names none
SHADED_RATIO = 100
LAW_FLAGS = (
    *("noise_process", "prediction_type", "timestep_sampling", "loss_weighting"),
    *("asymmetric_k", "asymmetric_r", "asymmetric_tau", "change_aware_lambda"),
)
STYLES = ("-", "-", "--", "-.", ":", "--")  # so that curves that coincide are all seen
TWELVE = (*STYLES, *STYLES[2:], *STYLES[:2])  # another for each color when it comes again
LAWS = ("uniform", "asymmetric", "asymmetric_released", "logit_normal")  # drawn where none are named
WEIGHTINGS = ("none", "change_aware", "change_aware_released", "min_snr", "snr", "p2")
IN_THE_END = 10**9  # an optimizer step by which laws that change have changed


class Shown(NamedTuple):
    """The increments of one process: from which time each starts, its closed form, and the process of T steps where that is what it is."""

    title: str
    times: Tensor
    steps: Increments
    closed: ContinuousProcess | None
    process: NoiseProcess | None = None
    against: str = ""  # what the closed form is for the process


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--noise_process", choices=list(PREDICTION_TYPES), default="ddpm")
    parser.add_argument("--ddpm_num_steps", type=int, default=1000, help="T, the number of training timesteps (default 1000)")
    parser.add_argument("--ddpm_beta_schedule", choices=BETA_SCHEDULES, default="linear")
    parser.add_argument("--ddpm_beta_start", type=float, default=1e-4)
    parser.add_argument("--ddpm_beta_end", type=float, default=0.02)
    parser.add_argument("--prediction_type", help="what the weights are for (default: epsilon, or flow_prediction under flow)")
    parser.add_argument("--image_scale", type=float, default=1.0, help="below 1 every step is noisier (default 1)")
    parser.add_argument(
        "--timestep_sampling", nargs="+", metavar="LAW", help=f"of {', '.join(TIMESTEP_SAMPLINGS)} (default: {' '.join(LAWS)})"
    )
    parser.add_argument(
        "--loss_weighting", nargs="+", metavar="WEIGHTING", help=f"of {', '.join(LOSS_WEIGHTINGS)} (default: {' '.join(WEIGHTINGS)})"
    )
    parser.add_argument("--asymmetric_k", type=float, default=5.0, help="how much more often steps before tau are drawn (default 5)")
    parser.add_argument("--asymmetric_r", type=float, help="tau is where at most 1/r of the image's variance is left (default 143.55)")
    parser.add_argument("--asymmetric_tau", type=int, help="tau itself, in the place of r")
    parser.add_argument("--change_aware_lambda", type=float, default=0.6, help="the largest change-aware weight (default 0.6)")
    parser.add_argument(
        "--increments",
        nargs="*",
        choices=INCREMENTS,
        help="the process increments of these instead (default: all): ddpm; vp with the ends of the betas times T; ve and edm from and to "
        "Karras et al.'s sigmas; flow",
    )
    parser.add_argument(
        "--sigma_data", type=float, help="the images' deviation, for what stands for tau under ve, edm and flow (default 1)"
    )
    parser.add_argument("--output", type=Path, default=Path("timesteps.png"), help="the picture (default timesteps.png)")
    args = parser.parse_args(argv)
    check_unused(args, parser)
    if args.increments is not None:
        args.increments = list(dict.fromkeys(args.increments or INCREMENTS))
    return args


def check_unused(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Refuses flags that what is drawn does not read."""

    def given(name: str) -> bool:
        return getattr(args, name) != parser.get_default(name)

    if args.increments is None:
        if given("sigma_data"):
            raise UserError("--sigma_data is for --increments ve, edm or flow: laws and weightings are for data of unit variance")
        for name in ("ddpm_beta_schedule", "ddpm_beta_start", "ddpm_beta_end"):
            if given(name) and args.noise_process == "flow":
                raise UserError(f"--{name} is of --noise_process ddpm, and a flow has no betas: leave one of them out")
        return
    names = set(args.increments or INCREMENTS)
    for name in LAW_FLAGS:
        if given(name):
            raise UserError(f"--{name} is for laws and weightings, which --increments does not draw: leave one of them out")
    readers = {"sigma_data": {"ve", "edm", "flow"}, "ddpm_beta_schedule": {"ddpm"}, "image_scale": {"ddpm"}}
    for name, users in readers.items():
        if given(name) and not names & users:
            users_named = " or ".join(process for process in INCREMENTS if process in users)
            raise UserError(f"--{name} is for --increments {users_named}, not for {' and '.join(args.increments)}")


def process_of(args: argparse.Namespace, kind: str, prediction_type: str | None = None) -> NoiseProcess:
    scheduler = build_scheduler(
        kind,
        num_train_timesteps=args.ddpm_num_steps,
        beta_schedule=args.ddpm_beta_schedule,
        beta_start=args.ddpm_beta_start,
        beta_end=args.ddpm_beta_end,
        prediction_type=prediction_type,
        image_scale=args.image_scale,
    )
    return as_process(scheduler)


def save(figure: Any, output: Path) -> None:
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(output, dpi=110)
    except (OSError, ValueError) as error:
        raise UserError(f"--output {output} cannot be written: {error}", exit_code=1) from error
    print(f"picture in {output}")


def build_each(names: Sequence[str] | None, usual: Sequence[str], build: Callable[[str], Any]) -> dict[str, Any]:
    """The named entries, or those of the usual ones that apply to this process and these options."""
    built = {}
    for name in names or usual:
        try:
            with naming_flags():
                built[name] = build(name)
        except UserError as error:
            if names:
                raise
            print(f"{name} left out: {error}")
    return built


def draw(
    process: NoiseProcess, tau: int, laws: dict[str, TimestepSampler], weights: dict[str, Tensor], prediction_type: str, title: str
) -> Any:
    """The figure of three panels over the timestep index."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (top, middle, bottom) = pyplot.subplots(3, 1, figsize=(13, 10), sharex=True, layout="constrained")
    figure.suptitle(title, fontsize=13)
    peak, steps = process.peak_step(), range(process.num_timesteps)
    for (start, stop), (name, color) in zip(process.areas(tau), AREAS.items(), strict=True):
        if start == stop:
            continue
        for panel in (top, middle, bottom):
            panel.axvspan(start, stop, color=color, alpha=0.09, linewidth=0)
        middle_of_area = (start + stop) / 2 / process.num_timesteps
        side = "left" if middle_of_area < 0.06 else "right" if middle_of_area > 0.94 else "center"  # narrow areas at the picture's edges
        where = {"left": start, "center": (start + stop) / 2, "right": stop}[side]
        top.text(where, 1.04, name, ha=side, va="bottom", color=color, fontsize=11, fontweight="bold")
    for where, name in ((peak, f"peak {peak}"), (tau, f"tau {tau}")):
        if where == process.num_timesteps:
            continue
        for panel in (top, middle, bottom):
            panel.axvline(where, color="0.45", linewidth=0.8, linestyle=":")
        near_the_end = where > 0.9 * process.num_timesteps
        offset, side = (-4, "right") if near_the_end else (4, "left")
        top.annotate(name, (where, 0.12), xytext=(offset, 0), textcoords="offset points", ha=side, color="0.25", fontsize=10)

    top.set(title="How noisy a step is, and how fast that changes", ylabel="noise's share, 1 - alpha_bar", ylim=(0, 1.15))
    rate_panel = top.twinx()
    rate = process.change_rate() * process.num_timesteps
    share_line = top.plot(steps, 1 - process.alpha_bar, color="black", label="noise's share (left)")
    rate_line = rate_panel.plot(steps, rate, color="tab:blue", label="its rate of change (right)")
    rate_panel.set(ylabel="rate, per T steps", ylim=(0, 1.15 * float(rate.max()) or 1))
    top.legend(handles=share_line + rate_line, loc="center left", bbox_to_anchor=(1.07, 0.5), frameon=False)

    middle.set(title="How often a step is drawn", ylabel="probability x T (uniform = 1)")
    for (name, law), color, style in zip(laws.items(), cycle(SIX), cycle(TWELVE), strict=False):
        label = f"{name}\n{law.moved_share():.0%} of draws moved"
        middle.plot(steps, law.marginal() * process.num_timesteps, color=color, linestyle=style, drawstyle="steps-mid", label=label)
    middle.set_ylim(bottom=0)

    bottom.set(title=f"What an error costs: weight on the squared error of {prediction_type}", ylabel="weight")
    for (name, weight), color, style in zip(weights.items(), cycle(SIX), cycle(TWELVE), strict=False):
        bottom.plot(steps, weight, color=color, linestyle=style, label=name)
    if max(float(weight.max()) for weight in weights.values()) > 50:
        bottom.set_yscale("log", nonpositive="mask")
    else:
        bottom.set_ylim(bottom=0)
    bottom.set(xlabel="timestep index: least noise on the left, most on the right", xlim=(0, process.num_timesteps))
    for panel in (middle, bottom):
        panel.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    return figure


def shown_of(name: str, args: argparse.Namespace) -> Shown:
    """The increments of a process of `INCREMENTS`, and how it is called."""
    process = process_of(args, "ddpm")  # whatever is drawn, so that a wrong flag is told
    steps, first, last = args.ddpm_num_steps, args.ddpm_beta_start, args.ddpm_beta_end
    if steps < 3:
        raise UserError(f"--ddpm_num_steps {steps} is too small for --increments: it must be at least 3")
    if name == "ddpm":
        step = increments(process.alpha_bar.sqrt(), (1 - process.alpha_bar).sqrt())
        closed = ddpm(args.ddpm_beta_schedule, steps, first, last) if args.image_scale == 1 else None
        against = "closed form" if args.ddpm_beta_schedule == "squaredcos_cap_v2" else "lower bound"
        scale = "" if closed else f", image scale {args.image_scale:g}"
        return Shown(f"ddpm, {args.ddpm_beta_schedule}, T = {steps}{scale}", torch.arange(1, steps), step, closed, process, against)
    title, closed = {
        "vp": (f"vp, beta from {steps * first:g} to {steps * last:g}", vp(steps * first, steps * (last - first))),
        "ve": ("ve, sigma^2 = t", ve()),
        "edm": ("edm, sigma = t", edm()),
        "flow": ("flow, (1 - t) x0 + t n", flow()),
    }[name]
    times = closed.grid(steps)
    at = closed.ingredients(times)
    return Shown(f"{title}, {steps} steps", times[:-1], increments(at.s, at.s * at.variance.sqrt()), closed)


def variance_rate(shown: Shown) -> Tensor:
    """How fast the variance changes: by the closed form, or from step to step where there is none."""
    if shown.closed is None:
        return 2 * shown.process.change_rate()[:-1]
    return shown.closed.increment_variance_rate(shown.times)


def mean_bound(shown: Shown) -> Tensor:
    """Theorem 1's bound on the mean's length over that of x0."""
    alpha_bar = shown.process.alpha_bar
    largest_beta = max(float(1 - alpha_bar[0]), float(1 - (alpha_bar[1:] / alpha_bar[:-1]).min()))
    return shown.closed.mean_bound(shown.times, largest_beta).sqrt()


def table(shown: Shown) -> list[str]:
    """Mean, variance and what theorem 1 bounds them by, at ten of the increments."""
    step, theorem = shown.steps, shown.process is not None and shown.closed is not None
    columns = {"t": shown.times, "mean / x0": step.mean}
    if theorem:
        columns["|mean| <="] = mean_bound(shown)
    columns["variance"] = step.variance
    if theorem:
        columns[shown.against] = shown.closed.increment_variance(shown.times)
    columns |= {"d variance/dt": variance_rate(shown), "chain's variance": step.chain_variance}
    rows = torch.linspace(0, len(shown.times) - 1, 10).round().long().unique()
    lines = ["".join(f"{name:>17}" for name in columns)]
    return lines + ["".join(f"{float(values[row]):>17.6g}" for values in columns.values()) for row in rows]


def first_step(process: NoiseProcess, r: float) -> int | None:
    try:
        return process.convergence_step(r)
    except UserError:  # this r is not reached
        return None


def areas(shown: Shown, sigma_data: float) -> list[str]:
    """t_ad and tau for each r, and how much of the time each area takes; under ve, edm and flow what stands for tau."""
    closed, process = shown.closed, shown.process
    found: dict[str, list[float | None]] = {}
    if closed is not None and closed.no_areas:
        found["t by equal SNR"] = [None, *(closed.tau(r, sigma_data) for r in RATIOS)]
        found["sigma there"] = [None, *(sigma_data * (r - 1) ** 0.5 for r in RATIOS)]
    elif closed is not None:
        found["closed form"] = [closed.peak, *(closed.tau(r) for r in RATIOS)]
    if process is not None:
        found["in the steps"] = [process.peak_step() + 1, *(first_step(process, r) for r in RATIOS)]
    lines = [" " * 17 + f"{'t_ad':>12}" + "".join(f"{f'tau, r = {r}':>15}" for r in RATIOS)]
    for name, times in found.items():
        lines.append(f"{name:>17}" + "".join(f"{'none' if t is None else f'{t:.6g}':>{15 if i else 12}}" for i, t in enumerate(times)))
    if closed is not None and closed.no_areas:
        return [*lines, f"no areas in the paper: {closed.no_areas}; tau by equal signal-to-noise ratio is our rule"]
    for r in RATIOS:
        spans = borders(shown, r)
        length = spans[-1][1] - spans[0][0]
        shares = (f"{name} {(stop - start) / length:.1%}" for (start, stop), name in zip(spans, AREAS, strict=True))
        lines.append(f"of the time at r = {r}: {', '.join(shares)}")
    return lines


def borders(shown: Shown, r: float) -> Sequence[tuple[float, float]]:
    """From where to where the three areas reach: in steps where there are steps, else in times."""
    if shown.process is not None:
        return shown.process.areas(first_step(shown.process, r) or shown.process.num_timesteps)
    first, last = shown.closed.times
    tau = shown.closed.tau(r) or last
    peak = min(max(shown.closed.peak, first), tau)
    return (first, peak), (peak, tau), (tau, last)


def draw_increments(rows: Sequence[Shown], sigma_data: float) -> Any:
    """The figure: a row for each process, with the mean, the variance and how fast that changes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, grid = pyplot.subplots(len(rows), 3, figsize=(16, 0.8 + 3.2 * len(rows)), squeeze=False, layout="constrained")
    figure.suptitle(
        f"Process increments, noisy image to noisy image, of independent noises; the areas are at r = {SHADED_RATIO}", fontsize=13
    )
    for shown, panels in zip(rows, grid, strict=True):
        draw_row(shown, *panels)
        mark_areas(shown, sigma_data, panels)
        for panel, title in zip(panels, (shown.title, "variance of each pixel", "how fast the variance changes"), strict=True):
            panel.set(title=title, xlabel="t")
            panel.legend(fontsize=8, loc="best")
    return figure


def draw_row(shown: Shown, left: Any, middle: Any, right: Any) -> None:
    times, step, closed = shown.times, shown.steps, shown.closed
    mean = step.mean.abs()
    left.plot(times, mean, color="black", label="length of the mean, of x0's")
    left.set_ylim(0, 1.3 * float(mean.max()) or 1)
    middle.plot(times, step.variance, color="black", label="variance")
    middle.plot(times, step.chain_variance, color="tab:purple", linestyle=":", label="along the Markov chain")
    right.plot(times, variance_rate(shown), color="black", label="d variance/dt")
    if shown.process is not None and closed is not None:
        left.plot(times, mean_bound(shown), color="tab:blue", linestyle="--", label="upper bound")
        left.set_yscale("log")
        left.autoscale(axis="y")
        middle.plot(times, closed.increment_variance(times), color="tab:blue", linestyle="--", label=shown.against)
        right.plot(times, 2 * shown.process.change_rate()[:-1], color="tab:blue", linestyle="--", label="from step to step")
    if shown.process is None and float(times[0]) > 0:  # ve and edm, over many magnitudes
        left.set_xscale("log")
        middle.loglog()
        right.loglog()


def mark_areas(shown: Shown, sigma_data: float, panels: Sequence[Any]) -> None:
    """The areas' colors where there are areas, and a line at each tau, or at what stands for it."""
    closed = shown.closed
    undefined = closed is not None and bool(closed.no_areas)
    for panel in panels:
        for (start, stop), (name, color) in zip(() if undefined else borders(shown, SHADED_RATIO), AREAS.items(), strict=False):
            panel.axvspan(start, stop, color=color, alpha=0.09, linewidth=0, label=name if panel is panels[-1] else None)
        for r in RATIOS:
            where = first_step(shown.process, r) if shown.process is not None else closed.tau(r, sigma_data if undefined else 1.0)
            if where is not None:
                panel.axvline(where, color="0.45", linewidth=0.8, linestyle=":")
                name = f"r = {r}" + (" (ours)" if undefined else "")
                panel.text(where, 0.5, name, transform=panel.get_xaxis_transform(), rotation=90, ha="right", va="center", fontsize=8)


def show_increments(args: argparse.Namespace) -> None:
    sigma_data = 1.0 if args.sigma_data is None else args.sigma_data
    if not 0 < sigma_data < math.inf:
        raise UserError(f"--sigma_data {sigma_data:g} is out of range: it is the images' standard deviation, so it must be above 0")
    rows = [shown_of(name, args) for name in args.increments]
    for shown in rows:
        print("\n".join([shown.title, *table(shown), *areas(shown, sigma_data), ""]))
    save(draw_increments(rows, sigma_data), args.output)


def main(argv: Sequence[str]) -> None:
    args = parse(argv)
    if args.increments is not None:
        show_increments(args)
        return
    prediction_type = args.prediction_type or PREDICTION_TYPES[args.noise_process][0]
    process = process_of(args, args.noise_process, prediction_type)
    options = {key: getattr(args, key) for key in ("asymmetric_k", "asymmetric_r", "asymmetric_tau", "change_aware_lambda")}
    try:
        with naming_flags():
            tau = threshold(process, args.asymmetric_r, args.asymmetric_tau)
    except UserError:
        if args.asymmetric_r is not None or args.asymmetric_tau is not None:
            raise
        tau = process.num_timesteps  # no area of convergence by the default r

    def of(table: dict[str, Any], name: str) -> dict[str, Any]:
        return used_options(table[name], options) if name in table else {}  # an unknown name has an error of its own

    laws = build_each(
        args.timestep_sampling, LAWS, lambda name: timestep_sampler(name, process, **of(TIMESTEP_SAMPLINGS, name)).at(IN_THE_END)
    )
    weights = build_each(
        args.loss_weighting,
        WEIGHTINGS,
        lambda name: loss_weights(name, process, prediction_type, **of(LOSS_WEIGHTINGS, name)).vector,
    )
    for name, law in laws.items():
        print(f"{name}: {law.moved_share():.1%} of draws moved, {float(law.marginal()[tau:].sum()):.2%} of draws beyond tau {tau}")

    schedule = args.ddpm_beta_schedule if args.noise_process == "ddpm" else "straight lines"
    scale = "" if args.image_scale == 1 else f", image scale {args.image_scale:g}"
    figure = draw(process, tau, laws, weights, prediction_type, f"{args.noise_process}, {schedule}, T = {args.ddpm_num_steps}{scale}")
    save(figure, args.output)


if __name__ == "__main__":
    sys.exit(run_script(main))
