"""The method's flags: what none of the chosen parts uses is an error, and errors of the library are told in flags."""

from itertools import product
from pathlib import Path

import pytest
from diffusers import DDPMScheduler
from launch import ROOT

import immiscible
from immiscible.configs import UnconditionalConfig
from immiscible.errors import UserError
from immiscible.flags import parse_config
from immiscible.method import MethodArguments, chosen_coupling, chosen_sampler, chosen_weights, in_flags, naming_flags, unused_flags
from immiscible.process import as_process

PAIRING = "--noise_coupling assignment or flipped_assignment"
COUPLED = "--noise_coupling assignment or nearest or flipped_assignment or reservoir"
UNUSED = [  # a flag that the other ones do not use, and what would
    ({"asymmetric_k": 9.0}, "--timestep_sampling asymmetric or asymmetric_released"),
    ({"asymmetric_r": 10.0, "timestep_sampling": "asymmetric_released"}, "--timestep_sampling asymmetric"),
    (
        {"asymmetric_tau": 300, "loss_weighting": "change_aware"},
        "--timestep_sampling asymmetric or asymmetric_released, or --loss_weighting change_aware_released",
    ),
    ({"logit_mean": 0.5}, "--timestep_sampling logit_normal or sd3_logit_normal"),
    ({"logit_std": 0.5, "timestep_sampling": "asymmetric"}, "--timestep_sampling logit_normal or sd3_logit_normal"),
    ({"change_aware_lambda": 0.8, "loss_weighting": "p2"}, "--loss_weighting change_aware or change_aware_released"),
    ({"snr_gamma": 5.0}, "--loss_weighting min_snr or soft_min_snr"),
    ({"edm_sigma_data": 1.0}, "--timestep_sampling edm_log_normal, or --loss_weighting edm"),
    ({"clts_std": 0.1, "second_timestep_sampling": "beta", "second_phase_step": 5}, "--timestep_sampling clts"),
    ({"p2_k": 2.0}, "--loss_weighting p2"),
    ({"p2_gamma": 2.0, "loss_weighting": "min_snr"}, "--loss_weighting p2"),
    ({"coupling_metric": "l1"}, PAIRING),
    ({"coupling_dtype": "float16", "noise_coupling": "nearest"}, PAIRING),
    ({"coupling_solver": "exact", "noise_coupling": "reservoir"}, PAIRING),
    ({"coupling_scope": "global"}, PAIRING),
    ({"coupling_window": 4, "noise_coupling": "nearest"}, PAIRING),
    ({"coupling_caches": 4, "noise_coupling": "reservoir"}, PAIRING),
    ({"coupling_condition": "within"}, PAIRING),
    ({"coupling_condition": "penalty", "noise_coupling": "reservoir"}, PAIRING),
    ({"coupling_condition_ratio": 0.1, "noise_coupling": "assignment"}, "--coupling_condition penalty"),
    ({"coupling_condition_ratio": 0.1}, PAIRING),
    ({"coupling_candidates": 4, "noise_coupling": "assignment"}, "--noise_coupling nearest"),
    ({"coupling_score": "dot"}, "--noise_coupling nearest"),
    ({"coupling_reservoir": 16, "noise_coupling": "nearest"}, "--noise_coupling reservoir"),
    ({"coupling_min_timestep": 10}, COUPLED),
    ({"coupling_start_step": 10}, COUPLED),
    ({"second_phase_step": 10}, "--second_timestep_sampling LAW"),
]
USED = [
    {},
    {"asymmetric_k": 9.0, "timestep_sampling": "asymmetric_released"},
    {"asymmetric_tau": 300, "loss_weighting": "change_aware_released"},
    {"coupling_metric": "l1", "coupling_window": 2, "coupling_scope": "global", "noise_coupling": "flipped_assignment"},
    {"coupling_condition_ratio": 0.1, "coupling_condition": "penalty", "noise_coupling": "assignment"},
    {"coupling_min_timestep": 10, "coupling_start_step": 3, "coupling_score": "dot", "noise_coupling": "nearest"},
    {"clts_std": 0.1, "beta_a": 0.5, "timestep_sampling": "beta", "second_timestep_sampling": "clts", "second_phase_step": 5},
    {"edm_sigma_data": 1.0, "loss_weighting": "edm", "timestep_shift": 2.0},
    {"noise_offset": 0.1, "input_perturbation": 0.1, "log_class_leak": True},
]


@pytest.mark.parametrize(("values", "users"), UNUSED, ids=lambda item: "-".join(item) if isinstance(item, dict) else "")
def test_a_flag_that_the_method_does_not_use_is_an_error_that_names_what_would(values, users):
    flag = next(iter(values))
    assert unused_flags({**values, "learning_rate": 1.0}) == {flag: f"used by {users}"}
    with pytest.raises(UserError) as error:
        MethodArguments(**values).check()
    assert f"--{flag} " in str(error.value) and users in str(error.value)


@pytest.mark.parametrize("values", USED)
def test_a_flag_that_it_uses_or_that_has_its_default_is_none(values):
    assert unused_flags(values) == {}
    MethodArguments(**values).check()
    assert unused_flags(vars(MethodArguments(**values))) == {}  # every flag is listed, as in a run's config.yaml


def test_what_a_new_entry_uses_is_read_from_its_signature(monkeypatch):
    def late(process, *, logit_mean=0.0):
        return immiscible.TIMESTEP_SAMPLINGS["uniform"](process)

    assert unused_flags({"logit_mean": 1.0, "timestep_sampling": "asymmetric"})
    monkeypatch.setitem(immiscible.TIMESTEP_SAMPLINGS, "late", late)
    assert unused_flags({"logit_mean": 1.0, "timestep_sampling": "late"}) == {}


def test_ranges_are_checked_also_of_what_is_not_on():
    for values, message in (
        ({"coupling_candidates": 0}, "--coupling_candidates must be at least 1, not 0"),
        ({"p2_k": -1.0}, "--p2_k must be at least 0, not -1.0"),
        ({"asymmetric_tau": 3, "asymmetric_r": 10.0}, "give one of them"),
        ({"second_timestep_sampling": "beta"}, "--second_phase_step and --second_timestep_sampling LAW go together"),
        ({"second_phase_step": 3}, "--second_phase_step and --second_timestep_sampling LAW go together"),
        ({"second_timestep_sampling": "uniform", "second_phase_step": 3}, "--second_timestep_sampling uniform is the first law too"),
        (
            {"timestep_sampling": "loss_second_moment", "coupling_window": 2, "noise_coupling": "assignment"},
            "--coupling_window draws the timesteps of steps to come",
        ),
    ):
        with pytest.raises(UserError, match=message):
            MethodArguments(**values).check()


OBJECTIVES = {"consistency": {"noise_process", "image_scale", "loss_weighting"}, "edm": {"noise_process", "image_scale"}}


def composed(task: Path, method: Path) -> UnconditionalConfig:
    digits = ROOT / "configs/tasks/digits.yaml"
    return parse_config(UnconditionalConfig, ["--config", str(task), str(method)], program="x", description="", no_data_config=digits)


def test_every_task_goes_with_every_method():
    tasks = {path for path in (ROOT / "configs/tasks").glob("[cdp]*.yaml") if "objective:" not in path.read_text()}
    assert len(tasks) >= 3
    for task, method in product(tasks, (ROOT / "configs/methods").glob("*.yaml")):
        assert unused_flags(vars(composed(task, method))) == {}, (task, method)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives_go_with_the_methods_that_they_can(name):
    refused = 0
    for method in (ROOT / "configs/methods").glob("*.yaml"):
        plain = composed(ROOT / "configs/tasks/digits.yaml", method)
        not_told = {each for each in OBJECTIVES[name] if getattr(plain, each) != getattr(UnconditionalConfig(), each)}
        if not_told:
            refused += 1
            with pytest.raises(UserError, match="|".join(not_told)):
                composed(ROOT / f"configs/tasks/{name}.yaml", method)
        else:
            assert composed(ROOT / f"configs/tasks/{name}.yaml", method).objective == name
    assert refused


# Flags and arguments


def test_messages_of_the_library_are_told_in_flags():
    for told, flags in (
        ("`metric` 'x' is unknown; `pip install x` and `other` stay", "--coupling_metric 'x' is unknown; `pip install x` and `other` stay"),
        (
            "use timestep_sampler('asymmetric') or build_coupling('nearest')",
            "use --timestep_sampling asymmetric or --noise_coupling nearest",
        ),
        (
            "loss_weights('snr') with `size` and `min_timestep`",
            "--loss_weighting snr with --coupling_reservoir and --coupling_min_timestep",
        ),
        ("the noise process 'flow' needs `prediction_type` x", "--noise_process flow needs --prediction_type x"),
        ("GlobalCoupling pairs at most 5", "--coupling_scope global pairs at most 5"),
    ):
        assert in_flags(told) == flags
        with pytest.raises(UserError) as error, naming_flags():
            raise UserError(told, exit_code=1)
        assert str(error.value) == flags and error.value.exit_code == 1


PROCESS = as_process(DDPMScheduler())


@pytest.mark.parametrize(
    ("values", "library", "script"),
    [
        ({"noise_coupling": "nearest", "coupling_candidates": 0}, "`candidates` must be at least 1", "--coupling_candidates must be"),
        ({"noise_coupling": "reservoir", "coupling_reservoir": 0}, "`size` must be", "--coupling_reservoir must be"),
        ({"timestep_sampling": "asymmetric", "asymmetric_k": 0.5}, "`asymmetric_k` 0.5 is out", "--asymmetric_k 0.5 is out"),
        ({"timestep_sampling": "asymmetric", "asymmetric_r": 1e9}, "give at most .* `asymmetric_tau`", "give at most .* --asymmetric_tau"),
        ({"loss_weighting": "p2", "p2_k": -1.0}, "`p2_k` -1 is out", "--p2_k -1 is out"),
        ({"loss_weighting": "min_snr", "snr_gamma": -1.0}, "`snr_gamma` -1 is out", "--snr_gamma -1 is out"),
    ],
)
def test_an_error_names_arguments_in_the_library_and_flags_in_a_script(values, library, script):
    config = MethodArguments(**values)

    def build():
        return chosen_coupling(config), chosen_sampler(config, PROCESS), chosen_weights(config, PROCESS, "epsilon")

    with pytest.raises(UserError, match=library) as error:
        build()
    assert "--" not in str(error.value)
    with pytest.raises(UserError, match=script), naming_flags():
        build()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: immiscible.timestep_sampler("asymmetric", PROCESS, k=3),
            r"timestep_sampler\('asymmetric'\) has no option k; its options are asymmetric_k, asymmetric_r, asymmetric_tau",
        ),
        (lambda: immiscible.timestep_sampler("uniform", PROCESS, k=3), r"timestep_sampler\('uniform'\) has no option k; it has none"),
        (
            lambda: immiscible.loss_weights("min_snr", PROCESS, "epsilon", gamma=1),
            r"loss_weights\('min_snr'\) has no option gamma; its options are snr_gamma",
        ),
        (
            lambda: immiscible.build_coupling("reservoir", reservoir=64),
            r"build_coupling\('reservoir'\) has no option reservoir; its options are size",
        ),
        (
            lambda: immiscible.build_coupling("nearest", metric="l1", size=3),
            "has no option metric and no option size; its options are candidates, score",
        ),
        (lambda: immiscible.build_coupling("optimal"), r"build_coupling\('optimal'\) is unknown; known: independent, assignment"),
    ],
)
def test_unknown_options_raise_and_list_the_known_ones(call, message):
    with pytest.raises(UserError, match=message):
        call()


def test_what_is_printed_is_short():
    reservoir = immiscible.ReservoirCoupling(8)
    assert repr(reservoir) == "ReservoirCoupling(size=8)"
    assert repr(immiscible.timestep_sampler("uniform", PROCESS)) == "TimestepSampler(1000 timesteps, moves 0.0% of the draws)"
    released = immiscible.timestep_sampler("asymmetric_released", PROCESS)
    assert "reflected at 642" in repr(released) and len(repr(released)) < 100
    assert repr(immiscible.loss_weights("none", PROCESS, "epsilon")) == "LossWeights(ddpm, 1000 timesteps, 1 to 1)"
    for value in (PROCESS, immiscible.GlobalCoupling(), immiscible.Window(reservoir, 3), immiscible.AssignmentCoupling()):
        assert type(value).__name__ in repr(value) and len(repr(value)) < 200
