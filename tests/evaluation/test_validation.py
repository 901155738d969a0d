"""The loss on images held out, and the images that measurements are made on."""

from __future__ import annotations

import types

import pytest
import torch
from measured import DIGITS
from PIL import Image
from torch import nn

from immiscible.data.bundled import load_digits
from immiscible.data.transforms import ImageTransform
from immiscible.errors import UserError
from immiscible.evaluation.validation import fixed_images, images_together, to_uint8, validation_loss
from immiscible.process import PREDICTION_TYPES, NoiseProcess
from immiscible.schedulers import build_scheduler

PREDICTIONS = [(kind, name) for kind, names in PREDICTION_TYPES.items() for name in names]


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
