import json
import math

import pytest
from compared import decay, leave_checkpoint, write_run

from immiscible.errors import UserError
from immiscible.reports.comparison import compare
from immiscible.reports.page import write_report
from immiscible.reports.runs import command_of, group_runs, read_run


def test_a_resumed_run_may_have_measured_a_step_twice_and_not_in_order(tmp_path):
    folder = write_run(tmp_path / "a", {5: decay()})
    lines = (folder / "evaluation.jsonl").read_text().splitlines(keepends=True)
    stale = lines[2].replace('"samples": 1500', '"samples": 1')
    (folder / "evaluation.jsonl").write_text("".join([*lines[3:], stale, *lines[:3], '{"step": 600, "tr']))
    run = read_run(folder)
    assert run.curve(5) == decay() and {line["samples"] for line in run.evaluations} == {1500}


def test_extended_runs_are_finished_when_their_new_last_step_is_reached(tmp_path):
    assert read_run(write_run(tmp_path / "a", {5: decay()})).finished
    assert not read_run(write_run(tmp_path / "b", {5: decay()}, max_train_steps=1000)).finished


def test_arms_by_the_flags_that_differ(tmp_path):
    first = [write_run(tmp_path / f"a{seed}", {5: decay()}, seed=seed, logging_steps=5 + seed) for seed in range(2)]
    second = write_run(tmp_path / "b", {5: decay()}, noise_coupling="assignment", loss_weighting="change_aware")
    third = write_run(tmp_path / "c", {5: decay()}, noise_coupling="nearest", coupling_candidates=16, prediction_type="epsilon")
    assert group_runs([*first, second, third]) == {
        "prediction_type=v_prediction": first,
        "prediction_type=v_prediction + assignment + change_aware": [second],
        "nearest + coupling_candidates=16": [third],
    }
    assert group_runs([*first, second]) == {"baseline": first, "assignment + change_aware": [second]}


def test_command_names_every_flag_that_is_not_the_default():
    config = {"bundled_data": "digits", "use_ema": True, "seed": 3, "resolution": 64, "some_new_list": [5, 20], "output_dir": "a b"}
    assert command_of(config) == (
        "python train_unconditional.py --bundled_data digits --use_ema --seed 3 --some_new_list 5 20 --output_dir 'a b'"
    )
    assert "False" not in command_of({"use_ema": False}) and "hf_" not in command_of({"hub_token": "hf_secret"})


@pytest.mark.parametrize("from_scratch, script", [(True, "train_text_to_image.py"), (False, "finetune_sd.py")])
def test_the_command_of_a_text_run_is_of_its_own_script(tmp_path, from_scratch, script):
    folder = write_run(tmp_path / "a", {5: decay()}, text=True, resolution=64)  # the other script's default
    leave_checkpoint(folder, from_scratch)
    [command] = compare({"a": [folder]}).arms["a"].commands
    assert command.startswith(f"python {script} ") and "--pretrained_model_name_or_path sd" in command and "--resolution 64" in command
    assert "--train_batch_size" not in command and "--lr_scheduler" not in command


def test_text_runs_that_differ_in_what_they_show_alone_are_one_arm(tmp_path):
    changes = ({"report_to": "none"}, {"validation_prompts": ["a cat"], "latent_cache_dir": "elsewhere", "guidance_scale": 3.0})
    folders = [write_run(tmp_path / str(seed), {5: decay()}, seed=seed, text=True, **more) for seed, more in enumerate(changes)]
    assert len(group_runs(folders)) == 1
    leave_checkpoint(folders[0], from_scratch=True)
    assert group_runs(folders) == {"script=train_text_to_image.py": folders[:1], "script=finetune_sd.py": folders[1:]}


def test_bad_folders(arms, tmp_path):
    def message(folder):
        with pytest.raises(UserError) as caught:
            compare({**arms, "other": [folder]})
        assert "\n" not in str(caught.value)
        return str(caught.value), caught.value.exit_code

    assert message(tmp_path / "nowhere") == (f"{tmp_path / 'nowhere'}: no such folder", 2)
    (tmp_path / "empty").mkdir()
    assert message(tmp_path / "empty") == (f"{tmp_path / 'empty'}: not a run's folder: it holds no config.yaml", 2)
    unmeasured = write_run(tmp_path / "unmeasured", {5: decay(), 20: decay()})
    (unmeasured / "evaluation.jsonl").unlink()
    assert "evaluation.jsonl is missing or empty" in message(unmeasured)[0] and "--eval_steps" in message(unmeasured)[0]
    another = write_run(tmp_path / "another", {5: decay(), 20: decay()}, noise_coupling="nearest")
    (another / "evaluation.jsonl").write_text("")
    with pytest.raises(
        UserError, match=f"^{unmeasured}, {another}: evaluation.jsonl is missing or empty.* train each of them again"
    ) as caught:
        group_runs([*arms["baseline"], unmeasured, another])  # before any is read
    assert caught.value.exit_code == 1 and f"--config {unmeasured}/config.yaml --output_dir ANOTHER_FOLDER" in str(caught.value)
    (unmeasured / "evaluation.jsonl").write_text('{"step": 100, "frechet_distance": {"5": 1.0}}\n')
    assert "lines without data, feature, reference_images, samples, train_seconds" in message(unmeasured)[0]
    (unmeasured / "evaluation.jsonl").write_text("[1]\n")
    assert "is damaged" in message(unmeasured)[0] and message(unmeasured)[1] == 1
    for text in ("a: [", "just words", "\x00", "seed: x", "max_train_steps: many"):
        (unmeasured / "config.yaml").write_text(text)
        assert message(unmeasured)[1] == 1
    assert message(tmp_path)[0].startswith(f"{tmp_path}: not a run's folder: it holds no config.yaml, but runs; name them, as ")
    assert "in common" in message(write_run(tmp_path / "seven", {7: decay()}))[0]
    with pytest.raises(UserError, match="end at different steps"):
        compare({"a": [arms["baseline"][0], write_run(tmp_path / "short", {5: decay(stop=400), 20: decay(stop=400)}, seed=9)]})
    with pytest.raises(UserError, match="are both seed 0 of a; give them different names"):
        compare({"a": [arms["baseline"][0], arms["copy"][0]]})
    with pytest.raises(UserError, match="nothing to compare"):
        compare({"a": [tmp_path / "nowhere"]}, problems={tmp_path / "nowhere": "failed"})
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        write_report(compare(arms), tmp_path / "file")


@pytest.mark.parametrize(
    "change",
    [
        {"frechet_distance": None},
        {"frechet_distance": {"a": 1.0}},
        {"frechet_distance": {"5": "x"}},
        {"train_seconds": None},
        {"step": None},
        {"samples": "many"},
        {"step": -100},
        {"train_seconds": math.nan},
        {"feature": ["FD"]},
        {"metrics": ["kid"]},
        {"metrics": {"kid": {"a": 1.0}}},
        {"metrics": {}, "metrics_real": {"kid": "x"}},
        {"data": []},
    ],
)
def test_damaged_evaluations_are_one_line(tmp_path, change):
    folder = write_run(tmp_path / "a", {5: decay()})
    lines = [json.loads(line) for line in (folder / "evaluation.jsonl").read_text().splitlines()]
    lines[2] |= change
    (folder / "evaluation.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(UserError, match=r"a/evaluation.jsonl: cannot be read \(.+\)$") as caught:
        read_run(folder)
    assert caught.value.exit_code == 1


def test_other_damaged_files_are_one_line(tmp_path):
    folder = write_run(tmp_path / "a", {5: decay()})
    for name in ("metrics.jsonl", "summary.json"):
        before = (folder / name).read_bytes()
        for content in (b"[1]\n", b"\xff\xfe\n"):
            (folder / name).write_bytes(content)
            with pytest.raises(UserError, match=f"a/{name}(: cannot be read| is damaged)"):
                read_run(folder)
        (folder / name).write_bytes(before)
    (folder / "samples" / "step-0000500.png").write_bytes(b"half a pict")
    with pytest.raises(UserError, match=r"step-0000500.png: no picture that can be read"):
        write_report(compare({"a": [folder]}), tmp_path / "out")
