"""Text to a token-wise condition c and one global query e (DiffDis, section 3: c = T(y), e).

Parameters lie in leaf modules that return tensors: under ZeRO-3 each is then gathered by its own
hook.
"""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor, nn

from pretrain.config import build
from pretrain.errors import ConfigError
from pretrain.model.fresh import initialise
from pretrain.model.identity import digest
from pretrain.model.recompute import Recomputing
from pretrain.model.text_config import TextEncoderConfig, TransformersTextConfig
from pretrain.model.transformers_text import FrozenTransformers, TransformersTextEncoder
from pretrain.model.transformers_text import build as build_transformers
from pretrain.types import TextFeatures

PREFIX = "text_encoder."  # of its weights in an exported model


class TextEncoder(Recomputing):
    """Bidirectional transformer; e is the L2-normalised projection of the end token's feature (as
    CLIP pools), or of the mean over the text's tokens."""

    def __init__(self, config: TextEncoderConfig, vocab_size: int) -> None:
        super().__init__()
        self.pool = config.pool
        self.token = nn.Embedding(vocab_size, config.width)
        self.position = nn.Embedding(config.length, config.width)
        self.blocks = nn.ModuleList(
            BasicTransformerBlock(
                config.width,
                config.heads,
                config.width // config.heads,
                activation_fn="gelu",
                attention_bias=True,
            )
            for _ in range(config.layers)
        )
        self.norm = nn.LayerNorm(config.width)
        self.query = nn.Linear(config.width, config.query_dim, bias=False)
        initialise(self.token, partial(_normal, std=0.02))
        initialise(self.position, partial(_normal, std=0.01))

    def forward(self, tokens_BL: Tensor, mask_BL: Tensor) -> TextFeatures:
        """Features of tokens; padding (mask False) is never attended to."""
        h_BLD = self.token(tokens_BL) + self.position(
            torch.arange(tokens_BL.shape[1], device=tokens_BL.device)
        )
        bias_B1L = torch.zeros(mask_BL.shape, dtype=h_BLD.dtype, device=h_BLD.device)
        bias_B1L = bias_B1L.masked_fill(~mask_BL, float("-inf"))[:, None]
        for block in self.blocks:
            h_BLD = self.unit(block, h_BLD, bias_B1L)
        c_BLD = self.norm(h_BLD)
        e_BE = self.query(self._pooled(c_BLD, mask_BL))
        return TextFeatures(c_BLD, F.normalize(e_BE.float(), dim=-1))

    def _pooled(self, c_BLD: Tensor, mask_BL: Tensor) -> Tensor:
        if self.pool == "mean":
            seen_BL1 = mask_BL[..., None].to(c_BLD.dtype)
            return (c_BLD * seen_BL1).sum(1) / seen_BL1.sum(1)
        last_B = mask_BL.sum(1) - 1  # the end token
        return c_BLD[torch.arange(len(c_BLD), device=c_BLD.device), last_B]


def _normal(table: nn.Embedding, std: float) -> None:
    nn.init.normal_(table.weight, std=std)


class FrozenTextEncoder:
    """The text encoder of an exported model, as it is. Not a module: it must be neither partitioned
    nor optimised nor saved. (Its weights go into the export of the model that was trained with it.)

    Args:
        folder: of the exported model.

    Raises:
        ConfigError: it holds none.
    """

    def __init__(self, folder: str | Path) -> None:
        from safetensors import SafetensorError, safe_open

        self.folder = Path(folder)
        try:
            tree = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
            self.config = build(TextEncoderConfig, tree["model"]["text_encoder"])
            self.tokenizer_sha256 = str(tree["tokenizer_sha256"])
            with safe_open(self.folder / "model.safetensors", framework="pt") as file:
                names = [name for name in file.keys() if name.startswith(PREFIX)]  # noqa: SIM118
                state = {name.removeprefix(PREFIX): file.get_tensor(name) for name in names}
            encoder = TextEncoder(self.config, len(state["token.weight"]))
            encoder.load_state_dict(state, assign=True)
        except (
            *(OSError, ValueError, LookupError, TypeError, RuntimeError),
            *(SafetensorError, ConfigError),
        ) as error:
            raise ConfigError(
                f"model.text_encoder.frozen_from={str(folder)!r} is not an exported model with a "
                f"text encoder ({error}); export one with `python -m pretrain export`"
            ) from None
        self.encoder = encoder.eval().requires_grad_(False)

    @property
    def vocab_size(self) -> int:
        """Of the tokenizer it was trained with."""
        return self.encoder.token.num_embeddings

    @property
    def sha256(self) -> str:
        """Of all that decides its features: weights, shape and tokenizer."""
        fields = self.config.model_dump(mode="json", exclude={"frozen_from", "kind"})
        if fields["pool"] == "end":  # features encoded before there was a choice stay known
            del fields["pool"]
        return digest({**fields, "tokenizer": self.tokenizer_sha256}, self.encoder.state_dict())

    def parameters(self) -> Iterator[nn.Parameter]:
        """None of which needs a gradient."""
        return self.encoder.parameters()

    @torch.no_grad()
    def __call__(self, tokens_BL: Tensor, mask_BL: Tensor) -> TextFeatures:
        """As `TextEncoder`."""
        features: TextFeatures = self.encoder.to(tokens_BL.device)(tokens_BL, mask_BL)
        return features

    def portable(self) -> TextEncoderConfig:
        """The settings of an encoder whose weights stand beside the model's own."""
        return self.config.model_copy(update={"frozen_from": None})

    def check_tokenizer(self, tokenizer: Any) -> None:
        """Refuse a tokenizer that it was not trained with.

        Raises:
            TokenizerMismatch: it is another.
        """
        tokenizer.check(self.tokenizer_sha256)

    def check(self, config: TextEncoderConfig, vocab_size: int) -> None:
        """Refuse a configuration of another text encoder.

        Raises:
            ConfigError: a field differs.
        """
        for name in TextEncoderConfig.model_fields:
            given, own = getattr(config, name), getattr(self.config, name)
            if given != own and name != "frozen_from":
                raise ConfigError(
                    f"model.text_encoder.{name}={given}, but the encoder in frozen_from="
                    f"{str(self.folder)!r} has {own}; make them equal"
                )
        if vocab_size != self.vocab_size:
            raise ConfigError(
                f"data.tokenizer has {vocab_size} pieces, but the encoder in "
                f"model.text_encoder.frozen_from={str(self.folder)!r} was trained with "
                f"{self.vocab_size}; give the tokenizer.model of that folder"
            )


AnyTextEncoder = TextEncoder | FrozenTextEncoder | TransformersTextEncoder | FrozenTransformers


def build_text_encoder(
    config: TextEncoderConfig | TransformersTextConfig, vocab_size: int
) -> AnyTextEncoder:
    """The text encoder of ``config``: a new one, or the frozen one of a folder.

    Raises:
        ConfigError: the folder of a frozen one holds none, or another.
    """
    if isinstance(config, TransformersTextConfig):
        return build_transformers(config, vocab_size)
    if config.frozen_from is None:
        return TextEncoder(config, vocab_size)
    frozen = FrozenTextEncoder(config.frozen_from)
    frozen.check(config, vocab_size)
    return frozen
