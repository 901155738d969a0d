"""Each optimizer by name: the library's own step, with schedule and clipping, saved and loaded, on the weights it is for."""

from __future__ import annotations

import copy
import io
from operator import attrgetter

import pytest
import torch
from class_networks import tiny_unet
from torch import nn

from immiscible.errors import UserError
from immiscible.networks.arguments import OptimizationArguments, TextOptimizationArguments
from immiscible.networks.optimization import (
    CLASSES,
    OPTIMIZERS,
    build_ema,
    build_optimizer,
    hidden_matrices,
    learning_rate,
    rate_factors,
    rates_in_words,
    set_rates,
)

CPU = torch.device("cpu")
BETAS = (0.5, 0.75)
OWN = {  # the class of each, and what it is called with beside rate, decay, betas and epsilon
    "adamw": (torch.optim.AdamW, {}),
    "radam": (torch.optim.RAdam, {"decoupled_weight_decay": True}),
    "adamw_8bit": ("bitsandbytes.optim.AdamW8bit", {}),
    "adafactor": (torch.optim.Adafactor, {}),
    "prodigy": ("prodigyopt.Prodigy", {"decouple": True, "use_bias_correction": True, "safeguard_warmup": True}),
    "schedule_free": ("schedulefree.AdamWScheduleFree", {}),
}


class Net(nn.Module):
    """Something of everything: convolutions at the ends, an embedding, a norm, a matrix in between that is hidden."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.told, self.norm = nn.Conv2d(1, 4, 1), nn.Embedding(3, 4), nn.LayerNorm(4)
        self.hidden, self.last = nn.Linear(4, 6), nn.Linear(6, 1)
        self.config = {}

    def forward(self, x, label):
        x = self.first(x).mean((2, 3)) + self.told(label)
        return self.last(self.hidden(self.norm(x)).tanh())


def arguments(name, **changes):
    rate = 1.0 if name == "prodigy" else 0.01
    settings = {"learning_rate": rate, "adam_beta1": 0.5, "adam_beta2": 0.75, "adam_weight_decay": 0.1, "lr_scheduler": "constant"}
    made = OptimizationArguments(optimizer=name, **{**settings, "lr_warmup_steps": 2, "use_ema": True, **changes})
    made.check()
    return made


def libraries(name, weights, flags):
    kind, options = OWN[name]
    if isinstance(kind, str):
        package, _, attribute = kind.partition(".")
        kind = attrgetter(attribute)(pytest.importorskip(package))
    adam = {} if name == "adafactor" else {"betas": BETAS, "eps": 1e-8}
    optimizer = kind(weights, lr=flags.learning_rate, weight_decay=0.1, **adam, **options)
    if name == "schedule_free":
        optimizer.train()
    return optimizer


def needed(name):
    if name in CLASSES:
        pytest.importorskip(CLASSES[name][0].partition(">")[0])


def take_step(network, optimizer, step, rate=None, after=lambda: None):
    generator = torch.Generator().manual_seed(step)
    x, label = torch.randn(8, 1, 2, 2, generator=generator), torch.randint(3, (8,), generator=generator)
    (network(x, label) - x.mean((2, 3))).square().mean().backward()
    nn.utils.clip_grad_norm_(network.parameters(), 0.1)
    if rate is not None:
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
    optimizer.step()
    optimizer.zero_grad()
    after()


def equal(one, other):
    return all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())


@pytest.mark.parametrize("name", OWN)
def test_its_steps_are_those_of_its_library(name):
    needed(name)
    ours, theirs = Net(), Net()
    flags = arguments(name, lr_scheduler="constant_with_warmup")
    optimizer = build_optimizer(ours, flags)
    own = libraries(name, [*theirs.parameters()], flags)
    rate = learning_rate(flags, optimizer, 4)
    for step in range(4):
        take_step(ours, optimizer, step, rate)
        take_step(theirs, own, step, rate)
    assert equal(ours, theirs) and not equal(ours, Net())


@pytest.mark.parametrize("scaled", [False, True])
def test_muon_takes_hidden_matrices_and_adamw_the_rest(scaled):
    """To the last bit those of two optimizers beside each other; also under a loss scaler, to which it is one."""
    needed("muon")
    ours, theirs, flags = Net(), Net(), arguments("muon")
    optimizer = build_optimizer(ours, flags)
    assert [weight is ours.hidden.weight for weight in hidden_matrices(ours)] == [True]
    rest = [weight for weight in theirs.parameters() if weight is not theirs.hidden.weight]
    both = [
        torch.optim.Muon([theirs.hidden.weight], lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=0.01, weight_decay=0.1, betas=BETAS, eps=1e-8),
    ]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=scaled)
    for step in range(3):
        x = torch.full((2, 1, 1, 1), float(step))
        scaler.scale(ours(x, torch.tensor([0, 1])).square().mean()).backward()
        theirs(x, torch.tensor([0, 1])).square().mean().backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        for each in both:
            each.step()
            each.zero_grad()
        optimizer.zero_grad()
    assert equal(ours, theirs) and not torch.equal(ours.hidden.weight, Net().hidden.weight)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_saved_and_loaded_it_goes_on_exactly(name):
    needed(name)
    flags = arguments(name, lr_scheduler="constant_with_warmup", decay_norms_and_biases=False)

    def begin():
        network = Net()
        optimizer = build_optimizer(network, flags)
        return network, optimizer, build_ema(network, flags, CPU, optimizer), learning_rate(flags, optimizer, 6)

    def go_on(network, optimizer, ema, rate, steps):
        for step in steps:
            take_step(network, optimizer, step, rate, lambda: ema.step(network.parameters()))

    whole, cut = begin(), begin()
    go_on(*whole, range(6))
    go_on(*cut, range(3))
    file = io.BytesIO()
    torch.save(cut[1].state_dict(), file)
    file.seek(0)
    network, optimizer, ema, rate = begin()
    network.load_state_dict(cut[0].state_dict())
    optimizer.load_state_dict(torch.load(file, weights_only=True))
    ema.load_state_dict(copy.deepcopy(cut[2].state_dict()))
    go_on(network, optimizer, ema, rate, range(3, 6))
    assert equal(network, whole[0]) and not equal(network, cut[0])
    assert all(map(torch.equal, ema.shadow_params, whole[2].shadow_params))


def test_the_average_of_schedule_free_is_the_point_that_it_evaluates():
    needed("schedule_free")
    network, flags = Net(), arguments("schedule_free")
    network.told.requires_grad_(False)
    optimizer = build_optimizer(network, flags)
    ema = build_ema(network, flags, CPU, optimizer)
    for step in range(3):
        take_step(network, optimizer, step, after=lambda: ema.step(network.parameters()))
    trained = copy.deepcopy(network)
    optimizer.eval()
    for average, weight in zip(ema.shadow_params, network.parameters(), strict=True):
        torch.testing.assert_close(average, weight.detach(), rtol=0, atol=0)
    assert not equal(trained, network)


def test_norms_and_biases_are_spared_the_decay_where_that_is_asked_for():
    network = Net()
    groups = build_optimizer(network, arguments("adamw", decay_norms_and_biases=False)).param_groups
    spared = {id(weight) for group in groups if group["weight_decay"] == 0 for weight in group["params"]}
    vectors = (network.first.bias, network.norm.weight, network.norm.bias, network.hidden.bias, network.last.bias)
    assert spared == set(map(id, vectors)) and sum(len(group["params"]) for group in groups) == len([*network.parameters()])
    (group,) = build_optimizer(network, arguments("adamw")).param_groups
    assert group["weight_decay"] == 0.1
    kinds = {(group["use_muon"], group["weight_decay"]) for group in build_optimizer(network, arguments("muon")).param_groups}
    assert kinds == {(True, 0.1), (False, 0.1)}


def test_muon_in_a_unet_is_for_its_linear_layers():
    network = tiny_unet()
    hidden = {id(weight) for weight in hidden_matrices(network)}
    found = {name for name, weight in network.named_parameters() if id(weight) in hidden}
    assert found and all(name.endswith("weight") and "conv" not in name for name in found)
    assert "class_embedding.weight" not in found and "time_embedding.linear_2.weight" in found
    with pytest.raises(UserError, match="--optimizer muon is for matrices, and the network has none"):
        build_optimizer(nn.Sequential(nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, 1)), arguments("muon"))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"optimizer": "prodigy", "learning_rate": 1e-4}, "--optimizer prodigy finds its rate.*: give 1, not 0.0001"),
        ({"optimizer": "schedule_free", "use_ema": False}, "--optimizer schedule_free .*: give --use_ema"),
        ({"optimizer": "schedule_free", "lr_scheduler": "cosine"}, "--lr_scheduler constant_with_warmup, not cosine"),
        ({"optimizer": "schedule_free", "adam_beta1": 0.0}, "--adam_beta1 must be above 0"),
        ({"optimizer": "muon", "use_8bit_adam": True}, "--use_8bit_adam .* --optimizer muon"),
        ({"optimizer": "adamw", "torch_compile_backend": "eager"}, "--torch_compile_backend eager is of --torch_compile: give it too"),
    ],
)
def test_what_does_not_go_together_is_one_line(changes, says):
    with pytest.raises(UserError, match=says):
        arguments(changes.pop("optimizer"), **changes)


@pytest.mark.parametrize(("name", "package"), [(name, package) for name, (package, _) in CLASSES.items()])
def test_a_package_that_is_missing_or_too_old_is_one_line(name, package, monkeypatch):
    monkeypatch.setattr("immiscible.networks.optimization.find_spec", lambda name: None)
    with pytest.raises(UserError, match=f"^--optimizer {name} needs {package}: `pip install '?{package}'?`$"):
        build_optimizer(Net(), arguments(name))
    assert arguments("adamw_8bit", use_8bit_adam=True).optimizer == "adamw_8bit"


def test_settings_that_an_optimizer_refuses_are_one_line():
    needed("prodigy")
    with pytest.raises(UserError, match="--optimizer prodigy: Invalid epsilon value"):
        build_optimizer(Net(), arguments("prodigy", adam_epsilon=0.0))


# Groups with a rate of their own


def rates_of(network, optimizer, flags, rate=0.5):
    """The rate of each weight, by name, in a step at ``rate``; and those that are logged apart."""
    apart = set_rates(optimizer.param_groups, rate, rate_factors(optimizer.param_groups, flags))
    of = {id(weight): group["lr"] for group in optimizer.param_groups for weight in group["params"]}
    return {name: of[id(weight)] for name, weight in network.named_parameters() if id(weight) in of}, apart


def test_a_pattern_is_of_whole_parts_of_names_and_the_first_that_fits_counts():
    network, flags = Net(), arguments("adamw", learning_rate_groups=["norm=0", "h*.weight=4", "bias=2"])
    optimizer = build_optimizer(network, flags)
    rates, apart = rates_of(network, optimizer, flags)
    assert {name: rate / 0.5 for name, rate in rates.items()} == {
        "first.weight": 1,
        "first.bias": 2,
        "told.weight": 1,
        "norm.weight": 0,
        "norm.bias": 0,
        "hidden.weight": 4,
        "hidden.bias": 2,
        "last.weight": 1,
        "last.bias": 2,
    }
    assert apart == {"norm": 0, "h*.weight": 2, "bias": 1} and sum(len(group["params"]) for group in optimizer.param_groups) == 9
    assert rates_in_words(optimizer.param_groups, flags) == (
        "others 0.01 (0.00 million), bias 0.02 (0.00 million), norm 0 (0.00 million), h*.weight 0.04 (0.00 million)"
    )
    assert rates_in_words(build_optimizer(network, arguments("adamw")).param_groups, arguments("adamw")) == ""


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_optimizer_takes_groups_saved_and_loaded_too(name):
    """A group of rate 0 stays as it is, the others learn; what goes on from a saved state equals what was not interrupted."""
    needed(name)
    groups = ["norm=0", "told=0"] if name == "prodigy" else ["norm=0", "hidden.weight=3"]
    flags = arguments(name, learning_rate_groups=groups, adam_weight_decay=0.0)

    def go_on(network, optimizer, steps):
        for step in steps:
            set_rates(optimizer.param_groups, flags.learning_rate, rate_factors(optimizer.param_groups, flags))
            take_step(network, optimizer, step)

    whole, cut, again = Net(), Net(), Net()
    optimizers = [build_optimizer(network, flags) for network in (whole, cut, again)]
    go_on(whole, optimizers[0], range(4))
    go_on(cut, optimizers[1], range(2))
    file = io.BytesIO()
    torch.save(optimizers[1].state_dict(), file)
    file.seek(0)
    again.load_state_dict(cut.state_dict())
    optimizers[2].load_state_dict(torch.load(file, weights_only=True))
    go_on(again, optimizers[2], range(2, 4))
    assert equal(again, whole)
    assert torch.equal(whole.norm.weight, Net().norm.weight) and not torch.equal(whole.hidden.weight, Net().hidden.weight)


def test_a_group_of_thrice_the_rate_moves_by_its_own_optimizers_steps():
    ours, theirs = Net(), Net()
    flags = arguments("adamw", learning_rate_groups=["hidden.weight=3"])
    optimizer = build_optimizer(ours, flags)
    own = [weight for weight in theirs.parameters() if weight is not theirs.hidden.weight]
    settings = {"betas": BETAS, "eps": 1e-8, "weight_decay": 0.1}
    both = torch.optim.AdamW([{"params": own, "lr": 0.01}, {"params": [theirs.hidden.weight], "lr": 0.03}], **settings)
    for step in range(3):
        set_rates(optimizer.param_groups, 0.01, rate_factors(optimizer.param_groups, flags))
        take_step(ours, optimizer, step)
        take_step(theirs, both, step)
    assert equal(ours, theirs)


def test_text_encoders_have_a_rate_and_a_decay_of_their_own():
    network = nn.ModuleDict({"text_encoder": nn.Linear(2, 3), "text_encoder_2": nn.Linear(2, 3), "attention": nn.Linear(2, 3)})
    changes = {"text_encoder_lr": 5e-6, "adam_weight_decay_text_encoder": 0.5, "adam_weight_decay": 0.1, "learning_rate": 1e-4}
    flags = TextOptimizationArguments(**changes, learning_rate_groups=["weight=16"])
    optimizer = build_optimizer(network, flags)
    rates, apart = rates_of(network, optimizer, flags, rate=1e-4)
    assert rates["attention.bias"] == 1e-4 and rates["attention.weight"] == pytest.approx(16e-4)
    assert rates["text_encoder.bias"] == pytest.approx(5e-6) and rates["text_encoder_2.weight"] == pytest.approx(80e-6)
    assert apart.keys() == {"weight", "text_encoder", "text_encoder weight"}
    decays = {id(weight): group["weight_decay"] for group in optimizer.param_groups for weight in group["params"]}
    assert decays[id(network["text_encoder"].weight)] == 0.5 and decays[id(network["attention"].weight)] == 0.1
    alone = build_optimizer(network, TextOptimizationArguments())
    assert set_rates(alone.param_groups, 1e-4, rate_factors(alone.param_groups, TextOptimizationArguments())) == {}


@pytest.mark.parametrize(
    ("groups", "says"),
    [
        (["attn2=2"], "--learning_rate_groups attn2: no weight that is trained .* are bias, first, hidden, last, norm, told, weight$"),
        (["hidden=2", "hidden.bias=3"], r"--learning_rate_groups hidden\.bias: no weight that is trained"),
        (["bias"], "--learning_rate_groups 'bias' must be PATTERN=FACTOR"),
        (["bias=-1"], "--learning_rate_groups 'bias=-1' must be PATTERN=FACTOR with a factor of at least 0"),
        (["bias=nan"], "'bias=nan' must be PATTERN=FACTOR"),
        (["=2"], "'=2' must be PATTERN=FACTOR"),
        (["bias=2", "bias=3"], "--learning_rate_groups bias=2 bias=3: one pattern is given twice"),
    ],
)
def test_groups_that_cannot_be_are_one_line(groups, says):
    with pytest.raises(UserError, match=says):
        build_optimizer(Net(), arguments("adamw", learning_rate_groups=groups))


def test_prodigy_has_one_rate_and_0():
    needed("prodigy")
    with pytest.raises(UserError, match="--optimizer prodigy has one rate for all, and 0: bias cannot have 2 times of it"):
        build_optimizer(Net(), arguments("prodigy", learning_rate_groups=["bias=2"]))
