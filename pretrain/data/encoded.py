"""Samples whose pictures, and captions if wanted, were put through frozen encoders beforehand.

A sample's files in a shard, K captions of L tokens:
    KEY.latent.npy      (C, H, W) of the picture, uncropped sides cut at the centre
    KEY.mirrored.npy    (C, H, W) of the mirrored picture, if it was asked for
    KEY.c.npy           (K, L, D) token-wise conditions, with text
    KEY.e.npy           (K, E) global queries, fp32, with text
    KEY.mask.npy        (K, L) bool, True at real tokens, with text; for readers without tokenizer
    KEY.json            the source's fields, `captions`, and `encoding`: what made the above
"""

import io
import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pretrain.data.manifest import Manifest
from pretrain.data.reader import ReadConfig, ShardReader
from pretrain.data.samples import Refused, captions_of, choose_caption
from pretrain.data.shards import RawSample
from pretrain.errors import ConfigError, DataError
from pretrain.rng import derive_seed
from pretrain.types import TextFeatures

Array = npt.NDArray[Any]
Dtype = Literal["fp16", "fp32"]
# No bf16: numpy has none, and latents of about unit scale need fp16's mantissa, not its range.
DTYPES: dict[str, np.dtype[Any]] = {"fp16": np.dtype("<f2"), "fp32": np.dtype("<f4")}
REMEDY = "encode the pictures again (`python -m pretrain data encode`)"


@dataclass(frozen=True)
class TextEncoding:
    """What made the text features.

    Attributes:
        encoder: hash of the text encoder.
        length, width, query_dim: L, D and E.
    """

    encoder: str
    length: int
    width: int
    query_dim: int


@dataclass(frozen=True)
class Encoding:
    """What made the files of a sample; a shard's samples all have the same.

    Attributes:
        autoencoder: hash of the autoencoder.
        latent: (C, H, W).
        dtype: of the latents and of c.
        size: pixels on a side of the pictures that were encoded.
        crop: how they were cut to it.
        mirrored: whether there are latents of the mirrored pictures.
        text: of the text features; None where there are none.
    """

    autoencoder: str
    latent: tuple[int, int, int]
    dtype: Dtype
    size: int
    crop: Literal["center"] = "center"
    mirrored: bool = False
    text: TextEncoding | None = None

    def tree(self) -> dict[str, Any]:
        """As it stands in a sample's json."""
        return {**asdict(self), "latent": list(self.latent)}

    @classmethod
    def of_tree(cls, tree: Any) -> "Encoding":
        """From `tree`.

        Raises:
            ValueError: it is none.
        """
        names = {f.name for f in fields(cls)}
        if not isinstance(tree, dict) or tree.keys() != names or tree["dtype"] not in DTYPES:
            raise ValueError("no field `encoding` that this version reads")
        try:
            text = None if tree["text"] is None else TextEncoding(**tree["text"])
            channels, height, width = map(int, tree["latent"])
        except (TypeError, ValueError):
            raise ValueError("its field `encoding` is damaged") from None
        return cls(**{**tree, "latent": (channels, height, width), "text": text})


class Wanted(Protocol):
    """What of the data's configuration matters here."""

    @property
    def size(self) -> int: ...

    @property
    def tokens(self) -> int: ...

    @property
    def flip(self) -> float: ...

    @property
    def encoded_text(self) -> bool: ...


@dataclass(frozen=True)
class Features:
    """What a sample's files hold of it.

    Attributes:
        caption: the one that was chosen.
        latent_CHW: as stored, of the picture or of its mirror image.
        text: features of ``caption``, c (L, D) and e (E,); None unless they were asked for.
    """

    caption: str
    latent_CHW: Tensor
    text: TextFeatures | None = None


def pack(
    fields: Mapping[str, Any],
    captions: list[str],
    encoding: Encoding,
    latents: Mapping[str, Array],
    text: Mapping[str, Array],
) -> dict[str, bytes]:
    """A sample's files by extension; equal arguments give equal bytes.

    Args:
        fields: of the source's json.
        captions: in the order of the rows of ``text``.
        encoding: what made the arrays.
        latents: ``latent``, and ``mirrored`` if there is one.
        text: ``c``, ``e`` and ``mask``, or nothing.
    """
    tree = {**fields, "captions": captions, "encoding": encoding.tree()}
    files = {"json": json.dumps(tree).encode()}
    for name, array in {**latents, **text}.items():
        stream = io.BytesIO()
        np.save(stream, array, allow_pickle=False)
        files[f"{name}.npy"] = stream.getvalue()
    return files


def unpack(raw: RawSample, encoding: Encoding, wanted: Wanted, seed: int, number: int) -> Features:
    """What training takes of a sample: a latent and a caption, chosen by its number as of a
    picture.

    Raises:
        Refused: a file is missing or damaged.
        DataError: the sample was made by other encoders than ``encoding``.
    """
    captions = captions_of(raw)
    found = json.loads(raw.files["json"]).get("encoding") if "json" in raw.files else None
    if found != encoding.tree():
        raise DataError(
            f"{raw.shard}:{raw.key} has encoding={_short(found)}, the first sample of its data set "
            f"has {_short(encoding.tree())}; keep what other encoders made in a data set of its "
            f"own, or {REMEDY}"
        )
    name = "mirrored" if is_mirrored(wanted.flip, seed, number) else "latent"
    dtype = DTYPES[encoding.dtype]
    latent = _array(raw, name, dtype, encoding.latent)
    caption = choose_caption(captions, seed, number)
    if not wanted.encoded_text:
        return Features(caption, latent)
    t = encoding.text
    assert t is not None  # `check` has said so
    row, count = captions.index(caption), len(captions)
    c = _array(raw, "c", dtype, (count, t.length, t.width), row)
    e = _array(raw, "e", np.dtype("<f4"), (count, t.query_dim), row)
    return Features(caption, latent, TextFeatures(c, e))


def stack(features: Sequence[Features]) -> tuple[Tensor | None, TextFeatures | None]:
    """Latents (B, C, H, W) and text features of a batch; None of what it has none of."""
    if not features:
        return None, None
    latents = torch.stack([f.latent_CHW for f in features])
    texts = [f.text for f in features if f.text is not None]
    if not texts:
        return latents, None
    c, e = torch.stack([t.c_BLD for t in texts]), torch.stack([t.e_BE for t in texts])
    return latents, TextFeatures(c, e)


def is_mirrored(flip: float, seed: int, number: int) -> bool:
    """Whether `samples.augment` would mirror the picture of this number."""
    return bool(flip) and random.Random(derive_seed(seed, number, "augment")).random() < flip


def read_encoding(manifest: Manifest, config: ReadConfig) -> Encoding:
    """What made a data set, by its first sample.

    Raises:
        DataError: it holds pictures, or cannot be read.
    """
    # One request: no shard is fetched whole before training starts.
    reader = ShardReader([manifest], config.model_copy(update={"access": "ranged"}))
    try:
        shard = int(np.flatnonzero(manifest.sizes)[0])
        raw, _ = reader.read(0, shard, 0)
    finally:
        reader.close()
    try:
        return Encoding.of_tree(json.loads(raw.files["json"])["encoding"] if raw else None)
    except (LookupError, TypeError, ValueError):
        raise DataError(
            f"data.encoded=true, but shard={manifest.url(shard)!r} does not begin with an encoded "
            "sample; give the manifest that `python -m pretrain data encode` wrote, or set "
            "data.encoded: false"
        ) from None


def check(encodings: Sequence[Encoding], wanted: Wanted) -> None:
    """Refuse data sets that are not what the configuration's fields ask for.

    Raises:
        ConfigError: it names the field.
    """
    size, tokens, flip, text = wanted.size, wanted.tokens, wanted.flip, wanted.encoded_text
    for number, found in enumerate(encodings):
        where = f"data set {number} of data.train"
        if found.size != size:
            raise ConfigError(
                f"data.size={size}, but the pictures of {where} were encoded at {found.size}; make "
                f"them equal, or {REMEDY}"
            )
        if flip and not found.mirrored:
            raise ConfigError(
                f"data.flip={flip:g}, but {where} has no latents of mirrored pictures; set "
                "data.flip: 0, or encode with --flip"
            )
        if text and found.text is None:
            raise ConfigError(
                f"data.encoded_text=true, but {where} has no text features; set it to false, or "
                "encode with --text"
            )
        if text and found.text is not None and found.text.length != tokens:
            raise ConfigError(
                f"data.tokens={tokens}, but the captions of {where} were encoded at "
                f"{found.text.length}; make them equal, or {REMEDY}"
            )
    shapes = {(found.latent, found.dtype) for found in encodings}
    if len(shapes) > 1:
        raise ConfigError(
            f"data.train mixes latents of {sorted(shapes)}; a batch has one shape and type: encode "
            "them alike"
        )


def _array(
    raw: RawSample, name: str, dtype: np.dtype[Any], shape: tuple[int, ...], row: int | None = None
) -> Tensor:
    """An array of known type and shape, or one row of it; only that is copied.

    Raises:
        Refused: the file is missing or of another type, shape or length.
    """
    data = raw.files.get(f"{name}.npy")
    if data is None:
        raise Refused("no image")
    header = _header(dtype.str, shape)
    # Compared, not parsed: nothing is allocated that a damaged header asks for.
    if (
        len(data) != len(header) + dtype.itemsize * math.prod(shape)
        or data[: len(header)] != header
    ):
        raise Refused("undecodable image")
    array = np.frombuffer(data, dtype, offset=len(header)).reshape(shape)
    return torch.from_numpy((array if row is None else array[row]).copy())


def _header(dtype: str, shape: tuple[int, ...]) -> bytes:
    """The first bytes of a .npy file as numpy writes them."""
    key = (dtype, shape)
    if key not in _HEADERS:
        stream = io.BytesIO()
        described = {"descr": dtype, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(stream, described)
        _HEADERS[key] = stream.getvalue()
    return _HEADERS[key]


_HEADERS: dict[tuple[str, tuple[int, ...]], bytes] = {}  # few: one a number of captions


def _short(tree: Any) -> str:
    """With hashes cut to what tells them apart."""
    if isinstance(tree, dict):
        return "{" + ", ".join(f"{k}: {_short(v)}" for k, v in tree.items()) + "}"
    return f"{tree[:12]}…" if isinstance(tree, str) and len(tree) == 64 else str(tree)
