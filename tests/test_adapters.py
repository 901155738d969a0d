"""The couplings behind others' interfaces, by stand-ins that call them as torchcfm 1.0.7 and denoising-diffusion-pytorch 2.3.4 do."""

import numpy
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist

import immiscible
from immiscible.adapters import OTPlanSampler, couple_p_losses


def batch(n=40, seed=0):
    x0, noise = torch.randn(2, n, 3, 4, 4, generator=torch.Generator().manual_seed(seed)).unbind()
    return x0.clamp(-1, 1), noise


class Matcher:
    """The calls of torchcfm's ``ExactOptimalTransportConditionalFlowMatcher``: x0 is noise, x1 is data, t goes from one to the other."""

    def __init__(self, ot_sampler):
        self.ot_sampler = ot_sampler

    def sample_location_and_conditional_flow(self, x0, x1, t):
        x0, x1 = self.ot_sampler.sample_plan(x0, x1)
        return t * x1 + (1 - t) * x0, x1 - x0

    def guided_sample_location_and_conditional_flow(self, x0, x1, t, y0=None, y1=None):
        x0, x1, y0, y1 = self.ot_sampler.sample_plan_with_labels(x0, x1, y0, y1)
        return t * x1 + (1 - t) * x0, x1 - x0, y0, y1


def test_torchcfms_plan_is_the_assignment_of_least_cost():
    data, noise = batch()
    xt, flow = Matcher(OTPlanSampler()).sample_location_and_conditional_flow(noise, data, 0.25)
    paired = xt - 0.25 * flow  # x0
    torch.testing.assert_close(xt + 0.75 * flow, data)  # the images stay in order
    cost = cdist(noise.flatten(1).numpy(), data.flatten(1).numpy()) ** 2  # torchcfm's
    rows, columns = linear_sum_assignment(cost)
    expected = noise[torch.from_numpy(rows[numpy.argsort(columns)])]
    torch.testing.assert_close(paired, expected, atol=1e-5, rtol=1e-5)
    for replace in (True, False):
        again, same = OTPlanSampler(metric="squared_l2").sample_plan(noise, data, replace=replace)
        assert torch.equal(again, expected) and same is data


def test_torchcfms_labels_go_with_what_they_label():
    data, noise = batch(200)
    y0, y1 = torch.arange(200), torch.arange(200) % 7
    _, _, theirs, labels = Matcher(OTPlanSampler(solver="exact")).guided_sample_location_and_conditional_flow(noise, data, 0.5, y0, y1)
    paired, _ = OTPlanSampler(solver="exact").sample_plan(noise, data)
    assert torch.equal(noise[theirs], paired) and torch.equal(labels, y1)
    assert sorted(theirs.tolist()) == list(range(200))
    assert OTPlanSampler().sample_plan_with_labels(noise, data)[2:] == (None, None)
    with pytest.raises(immiscible.UserError, match="must agree in shape"):
        OTPlanSampler().sample_plan(noise[:5], data)


class GaussianDiffusion(torch.nn.Module):
    """The signatures of denoising-diffusion-pytorch's; with ``immiscible`` it permutes what it adds and not what it predicts."""

    def __init__(self, immiscible=False):
        super().__init__()
        betas = torch.linspace(1e-4, 0.02, 1000)
        self.register_buffer("betas", betas)
        self.register_buffer("alphas_cumprod", torch.cumprod(1 - betas, 0))
        self.immiscible = immiscible

    def q_sample(self, x_start, t, noise=None):
        noise = torch.randn_like(x_start) if noise is None else noise
        signal = self.alphas_cumprod[t].view(-1, 1, 1, 1)
        return signal.sqrt() * x_start + (1 - signal).sqrt() * noise

    def p_losses(self, x_start, t, noise=None, offset_noise_strength=None, loss_reduction="mean"):
        noise = torch.randn_like(x_start) if noise is None else noise
        self.seen = (self.q_sample(x_start, t, noise), noise, offset_noise_strength, loss_reduction)
        return (self.seen[0] - noise).square().mean()

    def forward(self, img, *args, times=None, loss_reduction="mean", **kwargs):
        return self.p_losses(2 * img - 1, times, *args, loss_reduction=loss_reduction, **kwargs)


def test_lucidrains_p_losses_adds_and_predicts_the_coupled_noise():
    data, noise = batch()
    img, t = (data + 1) / 2, torch.full((40,), 700)
    diffusion = GaussianDiffusion()
    couple_p_losses(diffusion, immiscible.AssignmentCoupling())
    diffusion(img, times=t, noise=noise, loss_reduction="none")
    expected = immiscible.AssignmentCoupling()(2 * img - 1, noise)
    xt, target, offset, reduction = diffusion.seen
    assert torch.equal(target, expected) and not torch.equal(target, noise)
    assert torch.equal(xt, diffusion.q_sample(2 * img - 1, t, expected)) and (offset, reduction) == (None, "none")
    torch.manual_seed(3)
    diffusion(img, times=t)
    torch.manual_seed(3)
    assert torch.equal(diffusion.seen[1], immiscible.AssignmentCoupling()(2 * img - 1))
    diffusion.p_losses(img, t, None, 0.1)
    assert diffusion.seen[2] == 0.1


def test_lucidrains_timesteps_reach_the_coupling_and_laws_and_weights_read_the_object():
    data, noise = batch()
    diffusion, t = GaussianDiffusion(), torch.arange(40) * 25
    couple_p_losses(diffusion, immiscible.build_coupling("assignment", min_timestep=500))
    diffusion((data + 1) / 2, times=t, noise=noise)
    target = diffusion.seen[1]
    assert torch.equal(target[t < 500], noise[t < 500]) and not torch.equal(target[t >= 500], noise[t >= 500])
    assert immiscible.timestep_sampler("asymmetric", diffusion)(8).shape == (8,)
    assert len(immiscible.loss_weights("min_snr", diffusion, "v_prediction")) == 1000
    with pytest.raises(immiscible.UserError, match="build it with immiscible=False"):
        couple_p_losses(GaussianDiffusion(immiscible=True), immiscible.AssignmentCoupling())
