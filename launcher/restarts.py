"""How often a run is started again, and how long is waited before."""

import random
from dataclasses import dataclass

_LONGEST_SECONDS = 300.0


@dataclass
class Restarts:
    """A budget of restarts, and a wait before each that doubles.

    Attributes:
        left: restarts after failures that are still allowed.
        backoff_seconds: before the first of them.
    """

    left: int
    backoff_seconds: float
    _made: int = 0

    def take(self) -> bool:
        """One restart; False if none is left."""
        if self.left <= 0:
            return False
        self.left -= 1
        self._made += 1
        return True

    def wait_seconds(self) -> float:
        """Before the restart that was taken: many runs that lost one file server together must not
        come back together."""
        wait = self.backoff_seconds * 2.0 ** max(0, self._made - 1)
        return min(wait, _LONGEST_SECONDS) * random.uniform(0.75, 1.25)
