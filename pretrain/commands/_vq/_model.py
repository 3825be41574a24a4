"""The token diffusion model of `vq`: VQ tokenizer, text encoder and denoiser as they lie on
disk."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.commands._vq import _files
from pretrain.config import Config, build
from pretrain.data.tokenizer import Tokenizer
from pretrain.diffusion.discrete import DiscreteProcess, ProcessConfig
from pretrain.model.text_config import TextEncoderConfig
from pretrain.model.text_encoder import TextEncoder
from pretrain.model.token_denoiser import TokenDenoiser, TokenDenoiserConfig
from pretrain.model.vq import VQAutoencoder, VQConfig
from pretrain.objectives._cdcd_tokens import TokenLossConfig


class VQDiffusionConfig(Config):
    """Attributes: the parts; ``loss`` is CDCD's, off unless it has ``contrast``."""

    process: ProcessConfig = ProcessConfig()
    denoiser: TokenDenoiserConfig = TokenDenoiserConfig()
    text_encoder: TextEncoderConfig = TextEncoderConfig(width=96, layers=2, heads=4, length=16)
    loss: TokenLossConfig = TokenLossConfig()


class VQDiffusion(nn.Module):
    """log p(x_0 | x_t, caption) over the tokens of a picture."""

    def __init__(self, config: VQDiffusionConfig, codes: int, length: int, vocabulary: int) -> None:
        super().__init__()
        self.config = config
        self.process = DiscreteProcess(config.process, codes)
        width = config.text_encoder.width
        self.text_encoder = TextEncoder(config.text_encoder, vocabulary)
        self.denoiser = TokenDenoiser(config.denoiser, codes, length, width, config.process.steps)

    def forward(self, x_t_BL: Tensor, t_B: Tensor, tokens_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """(B, L, V)."""
        return self.denoiser(x_t_BL, t_B, self.text_encoder(tokens_BT, mask_BT).c_BLD)


@dataclass(frozen=True)
class Loaded:
    """A model with what it needs to make pictures of captions."""

    model: VQDiffusion
    vq: VQAutoencoder
    tokenizer: Tokenizer
    side: int

    @torch.no_grad()
    def generate(
        self, captions: list[str], steps: int | None, seed: int, temperature: float
    ) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1]."""
        text = self.tokenizer.encode(captions, self.model.config.text_encoder.length)
        c = self.model.text_encoder(*text).c_BLD
        x = self.model.process.sample(
            lambda x_t, t: self.model.denoiser(x_t, t, c),
            (len(captions), self.side**2),
            steps,
            torch.Generator().manual_seed(seed),
            temperature,
        )
        x = x.clamp(max=self.vq.config.codes - 1)  # nothing is masked at t = 0, but by rounding
        return self.vq.decode(x.unflatten(1, (self.side, self.side))).clamp(-1, 1)


def load_vq(folder: str | Path) -> tuple[VQAutoencoder, int]:
    """The tokenizer that `vq train` made, and the pictures' size."""
    tree = _files.read_config(folder, "train")
    vq = VQAutoencoder(build(VQConfig, tree["vq"], "vq"))
    _files.load_weights(folder, vq)
    return vq, int(tree["size"])


def load_model(folder: str | Path) -> Loaded:
    """What `vq denoise` made."""
    tree: dict[str, Any] = _files.read_config(folder, "denoise")
    vq, size = load_vq(tree["vq"])
    tokenizer = Tokenizer(tree["tokenizer"])
    tokenizer.check(tree["tokenizer_sha256"])
    config = build(VQDiffusionConfig, tree["model"], "model")
    side = size // vq.factor
    model = VQDiffusion(config, vq.config.codes, side**2, tokenizer.vocab_size)
    _files.load_weights(folder, model)
    return Loaded(model, vq, tokenizer, side)
