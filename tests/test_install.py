"""What the library needs: its core is enough for it, and installs beside other trainers' pins. What it imports: test_library.py."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SD_SCRIPTS = ["diffusers==0.32.1", "transformers==4.54.1", "huggingface_hub==0.34.3"]  # what kohya's sd-scripts pins


def test_the_core_is_enough_to_use_it():
    run = subprocess.run([sys.executable, ROOT / "tests" / "smoke_core.py"], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0 and run.stdout.split()[-1] == "ok", run.stderr


@pytest.mark.slow
def test_it_installs_beside_the_pins_of_sd_scripts(tmp_path):
    """By pip's resolver, which needs the network. Nothing is installed."""
    source = tmp_path / "source"
    for name in ("immiscible", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    report = tmp_path / "report.json"
    pip = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--dry-run", "--quiet", "--report", report]
    run = subprocess.run([*pip, *SD_SCRIPTS, source], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    chosen = {item["metadata"]["name"].lower(): item["metadata"] for item in json.loads(report.read_text())["install"]}
    assert chosen["transformers"]["version"] == "4.54.1" and chosen["diffusers"]["version"] == "0.32.1"
    core = [line.split(";")[0] for line in chosen["immiscible"]["requires_dist"] if "extra ==" not in line]
    assert sorted(line.split(">=")[0].strip() for line in core) == ["numba", "numpy", "scipy", "torch"]
