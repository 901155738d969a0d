"""Samples transformers of latents that are told a prompt by the text encoder's pooled state, for which diffusers has no pipeline.

A run of such a network leaves this file in its folder, by the name of pipeline.py. It needs torch, diffusers and transformers alone:

    pipeline = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
    images = pipeline(["a cat", "two dogs"], guidance_scale=1.5, num_inference_steps=50).images
"""

from __future__ import annotations

from collections.abc import Sequence
from inspect import signature
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ImagePipelineOutput, ModelMixin, SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer


class PooledTextPipeline(DiffusionPipeline):
    """See the file's first lines.

    Args:
        vae: decodes what is sampled.
        text_encoder: gives the pooled state of a prompt.
        tokenizer: of the text encoder.
        transformer: called as ``transformer(x, t, pooled_projections=...)``.
        scheduler: of diffusers, such as DDPM's, DDIM's and PNDM's.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        transformer: ModelMixin,
        scheduler: SchedulerMixin,
    ) -> None:
        super().__init__()
        self.register_modules(vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, transformer=transformer, scheduler=scheduler)
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str = "",
        guidance_scale: float = 1.5,
        num_inference_steps: int = 50,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """One image of each prompt.

        Args:
            prompt: of each image; it is cut off where the text encoder ends.
            negative_prompt: what all images are guided away from; as a rule the empty prompt, which the network was told in training where
                captions were left out.
            guidance_scale: w. The sampler is given ``without + w (told - without)`` of the network's outputs when it is told the negative
                prompt and when it is told the image's. 1 is no guidance, and costs one call of the network in a step, not two.
            num_inference_steps: steps of the sampler.
            generator: of all images, or one for each; samplers that draw noise in each step draw it there too.
            output_type: "pil"; "np" for a numpy array [B, H, W, C] in [0, 1]; "pt" for a tensor [B, C, H, W] in [0, 1].
            return_dict: False for a tuple.

        Raises:
            ValueError: another number of generators than of images.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if isinstance(generator, list) and len(generator) != len(prompts):
            raise ValueError(f"generator holds {len(generator)} generators for {len(prompts)} images; give one for each, or a single one")
        told = self.pooled(prompts)
        without = None if guidance_scale == 1 else self.pooled([negative_prompt]).expand(len(prompts), -1)
        config, scheduler = self.transformer.config, self.scheduler
        shape = (len(prompts), config.in_channels, config.sample_size, config.sample_size)
        x = randn_tensor(shape, generator=generator, device=self._execution_device, dtype=self.transformer.dtype)
        scheduler.set_timesteps(num_inference_steps)
        x = x * scheduler.init_noise_sigma  # which it knows once it has its steps
        drawing = {"generator": generator} if "generator" in signature(scheduler.step).parameters else {}
        for t in self.progress_bar(scheduler.timesteps):
            output = self._predict(scheduler.scale_model_input(x, t), t, told, without, guidance_scale)
            x = scheduler.step(output, t, x, **drawing).prev_sample
        images = self._images(x, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def pooled(self, prompts: Sequence[str]) -> Tensor:
        """The text encoder's pooled state of each prompt, [B, E]."""
        most = min(self.tokenizer.model_max_length, self.text_encoder.config.max_position_embeddings)
        words = self.tokenizer(list(prompts), max_length=most, padding="max_length", truncation=True, return_tensors="pt")
        return self.text_encoder(words.input_ids.to(self._execution_device)).pooler_output

    def _predict(self, x: Tensor, t: Tensor, told: Tensor, without: Tensor | None, scale: float) -> Tensor:
        """The network's output at one step, guided where it is told something to be guided away from."""
        if without is None:
            return self._output(x, t, told)
        away, towards = self._output(torch.cat([x, x]), t, torch.cat([without, told])).chunk(2)
        return away + scale * (towards - away)

    def _output(self, x: Tensor, t: Tensor, pooled: Tensor) -> Tensor:
        return self.transformer(x, t.to(x.device).expand(len(x)), pooled_projections=pooled).sample

    def _images(self, x: Tensor, output_type: str) -> Any:
        """What was sampled, as images of the kind that is asked for."""
        x = self.vae.decode(x.to(self.vae.dtype) / self.vae.config.scaling_factor).sample
        images = (x / 2 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return images
        array = images.cpu().permute(0, 2, 3, 1).float().numpy()
        return self.numpy_to_pil(array) if output_type == "pil" else array
