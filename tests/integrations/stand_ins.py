"""Stand-ins for other trainers' code: the signatures and the order of draws of the functions that the adapters meet, in our own words."""

import sys
from types import ModuleType, SimpleNamespace

import torch


def put(monkeypatch, name, **contents):
    """A module called ``name``, with its packages."""
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        each = ".".join(parts[:end])
        if each not in sys.modules:
            monkeypatch.setitem(sys.modules, each, ModuleType(each))
    for key, value in contents.items():
        setattr(sys.modules[name], key, value)
    return sys.modules[name]


def module_of(monkeypatch, name, source):
    """A module of this source, whose functions look up its names as an imported file's do."""
    module = put(monkeypatch, name)
    exec(source, module.__dict__)
    return module


class Scheduler:
    """The methods of diffusers' DDPMScheduler that are called."""

    def __init__(self):
        self.alphas_cumprod = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)

    def add_noise(self, latents, noise, timesteps):
        alpha = self.alphas_cumprod[timesteps].to(latents).view(-1, *[1] * (latents.ndim - 1))
        return alpha.sqrt() * latents + (1 - alpha).sqrt() * noise


def flow_input(latents, noise):
    """At half time."""
    sigmas = torch.full((len(latents), *[1] * (latents.ndim - 1)), 0.5, dtype=latents.dtype)
    return (1 - sigmas) * latents + sigmas * noise, 1000 * sigmas.flatten(), sigmas


# kohya-ss/sd-scripts at 48d368f: library/train_util.py:6071, library/flux_train_utils.py:471, library/sd3_train_utils.py:918,
# library/lumina_train_util.py:807; the step of flux_train_network.py:310-331 and sd3_train_network.py:329-333


def sd_scripts(monkeypatch):
    def get_noise_noisy_latents_and_timesteps(args, noise_scheduler, latents):
        noise = torch.randn_like(latents, device=latents.device)
        timesteps = torch.randint(0, 1000, (len(latents),), device="cpu")
        return noise, noise_scheduler.add_noise(latents, noise, timesteps), timesteps

    def with_scheduler(args, noise_scheduler, latents, noise, device, dtype):
        return flow_input(latents, noise)

    def without_scheduler(args, latents, noise, device, dtype):
        return flow_input(latents, noise)

    for name, function in {
        "flux_train_utils": with_scheduler,
        "sd3_train_utils": without_scheduler,
        "lumina_train_util": with_scheduler,
    }.items():
        put(monkeypatch, f"library.{name}", get_noisy_model_input_and_timesteps=function)
    return put(monkeypatch, "library.train_util", get_noise_noisy_latents_and_timesteps=get_noise_noisy_latents_and_timesteps)


# kohya-ss/musubi-tuner at 30c658c: src/musubi_tuner/training/trainer_base.py:1122 and 2039-2041


class NetworkTrainer:
    def process_batch(
        self, args, accelerator, transformer, network, batch, latents, noise, noise_scheduler, dit_dtype, network_dtype, vae, global_step
    ):
        noisy = flow_input(latents, noise)[0]
        return {"noisy": noisy, "noise": noise, "target": noise - latents}, {}

    def step(self, latents):
        noise = torch.randn_like(latents)
        return self.process_batch(None, None, None, None, {}, latents, noise, None, None, None, None, 0)[0]


# Nerogar/OneTrainer at 23df383: modules/modelSetup/mixin/ModelSetupNoiseMixin.py:78


class ModelSetupNoiseMixin:
    def _create_noise(self, source_tensor, config, generator, timestep=None, betas=None):
        options = {"generator": generator, "device": config.train_device, "dtype": source_tensor.dtype}
        noise = torch.randn(source_tensor.shape, **options)
        if config.offset_noise_weight > 0:
            offset = torch.randn((*source_tensor.shape[:2], *[1] * (source_tensor.ndim - 2)), **options)
            noise = noise + config.offset_noise_weight * offset
        if config.perturbation_noise_weight > 0:
            noise = noise + config.perturbation_noise_weight * torch.randn(source_tensor.shape, **options)
        return noise


# ostris/ai-toolkit at 27a03a9: jobs/process/BaseSDTrainProcess.py:999 and 1327


class BaseSDTrainProcess:
    def __init__(self, **config):
        self.train_config = SimpleNamespace(**{"optimal_noise_pairing_samples": 1, "force_consistent_noise": False, **config})

    def get_noise(self, latents, batch_size, dtype=torch.float32, batch=None, timestep=None):
        return torch.randn(batch_size, *latents.shape[1:], dtype=dtype)

    def process_general_training_batch(self, latents, timesteps):
        return self.get_noise(latents, len(latents), dtype=torch.float32, batch=None, timestep=timesteps)


# bghira/SimpleTuner at bc8e6ab: simpletuner/helpers/models/common.py:5862-6035


class ModelFoundation:
    PREDICTION_TYPE = "flow"

    def __init__(self, kind, perturbation=0.0):
        self.PREDICTION_TYPE = kind
        self.config = SimpleNamespace(input_perturbation=perturbation)
        self.diffusion_blocks_controller, self.noise_schedule = None, Scheduler()

    def sample_flow_sigmas(self, batch, state):
        sigmas = torch.full((len(batch["latents"]),), 0.5)
        return sigmas, 1000 * sigmas

    def prepare_batch_conditions(self, batch, state):
        batch["conditions"] = batch["noisy_latents"].clone()
        return batch

    def prepare_batch(self, batch, state):
        batch["latents"] = batch["latent_batch"]
        noise = torch.randn_like(batch["latents"])
        batch["noise"] = batch["input_noise"] = noise
        if self.config.input_perturbation:
            batch["input_noise"] = noise + self.config.input_perturbation * torch.randn_like(batch["latents"])
        if self.PREDICTION_TYPE == "flow":
            batch["sigmas"], batch["timesteps"] = self.sample_flow_sigmas(batch=batch, state=state)
            batch["noisy_latents"] = flow_input(batch["latents"], batch["input_noise"])[0]
        else:
            batch["timesteps"] = torch.randint(0, 1000, (len(noise),))
            noisy = self.noise_schedule.add_noise(batch["latents"].float(), batch["input_noise"].float(), batch["timesteps"])
            batch["noisy_latents"] = noisy.to(batch["latents"].dtype)
        return self.prepare_batch_conditions(batch=batch, state=state)


# SwayStar123/SpeedrunDiT at c24c2ff: loss.py:56-96

SR_DIT = """
import torch


class SILoss:
    def __call__(self, model, images, model_kwargs=None, zs=None, cls_token=None, time_input=None, noises=None):
        time_input = torch.rand((images.shape[0], 1, 1, 1)) if time_input is None else time_input
        if noises is None:
            noises = torch.randn_like(images)
            noises_cls = torch.randn_like(cls_token)
        return (1 - time_input) * images + time_input * noises, noises - images, noises, noises_cls
"""

# lucidrains/denoising-diffusion-pytorch at faed4db: classifier_free_guidance.py:777, elucidated_diffusion.py:246

LUCIDRAINS = """
import torch


class WithClasses:
    def p_losses(self, x_start, t, *, classes, noise=None, loss_reduction="mean"):
        return torch.randn_like(x_start) if noise is None else noise

    def forward(self, img, *args, loss_reduction="mean", **kwargs):
        return self.p_losses(img, torch.zeros(len(img), dtype=torch.long), *args, loss_reduction=loss_reduction, **kwargs)


class ElucidatedDiffusion:
    def forward(self, images, *args, sigma=None, loss_reduction="mean", **kwargs):
        noise = torch.randn_like(images)
        return images + 2 * noise, noise
"""
