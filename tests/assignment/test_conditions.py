"""Conditions: each way to pair with regard to them, and the probe that says what a coupling tells."""

import itertools
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from immiscible import AboveTimestep, AssignmentCoupling, ClassLeak, UserError, assign, build_coupling, class_leak, cost_matrix
from immiscible.assignment.conditions import CONDITIONS, centered, condition_distance, conditioned_index, penalty_weight
from immiscible.assignment.solve import solve
from immiscible.configs import UnconditionalConfig
from immiscible.coupling import coupling_state, restore_coupling
from immiscible.evaluation.leakage import bright_and_dark, leak_notice
from immiscible.flags import parse_config


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def batch(n=64, classes=4, seed=0, side=6):
    """Images with a mean per class, their noises and their labels."""
    g = generator(seed)
    means = torch.randn(classes, 1, side, side, generator=generator(99))
    labels = torch.randint(classes, (n,), generator=g)
    return means[labels] + torch.randn(n, 1, side, side, generator=g), torch.randn(n, 1, side, side, generator=g), labels


def states_of(labels, width=8):
    """One text state per class, of any length: captions that are class names."""
    return (torch.randn(int(labels.max()) + 1, width, generator=generator(7)) + 1)[labels]


def best_permutation(cost, allowed):
    """Brute force: the least summed float64 cost over the permutations that take allowed pairs only."""
    n = len(cost)
    return min(
        sum(float(cost[i, j].double()) for i, j in enumerate(order))
        for order in itertools.permutations(range(n))
        if all(allowed[i, j] for i, j in enumerate(order))
    )


def total(cost, index):
    return float(cost.double()[torch.arange(len(cost)), index].sum())


def rows(noise):
    return sorted(map(tuple, noise.flatten(1).tolist()))


# Within


@pytest.mark.parametrize("seed", range(8))
def test_within_is_the_best_permutation_inside_the_classes(seed):
    g = generator(seed)
    cost, labels = torch.randn(7, 7, generator=g), torch.randint(3, (7,), generator=g) * 5
    index = conditioned_index(cost, labels, "within", 0.01, "auto")
    same = labels[:, None] == labels
    assert torch.equal(labels[index], labels) and sorted(index.tolist()) == list(range(7))
    assert total(cost, index) == pytest.approx(best_permutation(cost, same), abs=1e-5)


@pytest.mark.parametrize("solver", ["auto", "exact", "auction"])
def test_within_of_one_class_is_the_assignment_and_of_all_different_ones_the_identity(solver):
    cost = torch.randn(150, 150, generator=generator())
    alone = conditioned_index(cost, torch.zeros(150, dtype=torch.int64), "within", 0.01, solver)
    assert torch.equal(alone, solve(cost, solver=solver).index)
    assert torch.equal(conditioned_index(cost, torch.arange(150).flip(0), "within", 0.01, solver), torch.arange(150))


def test_without_a_condition_and_with_centered_costs_the_index_is_the_solvers():
    cost = torch.randn(40, 40, generator=generator())
    for condition in ("none", "centered"):
        assert torch.equal(conditioned_index(cost, None, condition, 0.01, "auto"), solve(cost).index)
    for condition in CONDITIONS:
        one = conditioned_index(cost[:1, :1], torch.zeros(1, dtype=torch.int64), condition, 0.01, "auction")
        assert one.tolist() == [0] and one.dtype == torch.int64


# Penalty


def candidates(cost, distance, weight, rows=slice(None)):
    """How many noises of other images beat an image's own one in spite of the penalty, in float64, column constants aside."""
    cost, distance = cost.double() - cost.double().mean(0), distance.double()
    return int((cost + weight * distance < cost.diagonal()[:, None])[rows].sum())


@pytest.mark.parametrize("kind", ["classes", "states"])
@pytest.mark.parametrize("ratio", [0.0, 0.01, 0.05, 0.2, 0.35, 0.45])
def test_the_weight_is_the_least_that_leaves_the_ratio(kind, ratio):
    n = 60
    labels = torch.randint(12, (n,), generator=generator(3)) if kind == "classes" else torch.randn(n, 5, generator=generator(3))
    cost, distance = torch.randn(n, n, generator=generator(4)), condition_distance(labels)
    weight, allowed = penalty_weight(cost, distance, ratio), math.floor(ratio * n * n)
    if candidates(cost, distance, 1e12) > allowed:  # pairs of one class, which no weight removes
        assert weight == math.inf
    elif candidates(cost, distance, 0) <= allowed:
        assert weight == 0
    else:
        assert 0 < weight < math.inf
        assert candidates(cost, distance, weight * (1 + 1e-6)) == allowed < candidates(cost, distance, weight * (1 - 1e-5))


def test_constants_of_rows_and_columns_change_nothing():
    g = generator()
    cost, labels = torch.randn(80, 80, generator=g), torch.randn(80, 4, generator=g)
    shifted = cost + 3 * torch.randn(80, 1, generator=g) + 3 * torch.randn(80, generator=g)
    distance = condition_distance(labels)
    assert penalty_weight(shifted, distance, 0.1) == pytest.approx(penalty_weight(cost, distance, 0.1), rel=1e-4)
    for condition, given in (("penalty", labels), ("within", torch.randint(4, (80,), generator=g))):
        plain = conditioned_index(cost, given, condition, 0.1, "auto")
        assert torch.equal(conditioned_index(shifted, given, condition, 0.1, "auto"), plain)


def test_a_ratio_of_one_half_or_so_costs_nothing_and_is_the_plain_assignment():
    x0, noise, labels = batch(200)
    cost = cost_matrix(x0, noise)
    assert candidates(cost, condition_distance(labels), 0) == pytest.approx(0.5 * 200**2, rel=0.1)
    assert penalty_weight(cost, condition_distance(labels), 0.6) == 0.0
    assert torch.equal(conditioned_index(cost, labels, "penalty", 0.6, "auto"), solve(cost).index)


@pytest.mark.parametrize("seed", range(5))
def test_penalty_minimizes_the_penalised_cost(seed):
    labels = torch.randn(6, 3, generator=generator(seed))
    cost, distance = torch.randn(6, 6, generator=generator(50 + seed)), condition_distance(labels)
    index = conditioned_index(cost, labels, "penalty", 0.2, "auto")
    penalised = cost + penalty_weight(cost, distance, 0.2) * distance
    assert total(penalised, index) == pytest.approx(best_permutation(penalised, torch.ones(6, 6)), abs=1e-5)


def test_a_ratio_that_pairs_of_one_condition_exceed_is_within_for_classes_and_for_captions_that_repeat():
    x0, noise, labels = batch(96, classes=4)
    cost = cost_matrix(x0, noise)
    within = conditioned_index(cost, labels, "within", 0.01, "auto")
    assert torch.equal(conditioned_index(cost, labels, "penalty", 0.01, "auto"), within)
    captions = states_of(labels)
    lengths = torch.rand(96, 1, generator=generator(5)) + 0.5  # the cosine does not see them, but for rounding
    assert torch.equal(conditioned_index(cost, captions * lengths, "penalty", 0.01, "auto"), within)


def test_between_the_two_the_ratio_trades_distance_for_pairs_that_change_their_class():
    x0, noise, labels = batch(256, classes=4)
    cost = cost_matrix(x0, noise)
    indices = [conditioned_index(cost, labels, "penalty", ratio, "auto") for ratio in (0.01, 0.2, 0.3, 0.5, 1.0)]
    changed = [int((labels[index] != labels).sum()) for index in indices]
    costs = [total(cost, index) for index in indices]
    assert changed[0] == 0 and changed == sorted(changed) and changed[1] < changed[3]
    assert costs == sorted(costs, reverse=True) and costs[0] > costs[3]


def test_large_batches_count_candidates_in_an_even_sample_of_rows(monkeypatch):
    cost, labels = torch.randn(200, 200, generator=generator()), torch.randn(200, 4, generator=generator(1))
    distance = condition_distance(labels)
    everything = penalty_weight(cost, distance, 0.1)
    monkeypatch.setattr("immiscible.assignment.conditions.ROWS_FOR_RATIO", 50)
    sampled = penalty_weight(cost, distance, 0.1)
    assert sampled != everything and sampled == pytest.approx(everything, rel=0.25)
    assert candidates(cost, distance, sampled * (1 + 1e-6), slice(None, None, 4)) == math.floor(0.1 * 50 * 200)


def test_distances_of_conditions():
    assert condition_distance(torch.tensor([3, 3, 0])).tolist() == [[0, 0, 1], [0, 0, 1], [1, 1, 0]]
    states = torch.randn(9, 300, generator=generator())
    unit = states.double() / states.double().norm(dim=1, keepdim=True)
    expected = (1 - unit @ unit.T).fill_diagonal_(0).float()
    assert torch.allclose(condition_distance(states), expected, atol=1e-6)
    assert not condition_distance(states[:1] * torch.rand(5, 1, generator=generator())).any()
    assert not condition_distance(torch.zeros(2, 4)).diagonal().any()


# Centered


def test_a_batch_is_centered_by_the_means_of_earlier_batches_alone():
    seen, state = [], {}
    for number in range(4):
        x0, _, labels = batch(20, classes=3 + 2 * number, seed=number)
        images, state = centered(x0, labels, state)
        for image, label, result in zip(x0.double(), labels.tolist(), images, strict=True):
            own, everyone = [old for old, its in seen if its == label], [old for old, _ in seen]
            predicted = sum(own) / len(own) if own else sum(everyone) / len(everyone) if everyone else 0
            assert torch.allclose(image - predicted, result.double(), atol=1e-5)
        seen += zip(x0.double(), labels.tolist(), strict=True)
    assert state["mean"].dtype == torch.float32 and state["count"].dtype == torch.int64
    assert state["count"].tolist() == [sum(its == label for _, its in seen) for label in range(len(state["count"]))]
    assert int(state["count"].sum()) == 80


def test_text_states_are_centered_by_ridge_regression_on_earlier_batches():
    seen_states, seen_images, state = np.zeros((0, 5)), np.zeros((0, 36)), {}
    for number in range(4):
        g = generator(number)
        x0, captions = torch.randn(7, 1, 6, 6, generator=g), torch.randn(7, 5, generator=g) + 2
        images, state = centered(x0, captions, state)
        predicted = np.zeros((7, 36))
        if number:
            inputs = np.hstack([seen_states, np.ones((len(seen_states), 1))])
            ridge = np.mean((seen_states**2).sum(1)) * np.diag([1.0] * 5 + [0.0])
            predicted = np.hstack([captions, np.ones((7, 1))]) @ np.linalg.solve(inputs.T @ inputs + ridge, inputs.T @ seen_images)
        assert np.allclose(x0.flatten(1).numpy() - predicted, images.flatten(1).numpy(), atol=1e-5)
        seen_states, seen_images = np.vstack([seen_states, captions]), np.vstack([seen_images, x0.flatten(1)])
    assert state["gram"].dtype == torch.float64 and state["cross"].shape == (6, 36)


def test_regression_finds_what_text_says_about_images_and_class_names_come_to_class_means():
    g, slope = generator(), torch.randn(8, 36, generator=generator(1))
    state, left = {}, []
    for _ in range(60):
        captions = torch.randn(64, 8, generator=g)
        images, state = centered((captions @ slope + 3).view(-1, 1, 6, 6), captions, state)
        left.append(float(images.square().mean()))
    assert left[0] > 10 and left[-1] < 1e-3 * left[0]

    by_class, by_name = {}, {}
    for number in range(60):
        x0, _, labels = batch(64, seed=number)
        of_class, by_class = centered(x0, labels, by_class)
        of_name, by_name = centered(x0, states_of(labels), by_name)
    assert float((of_class - of_name).square().mean()) < 0.002 * float(of_class.square().mean())


def test_degenerate_text_states_stay_finite():
    for captions in (torch.ones(6, 4), torch.zeros(6, 4), torch.eye(4).repeat(2, 1)[:6], torch.ones(6, 4).half()):
        state = {}
        for _ in range(3):
            images, state = centered(torch.ones(6, 1, 2, 2), captions, state)
        assert bool(images.isfinite().all()) and float(images.abs().max()) < 0.5  # the mean of all images is known by now


@pytest.mark.parametrize("kind", ["classes", "states"])
def test_the_state_is_replaced_never_changed_and_restores_exactly(kind, tmp_path):
    def step(coupling, number):
        x0, noise, labels = batch(48, seed=number)
        return coupling(x0, noise, labels=labels if kind == "classes" else states_of(labels))

    coupling = AssignmentCoupling(condition="centered")
    assert coupling_state(coupling) == {}
    step(coupling, 0), step(coupling, 1)
    taken = coupling_state(coupling)
    before = {name: tensor.clone() for name, tensor in taken.items()}
    save_file(dict(taken), tmp_path / "state.safetensors")
    later = [step(coupling, number) for number in (2, 3)]
    assert all(torch.equal(taken[name], before[name]) for name in before)
    assert coupling.state is not taken and any(not torch.equal(coupling.state[name], before[name]) for name in before)

    for state in (taken, load_file(tmp_path / "state.safetensors")):
        again = AboveTimestep(AssignmentCoupling(condition="centered"), 0)
        restore_coupling(again, state)
        timesteps = torch.zeros(48, dtype=torch.int64)
        for number, expected in zip((2, 3), later, strict=True):
            x0, noise, labels = batch(48, seed=number)
            condition = labels if kind == "classes" else states_of(labels)
            assert torch.equal(again(x0, noise, timesteps=timesteps, labels=condition), expected)
        assert all(torch.equal(coupling_state(again)[name], coupling.state[name]) for name in coupling.state)


def test_centering_takes_the_class_out_of_the_noise_and_keeps_more_distance_than_within():
    results = {}
    for condition in ("none", "within", "centered"):
        coupling, leak, distance = AssignmentCoupling(condition=condition), ClassLeak(), 0.0
        for number in range(24):
            x0, noise, labels = batch(128, classes=16, seed=number)
            paired = coupling(x0, noise, labels=labels)
            if number >= 8:
                leak.add(paired, labels, x0)
                distance += float((x0 - paired).flatten(1).norm(dim=1).sum() / (x0 - noise).flatten(1).norm(dim=1).sum()) / 16
        results[condition] = distance, leak.result()
    assert results["none"][0] < results["centered"][0] < results["within"][0] < 1
    assert results["none"][1]["accuracy"] > 0.25
    for condition in ("within", "centered"):
        assert results[condition][1]["accuracy"] == pytest.approx(1 / 16, abs=4 * (15 / 256 / 2048) ** 0.5)


# The coupling


@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("name", ["assignment", "flipped_assignment"])
@pytest.mark.parametrize("metric", ["l2", "squared_l2", "l1"])
def test_every_condition_permutes_the_pool(condition, name, metric):
    coupling = build_coupling(name, condition=condition, condition_ratio=0.3, metric=metric)
    for n, dtype in ((40, torch.float32), (140, torch.float16), (1, torch.float32)):
        x0, noise, labels = batch(n, seed=n)
        x0, noise = x0.to(dtype), noise.to(dtype)
        for _ in range(2):
            paired = coupling(x0, noise, labels=labels)
            assert rows(paired) == rows(noise) and paired.dtype == dtype and (n == 1 or not torch.equal(paired, noise))
    assert coupling(x0, labels=labels, generator=generator()).shape == x0.shape


def test_the_default_is_assign_to_the_last_bit_whatever_the_labels_are():
    x0, noise, labels = batch(200)
    for coupling in (AssignmentCoupling(), AssignmentCoupling(condition="none", condition_ratio=1.0)):
        for given in (None, labels, states_of(labels)):
            assert torch.equal(coupling(x0, noise, labels=given), noise[assign(x0, noise)])
        assert coupling.state == {}


def test_within_pairs_each_class_as_if_it_were_alone_also_with_flipped_noises():
    x0, noise, labels = batch(90, classes=3)
    paired = AssignmentCoupling(condition="within")(x0, noise, labels=labels)
    flipped = build_coupling("flipped_assignment", condition="within")(x0, noise, labels=labels)
    for label in range(3):
        of_class = labels == label
        assert torch.equal(paired[of_class], AssignmentCoupling()(x0[of_class], noise[of_class]))
        assert torch.equal(flipped[of_class], build_coupling("flipped_assignment")(x0[of_class], noise[of_class]))


def test_the_first_centered_batch_is_the_plain_assignment_and_later_ones_are_those_of_the_centered_images():
    coupling, state = AssignmentCoupling(condition="centered"), {}
    for number in range(3):
        x0, noise, labels = batch(60, seed=number)
        images, state = centered(x0, labels, state)
        paired = coupling(x0, noise, labels=labels)
        assert torch.equal(paired, noise[assign(images, noise)])
        assert torch.equal(paired, noise[assign(x0, noise)]) == (number == 0)


def test_below_the_least_timestep_labels_stay_with_their_images():
    x0, noise, labels = batch(64)
    timesteps = torch.arange(64) * 10
    paired = build_coupling("assignment", min_timestep=300, condition="within")(x0, noise, timesteps=timesteps, labels=labels)
    above = timesteps >= 300
    assert torch.equal(paired[~above], noise[~above])
    assert torch.equal(paired[above], AssignmentCoupling(condition="within")(x0[above], noise[above], labels=labels[above]))


@pytest.mark.parametrize("condition", ["within", "penalty"])
def test_batches_beyond_the_largest_block_are_paired_in_blocks(condition, monkeypatch):
    x0, noise, labels = batch(50)
    coupling = AssignmentCoupling(condition=condition, condition_ratio=0.3)
    parts = [coupling(x0[part], noise[part], labels=labels[part]) for part in (slice(0, 20), slice(20, 40), slice(40, 50))]
    monkeypatch.setattr("immiscible.coupling.LARGEST_BLOCK", 20)
    assert torch.equal(coupling(x0, noise, labels=labels), torch.cat(parts))


@pytest.mark.parametrize(
    ("condition", "labels", "message"),
    [
        ("within", None, "`condition` within needs every image's class"),
        ("centered", None, "`condition` centered needs every image's class"),
        ("within", torch.zeros(8, 4), "needs classes, int64 labels"),
        ("penalty", torch.zeros(7, dtype=torch.int64), r"must be int64 \[8\] \(classes\) or floating \[8, E\]"),
        ("centered", torch.zeros(8), r"not torch.float32 \[8\]"),
        ("penalty", torch.zeros(8, dtype=torch.int32), r"not torch.int32 \[8\]"),
        ("centered", torch.tensor([0, 1, 2, -1, 0, 0, 0, 0]), "label 3 of the batch is negative"),
        ("penalty", torch.tensor([[1.0]] * 5 + [[math.nan]] * 3), "label 5 of the batch holds NaN"),
    ],
)
def test_unfit_labels_are_one_clear_line(condition, labels, message):
    x0, noise, _ = batch(8)
    with pytest.raises(UserError, match=message) as caught:
        AssignmentCoupling(condition=condition)(x0, noise, labels=labels)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize(("metric", "n"), [("l2", 12), ("l2", 160), ("squared_l2", 160), ("l1", 160)])
def test_a_broken_image_or_noise_is_named_and_leaves_the_means_alone(condition, metric, n):
    x0, noise, labels = batch(n)
    coupling = AssignmentCoupling(metric=metric, condition=condition)
    for what, tensor in (("image", x0), ("noise", noise)):
        broken = tensor.clone()
        broken[5, 0, 2, 2] = math.inf if what == "image" else math.nan
        with pytest.raises(UserError, match=f"{what} 5 of the batch"):
            coupling(broken if what == "image" else x0, broken if what == "noise" else noise, labels=labels)
    assert coupling.state == {}


def test_unknown_and_out_of_range_options():
    with pytest.raises(UserError, match="`condition` 'class' is unknown; known: none, within, centered, penalty"):
        build_coupling("assignment", condition="class")
    with pytest.raises(UserError, match="`metric` 'cosine' is unknown; known: l2, squared_l2, l1"):
        AssignmentCoupling(metric="cosine")
    with pytest.raises(UserError, match="l1 is no inner product, which alone has an int8 form"):
        AssignmentCoupling(metric="l1", dtype="int8", condition="within")
    with pytest.raises(UserError, match=r"`condition_ratio` must be from 0 to 1, not 1\.5"):
        build_coupling("assignment", condition_ratio=1.5)
    coupling = AssignmentCoupling(condition="centered")
    coupling(*batch(8)[:2], labels=batch(8)[2])
    with pytest.raises(UserError, match="are of 36 numbers, the images have 16"):
        coupling(*batch(8, side=4)[:2], labels=batch(8)[2])


def parse(*words):
    return parse_config(UnconditionalConfig, ["--bundled_data", "digits", *words], program="x", description="", no_data_config=None)


def test_flags():
    config = parse(
        "--noise_coupling", "assignment", "--coupling_condition", "penalty", "--coupling_condition_ratio", "0.2", "--log_class_leak"
    )
    assert (config.coupling_condition, config.coupling_condition_ratio, config.log_class_leak) == ("penalty", 0.2, True)
    assert (parse().coupling_condition, parse().coupling_condition_ratio, parse().log_class_leak) == ("none", 0.01, False)
    for words, message in (
        (["--coupling_condition_ratio", "-0.1"], "--coupling_condition_ratio must be from 0 to 1, not -0.1"),
        (["--noise_coupling", "nearest", "--coupling_condition", "within"], "--coupling_condition is for couplings that pair the images"),
        (["--coupling_condition", "outside"], "--coupling_condition"),
    ):
        with pytest.raises(UserError, match=message):
            parse(*words)


# The probe


def independent(n, shares, seed, dimension=48):
    """Images with class means, labels with these shares, and standard normal noise."""
    g = generator(seed)
    labels = torch.multinomial(torch.tensor(shares), n, replacement=True, generator=g)
    means = torch.randn(len(shares), dimension, generator=generator(77))
    return torch.randn(n, dimension, generator=g), labels, means[labels] + torch.randn(n, dimension, generator=g)


@pytest.mark.parametrize("shares", [[0.5, 0.5], [0.1] * 10, [0.9, 0.1], [0.6, 0.3, 0.05, 0.05]])
def test_of_independent_noise_the_probes_come_to_chance(shares):
    n = 4000
    for seed in range(3):
        noise, labels, x0 = independent(n, shares, seed)
        leak = class_leak(noise, labels, x0)
        assert leak["chance"] == int(labels.bincount().max()) / n
        spread = 4 * (max(shares) * (1 - max(shares)) / n) ** 0.5
        assert abs(leak["accuracy"] - leak["chance"]) < spread and abs(leak["quadratic_accuracy"] - leak["chance"]) < spread + 0.01
        for label, shift in leak["mean_shift"].items():
            own = int((labels == label).sum())
            assert abs(shift) < 4.5 * (1 / own + 1 / (n - own)) ** 0.5


@pytest.mark.parametrize("shift", [0.3, 1.0, 2.0])
def test_a_shift_along_the_class_direction_is_found_with_the_accuracy_that_it_allows(shift):
    noise, labels, x0 = independent(8000, [0.5, 0.5], 1)
    axis = torch.nn.functional.normalize(x0[labels == 1].mean(0) - x0[labels == 0].mean(0), dim=0)
    leak = class_leak(noise + (labels - 0.5)[:, None] * shift * axis, labels, x0)
    best = 0.5 * (1 + math.erf(shift / 2 / 2**0.5))  # of two unit normals so far apart
    assert leak["accuracy"] == pytest.approx(best, abs=0.02)
    assert leak["largest_mean_shift"] == max(map(abs, leak["mean_shift"].values()))
    pooled = (1 + shift**2 / 4) ** 0.5  # standard deviation of the component over both classes
    assert leak["mean_shift"][1] == pytest.approx(shift / pooled, abs=0.06)


def test_noise_whose_scatter_alone_tells_the_class_is_seen_by_the_quadratic_probe_only():
    noise, labels, x0 = independent(8000, [0.5, 0.5], 2)
    x0[:, :3] *= 5  # the directions in which images differ most
    noise[:, :3] *= (0.5 + labels)[:, None]
    leak = class_leak(noise, labels, x0)
    assert abs(leak["accuracy"] - leak["chance"]) < 0.03 and leak["quadratic_accuracy"] > leak["chance"] + 0.2


def test_mean_shift_by_its_definition():
    noise, labels, x0 = independent(500, [0.5, 0.3, 0.2], 3)
    noise += 0.5 * x0 * (labels == 2)[:, None]
    shift = class_leak(noise, labels + 10, x0)["mean_shift"]
    assert list(shift) == [10, 11, 12]
    for label in range(3):
        own, others = labels == label, labels != label
        axis = (x0[own].mean(0) - x0[others].mean(0)).double()
        component = noise.double() @ (axis / axis.norm())
        expected = (component[own].mean() - component[others].mean()) / component.std(correction=0)
        assert shift[10 + label] == pytest.approx(float(expected), abs=1e-4)


def test_the_probe_at_its_edges():
    noise, labels, x0 = independent(40, [0.1] * 10, 4)
    one = class_leak(noise, torch.full_like(labels, 3), x0)
    assert (one["accuracy"], one["quadratic_accuracy"], one["chance"], one["mean_shift"]) == (1.0, 1.0, 1.0, {3: 0.0})
    for few in (
        class_leak(noise, torch.arange(40), x0),
        class_leak(noise[:1], labels[:1], x0[:1]),
        class_leak(noise[:2], labels[:2], x0[:2]),
    ):
        assert all(math.isfinite(few[name]) for name in ("accuracy", "quadratic_accuracy", "chance", "largest_mean_shift"))
    assert class_leak(noise.view(40, 3, 4, 4), labels, x0.view(40, 3, 4, 4)) == class_leak(noise, labels, x0)


def test_the_accumulator_keeps_the_last_batches_only():
    leak, batches = ClassLeak(capacity=300), [independent(100, [0.5, 0.5], seed) for seed in range(6)]
    for noise, labels, x0 in batches:
        leak.add(noise, labels, x0)
    noise, labels, x0 = (torch.cat(column) for column in zip(*batches[3:], strict=True))
    assert leak.result() == class_leak(noise.bfloat16(), labels, x0.bfloat16())
    assert leak.result() != class_leak(*(torch.cat(column).bfloat16() for column in zip(*batches, strict=True)))


def test_bright_and_dark_images_leak_through_plain_assignment_and_not_within_classes():
    leaks = {name: ClassLeak() for name in ("none", "within", "drawn")}
    g = generator(5)
    for _ in range(8):
        x0, labels = bright_and_dark(128, (3, 8, 8), g)
        noise = torch.randn(x0.shape, generator=g)
        assert float(x0[labels == 1].mean()) > 0.3 and float(x0[labels == 0].mean()) < -0.3
        leaks["drawn"].add(noise, labels, x0)
        for condition in ("none", "within"):
            leaks[condition].add(AssignmentCoupling(condition=condition)(x0, noise, labels=labels), labels, x0)
    results = {name: leak.result() for name, leak in leaks.items()}
    assert results["none"]["accuracy"] > 0.85 and results["none"]["largest_mean_shift"] > 1.2
    # The noises of a class are the same, in another order: so is their mean, to rounding.
    assert results["within"]["mean_shift"][1] == pytest.approx(results["drawn"]["mean_shift"][1], abs=1e-3)
    assert abs(results["within"]["accuracy"] - results["within"]["chance"]) < 0.06


def test_the_notice_speaks_where_the_image_alone_decides_and_its_numbers_are_measured():
    told = {name: leak_notice(build_coupling(name, **options), 10) for name, options in (
        ("assignment", {}), ("flipped_assignment", {}), ("nearest", {"candidates": 8}), ("reservoir", {}),
    )}  # fmt: skip
    for notice in told.values():
        assert "which of 10 classes" in notice and "--coupling_condition within" in notice
        assert "\n" not in notice and len(notice.split()) < 75
    leak, g = ClassLeak(), generator(8)
    for _ in range(8):
        x0, labels = bright_and_dark(256, (3, 8, 8), g)
        leak.add(AssignmentCoupling()(x0, torch.randn(x0.shape, generator=g)), labels, x0)
    said = int(told["assignment"].split("noise in ")[1].split("%")[0])
    assert 100 * leak.result()["accuracy"] == pytest.approx(said, abs=3)
    assert leak_notice(AboveTimestep(AssignmentCoupling(), 300), 10) == f"from timestep 300 on, {told['assignment']}"
    of_captions = leak_notice(AssignmentCoupling(), 10, captions=True)
    assert "which of 10 captions" in of_captions and "--coupling_condition centered (experimental) or penalty" in of_captions
    assert "no better than independent" in of_captions  # what was measured on them
    assert "within" not in of_captions and "--log_class_leak" not in of_captions  # both are refused there


def test_the_notice_is_silent_where_nothing_is_told_and_touches_nothing():
    state = torch.get_rng_state()
    silent = [("independent", {}), ("nearest", {"candidates": 1})] + [("assignment", {"condition": name}) for name in CONDITIONS[1:]]
    for name, options in silent:
        assert leak_notice(build_coupling(name, **options), 10) == ""
    assert leak_notice(AssignmentCoupling(), 1) == ""
    reservoir = build_coupling("reservoir", size=4)
    reservoir(torch.zeros(2, 1, 4, 4), generator=generator())
    kept = dict(coupling_state(reservoir))
    assert leak_notice(reservoir, 10) != ""
    assert all(torch.equal(coupling_state(reservoir)[name], noise) for name, noise in kept.items())
    assert torch.equal(state, torch.get_rng_state())
