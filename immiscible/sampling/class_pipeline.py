"""Samples a U-Net that is told classes, with classifier-free guidance where it knows a class that means none.

A run of a class-conditional network leaves this file in its folder, by the name of pipeline.py. It needs torch and diffusers alone:

    pipeline = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
    images = pipeline(class_labels=[0, 1, 2], guidance_scale=1.5, num_inference_steps=20).images
"""

from __future__ import annotations

from collections.abc import Sequence
from inspect import signature

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ImagePipelineOutput, SchedulerMixin, UNet2DModel, VQModel
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor


class ClassConditionalPipeline(DiffusionPipeline):
    """See the file's first lines.

    Args:
        unet: told the class of each image by its number, ``unet(x, t, class_labels=...)``. Where its configuration has a ``_null_class``,
            that number tells it that there is none, and its samples can be guided.
        scheduler: whose timesteps run from 0 to ``num_train_timesteps``, such as those of DDPM, DDIM, Euler and Euler for flows; or one of
            diffusers' on an axis of sigma, for EDM and consistency models.
        vqvae: decodes what the network samples; None for a network of pixels.
    """

    model_cpu_offload_seq = "unet->vqvae"
    _optional_components = ["vqvae"]

    def __init__(self, unet: UNet2DModel, scheduler: SchedulerMixin, vqvae: AutoencoderKL | VQModel | None = None) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler, vqvae=vqvae)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | Sequence[int] | Tensor,
        guidance_scale: float = 1.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        num_inference_steps: int = 50,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """One image of each class that is given.

        Args:
            class_labels: the class of each image, by its number, [B].
            guidance_scale: w. The sampler is given ``without + w (told - without)`` of the network's outputs when it is told no class and
                when it is told the image's (Ho and Salimans 2022, eq. 6, where w is 1 + their w). 1 is no guidance, and costs one call of
                the network in a step; 0 tells no class, which costs one as well; anything else costs two, taken together.
            guidance_interval: the least and the greatest noise level at which w is not 1 (Kynkäänniemi et al. 2024). The level of a step is
                the timestep that the network is told over ``num_train_timesteps``: near 0 for an image, near 1 for noise, whatever the
                number of steps. On an axis of sigma, as of EDM and consistency models, it is ``sigma / (sigma + sigma_data)``, the time of
                the flow of equal SNR. Both ends belong to it.
            num_inference_steps: steps of the sampler.
            generator: of all images, or one for each; samplers that draw noise in each step draw it there too.
            output_type: "pil"; "np" for a numpy array [B, H, W, C] in [0, 1]; "pt" for a tensor [B, C, H, W] in [0, 1].
            return_dict: False for a tuple.

        Raises:
            ValueError: a class that the network does not know, guidance of a network without a null class, a wrong interval, or another
                number of generators than of images.
        """
        labels = torch.as_tensor(class_labels).reshape(-1).to(self._execution_device)
        self._check(labels, guidance_scale, guidance_interval, generator)
        low, high = guidance_interval
        size = self.unet.config.sample_size
        shape = (len(labels), self.unet.config.in_channels, *((size, size) if isinstance(size, int) else size))
        x = randn_tensor(shape, generator=generator, device=labels.device, dtype=self.unet.dtype)
        scheduler = self.scheduler
        scheduler.set_timesteps(num_inference_steps)
        x = x * getattr(scheduler, "init_noise_sigma", 1.0)  # which it knows once it has its steps; a flow has none
        drawing = {"generator": generator} if "generator" in signature(scheduler.step).parameters else {}
        for number, t in enumerate(self.progress_bar(scheduler.timesteps)):
            guided = low <= self._level(t, number) <= high
            scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
            output = self._predict(scaled, t, labels, guidance_scale if guided else 1.0)
            x = scheduler.step(output, t, x, **drawing).prev_sample
        images = self._images(x, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    @property
    def num_classes(self) -> int | None:
        """How many classes the network is told, the null class not counted."""
        return self.unet.config.get("_null_class", self.unet.config.num_class_embeds)

    def _level(self, t: Tensor, number: int) -> float:
        """The noise level of a step, in [0, 1]."""
        config = self.scheduler.config
        if "sigma_data" not in config:
            return float(t) / config.num_train_timesteps
        sigma = float(self.scheduler.sigmas[number])
        return sigma / (sigma + config.sigma_data)

    def _predict(self, x: Tensor, t: Tensor, labels: Tensor, scale: float) -> Tensor:
        """The network's output at one step, guided unless ``scale`` is 1."""
        if scale == 1:
            return self.unet(x, t, class_labels=labels).sample
        none = torch.full_like(labels, self.unet.config["_null_class"])
        if scale == 0:
            return self.unet(x, t, class_labels=none).sample
        without, told = self.unet(torch.cat([x, x]), t, class_labels=torch.cat([none, labels])).sample.chunk(2)
        mean = x.shape[1]  # a learned variance comes after it, and stays that of the class
        return torch.cat([(without + scale * (told - without))[:, :mean], told[:, mean:]], 1)

    def _images(self, x: Tensor, output_type: str) -> object:
        """What was sampled, as images of the kind that is asked for."""
        if self.vqvae is not None:
            x = self.vqvae.decode(x / self.vqvae.config.scaling_factor).sample
        images = (x / 2 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return images
        array = images.cpu().permute(0, 2, 3, 1).float().numpy()
        return self.numpy_to_pil(array) if output_type == "pil" else array

    def _check(self, labels: Tensor, scale: float, interval: tuple[float, float], generator: object) -> None:
        count, low, high = self.num_classes, *interval
        if count is None:
            raise ValueError("this network is told no classes: its folder is sampled by diffusers' own pipeline, without custom_pipeline")
        if not len(labels) or labels.min() < 0 or labels.max() >= count:
            raise ValueError(f"class_labels must be numbers from 0 to {count - 1}, one for each image; guidance_scale=0 tells no class")
        if scale != 1 and "_null_class" not in self.unet.config:
            raise ValueError(f"guidance_scale {scale}: this network was always told the class and cannot be guided; give 1")
        if not 0 <= low <= high <= 1:
            raise ValueError(f"guidance_interval must be two numbers from 0 to 1, the lower one first, not {interval}")
        if isinstance(generator, list) and len(generator) != len(labels):
            raise ValueError(f"generator holds {len(generator)} generators for {len(labels)} images; give one for each, or a single one")
