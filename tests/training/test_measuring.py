"""Metrics that a run measures beside the Frechet distance, as a user asks for them."""

import json

import pytest
from launch import tiny
from tiny_text import FINETUNE, tiny_text

EVALUATION = {"eval_features": "pixels", "eval_steps": 2, "eval_samples": 30, "eval_inference_steps": [1]}
BY_CLASS = ["per_class_frechet_distance", "within_class_distance"]


def test_metrics_stand_in_the_line_of_a_run_with_classes(script, tmp_path):
    flags = {**EVALUATION, "max_train_steps": 2, "class_conditional": True, "class_dropout_prob": 0.4, "eval_guidance_scales": [1, 2]}
    result = script(tiny(tmp_path / "run", **flags, eval_metrics=["precision", *BY_CLASS]))
    assert result.code == 0, result.stderr
    (line,) = [json.loads(text) for text in (tmp_path / "run" / "evaluation.jsonl").read_text().splitlines()]
    assert line["metrics"].keys() == {f"{name}{guided}" for name in ("precision", *BY_CLASS) for guided in ("", "_guided")}
    assert line["metrics"][BY_CLASS[0]]["1"] > 0 and line["metrics"][f"{BY_CLASS[0]}_guided"]["2"]["1"] > 0
    assert line["frechet_distance"].keys() == {"1"} and line["metrics_real"].keys() == {"within_class_distance"}
    assert f"step 2: within_class_distance {line['metrics'][BY_CLASS[1]]['1']:.3f} at 1 steps" in result.stderr
    assert "per_class_frechet_distance: a class of 3 images is too small for a covariance of 64 features" in result.stderr


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"eval_metrics": "kid"}, "--eval_metrics are of evaluation: give --eval_steps too"),
        ({"eval_metrics": "fid", **EVALUATION}, "argument --eval_metrics: invalid choice: 'fid'"),
        ({"eval_metrics": "alignment", **EVALUATION}, "alignment needs samples of known classes: train with --class_conditional"),
        ({"eval_metrics": "sfid", **EVALUATION}, "sfid needs features before they are pooled, which FD-pixels-8x8 does not know"),
    ],
)
def test_what_cannot_be_measured_is_one_line_before_the_first_step(script, tmp_path, flags, message):
    result = script(tiny(tmp_path / "run", **flags))
    assert result.code == 2 and message in result.error and "step" not in result.stdout
    assert not list((tmp_path / "run").glob("checkpoint-*"))


@pytest.mark.slow
def test_samples_of_captions_are_measured_too(script, tmp_path):
    flags = {**EVALUATION, "max_train_steps": 2, "eval_metrics": ["kid", "coverage"]}
    result = script(tiny_text(tmp_path / "run", **flags), program=FINETUNE)
    assert result.code == 0, result.stderr
    line = json.loads((tmp_path / "run" / "evaluation.jsonl").read_text())
    assert line["metrics"]["kid"]["1"] > 0 and 0 <= line["metrics"]["coverage"]["1"] <= 1
