import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from compared import decay, write_run
from launch import ROOT

from immiscible.commands import compare
from immiscible.errors import UserError
from immiscible.reports import grid as runs
from immiscible.reports import plan

SCRIPT = ROOT / "scripts" / "compare.py"

# A training script in the outline: it reads flags and files, continues, leaves what a run leaves, and misbehaves when told to.
FAKE = """
import json, os, signal, sys, time
from pathlib import Path

words, flags, name = sys.argv[1:], {}, None
for word in words:
    if word.startswith("--"):
        name = word[2:]
        flags[name] = []
    else:
        flags[name].append(word)
settings = {}
for path in flags.pop("config"):
    settings.update(line.split(": ") for line in Path(path).read_text().splitlines())
settings.update({key: " ".join(values) for key, values in flags.items()})
folder, steps, mode = Path(settings["output_dir"]), int(settings["max_train_steps"]), settings.get("mode", "")
folder.mkdir(parents=True, exist_ok=True)
with (folder.parent / "starts.txt").open("a") as file:
    file.write(f"{folder.name} {os.environ.get('OMP_NUM_THREADS')}\\n")
state = folder / "state.json"
step = json.loads(state.read_text()) if state.exists() else 0
(folder / "config.yaml").write_text("".join(f"{key}: {value}\\n" for key, value in settings.items()))
stopped = []
signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
broken = not (folder.parent / "repaired").exists()
while step < steps:
    step += 10
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": step, "step_seconds": 0.1}) + "\\n")
    value = 50 * 0.9 ** (step / 10 * float(settings.get("speed", 1))) * (1 + int(settings["seed"]) / 10)
    line = {"step": step, "train_seconds": step / 10, "feature": "FD-digits", "samples": 100, "reference_images": 100, "data": "d"}
    with (folder / "evaluation.jsonl").open("a") as file:
        file.write(json.dumps({**line, "frechet_distance": {"5": value, "20": value / 2}}) + "\\n")
    state.write_text(str(step))
    if step == 30 and broken:
        if mode == "crash":
            print("some output\\nRuntimeError: out of cheese")
            sys.exit(3)
        if mode == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if mode == "give_up":
            print("stopped by the time limit")
            sys.exit(0)
    while mode == "wait" and broken and not stopped:
        time.sleep(0.01)
    if stopped:
        print(f"saved at {step}")
        sys.exit(0)
(folder / "summary.json").write_text(json.dumps({"step": step}))
"""


@pytest.fixture
def script():
    return compare


@pytest.fixture
def grid(tmp_path, monkeypatch):
    """Writes the fake script, a task and methods; gives the command line of a comparison of some methods."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runs, "POLL_SECONDS", 0.02)
    Path("fake.py").write_text(FAKE)
    Path("task.yaml").write_text("max_train_steps: 100\neval_steps: 10\n")
    for name, text in {
        "plain": "speed: 1",
        "fast": "speed: 2",
        "crash": "mode: crash",
        "kill": "mode: kill",
        "give_up": "mode: give_up",
        "wait": "mode: wait",
    }.items():
        Path(f"{name}.yaml").write_text(text + "\n")

    def words(*methods, seeds=(0, 1), jobs=2, more=()):
        paths = [method if method.endswith(".yaml") else f"{method}.yaml" for method in methods]
        numbers = [str(seed) for seed in seeds]
        return [
            *("--task", "task.yaml", "--methods", *paths, "--seeds", *numbers, "--script", "fake.py"),
            *("--output_dir", "out", "--jobs", str(jobs), *more),
        ]

    return words


def starts():
    path = Path("out/starts.txt")
    return [line.split()[0] for line in path.read_text().splitlines()] if path.exists() else []


def test_a_grid_is_trained_and_reported(script, grid, capsys):
    script.main(grid("plain", "fast"))
    assert sorted(starts()) == ["fast-seed0", "fast-seed1", "plain-seed0", "plain-seed1"]
    shown = capsys.readouterr().out
    assert "Best arm: fast reached plain's final FD-digits 2.00 times sooner in training steps" in shown
    assert "report in out/report.html" in shown and "| fast " in shown
    text = Path("out/report.md").read_text()
    for seed in range(2):
        command = (
            f"python fake.py --config task.yaml fast.yaml --seed {seed} --output_dir out/fast-seed{seed} --resume_from_checkpoint latest"
        )
        assert f"OMP_NUM_THREADS=1 {command}\n" in text


def test_seeds_are_interleaved_and_one_job_keeps_the_threads(script, grid, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    script.main(grid("plain", "fast", jobs=1))
    lines = Path("out/starts.txt").read_text().splitlines()
    assert lines == [f"{name}-seed{seed} None" for seed in range(2) for name in ("plain", "fast")]
    shutil.rmtree("out")
    script.main(grid("plain", "fast", jobs=3))
    assert {line.split()[1] for line in Path("out/starts.txt").read_text().splitlines()} == {"1"}


def test_finished_runs_are_skipped_without_a_process(script, grid, capsys):
    script.main(grid("plain", "fast"))
    before = starts()
    report = Path("out/report.html").read_bytes()
    script.main(grid("plain", "fast"))
    assert starts() == before and "4 of 4 runs are finished already" in capsys.readouterr().out
    assert Path("out/report.html").read_bytes() == report
    Path("out/fast-seed1/summary.json").unlink()
    script.main(grid("plain", "fast"))
    assert starts()[len(before) :] == ["fast-seed1"]


@pytest.mark.slow
def test_changed_settings_and_longer_runs_are_given_to_the_training_script(script, grid):
    script.main(grid("plain", "fast", seeds=[0]))
    before = starts()
    script.main(grid("plain", "fast", seeds=[0], more=["--", "--max_train_steps", "150"]))
    assert sorted(starts()[len(before) :]) == ["fast-seed0", "plain-seed0"]
    assert json.loads(Path("out/fast-seed0/summary.json").read_text())["step"] == 150
    before = starts()
    Path("fast.yaml").write_text("speed: 3\n")
    script.main(grid("plain", "fast", seeds=[0], more=["--", "--max_train_steps", "150"]))
    assert starts()[len(before) :] == ["fast-seed0"]


@pytest.mark.parametrize(
    "mode, what",
    [
        ("crash", r"failed with exit code 3: RuntimeError: out of cheese \(log out/logs/crash-seed0.log\)"),
        ("kill", r"killed by signal 9 \(SIGKILL\); its log is out/logs/kill-seed0.log"),
        ("give_up", r"stopped before its last step: stopped by the time limit \(log out/logs/give_up-seed0.log\)"),
    ],
)
def test_a_failed_run_is_named_and_the_others_finish(script, grid, capsys, mode, what):
    words = grid("plain", mode, "fast", jobs=1, seeds=[0])
    with pytest.raises(UserError, match=rf"1 of 3 runs failed: {mode}-seed0; the same command tries them again") as caught:
        script.main(words)
    assert caught.value.exit_code == 1
    assert re.search(rf"{mode}-seed0: {what}", capsys.readouterr().out)
    for report in ("report.md", "report.html"):
        text = Path("out", report).read_text()
        assert re.search(rf"{mode}-seed0: {what} \(last measured at step 30 of 100; drawn, not counted\)", text)
        assert "Best arm: fast" in text
    Path("out/repaired").touch()
    script.main(words)  # continues the one that failed, from where it was
    assert starts() == ["plain-seed0", f"{mode}-seed0", "fast-seed0", f"{mode}-seed0"]
    steps = [json.loads(line)["step"] for line in Path(f"out/{mode}-seed0/metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(10, 101, 10))
    assert "Not counted" not in Path("out/report.md").read_text()


def test_a_run_that_never_measured_anything_is_named(script, grid):
    Path("broken.yaml").write_text("max_train_steps: none\n")
    with pytest.raises(UserError, match="1 of 2 runs failed: broken-seed0"):
        script.main(grid("plain", "broken", seeds=[0]))
    text = Path("out/report.md").read_text()
    assert "broken-seed0: failed with exit code 1: ValueError: invalid literal for int()" in text
    assert "Nothing can be said yet" in text


def test_all_runs_failing_is_an_error(script, grid, capsys):
    Path("broken.yaml").write_text("max_train_steps: none\n")
    with pytest.raises(UserError, match="no run has been measured"):
        script.main(grid("broken", seeds=[0]))
    assert "broken-seed0: failed with exit code 1" in capsys.readouterr().out


def wait_for(condition):
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.02)
    raise AssertionError("it never came")


def alive(pattern):
    """Processes of this test's fake script."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        if pattern in words:
            found.append(path.parent.name)
    return found


@pytest.mark.parametrize("how", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_ctrl_c_stops_the_runs_and_the_same_command_continues(script, grid, how, tmp_path):
    words = grid("wait", "plain", seeds=[0])
    words[words.index("fake.py")] = fake = str(tmp_path / "fake.py")  # so that its processes can be told from others
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    # a terminal sends Ctrl-C to the whole group; only this script may hear it
    process = subprocess.Popen([sys.executable, str(SCRIPT), *words], env=environment, stderr=subprocess.PIPE, start_new_session=True)
    try:
        wait_for(lambda: Path("out/wait-seed0/state.json").exists() and Path("out/plain-seed0/summary.json").exists())
        os.killpg(process.pid, how)
        _, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 1
    assert "compare.py: error: interrupted" in errors.decode() and "same command continues" in errors.decode()
    assert "Traceback" not in errors.decode()
    assert not alive(fake)
    assert "saved at 10" in Path("out/logs/wait-seed0.log").read_text()
    Path("out/repaired").touch()
    script.main(words)
    steps = [json.loads(line)["step"] for line in Path("out/wait-seed0/metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(10, 101, 10))


@pytest.mark.slow
def test_a_killed_comparison_leaves_a_run_that_is_not_disturbed_and_then_continued(script, grid, tmp_path):
    command = grid("wait", seeds=[0])
    command[command.index("fake.py")] = fake = str(tmp_path / "fake.py")
    process = subprocess.Popen([sys.executable, str(SCRIPT), *command], env={**os.environ, "PYTHONPATH": str(ROOT)}, start_new_session=True)
    try:
        wait_for(lambda: Path("out/wait-seed0/state.json").exists())
        process.kill()
        process.wait()
        left = r"another comparison, or a run that one left behind, is training in out \(process \d+\)"
        with pytest.raises(UserError, match=left) as caught:
            script.main(command)
        assert re.search(r"process (\d+)", str(caught.value))[1] in alive(fake)
    finally:
        process.kill()
        for number in alive(fake):
            os.kill(int(number), signal.SIGTERM)
    wait_for(lambda: not alive(fake))
    Path("out/repaired").touch()
    script.main(command)
    steps = [json.loads(line)["step"] for line in Path("out/wait-seed0/metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(10, 101, 10)) and starts() == ["wait-seed0", "wait-seed0"]


def test_two_comparisons_do_not_train_in_one_folder(script, grid):
    Path("out/logs").mkdir(parents=True)
    with runs.locked(Path("out")), pytest.raises(UserError, match="another comparison") as caught:
        script.main(grid("plain", "fast"))
    assert caught.value.exit_code == 1 and not starts()
    script.main(grid("plain", "fast"))


def test_methods_are_renamed_put_together_and_compared_with_a_chosen_baseline(script, grid, capsys):
    script.main(grid("plain", "again=plain", "fast", "fast.yaml+crash", seeds=[0], more=["--baseline", "fast", "--", "--mode", "none"]))
    shown = capsys.readouterr().out
    assert "fast's final" in shown
    arms = {line.split("|")[1].strip(): line for line in shown.splitlines() if line.startswith("| ")}
    assert "harm" in arms["plain"] and "harm" in arms["again"] and "no effect" in arms["fast+crash"]
    plain, again = (Path(f"out/{name}-seed0/evaluation.jsonl").read_text() for name in ("plain", "again"))
    assert plain == again


def test_runs_are_read_by_folder_name_by_names_and_by_flags(script, grid, capsys):
    script.main(grid("plain", "fast"))
    folders = [f"out/{name}-seed{seed}" for name in ("fast", "plain") for seed in range(2)]
    capsys.readouterr()
    script.main(["--runs", *folders, "--baseline", "plain", "--output_dir", "again"])
    shown = capsys.readouterr().out
    assert "Best arm: fast reached plain's" in shown and Path("again/report.html").exists()
    script.main(["--runs", *folders, "--names", "a", "a", "b", "b", "--output_dir", "again"])
    assert "b reached a's" not in capsys.readouterr().out and len(starts()) == 4
    for number, folder in enumerate(folders):
        Path(folder).rename(f"run{number}")
    script.main(["--runs", *(f"run{number}" for number in range(4)), "--output_dir", "again"])
    assert "speed=2 against" not in capsys.readouterr().out
    assert "| speed=1" in Path("again/report.md").read_text()


def test_the_report_is_opened_where_there_is_a_screen(script, grid, monkeypatch):
    opened = []
    monkeypatch.setattr(script.webbrowser, "open", opened.append)
    monkeypatch.setattr(script.sys, "platform", "linux")
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    script.main([*grid("plain"), "--open"])
    assert opened == []
    monkeypatch.setenv("DISPLAY", ":0")
    script.main(grid("plain"))
    assert opened == []
    script.main([*grid("plain"), "--open"])
    assert opened == [Path("out/report.html").resolve().as_uri()]


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "give either --runs"),
        (["--runs", "a", "--methods", "b"], "give either --runs"),
        (["--runs", "a", "b", "--names", "c"], "--names needs one name for each of --runs: 1 names, 2 folders"),
        (["--runs", "a", "--", "--eval_steps", "3"], "--runs trains nothing"),
        (["--runs", "a", "./a"], "names a twice"),
        (["--runs", "nowhere"], "nowhere: no such folder"),
        (["--methods", "plain.yaml"], "--methods needs --task"),
        (["--method", "plain.yaml"], "unrecognized arguments: --method"),
        (["--task", "digits", "--methods", "nope"], "--methods nope: no such file; configs/methods holds baseline, "),
        (["--task", "nope", "--methods", "baseline"], "--task nope: no such file; configs/tasks holds celeba64_consistency, "),
        (["--task", "task.yaml", "--methods", "plain.yaml", "plain.yaml"], "plain is there twice"),
        (["--task", "task.yaml", "--methods", "plain.yaml", "--baseline", "x"], "--baseline x is not one of the arms: plain"),
        (["--task", "plain.yaml", "--methods", "plain.yaml"], "nothing would be measured: set eval_steps"),
        (
            ["--task", "task.yaml", "--methods", "plain.yaml", "--guidance_scale", "1.5"],
            "--guidance_scale 1.5 would not be measured: put `-- --eval_guidance_scales 1 1.5` at the end",
        ),
        (["--task", "task.yaml", "--methods", "plain.yaml", "--jobs", "0"], "--jobs must be at least 1, not 0"),
        (["--task", "task.yaml", "--methods", "plain.yaml", "--seeds", "1", "1"], "--seeds must be different numbers"),
        (["--task", "task.yaml", "--methods", "plain.yaml", "--", "--seed=3"], "--seed=3 after `--` is set by this script"),
        (["--task", "task.yaml", "--methods", "plain.yaml", "--script", "no.py"], "--script no.py: no such file"),
        (["--task", "bad.yaml", "--methods", "plain.yaml"], "bad.yaml: "),
        (["--task", "task.yaml", "--methods", "plain.yaml", "--output_dir", "plain.yaml"], "--output_dir plain.yaml cannot be written"),
    ],
)
def test_usage_errors(script, grid, words, message):
    Path("bad.yaml").write_text("a: [")
    with pytest.raises(UserError) as caught:
        script.main(words)
    assert message in str(caught.value)
    assert not Path("out").exists()


def test_flags_are_found_where_they_are_set(grid):
    value = plan.flag_value
    Path("a.yaml").write_text("eval_steps: 5\nlist: [1, 2]\n")
    Path("b.yaml").write_text("eval_steps:\n")
    assert value("eval_steps", [Path("a.yaml"), Path("b.yaml")], []) == "5"
    assert value("eval_steps", [Path("a.yaml")], ["--x", "--eval_steps", "7"]) == "7"
    assert value("eval_steps", [Path("b.yaml")], ["--eval_steps=9"]) == "9"
    assert value("eval_steps", [Path("b.yaml")], ["--other", "eval_steps"]) is None
    assert value("eval_steps", [], ["--eval-steps", "9", "--x"]) == "9"
    assert value("log_class_leak", [], ["--log_class_leak", "--x", "1"]) == value("log_class_leak", [], ["--log_class_leak"]) == "true"


def commands():
    """The commands of the arms as the report shows them, seed 0."""
    text = Path("out/report.md").read_text()
    return {name: line for name in ("plain", "skewed", "paired") for line in text.splitlines() if f"out/{name}-seed0 " in line}


def test_arms_go_without_shared_flags_that_they_do_not_use(script, grid, capsys):
    Path("skewed.yaml").write_text("speed: 2\ntimestep_sampling: asymmetric\n")
    Path("paired.yaml").write_text("speed: 1\nnoise_coupling: assignment\ncoupling_metric: squared_l2\n")
    shared = ["--", "--asymmetric_k", "9", "--coupling-condition=penalty", "--coupling_condition_ratio", "0.1", "--mode", "none"]
    script.main(grid("plain", "skewed", "paired", seeds=[0], more=shared))
    shown = capsys.readouterr().out
    assert "--asymmetric_k 9 is left out for plain, paired: it is used by --timestep_sampling asymmetric" in shown
    assert "--coupling-condition=penalty is left out for plain, skewed: it is used by --noise_coupling assignment" in shown
    assert "--coupling_condition_ratio 0.1 is left out for plain, skewed: it is used by " in shown
    found = commands()
    assert found["plain"].endswith(" latest --mode none")
    assert found["skewed"].endswith(" latest --asymmetric_k 9 --mode none")
    assert found["paired"].endswith(" latest --coupling-condition=penalty --coupling_condition_ratio 0.1 --mode none")


def test_a_shared_flag_that_no_arm_uses_is_an_error(script, grid):
    with pytest.raises(UserError, match=r"^--asymmetric_k 9 after `--` is used by --timestep_sampling .*, and by none of the arms"):
        script.main(grid("plain", "fast", more=["--", "--asymmetric_k", "9"]))
    assert not Path("out").exists()
    script.main(grid("plain", seeds=[0], more=["--", "--asymmetric_k", "5"]))  # its default, which changes nothing


def test_an_arms_own_flag_that_it_does_not_use_is_left_to_its_run(script, grid):
    Path("plain.yaml").write_text("speed: 1\nasymmetric_k: 9\n")
    Path("skewed.yaml").write_text("speed: 2\ntimestep_sampling: asymmetric\n")
    script.main(grid("plain", "skewed", seeds=[0], more=["--", "--asymmetric_k", "7"]))
    assert "plain.yaml" in commands()["plain"] and "--asymmetric_k" not in commands()["plain"]


@pytest.mark.slow
def test_a_run_that_refuses_its_own_flag_is_named(script, grid):
    """The real script, whose error this is."""
    Path("task.yaml").write_text("bundled_data: digits\nmax_train_steps: 1\neval_steps: 1\n")
    Path("plain.yaml").write_text("asymmetric_k: 9\n")
    words = grid("plain", seeds=[0])
    words[words.index("fake.py")] = str(ROOT / "train_unconditional.py")
    with pytest.raises(UserError, match="no run has been measured"):
        script.main(words)
    assert "--asymmetric_k belongs to --timestep_sampling asymmetric" in Path("out/logs/plain-seed0.log").read_text()


def test_every_run_that_was_never_measured_is_named_before_any_is_read(script, grid):
    script.main(grid("plain", "fast", seeds=[0]))
    for name in ("one", "other"):
        shutil.copytree("out/fast-seed0", name)
        (Path(name) / "evaluation.jsonl").unlink()
    (Path("out/plain-seed0") / "metrics.jsonl").write_text("[1]\n")  # would be the first error if it were read
    for names in ([], ["--names", "a", "b", "c"]):
        with pytest.raises(UserError, match=r"^one, other: evaluation.jsonl is missing or empty.* --eval_steps") as caught:
            script.main(["--runs", "out/plain-seed0", "one", "other", *names])
        assert caught.value.exit_code == 1


def test_runs_of_which_none_was_measured_are_reported_by_losses_times_and_samples(script, grid, capsys):
    script.main(grid("plain", "fast"))
    folders = [Path("out", f"{name}-seed{seed}") for name in ("plain", "fast") for seed in range(2)]
    for folder in folders:
        (folder / "evaluation.jsonl").unlink()
    (folders[0] / "evaluation.jsonl").touch()
    capsys.readouterr()
    for names in ([], ["--names", "a", "a", "b", "b"]):
        script.main(["--runs", *map(str, folders), *names, "--output_dir", "again"])
        shown = capsys.readouterr().out
        assert "nothing here says which arm is better" in shown and "report in again/report.html and again/report.md" in shown
        assert re.search(rf"\| {'a ' if names else 'plain'} +\| 2 +\| 100 ", shown)
        for name in ("again/report.html", "again/report.md"):
            assert "--eval_steps N" in Path(name).read_text()
    with pytest.raises(UserError, match="--guidance_scale chooses among distances, and none of these runs was measured"):
        script.main(["--runs", *map(str, folders), "--guidance_scale", "2"])
    with pytest.raises(UserError, match="the baseline 'c' is not one of the arms: plain, fast"):
        script.main(["--runs", *map(str, folders), "--baseline", "c", "--output_dir", "again"])


@pytest.mark.parametrize("value", ["NaN", "Infinity"])
def test_a_diverged_run_does_not_cost_the_report(script, tmp_path, value):
    folders = [write_run(tmp_path / name, {5: decay()}, seed=seed) for seed, name in enumerate(("a", "b", "c"))]
    lines = (folders[2] / "evaluation.jsonl").read_text().splitlines()
    lines = [re.sub(r'"frechet_distance": .*', f'"frechet_distance": {{"5": {value}}}}}', line) for line in lines]
    (folders[2] / "evaluation.jsonl").write_text("\n".join(lines) + "\n")
    script.main(["--runs", *map(str, folders), "--names", "plain", "plain", "other", "--output_dir", str(tmp_path / "out")])
    assert "Some distances are not finite" in (tmp_path / "out" / "report.md").read_text()


def test_a_text_run_whose_checkpoints_do_not_say_how_it_began_is_reported(script, tmp_path):
    folders = [write_run(tmp_path / str(seed), {5: decay()}, seed=seed, text=True) for seed in range(2)]
    for folder in folders:
        (folder / "checkpoint-500").mkdir()
        (folder / "checkpoint-500" / "training_state.json").write_text('{"step": 500, "identity": {"network": {}}, "files": {}}')
    script.main(["--runs", *map(str, folders), "--output_dir", str(tmp_path / "out")])
    assert "finetune_sd.py" in (tmp_path / "out" / "report.md").read_text()


HELP = f"""
import runpy, sys
sys.argv = ["compare.py", "--help"]
try:
    runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
except SystemExit as end:
    assert end.code == 0
heavy = {{"diffusers", "transformers", "accelerate", "datasets", "matplotlib", "jinja2", "numba", "torch"}}
print("loaded:", *sorted(heavy & sys.modules.keys()))
"""


def test_help_says_what_runs_must_have_and_loads_nothing_heavy():
    shown = subprocess.run([sys.executable, "-c", HELP], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert shown.stdout.endswith("loaded:\n"), shown.stdout + shown.stderr
    assert "each of which was trained with --eval_steps" in shown.stdout
