"""The commands that pip installs: they are there, find what comes with them from anywhere, and train."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections import Counter
from importlib import import_module
from pathlib import Path

import pytest
from launch import ENVIRONMENT, ROOT, tiny

from immiscible import commands
from immiscible.config_files import CONFIGS, find_file
from immiscible.configs import UnconditionalConfig
from immiscible.flags import parse_config
from immiscible.reports.plan import find_config

NAMES = ("train-unconditional", "train-text-to-image", "finetune-sd", "sample", "compare", "evaluate")


def test_every_command_is_a_function_that_runs_its_module(monkeypatch):
    declared = pytest.importorskip("tomllib").loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert sorted(declared) == sorted(f"immiscible-{name}" for name in NAMES)
    for name, target in declared.items():
        module, _, function = target.partition(":")
        words = []
        monkeypatch.setattr(f"immiscible.commands.{name.removeprefix('immiscible-').replace('-', '_')}.main", words.extend)
        monkeypatch.setattr(sys, "argv", [f"/bin/{name}", "--seed", "3"])
        assert getattr(import_module(module), function)() == 0 and words == ["--seed", "3"]
        assert commands.called_as("script.py") == name
    monkeypatch.setattr(sys, "argv", ["train_unconditional.py"])
    assert commands.called_as("script.py") == "script.py"


def test_the_library_alone_says_what_the_commands_need(monkeypatch, capsys):
    monkeypatch.setattr(commands, "find_spec", lambda name: None if name == "diffusers" else object())
    monkeypatch.setattr(sys, "argv", ["immiscible-sample", "--help"])
    assert commands.run_sample() == 2
    assert "diffusers not found" in (said := capsys.readouterr().err) and "immiscible[scripts]" in said and said.count("\n") == 1


def test_files_that_come_along_are_found_from_anywhere_and_a_users_own_come_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flow = CONFIGS / "methods" / "flow.yaml"
    for name in ("configs/methods/flow.yaml", "methods/flow.yaml", "flow.yaml"):
        assert find_file(Path(name)) == flow
    assert find_config("configs/methods/flow.yaml", "methods").resolve() == flow.resolve()
    for name in ("flow", "../configs/methods/flow.yaml", "configs/flow.yaml", "configs", str(tmp_path / "flow.yaml"), "x" * 250):
        assert find_file(Path(name)) == Path(name)  # for the error that names it
    config = parse_config(UnconditionalConfig, ["--config", "digits.yaml", "flow.yaml"], program="", description="")
    assert (config.bundled_data, config.prediction_type) == ("digits", "flow_prediction")
    Path("flow.yaml").write_text("seed: 1\n")
    assert find_file(Path("flow.yaml")) == Path("flow.yaml")


def test_a_name_is_of_one_file_that_comes_along():
    names = Counter(path.name for path in CONFIGS.glob("*/*.yaml"))
    assert len(names) > 50 and set(names.values()) == {1}


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The folder of programs of an environment that has the wheel, and the packages of this one but not its source."""
    folder = tmp_path_factory.mktemp("installed")
    source = folder / "source"
    for name in ("immiscible", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    alone = ["--no-deps", "--no-index"]
    subprocess.run([*pip, "wheel", source, *alone, "--no-build-isolation", "--wheel-dir", folder], check=True, cwd=folder)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    (wheel,) = folder.glob("*.whl")
    subprocess.run([*pip, "--python", folder / "venv/bin/python", "install", *alone, wheel], check=True, cwd=folder)
    (site,) = (folder / "venv").glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")  # whose own .pth files are not read
    return folder / "venv/bin"


@pytest.mark.slow
def test_an_installed_wheel_trains_samples_and_compares_from_anywhere(installed, tmp_path):
    def run(name, *words):
        environment = {key: value for key, value in {**os.environ, **ENVIRONMENT}.items() if key != "PYTHONPATH"}
        command = [str(installed / name), *map(str, words)]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = run("python", "-c", "import immiscible.config_files as files; print(files.CONFIGS)")
    assert Path(where.strip()).is_relative_to(installed.parent)
    for name in NAMES:
        assert "--output" in run(f"immiscible-{name}", "--help")
    run("immiscible-train-unconditional", "--config", "configs/methods/immiscible.yaml", *tiny("run", max_train_steps=10))
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["step"] == 10 and summary["noise_coupling"].startswith("assignment")
    run("immiscible-sample", "--model", "run", "--output_dir", "samples", "--num_images", 2, "--num_inference_steps", 2)
    manifest = json.loads((tmp_path / "samples/manifest.json").read_text())
    assert manifest["complete"] and manifest["command"].startswith("immiscible-sample --model run")
    scored = ("--samples", "samples", "--reference", "digits", "--metrics", "frechet_distance", "--output", "scores.json")
    run("immiscible-evaluate", *scored, "--features", "pixels")
    assert json.loads((tmp_path / "scores.json").read_text())["command"].startswith("immiscible-evaluate --samples samples")
    flags = tiny(None, max_train_steps=2, eval_steps=2, eval_samples=16, eval_inference_steps=2, seed=None)
    run("immiscible-compare", "--task", "digits", "--methods", "baseline", "--seeds", 0, "--output_dir", "compared", "--", *flags)
    assert "python -m immiscible.commands.train_unconditional" in (tmp_path / "compared/report.md").read_text()
