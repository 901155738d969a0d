"""README's training loops run as they stand, and train with what they are given."""

import re
from pathlib import Path

import pytest
import torch

import immiscible

README = (Path(__file__).resolve().parents[1] / "README.md").read_text()
LOOPS = re.findall(r"```python\n(.*?)```", README.partition("## Use it in your own training loop\n")[2].partition("\n## ")[0], re.S)


@pytest.mark.parametrize("scheduler", ["DDPMScheduler", "FlowMatchEulerDiscreteScheduler", "EDMEulerScheduler"])
def test_each_kind_of_training_loop_runs(scheduler, monkeypatch):
    """And trains with what the coupling and the law gave, in the scheduler's own terms, on the device of the images."""
    (example,) = (block for block in LOOPS if f"scheduler = {scheduler}(" in block)
    coupled = []
    pair = immiscible.AssignmentCoupling.__call__
    monkeypatch.setattr(
        immiscible.AssignmentCoupling, "__call__", lambda *words, **told: coupled.append(pair(*words, **told)) or coupled[-1]
    )
    values: dict = {}
    exec(example, values)
    assert values["loss"].item() > 0 and len(coupled) == 4 and values["noise"] is coupled[-1]
    built, x0, noise = values["scheduler"], values["x0"], values["noise"]
    if scheduler == "DDPMScheduler":
        assert torch.equal(values["target"], built.get_velocity(x0, noise, values["timesteps"]))
        assert {values["weights"][values["timesteps"]].device.type} == {x0.device.type}
    elif scheduler == "FlowMatchEulerDiscreteScheduler":
        assert torch.equal(values["timesteps"].cpu(), built.timesteps[values["indices"].cpu()])
        assert torch.equal(values["sigmas"].flatten().cpu(), built.sigmas[values["indices"].cpu()])
        assert values["weights"].at(values["sigmas"]).shape == (128, 1, 1, 1)
    else:
        torch.testing.assert_close(built.precondition_noise(values["sigma"]).flatten(), values["c_noise"], rtol=1e-4, atol=1e-5)
        assert torch.equal(values["xt"], x0 + values["sigma"] * noise)
