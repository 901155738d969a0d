"""Samples networks that diffusers has no pipeline for: told classes, with classifier-free guidance where they know a class that means none;
transformers of pixels; flows of latents.

A run of such a network leaves this file in its folder, by the name of pipeline.py. It needs torch and diffusers alone:

    pipeline = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
    images = pipeline(class_labels=[0, 1, 2], guidance_scale=1.5, num_inference_steps=20).images
    images = pipeline(batch_size=3, num_inference_steps=20).images                                   # of a network without classes
"""

from __future__ import annotations

from collections.abc import Sequence
from inspect import signature
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ImagePipelineOutput, ModelMixin, SchedulerMixin, UNet2DModel, VQModel
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor


class ClassConditionalPipeline(DiffusionPipeline):
    """See the file's first lines.

    The network is a U-Net or a transformer. Where its configuration has a ``_null_class``, that number tells it that there is no class, and
    its samples can be guided; a transformer without this key was trained by others, and learned the number after its classes.

    Args:
        scheduler: whose timesteps run from 0 to ``num_train_timesteps``, such as those of DDPM, DDIM, Euler and Euler for flows; or one of
            diffusers' on an axis of sigma, for EDM and consistency models.
        unet: called as ``unet(x, t)``, with ``class_labels`` if it is told the class of each image by its number.
        vqvae: decodes what a U-Net samples; None for one of pixels.
        transformer: in place of ``unet``: a DiT, which is told the number after its classes where it knows none.
        vae: decodes what a transformer samples.
    """

    model_cpu_offload_seq = "unet->transformer->vqvae->vae"
    _optional_components = ["unet", "vqvae", "transformer", "vae"]

    def __init__(
        self,
        scheduler: SchedulerMixin,
        unet: UNet2DModel | None = None,
        vqvae: AutoencoderKL | VQModel | None = None,
        transformer: ModelMixin | None = None,
        vae: AutoencoderKL | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(scheduler=scheduler, unet=unet, vqvae=vqvae, transformer=transformer, vae=vae)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | Sequence[int] | Tensor | None = None,
        guidance_scale: float = 1.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        num_inference_steps: int = 50,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        batch_size: int = 1,
    ) -> ImagePipelineOutput | tuple:
        """One image of each class that is given; of a network that is told none, ``batch_size`` images.

        Args:
            class_labels: the class of each image, by its number, [B]; None for a network that is told none.
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
            batch_size: B, where there are no classes.

        Raises:
            ValueError: a class that the network does not know, guidance of a network without a null class, a wrong interval, or another
                number of generators than of images.
        """
        labels, count = self._labels(class_labels, batch_size)
        self._check(count, guidance_scale, guidance_interval, generator)
        low, high = guidance_interval
        config, network = self.network.config, self.network
        size = config.sample_size
        shape = (count, config.in_channels, *((size, size) if isinstance(size, int) else size))
        x = randn_tensor(shape, generator=generator, device=self._execution_device, dtype=network.dtype)
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
    def network(self) -> ModelMixin:
        """What is sampled."""
        return self.unet if self.transformer is None else self.transformer

    @property
    def num_classes(self) -> int | None:
        """How many classes the network is told, the null class not counted."""
        if self.transformer is not None:
            return self.transformer.config.num_embeds_ada_norm or None
        return self.unet.config.get("_null_class", self.unet.config.num_class_embeds)

    @property
    def null_class(self) -> Any:
        """The number by which the network is told no class, None if it has learned none."""
        config = self.network.config
        return config.get("_null_class", config.get("num_embeds_ada_norm"))

    def _level(self, t: Tensor, number: int) -> float:
        """The noise level of a step, in [0, 1]."""
        config = self.scheduler.config
        if "sigma_data" not in config:
            return float(t) / config.num_train_timesteps
        sigma = float(self.scheduler.sigmas[number])
        return sigma / (sigma + config.sigma_data)

    def _predict(self, x: Tensor, t: Tensor, labels: Tensor | None, scale: float) -> Tensor:
        """The network's output at one step, guided unless ``scale`` is 1."""
        if labels is None or scale == 1:
            return self._output(x, t, labels)
        none = torch.full_like(labels, self.null_class)
        if scale == 0:
            return self._output(x, t, none)
        without, told = self._output(torch.cat([x, x]), t, torch.cat([none, labels])).chunk(2)
        mean = x.shape[1]  # a learned variance comes after it, and stays that of the class
        return torch.cat([(without + scale * (told - without))[:, :mean], told[:, mean:]], 1)

    def _output(self, x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        """What the network says, with the variance that some say too where the sampler takes one."""
        told = {} if labels is None else {"class_labels": labels}
        output = self.network(x, t.to(x.device).expand(len(x)), **told).sample
        return output if str(self.scheduler.config.get("variance_type")).startswith("learned") else output[:, : x.shape[1]]

    def _images(self, x: Tensor, output_type: str) -> object:
        """What was sampled, as images of the kind that is asked for."""
        decoder = self.vae if self.vqvae is None else self.vqvae
        if decoder is not None:
            x = decoder.decode(x / decoder.config.scaling_factor).sample
        images = (x / 2 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return images
        array = images.cpu().permute(0, 2, 3, 1).float().numpy()
        return self.numpy_to_pil(array) if output_type == "pil" else array

    def _labels(self, class_labels: int | Sequence[int] | Tensor | None, batch_size: int) -> tuple[Tensor | None, int]:
        """What the network is told of each image, int64 [B] or nothing, and B."""
        count = self.num_classes
        if class_labels is None and count is None:
            none = None if self.transformer is None else self.transformer.config.num_embeds_ada_norm
            labels = None if none is None else torch.full((batch_size,), none, device=self._execution_device)
            return labels, batch_size
        if count is None:
            raise ValueError("this network is told no classes: leave class_labels out and give batch_size")
        labels = torch.as_tensor([] if class_labels is None else class_labels).reshape(-1).to(self._execution_device)
        if not len(labels) or labels.min() < 0 or labels.max() >= count:
            raise ValueError(f"class_labels must be numbers from 0 to {count - 1}, one for each image; guidance_scale=0 tells no class")
        return labels, len(labels)

    def _check(self, count: int, scale: float, interval: tuple[float, float], generator: object) -> None:
        low, high = interval
        if scale != 1 and self.num_classes is None:
            raise ValueError(f"guidance_scale {scale}: this network is told no classes; give 1")
        if scale != 1 and self.null_class is None:
            raise ValueError(f"guidance_scale {scale}: this network was always told the class and cannot be guided; give 1")
        if not 0 <= low <= high <= 1:
            raise ValueError(f"guidance_interval must be two numbers from 0 to 1, the lower one first, not {interval}")
        if isinstance(generator, list) and len(generator) != count:
            raise ValueError(f"generator holds {len(generator)} generators for {count} images; give one for each, or a single one")
