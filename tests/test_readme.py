"""What the README says runs as it stands, and what it refers to exists."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README, re.S)


def test_the_training_loop_runs():
    (example,) = (block for block in PYTHON if "AssignmentCoupling()" in block)
    values: dict = {}
    exec(example, values)
    assert values["loss"].item() > 0
    assert values["timesteps"].shape == (128,)


def test_the_extension_example_makes_three_choices_of_the_command_line():
    import torch

    import immiscible
    from immiscible.configs import UnconditionalConfig
    from immiscible.flags import parse_config

    tables = (immiscible.COUPLINGS, immiscible.TIMESTEP_SAMPLINGS, immiscible.LOSS_WEIGHTINGS)
    before = [dict(table) for table in tables]
    try:
        (example,) = (block for block in PYTHON if "BrightestFirst" in block)
        exec(example, {"__name__": "example"})
        flags = ["--noise_coupling", "brightest_first", "--timestep_sampling", "late", "--loss_weighting", "inverse_deviation"]
        config = parse_config(UnconditionalConfig, [*flags, "--bundled_data", "digits"], program="x", description="", no_data_config=Path())
        from diffusers import DDPMScheduler

        x0 = torch.rand(16, 1, 8, 8)
        assert immiscible.build_coupling(config.noise_coupling)(x0).shape == x0.shape
        assert immiscible.timestep_sampler(config.timestep_sampling, DDPMScheduler())(4).shape == (4,)
        assert len(immiscible.loss_weights(config.loss_weighting, DDPMScheduler(), "epsilon")) == 1000
    finally:
        for table, old in zip(tables, before, strict=True):
            table.clear()
            table.update(old)


def test_files_that_it_names_exist():
    named = set(re.findall(r"(?:configs|scripts|docs|immiscible)/[\w/.-]+\.\w+", README))
    assert len(named) > 8
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_flags_that_it_names_exist():
    help_text = subprocess.run(
        [sys.executable, ROOT / "train_unconditional.py", "--help"], capture_output=True, text=True, check=True
    ).stdout
    scripts = "".join(path.read_text() for path in (ROOT / "scripts").glob("*.py"))
    foreign = {"--multi_gpu", "--num_processes"}
    flags = set(re.findall(r"(?<![\w-])--[a-z_0-9]+", README)) - foreign
    assert [flag for flag in sorted(flags) if f"{flag} " not in help_text and f'"{flag}"' not in scripts] == []


ROWS = re.findall(r"^\| (.+?) \| (.+?) \| `(test_\w+)` \|$", README, re.M)


def test_the_table_of_differences_is_there():
    assert len(ROWS) >= 10


@pytest.mark.parametrize("test", [row[2] for row in ROWS])
def test_each_difference_is_tested(test):
    assert any(f"def {test}(" in path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
