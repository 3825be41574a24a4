"""Text encoders of the transformers library: CLIP's and OpenCLIP's text tower, T5's encoder, XLM-R.

In training they are modules like ours; frozen they are none, and hold their own precision.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain import hub
from pretrain.errors import ConfigError
from pretrain.model.identity import digest
from pretrain.model.text_config import TransformersTextConfig
from pretrain.types import TextFeatures

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FIELD = "model.text_encoder"
# Of a configuration file: what says nothing of the network's function.
_ASIDE = {
    *("architectures", "dtype", "torch_dtype", "model_type", "transformers_version"),
    *("_name_or_path", "use_cache", "tie_word_embeddings", "task_specific_params"),
}


def shape(config: TransformersTextConfig) -> Any:
    """The library's own configuration: of the folder where ``path`` is one of this machine, else of
    ``settings``; without any, of what the hub gives.

    Raises:
        ConfigError: the folder has none, or another than ``settings`` or ``width``; or a setting is
            not known.
    """
    cls = _classes(config)[0]
    known = cls()
    for name in config.settings:
        if not hasattr(known, name):
            raise ConfigError(
                f"{FIELD}.settings.{name}={config.settings[name]!r}: {cls.__name__} has no such "
                "field; see its documentation for their names"
            )
    here = config.path is not None and Path(config.path).is_dir()
    if config.path is None and not config.settings:
        raise ConfigError(
            f"{FIELD}.path is not given, and settings is empty: the encoder's shape is not known; "
            "give a folder, or the fields of its config.json as settings"
        )
    if here or not config.settings:
        found = _read(cls, config)
        for name, value in config.settings.items():
            own = getattr(found, name)
            if own != value and list(_listed(own)) != list(_listed(value)):
                raise ConfigError(
                    f"{FIELD}.settings.{name}={value!r}, but the encoder in path={config.path!r} "
                    f"has {own!r}; make them equal, or remove the setting"
                )
    else:
        found = cls(**config.settings)
    width = found.d_model if config.model == "t5" else found.hidden_size
    if width != config.width:
        where = "settings" if config.path is None else f"path={config.path!r}"
        raise ConfigError(
            f"{FIELD}.width={config.width}, but the encoder of {where} has {width}; set width: "
            f"{width}"
        )
    if config.model == "clip" and config.length > found.max_position_embeddings:
        raise ConfigError(
            f"{FIELD}.length={config.length} is more than the {found.max_position_embeddings} "
            "places that the encoder has; lower it, and data.tokens"
        )
    if config.query == "projection" and found.projection_dim != config.query_dim:
        raise ConfigError(
            f"{FIELD}.query_dim={config.query_dim}, but the encoder's projection_dim is "
            f"{found.projection_dim}; set query_dim: {found.projection_dim}"
        )
    return found


def settings_of(found: Any) -> dict[str, Any]:
    """What of the library's configuration differs from its defaults, and is of the network."""
    return {k: v for k, v in found.to_diff_dict().items() if k not in _ASIDE}


class TransformersTextEncoder(nn.Module):
    """Features of an encoder of transformers, under its own parameter names below ``encoder``.

    Args:
        config: its settings.
        own: the library's configuration, from `shape`.
        encoder: the network; None makes one anew.
    """

    def __init__(
        self, config: TransformersTextConfig, own: Any, encoder: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.kind, self.config, self.settings = config.model, own, config
        self.encoder: Any = _new(config, own) if encoder is None else encoder
        if self.kind == "clip":
            tower = self.tower
            tower.embeddings = _ClipEmbeddings(tower.embeddings)
        elif self.kind == "t5":
            # Tied to `shared`, which is what is called here: one name for one tensor.
            stack: Any = self.encoder.encoder
            stack.embed_tokens = None
        self.projects = config.query == "projection"
        self.query = (
            nn.Linear(config.width, config.query_dim, bias=False)
            if config.query == "linear"
            else None
        )

    def portable(self) -> TransformersTextConfig:
        """The settings of this encoder where its weights stand beside the model's own."""
        return self.settings.model_copy(
            update={
                **dict.fromkeys(("path", "subfolder", "variant")),
                **{"frozen": False, "precision": "fp32"},
                "settings": settings_of(self.config),
            }
        )

    @property
    def tower(self) -> Any:
        """CLIP's text transformer itself, with or without a projection around it."""
        return getattr(self.encoder, "text_model", self.encoder)

    @property
    def vocab_size(self) -> int:
        """Token ids that it knows."""
        return int(self.config.vocab_size)

    def train(self, mode: bool = True) -> "TransformersTextEncoder":
        """As of any module, but without the encoder's dropout: it would draw from a generator of
        the process, and no draw here depends on anything but the sample."""
        super().train(mode)
        self.encoder.eval()
        return self

    def forward(self, tokens_BL: Tensor, mask_BL: Tensor) -> TextFeatures:
        """Features of tokens. T5 and XLM-R do not attend to padding; CLIP does not see behind a
        token at all, and pads with tokens (Stable Diffusion's U-Net reads all of them)."""
        if self.kind == "clip":
            c_BLD = self.tower(input_ids=tokens_BL).last_hidden_state
            last_B = mask_BL.sum(1) - 1  # the end token
            pooled_BD = c_BLD[torch.arange(len(c_BLD), device=c_BLD.device), last_B]
        else:
            mask = mask_BL.long()
            if self.kind == "t5":
                embedded = self.encoder.shared(tokens_BL)
                found = self.encoder.encoder(inputs_embeds=embedded, attention_mask=mask)
            else:
                found = self.encoder(input_ids=tokens_BL, attention_mask=mask)
            c_BLD = found.last_hidden_state
            weight_BL1 = mask_BL[..., None].to(c_BLD.dtype)
            pooled_BD = (c_BLD * weight_BL1).sum(1) / weight_BL1.sum(1)
        if self.projects:
            pooled_BD = self.encoder.text_projection(pooled_BD)
        if self.query is not None:
            pooled_BD = self.query(pooled_BD)
        return TextFeatures(c_BLD, F.normalize(pooled_BD.float(), dim=-1))


def plain_tower(encoder: TransformersTextEncoder) -> Any:
    """The library's own network with the weights of ``encoder``, without what makes the query e of
    its features: what diffusers' pipelines hold."""
    config = encoder.settings.model_copy(update={"query": "pooled"})
    made = _new(config, encoder.config)
    state = encoder.tower.state_dict() if encoder.kind == "clip" else encoder.encoder.state_dict()
    made.load_state_dict(state, strict=encoder.kind != "t5")  # (t5's second name of one tensor)
    return made.eval()


class _ClipEmbeddings(nn.Module):
    """CLIPTextEmbeddings under its names. Theirs compares the text's length with the number of rows
    of the position table, which under ZeRO-3 is 0 outside of the table's own forward pass."""

    def __init__(self, theirs: Any) -> None:
        super().__init__()
        self.token_embedding = theirs.token_embedding
        self.position_embedding = theirs.position_embedding

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """(B, L, D)."""
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)
        embedded: Tensor = self.token_embedding(input_ids) + self.position_embedding(position_ids)
        return embedded


class FrozenTransformers:
    """A pretrained encoder as it is. Not a module: it must be neither partitioned nor optimised nor
    saved. (Its weights go into the export of the model that was trained with it.)

    Raises:
        ConfigError: its folder lacks files or tensors, or is of another shape.
    """

    def __init__(self, config: TransformersTextConfig) -> None:
        assert config.path is not None
        self.config = config
        self.folder = hub.folder(f"{FIELD}.path", config.path, config.subfolder, config.variant)
        own = shape(config.model_copy(update={"path": str(self.folder), "subfolder": None}))
        _, cls, more = _classes(config)
        from transformers.utils import logging

        logging.disable_progress_bar()
        try:
            encoder, found = cls.from_pretrained(
                self.folder,
                variant=config.variant,
                dtype=DTYPES[config.precision],
                local_files_only=True,
                output_loading_info=True,
                **more,
            )
        except (OSError, ValueError, RuntimeError) as error:
            why = (str(error).splitlines() or [type(error).__name__])[0]
            raise ConfigError(
                f"{FIELD}.path={str(self.folder)!r} cannot be loaded as a {cls.__name__} ({why}); "
                f"give a folder of one, or set {FIELD}.model to what it is"
            ) from None
        if found["missing_keys"]:
            names = sorted(found["missing_keys"])
            raise ConfigError(
                f"{FIELD}.path={str(self.folder)!r} lacks {len(names)} tensors of a "
                f"{cls.__name__} ({', '.join(names[:3])}); set {FIELD}.model to what it is"
            )
        self.encoder = TransformersTextEncoder(config, own, encoder).eval().requires_grad_(False)

    @property
    def sha256(self) -> str:
        """Of all that decides its features but the tokenizer."""
        fields = {"model": self.config.model, "query": self.config.query}
        return digest({**fields, **settings_of(self.encoder.config)}, self.encoder.state_dict())

    def parameters(self) -> Iterator[nn.Parameter]:
        """None of which needs a gradient."""
        return self.encoder.parameters()

    def portable(self) -> TransformersTextConfig:
        """As `TransformersTextEncoder.portable`."""
        return self.encoder.portable()

    def check_tokenizer(self, tokenizer: Any) -> None:
        """Refuse a tokenizer whose ids it cannot take."""
        check_vocabulary(self.encoder, tokenizer.vocab_size)

    @torch.no_grad()
    def __call__(self, tokens_BL: Tensor, mask_BL: Tensor) -> TextFeatures:
        """As `TransformersTextEncoder`."""
        features: TextFeatures = self.encoder.to(tokens_BL.device)(tokens_BL, mask_BL)
        return features


def check_vocabulary(encoder: TransformersTextEncoder, vocab_size: int) -> None:
    """That every id of a tokenizer has a row in the encoder's table.

    Raises:
        ConfigError: it has not.
    """
    if vocab_size > encoder.vocab_size:
        raise ConfigError(
            f"data.tokenizer has {vocab_size} ids, {FIELD} knows {encoder.vocab_size}; give the "
            "tokenizer of its own folder"
        )


def build(
    config: TransformersTextConfig, vocab_size: int
) -> TransformersTextEncoder | FrozenTransformers:
    """The encoder of ``config``: the frozen one of a folder, or a new one, whose weights are read
    when the run starts.

    Raises:
        ConfigError: as `shape` and `FrozenTransformers`; or the tokenizer has more ids.
    """
    if config.frozen:
        frozen = FrozenTransformers(config)
        check_vocabulary(frozen.encoder, vocab_size)
        return frozen
    if config.path is not None:
        path = hub.folder(f"{FIELD}.path", config.path, config.subfolder, config.variant)
        config = config.model_copy(update={"path": str(path), "subfolder": None})
    made = TransformersTextEncoder(config, shape(config))
    check_vocabulary(made, vocab_size)
    return made


def _new(config: TransformersTextConfig, own: Any) -> nn.Module:
    _, cls, more = _classes(config)
    made: nn.Module = cls(own, **more)
    return made


def _classes(config: TransformersTextConfig) -> tuple[Any, Any, dict[str, Any]]:
    """The library's configuration, its network, and further arguments of that."""
    import transformers as t

    if config.model == "t5":
        return t.T5Config, t.T5EncoderModel, {}
    if config.model == "xlm_r":
        return t.XLMRobertaConfig, t.XLMRobertaModel, {"add_pooling_layer": False}
    projects = config.query == "projection"
    return t.CLIPTextConfig, t.CLIPTextModelWithProjection if projects else t.CLIPTextModel, {}


def _read(cls: Any, config: TransformersTextConfig) -> Any:
    folder = hub.folder(f"{FIELD}.path", str(config.path), config.subfolder)
    file = folder / "config.json"
    if not file.is_file():
        raise ConfigError(
            f"{FIELD}.path={str(folder)!r} has no config.json; give the folder of an encoder, with "
            'its subfolder ("text_encoder" of a diffusers folder)'
        )
    return cls.from_pretrained(folder, local_files_only=True)


def _listed(value: Any) -> Any:
    return value if isinstance(value, list | tuple) else [value]
