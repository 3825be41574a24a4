"""The embedded corpus as tensors, what an independent network sees in pictures, and the lines of a
study that goes on where it was stopped."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain import distances
from pretrain.data.evalset import read_all
from pretrain.data.reader import ReadConfig
from pretrain.data.samples import Bounds, decode, prepare
from pretrain.features import base as features

ROOT = Path(__file__).resolve().parents[2]
Row = dict[str, Any]


@dataclass(frozen=True)
class Pictures:
    """Attributes:
    images_NCHW: in [-1, 1].
    captions: "GROUP, STYLE" of each.
    labels: of each, by what is asked: its group ("food-drink") or its drawer's style.
    """

    images_NCHW: Tensor
    captions: tuple[str, ...]
    labels: dict[str, tuple[str, ...]]

    def __len__(self) -> int:
        return len(self.captions)


def load(parts: Sequence[str], size: int) -> Pictures:
    """Of manifests data/emoji/PART.json, one after another."""
    images, groups, styles = [], [], []
    for part in parts:
        for raw in read_all(str(ROOT / f"data/emoji/{part}.json"), ReadConfig()):
            image, _ = decode(raw, Bounds(64 << 20, 1 << 26), (size, size))
            images.append(prepare(image, size))
            facts = json.loads(raw.files["json"])
            groups.append(facts["group"])
            styles.append(facts["style"])
    captions = tuple(f"{g.replace('-', ' ')}, {s}" for g, s in zip(groups, styles, strict=True))
    labels = {"group": tuple(groups), "style": tuple(styles)}
    return Pictures(torch.stack(images), captions, labels)


class Judge:
    """SqueezeNet's features: KID against held-out pictures, and linear probes of the labels, fitted
    to the training pictures. Nothing that is measured was trained with it."""

    def __init__(self, train: Pictures, held: Pictures, cache: Path) -> None:
        self.extractor = features.build(features.FeaturesConfig())
        size = train.images_NCHW.shape[-1]
        path = cache / f"emoji{size}-{self.extractor.fingerprint[:12]}.pt"
        if not path.exists():
            cache.mkdir(parents=True, exist_ok=True)
            torch.save([self.features(p.images_NCHW) for p in (train, held)], path)
        own, self.held = torch.load(path, weights_only=True)
        self.names: dict[str, list[str]] = {}
        self.probes: dict[str, Tensor] = {}
        self.accuracy: dict[str, float] = {}
        for what, labels in train.labels.items():
            names = sorted(set(labels))
            one_hot = torch.tensor([[float(n == x) for n in names] for x in labels])
            x = torch.cat([own, torch.ones(len(own), 1)], 1)
            gram = x.T @ x + 1e-2 * len(x) * torch.eye(x.shape[1])
            self.names[what], self.probes[what] = names, torch.linalg.solve(gram, x.T @ one_hot)
            self.accuracy[what] = self.agreement(self.held, what, held.labels[what])

    def features(self, images_NCHW: Tensor) -> Tensor:
        """(N, D)."""
        return torch.cat([self.extractor(part) for part in images_NCHW.split(64)])

    def agreement(self, seen_ND: Tensor, what: str, labels: Sequence[str]) -> float:
        """Share of pictures in which the probe sees the label that was asked for."""
        x = torch.cat([seen_ND, torch.ones(len(seen_ND), 1)], 1)
        found = (x @ self.probes[what]).argmax(1).tolist()
        hits = [self.names[what][k] == label for k, label in zip(found, labels, strict=True)]
        return sum(hits) / len(hits)

    def kid(self, seen_ND: Tensor) -> float:
        """Against the held-out pictures."""
        return distances.kid(self.held, seen_ND, min(128, len(seen_ND)))[0]


class Book:
    """Lines of JSON, one for each thing that ended; the same is not done twice."""

    def __init__(self, path: Path) -> None:
        self.path = path
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        self.rows: list[Row] = [json.loads(line) for line in text.splitlines()]

    def find(self, **fields: Any) -> Row | None:
        """The row with these fields."""
        return next((r for r in self.rows if fields.items() <= r.items()), None)

    def add(self, row: Row) -> Row:
        """Keep it, and say it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        self.rows.append(row)
        print(json.dumps(row), flush=True)
        return row


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Mean ± standard deviation over seeds."""
    more = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{more}"
