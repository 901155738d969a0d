"""How sure a comparison is: final distances against the baseline's over the seeds, and the ratio that the papers quote beside ours."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from statistics import fmean, median

import numpy
from scipy import stats

from immiscible.randomness import derive_seed
from immiscible.reports.comparison import Comparison
from immiscible.reports.ratios import NOTHING, highest_ratio, middle
from immiscible.reports.tables import Table

RESAMPLES = 20_000  # where there are too many seeds to try all resamples of them
CONFIDENCE = 0.95


def evidence_table(comparison: Comparison, inference_steps: int) -> Table:
    """One row per arm, seeds in common with the baseline: the ratio of final distances, its interval and p, and the highest ratio."""
    baseline = {seed: run.curve(inference_steps) for seed, run in comparison.arms[comparison.baseline].runs.items()}
    rows = []
    for name, arm in comparison.arms.items():
        curves = {seed: run.curve(inference_steps) for seed, run in arm.runs.items() if seed in baseline}
        images = ", ".join(sorted({f"{run.last_step * run.images_a_step:,}" for run in arm.runs.values()})) or NOTHING
        if name == comparison.baseline or not curves:
            rows.append([name, *[NOTHING] * 4, images])
            continue
        ends = [(baseline[seed][-1][1], curve[-1][1]) for seed, curve in curves.items()]
        highest = [found for seed, curve in curves.items() if (found := highest_ratio(baseline[seed], curve))]
        shown = f"{middle(value for value, _ in highest).show(2)}x at {median(level for _, level in highest):.3g}" if highest else NOTHING
        rows.append([name, *_final(ends), shown, images])
    return Table(
        f"How sure it is, at {inference_steps} inference steps: final {comparison.feature} over the baseline's, geometric mean over the "
        "seeds that both have; its 95 % interval by bootstrap over seeds, and the p of a paired t-test of the logarithms; the highest "
        "ratio of steps at any quality, as papers quote it; images seen",
        ["arm", "final over baseline's", "95 % interval", "p", "highest ratio of steps", "images seen"],
        rows,
    )


def _final(ends: Sequence[tuple[float, float]]) -> list[str]:
    """The ratio, its interval and p, of pairs of final distances; nothing where one is not positive and finite."""
    if not all(0 < value < math.inf for pair in ends for value in pair):
        return [NOTHING] * 3
    logs = [math.log(value / reference) for reference, value in ends]
    ratio = f"{math.exp(fmean(logs)):.3g}x"
    if len(logs) < 2:
        return [ratio, NOTHING, NOTHING]
    low, high = bootstrap_interval(logs)
    if len(set(logs)) == 1:  # of which a t-test knows nothing
        return [ratio, f"{math.exp(low):.3g} to {math.exp(high):.3g}", NOTHING]
    return [ratio, f"{math.exp(low):.3g} to {math.exp(high):.3g}", f"{float(stats.ttest_1samp(logs, 0).pvalue):.2g}"]


def bootstrap_interval(values: Sequence[float]) -> tuple[float, float]:
    """The percentile interval of the mean of ``values`` over resamples of them: over all n^n up to 6 values, else over random ones.

    Of a few values it is narrower than it says: three cannot stray beyond themselves.

    Returns:
        the quantiles 0.025 and 0.975 (of inverted_cdf's kind) of the resamples' means; the same for the same values.
    """
    n = len(values)
    if n <= 6:
        means = [fmean(chosen) for chosen in itertools.product(values, repeat=n)]
    else:
        picks = numpy.random.default_rng(derive_seed("bootstrap")).integers(n, size=(RESAMPLES, n))
        means = numpy.asarray(values)[picks].mean(1).tolist()
    low, high = numpy.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], method="inverted_cdf")
    return float(low), float(high)
