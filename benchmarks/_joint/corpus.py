"""The study corpus on this machine: where its files are, and what tells it from another."""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

SETS = ("vendor", "concepts")


@dataclass(frozen=True)
class Corpus:
    """Folder that `python -m pretrain data study` made, with a tokenizer beside."""

    folder: Path

    @classmethod
    def default(cls) -> "Corpus":
        """Where the command puts it."""
        from pretrain.data.study import default_out

        return cls(default_out())

    @property
    def train(self) -> Path:
        """Manifest of the training shards."""
        return self.folder / "train.json"

    @property
    def tokenizer(self) -> Path:
        """Trained on the training shards' captions."""
        return self.folder / "tokenizer.model"

    @property
    def heldout(self) -> dict[str, str]:
        """Manifests of the held-out sets by name."""
        return {name: str(self.folder / f"heldout-{name}.json") for name in SETS}

    @cached_property
    def fingerprint(self) -> str:
        """Of shards and tokenizer: the same wherever the same was built."""
        digest = hashlib.sha256(self.tokenizer.read_bytes())
        for path in (self.train, *map(Path, self.heldout.values())):
            shards = json.loads(path.read_text())["shards"]
            digest.update(json.dumps([shards["sha256"], shards["samples"]]).encode())
        return digest.hexdigest()[:16]

    def missing(self) -> list[str]:
        """Commands that make what is not there yet, and fetch the features that KID needs."""
        from pretrain.features import _keras

        commands = []
        files = [self.train, *map(Path, self.heldout.values())]
        if not all(path.exists() for path in files):
            commands.append(f"python -m pretrain data study --out {self.folder}")
        if not self.tokenizer.exists():
            commands.append(
                f"python -m pretrain tokenizer train --data {self.train} --vocab-size 2048 "
                f"--out {self.tokenizer}"
            )
        if not _keras.fetched().exists():
            commands.append("python -m pretrain data weights squeezenet")
        return commands
