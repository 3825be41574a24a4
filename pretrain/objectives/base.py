"""The seam: a method of a paper is one file in this folder, a module from what the trunk said to a
loss."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, Protocol

from pydantic import Field
from torch import Tensor, nn

from pretrain.config import Config
from pretrain.model.diffdis import DiffDis
from pretrain.rng import SampleRandom
from pretrain.types import Batch, LossTerm, ModelOutput, Noised

Half = Literal["generation", "alignment"]


class ObjectiveConfig(Config):
    """Fields that every objective has; each file's own ``Settings`` adds to them.

    Attributes:
        weight: factor of the term in the sum (DiffDis Eq. 9: 1 for L_IG and lambda for L_ITA). 0
            leaves the
            objective out altogether: its modules are not built.
        needs: names of objectives without which this one does nothing, for it works by changing
            what they read (`Objective.condition`); a configuration that lacks one is refused.
    """

    needs: ClassVar[frozenset[str]] = frozenset()

    weight: float = Field(1.0, ge=0)

    @property
    def further_passes(self) -> int:
        """How many times the term asks the trunk again, with gradients, beside the pass that all
        objectives share. The same on every rank, at every step."""
        return 0


@dataclass(frozen=True)
class Context:
    """What an objective may read: the batch, what was noised (and conditioned), the outputs of the
    trunk, the model itself, and draws that depend on seed, sample and purpose alone."""

    batch: Batch
    noised: Noised
    output: ModelOutput
    model: DiffDis
    rng: SampleRandom


class Objective(nn.Module):
    """Base of objectives. A file defines ``Settings`` (an `ObjectiveConfig`) and ``build(settings,
    model)``.

    An objective may own parameters; they lie in leaf modules, of shape (1,) or more, never
    0-dimensional, so that ZeRO-3 can partition them. It calls the same modules on every rank at
    every step.
    """

    reads: ClassVar[frozenset[Half]] = frozenset()

    def condition(self, batch: Batch, noised: Noised, model: DiffDis, rng: SampleRandom) -> Noised:
        """Called before the trunk, for each objective in the order of the configuration: ``noised``
        with fields replaced, such as c_BLD with more tokens.

        What it gives is what the trunk and every objective read. The alignment half's fields stay
        as they are.
        """
        return noised

    def condition_at_inference(self, c_BLD: Tensor) -> Tensor:
        """The generation half's condition where no batch is there to condition on: what stands in
        training where `condition` adds nothing it knows."""
        return c_BLD

    def save_condition(self, folder: Path, output: Path) -> bool:
        """Write into ``folder`` what generation needs of this objective in an exported model, and
        say True; the file's ``load_condition(folder, model)`` makes an `inference.Condition` of it.

        Args:
            output: of the run, where later stages may lie.

        Raises:
            ExportError: what lies there does not belong to these weights.
        """
        return False

    def forward(self, context: Context) -> LossTerm:
        """The term for this micro-batch: an fp32 scalar whose mean over ranks is the global
        mean."""
        raise NotImplementedError


class ObjectiveModule(Protocol):
    """What a file in this folder offers."""

    Settings: type[ObjectiveConfig]

    def build(self, settings: ObjectiveConfig, model: DiffDis) -> Objective:
        """The objective; ``model`` tells widths."""
