"""The duties of process number 1, for containers that start without an init of their own."""

import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from types import FrameType

_PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)


def run(work: Callable[[], int], always: bool = False) -> int:
    """``work()``. In process 1 (or ``always``) a child does it, and this process passes signals on
    to that child and reaps whatever is orphaned: the kernel discards signals that process 1 has no
    handler for, and nobody else reaps.

    Returns:
        What ``work`` returned; 128 + N if signal N ended it.
    """
    if os.getpid() != 1 and not always:
        return work()
    sys.stdout.flush()
    sys.stderr.flush()
    signal.pthread_sigmask(signal.SIG_BLOCK, _PASSED_ON)  # none is lost before there is a child
    child = os.fork()
    if child == 0:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _PASSED_ON)
        code = 1
        try:
            code = work()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def pass_on(number: int, frame: FrameType | None) -> None:
        with suppress(ProcessLookupError):
            os.kill(child, number)

    for number in _PASSED_ON:
        signal.signal(number, pass_on)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _PASSED_ON)
    while True:
        pid, status = os.wait()
        if pid == child:
            code = os.waitstatus_to_exitcode(status)
            return 128 - code if code < 0 else code
