"""What the study trains: variants by group, and the cell of each variant and seed."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks._joint.corpus import Corpus
from pretrain import config
from pretrain.run_config import RunConfig

PRESET = "configs/cpu-study.yaml"
MEASURES = 2  # of score.py: lines that were measured otherwise are measured anew
TRAINING = 1  # of what the preset does not say: raise it when a default of the code changes
# Where files lie and what is kept does not change what is learned.
_NOT_OF_THE_RESULT = ("output", "name", "tracking", "checkpoint", "evaluators", "watchdog", "gate")


@dataclass(frozen=True)
class Variant:
    """A way to train.

    Attributes:
        name, what: short, and for a reader.
        group: main, ablations or inference.
        overrides: of the preset.
        kind: task (`pretrain train`), two_tower or plain_unet (peers.py).
        share: of the study's samples.
        chain: steps, noises and guidance of what is scored.
        draws: whether pictures are generated for KID.
        grid: at inference, (steps, noises, guidance) scored without training anew.
        of: the variant whose trained run a grid is scored on.
    """

    name: str
    what: str
    group: str = "main"
    overrides: tuple[str, ...] = ()
    kind: str = "task"
    share: float = 1.0
    chain: tuple[int, int, float] = (4, 4, 0.0)
    draws: bool = True
    grid: tuple[tuple[int, int, float], ...] = ()
    of: str = ""


def _ablation(name: str, what: str, *overrides: str) -> Variant:
    # Held-out losses tell ablations apart better than 500 pictures can: one noise, no KID.
    more: dict[str, Any] = {"share": 0.5, "chain": (4, 1, 0.0), "draws": False}
    return Variant(name, what, "ablations", overrides, **more)


CHAINS = tuple((steps, noises, 0.0) for steps in (1, 4, 10, 50) for noises in (1, 4, 8))
GUIDED = tuple((4, 4, w) for w in (0.0, 1.0, 3.0))

VARIANTS = (
    Variant("joint", "both objectives, one network"),
    Variant("generate", "generation alone", overrides=("objectives.align=null",)),
    Variant("align", "alignment alone", overrides=("objectives.generate=null",)),
    Variant("two_tower", "peer: two towers, CLIP's loss", kind="two_tower"),
    Variant("plain_unet", "peer: diffusers' text-to-image U-Net, plain loop", kind="plain_unet"),
    _ablation("half", "joint, at the ablations' length"),
    _ablation("fusion_mid", "query in the mid block alone", "model.text_stream.fusion=mid"),
    _ablation("skip_off", "no cross-block skip of h_e", "model.text_stream.skip=false"),
    _ablation("eps", "text stream predicts eps, not x0", "model.text_path.predict=eps"),
    _ablation("gamma_0.3", "gamma 0.3", "model.text_path.gamma=0.3"),
    _ablation("gamma_0.1", "gamma 0.1", "model.text_path.gamma=0.1"),
    _ablation("lambda_0.3", "lambda 0.3", "objectives.align.weight=0.3"),
    _ablation("lambda_3", "lambda 3", "objectives.align.weight=3.0"),
    _ablation("image_drop", "image dropped in 10% of alignment", "task.image_drop=0.1"),
    Variant("chains", "steps × noises", "inference", grid=CHAINS, of="joint"),
    Variant("guided", "guidance of the chain, 4 × 4", "inference", grid=GUIDED, of="image_drop"),
)
GROUPS = ("main", "ablations", "inference")
SEEDS = [0, 1, 2]
BY_NAME = {variant.name: variant for variant in VARIANTS}


@dataclass(frozen=True)
class Cell:
    """One variant trained from one seed on ``samples`` samples, and scored."""

    variant: Variant
    seed: int
    samples: int

    @property
    def name(self) -> str:
        """For ``--only``, the list and the log."""
        return f"{self.variant.name}-{self.seed}"

    @property
    def trained(self) -> "Cell":
        """The cell whose training this one is scored on: itself, but for a grid at inference."""
        if not self.variant.of:
            return self
        return Cell(BY_NAME[self.variant.of], self.seed, self.samples)

    def overrides(self, corpus: Corpus, output: Path, more: tuple[str, ...] = ()) -> list[str]:
        """The ``--set`` of its training; ``more`` comes last."""
        cell = self.trained
        return [
            *(f"output={output}", f"name=study-{cell.name}", f"seed={cell.seed}"),
            *(f"data.train={corpus.train}", f"data.tokenizer={corpus.tokenizer}"),
            f"training.samples={cell.samples}",
            *cell.variant.overrides,
            *more,
        ]

    def config(self, corpus: Corpus, output: Path, more: tuple[str, ...] = ()) -> RunConfig:
        """The configuration of its training, checked."""
        return config.load(RunConfig, PRESET, self.overrides(corpus, output, more))

    def training_key(self, corpus: Corpus, more: tuple[str, ...] = ()) -> str:
        """Of what its weights depend on: configuration and corpus, not where files lie.

        Only what the preset and the overrides say: a new field of the code, at a default that
        changes nothing, leaves finished cells finished.
        """
        said = self.config(corpus, Path("run"), more).model_dump(mode="json", exclude_unset=True)
        tree = {field: value for field, value in said.items() if field not in _NOT_OF_THE_RESULT}
        for field in ("train", "tokenizer"):
            tree["data"].pop(field)
        return _digest([tree, self.trained.variant.kind, corpus.fingerprint, TRAINING])

    def images(self, images: int) -> int:
        """Generated for this cell, of ``images`` for each that is asked to draw."""
        return images if self.variant.draws else 0

    def key(self, corpus: Corpus, images: int, more: tuple[str, ...] = ()) -> str:
        """Of what its result depends on: its weights and what is measured of them."""
        variant = self.variant
        measured = [variant.grid or [variant.chain, self.images(images)], MEASURES]
        return _digest([self.training_key(corpus, more), *measured])


def _digest(tree: object) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:24]


def expand(
    groups: list[str], only: list[str], seeds: list[int] | None, samples: int, batch: int
) -> list[Cell]:
    """The cells asked for, seed by seed, so that a study cut short has whole seeds.

    Args:
        only: names of variants (``joint``) or cells (``joint-1``); overrides ``groups``.
        seeds: of each variant; None takes three.
        samples: of the main variants; the others' shares of it are rounded to whole batches.

    Raises:
        ValueError: a name of ``only`` is of no variant or cell.
    """
    found = []
    for seed in seeds or SEEDS:
        for variant in VARIANTS:
            share = BY_NAME[variant.of or variant.name].share
            length = max(batch, round(samples * share / batch) * batch)
            found.append(Cell(variant, seed, length))
    for name in only:
        if not any(name in (cell.name, cell.variant.name) for cell in found):
            raise ValueError(f"--only {name}: no such cell; there are {', '.join(BY_NAME)}")
    if only:
        return [c for c in found if c.name in only or c.variant.name in only]
    return [cell for cell in found if cell.variant.group in groups]
