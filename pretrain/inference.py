"""What a trained model does: generate images from text, and embed and classify images.

One code path for evaluation in training, the CLI and the registry's model. Nothing here needs
DeepSpeed.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image
from pydantic import Field
from torch import Tensor

from pretrain import plugins
from pretrain.config import Config, build
from pretrain.diffusion.sampler import Method, sample
from pretrain.errors import ExportError
from pretrain.model.autoencoder import Autoencoder, build_autoencoder
from pretrain.model.diffdis import DiffDis, ModelConfig
from pretrain.model.fresh import without_storage
from pretrain.model.text_encoder import AnyTextEncoder, build_text_encoder
from pretrain.rng import generator

Array = npt.NDArray[np.float32]
# A condition c and pairs (w_i, c_i) of those to lead away from:
# x_0 = x_0(c) + sum_i w_i (x_0(c) - x_0(c_i)).
Conditions = tuple[Tensor, list[tuple[float, Tensor]]]
ConditionsAt = Callable[[Tensor], Conditions]  # at times t_B of the image path
# (c_BLD, null_c_BLD, guidance w, a seed for each image) -> conditions over time
Condition = Callable[[Tensor, Tensor, float, Sequence[int]], ConditionsAt]


def captions_alone(
    c_BLD: Tensor, null_c_BLD: Tensor, guidance: float, seeds: Sequence[int]
) -> ConditionsAt:
    """Classifier-free guidance on the caption, at all times: x_0(c) + w (x_0(c) - x_0(null))."""
    return lambda t_B: (c_BLD, [(guidance, null_c_BLD)])


class InferenceConfig(Config):
    """Defaults of both heads at inference.

    Attributes:
        sampler, steps, guidance: of image generation; x_0 = (1 + w) x_0(c) - w x_0(null) with w =
            guidance.
        last_noise: noise-to-signal ratio at which sampling ends with the estimate of x_0; 0 samples
            to the end. After minutes of training the network has learned nothing below a ratio of
            0.3, and further steps add grain.
        align_steps, align_noises, align_guidance: of the alignment chain; ê_0 is averaged over
            noises.
    """

    sampler: Method = "ddim"
    steps: int = Field(50, ge=1)
    guidance: float = Field(3.0, ge=0)
    last_noise: float = Field(0.0, ge=0)
    align_steps: int = Field(4, ge=1)
    align_noises: int = Field(4, ge=1)
    align_guidance: float = Field(0.0, ge=0)


class Heads:
    """The two inference procedures of DiffDis (Alg. 2 and 3) over tensors.

    Args:
        model: the network, on any device, in eval mode.
        config: defaults.
        condition: what generation is conditioned on and guided away from, where objectives of the
            training added to the caption (`PretrainTask.conditions`).
    """

    def __init__(
        self, model: DiffDis, config: InferenceConfig, condition: Condition = captions_alone
    ) -> None:
        self.model = model
        self.config = config
        self.condition = condition

    @torch.no_grad()
    def embed_tokens(self, tokens_BL: Tensor, mask_BL: Tensor) -> Tensor:
        """Text queries e, unit rows, (B, E)."""
        return self.model.encode_text(tokens_BL, mask_BL)[0].e_BE

    @torch.no_grad()
    def embed_images(
        self,
        images_BCHW: Tensor,
        seed: int = 0,
        steps: int | None = None,
        noises: int | None = None,
        guidance: float | None = None,
    ) -> Tensor:
        """ê_0 of images in [-1, 1], unit rows, (B, E): one chain for each image and noise (Alg. 3).

        The cost is ``steps × noises`` encoder passes an image (twice that with guidance), whatever
        the number of classes. The draws are the same for every image, so a result does not depend
        on the batch.
        """
        steps, noises = steps or self.config.align_steps, noises or self.config.align_noises
        w = self.config.align_guidance if guidance is None else guidance
        model, device = self.model, images_BCHW.device
        z = model.autoencoder.encode(images_BCHW)
        null_c = model.encode_text(model.null_tokens_L[None], model.null_mask_L[None])[1]

        def denoise(e_t: Tensor, t: Tensor) -> Tensor:
            e0 = model.denoise_query(e_t, t, z, null_c)
            if w > 0:
                e0 = (1 + w) * e0 - w * model.denoise_query(e_t, t, torch.zeros_like(z), null_c)
            return F.normalize(e0, dim=-1)  # InfoNCE leaves its norm free; the path assumes 1

        total = torch.zeros(len(z), model.config.text_encoder.query_dim, device=device)
        for k in range(noises):
            eps = torch.randn(total.shape[1], generator=generator(seed, "align", k)).to(device)
            total += sample(model.text_path, denoise, eps.expand_as(total), steps, "ddim")
        return F.normalize(total, dim=-1)

    @torch.no_grad()
    def generate_tokens(
        self,
        tokens_BL: Tensor,
        mask_BL: Tensor,
        seeds: Sequence[int],
        steps: int | None = None,
        guidance: float | None = None,
        sampler: Method | None = None,
    ) -> Tensor:
        """Images in [-1, 1] for texts (Alg. 2, with classifier-free guidance); one seed for each
        image."""
        steps = steps or self.config.steps
        w = self.config.guidance if guidance is None else guidance
        model, device = self.model, tokens_BL.device
        text, null_c = model.encode_text(tokens_BL, mask_BL)
        conditions = self.condition(text.c_BLD, null_c.expand_as(text.c_BLD), w, seeds)
        rows = [torch.randn(model.latent_shape, generator=generator(s, "generate")) for s in seeds]

        def denoise(z_t: Tensor, t: Tensor) -> Tensor:
            c, others = conditions(t)
            others = [(weight, other) for weight, other in others if weight != 0]
            n = 1 + len(others)
            with_c, *without = model.denoise_image(
                torch.cat([z_t] * n), torch.cat([t] * n), torch.cat([c, *(o for _, o in others)])
            ).chunk(n)
            guided = with_c
            for (weight, _), x0 in zip(others, without, strict=True):
                guided = guided + weight * (with_c - x0)
            return guided

        z = sample(
            model.image_path,
            denoise,
            torch.stack(rows).to(device),
            steps,
            sampler or self.config.sampler,
            self.config.last_noise,
        )
        return model.autoencoder.decode(z).clamp(-1, 1)


class Predictor:
    """A trained model from an exported folder, with images and text in and out."""

    def __init__(
        self,
        model: DiffDis,
        tokenizer: Any,
        config: InferenceConfig,
        scale: float = 100.0,
        condition: Condition = captions_alone,
    ) -> None:
        self.heads = Heads(model.eval(), config, condition)
        self.model = model
        self.tokenizer = tokenizer
        self.scale = scale
        self.length = model.config.text_encoder.length

    @classmethod
    def load(cls, folder: str | Path) -> "Predictor":
        """Read ``config.json``, ``model.safetensors`` and ``tokenizer.model``; and, of an objective
        that conditioned generation, the folder of its name.

        Raises:
            ExportError: a file is missing, or the weights are not those of the configuration.
            TokenizerMismatch: the tokenizer is not the one of the configuration.
        """
        from safetensors.torch import load_file

        from pretrain.data.tokenizer import Tokenizer

        folder = Path(folder)
        try:
            tree = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ExportError(
                f"folder={str(folder)!r} is not an exported model ({error}); run `export` first"
            ) from None
        tokenizer = Tokenizer.of_model(folder)
        tokenizer.check(tree["tokenizer_sha256"])
        model = new_model(build(ModelConfig, tree["model"], "model").within(folder), tokenizer)
        state = load_file(folder / "model.safetensors")
        missing, unexpected = model.load_state_dict(state, strict=False)
        if missing or unexpected:
            raise ExportError(
                f"{folder}/model.safetensors does not fit config.json: {len(missing)} tensors "
                "missing "
                f"({', '.join(missing[:3])}…), {len(unexpected)} unexpected "
                f"({', '.join(unexpected[:3])}…)"
            )
        return cls(
            model,
            tokenizer,
            build(InferenceConfig, tree["inference"], "inference"),
            tree["logit_scale"],
            _condition(folder, tree.get("condition"), model),
        )

    def generate(
        self,
        prompts: Sequence[str],
        *,
        steps: int | None = None,
        guidance: float | None = None,
        seed: int = 0,
        batch_size: int = 32,
        seeds: Sequence[int] | None = None,
        sampler: Method | None = None,
    ) -> list[Image.Image]:
        """One RGB image for each prompt. Image i is drawn from seed + i (or ``seeds[i]``), whatever
        the batch size."""
        seeds = list(seeds) if seeds is not None else [seed + i for i in range(len(prompts))]
        images: list[Image.Image] = []
        for part in _chunks(range(len(prompts)), batch_size):
            tokens, mask = self._tokens([prompts[i] for i in part])
            made = self.heads.generate_tokens(
                tokens, mask, [seeds[i] for i in part], steps, guidance, sampler
            )
            images += [to_pil(image) for image in made]
        return images

    def embed_text(self, texts: Sequence[str], batch_size: int = 256) -> Array:
        """Text queries, fp32 unit rows, (N, E)."""
        return self._rows(
            len(texts),
            batch_size,
            lambda part: self.heads.embed_tokens(*self._tokens([texts[i] for i in part])),
        )

    def embed_image(
        self,
        images: Sequence[Image.Image],
        *,
        steps: int | None = None,
        noises: int | None = None,
        guidance: float | None = None,
        seed: int = 0,
        batch_size: int = 64,
    ) -> Array:
        """Image embeddings by denoising the text query, fp32 unit rows, (N, E)."""
        size = self.model.config.image_size

        def embed(part: Sequence[int]) -> Tensor:
            pixels = torch.stack([from_pil(images[i], size) for i in part])
            return self.heads.embed_images(pixels.to(self.device), seed, steps, noises, guidance)

        return self._rows(len(images), batch_size, embed)

    def classify(
        self,
        images: Sequence[Image.Image],
        labels: Sequence[str],
        *,
        templates: Sequence[str] = ("{}",),
        steps: int | None = None,
        noises: int | None = None,
        guidance: float | None = None,
        seed: int = 0,
    ) -> Array:
        """Zero-shot class probabilities (N, len(labels)): softmax of scaled cosines to the class
        prompts."""
        prompts = [template.format(label) for label in labels for template in templates]
        e_KE = self.embed_text(prompts).reshape(len(labels), len(templates), -1).mean(1)
        e_KE /= np.linalg.norm(e_KE, axis=1, keepdims=True)
        rows = self.embed_image(images, steps=steps, noises=noises, guidance=guidance, seed=seed)
        logits = torch.from_numpy(self.scale * rows @ e_KE.T)
        return logits.softmax(-1).numpy()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.trunk.unet.conv_in.weight.device

    def _tokens(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        tokens, mask = self.tokenizer.encode(list(texts), self.length)
        return tokens.to(self.device), mask.to(self.device)

    def _rows(self, n: int, size: int, embed: Callable[[Sequence[int]], Tensor]) -> Array:
        parts = [embed(part).float().cpu().numpy() for part in _chunks(range(n), size)]
        width = self.model.config.text_encoder.query_dim
        return np.concatenate(parts) if parts else np.zeros((0, width), np.float32)


def _condition(folder: Path, name: str | None, model: DiffDis) -> Condition:
    """Of an exported model: the objective's in whose folder it lies."""
    if name is None:
        return captions_alone
    module = plugins.load("pretrain.objectives", name, "condition")
    made: Condition = module.load_condition(folder / name, model)
    return made


def new_model(
    config: ModelConfig, tokenizer: Any, like: DiffDis | None = None, storage: bool = True
) -> DiffDis:
    """A freshly initialised network for ``tokenizer``.

    Args:
        like: a network of the same configuration, whose frozen parts are used too.
        storage: False leaves what is trained on the meta device, to be filled part by part.
    """
    tokens, mask = tokenizer.encode([""], config.text_encoder.length)
    autoencoder: Autoencoder | None = None
    text_encoder: AnyTextEncoder | None = None
    if like is not None:
        autoencoder, text_encoder = like.autoencoder, like.frozen_text_encoder
    elif not storage:  # frozen parts are whole in any case
        autoencoder = build_autoencoder(config.autoencoder)
        if config.text_encoder.frozen:
            text_encoder = build_text_encoder(config.text_encoder, tokenizer.vocab_size)
    with nullcontext() if storage else without_storage():
        model = DiffDis(config, tokenizer.vocab_size, tokens[0], mask[0], autoencoder, text_encoder)
    if model.frozen_text_encoder is not None:
        model.frozen_text_encoder.check_tokenizer(tokenizer)
    return model


def to_pil(image_CHW: Tensor) -> Image.Image:
    """An image in [-1, 1] as RGB."""
    pixels = ((image_CHW.float().cpu() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).numpy(), "RGB")


def from_pil(image: Image.Image, size: int) -> Tensor:
    """An image of any mode and size as (3, size, size) in [-1, 1], exactly as the training data is
    made."""
    from pretrain.data.samples import prepare

    return prepare(image, size)


def _chunks(indices: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    return (indices[i : i + size] for i in range(0, len(indices), size))
