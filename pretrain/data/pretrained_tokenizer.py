"""A tokenizer of the transformers library (CLIP's, T5's, XLM-R's) from its folder."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain import hub, storage
from pretrain.errors import DataError

# What decides its ids, of the files that such folders hold.
FILES = (
    "added_tokens.json",
    "config.json",
    "merges.txt",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
)


def is_one(path: str) -> bool:
    """Whether ``path`` is a folder, or OWNER/NAME[/SUBFOLDER] of the hub, and not a file or URL."""
    if Path(path).is_dir():
        return True
    unlike_file = "://" not in path and not path.startswith(("/", ".")) and "/" in path
    return unlike_file and not Path(path).exists() and not path.endswith((".model", ".json"))


class PretrainedTokenizer:
    """Ids as the library makes them, special tokens and padding included.

    Raises:
        DataError: the folder holds no tokenizer.
        ConfigError: the hub does not give it.
    """

    def __init__(self, path: str) -> None:
        if Path(path).is_dir():
            self.folder = Path(path)
        else:
            owner, name, *below = path.split("/")
            self.folder = hub.folder("data.tokenizer", f"{owner}/{name}", "/".join(below) or None)
        parts = [
            f"{name} {storage.sha256_bytes((self.folder / name).read_bytes())}"
            for name in self.files
        ]
        self.sha256 = storage.sha256_bytes("\n".join(parts).encode())
        # Its own threads after a fork of ours: it would warn, and switch them off.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        self._theirs: Any = self._load()

    @property
    def files(self) -> list[str]:
        """Names of its files in the folder."""
        return [name for name in FILES if (self.folder / name).is_file()]

    @property
    def vocab_size(self) -> int:
        """Number of token ids, special ones included."""
        return len(self._theirs)

    def encode(self, texts: Sequence[str], length: int) -> tuple[Tensor, Tensor]:
        """As `Tokenizer.encode`."""
        found = self._theirs(list(texts), padding="max_length", truncation=True, max_length=length)
        tokens = torch.tensor(found["input_ids"], dtype=torch.long).reshape(len(texts), length)
        mask = torch.tensor(found["attention_mask"], dtype=torch.bool).reshape(len(texts), length)
        return tokens, mask

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids."""
        return str(self._theirs.decode([int(i) for i in ids], skip_special_tokens=True))

    def _load(self) -> Any:
        from transformers import AutoTokenizer

        try:
            found = AutoTokenizer.from_pretrained(self.folder, local_files_only=True)
        except Exception as error:  # of many kinds, by what is missing
            why = (str(error).splitlines() or [type(error).__name__])[0]
            raise DataError(
                f"data.tokenizer={str(self.folder)!r} holds no tokenizer of transformers ({why}); "
                f"it has {', '.join(self.files) or 'none of its files'}. Give the folder "
                "`tokenizer` of a diffusers folder, or a sentencepiece .model file"
            ) from None
        if found.pad_token_id is None:
            raise DataError(
                f"data.tokenizer={str(self.folder)!r} has no padding token; add pad_token to its "
                "tokenizer_config.json"
            )
        return found
