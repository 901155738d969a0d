"""The exact nearest-of-k sampler against brute force: Kolmogorov-Smirnov on what a noise can differ in, Holm-corrected."""

import pytest
import torch
from scipy.stats import ks_2samp

from immiscible import AboveTimestep, NearestCoupling

# Declared before the test was first run, and not to be changed because of its outcome.
IMAGE_SEED, BRUTE_FORCE_SEED, EXACT_SEED = 20250521, 64, 4096
SIGNIFICANCE = 0.01
BIAS = 1.01  # of the norm, in the sampler that must fail

SETTINGS = [  # k, D, |x| / sqrt(D), score, rows
    (2, 1, 0.55, "l2", 4000),
    (8, 1, 0.0, "l2", 4000),
    (8, 1, 2.0, "dot", 4000),
    (3, 2, 1.0, "l2", 4000),
    (8, 2, 0.0, "l2", 4000),
    (64, 2, 0.55, "dot", 4000),
    (2, 3, 0.0, "dot", 4000),
    (16, 3, 3.0, "l2", 4000),
    (4, 12, 0.55, "l2", 4000),
    (64, 12, 0.05, "l2", 4000),
    (16, 12, 1.0, "dot", 4000),
    (2, 64, 0.55, "l2", 4000),
    (8, 64, 0.0, "l2", 4000),
    (8, 64, 0.55, "dot", 4000),
    (200, 64, 0.55, "l2", 2000),
    (8, 192, 3.0, "l2", 3000),
    (64, 192, 0.55, "l2", 2000),
    (64, 192, 0.05, "dot", 2000),
    (2, 768, 1.0, "l2", 2000),
    (16, 768, 0.55, "l2", 2000),
    (4, 3072, 0.55, "dot", 1500),
    (64, 3072, 0.55, "l2", 700),
]


def images(dimension, length, rows):
    """Rows of one length whose directions share a trend, as images do; float32 [rows, D]."""
    generator = torch.Generator().manual_seed(IMAGE_SEED)
    shared = torch.linspace(-1, 1, dimension) if dimension > 1 else torch.ones(1)
    directions = torch.randn(rows, 1, generator=generator) * shared + 0.5 * torch.randn(rows, dimension, generator=generator)
    return length * dimension**0.5 * torch.nn.functional.normalize(directions)


def brute_force(x0, k, score, generator):
    """All k noises of a few rows at a time, and the best of them by its definition."""
    rows, chosen = max(1, 2**21 // (k * x0.shape[1])), []
    for some in x0.split(rows):
        candidates = torch.randn(len(some), k, x0.shape[1], generator=generator)
        inner = (candidates * some[:, None]).sum(2)
        cost = -inner if score == "dot" else (candidates - some[:, None]).square().sum(2)
        chosen.append(candidates[torch.arange(len(some)), cost.argmin(1)])
    return torch.cat(chosen)


def measurements(x0, noise):
    """Component along the image, norm, distance, and the component along one fixed direction across the image; a list of [B]."""
    x0, noise = x0.double(), noise.double()
    axis = torch.zeros_like(x0)
    axis[:, 0] = 1
    unit = torch.where(x0.norm(dim=1, keepdim=True) > 0, torch.nn.functional.normalize(x0), axis)
    found = [(unit * noise).sum(1), noise.norm(dim=1), (x0 - noise).norm(dim=1)]
    if x0.shape[1] > 1:
        other = torch.zeros_like(x0)
        other[:, 1] = 1
        across = torch.nn.functional.normalize(other - unit[:, 1:2] * unit)
        found.append((across * noise).sum(1))
    return found


def smallest_holm_p(pairs):
    """The smallest corrected p of many two-sample tests: Holm's first step multiplies the smallest raw p by their number."""
    raw = [ks_2samp(a, b).pvalue for brute, exact in pairs for a, b in zip(brute, exact, strict=True)]
    return min(1.0, len(raw) * min(raw)), min(raw), len(raw)


@pytest.fixture(scope="module")
def samples():
    """For each setting: the images, the noises by brute force, the noises of the exact sampler."""
    slow, fast = torch.Generator().manual_seed(BRUTE_FORCE_SEED), torch.Generator().manual_seed(EXACT_SEED)
    drawn = []
    for k, dimension, length, score, rows in SETTINGS:
        x0 = images(dimension, length, rows)
        drawn.append((x0, brute_force(x0, k, score, slow), NearestCoupling(k, score)(x0, generator=fast)))
    return drawn


def test_exact_sampler_has_the_law_of_the_best_of_k_noises(samples):
    assert len(SETTINGS) >= 16
    corrected, raw, tests = smallest_holm_p([(measurements(x0, brute), measurements(x0, exact)) for x0, brute, exact in samples])
    assert corrected > SIGNIFICANCE, f"smallest p {raw:.2g} of {tests}, after Holm {corrected:.2g}"


def test_a_sampler_one_percent_too_long_fails_the_same_test(samples):
    corrected, _, _ = smallest_holm_p([(measurements(x0, brute), measurements(x0, BIAS * exact)) for x0, brute, exact in samples])
    assert corrected <= SIGNIFICANCE


def test_so_does_one_that_chooses_by_the_component_alone_where_the_distance_is_asked_for(samples):
    generator = torch.Generator().manual_seed(EXACT_SEED)
    pairs = [
        (measurements(x0, brute), measurements(x0, NearestCoupling(k, "dot")(x0, generator=generator)))
        for (k, _, length, score, _), (x0, brute, _) in zip(SETTINGS, samples, strict=True)
        if score == "l2" and length == 0.55
    ]
    assert smallest_holm_p(pairs)[0] <= SIGNIFICANCE


def test_above_a_timestep_the_law_holds_and_below_it_the_noise_stays():
    generator = torch.Generator().manual_seed(EXACT_SEED)
    x0 = images(64, 0.55, 6000)
    noise = torch.randn(x0.shape, generator=generator)
    timesteps = torch.arange(6000) % 1000
    paired = AboveTimestep(NearestCoupling(8), 500)(x0, noise, timesteps=timesteps, generator=generator)
    above = timesteps >= 500
    assert torch.equal(paired[~above], noise[~above])
    brute = brute_force(x0[above], 8, "l2", torch.Generator().manual_seed(BRUTE_FORCE_SEED))
    corrected, _, _ = smallest_holm_p([(measurements(x0[above], brute), measurements(x0[above], paired[above]))])
    assert corrected > SIGNIFICANCE
