"""Inception v3 with random weights: the published file's names and shapes, each block against its definition, other people's network."""

from __future__ import annotations

import re

import pytest
import torch
from measured import random_state
from torch.nn.functional import conv2d

from immiscible.errors import UserError
from immiscible.evaluation import inception
from immiscible.evaluation.inception import InceptionFeatures, InceptionOutputs, InceptionV3, Mixed, find_weights, load_inception
from immiscible.files import file_facts

# Of each block its convolutions, "name inputs>outputs height x width", from the paper's figures and the tensors of the published graph.
STEM = "1a_3x3 3>32 3x3, 2a_3x3 32>32 3x3, 2b_3x3 32>64 3x3, 3b_1x1 64>80 1x1, 4a_3x3 80>192 3x3"
SMALL = (
    "branch1x1 {0}>64 1x1, branch5x5_1 {0}>48 1x1, branch5x5_2 48>64 5x5, branch3x3dbl_1 {0}>64 1x1, branch3x3dbl_2 64>96 3x3, "
    "branch3x3dbl_3 96>96 3x3, branch_pool {0}>{1} 1x1"
)
LONG = (
    "branch1x1 768>192 1x1, branch7x7_1 768>{0} 1x1, branch7x7_2 {0}>{0} 1x7, branch7x7_3 {0}>192 7x1, branch7x7dbl_1 768>{0} 1x1, "
    "branch7x7dbl_2 {0}>{0} 7x1, branch7x7dbl_3 {0}>{0} 1x7, branch7x7dbl_4 {0}>{0} 7x1, branch7x7dbl_5 {0}>192 1x7, "
    "branch_pool 768>192 1x1"
)
FORKED = (
    "branch1x1 {0}>320 1x1, branch3x3_1 {0}>384 1x1, branch3x3_2a 384>384 1x3, branch3x3_2b 384>384 3x1, branch3x3dbl_1 {0}>448 1x1, "
    "branch3x3dbl_2 448>384 3x3, branch3x3dbl_3a 384>384 1x3, branch3x3dbl_3b 384>384 3x1, branch_pool {0}>192 1x1"
)
BLOCKS = {
    "Mixed_5b.": SMALL.format(192, 32),
    "Mixed_5c.": SMALL.format(256, 64),
    "Mixed_5d.": SMALL.format(288, 64),
    "Mixed_6a.": "branch3x3 288>384 3x3, branch3x3dbl_1 288>64 1x1, branch3x3dbl_2 64>96 3x3, branch3x3dbl_3 96>96 3x3",
    "Mixed_6b.": LONG.format(128),
    "Mixed_6c.": LONG.format(160),
    "Mixed_6d.": LONG.format(160),
    "Mixed_6e.": LONG.format(192),
    "Mixed_7a.": "branch3x3_1 768>192 1x1, branch3x3_2 192>320 3x3, branch7x7x3_1 768>192 1x1, branch7x7x3_2 192>192 1x7, "
    "branch7x7x3_3 192>192 7x1, branch7x7x3_4 192>192 3x3",
    "Mixed_7b.": FORKED.format(1280),
    "Mixed_7c.": FORKED.format(2048),
    "Conv2d_": STEM,
}


def published_shapes():
    shapes = {"fc.weight": (1008, 2048), "fc.bias": (1008,)}
    for prefix, block in BLOCKS.items():
        for convolution in block.split(", "):
            name, *sizes = re.fullmatch(r"(\S+) (\d+)>(\d+) (\d)x(\d)", convolution).groups()
            inputs, outputs, height, width = map(int, sizes)
            shapes[f"{prefix}{name}.conv.weight"] = (outputs, inputs, height, width)
            shapes |= {f"{prefix}{name}.bn.{what}": (outputs,) for what in ("weight", "bias", "running_mean", "running_var")}
    return shapes


@pytest.fixture(scope="module")
def weights():
    """Of the published names and shapes; activations keep their size through the layers."""
    generator, made = torch.Generator().manual_seed(0), {}
    for name, shape in published_shapes().items():
        noise = torch.randn(shape, generator=generator)
        if name.endswith(("conv.weight", "fc.weight")):
            made[name] = noise * (2 / noise[0].numel()) ** 0.5
        else:
            made[name] = 1 + noise.tanh() / 2 if name.endswith(("bn.weight", "running_var")) else noise / 5
    return made


@pytest.fixture(scope="module")
def file(weights, tmp_path_factory):
    path = tmp_path_factory.mktemp("networks") / "pt_inception-2015-12-05-6726825d.pth"
    torch.save(weights, path)
    return path


@pytest.fixture
def known(file, monkeypatch):
    """The file of random weights counts as the published one."""
    monkeypatch.setattr(inception, "WEIGHTS_SHA256", file_facts(file)["sha256"])
    return file


def images(count, side=32):
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(side))


def test_tensors_are_those_of_the_published_file():
    network = InceptionV3()
    own = {name: tuple(value.shape) for name, value in network.state_dict().items() if not name.endswith("num_batches_tracked")}
    assert own == published_shapes() and len(own) == 94 * 5 + 2
    assert sum(parameter.numel() for parameter in network.parameters()) == 23_850_960


@pytest.mark.parametrize("counted", [False, True])
def test_files_with_and_without_counts_of_steps_load(known, weights, monkeypatch, tmp_path, counted):
    path = known
    if counted:
        path = tmp_path / "weights-inception-2015-12-05-6726825d.pth"
        counts = {name.replace("bn.bias", "bn.num_batches_tracked"): torch.tensor(0) for name in weights if name.endswith("bn.bias")}
        torch.save(weights | counts, path)
        monkeypatch.setattr(inception, "WEIGHTS_SHA256", file_facts(path)["sha256"])
    before = random_state()
    network = load_inception(find_weights(path.parent))
    loaded = network.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in weights.items())
    assert not network.training and not any(parameter.requires_grad for parameter in network.parameters())
    assert random_state() == before and not any(tensor.is_meta for tensor in loaded.values())


def layer(block, name, x, **options):
    """ReLU of the normalized convolution, in float64."""
    tensors = {key.removeprefix(f"{name}."): value.double() for key, value in block.state_dict().items() if key.startswith(f"{name}.")}
    if "stride" not in options:
        options["padding"] = tuple(size // 2 for size in tensors["conv.weight"].shape[2:])
    x = conv2d(x, tensors["conv.weight"], **options)
    mean, variance, weight, bias = (tensors[f"bn.{what}"][:, None, None] for what in ("running_mean", "running_var", "weight", "bias"))
    return ((x - mean) / (variance + 0.001).sqrt() * weight + bias).relu()


def around(x, reduce):
    """[N,C,H,W] of what ``reduce`` makes of each pixel's neighborhood of at most 3x3 that lies in the image."""
    height, width = x.shape[-2:]
    rows = [[reduce(x[..., max(0, i - 1) : i + 2, max(0, j - 1) : j + 2]) for j in range(width)] for i in range(height)]
    return torch.stack([torch.stack(row, -1) for row in rows], -2)


@pytest.fixture(scope="module")
def features(file):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inception, "WEIGHTS_SHA256", file_facts(file)["sha256"])
        return InceptionFeatures(file)


@pytest.fixture
def network(features):
    return features._network


def compare(block: Mixed, channels, expected):
    x = torch.randn(2, channels, 7, 7, generator=torch.Generator().manual_seed(1)).relu()
    found, wanted = block(x), torch.cat(expected(x.double()), 1)
    assert found.shape == wanted.shape and torch.allclose(found.double(), wanted, rtol=1e-3, atol=1e-4) and wanted.std() > 0.1


def chain(block, x, *names):
    for name in names:
        x = layer(block, name, x)
    return x


def test_averages_leave_the_padding_out(network):
    block = network.Mixed_5b
    compare(
        block,
        192,
        lambda x: [
            layer(block, "branch1x1", x),
            chain(block, x, "branch5x5_1", "branch5x5_2"),
            chain(block, x, "branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"),
            layer(block, "branch_pool", around(x, lambda part: part.mean((-2, -1)))),
        ],
    )


def test_long_kernels(network):
    block = network.Mixed_6c
    compare(
        block,
        768,
        lambda x: [
            layer(block, "branch1x1", x),
            chain(block, x, *(f"branch7x7_{i}" for i in range(1, 4))),
            chain(block, x, *(f"branch7x7dbl_{i}" for i in range(1, 6))),
            layer(block, "branch_pool", around(x, lambda part: part.mean((-2, -1)))),
        ],
    )


@pytest.mark.parametrize("name", ["Mixed_6a", "Mixed_7a"])
def test_reductions_halve_by_strides_and_maxima(network, name):
    block = network.get_submodule(name)
    channels, chains = {
        "Mixed_6a": (288, [["branch3x3"], ["branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"]]),
        "Mixed_7a": (768, [["branch3x3_1", "branch3x3_2"], [f"branch7x7x3_{i}" for i in range(1, 5)]]),
    }[name]
    compare(
        block,
        channels,
        lambda x: [
            *(layer(block, last, chain(block, x, *first), stride=2) for *first, last in chains),
            around(x, lambda part: part.amax((-2, -1)))[..., 1:-1:2, 1:-1:2],
        ],
    )


@pytest.mark.parametrize("name", ["Mixed_7b", "Mixed_7c"])
def test_the_last_block_pools_by_maxima(network, name):
    block = network.get_submodule(name)
    pooled = (lambda part: part.amax((-2, -1))) if name == "Mixed_7c" else (lambda part: part.mean((-2, -1)))

    def expected(x):
        fork, double = layer(block, "branch3x3_1", x), chain(block, x, "branch3x3dbl_1", "branch3x3dbl_2")
        forks = [layer(block, f"branch3x3_2{letter}", fork) for letter in "ab"]
        forks += [layer(block, f"branch3x3dbl_3{letter}", double) for letter in "ab"]
        return [layer(block, "branch1x1", x), *forks, layer(block, "branch_pool", around(x, pooled))]

    compare(block, 1280 if name == "Mixed_7b" else 2048, expected)


def test_what_the_metrics_read(features, network):
    found = features.outputs(images(2))
    assert {name: tuple(value.shape) for name, value in found.items()} == {
        "features": (2, 2048),
        "spatial": (2, 2023),
        "probabilities": (2, 1008),
    }
    assert all(value.dtype == torch.float64 for value in found.values()) and features.name == "FID"
    assert found["features"].std() > 0.01
    expected = (found["features"] @ network.fc.weight.double().T).softmax(1)  # without the bias
    assert torch.allclose(found["probabilities"], expected, rtol=1e-4) and expected.std() > 1e-4
    maps = []
    hook = network.Mixed_6d.branch1x1.register_forward_hook(lambda module, given, made: maps.append(made))
    again = features(images(2)[1:])
    hook.remove()
    assert torch.allclose(again, found["features"][1:], rtol=1e-4, atol=1e-5)  # whatever stands beside it
    rows = found["spatial"].view(2, 17, 17, 7)  # row, column, channel
    assert torch.allclose(rows[1:, ..., 5], maps[0][:, 5].double(), atol=1e-4) and rows.std() > 0.01


@pytest.mark.parametrize(
    ("resize", "name"), [("tf-bilinear", "FID"), ("torch-bilinear", "FID-torch-bilinear"), ("clean-bicubic", "FID-clean-bicubic")]
)
def test_ranges_are_those_of_the_code_that_resizes_so(known, resize, name):
    features, seen = InceptionFeatures(known, resize=resize), []
    features._network = lambda x: seen.append(x) or InceptionOutputs(*[torch.zeros(2, 1)] * 3)
    features(torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(-1, -1, 8, 8))
    low, high = (-1.0, 1.0) if resize == "torch-bilinear" else (-1.0, 127 / 128)
    assert features.name == name
    assert torch.allclose(seen[0][0], torch.tensor(low)) and torch.allclose(seen[0][1], torch.tensor(high))


def test_an_unknown_resize_is_one_line():
    with pytest.raises(UserError, match="cannot be resized by 'lanczos'; known: tf-bilinear, torch-bilinear"):
        InceptionFeatures(resize="lanczos")


def test_weights_are_found_in_the_cache_folders_and_never_downloaded(file, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "torch"))
    for given in (None, tmp_path / "nothing.pth"):
        with pytest.raises(UserError) as error:
            find_weights(given)
        message = str(error.value)
        assert "github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth" in message
        assert str(tmp_path / "cache" / "immiscible" / "networks") in message and "--feature_weights" in message
        assert "\n" not in message and error.value.exit_code == 1 and (given is None or str(given) in message)
    hub = tmp_path / "torch" / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"
    own = tmp_path / "cache" / "immiscible" / "networks" / file.name
    for path in (hub, own):
        path.parent.mkdir(parents=True)
        path.write_bytes(b"")
        assert find_weights() == path
    assert find_weights(hub) == hub and find_weights(hub.parent) == hub


def test_other_files_are_refused_before_they_are_loaded(file, monkeypatch, tmp_path):
    monkeypatch.setattr(inception.torch, "load", lambda *args, **options: pytest.fail("loaded"))
    with pytest.raises(UserError, match=r"its sha256 begins with [0-9a-f]{8}, not 6726825d"):
        load_inception(file)
    monkeypatch.undo()
    other = tmp_path / "other.pth"
    for content in ({"fc.weight": torch.zeros(2)}, [1]):
        torch.save(content, other)
        monkeypatch.setattr(inception, "WEIGHTS_SHA256", file_facts(other)["sha256"])
        with pytest.raises(UserError, match="does not hold Inception's weights"):
            load_inception(other)


def test_torch_fidelitys_network_gives_the_same(known, features):
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except Exception as error:  # it needs a torchvision that fits torch
        pytest.skip(f"torch-fidelity cannot be imported: {error}")
    theirs = FeatureExtractorInceptionV3("theirs", ["2048", "logits_unbiased"], str(known))
    ours = features.outputs(images(2))
    pool, logits = theirs(images(2))
    assert torch.allclose(ours["features"], pool.double(), rtol=1e-4, atol=1e-5)
    assert torch.allclose(ours["probabilities"], logits.double().softmax(1), rtol=1e-4)
