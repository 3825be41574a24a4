"""Text to token ids by sentencepiece, or as a pretrained text encoder has it; identified by the
hash of its files, which travel with the weights."""

import io
from collections.abc import Iterable, Sequence
from pathlib import Path

import sentencepiece
import torch
from torch import Tensor

from pretrain import storage
from pretrain.data.pretrained_tokenizer import PretrainedTokenizer, is_one
from pretrain.errors import DataError, TokenizerMismatch

PAD, UNKNOWN, BEGIN, END = 0, 1, 2, 3


class Tokenizer:
    """A sentencepiece model, ids ``[begin] pieces [end] pad…``; or one of transformers, whose ids
    are as its text encoder was trained with.

    Args:
        path: local file or URL of the ``.model``; or a folder of transformers' files.

    Attributes:
        pretrained: the tokenizer of transformers, where it is one.

    Raises:
        DataError: it is missing, not sentencepiece's, or has other special ids.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.pretrained = PretrainedTokenizer(path) if is_one(path) else None
        if self.pretrained is not None:
            self.sha256 = self.pretrained.sha256
            return
        try:
            data = storage.read_bytes(path)
        except FileNotFoundError:
            raise DataError(
                f"tokenizer={path!r} does not exist; train one with `python -m pretrain tokenizer "
                "train --data "
                f"MANIFEST --out {path}`"
            ) from None
        self.sha256 = storage.sha256_bytes(data)
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(data)
        except RuntimeError as error:
            raise DataError(f"tokenizer={path!r} is not a sentencepiece model ({error})") from None
        p = self._processor
        if (p.pad_id(), p.unk_id(), p.bos_id(), p.eos_id()) != (PAD, UNKNOWN, BEGIN, END):
            raise DataError(
                f"tokenizer={path!r} has special ids other than pad 0, unk 1, bos 2, eos 3; train "
                "it anew"
            )

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        if self.pretrained is not None:
            return self.pretrained.vocab_size
        return int(self._processor.GetPieceSize())

    def encode(self, texts: Sequence[str], length: int) -> tuple[Tensor, Tensor]:
        """Token ids (B, length) int64 and mask (B, length) bool; a longer text is cut, its end
        token kept."""
        if self.pretrained is not None:
            return self.pretrained.encode(texts, length)
        rows = []
        # (More threads than one are made anew at each call: it costs more than a batch's captions.)
        for pieces in self._processor.Encode(list(texts), num_threads=1):
            ids = [BEGIN, *pieces[: length - 2], END]
            rows.append(ids + [PAD] * (length - len(ids)))
        tokens = torch.tensor(rows, dtype=torch.long).reshape(len(rows), length)
        return tokens, tokens != PAD

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids."""
        if self.pretrained is not None:
            return self.pretrained.decode(ids)
        return str(self._processor.Decode([int(i) for i in ids]))

    def save(self, folder: Path) -> None:
        """Put its files into a model's folder, for `of_model`."""
        if self.pretrained is None:
            storage.write_bytes(str(folder / "tokenizer.model"), storage.read_bytes(self.path))
            return
        for name in self.pretrained.files:
            data = (self.pretrained.folder / name).read_bytes()
            storage.write_bytes(str(folder / "tokenizer" / name), data)

    @classmethod
    def of_model(cls, folder: Path) -> "Tokenizer":
        """The one that `save` left in a model's folder."""
        pretrained = folder / "tokenizer"
        return cls(str(pretrained if pretrained.is_dir() else folder / "tokenizer.model"))

    def check(self, expected_sha256: str) -> None:
        """Refuse to go on with weights of another tokenizer.

        Raises:
            TokenizerMismatch: the hashes differ.
        """
        if self.sha256 != expected_sha256:
            raise TokenizerMismatch(
                f"data.tokenizer has sha256 {self.sha256[:16]}…, the weights were trained with "
                f"{expected_sha256[:16]}…; every token id would mean another text: give the "
                "tokenizer that was "
                "saved beside the weights, or start with a new output"
            )


def train(texts: Iterable[str], path: str | Path, vocab_size: int) -> str:
    """Train a unigram model on ``texts`` and write it; the same texts give the same bytes.

    Returns:
        Its SHA-256.

    Raises:
        DataError: the texts are too few for the vocabulary.
    """
    stream = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=iter(texts),
            model_writer=stream,
            model_type="unigram",
            vocab_size=vocab_size,
            pad_id=PAD,
            unk_id=UNKNOWN,
            bos_id=BEGIN,
            eos_id=END,
            normalization_rule_name="nmt_nfkc_cf",  # lower case
            character_coverage=1.0,
            num_threads=1,  # the order of sums, and so the bytes, depend on it
            minloglevel=2,
        )
    except RuntimeError as error:
        raise DataError(
            f"vocab_size={vocab_size} cannot be trained on these texts ({error}); lower it"
        ) from None
    storage.write_bytes(str(path), stream.getvalue())
    return storage.sha256_bytes(stream.getvalue())
