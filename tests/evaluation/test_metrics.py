import itertools
import logging
import random
import types

import numpy
import pytest
import torch
from diffusers.training_utils import EMAModel
from PIL import Image
from safetensors.torch import save
from torch import nn

from immiscible.data.bundled import load_digits
from immiscible.data.sources import split_source
from immiscible.data.transforms import ImageTransform
from immiscible.errors import UserError
from immiscible.evaluation import features as features_module
from immiscible.evaluation import frechet
from immiscible.evaluation.features import FEATURES, DigitsFeatures, PixelFeatures, build_features
from immiscible.evaluation.frechet import Evaluation, FrechetDistance
from immiscible.evaluation.validation import EVALUATION_SEED, fixed_images, images_together, to_uint8, validation_loss
from immiscible.networks.unet import build_unet, unet_config
from immiscible.process import PREDICTION_TYPES, NoiseProcess
from immiscible.randomness import preserved_randomness
from immiscible.sampling.pipelines import build_pipeline, sample_images
from immiscible.schedulers import build_scheduler

DIGITS = torch.from_numpy(load_digits().images)[:, None]  # uint8 [1797,1,8,8]
PREDICTIONS = [(kind, name) for kind, names in PREDICTION_TYPES.items() for name in names]


class Passed:
    """Features that are what is given for images: [N, F, 1, 1]."""

    name = "FD-passed"

    def __init__(self, num_features):
        self.num_features = num_features
        self.seen = 0

    def __call__(self, images):
        self.seen += len(images)
        return images.flatten(1).double()


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def digits_features(cache):
    return DigitsFeatures(cache)


def noise_images(count, seed=0):
    return to_uint8(torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed)).clamp(-1, 1))


def reference_distance(a, b):
    """Float64, by eigenvalues of symmetric matrices alone, and with numpy's covariance."""
    a, b = a.flatten(1).double().numpy(), b.flatten(1).double().numpy()
    cov_a, cov_b = (numpy.atleast_2d(numpy.cov(x, rowvar=False)) for x in (a, b))
    values, vectors = numpy.linalg.eigh(cov_a)
    root = vectors * numpy.sqrt(values.clip(0)) @ vectors.T
    product = numpy.linalg.eigvalsh(root @ cov_b @ root).clip(0)
    means = ((a.mean(0) - b.mean(0)) ** 2).sum()
    return means + numpy.trace(cov_a) + numpy.trace(cov_b) - 2 * numpy.sqrt(product).sum()


def random_state():
    states = {"python": random.getstate(), "numpy": numpy.random.get_state(), "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return {name: repr(state.tolist() if isinstance(state, torch.Tensor) else tuple(map(repr, state))) for name, state in states.items()}


# Frechet distance


@pytest.mark.parametrize(
    "case, count_a, count_b, num_features, rank",
    [
        ("plain", 300, 200, 24, 24),
        ("rank deficient", 300, 200, 24, 7),
        ("fewer images than features", 10, 15, 24, 24),
        ("one feature", 50, 60, 1, 1),
    ],
)
def test_frechet_distance_equals_a_float64_reference(case, count_a, count_b, num_features, rank):
    generator = torch.Generator().manual_seed(0)

    def draw(count, shift):
        mixing = torch.randn(rank, num_features, generator=generator, dtype=torch.float64)
        return (torch.randn(count, rank, generator=generator, dtype=torch.float64) @ mixing + shift)[:, :, None, None]

    a, b = draw(count_a, 3.0), draw(count_b, 3.5)
    distance = FrechetDistance(Passed(num_features), a.split(64))
    assert distance(b.split(33)) == pytest.approx(reference_distance(a, b), rel=1e-6)
    scale = float(a.flatten(1).var(0).sum())
    for same in ([a], a.split(1), [a.flip(0)]):
        assert distance(same) == pytest.approx(0, abs=1e-6 * scale)
        assert distance(same) >= 0


def test_reference_features_are_computed_once():
    features = Passed(3)
    distance = FrechetDistance(features, torch.randn(100, 3, 1, 1).split(10))
    assert features.seen == distance.reference_images == 100
    first, second = torch.randn(50, 3, 1, 1), 4 * torch.randn(50, 3, 1, 1)
    values = [distance([first]), distance([second]), distance([first])]
    assert features.seen == 250
    assert values[0] == values[2] < values[1]  # nothing of one call is left in the next


def test_a_module_as_features_keeps_its_mode():
    module = nn.Flatten().eval()
    module.name, module.num_features = "FD-flat", 4
    distance = FrechetDistance(module, [torch.randn(9, 4, 1, 1, dtype=torch.float64)])
    distance._metric.train()
    assert not module.training


def test_too_few_images_are_refused():
    with pytest.raises(UserError, match="at least 2 reference images, not 1"):
        FrechetDistance(Passed(2), [torch.zeros(1, 2, 1, 1)])
    with pytest.raises(UserError, match="at least 2 images, not 0"):
        FrechetDistance(Passed(2), [torch.randn(5, 2, 1, 1)])([])


def test_a_broken_torchmetrics_is_one_clear_line(monkeypatch):
    def fail(name):
        raise ModuleNotFoundError("No module named 'torchvision'")

    monkeypatch.setattr(frechet, "import_module", fail)
    with pytest.raises(UserError, match=r"needs torchmetrics, which cannot be imported .*torchvision.*pip install"):
        FrechetDistance(Passed(2), [])


# Feature networks


def test_digits_classifier_is_good_and_its_features_are_scaled(digits_features):
    assert digits_features.accuracy > 0.95
    features = digits_features(DIGITS)
    assert features.dtype == torch.float64 and features.shape == (1797, 64)
    assert float(features.var(0).sum()) == pytest.approx(100, rel=1e-4)
    assert torch.linalg.matrix_rank(features.T.cov()) == 64
    assert torch.allclose(digits_features(DIGITS[:1]), features[:1], atol=1e-4)


def test_digits_classifier_is_the_same_whenever_it_is_trained(cache, digits_features, tmp_path, monkeypatch):
    torch.manual_seed(99)
    threads, before = torch.get_num_threads(), random_state()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    DigitsFeatures()
    assert (torch.get_num_threads(), random_state()) == (threads, before)
    (first,), (second,) = cache.iterdir(), (tmp_path / "immiscible").iterdir()  # and nothing half written beside it
    assert first.name == second.name and first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("damage", ["truncated", "one bit", "foreign", "empty", "other shapes"])
def test_a_broken_cache_is_made_anew(cache, digits_features, tmp_path, monkeypatch, caplog, damage):
    (whole,) = cache.iterdir()
    content = whole.read_bytes()
    broken = {
        "truncated": content[:-100],
        "one bit": content[:-1] + bytes([content[-1] ^ 1]),
        "foreign": b"not safetensors at all",
        "empty": b"",
        "other shapes": save({"scale": torch.ones(1)}, metadata={"sha256": features_module._digest({"scale": torch.ones(1)})}),
    }[damage]
    (tmp_path / whole.name).write_bytes(broken)
    monkeypatch.setattr(features_module, "_train_digits_classifier", lambda: digits_features._tensors)
    features = DigitsFeatures(tmp_path)
    assert "is broken" in caplog.text and "made anew" in caplog.text
    assert (tmp_path / whole.name).read_bytes() == content
    assert torch.equal(features(DIGITS), digits_features(DIGITS))


def test_a_cache_is_read_and_not_trained_again(cache, digits_features, monkeypatch):
    monkeypatch.setattr(features_module, "_train_digits_classifier", lambda: pytest.fail("trained again"))
    again = DigitsFeatures(cache)
    assert again.accuracy == digits_features.accuracy and torch.equal(again(DIGITS), digits_features(DIGITS))


def test_without_a_place_for_the_cache_it_still_works(digits_features, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(features_module, "_train_digits_classifier", lambda: digits_features._tensors)
    DigitsFeatures(tmp_path / "file")
    assert "cannot keep the digits classifier" in caplog.text


def test_distances_of_digits_have_the_expected_sizes(digits_features):
    distance = FrechetDistance(digits_features, DIGITS.split(500))
    half = DIGITS[torch.randperm(1797, generator=torch.Generator().manual_seed(0))[:898]]
    assert distance([DIGITS]) < 1e-6
    assert 1e-3 < distance([half]) < 1
    assert distance([noise_images(1500)]) > 20


def test_pixel_features_average_at_most_8x8():
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    features = PixelFeatures(channels=3, resolution=32)(images)
    assert features.dtype == torch.float64 and features.shape == (3, 192)
    blocks = images.double().reshape(3, 3, 8, 4, 8, 4).mean((3, 5)).flatten(1) / 127.5 - 1
    assert torch.allclose(features, blocks, atol=1e-6)
    assert PixelFeatures(1, 4)(images[:, :1, :4, :4]).shape == (3, 16)
    assert PixelFeatures(3, 30)(images[:, :, :30, :30]).shape == (3, 192)


def test_features_for_other_images_are_refused(digits_features):
    with pytest.raises(UserError, match="gray images of 1x8x8, not 3x32x32"):
        digits_features(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    with pytest.raises(UserError, match="64 features; these images have 192"):
        PixelFeatures(1, 8)(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))


def test_features_are_built_by_name(cache, digits_features, monkeypatch):
    monkeypatch.setattr(features_module, "_cache_folder", lambda: cache)
    assert list(FEATURES) == ["digits", "pixels"]
    assert build_features("digits", channels=1, resolution=8).name == "FD-digits"
    pixels = build_features("pixels", channels=3, resolution=32)
    assert (pixels.name, pixels.num_features) == ("FD-pixels-8x8", 192)
    with pytest.raises(UserError, match="known: digits, pixels"):
        build_features("inception", channels=3, resolution=32)


# Evaluation of a run


def tiny_unet():
    torch.manual_seed(0)
    return build_unet(unet_config(config_name_or_path=None, preset="unet-tiny", resolution=8, channels=1, dropout=0.3))


def evaluation_of(unet, samples=20, **options):
    evaluation = Evaluation(PixelFeatures(1, 8), DIGITS.split(600), samples=samples, inference_steps=[3, 2, 3], **options)
    pipeline = build_pipeline(unet, build_scheduler("ddpm", prediction_type="v_prediction"), sampler="ddim", spacing="trailing")
    return evaluation, pipeline


def test_evaluation_is_the_distance_of_the_samples(caplog):
    unet = tiny_unet()
    caplog.set_level(logging.WARNING)
    evaluation, pipeline = evaluation_of(unet, batch_size=7)
    assert "--eval_samples is 20: too few for the 64 features of FD-pixels-8x8, whose covariance needs at least 65" in caplog.text
    result = evaluation(pipeline)
    assert result["feature"] == "FD-pixels-8x8" and result["samples"] == 20 and result["reference_images"] == 1797
    assert list(result["frechet_distance"]) == ["2", "3"]
    unet.eval()
    images = sample_images(pipeline, 20, steps=3, seed=EVALUATION_SEED, batch_size=20, device=torch.device("cpu"))
    expected = reference_distance(PixelFeatures(1, 8)(DIGITS), PixelFeatures(1, 8)(torch.from_numpy(images).permute(0, 3, 1, 2)))
    assert result["frechet_distance"]["3"] == pytest.approx(expected, rel=1e-2)  # a rounding at 1/2 may go either way
    random.seed(5), torch.manual_seed(5)
    assert evaluation(pipeline) == result  # the same noises, whatever the global state


def test_evaluation_uses_the_averaged_weights():
    unet = tiny_unet()
    averaged = EMAModel(unet.parameters())
    evaluation, pipeline = evaluation_of(unet)
    before = evaluation(pipeline)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(0.1)
    assert evaluation(pipeline, averaged) == before != evaluation(pipeline)


def train_a_little(measure):
    """Two optimizer steps that draw from every global generator; ``measure`` is called where gradients are pending and after a step."""
    unet = tiny_unet().train()
    averaged = EMAModel(unet.parameters(), decay=0.5)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-3)
    random.seed(1), numpy.random.seed(1), torch.manual_seed(1)
    for _ in range(2):
        x = torch.randn(4, 1, 8, 8) + random.random() + float(numpy.random.rand())
        unet(x, torch.randint(0, 1000, (4,))).sample.square().mean().backward()
        measure(unet, averaged)
        optimizer.step()
        optimizer.zero_grad()
        averaged.step(unet.parameters())
        measure(unet, averaged)
    return [*unet.state_dict().values(), *averaged.shadow_params], random_state()


def test_measuring_changes_nothing_in_training():
    process = NoiseProcess.from_scheduler(build_scheduler("ddpm"))
    calls = itertools.count()

    def measure(unet, averaged):
        def look():
            gradients = [None if parameter.grad is None else parameter.grad.clone() for parameter in unet.parameters()]
            return [*map(torch.clone, unet.state_dict().values()), *map(torch.clone, averaged.shadow_params)], gradients, random_state()

        next(calls)
        weights, gradients, state = look()
        evaluation, pipeline = evaluation_of(unet, samples=4)
        evaluation(pipeline, averaged)
        validation_loss(unet, torch.zeros(4, 1, 8, 8), process, "epsilon", ema=averaged)
        weights_after, gradients_after, state_after = look()
        assert all(map(torch.equal, weights, weights_after)) and state == state_after
        assert all((a is None and b is None) or torch.equal(a, b) for a, b in zip(gradients, gradients_after, strict=True))
        assert all(module.training for module in unet.modules())

    with_it, state_with = train_a_little(measure)
    without, state_without = train_a_little(lambda unet, averaged: None)
    assert next(calls) == 4
    assert all(map(torch.equal, with_it, without)) and state_with == state_without


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_measuring_leaves_the_gpu_generator_alone():
    unet = tiny_unet().to("cuda")
    evaluation, pipeline = evaluation_of(unet, samples=4)
    before = random_state()
    evaluation(pipeline)
    with preserved_randomness(torch.device("cuda")):
        torch.randn(3, device="cuda")
    assert random_state() == before


def test_evaluation_refuses_wrong_numbers():
    for options, message in [
        ({"samples": 1, "inference_steps": [5]}, "--eval_samples 1 is too small.* meaningful one 65"),
        ({"samples": 9, "inference_steps": [5, 0]}, "--eval_inference_steps"),
        ({"samples": 9, "inference_steps": []}, "--eval_inference_steps"),
    ]:
        with pytest.raises(UserError, match=message):
            Evaluation(PixelFeatures(1, 8), [DIGITS], **options)


def test_diverged_weights_are_named():
    unet = tiny_unet()
    evaluation, pipeline = evaluation_of(unet)
    with torch.no_grad():
        unet.conv_in.weight.fill_(float("nan"))
    before = random_state()
    with pytest.raises(UserError, match="NaN"):
        evaluation(pipeline)
    assert random_state() == before and unet.training


# Held-out loss


class Oracle(nn.Module):
    """Knows that every image is the same one, and answers without error."""

    def __init__(self, image, process, prediction_type):
        super().__init__()
        self.image, self.process, self.prediction_type = image, process, prediction_type
        self.times = []

    def forward(self, xt, time):
        t = torch.searchsorted(self.process.model_time, time.contiguous())
        self.times += t.tolist()
        x0 = self.image.expand_as(xt)
        signal, noise = (vector[t].view(-1, 1, 1, 1) for vector in (self.process.signal, self.process.noise))
        return types.SimpleNamespace(sample=self.process.target(x0, (xt - signal * x0) / noise, t, self.prediction_type))


@pytest.mark.parametrize("kind, prediction_type", PREDICTIONS)
def test_validation_loss_of_an_oracle_is_zero(kind, prediction_type):
    process = NoiseProcess.from_scheduler(build_scheduler(kind, prediction_type=prediction_type))
    image = torch.linspace(-1, 1, 64).view(1, 1, 8, 8)
    oracle = Oracle(image, process, prediction_type)
    losses = validation_loss(oracle, image.expand(5, -1, -1, -1), process, prediction_type, batch_size=3)
    assert list(losses) == [f"{start}-{start + 99}" for start in range(0, 1000, 100)]
    assert sorted(set(oracle.times)) == list(range(50, 1000, 100))
    assert max(losses.values()) < 1e-9


def test_validation_loss_is_a_plain_mean_whatever_the_batches():
    process = NoiseProcess.from_scheduler(build_scheduler("ddpm", num_train_timesteps=7))
    images = DIGITS[:30].float() / 127.5 - 1
    blank = Oracle(torch.zeros(1), process, "sample")  # always predicts a blank image: its error is the image
    losses = [validation_loss(blank, images, process, "sample", levels=3, batch_size=size) for size in (30, 4)]
    assert list(losses[0]) == ["0-1", "2-3", "4-6"]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert list(losses[0].values()) == pytest.approx([float(images.square().mean())] * 3, rel=1e-5)
    noisy = [validation_loss(Oracle(torch.zeros(1), process, "epsilon"), images, process, "epsilon", batch_size=size) for size in (30, 4)]
    assert len(noisy[0]) == 7 and noisy[0] == pytest.approx(noisy[1], rel=1e-5)  # the noises too are the images', not the batches'
    torch.manual_seed(3)
    assert validation_loss(blank, images, process, "sample", levels=3, batch_size=4) == losses[1]


class Guesser(nn.Module):
    """Says that an image is the first of its class."""

    def __init__(self, images):
        super().__init__()
        self.images = images

    def forward(self, xt, time, class_labels):
        return types.SimpleNamespace(sample=self.images[class_labels])


def test_validation_loss_tells_the_classes():
    process = NoiseProcess.from_scheduler(build_scheduler("ddpm", prediction_type="sample"))
    firsts = DIGITS[:10].float() / 127.5 - 1  # the digits 0 to 9
    labels = torch.tensor([3, 3, 0, 9, 5, 1, 7])
    losses = validation_loss(Guesser(firsts), firsts[labels], process, "sample", condition={"class_labels": labels}, batch_size=3)
    assert set(losses.values()) == {0.0}
    wrong = validation_loss(Guesser(firsts), firsts[labels], process, "sample", condition={"class_labels": labels.roll(1)}, batch_size=3)
    assert min(wrong.values()) > 0.05


# Images to measure on


def test_split_is_a_fixed_partition():
    source = load_digits()
    train, held_out = split_source(source, 0.1)
    assert (len(train), len(held_out)) == (1617, 180)
    assert sorted([*train.indices, *held_out.indices]) == list(range(1797))
    torch.manual_seed(4)
    assert split_source(source, 0.1)[1].indices == held_out.indices


@pytest.mark.parametrize("fraction", [0, 1, -0.5, 1.5, 1e-6, 1 - 1e-6])
def test_a_split_with_an_empty_side_is_refused(fraction):
    with pytest.raises(UserError, match=r"--validation_split .* of 1797 images leaves none on one side"):
        split_source(load_digits(), fraction)


class Shapes:
    """Images of two sizes, the second unreadable."""

    def __init__(self):
        self.images = [Image.new("L", (12, 8), 0), None, Image.new("L", (8, 8), 0)]
        self.images[0].paste(255, (2, 0, 10, 8))  # white in the middle 8x8

    def __len__(self):
        return len(self.images)

    def load(self, index):
        if self.images[index] is None:
            raise ValueError("broken")
        return self.images[index]

    def name(self, index):
        return f"shape {index}"


def pixels(batches):
    return torch.cat([batch.x0 for batch in batches])


def test_fixed_images_are_cut_from_the_middle_and_never_flipped():
    source, transform = load_digits(), ImageTransform(8, 1, random_flip=True, seed=3)
    assert torch.equal(to_uint8(pixels(fixed_images(source, transform))), DIGITS)
    few = pixels(fixed_images(source, transform, limit=300))
    assert few.shape == (300, 1, 8, 8) and torch.equal(few, pixels(fixed_images(source, transform, limit=300)))
    assert all(batch.labels is None for batch in fixed_images(source, transform, limit=300))
    labelled = list(fixed_images(source, transform, limit=300, with_labels=True))
    rows = [int((image == DIGITS).flatten(1).all(1).nonzero()[0]) for image in to_uint8(few)]
    assert torch.equal(pixels(labelled), few)
    assert torch.cat([batch.labels for batch in labelled]).tolist() == [source.label(row) for row in rows]

    with pytest.raises(UserError, match="shape 1: broken"):
        list(fixed_images(Shapes(), transform))
    white, black = pixels(fixed_images(Shapes(), transform, skip_bad_images=True))
    assert (white == 1).all() and (black == -1).all()


@pytest.mark.parametrize(("resolution", "images"), [(8, 256), (64, 256), (256, 16), (512, 4), (2048, 1)])
def test_large_images_are_measured_few_at_a_time(resolution, images):
    assert images_together(resolution) == images
