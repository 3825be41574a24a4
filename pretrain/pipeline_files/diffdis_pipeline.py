"""DiffDis' generative head as a diffusers pipeline. Needs torch, diffusers and sentencepiece.

    pipe = DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True)
    pipe("red apple").images[0].save("apple.png")

The U-Net is diffusers' own. The schedulers are diffusers' own too, and first order: with as many
steps the pictures differ from those of the second-order sampler that the model's card was made
with. `trust_remote_code` lets diffusers run this file and text_encoder/diffdis_text_encoder.py.
"""

import math
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor


class DiffDisPipeline(DiffusionPipeline):
    """Text to image.

    Args:
        unet, text_encoder, scheduler: as `from_pretrained` loads them.
        vae: None where latents are blocks of pixels.
        tokenizer: None where the text encoder has its own.
        image_size: pixels on a side.
        factor, shift: of the blocks: factor x factor pixels, less the shift, are the channels.
        start: scale of the first noise.
        steps, guidance_scale, last_noise: defaults of a call.
        tokens, masks_padding: of a text under ``tokenizer``, and whether the text encoder is told
            which of them are padding.
    """

    _optional_components = ["vae", "tokenizer"]  # noqa: RUF012

    def __init__(
        self,
        unet: Any,
        text_encoder: Any,
        scheduler: Any,
        vae: Any = None,
        tokenizer: Any = None,
        image_size: int = 32,
        factor: int = 2,
        shift: float = 0.0,
        colours: list[list[float]] | None = None,
        start: float = 1.0,
        steps: int = 50,
        guidance_scale: float = 4.0,
        last_noise: float = 0.0,
        tokens: int = 77,
        masks_padding: bool = False,
    ) -> None:
        super().__init__()
        self.register_modules(
            unet=unet,
            text_encoder=text_encoder,
            scheduler=scheduler,
            vae=vae,
            tokenizer=tokenizer,
        )
        self.register_to_config(
            image_size=image_size,
            factor=factor,
            shift=shift,
            colours=colours,
            start=start,
            steps=steps,
            guidance_scale=guidance_scale,
            last_noise=last_noise,
            tokens=tokens,
            masks_padding=masks_padding,
        )

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        last_noise: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> Any:
        """One picture for each prompt.

        Args:
            guidance_scale: 1 is none; the sum F_null + scale (F_text - F_null).
            last_noise: noise-to-signal ratio at which sampling ends with the estimate of x_0.
            latents: unit noise to begin with, in place of a draw from ``generator``.
            output_type: "pil" or "pt" (tensors in [0, 1]).
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        steps = num_inference_steps or self.config.steps
        scale = self.config.guidance_scale if guidance_scale is None else guidance_scale
        last = self.config.last_noise if last_noise is None else last_noise
        device, dtype = self._execution_device, self.unet.dtype
        c = self._condition([*prompts, ""]).to(dtype)
        c, null = c[:-1], c[-1:].expand(len(prompts), -1, -1)
        if latents is None:
            side = self.config.image_size // self.config.factor
            shape = (len(prompts), self.unet.config.in_channels, side, side)
            latents = randn_tensor(shape, generator, device, dtype)
        z = latents.to(device) * self.config.start
        self.scheduler.set_timesteps(steps, device=device)
        times = [t for t in self.scheduler.timesteps if self._noise_to_signal(t) > last]
        for t in self.progress_bar(times or self.scheduler.timesteps[:1]):
            fed, time = self.scheduler.scale_model_input(z, t).to(dtype), self._network_time(t)
            if scale == 1:
                f = self.unet(fed, time, c).sample
            else:
                both = self.unet(torch.cat([fed, fed]), time, torch.cat([c, null])).sample
                with_text, without = both.chunk(2)
                f = without + scale * (with_text - without)
            step = self.scheduler.step(f, t, z)
            z = step.prev_sample
        estimate = getattr(step, "pred_original_sample", None)
        pixels = self._decode(z if estimate is None else estimate)
        images: Any = (pixels.float().clamp(-1, 1) + 1) / 2
        if output_type == "pil":
            levels = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
            images = [Image.fromarray(one) for one in levels]
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _condition(self, texts: list[str]) -> Tensor:
        """The condition c, (B, L, D)."""
        if self.tokenizer is None:
            return self.text_encoder(texts)[0]
        found = self.tokenizer(
            texts,
            padding="max_length",
            truncation=True,
            max_length=self.config.tokens,
            return_tensors="pt",
        ).to(self._execution_device)
        mask = found.attention_mask if self.config.masks_padding else None
        return self.text_encoder(found.input_ids, attention_mask=mask)[0]

    def _sigma(self, t: Tensor) -> float:
        return math.exp(4 * float(t))  # an EDM scheduler's time is ln(sigma) / 4

    def _noise_to_signal(self, t: Tensor) -> float:
        if "sigma_data" in self.scheduler.config:
            return self._sigma(t)
        abar = float(self.scheduler.alphas_cumprod[int(t)])
        return math.sqrt((1 - abar) / abar)

    def _network_time(self, t: Tensor) -> Tensor:
        """The number in [0, 1000] that the U-Net was trained to read."""
        known = self.scheduler.config
        if "sigma_data" not in known:
            return t * (1000 / known.num_train_timesteps)
        low, high = math.log(known.sigma_min), math.log(known.sigma_max)
        here = math.log(max(self._sigma(t), known.sigma_min))
        time = min(max((here - low) / (high - low) * 1000, 0.0), 1000.0)
        return torch.tensor(time, dtype=torch.float32, device=t.device)

    def _decode(self, z: Tensor) -> Tensor:
        if self.vae is None:
            pixels = torch.nn.functional.pixel_shuffle(z, self.config.factor)
            if self.config.colours is not None:  # axes of colour back to red, green and blue
                axes = torch.tensor(self.config.colours).to(pixels)
                pixels = torch.einsum("dc,bchw->bdhw", axes, pixels)
            return (pixels + self.config.shift).contiguous()
        return self.vae.decode(z / self.vae.config.scaling_factor).sample
