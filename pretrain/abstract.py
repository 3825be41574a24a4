"""The task of a run on the meta device: every shape and type, no storage. So it can be counted and
measured before anything is held."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.model.autoencoder import DiffusersConfig, SpaceToDepth, SpaceToDepthConfig
from pretrain.model.diffdis import DiffDis
from pretrain.model.recompute import set_recompute
from pretrain.model.text_config import TextEncoderConfig, TransformersTextConfig
from pretrain.model.text_encoder import FrozenTextEncoder
from pretrain.model.transformers_text import TransformersTextEncoder, shape
from pretrain.optim import freeze
from pretrain.run_config import RunConfig
from pretrain.task import PretrainTask, check_objectives
from pretrain.types import Batch, TextFeatures

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class _Assumed(SpaceToDepth):
    """A stand-in of the right shape for an autoencoder whose files are not opened."""

    def __init__(self, config: DiffusersConfig) -> None:
        self.factor, self.channels = config.factor, config.channels


class AbstractRun:
    """A run's task without storage.

    Attributes:
        task: the task in the run's precision, with what the run freezes frozen. A frozen text
            encoder of an exported model is a part of it here, of no weight that is trained.
        text_frozen: whether no parameter of the text encoder is trained.

    Args:
        vocab_size: of the run's tokenizer; a text encoder of transformers tells its own.

    Raises:
        ConfigError: a prefix in optimizer.freeze names nothing; model.text_encoder.frozen_from
            holds no such encoder, or the shape of one of transformers is not known.
    """

    def __init__(self, config: RunConfig, vocab_size: int) -> None:
        self.config = config
        model, text = config.model, config.model.text_encoder
        if isinstance(text, TextEncoderConfig) and text.frozen_from is not None:
            FrozenTextEncoder(text.frozen_from).check(text, vocab_size)
            text = text.model_copy(update={"frozen_from": None})
            model = model.model_copy(update={"text_encoder": text})
        assumed = None
        if isinstance(model.autoencoder, DiffusersConfig):
            assumed = _Assumed(model.autoencoder)
        with torch.device("meta"):
            foreign = None
            if isinstance(text, TransformersTextConfig):
                foreign = TransformersTextEncoder(text, shape(text))
            net = DiffDis(
                model,
                vocab_size,
                torch.zeros(text.length, dtype=torch.long),
                torch.zeros(text.length, dtype=torch.bool),
                autoencoder=assumed,
                text_encoder=foreign,
            )
            objectives = check_objectives(config.objectives)
            self.task = PretrainTask(net, objectives, config.task, config.seed)
        self.task.to(DTYPES[config.engine.precision])
        set_recompute(self.task, config.engine.activation_checkpointing)
        encoder = net.text_encoder
        assert isinstance(encoder, nn.Module)
        if config.model.text_encoder.frozen:
            encoder.requires_grad_(False)
        freeze(self.task, config.optimizer.freeze)
        self.text_frozen = not any(p.requires_grad for p in encoder.parameters())

    def batch(self, n: int) -> Batch:
        """A batch of ``n`` samples as the run's loader would give it."""
        model, text = self.config.model, self.config.model.text_encoder
        pixels, latents, encoded = model.image_size, None, None
        with torch.device("meta"):
            if not isinstance(model.autoencoder, SpaceToDepthConfig):
                pixels, latents = 0, torch.zeros(n, *self.task.model.latent_shape)
            if self.config.data.encoded_text:
                encoded = TextFeatures(
                    torch.zeros(n, text.length, text.width), torch.zeros(n, text.query_dim)
                )
            return Batch(
                torch.zeros(n, 3, pixels, pixels, dtype=torch.uint8),
                torch.zeros(n, text.length, dtype=torch.long),
                torch.ones(n, text.length, dtype=torch.bool),
                torch.arange(n, device="cpu"),  # the draws for a sample are seeded by its number
                latents_BCHW=latents,
                text=encoded,
            )


@contextmanager
def fused_attention(note: Callable[[int, int], None] | None = None) -> Iterator[None]:
    """Attention keeps what a fused kernel keeps, which CPU and CUDA run: its inputs, its output and
    a number a row. (The meta device has no such kernel; it would keep whole attention matrices.)

    Args:
        note: is told (operations, bytes) of each forward and each backward pass. A fused backward
            pass computes the matrix of attention again: 2.5 times the operations of the forward.
    """

    def attend(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **_: Any
    ) -> Any:
        return _FusedAttention.apply(query, key, value, attn_mask, note)

    with mock.patch.object(F, "scaled_dot_product_attention", attend):
        yield


class _FusedAttention(torch.autograd.Function):
    """The shapes of fused attention; its numbers mean nothing."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        note: Callable[[int, int], None] | None,
    ) -> Tensor:
        # The kernels write (batch, tokens, heads, width) and return it transposed.
        result = torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format)
        rows = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, mask, result, rows)
        ctx.note, ctx.flops = note, 4 * query.numel() * key.shape[-2]
        ctx.nbytes = 2 * query.nbytes + key.nbytes + value.nbytes
        if note is not None:
            note(ctx.flops, ctx.nbytes)
        return result.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        query, key, value, *_rest = ctx.saved_tensors
        if ctx.note is not None:
            ctx.note(ctx.flops * 5 // 2, 2 * ctx.nbytes)
        return (
            torch.empty_like(query),
            torch.empty_like(key),
            torch.empty_like(value),
            None,
            None,
        )
