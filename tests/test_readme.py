"""What README and docs say runs as it stands, what they refer to exists, and no example does what docs/RESULTS.md advises against."""

import argparse
import ast
import importlib.util
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import torch
from accelerate.commands.launch import launch_command_parser

from immiscible.commands import compare
from immiscible.configs import TextToImageConfig, UnconditionalConfig
from immiscible.errors import UserError
from immiscible.flags import flag_value, parse_config
from immiscible.reports.plan import plan

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PYTHON = re.findall(r"```python\n(.*?)```", README, re.S)


def test_the_extension_example_makes_three_choices_of_the_command_line():
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
    scripts = "".join(path.read_text() for folder in ("scripts", "immiscible/commands") for path in (ROOT / folder).glob("*.py"))
    foreign = {"--multi_gpu", "--num_processes"}
    flags = set(re.findall(r"(?<![\w-])--[a-z_0-9]+", README)) - foreign
    assert [flag for flag in sorted(flags) if f"{flag} " not in help_text and f'"{flag}"' not in scripts] == []


DIFFERENCES = (ROOT / "docs/DIFFERENCES.md").read_text()
ROWS = re.findall(r"^\| (.+?) \| (.+?) \| `(test_\w+)` \|$", DIFFERENCES, re.M)


def test_the_table_of_differences_is_there():
    assert len(ROWS) >= 10
    assert len(ROWS) == DIFFERENCES.count("\n|") - 2 * DIFFERENCES.count("\n|---")


@pytest.mark.parametrize("test", [row[2] for row in ROWS])
def test_each_difference_is_tested(test):
    assert any(f"def {test}(" in path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))


# Form


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_line_is_too_long(page):
    assert [number for number, line in enumerate(page.read_text().splitlines(), 1) if len(line) > 160] == []


def anchor(title: str) -> str:
    """The fragment of a heading's address, as forges make it."""
    return re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_relative_link_resolves(page):
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, fragment = target.partition("#")
        file = page.parent / path if path else page
        if not file.exists() or (fragment and fragment not in map(anchor, re.findall(r"^#+ (.+)$", file.read_text(), re.M))):
            broken.append(target)
    assert broken == []


def test_kept_reports_name_no_machine():
    reports = sorted((ROOT / "docs/results").glob("*/report.md"))
    assert len(reports) > 20
    assert [path.parent.name for path in reports if re.search(r"--output_dir '?/", path.read_text())] == []


def test_targets_of_make_that_pages_name_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    named = {word for page in PAGES for word in re.findall(r"(?:^|`)make ([a-z-]+)", page.read_text(), re.M)}
    assert {"demo", "test"} <= named <= targets


# Command lines: those of README and docs, of scripts' docstrings and of the headers of config files

AGAINST = "not our advice"  # marks a command that shows what docs/RESULTS.md advises against, on its line or in its header
V_PREDICTION = ("stabilityai/stable-diffusion-2", "stabilityai/stable-diffusion-2-1")  # checkpoints whose scheduler says so
SCRIPTS = [*ROOT.glob("*.py"), *ROOT.glob("scripts/*.py"), *ROOT.glob("immiscible/commands/*.py")]
CONFIGS = {
    "train_unconditional.py": UnconditionalConfig,
    "train_text_to_image.py": TextToImageConfig,
    "finetune_sd.py": TextToImageConfig,
}


def text_of(path: Path) -> str:
    """A page, a script's docstring, or the header of a config file."""
    text = path.read_text()
    if path.suffix == ".py":
        return ast.get_docstring(ast.parse(text)) or ""
    return "\n".join(line.removeprefix("#") for line in text.splitlines() if line.startswith("#")) if path.suffix == ".yaml" else text


def commands(text: str) -> list[tuple[str, str]]:
    """Each command line, and what stands behind it on its lines or (in code of a sentence) its paragraph's line."""
    found = []
    joined = re.sub(r" *(#[^\n]*)?\\\n *", lambda cut: f" {cut[1] or ''} ", text)
    for line in re.findall(r"^ *((?:accelerate launch|python) \S*\w\.py\b.*|accelerate launch --.*\.py\b.*)$", joined, re.M):
        command, _, comment = line.partition(" #")
        found.append((command, comment))
    within = re.sub(r"```.*?```", "", text, flags=re.S)
    return found + [(" ".join(code.split()), "") for code in re.findall(r"`((?:python|accelerate launch) [^`]*\.py\b[^`]*)`", within)]


def split(command: str) -> tuple[str, list[str]]:
    """The script and its words; what the launcher takes is checked by its own parser."""
    words = [word for word in shlex.split(command) if word != "..."]
    if words[0] == "python":
        return words[1], words[2:]
    launched = launch_command_parser().parse_args(words[2:])
    return launched.training_script, launched.training_script_args


class Parsed(Exception):
    """A script's parser is content."""


@cache
def module_of(script: Path) -> ModuleType:
    """A script of ``scripts``, imported."""
    spec = importlib.util.spec_from_file_location(script.stem, script)
    module = importlib.util.module_from_spec(spec)
    sys.modules[script.stem] = module  # for its dataclasses
    spec.loader.exec_module(module)
    return module


def parse_only(script: Path, words: list[str], monkeypatch) -> None:
    """Runs a script of ``scripts`` up to where its parser is done."""
    parse_args = argparse.ArgumentParser.parse_args

    def stop(*arguments, **options):
        raise Parsed(parse_args(*arguments, **options))

    main = module_of(script).main
    with monkeypatch.context() as patch, pytest.raises(Parsed):
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        main(words)


def trainings(script: str, words: list[str], monkeypatch) -> list[UnconditionalConfig | TextToImageConfig]:
    """The configurations that a command trains or compares, after all its flags have been parsed; none for other scripts."""
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    path = ROOT / script
    if script in CONFIGS:
        digits = ROOT / "configs/tasks/digits.yaml"
        return [parse_config(CONFIGS[script], words, program=script, description="", no_data_config=digits)]
    if script == "scripts/precompute_latents.py":
        kind = "ImageCacheConfig" if flag_value(words, "vae_model_name_or_path") else "TextCacheConfig"
        return [parse_config(getattr(module_of(path), kind), words, program=script, description="")]
    if script == "scripts/compare.py":
        own, shared = compare.parse(words)
        if own.runs:
            return []
        grid = {"task": own.task, "methods": own.methods, "seeds": own.seeds, "script": [str(own.script)], "output_dir": own.output_dir}
        jobs, _ = plan(**grid, shared=shared)
        return [parse_config(CONFIGS[own.script.name], job.words[1:], program=script, description="") for job in jobs]
    parse_only(path, words, monkeypatch)
    return []


def advised_against(config: UnconditionalConfig | TextToImageConfig) -> str:
    """Why docs/RESULTS.md advises against a configuration; nothing if it does not. A checkpoint that is not known predicts epsilon."""
    predicts = config.prediction_type
    if getattr(config, "objective", "denoising") != "denoising":
        predicts = "preconditioned"
    if predicts is None:
        predicts = "v_prediction" if config.pretrained_model_name_or_path in V_PREDICTION else "epsilon"
    if config.noise_coupling in ("independent", "flipped_assignment"):
        return ""
    if predicts == "epsilon":
        return f"{config.noise_coupling} with epsilon-prediction"
    if config.loss_weighting in ("snr", "change_aware", "change_aware_released"):
        return f"{config.noise_coupling} with {config.loss_weighting}, which weighs as epsilon-prediction does"
    if isinstance(config, TextToImageConfig) and config.coupling_condition == "none":
        return f"{config.noise_coupling} by the image alone on latents with captions"
    return ""


SOURCES = [*PAGES, *sorted(SCRIPTS), *sorted((ROOT / "configs").rglob("*.yaml"))]
COMMANDS = [
    pytest.param(path, command, comment, id=f"{path.name}-{number}")
    for path in SOURCES
    for number, (command, comment) in enumerate(commands(text_of(path)))
]


@pytest.mark.parametrize(("path", "command", "comment"), COMMANDS)
def test_a_command_parses_and_is_what_the_results_advise(path, command, comment, monkeypatch):
    script, words = split(command.replace("configs/tasks/TASK.yaml", "configs/tasks/sd_tiny.yaml"))
    configs = trainings(script, words, monkeypatch)
    marked = AGAINST in (text_of(path) if path.suffix == ".yaml" else comment)
    compared = script == "scripts/compare.py"  # measures arms, good ones and others
    shown = [] if compared else [why for config in configs if (why := advised_against(config))]
    assert shown == [] or marked, shown
    scores = path.suffix == ".yaml" and not configs  # beside the header's line that trains
    assert shown or not marked or scores, f"says {AGAINST!r} of what nothing speaks against"


def test_the_rule_knows_what_is_advised_against(monkeypatch):
    coupled = ["--config", "configs/methods/immiscible.yaml"]
    for words, why in (
        (["--train_data_dir", "x", *coupled], "epsilon"),
        (["--train_data_dir", "x", "--noise_coupling", "nearest"], "epsilon"),
        (
            ["--train_data_dir", "x", "--prediction_type", "v_prediction", "--config", "configs/methods/immiscible_speed.yaml"],
            "change_aware",
        ),
        (["--train_data_dir", "x", "--prediction_type", "v_prediction", *coupled], ""),
        (["--train_data_dir", "x"], ""),
    ):
        (config,) = trainings("train_unconditional.py", words, monkeypatch)
        assert why in advised_against(config) and bool(why) == bool(advised_against(config))
    for name, why in (("CompVis/stable-diffusion-v1-4", "epsilon"), ("stabilityai/stable-diffusion-2-1", "captions")):
        words = ["--pretrained_model_name_or_path", name, "--train_data_dir", "x", *coupled]
        (config,) = trainings("finetune_sd.py", words, monkeypatch)
        assert why in advised_against(config)
        (config,) = trainings("finetune_sd.py", words[:-2], monkeypatch)
        assert advised_against(config) == ""


def test_commands_are_found_wherever_they_stand():
    text = "a `python scripts/a.py --b` c\n```bash\naccelerate launch x.py --y \\\n  --z  # not our advice\n```\n    python y.py # why \\\n"
    assert commands(text)[0][0].strip() == "accelerate launch x.py --y  --z"
    assert commands(text)[0][1].strip() == AGAINST
    assert ("python scripts/a.py --b", "") in commands(text) and len(commands(text)) == 3
    assert len([path for path in SOURCES if path.suffix == ".md" and commands(text_of(path))]) >= 3


def test_a_command_that_does_not_parse_is_noticed(monkeypatch):
    for script, words in (
        ("train_unconditional.py", ["--train_data_dirs", "x"]),
        ("scripts/plot_timesteps.py", ["--nothing"]),
        ("scripts/compare.py", ["--task", "digits", "--methods", "baseline", "--", "--eval_stepss", "50"]),
    ):
        with pytest.raises((UserError, SystemExit)):
            trainings(script, words, monkeypatch)
