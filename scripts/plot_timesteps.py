"""Draws a noise process with SpeeD's three areas, the timestep laws and the loss weightings on it: look before you train.

    python scripts/plot_timesteps.py --ddpm_beta_schedule scaled_linear --timestep_sampling uniform asymmetric --output laws.png

A law or weighting that is not asked for by name is left out where it does not apply.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from immiscible.choices import used_options
from immiscible.errors import UserError, run_script
from immiscible.method import naming_flags
from immiscible.process import BETA_SCHEDULES, PREDICTION_TYPES, NoiseProcess, as_process
from immiscible.schedulers import build_scheduler
from immiscible.timesteps import TIMESTEP_SAMPLINGS, TimestepSampler, threshold, timestep_sampler
from immiscible.weighting import LOSS_WEIGHTINGS, loss_weights

AREAS = {"acceleration": "tab:green", "deceleration": "tab:orange", "convergence": "tab:red"}
SIX = ("tab:gray", "tab:blue", "tab:purple", "tab:cyan", "tab:olive", "tab:pink")  # apart from the areas' colors
STYLES = ("-", "-", "--", "-.", ":", "--")  # so that curves that coincide are all seen


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--noise_process", choices=list(PREDICTION_TYPES), default="ddpm")
    parser.add_argument("--ddpm_num_steps", type=int, default=1000, help="T, the number of training timesteps (default 1000)")
    parser.add_argument("--ddpm_beta_schedule", choices=BETA_SCHEDULES, default="linear")
    parser.add_argument("--ddpm_beta_start", type=float, default=1e-4)
    parser.add_argument("--ddpm_beta_end", type=float, default=0.02)
    parser.add_argument("--prediction_type", help="what the weights are for (default: epsilon, or flow_prediction under flow)")
    parser.add_argument("--image_scale", type=float, default=1.0, help="below 1 every step is noisier (default 1)")
    parser.add_argument("--timestep_sampling", nargs="+", metavar="LAW", help=f"of {', '.join(TIMESTEP_SAMPLINGS)} (default: all)")
    parser.add_argument("--loss_weighting", nargs="+", metavar="WEIGHTING", help=f"of {', '.join(LOSS_WEIGHTINGS)} (default: all)")
    parser.add_argument("--asymmetric_k", type=float, default=5.0, help="how much more often steps before tau are drawn (default 5)")
    parser.add_argument("--asymmetric_r", type=float, help="tau is where at most 1/r of the image's variance is left (default 143.55)")
    parser.add_argument("--asymmetric_tau", type=int, help="tau itself, in the place of r")
    parser.add_argument("--change_aware_lambda", type=float, default=0.6, help="the largest change-aware weight (default 0.6)")
    parser.add_argument("--output", type=Path, default=Path("timesteps.png"), help="the picture (default timesteps.png)")
    return parser.parse_args(argv)


def build_each(names: Sequence[str] | None, table: dict[str, Any], build: Callable[[str], Any]) -> dict[str, Any]:
    """The named entries, or those of the whole table that apply to this process and these options."""
    built = {}
    for name in names or table:
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
    for (name, law), color, style in zip(laws.items(), SIX, STYLES, strict=False):
        label = f"{name}\n{law.moved_share():.0%} of draws moved"
        middle.plot(steps, law.marginal() * process.num_timesteps, color=color, linestyle=style, drawstyle="steps-mid", label=label)
    middle.set_ylim(bottom=0)

    bottom.set(title=f"What an error costs: weight on the squared error of {prediction_type}", ylabel="weight")
    for (name, weight), color, style in zip(weights.items(), SIX, STYLES, strict=False):
        bottom.plot(steps, weight, color=color, linestyle=style, label=name)
    if max(float(weight.max()) for weight in weights.values()) > 50:
        bottom.set_yscale("log", nonpositive="mask")
    else:
        bottom.set_ylim(bottom=0)
    bottom.set(xlabel="timestep index: least noise on the left, most on the right", xlim=(0, process.num_timesteps))
    for panel in (middle, bottom):
        panel.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    return figure


def main(argv: Sequence[str]) -> None:
    args = parse(argv)
    prediction_type = args.prediction_type or PREDICTION_TYPES[args.noise_process][0]
    scheduler = build_scheduler(
        args.noise_process,
        num_train_timesteps=args.ddpm_num_steps,
        beta_schedule=args.ddpm_beta_schedule,
        beta_start=args.ddpm_beta_start,
        beta_end=args.ddpm_beta_end,
        prediction_type=prediction_type,
        image_scale=args.image_scale,
    )
    process = as_process(scheduler)
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
        args.timestep_sampling, TIMESTEP_SAMPLINGS, lambda name: timestep_sampler(name, process, **of(TIMESTEP_SAMPLINGS, name))
    )
    weights = build_each(
        args.loss_weighting,
        LOSS_WEIGHTINGS,
        lambda name: loss_weights(name, process, prediction_type, **of(LOSS_WEIGHTINGS, name)).vector,
    )
    for name, law in laws.items():
        print(f"{name}: {law.moved_share():.1%} of draws moved, {float(law.marginal()[tau:].sum()):.2%} of draws beyond tau {tau}")

    schedule = args.ddpm_beta_schedule if args.noise_process == "ddpm" else "straight lines"
    scale = "" if args.image_scale == 1 else f", image scale {args.image_scale:g}"
    figure = draw(process, tau, laws, weights, prediction_type, f"{args.noise_process}, {schedule}, T = {args.ddpm_num_steps}{scale}")
    try:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(args.output, dpi=110)
    except (OSError, ValueError) as error:
        raise UserError(f"--output {args.output} cannot be written: {error}", exit_code=1) from error
    print(f"picture in {args.output}")


if __name__ == "__main__":
    sys.exit(run_script(main))
