"""The step: bit-equal to plain diffusers with every method off, and what the methods change when on."""

import pytest
import torch
from torch import nn

from immiscible.coupling import AssignmentCoupling, IndependentCoupling, build_coupling
from immiscible.data.batches import Images
from immiscible.encoding.encoders import PixelEncoder
from immiscible.errors import UserError
from immiscible.objectives import DenoisingObjective, weighted_mse
from immiscible.process import NoiseProcess
from immiscible.randomness import Draws, PoolDraws, reseed_globally
from immiscible.schedulers import build_scheduler
from immiscible.timesteps import timestep_sampler
from immiscible.training.loop import StopRequest, train
from immiscible.weighting import loss_weights

SEED = 11
CPU = torch.device("cpu")
GOLDEN = [0.0755451, 0.2136463, 0.1446558, 0.09707894, 0.08223598]  # on a CPU


def tiny_unet(dropout=0.0):
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=16,
        in_channels=3,
        out_channels=3,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        dropout=dropout,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )


def objective(prediction_type="epsilon", weighting="none", coupling=None, law="uniform", **options):
    scheduler = build_scheduler("ddpm", prediction_type=prediction_type)
    process = NoiseProcess.from_scheduler(scheduler)
    return DenoisingObjective(
        process,
        timestep_sampler(law, process),
        coupling or IndependentCoupling(),
        loss_weights(weighting, process, prediction_type).float(),
        prediction_type,
        **options,
    )


def images(count, batch=8, channels=3):
    generator = torch.Generator().manual_seed(5)
    return [torch.rand(batch, channels, 16, 16, generator=generator) * 2 - 1 for _ in range(count)]


def run(accelerator, unet, loss, batches, steps, ema=None, start=0, grad_norm=1.0, rate=lambda step: 1e-3, ahead=False):
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-3, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8)
    model, optimizer = accelerator.prepare(unet, optimizer)
    model.train()
    return list(
        train(
            accelerator,
            model,
            optimizer,
            loss,
            map(Images, batches),
            PixelEncoder(CPU),
            batch_size=len(batches[0]),
            seed=SEED,
            start_step=start,
            max_steps=steps,
            learning_rate=rate,
            max_grad_norm=grad_norm,
            ema=ema,
            stop=StopRequest(),
            ahead=ahead,
        )
    )


@pytest.fixture
def accelerator():
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.mark.parametrize(
    ("prediction_type", "weighting"), [("epsilon", "none"), ("v_prediction", "none"), ("sample", "none"), ("sample", "snr")]
)
def test_ten_steps_with_every_method_off_are_bit_equal_to_plain_diffusers(accelerator, prediction_type, weighting):
    """The right side is the training step of diffusers' unconditional example, with the same x0, noise and timesteps."""
    from diffusers import DDPMScheduler

    batches = images(10)
    ours = tiny_unet(dropout=0.1)
    stats = run(accelerator, ours, objective(prediction_type, weighting), batches, 10)

    plain = tiny_unet(dropout=0.1).train()
    scheduler = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear", prediction_type=prediction_type)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-3, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8)
    sampler = timestep_sampler("uniform", scheduler)
    for step, clean in enumerate(batches):
        draws = Draws(SEED, step, 0, CPU)
        noise, timesteps = draws.normal("noise", *clean.shape), sampler.from_uniforms(draws.uniform("timesteps", len(clean)))
        reseed_globally(SEED, "library", step, 0)  # dropout
        output = plain(scheduler.add_noise(clean, noise, timesteps), timesteps).sample
        if prediction_type == "epsilon":
            loss = nn.functional.mse_loss(output, noise)
        elif prediction_type == "v_prediction":
            loss = nn.functional.mse_loss(output, scheduler.get_velocity(clean, noise, timesteps))
        elif weighting == "none":
            loss = nn.functional.mse_loss(output, clean)
        else:
            alpha = scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
            loss = (alpha / (1 - alpha) * nn.functional.mse_loss(output, clean, reduction="none")).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        assert stats[step].metrics["loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), plain.parameters(), strict=True))


def record(loss, x0, draws, sample=None):
    """What the network is given in one call of the objective."""
    seen = {}

    class Model(nn.Module):
        def forward(self, xt, time):
            seen.update(xt=xt, time=time)
            return type("Output", (), {"sample": torch.zeros_like(xt) if sample is None else sample})()

    pairs = loss.pair(x0, PoolDraws((draws,), len(x0)))
    losses = loss(Model(), pairs, draws)
    return seen["xt"], seen["time"], losses, pairs.statistics


def test_switching_the_coupling_changes_the_pairing_alone():
    x0, draws = images(1, batch=16)[0], Draws(SEED, 3, 0, CPU)
    plain_xt, plain_time, _, plain = record(objective(), x0, draws)
    paired_xt, paired_time, _, paired = record(objective(coupling=AssignmentCoupling()), x0, draws)
    nearest_xt, nearest_time, _, nearest = record(objective(coupling=build_coupling("nearest", candidates=4)), x0, draws)
    assert torch.equal(plain_time, paired_time) and torch.equal(plain_time, nearest_time)
    assert not torch.equal(plain_xt, paired_xt) and not torch.equal(plain_xt, nearest_xt)
    for statistics in (paired, nearest):
        assert torch.equal(statistics["pair_distance_drawn"], plain["pair_distance_drawn"])
        assert statistics["pair_distance"] < plain["pair_distance"]
    assert (float(plain["paired_images"]), float(paired["paired_images"]), float(nearest["paired_images"])) == (1, 16, 1)


@pytest.mark.parametrize("name", ["independent", "assignment", "nearest", "flipped_assignment"])
@pytest.mark.parametrize("offset", [0.0, 0.3])
def test_target_and_noisy_image_hold_the_same_noise(name, offset):
    """A network that inverts x_t exactly must have no loss; with the unpaired noise as its target it would."""
    x0, draws = images(1, batch=16)[0], Draws(SEED, 0, 0, CPU)
    loss = objective(coupling=build_coupling(name), noise_offset=offset)
    xt, time, _, _ = record(loss, x0, draws)
    process = loss.process
    inverted = (xt - process.signal[time].view(-1, 1, 1, 1) * x0) / process.noise[time].view(-1, 1, 1, 1)
    _, _, losses, _ = record(loss, x0, draws, sample=inverted)
    assert float(losses.max()) < 1e-6


def test_offset_follows_the_coupling_and_perturbation_is_in_the_noisy_image_alone():
    x0, draws = images(1, batch=16)[0], Draws(SEED, 0, 0, CPU)
    coupling = AssignmentCoupling()
    pool = draws.normal("noise", *x0.shape)
    paired = coupling(x0, pool)
    offset = paired + 0.3 * draws.normal("noise_offset", 16, 3, 1, 1)
    perturbed = offset + 0.2 * draws.normal("input_perturbation", *x0.shape)
    loss = objective(coupling=coupling, noise_offset=0.3, input_perturbation=0.2)
    xt, time, losses, statistics = record(loss, x0, draws, sample=offset)
    assert torch.equal(xt, loss.process.add_noise(x0, perturbed, time))
    assert torch.equal(losses, torch.zeros(16))  # the target is the offset noise, without the perturbation
    assert float(statistics["pair_distance"]) == pytest.approx(float((x0 - paired).flatten(1).norm(dim=1).mean()))


def test_coupling_begins_at_its_step():
    x0, loss = images(1, batch=16)[0], objective(coupling=AssignmentCoupling(), coupling_start_step=4)
    assert torch.equal(record(loss, x0, Draws(SEED, 3, 0, CPU))[0], record(objective(), x0, Draws(SEED, 3, 0, CPU))[0])
    assert not torch.equal(record(loss, x0, Draws(SEED, 4, 0, CPU))[0], record(objective(), x0, Draws(SEED, 4, 0, CPU))[0])
    assert float(record(loss, x0, Draws(SEED, 3, 0, CPU))[3]["paired_images"]) == 1


def test_the_coupling_sees_the_scaled_image():
    seen = []

    class Watch(AssignmentCoupling):
        def __call__(self, x0, noise=None, **options):
            seen.append(x0)
            return super().__call__(x0, noise, **options)

    x0 = images(1)[0]
    record(objective(coupling=Watch(), image_scale=2.0), x0, Draws(SEED, 0, 0, CPU))
    assert torch.equal(seen[0], 2 * x0)


def test_weighted_mse_is_one_number_per_image_in_fp32():
    output, target, weights = torch.randn(4, 3, 2, 2).half(), torch.randn(4, 3, 2, 2), torch.tensor([0.0, 1.0, 2.0, 0.5])
    losses = weighted_mse(output, target, weights)
    assert losses.dtype == torch.float32
    expected = weights.double() * (output.double() - target.double()).square().flatten(1).mean(1)
    assert torch.allclose(losses.double(), expected, rtol=1e-6)


def test_two_micro_batches_are_one_batch(accelerator):
    from accelerate import Accelerator
    from accelerate.state import GradientState

    batches = images(3, batch=16)
    whole = run(accelerator, tiny_unet(), objective(), batches, 3)
    GradientState._reset_state()
    accumulating = Accelerator(cpu=True, gradient_accumulation_steps=2)
    halves = run(accumulating, tiny_unet(), objective(), [half for batch in batches for half in batch.split(8)], 3)
    for one, two in zip(whole, halves, strict=True):
        assert two.metrics["loss"] == pytest.approx(one.metrics["loss"], rel=1e-4)
        assert two.metrics["grad_norm"] == pytest.approx(one.metrics["grad_norm"], rel=1e-3)


def test_average_follows_the_update_and_the_rate_is_a_function_of_the_step(accelerator):
    from diffusers.training_utils import EMAModel

    unet = tiny_unet()
    ema = EMAModel(unet.parameters(), decay=0.5, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
    rates = [1e-3, 5e-4, 0.0]
    stats = run(accelerator, unet, objective(), images(3), 3, ema=ema, rate=rates.__getitem__)
    assert [row.metrics["learning_rate"] for row in stats] == rates
    assert [row.step for row in stats] == [1, 2, 3]
    assert ema.optimization_step == 3


def test_nan_stops_before_the_weights_change(accelerator):
    unet = tiny_unet()
    before = [parameter.clone() for parameter in unet.parameters()]
    batches = images(1)
    batches[0][0, 0, 0, 0] = float("nan")
    with pytest.raises(UserError, match="loss is nan at step 1") as caught:
        run(accelerator, unet, objective(), batches, 1)
    assert caught.value.exit_code == 1
    assert all(torch.equal(a, b) for a, b in zip(before, unet.parameters(), strict=True))


def test_golden_losses(accelerator):
    """Five steps of everything on at once; a change here changes what users train."""
    unet = tiny_unet(dropout=0.1)
    loss = objective("v_prediction", "change_aware", AssignmentCoupling(), "asymmetric", noise_offset=0.1)
    losses = [row.metrics["loss"] for row in run(accelerator, unet, loss, images(5), 5)]
    assert losses == pytest.approx(GOLDEN, rel=1e-4)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_looking_ahead_changes_no_bit(accelerator, accumulation):
    from accelerate import Accelerator
    from accelerate.state import GradientState

    finals = []
    for ahead in (False, True):
        GradientState._reset_state()
        unet = tiny_unet(dropout=0.1)
        loss = objective(coupling=AssignmentCoupling(), law="asymmetric")
        run(Accelerator(cpu=True, gradient_accumulation_steps=accumulation), unet, loss, images(4 * accumulation), 4, ahead=ahead)
        finals.append([parameter.detach().clone() for parameter in unet.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*finals, strict=True))


def test_looking_ahead_passes_errors_on_and_leaves_no_thread(accelerator):
    import threading

    def two_then_bad():
        yield from map(Images, images(2))
        raise UserError("cannot read image x.png")

    unet, stop = tiny_unet(), StopRequest()
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-3)
    steps = train(
        accelerator,
        unet,
        optimizer,
        objective(),
        two_then_bad(),
        PixelEncoder(CPU),
        batch_size=8,
        seed=SEED,
        start_step=0,
        max_steps=5,
        learning_rate=lambda step: 1e-3,
        max_grad_norm=1.0,
        ema=None,
        stop=stop,
        ahead=True,
    )
    assert [row.step for row in steps] == [1, 2]
    assert stop.error == "cannot read image x.png"
    early = train(
        accelerator,
        unet,
        optimizer,
        objective(),
        map(Images, images(5)),
        PixelEncoder(CPU),
        batch_size=8,
        seed=SEED,
        start_step=0,
        max_steps=5,
        learning_rate=lambda step: 1e-3,
        max_grad_norm=1.0,
        ema=None,
        stop=StopRequest(),
        ahead=True,
    )
    next(early)
    early.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("look-ahead")]


def test_a_step_says_how_good_its_assignment_is(accelerator):
    kept = {}
    for solver in ("exact", "auction"):
        (stats,) = run(accelerator, tiny_unet(), objective(coupling=AssignmentCoupling(solver=solver)), images(1, batch=64), 1)
        kept[solver] = stats.metrics["assignment_kept"]
        assert stats.metrics["assignment_relaxations"] == 0 and (stats.metrics["assignment_bids_per_row"] > 0) == (solver == "auction")
    assert kept["exact"] == 1 and 0.9 < kept["auction"] <= 1
    (plain,) = run(accelerator, tiny_unet(), objective(), images(1), 1)
    assert "assignment_kept" not in plain.metrics
