import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

from immiscible import weighting
from immiscible.errors import UserError
from immiscible.process import PREDICTION_TYPES, as_process
from immiscible.schedulers import build_scheduler
from immiscible.weighting import LOSS_WEIGHTINGS, from_epsilon, loss_weights

LINEAR = as_process(DDPMScheduler())
FLOW = as_process(FlowMatchEulerDiscreteScheduler())
NO_SIGNAL = as_process(DDPMScheduler(rescale_betas_zero_snr=True))  # SNR 0 at the last step
PROCESSES = {"linear": LINEAR, "flow": FLOW, "no_signal": NO_SIGNAL}
CASES = [(which, name) for which, process in PROCESSES.items() for name in PREDICTION_TYPES[process.kind]]
AT = [0, 50, 100, 200, 300, 500, 700, 999]


@pytest.mark.parametrize("which, prediction_type", CASES)
@pytest.mark.parametrize("name", list(LOSS_WEIGHTINGS))
def test_weights_are_finite_vectors(name, which, prediction_type):
    unbounded = ("debiased", "cosmap", "cosmap_image", "sigma_sqrt", "image", "edm")
    if which == "no_signal" and prediction_type == "epsilon" and name in unbounded:
        return  # refused: tests/test_equations.py
    weights = loss_weights(name, PROCESSES[which], prediction_type).vector
    assert weights.dtype == torch.float64 and weights.shape == (1000,)
    assert weights.isfinite().all() and (weights >= 0).all() and weights.max() > 0


@pytest.mark.parametrize("which, prediction_type", CASES)
def test_none_is_one_whatever_is_predicted(which, prediction_type):
    assert torch.equal(loss_weights("none", PROCESSES[which], prediction_type).vector, torch.ones(1000, dtype=torch.float64))


@pytest.mark.parametrize(
    "strength, expected",
    [
        (0.5, [0.5] * 8),
        (0.6, [0.408786, 0.479127, 0.538903, 0.598593, 0.577396, 0.458032, 0.407112, 0.4]),
        (0.8, [0.226358, 0.437381, 0.616709, 0.795780, 0.732189, 0.374095, 0.221335, 0.2]),
        (1.0, [0.043930, 0.395635, 0.694516, 0.992966, 0.886982, 0.290159, 0.035558, 0.0]),
    ],
)
def test_change_aware_golden_values(strength, expected):
    weights = loss_weights("change_aware", LINEAR, "epsilon", change_aware_lambda=strength).vector
    assert weights[AT].tolist() == pytest.approx(expected, abs=1e-6)
    assert float(weights.max()) == pytest.approx(strength) and float(weights.min()) == pytest.approx(1 - strength)

    released = loss_weights("change_aware_released", LINEAR, "epsilon", change_aware_lambda=strength).vector
    assert torch.equal(released[:700], weights[:700])
    assert (released[700:] == 1).all()


def test_change_aware_golden_mean_and_border():
    weights = loss_weights("change_aware", LINEAR, "epsilon").vector
    assert float(weights.mean()) == pytest.approx(0.4737, abs=5e-5)
    assert float(weights[699]) == pytest.approx(0.4072, abs=5e-5)
    released = loss_weights("change_aware_released", LINEAR, "epsilon").vector
    assert float(released[700:].sum() / released.sum()) == pytest.approx(0.459, abs=5e-4)


@pytest.mark.parametrize(
    "schedule, peak",
    [
        ({"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}, 313),
        ({"beta_schedule": "squaredcos_cap_v2"}, 495),
        ({"beta_schedule": "scaled_linear"}, 411),
    ],
)
def test_change_aware_peaks_where_the_process_changes_fastest(schedule, peak):
    weights = loss_weights("change_aware", DDPMScheduler(**schedule), "epsilon").vector
    assert int(weights.argmax()) == peak and int(weights.argmin()) == 999
    assert float(weights[peak]) == pytest.approx(0.6) and float(weights[999]) == pytest.approx(0.4)


def test_change_aware_released_takes_tau():
    released = loss_weights("change_aware_released", LINEAR, "epsilon", asymmetric_tau=476).vector
    assert released[475] < 0.6 and (released[476:] == 1).all()
    under_v = loss_weights("change_aware_released", LINEAR, "v_prediction").vector
    torch.testing.assert_close(under_v[700:], LINEAR.alpha_bar[700:])


@pytest.mark.parametrize("which", list(PROCESSES))
@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_in_every_form(which, gamma):
    process = PROCESSES[which]
    ratio = process.snr
    capped = ratio.clamp(max=gamma)
    expected = {"sample": capped, "v_prediction": capped / (ratio + 1), "flow_prediction": capped * process.noise.double() ** 2}
    expected["epsilon"] = torch.where(ratio > 0, capped / ratio, 1.0)
    for prediction_type in PREDICTION_TYPES[process.kind]:
        weights = loss_weights("min_snr", process, prediction_type, snr_gamma=gamma).vector
        torch.testing.assert_close(weights, expected[prediction_type], rtol=1e-6, atol=1e-12)


def test_min_snr_golden_values():
    weights = loss_weights("min_snr", LINEAR, "epsilon").vector
    assert (weights[130:] == 1).all() and weights[129] < 1
    assert float(loss_weights("min_snr", NO_SIGNAL, "epsilon").vector[-1]) == 1


def test_snr_is_diffusers_weight_for_sample():
    scheduler = DDPMScheduler()
    in_the_example = scheduler.alphas_cumprod / (1 - scheduler.alphas_cumprod)
    assert torch.equal(loss_weights("snr", scheduler, "sample").vector, in_the_example.double())
    assert torch.equal(loss_weights("snr", scheduler, "epsilon").vector, torch.ones(1000, dtype=torch.float64))
    torch.testing.assert_close(loss_weights("snr", scheduler, "v_prediction").vector, LINEAR.snr / (LINEAR.snr + 1))
    torch.testing.assert_close(loss_weights("snr", FLOW, "flow_prediction").vector, (1 - FLOW.noise.double()) ** 2, atol=1e-7, rtol=1e-6)


def test_p2():
    torch.testing.assert_close(loss_weights("p2", LINEAR, "epsilon").vector, 1 - LINEAR.alpha_bar)
    halved = loss_weights("p2", LINEAR, "epsilon", p2_k=2.0, p2_gamma=0.5).vector
    torch.testing.assert_close(halved, 1 / (2 + LINEAR.snr).sqrt())
    assert loss_weights("p2", LINEAR, "epsilon", p2_k=0.0).vector.isfinite().all()


def test_velocity():
    """What v-prediction's plain loss weighs by, up to the cap."""
    uncapped = loss_weights("velocity", LINEAR, "v_prediction", velocity_cap=1e6).vector
    torch.testing.assert_close(uncapped, torch.ones(1000, dtype=torch.float64))
    weights = loss_weights("velocity", LINEAR, "epsilon").vector
    below = LINEAR.alpha_bar > 0.1
    torch.testing.assert_close(weights[below], 1 / LINEAR.alpha_bar[below])
    assert 0 < int((~below).sum()) < 1000 and bool((weights[~below] == 10).all())
    assert float(loss_weights("velocity", NO_SIGNAL, "epsilon").vector[-1]) == 10


@pytest.mark.parametrize("name", [name for name in LOSS_WEIGHTINGS if name != "none"])
@pytest.mark.parametrize("kind, prediction_type", [(kind, name) for kind, names in PREDICTION_TYPES.items() for name in names])
def test_an_error_costs_the_same_whatever_is_predicted(name, kind, prediction_type):
    """Outputs off by random errors; each one's error of the noise is measured through the x0 that it stands for."""
    process = as_process(build_scheduler(kind))
    t = torch.arange(10, 999, 23)
    x0, noise, error = torch.randn(3, len(t), 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).unbind()
    signal, sigma = (vector[t].double()[:, None] for vector in (process.signal, process.noise))
    xt = signal * x0 + sigma * noise
    target = {"epsilon": noise, "sample": x0, "v_prediction": signal * noise - sigma * x0, "flow_prediction": noise - x0}[prediction_type]
    output = target + error
    wrong_x0 = {
        "epsilon": (xt - sigma * output) / signal,
        "sample": output,
        "v_prediction": signal * xt - sigma * output,
        "flow_prediction": xt - sigma * output,
    }[prediction_type]
    epsilon_mse = ((xt - signal * wrong_x0) / sigma - noise).square().mean(1)
    epsilon_weights = LOSS_WEIGHTINGS[name](LINEAR if kind == "ddpm" else process, "epsilon" if kind == "ddpm" else prediction_type)
    if kind == "flow":  # which has no epsilon form of its own: undo the conversion
        epsilon_weights = epsilon_weights / process.signal.double() ** 2
    cost = loss_weights(name, process, prediction_type).vector[t] * error.square().mean(1)
    # fp32 coefficients: near t = 0 the noise's share is known to three digits only
    torch.testing.assert_close(cost, epsilon_weights[t] * epsilon_mse, rtol=2e-3, atol=0)


def test_from_epsilon_on_flow_by_the_slope_of_the_noise():
    """A change of the flow moves the noise that it stands for, n = xt + (1 - sigma) f, by the signal's coefficient."""
    ones = torch.ones(1000, dtype=torch.float64)
    flow = torch.zeros(1000, dtype=torch.float64, requires_grad=True)
    sigma = FLOW.noise.double()
    x0 = 1.0 - sigma * flow  # xt = 1
    ((1.0 - (1 - sigma) * x0) / sigma).sum().backward()
    torch.testing.assert_close(from_epsilon(ones, FLOW, "flow_prediction"), flow.grad**2, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    "name, process, options, named",
    [
        ("min-snr", LINEAR, {}, r"loss_weights\('min-snr'\) is unknown; known: none, change_aware"),
        ("change_aware", LINEAR, {"change_aware_lambda": 5.0}, "`change_aware_lambda`"),
        ("change_aware", LINEAR, {"change_aware_lambda": 0.4}, "`change_aware_lambda`"),
        ("change_aware_released", LINEAR, {"change_aware_lambda": 5.0}, "`change_aware_lambda`"),
        ("change_aware_released", LINEAR, {"asymmetric_tau": 1001}, "`asymmetric_tau`"),
        ("min_snr", LINEAR, {"snr_gamma": 0.0}, "`snr_gamma`"),
        ("p2", LINEAR, {"p2_k": -1.0}, "`p2_k`"),
        ("p2", LINEAR, {"p2_gamma": -1.0}, "`p2_gamma`"),
        ("p2", NO_SIGNAL, {"p2_k": 0.0}, "`p2_k`"),
        ("velocity", LINEAR, {"velocity_cap": 0.5}, "`velocity_cap`"),
        ("soft_min_snr", LINEAR, {"snr_gamma": 0.0}, "`snr_gamma`"),
        ("debiased", LINEAR, {"debiased_cap": 0.0}, "`debiased_cap`"),
        ("edm", LINEAR, {"edm_sigma_data": 0.0}, "`edm_sigma_data`"),
    ],
)
def test_wrong_options_are_refused(name, process, options, named):
    with pytest.raises(UserError, match=named):
        loss_weights(name, process, "epsilon", **options)


def test_processes_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="`asymmetric_tau`"):
        loss_weights("change_aware_released", build_scheduler("ddpm", num_train_timesteps=100), "epsilon")
    with pytest.raises(UserError, match=r"loss_weights\('change_aware'\) needs"):
        loss_weights("change_aware", build_scheduler("ddpm", num_train_timesteps=1), "epsilon")
    for name in LOSS_WEIGHTINGS:
        with pytest.raises(UserError, match="`prediction_type`"):
            loss_weights(name, FLOW, "epsilon")


def test_a_new_weighting_is_one_function_and_one_entry(monkeypatch):
    def power(process, prediction_type, *, exponent=1.0):
        return from_epsilon(process.snr**exponent, process, prediction_type)

    monkeypatch.setitem(weighting.LOSS_WEIGHTINGS, "power", power)
    weights = loss_weights("power", DDPMScheduler(), "sample", exponent=-1.0).vector
    torch.testing.assert_close(weights, torch.ones(1000, dtype=torch.float64))
