"""Couplings: what each returns, the marginal it leaves, and how one is added."""

import re
from dataclasses import dataclass

import pytest
import torch

import immiscible
from immiscible import COUPLINGS, AboveTimestep, AssignmentCoupling, IndependentCoupling, NearestCoupling, UserError, build_coupling
from immiscible.coupling import bias_notice, coupling_statistics, paired_together


def batch(n=32, seed=0, side=8):
    generator = torch.Generator().manual_seed(seed)
    brightness = torch.rand(n, 1, 1, 1, generator=generator) * 2 - 1
    x0 = (brightness + 0.3 * torch.randn(n, 3, side, side, generator=generator)).clamp(-1, 1)
    return x0, torch.randn(n, 3, side, side, generator=generator)


def rows(noise):
    return sorted(map(tuple, noise.flatten(1).tolist()))


def distance(x0, noise):
    return float((x0 - noise).flatten(1).norm(dim=1).sum())


@pytest.mark.parametrize("name", COUPLINGS)
def test_every_coupling_keeps_shape_dtype_and_draws_its_own_noise_if_none_is_given(name):
    for dtype in (torch.float32, torch.float16):
        x0 = batch()[0].to(dtype)
        noise = build_coupling(name)(x0, generator=torch.Generator().manual_seed(7))
        assert noise.shape == x0.shape and noise.dtype == dtype and noise.device == x0.device
        assert torch.equal(noise, build_coupling(name)(x0, generator=torch.Generator().manual_seed(7)))


def test_independent_keeps_the_pool_in_order():
    x0, noise = batch()
    assert torch.equal(IndependentCoupling()(x0, noise), noise)


@pytest.mark.parametrize("metric", ["l2", "squared_l2", "l1"])
def test_assignment_permutes_the_pool_and_brings_it_nearer(metric):
    x0, noise = batch()
    paired = AssignmentCoupling(metric=metric)(x0, noise)
    assert rows(paired) == rows(noise)
    assert distance(x0, paired) < distance(x0, noise)


def test_assignment_of_one_image_is_the_identity():
    x0, noise = batch(1)
    assert torch.equal(AssignmentCoupling()(x0, noise), noise)


def test_flipped_assignment_is_the_assignment_of_reversed_noises():
    x0, noise = batch(64)
    paired = build_coupling("flipped_assignment")(x0, noise)
    assert rows(paired) == rows(noise) and not torch.equal(paired, noise)

    def reverse(tensor):
        return tensor.flatten(1).flip(1).view_as(tensor)

    assert torch.equal(reverse(paired), AssignmentCoupling()(x0, reverse(noise)))


def test_flipped_assignment_hardly_shortens_the_real_distance_of_structured_images():
    # A gradient from left to right reversed is its negative: near a reversed noise is far from the noise itself.
    generator = torch.Generator().manual_seed(3)
    ramp = torch.linspace(-1, 1, 16).expand(1, 16, 16)
    x0 = torch.randn(64, 1, 1, 1, generator=generator) * ramp
    noise = torch.randn(64, 1, 16, 16, generator=generator)
    before = distance(x0, noise)
    assert distance(x0, AssignmentCoupling()(x0, noise)) < 0.98 * before
    assert distance(x0, build_coupling("flipped_assignment")(x0, noise)) > 0.99 * before


@pytest.mark.parametrize("score", ["l2", "dot"])
def test_nearest_keeps_the_given_noise_or_a_better_one_with_its_direction_across_the_image(score):
    generator = torch.Generator().manual_seed(1)
    x0, first = torch.randn(2000, 3, 4, 4, generator=generator), torch.randn(2000, 3, 4, 4, generator=generator)
    paired = NearestCoupling(candidates=5, score=score)(x0, first, generator=generator)
    kept = (paired == first).flatten(1).all(1)
    assert int(kept.sum()) == pytest.approx(400, abs=4 * (2000 * 0.2 * 0.8) ** 0.5)  # one candidate of five, each as likely to win

    images, before, after = (tensor.flatten(1).double() for tensor in (x0, first, paired))

    def cost(noise):
        return -(noise * images).sum(1) if score == "dot" else (noise - images).square().sum(1)

    assert bool((cost(after) < cost(before))[~kept].all())
    unit = images / images.norm(dim=1, keepdim=True)
    across = [noise - (noise * unit).sum(1, keepdim=True) * unit for noise in (before, after)]
    assert torch.allclose(torch.nn.functional.cosine_similarity(*across), torch.ones(2000, dtype=torch.float64), atol=1e-6)
    if score == "dot":  # sees only what is along the image
        assert torch.allclose(*across, atol=1e-5)


@pytest.mark.parametrize("score", ["l2", "dot"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_nearest_at_the_edges_stays_finite_and_of_its_input_dtype(score, dtype):
    generator = torch.Generator().manual_seed(4)
    for side in (1, 2, 8):
        noise = torch.randn(500, 1, side, side, dtype=torch.float64, generator=generator).to(dtype)
        for scale in (0, 1e-6, 1, 1e4):
            x0 = (scale * torch.randn(500, 1, side, side, generator=generator)).to(dtype)
            paired = NearestCoupling(candidates=4, score=score)(x0, noise, generator=generator)
            assert paired.dtype == dtype and paired.shape == x0.shape and bool(paired.isfinite().all())
            kept = int((paired == noise).flatten(1).all(1).sum())
            ties = score == "dot" and not x0.any()  # nothing to choose by: the given noise stays
            assert kept == 500 if ties else 80 < kept < 170


def test_nearest_of_a_broken_image_or_of_a_strided_batch():
    x0, noise = batch(16)
    broken = x0.clone()
    broken[3, 0, 0, 0] = float("nan")
    paired = NearestCoupling(candidates=8)(broken, noise)
    assert torch.equal(paired[3], noise[3]) and bool(paired.isfinite().all())
    results = [
        NearestCoupling(candidates=8)(images, noises, generator=torch.Generator().manual_seed(5))
        for images, noises in ((x0, noise), (x0.to(memory_format=torch.channels_last), noise.transpose(2, 3).contiguous().transpose(2, 3)))
    ]
    assert torch.equal(*results)


def test_nearest_of_one_is_independent():
    x0, noise = batch()
    assert torch.equal(NearestCoupling(candidates=1)(x0, noise), noise)


def test_nearest_by_l2_shrinks_the_noise_and_by_dot_does_not():
    x0, noise = batch(512, side=8)
    generator = torch.Generator().manual_seed(2)
    shrunk = NearestCoupling(candidates=32, score="l2")(x0, noise, generator=generator)
    kept = NearestCoupling(candidates=32, score="dot")(x0, noise, generator=generator)
    assert shrunk.flatten(1).norm(dim=1).mean() < 0.985 * noise.flatten(1).norm(dim=1).mean()
    assert kept.flatten(1).norm(dim=1).mean() == pytest.approx(float(noise.flatten(1).norm(dim=1).mean()), rel=0.01)


def test_nearest_neither_holds_nor_draws_all_candidates():
    made = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            made.extend([result.numel()] if isinstance(result, torch.Tensor) else [])
            return result

    x0, noise = batch(16)
    with Watch():
        NearestCoupling(candidates=64)(x0, noise)
    assert max(made) == x0.numel()
    assert sum(made) < 30 * x0.numel()  # drawing the 63 others makes at least 63 times as many numbers


def test_only_a_coupling_that_biases_the_noise_says_so_and_its_numbers_are_right():
    generator = torch.Generator().manual_seed(6)
    for score in ("l2", "dot"):
        coupling, dimension = NearestCoupling(candidates=16, score=score), 192
        notice = bias_notice(coupling, dimension)
        assert notice.startswith(f"nearest of 16 by {score} does not keep")
        variance, mean, square = (
            float(re.search(pattern + r" (\d+\.\d+)", notice).group(1)) for pattern in ("variance is", "has mean", "mean square")
        )
        x0 = torch.nn.functional.normalize(torch.randn(20000, dimension, generator=generator)) * 0.55 * dimension**0.5
        paired = coupling(x0, generator=generator)
        along = (paired * torch.nn.functional.normalize(x0)).sum(1)
        assert float(paired.square().mean()) == pytest.approx(variance, abs=0.004)
        assert float(along.mean()) == pytest.approx(mean, abs=0.03) and float(along.square().mean()) == pytest.approx(square, abs=0.1)
        assert bias_notice(AboveTimestep(coupling, 300), dimension) == f"from timestep 300 on, {notice}"
    state = torch.get_rng_state()
    for coupling in (IndependentCoupling(), AssignmentCoupling(), NearestCoupling(1), AboveTimestep(NearestCoupling(1), 3)):
        assert bias_notice(coupling, 192) == ""
    bias_notice(NearestCoupling(4), 1)
    assert torch.equal(state, torch.get_rng_state())


def test_below_the_least_timestep_noise_stays_and_the_rest_is_its_own_batch():
    x0, noise = batch(32)
    timesteps = torch.arange(32) * 30
    coupling = build_coupling("assignment", min_timestep=500)
    paired = coupling(x0, noise, timesteps=timesteps)
    above = timesteps >= 500
    assert torch.equal(paired[~above], noise[~above])
    assert torch.equal(paired[above], AssignmentCoupling()(x0[above], noise[above]))
    assert float(paired_together(coupling, timesteps)) == int(above.sum())
    assert torch.equal(coupling(x0, noise, timesteps=torch.zeros(32, dtype=torch.int64)), noise)
    with pytest.raises(UserError, match="timesteps"):
        coupling(x0, noise)


def test_images_paired_together():
    timesteps = torch.arange(8)
    assert float(paired_together(IndependentCoupling(), timesteps)) == 1
    assert float(paired_together(NearestCoupling(), timesteps)) == 1
    assert float(paired_together(AssignmentCoupling(), timesteps)) == 8
    assert float(paired_together(AboveTimestep(NearestCoupling(), 4), timesteps)) == 1


def test_statistics_by_their_definitions():
    x0, noise = batch(64)
    shorter = 0.9 * noise
    statistics = {name: float(value) for name, value in coupling_statistics(x0, noise, shorter).items()}
    assert statistics["pair_distance_drawn"] == pytest.approx(distance(x0, noise) / 64, rel=1e-5)
    assert statistics["pair_distance"] == pytest.approx(distance(x0, shorter) / 64, rel=1e-5)
    assert statistics["noise_variance"] == pytest.approx(float(shorter.double().var()), rel=1e-5)
    assert statistics["noise_variance_drift"] == pytest.approx(-0.19 * float(noise.var()), rel=1e-4)
    assert statistics["noise_norm_drift"] == pytest.approx(-0.1 * float(noise.flatten(1).norm(dim=1).mean()) / 192**0.5, rel=1e-4)
    permuted = coupling_statistics(x0, noise, AssignmentCoupling()(x0, noise))
    assert abs(float(permuted["noise_variance_drift"])) < 1e-6 and abs(float(permuted["noise_norm_drift"])) < 1e-6


def test_unknown_and_out_of_range():
    with pytest.raises(UserError, match="independent, assignment, nearest, flipped_assignment"):
        build_coupling("hungarian")
    with pytest.raises(UserError, match="`candidates` must be at least 1, not 0"):
        build_coupling("nearest", candidates=0)
    with pytest.raises(UserError, match="`score` 'cosine' is unknown; known: l2, dot"):
        build_coupling("nearest", score="cosine")


def test_adding_a_coupling_is_one_class_and_one_entry(monkeypatch):
    @dataclass(frozen=True)
    class BrightestFirst:
        def __call__(self, x0, noise=None, *, timesteps=None, labels=None, generator=None):
            noise = torch.randn_like(x0) if noise is None else noise
            order = x0.flatten(1).mean(1).argsort().argsort()
            return noise[noise.flatten(1).mean(1).argsort()][order]

    monkeypatch.setitem(immiscible.COUPLINGS, "brightest_first", BrightestFirst)
    x0, noise = batch()
    paired = build_coupling("brightest_first")(x0, noise)
    assert rows(paired) == rows(noise) and distance(x0, paired) < distance(x0, noise)

    from immiscible.configs import UnconditionalConfig
    from immiscible.flags import parse_config

    config = parse_config(
        UnconditionalConfig,
        ["--noise_coupling", "brightest_first", "--bundled_data", "digits"],
        program="x",
        description="",
        no_data_config=None,
    )
    assert config.noise_coupling == "brightest_first"
