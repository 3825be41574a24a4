"""DiffDis' text encoder as a component of a diffusers pipeline; its tokenizer is among its weights.

Needs torch, diffusers and sentencepiece.
"""

import sentencepiece
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

PAD, BEGIN, END = 0, 2, 3


class DiffDisTextEncoder(ModelMixin, ConfigMixin):
    """Bidirectional transformer over sentencepiece tokens.

    Args:
        vocab_size: token ids.
        tokenizer_bytes: size of the sentencepiece model, which is the buffer `tokenizer`.
        width: of the condition c.
        query_dim: of the query e.
        layers, heads: of the transformer.
        length: tokens of a text; longer ones are cut.
        pool: what e is projected from: the feature of the "end" token, or the "mean" of the text's.
    """

    @register_to_config
    def __init__(
        self,
        vocab_size: int,
        tokenizer_bytes: int,
        width: int,
        query_dim: int,
        layers: int,
        heads: int,
        length: int,
        pool: str = "end",
    ) -> None:
        super().__init__()
        self.register_buffer("tokenizer", torch.zeros(tokenizer_bytes, dtype=torch.uint8))
        self.token = nn.Embedding(vocab_size, width)
        self.position = nn.Embedding(length, width)
        self.blocks = nn.ModuleList(
            BasicTransformerBlock(
                width, heads, width // heads, activation_fn="gelu", attention_bias=True
            )
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, query_dim, bias=False)
        self._length, self._pool = length, pool

    def tokenize(self, texts: list[str]) -> Tensor:
        """Token ids (B, length): begin, pieces, end, padding."""
        processor = sentencepiece.SentencePieceProcessor()
        processor.LoadFromSerializedProto(self.tokenizer.cpu().numpy().tobytes())
        rows = []
        for pieces in processor.Encode(texts):
            ids = [BEGIN, *pieces[: self._length - 2], END]
            rows.append(ids + [PAD] * (self._length - len(ids)))
        return torch.tensor(rows, device=self.token.weight.device)

    def forward(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """The condition c (B, length, width) and the query e (B, query_dim), unit rows."""
        tokens = self.tokenize(texts)
        mask = tokens != PAD
        h = self.token(tokens) + self.position.weight
        bias = torch.zeros_like(tokens, dtype=h.dtype).masked_fill(~mask, float("-inf"))[:, None]
        for block in self.blocks:
            h = block(h, bias)
        c = self.norm(h)
        if self._pool == "mean":
            seen = mask[..., None].to(c.dtype)
            pooled = (c * seen).sum(1) / seen.sum(1)
        else:
            pooled = c[torch.arange(len(c), device=c.device), mask.sum(1) - 1]  # the end token
        e = self.query(pooled)
        return c, nn.functional.normalize(e.float(), dim=-1)
