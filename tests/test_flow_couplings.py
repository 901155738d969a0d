"""The named arms of flow matching: what their files ask for is what their papers pair."""

import numpy
import pytest
import torch
from launch import ROOT
from scipy.optimize import linear_sum_assignment
from test_config import parse

from immiscible import AssignmentCoupling, FlippedAssignmentCoupling, NearestCoupling
from immiscible.method import chosen_coupling


def arm(name, *words):
    """The configuration of a method's file, on digits."""
    digits = ROOT / "configs/tasks/digits.yaml"
    return parse("--config", digits, ROOT / f"configs/methods/{name}.yaml", "--output_dir", "unused", *words)


@pytest.mark.parametrize("n", [40, 200])
def test_ot_cfm_pairs_by_the_optimal_plan_of_squared_distances(n):
    config = arm("ot_cfm")
    assert (config.noise_process, config.prediction_type) == ("flow", "flow_prediction")
    generator = torch.Generator().manual_seed(n)
    lengths = torch.rand(n, 1, 1, 1, generator=generator) * 2
    x0, noise = lengths * torch.randn(n, 1, 8, 8, generator=generator), torch.randn(n, 1, 8, 8, generator=generator)
    paired = chosen_coupling(config)(x0, noise)
    cost = (x0.double().flatten(1)[:, None] - noise.double().flatten(1)).square().sum(2).numpy()
    assert torch.equal(paired, noise[linear_sum_assignment(cost)[1]])
    assert not torch.equal(paired, FlippedAssignmentCoupling(metric="squared_l2", solver="exact")(x0, noise))


def test_ot_cfm_is_pots_plan():
    emd = pytest.importorskip("ot").emd
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 30, 1, 8, 8, generator=generator)
    cost = (x0.double().flatten(1)[:, None] - noise.double().flatten(1)).square().sum(2).numpy()
    plan = emd(numpy.full(30, 1 / 30), numpy.full(30, 1 / 30), cost)
    assert torch.equal(chosen_coupling(arm("ot_cfm"))(x0, noise), noise[plan.argmax(1)])


def test_nearest_flow_is_the_improved_papers_arm_and_keeps_the_length_by_dot():
    config = arm("nearest_flow")
    assert (config.noise_process, config.prediction_type) == ("flow", "flow_prediction")
    assert chosen_coupling(config) == NearestCoupling(4, "l2")
    by_dot = chosen_coupling(arm("nearest_flow", "--coupling_score", "dot"))
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.rand(4000, 1, 8, 8, generator=generator) * 2 - 1, torch.randn(4000, 1, 8, 8, generator=generator)
    short, kept = (each(x0, noise, generator=generator).square().mean() for each in (chosen_coupling(config), by_dot))
    assert short < 0.95 and abs(kept - 1) < 0.02


def test_stable_is_multisample_flow_matchings_arm_beside_flow():
    files = [ROOT / f"configs/{name}.yaml" for name in ("tasks/digits", "methods/flow", "methods/stable")]
    config = parse("--config", *files, "--output_dir", "unused")
    assert config.noise_process == "flow"
    assert chosen_coupling(config) == AssignmentCoupling(metric="squared_l2", solver="stable")
