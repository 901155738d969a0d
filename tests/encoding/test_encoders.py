"""What a batch becomes: latents drawn from their posterior, classes beside them."""

from __future__ import annotations

import pytest
import torch
from tiny_text import model_folder

from immiscible.data.batches import Images
from immiscible.encoding.encoders import LatentEncoder, PixelEncoder, latent_draw
from immiscible.networks.latents import load_vae
from immiscible.randomness import Draws

CPU = torch.device("cpu")
DRAWS = Draws(0, 0, 0, CPU)


@pytest.fixture(scope="module")
def vae():
    return load_vae(str(model_folder()), resolution=32)


def test_latents_are_draws_from_the_posterior(vae):
    batch = Images(torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1)
    with torch.no_grad():
        posterior = vae.encode(batch.x0).latent_dist
    scale = vae.config.scaling_factor
    encode = LatentEncoder(vae, CPU)
    encoded = encode(batch, DRAWS)
    normal = DRAWS.normal("latent", 2, 4, 4, 4)
    torch.testing.assert_close(encoded.x0, scale * (posterior.mean + (0.5 * posterior.logvar).exp() * normal))
    assert encoded.labels is None and not encoded.condition and not encoded.x0.requires_grad
    assert torch.equal(encode(batch, DRAWS).x0, encoded.x0)
    draws = torch.stack([encode(batch, Draws(0, step, 0, CPU)).x0 for step in range(400)]) / scale
    deviation = posterior.std
    assert ((draws.mean(0) - posterior.mean).abs() < 5 * deviation / 20).all()  # five standard errors
    torch.testing.assert_close(draws.std(0), deviation, rtol=0.2, atol=0)


def test_a_latent_does_not_depend_on_how_the_batch_is_split():
    mean, log_variance = torch.zeros(2, 16, 4, 2, 2)
    whole = latent_draw(mean, log_variance, 0.5, DRAWS)
    second = latent_draw(mean[8:].half(), log_variance[8:].half(), 0.5, Draws(0, 0, 8, CPU))
    assert second.dtype == torch.float32 and torch.equal(whole[8:], second) and float(whole.std()) == pytest.approx(0.5, rel=0.1)


def test_classes_reach_the_network_beside_latents(vae):
    batch = Images(torch.zeros(2, 3, 32, 32), torch.tensor([3, 1]))
    told = LatentEncoder(vae, CPU, class_conditional=True)(batch, DRAWS)
    assert torch.equal(told.condition["class_labels"], batch.labels) and torch.equal(told.labels, batch.labels)
    assert told.condition.keys() == PixelEncoder(CPU, class_conditional=True)(batch, DRAWS).condition.keys()


def test_dropped_classes_are_those_of_global_rows_and_of_the_network_alone(vae):
    labels = torch.arange(512) % 4
    batch = Images(torch.zeros(512, 3, 32, 32), labels)
    encode = PixelEncoder(CPU, class_conditional=True, class_dropout=0.25, null_class=4)
    told = encode(batch, DRAWS)
    dropped = told.condition["class_labels"] == 4
    assert torch.equal(told.labels, labels) and torch.equal(told.condition["class_labels"][~dropped], labels[~dropped])
    assert abs(float(dropped.float().mean()) - 0.25) < 4 * (0.25 * 0.75 / 512) ** 0.5
    second = encode(Images(batch.x0[200:], labels[200:]), Draws(0, 0, 200, CPU))  # another rank's rows
    assert torch.equal(second.condition["class_labels"], told.condition["class_labels"][200:])
    assert not torch.equal(encode(batch, Draws(0, 1, 0, CPU)).condition["class_labels"], told.condition["class_labels"])
    latents = LatentEncoder(vae, CPU, class_conditional=True, class_dropout=0.25, null_class=4)
    few = latents(Images(batch.x0[:32], labels[:32]), DRAWS)
    assert torch.equal(few.condition["class_labels"], told.condition["class_labels"][:32]) and torch.equal(few.labels, labels[:32])


def test_half_precision_is_of_the_encoder_alone(vae):
    batch = Images(torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1)
    exact, half = (LatentEncoder(vae, CPU, precision=dtype)(batch, DRAWS).x0 for dtype in (torch.float32, torch.bfloat16))
    assert half.dtype == torch.float32 and vae.dtype == torch.float32
    assert 0 < float((exact - half).abs().max()) < 0.05
