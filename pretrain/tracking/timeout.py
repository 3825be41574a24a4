"""How long a request to MLflow may take before it is tried again."""

import math
import os
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

_VARIABLE = "MLFLOW_HTTP_REQUEST_TIMEOUT"  # whole seconds; MLflow reads it in every request
_TIMES = 4.0  # what a request may take, of the slowest of the last answers
_LEAST_SECONDS = 1.0
_REMEMBERED = 16


class RequestTimeout:
    """A time-out that follows the server's answers, as TCP's retransmission follows round trips
    (RFC 6298): a server that answers in milliseconds and then stands still for once is asked again
    after a second; each time-out doubles the next one, so that a slow server is waited for.

    Only for requests that may be sent twice.

    Args:
        longest: seconds that no request may exceed, and the time-out before the first answer.
    """

    def __init__(self, longest: float) -> None:
        self.longest = longest
        self._answers: deque[float] = deque(maxlen=_REMEMBERED)
        self._doubled = 1.0

    @property
    def seconds(self) -> float:
        """Of the next request."""
        if not self._answers:
            return self.longest
        usual = max(_LEAST_SECONDS, _TIMES * max(self._answers))
        return min(self.longest, usual * self._doubled)

    @contextmanager
    def request(self) -> Iterator[None]:
        """Sets MLflow's time-out for the requests of the block, and learns from what they take."""
        before, given = os.environ.get(_VARIABLE), self.seconds
        os.environ[_VARIABLE] = str(math.ceil(given))
        began = time.monotonic()
        try:
            yield
        except Exception:
            if time.monotonic() - began >= given:
                self._doubled = min(2 * self._doubled, self.longest)
            raise
        else:
            self._answers.append(time.monotonic() - began)
            self._doubled = 1.0
        finally:
            if before is None:
                os.environ.pop(_VARIABLE, None)
            else:
                os.environ[_VARIABLE] = before
