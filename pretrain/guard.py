"""Which losses a run may learn from: neither non-finite ones nor spikes.

Judged on the mean over ranks, before the backward pass, so that all ranks judge alike and a bad
batch never touches the weights.
"""

import math
from collections import deque
from dataclasses import dataclass
from statistics import median
from typing import Any

from pydantic import Field

from pretrain.config import Config

NON_FINITE = "non-finite loss"
SPIKE = "loss spike"
GRADIENT = "non-finite gradient"
SCALE = "loss scale lowered"  # fp16's own way to find its scale: nothing is wrong with the samples
_MAD_TO_SIGMA = 1.4826  # of a normal distribution
_LEAST_SPREAD = 0.01  # of the median: a loss that hardly moves must not make noise a spike


class GuardConfig(Config):
    """What is done about bad steps. A bad step changes no weight, and its samples are recorded.

    Attributes:
        spike_z: a loss this many robust standard deviations (1.4826 × the median absolute
            deviation) above the median of the window is a spike; null judges finiteness alone.
        window: losses of good steps that are looked back on.
        least: good steps before spikes are judged.
        bad_steps: bad steps in a row after which the run goes back to its last good state.
        rewinds: how often, before the run stops with an error.
        skip_before: samples before the first bad step that are left out after going back, with
            those of the bad steps: what did the damage came before it showed.
    """

    spike_z: float | None = Field(12.0, gt=0)
    window: int = Field(128, ge=8)
    least: int = Field(32, ge=4)
    bad_steps: int = Field(10, ge=1)
    rewinds: int = Field(3, ge=0)
    skip_before: int = Field(1024, ge=0)


@dataclass(frozen=True)
class Refusal:
    """A step that changed nothing.

    Attributes:
        why: NON_FINITE, SPIKE, GRADIENT or SCALE.
        loss: mean over ranks, of the micro-batch that was refused; may be NaN.
    """

    why: str
    loss: float


class Guard:
    """Judges losses by those before; a pure function of them, so the same on every rank."""

    def __init__(self, config: GuardConfig) -> None:
        self.config = config
        self._losses: deque[float] = deque(maxlen=config.window)

    def judge(self, loss: float) -> str | None:
        """Why ``loss`` must not be learned from; None if it may."""
        if not math.isfinite(loss):
            return NON_FINITE
        if self.z(loss) > (self.config.spike_z or math.inf):
            return SPIKE
        return None

    def z(self, loss: float) -> float:
        """Robust standard deviations of ``loss`` above the median; 0 while there is no history."""
        if len(self._losses) < self.config.least:
            return 0.0
        middle = median(self._losses)
        spread = _MAD_TO_SIGMA * median(abs(x - middle) for x in self._losses)
        return (loss - middle) / max(spread, _LEAST_SPREAD * abs(middle), 1e-12)

    def accept(self, loss: float) -> None:
        """Remember the loss of a good step."""
        self._losses.append(loss)

    def state_dict(self) -> list[float]:
        """The window."""
        return list(self._losses)

    def load_state_dict(self, losses: Any) -> None:
        """Go on from there."""
        self._losses = deque((float(x) for x in losses), maxlen=self.config.window)
