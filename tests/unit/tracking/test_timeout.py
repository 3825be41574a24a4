"""Time-outs follow a server's answers."""

import os

import pytest

from pretrain.tracking import timeout
from pretrain.tracking.timeout import RequestTimeout

NAME = "MLFLOW_HTTP_REQUEST_TIMEOUT"


class Server:
    """Answers take what it is told, on a clock of the test's."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(timeout.time, "monotonic", lambda: self.now)

    def ask(self, waits: RequestTimeout, seconds: float) -> float:
        """A request to an answer that takes ``seconds``; how long it was waited for."""
        began = self.now
        try:
            with waits.request():
                given = float(os.environ[NAME])
                self.now += min(seconds, given)
                if seconds >= given:
                    raise TimeoutError
        except TimeoutError:
            pass
        return self.now - began


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    monkeypatch.setenv(NAME, "30")
    return Server(monkeypatch)


def test_a_fast_server_that_stands_still_is_asked_again_after_a_second(server: Server) -> None:
    waits = RequestTimeout(30)
    assert server.ask(waits, 20) == 20  # nothing is known of it yet
    waits = RequestTimeout(30)
    for _ in range(3):
        server.ask(waits, 0.0625)
    assert server.ask(waits, 5) == 1


def test_a_slow_server_is_waited_for(server: Server) -> None:
    """Each time-out doubles the next, up to the longest; what came through is the new measure."""
    waits = RequestTimeout(30)
    server.ask(waits, 0.0625)
    tries = [server.ask(waits, 7) for _ in range(4)]
    assert tries == [1, 2, 4, 7]
    assert waits.seconds == 28
    assert [server.ask(waits, 100) for _ in range(2)] == [28, 30]


def test_a_refusal_at_once_says_nothing_of_the_time(server: Server) -> None:
    waits = RequestTimeout(30)
    server.ask(waits, 0.125)
    with pytest.raises(ValueError), waits.request():
        raise ValueError
    assert waits.seconds == 1


def test_old_answers_are_forgotten(server: Server) -> None:
    waits = RequestTimeout(30)
    server.ask(waits, 6)
    assert waits.seconds == 24
    for _ in range(16):
        server.ask(waits, 0.5)
    assert waits.seconds == 2


@pytest.mark.parametrize("before", ["7", None])
def test_the_environment_is_as_before(
    server: Server, monkeypatch: pytest.MonkeyPatch, before: str | None
) -> None:
    if before is None:
        monkeypatch.delenv(NAME)
    else:
        monkeypatch.setenv(NAME, before)
    server.ask(RequestTimeout(30), 0.1)
    with pytest.raises(ValueError), RequestTimeout(30).request():
        raise ValueError
    assert os.environ.get(NAME) == before
