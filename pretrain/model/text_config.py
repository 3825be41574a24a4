"""What text encoder a model has: the settings, and what of them is known without opening a file."""

from contextlib import suppress
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from pretrain.config import Config

Precision = Literal["fp32", "bf16", "fp16"]


class TextEncoderConfig(Config):
    """A transformer, trained from scratch with the trunk unless it is frozen.

    Attributes:
        width: D, the width of c.
        query_dim: E, the width of e.
        layers, heads: of the transformer.
        length: most tokens of a text, begin and end tokens included.
        pool: what e is projected from: "end", the end token's feature, as CLIP's; "mean", the mean
            over the text's tokens, which carries its words before any attention is learned.
        frozen_from: folder of an exported model whose text encoder is used as it is; the other
            fields must be its own. None: the encoder is trained.
    """

    kind: Literal["scratch"] = "scratch"
    width: int = Field(192, ge=8)
    query_dim: int = Field(192, ge=4)
    layers: int = Field(3, ge=1)
    heads: int = Field(3, ge=1)
    length: int = Field(24, ge=3)
    pool: Literal["end", "mean"] = "end"
    frozen_from: str | None = None

    @model_validator(mode="after")
    def _heads_divide(self) -> "TextEncoderConfig":
        if self.width % self.heads:
            raise ValueError(
                f"width={self.width} is not a multiple of heads={self.heads}; change one of them"
            )
        return self

    @property
    def frozen(self) -> bool:
        """Whether it lies outside of the engine, as it is."""
        return self.frozen_from is not None


class TransformersTextConfig(Config):
    """A text encoder of the transformers library, from a folder or the hub.

    Attributes:
        model: "clip" (CLIP's and OpenCLIP's text tower, as in Stable Diffusion), "t5" (the encoder
            of T5), or "xlm_r" (XLM-RoBERTa). The two last have sentencepiece tokenizers.
        path, subfolder: a folder, or a hub name that the machine can reach, and where in it the
            encoder lies ("text_encoder" of a diffusers folder). None: weights stand beside the
            model's own, as in an export.
        variant: of the files' names, such as "fp16".
        frozen: outside of the engine, as it is; false trains it with the trunk.
        precision: in which a frozen one is held and computes; one in training has the engine's.
        width: D of c, the encoder's own.
        query: what e is made of. "pooled": of clip the last layer at the end token, of t5 and xlm_r
            the mean over the text's tokens; "projection": clip's text_projection of that; "linear":
            a new layer on it, trained with the encoder.
        query_dim: E of e; with "pooled" it is ``width``.
        length: most tokens of a text (clip: 77).
        settings: fields of the library's own configuration (CLIPTextConfig, T5Config,
            XLMRobertaConfig). Those of the folder are taken where ``path`` is a folder, and must
            agree; they are needed to plan a run whose files are not here.
    """

    kind: Literal["transformers"] = "transformers"
    model: Literal["clip", "t5", "xlm_r"]
    path: str | None = None
    subfolder: str | None = None
    variant: str | None = None
    frozen: bool = True
    precision: Precision = "fp32"
    width: int = Field(768, ge=1)
    query: Literal["pooled", "projection", "linear"] = "pooled"
    query_dim: int = Field(768, ge=1)
    length: int = Field(77, ge=3)
    settings: dict[str, Any] = Field(default_factory=dict)

    @field_validator("settings")
    @classmethod
    def _numbers(cls, settings: dict[str, Any]) -> dict[str, Any]:
        """YAML 1.1 reads 1e-05 (no dot), which JSON writes, as text."""
        return {name: _number(value) for name, value in settings.items()}

    @model_validator(mode="after")
    def _consistent(self) -> "TransformersTextConfig":
        if self.query == "pooled" and self.query_dim != self.width:
            raise ValueError(
                f"query_dim={self.query_dim} and width={self.width} differ, and query is 'pooled', "
                "which changes no width; make them equal, or set query: linear"
            )
        if self.query == "linear" and self.frozen:
            raise ValueError(
                "query='linear' is a layer that is trained with the encoder, and frozen is true; "
                "set query: pooled, or frozen: false"
            )
        if self.query == "projection" and self.model != "clip":
            raise ValueError(
                f"query='projection' is clip's, and model is {self.model!r}; set query: pooled"
            )
        if self.frozen and self.path is None:
            raise ValueError(
                "path is not given, and frozen is true: an encoder that nothing has trained would "
                "stay so; give a folder or a hub name, or set frozen: false"
            )
        if not self.frozen and self.precision != "fp32":
            raise ValueError(
                f"precision={self.precision!r} is of a frozen encoder; one in training has "
                "engine.precision: remove it"
            )
        return self


def _number(value: Any) -> Any:
    if isinstance(value, str) and value[:1].isdigit():
        with suppress(ValueError):
            return float(value)
    return value


AnyTextConfig = Annotated[TextEncoderConfig | TransformersTextConfig, Field(discriminator="kind")]


def with_kind(tree: Any) -> Any:
    """A mapping without ``kind`` is of "scratch", the only kind there once was."""
    if isinstance(tree, dict) and "kind" not in tree:
        return {"kind": "scratch", **tree}
    return tree
