"""The adapters for other trainers, against stand-ins with the signatures of the functions that they meet (stand_ins.py says which)."""

import runpy
import sys
from types import SimpleNamespace

import pytest
import stand_ins
import torch
from launch import ROOT

import immiscible
from immiscible.adapters import OTPlanSampler

FOLDER = ROOT / "integrations"
ADAPTERS = sorted(FOLDER.glob("*.py"))
IMAGES, VIDEOS = (24, 4, 6, 6), (6, 4, 3, 4, 4)


@pytest.fixture(autouse=True)
def adapters(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    torch.manual_seed(0)


def latents(*shape, dtype=torch.float32):
    """Far from each other, so that a permutation other than the identity is the nearest."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(7)).mul(2).to(dtype)


def drawn(*shape, dtype=torch.float32, seed=3):
    """What is drawn first after ``seed``; the adapters draw nothing by themselves with an assignment."""
    torch.manual_seed(seed)
    noise = torch.randn_like(torch.empty(shape, dtype=dtype))
    torch.manual_seed(seed)
    return noise


def is_assignment(noise, given, x0):
    """Whether it is what was drawn, in the order of least cost, in its own dtype on its own device."""
    expected = immiscible.AssignmentCoupling()(x0.to(given.dtype), given)
    assert not torch.equal(expected, given)
    return noise.dtype == given.dtype and noise.device == given.device and torch.equal(noise, expected)


@pytest.mark.parametrize("path", ADAPTERS, ids=lambda path: path.stem)
def test_each_is_short_and_has_its_place_on_the_page(path):
    assert len(path.read_text().splitlines()) < 60
    assert path.name in (FOLDER / "README.md").read_text() or path.stem == "immiscible_draws"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sd_scripts_diffusion(monkeypatch, dtype):
    module, scheduler = stand_ins.sd_scripts(monkeypatch), stand_ins.Scheduler()
    import immiscible_sd_scripts

    immiscible_sd_scripts.install(immiscible.AssignmentCoupling())
    x0, noise, args = latents(*IMAGES, dtype=dtype), drawn(*IMAGES, dtype=dtype), SimpleNamespace(ip_noise_gamma=None)
    paired, noisy, timesteps = module.get_noise_noisy_latents_and_timesteps(args, scheduler, x0)
    assert is_assignment(paired, noise, x0)
    assert torch.equal(noisy, scheduler.add_noise(x0, paired, timesteps)) and noisy.dtype == dtype
    with pytest.raises(immiscible.UserError, match="ip_noise_gamma"):
        module.get_noise_noisy_latents_and_timesteps(SimpleNamespace(ip_noise_gamma=0.1), scheduler, x0)


@pytest.mark.parametrize(("name", "scheduler"), [("flux_train_utils", [None]), ("sd3_train_utils", []), ("lumina_train_util", [None])])
def test_sd_scripts_flows_learn_the_noise_that_was_added(monkeypatch, name, scheduler):
    stand_ins.sd_scripts(monkeypatch)
    import immiscible_sd_scripts

    immiscible_sd_scripts.install(immiscible.AssignmentCoupling())
    x0, given = latents(*IMAGES), drawn(*IMAGES)
    noise = torch.randn_like(x0)  # the script's line, and what follows it
    noisy, _, sigmas = sys.modules[f"library.{name}"].get_noisy_model_input_and_timesteps(None, *scheduler, x0, noise, "cpu", x0.dtype)
    target = noise - x0
    assert is_assignment(noise, given, x0)
    torch.testing.assert_close(noisy, x0 + sigmas * target)


@pytest.mark.parametrize("shape", [IMAGES, VIDEOS])
def test_musubi_tuner(monkeypatch, shape):
    class Trainer(stand_ins.NetworkTrainer):
        """Each model has one of its own."""

    monkeypatch.setattr(stand_ins.NetworkTrainer, "process_batch", stand_ins.NetworkTrainer.process_batch)
    stand_ins.put(monkeypatch, "musubi_tuner.training.trainer_base", NetworkTrainer=stand_ins.NetworkTrainer)
    import immiscible_musubi_tuner

    immiscible_musubi_tuner.install(immiscible.AssignmentCoupling())
    x0, given = latents(*shape, dtype=torch.bfloat16), drawn(*shape, dtype=torch.bfloat16)
    step = Trainer().step(x0)
    assert is_assignment(step["noise"], given, x0)
    assert torch.equal(step["target"], step["noise"] - x0) and torch.equal(step["noisy"], stand_ins.flow_input(x0, step["noise"])[0])


def onetrainer(monkeypatch, coupling):
    monkeypatch.setattr(stand_ins.ModelSetupNoiseMixin, "_create_noise", stand_ins.ModelSetupNoiseMixin._create_noise)
    name = "modules.modelSetup.mixin.ModelSetupNoiseMixin"
    stand_ins.put(monkeypatch, name, ModelSetupNoiseMixin=stand_ins.ModelSetupNoiseMixin)
    original = stand_ins.ModelSetupNoiseMixin._create_noise
    import immiscible_onetrainer

    immiscible_onetrainer.install(coupling)
    return original, stand_ins.ModelSetupNoiseMixin()


def config(offset=0.0, perturbation=0.0):
    return SimpleNamespace(train_device=torch.device("cpu"), offset_noise_weight=offset, perturbation_noise_weight=perturbation)


def test_onetrainer_pairs_what_is_drawn_and_leaves_what_is_added_with_its_image(monkeypatch):
    original, setup = onetrainer(monkeypatch, immiscible.AssignmentCoupling())
    x0, t = latents(*IMAGES), torch.arange(24)
    plain = original(setup, x0, config(), torch.Generator().manual_seed(5))
    noise = setup._create_noise(x0, config(), torch.Generator().manual_seed(5), t)
    assert is_assignment(noise, plain, x0)
    added = original(setup, x0, config(0.1, 0.2), torch.Generator().manual_seed(5)) - plain
    generator = torch.Generator().manual_seed(5)
    torch.testing.assert_close(setup._create_noise(x0, config(0.1, 0.2), generator, t), noise + added)
    same = torch.Generator().manual_seed(5)
    original(setup, x0, config(0.1, 0.2), same)
    assert torch.equal(generator.get_state(), same.get_state())  # what the trainer draws next stays as it was


def test_ai_toolkit(monkeypatch):
    process = stand_ins.BaseSDTrainProcess
    monkeypatch.setattr(process, "get_noise", process.get_noise)
    stand_ins.put(monkeypatch, "jobs.process.BaseSDTrainProcess", BaseSDTrainProcess=process)
    import immiscible_ai_toolkit

    immiscible_ai_toolkit.install(immiscible.AssignmentCoupling())
    x0, given = latents(*IMAGES, dtype=torch.bfloat16), drawn(*IMAGES)
    assert is_assignment(process().process_general_training_batch(x0, torch.arange(24)), given, x0)
    for chosen in ({"optimal_noise_pairing_samples": 4}, {"force_consistent_noise": True}):
        with pytest.raises(immiscible.UserError, match=next(iter(chosen))):
            process(**chosen).get_noise(x0, 24)


def simpletuner(monkeypatch, coupling):
    foundation = stand_ins.ModelFoundation
    monkeypatch.setattr(foundation, "prepare_batch", foundation.prepare_batch)
    types = SimpleNamespace(FLOW_MATCHING="flow", EPSILON="epsilon")
    stand_ins.put(monkeypatch, "simpletuner.helpers.models.common", ModelFoundation=foundation, PredictionTypes=types)
    import immiscible_simpletuner

    immiscible_simpletuner.install(coupling)
    return foundation


@pytest.mark.parametrize("kind", ["flow", "epsilon"])
@pytest.mark.parametrize("perturbation", [0.0, 0.1])
def test_simpletuner(monkeypatch, kind, perturbation):
    model = simpletuner(monkeypatch, immiscible.AssignmentCoupling())(kind, perturbation)
    x0, given = latents(*IMAGES), drawn(*IMAGES)
    batch = model.prepare_batch({"latent_batch": x0}, {})
    assert is_assignment(batch["noise"], given, x0)
    torch.manual_seed(3)
    torch.randn_like(x0)
    added = perturbation * torch.randn_like(x0) if perturbation else torch.zeros_like(x0)
    torch.testing.assert_close(batch["input_noise"], batch["noise"] + added)
    if kind == "flow":
        expected = stand_ins.flow_input(x0, batch["input_noise"])[0]
    else:
        expected = model.noise_schedule.add_noise(x0, batch["input_noise"], batch["timesteps"])
    assert torch.equal(batch["noisy_latents"], expected) and torch.equal(batch["conditions"], expected)
    assert not {"sample_flow_sigmas", "prepare_batch_conditions"} & vars(model).keys()
    model.diffusion_blocks_controller = object()
    with pytest.raises(immiscible.UserError, match="DiffusionBlocks"):
        model.prepare_batch({"latent_batch": x0}, {})


def test_sr_dit(monkeypatch):
    loss = stand_ins.module_of(monkeypatch, "loss", stand_ins.SR_DIT)
    import immiscible_sr_dit

    immiscible_sr_dit.install(immiscible.AssignmentCoupling())
    x0, token, t = latents(*IMAGES), torch.zeros(24, 8), torch.full((24, 1, 1, 1), 0.25)
    given = drawn(*IMAGES)
    noisy, target, noises, noises_cls = loss.SILoss()(None, x0, cls_token=token, time_input=t)
    assert is_assignment(noises, given, x0) and torch.equal(target, noises - x0)
    torch.testing.assert_close(noisy, x0 + 0.25 * target)
    torch.manual_seed(3)
    torch.randn_like(x0)
    assert torch.equal(noises_cls, torch.randn_like(token))


def test_torchcfm_by_its_own_matchers():
    torchcfm = pytest.importorskip("torchcfm")
    import immiscible_torchcfm

    matcher = torchcfm.ExactOptimalTransportConditionalFlowMatcher(sigma=0.0)
    immiscible_torchcfm.install(matcher, immiscible.AssignmentCoupling())
    x1, x0 = latents(*IMAGES), drawn(*IMAGES)
    t, xt, ut = matcher.sample_location_and_conditional_flow(x0, x1)
    torch.testing.assert_close(xt + (1 - t.view(-1, 1, 1, 1)) * ut, x1, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(x1 - ut, immiscible.AssignmentCoupling()(x1, x0), atol=1e-5, rtol=1e-5)
    with pytest.raises(immiscible.UserError, match="pairs nothing"):
        immiscible_torchcfm.install(torchcfm.ConditionalFlowMatcher(sigma=0.0), immiscible.AssignmentCoupling())


def test_torchcfm_pairs_inside_classes():
    import immiscible_torchcfm

    matcher = SimpleNamespace(ot_sampler=OTPlanSampler())
    immiscible_torchcfm.install(matcher, immiscible.AssignmentCoupling(condition="within"))
    x1, x0, y1 = latents(*IMAGES), drawn(*IMAGES), torch.arange(24) % 3
    paired, data, y0, labels = matcher.ot_sampler.sample_plan_with_labels(x0, x1, y1=y1)
    assert torch.equal(paired, immiscible.AssignmentCoupling(condition="within")(x1, x0, labels=y1))
    assert data is x1 and y0 is None and labels is y1
    with pytest.raises(immiscible.UserError, match="y0 labels noises"):
        matcher.ot_sampler.sample_plan_with_labels(x0, x1, y0=y1, y1=y1)


def test_denoising_diffusion_pytorch(monkeypatch):
    module = stand_ins.module_of(monkeypatch, "lucidrains_stand_in", stand_ins.LUCIDRAINS)
    import immiscible_denoising_diffusion

    x0, classes = latents(*IMAGES), torch.arange(24) % 3
    with_classes, edm = module.WithClasses(), module.ElucidatedDiffusion()
    immiscible_denoising_diffusion.install(with_classes, immiscible.AssignmentCoupling(condition="within"))
    given = drawn(*IMAGES)
    expected = immiscible.AssignmentCoupling(condition="within")(x0, given, labels=classes)
    assert torch.equal(with_classes.forward(x0, classes=classes), expected)
    immiscible_denoising_diffusion.install(edm, immiscible.AssignmentCoupling())
    given = drawn(*IMAGES)
    noised, noise = edm.forward(x0)
    assert is_assignment(noise, given, x0) and torch.equal(noised, x0 + 2 * noise)


@pytest.mark.parametrize("coupling", [immiscible.ReservoirCoupling(64), immiscible.NearestCoupling(64)], ids=["reservoir", "nearest"])
def test_a_batch_of_one_gets_a_nearer_noise(monkeypatch, coupling):
    original, setup = onetrainer(monkeypatch, coupling)
    x0 = latents(40, *IMAGES[1:])
    plain, near = ([], [])
    for number, image in enumerate(x0.split(1)):
        for create, found in ((original.__get__(setup), plain), (setup._create_noise, near)):
            found.append(create(image, config(), torch.Generator().manual_seed(number)))
    assert all(noise.shape == (1, *IMAGES[1:]) for noise in near)
    along = [(x0.flatten(1) * torch.cat(noise).flatten(1)).sum(1).mean() for noise in (plain, near)]
    assert along[1] > along[0] + x0.flatten(1).norm(dim=1).mean()  # by more than a standard deviation


def test_the_launcher_installs_and_runs_the_script_with_its_own_words(monkeypatch, tmp_path):
    monkeypatch.setattr(stand_ins.ModelSetupNoiseMixin, "_create_noise", stand_ins.ModelSetupNoiseMixin._create_noise)
    name = "modules.modelSetup.mixin.ModelSetupNoiseMixin"
    stand_ins.put(monkeypatch, name, ModelSetupNoiseMixin=stand_ins.ModelSetupNoiseMixin)
    (tmp_path / "beside.py").write_text("VALUE = 7\n")
    (tmp_path / "train.py").write_text(
        "import sys\nfrom pathlib import Path\n\nfrom beside import VALUE\n\n"
        "if __name__ == '__main__':\n    Path(sys.argv[2]).write_text(f'{sys.argv[1]} {VALUE}')\n"
    )
    words = ["coupled.py", "onetrainer", "reservoir:size=8", str(tmp_path / "train.py"), "--flag", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = stand_ins.ModelSetupNoiseMixin._create_noise
    runpy.run_path(str(FOLDER / "coupled.py"), run_name="__main__")
    assert (tmp_path / "out").read_text() == "--flag 7" and stand_ins.ModelSetupNoiseMixin._create_noise is not before
    launcher = runpy.run_path(str(FOLDER / "coupled.py"))
    assert repr(launcher["build"]("reservoir:size=8")) == "ReservoirCoupling(size=8)"
    assert launcher["build"]("nearest:candidates=4,score=dot") == immiscible.NearestCoupling(4, "dot")
    with pytest.raises(SystemExit, match="trainers: ai_toolkit, denoising_diffusion"):
        launcher["main"](["onetrainer"])
