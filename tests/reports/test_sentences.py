from compared import decay, run_pair, words, write_run

from immiscible.reports.comparison import compare
from immiscible.reports.page import html_report, markdown_report
from immiscible.reports.ratios import GAIN, UNKNOWN
from immiscible.reports.sentences import headline, setting


def test_two_seeds_say_that_it_may_be_chance(arms):
    sentences = headline(compare({name: folders[:2] for name, folders in arms.items()}))
    assert " at 5 inference steps (2 seeds only, so this may be chance)." in sentences[0]
    assert (
        sentences[1] == "Harm, slower than baseline with every seed: coupled at 20 inference steps (2 seeds only, so this may be chance)."
    )


def test_the_headline_says_where_an_arm_is_best(tmp_path):
    arms = {
        "baseline": run_pair(tmp_path, "baseline", five=1, twenty=1),
        "steady": run_pair(tmp_path, "steady", five=1.9, twenty=1.6),
        "steep": run_pair(tmp_path, "steep", five=2.5, twenty=1.1),
    }
    sentences = headline(compare(arms))
    assert sentences[0].startswith(
        "Best arm over 5 and 20 inference steps together: steady reached baseline's final FD-digits 1.90 times sooner in training steps "
        "(1.90 in seconds) at 5 inference steps and 1.60 times sooner in training steps (1.60 in seconds) at 20 inference steps ("
    )
    assert sentences[1] == (
        "Best at 5 inference steps alone: steep, 2.50 times sooner in training steps (2.50 in seconds) "
        "(2 seeds only, so this may be chance)."
    )
    assert headline(compare({name: arms[name] for name in ("baseline", "steady")}))[0].startswith("Best arm: steady reached")


def test_an_arm_that_is_sooner_in_steps_and_later_in_seconds_is_said_to_be(tmp_path):
    arms = {
        "baseline": [write_run(tmp_path / "a", {5: decay()})],
        "dear": [write_run(tmp_path / "b", {5: decay(speed=1.25)}, seconds_per_step=0.1)],
    }
    assert "1.25 times sooner in training steps (0.62 in seconds, which is later) at 5" in headline(compare(arms))[0]


def test_nothing_helped_is_said_first(tmp_path):
    arms = {
        "baseline": [write_run(tmp_path / "a", {5: decay()})],
        "slow": [write_run(tmp_path / "b", {5: decay(speed=0.9)})],
    }
    assert headline(compare(arms))[0] == "Nothing helped: no arm reached baseline's final FD-digits sooner with every seed."
    one = {"slow": arms["slow"], "baseline": arms["baseline"]}
    assert "one seed only" in headline(compare(one))[0]


def test_too_few_evaluations_are_said_to_be_too_few(tmp_path):
    rising = [(100.0, 3.0), (500.0, 5.0)]  # below its own end from the first evaluation on
    arms = {
        "baseline": [write_run(tmp_path / "a", {5: rising, 20: decay()})],
        "other": [write_run(tmp_path / "b", {5: [(100.0, 2.0), (500.0, 1.0)], 20: [(100.0, 0.1), (500.0, 0.1)]})],
    }
    comparison = compare(arms)
    assert comparison.verdict("other", 5) == UNKNOWN and comparison.verdict("other", 20) == GAIN
    assert "over 5.00 times sooner in training steps (over 5.00 in seconds) at 20 inference steps" in headline(comparison)[0]
    assert headline(comparison)[1] == "Not known, for want of earlier evaluations: other at 5 inference steps."
    html_report(comparison)


def test_a_report_says_what_samples_were_told(tmp_path):
    prompts = ["a <cat>", "a dog"]
    for name, changes in {"baseline": {}, "coupled": {"noise_coupling": "assignment"}}.items():
        write_run(tmp_path / name, {5: decay()}, text=True, validation_prompts=prompts, **changes)
    arms = {name: [tmp_path / name] for name in ("baseline", "coupled")}
    comparison = compare(arms)
    for report in (words(html_report(comparison)), markdown_report(comparison)):
        assert "1500 samples (the captions of column text, without guidance) against 1797 reference images" in report
        assert "checkpoint sd" in report
    assert words(html_report(comparison)).count("Guidance 7.5; row by row: a <cat>; a dog.") == 1
    write_run(tmp_path / "other", {5: decay()}, text=True, validation_prompts=["a dog"], noise_coupling="nearest", guidance_scale=3)
    page = words(html_report(compare({**arms, "other": [tmp_path / "other"]})))
    assert "other, step 500. Guidance 3; row by row: a dog" in page
    assert "coupled, step 500. Guidance 7.5; row by row: a <cat>; a dog" in page
    classes = words(html_report(compare({"a": [write_run(tmp_path / "classes", {5: decay()}, class_conditional=True)]})))
    assert "(every class equally often)" in classes and "In the order of classes." in classes


def test_what_is_predicted_and_sampled_is_said_of_the_objective(tmp_path):
    """A task file of denoising under another may give flags that are not read."""
    flags = {"prediction_type": "v_prediction", "sampling_scheduler": "ddim", "timestep_spacing": "trailing", "edm_sampler": "heun"}
    kinds = {
        "denoising": ({}, "; v_prediction; ddim sampling, trailing spacing; "),
        "edm": ({"objective": "edm", "momentum": True}, "; edm with momentum; heun sampling; "),
        "consistency": ({"objective": "consistency"}, "; consistency; "),
    }
    arms = {name: [write_run(tmp_path / name, {1: decay()}, **flags, **own)] for name, (own, _) in kinds.items()}
    for name, (_, said) in kinds.items():
        assert said in setting(compare({name: arms[name]}))
    assert not any(word in setting(compare(arms)) for word in ("v_prediction", "sampling", "edm"))
