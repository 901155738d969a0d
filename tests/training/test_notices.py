"""What a run says before it costs anything."""

import pytest
from launch import tiny

GUIDABLE = {"class_conditional": True, "class_dropout_prob": 0.1}
SPOKEN = {
    "ends inside the warm-up: 4 steps, --lr_warmup_steps 500": {"lr_scheduler": "cosine", "lr_warmup_steps": 500},
    "never reached in a run of 4 steps: --second_phase_step 4;": {"second_timestep_sampling": "beta", "second_phase_step": 4},
    "never reached in a run of 4 steps: --coupling_start_step 9;": {"noise_coupling": "assignment", "coupling_start_step": 9},
    "plain epsilon-prediction": {"noise_coupling": "assignment"},
    "about 5.2 times what the training costs (1,000 calls": {"ddpm_num_inference_steps": 500},  # 2 images x 500 / (3 x 64)
    # 2 images x 500 x (1 + 0.2) / (3 x 64)
    "about 6.2 times what the training costs (1,200 calls": {
        **GUIDABLE,
        "ddpm_num_inference_steps": 500,
        "guidance_scale": 2,
        "guidance_interval": [0.4, 0.6],
    },
    # (2 images x 2 + 2 evaluations x 10 x (2 + 40) x (1 + 2)) / (3 x 64)
    "about 13.1 times what the training costs (2,524 calls": {
        **GUIDABLE,
        "eval_steps": 2,
        "eval_samples": 10,
        "eval_inference_steps": [2, 40],
        "eval_guidance_scales": [1, 3],
    },
    "not read, as edm has a target and a sampler of its own: --prediction_type sample, --timestep_spacing trailing": {
        "objective": "edm",
        "prediction_type": "sample",
        "timestep_spacing": "trailing",
    },
    "not read, as a flow has a schedule and a sampler of its own: --ddpm_beta_schedule quadratic, --timestep_spacing linspace": {
        "noise_process": "flow",
        "prediction_type": "flow_prediction",
        "ddpm_beta_schedule": "quadratic",
        "timestep_spacing": "linspace",
    },
    "not read, as squaredcos_cap_v2 has ends of its own: --ddpm_beta_end 0.012": {
        "ddpm_beta_schedule": "squaredcos_cap_v2",
        "ddpm_beta_end": 0.012,
    },
    "not read, as adafactor has averages of its own: --adam_beta1 0.5": {"optimizer": "adafactor", "adam_beta1": 0.5},
    "accelerate is launched with mixed precision bf16": {},
}


@pytest.mark.parametrize("line", SPOKEN)
def test_a_line_where_a_user_would_want_it(script, tmp_path, line):
    environment = {"ACCELERATE_MIXED_PRECISION": "bf16"} if "bf16" in line else {}
    result = script(tiny(tmp_path / "run", plan=True, **SPOKEN[line]), env=environment)
    assert line in result.stderr and result.code == (2 if environment else 0)
    assert "nothing was written" in result.stdout or environment


def test_an_ordinary_run_has_nothing_to_hear(script, tmp_path):
    changes = {"noise_coupling": "assignment", "prediction_type": "v_prediction", "max_train_steps": 6}
    result = script(tiny(tmp_path / "run", **changes))
    assert result.code == 0 and not any(
        word in result.stderr for word in ("warm-up", "epsilon", "not read", "calls of the network", "probe")
    )
    assert "moves 0.0" not in result.stderr + result.stdout and "-0.00000" not in result.stdout


def test_the_leak_stands_in_the_summary(script, tmp_path):
    result = script(tiny(tmp_path / "run", log_class_leak=True, noise_coupling="assignment", prediction_type="v_prediction"))
    assert result.code == 0 and "a linear probe reads the class in" in result.stdout
