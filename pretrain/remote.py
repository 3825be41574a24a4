"""One remote object (s3, gs, https), and the rule for trying again.

Every request is tried until a deadline, with growing jittered waits; a log line tells why a run
waits. The libraries' own retries are cut to one try: they know no deadline.
"""

import asyncio
import errno
import random
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import fsspec
from fsspec.core import split_protocol, url_to_fs
from fsspec.registry import known_implementations

from pretrain.errors import DataError, PretrainError

T = TypeVar("T")

SLOWEST_BYTES_PER_SECOND = 64 << 10  # a body that comes slower than this counts as stalled
LAST_ATTEMPT_SECONDS = 1.0  # what the try that begins at the deadline may take
CONNECT_SECONDS = 10.0
CONNECTIONS = 64  # of one file system to one server
LOG_EVERY_SECONDS = 10.0
POLL_SECONDS = 0.2

# Not of the shared generator of `random`: ranks seeded alike would all come back at one moment.
_jitter = random.SystemRandom().uniform

# What trying again does not cure. Everything else is transient.
PERMANENT = (
    PretrainError,
    FileNotFoundError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
    NotImplementedError,
    ImportError,
    TypeError,
    ValueError,
)
PERMANENT_ERRNOS = {errno.EINVAL, errno.ENAMETOOLONG, errno.ENOSYS, errno.EREMCHG}
# By name, so that botocore is imported only where s3 is used.
PERMANENT_NAMES = {
    "NoCredentialsError",
    "ParamValidationError",
    "PartialCredentialsError",
    "ProfileNotFound",
}
TRANSIENT_STATUSES = {408, 425, 429}  # of HTTP's 4xx; all 5xx are


@dataclass(frozen=True)
class Retry:
    """How long a remote read or write is tried.

    Attributes:
        deadline_seconds: after which a request (of a large object: of one part) is given up.
        attempt_seconds: without a byte, after which one try counts as stalled.
        first_wait_seconds: before the second try; doubled for each more, up to half of it taken
            off at random.
        longest_wait_seconds: between two tries.
    """

    deadline_seconds: float = 300.0
    attempt_seconds: float = 30.0
    first_wait_seconds: float = 0.2
    longest_wait_seconds: float = 10.0


class Remote:
    """One remote object. Made where it is used, in its process: cheap, as fsspec keeps the file
    system and its connections.

    Args:
        url: of the object.
        retry: how long to try; None is the default.
        stops: any of them set ends what is under way, with a DataError.
        inner_tries: of the file system itself; more than 1 only where it cuts a file into parts.

    Raises:
        DataError: no such protocol, or its package is not installed.
    """

    def __init__(
        self,
        url: str,
        retry: Retry | None = None,
        stops: tuple[threading.Event, ...] = (),
        inner_tries: int = 1,
    ) -> None:
        self.url, self.retry, self.stops = url, retry or Retry(), stops
        self.protocol = str(split_protocol(url)[0])
        self.fs, self.path = _file_system(url, self.protocol, self.retry, inner_tries)

    def tried(self, attempt: Callable[[float], T]) -> T:
        """What ``attempt(seconds it may take)`` returns, the first time that it does.

        Raises:
            FileNotFoundError: there is no such object.
            DataError: an error that will not pass, or the deadline.
        """
        import tenacity  # not where only local files are read: models are served without it

        begun, tries = time.monotonic(), 0

        def left() -> float:
            return self.retry.deadline_seconds - (time.monotonic() - begun)

        def once() -> T:
            nonlocal tries
            self.check_stop()
            tries += 1
            return attempt(max(left(), LAST_ATTEMPT_SECONDS))

        def wait(state: tenacity.RetryCallState) -> float:
            doubled = self.retry.first_wait_seconds * 2.0 ** min(state.attempt_number - 1, 40)
            full = min(doubled, self.retry.longest_wait_seconds)
            # Cut at the deadline, so that the last try is made there and not one wait earlier.
            return max(0.0, min(_jitter(full / 2, full), left()))

        def tell(state: tenacity.RetryCallState) -> None:
            error = state.outcome.exception() if state.outcome else None
            _log.say(
                f"{shown(self.url)}: {self._words(error)}; {tries} tries so far, "
                f"trying for {left():.0f} s more"
            )

        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(is_transient),
            wait=wait,
            stop=lambda _: left() <= 0 or self.stopped(),
            sleep=self._sleep,
            before_sleep=tell,
            reraise=True,
        )
        try:
            return retrying(once)
        except FileNotFoundError:
            raise FileNotFoundError(errno.ENOENT, "No such object", shown(self.url)) from None
        except PretrainError:
            raise
        except Exception as error:
            if not is_transient(error):
                raise DataError(f"{shown(self.url)}: {self._words(error)}{_hint(error)}") from error
            self.check_stop()
            raise DataError(
                f"{shown(self.url)} was not to be had in {time.monotonic() - begun:.1f} s and "
                f"{tries} tries; the last error was {self._words(error)}. Check the address, the "
                "network and the server, or allow a longer deadline"
            ) from error

    def call(
        self, seconds: float, num_bytes: int, method: str, *arguments: Any, **options: Any
    ) -> Any:
        """A method of the file system, called once. Given up after the time that ``num_bytes`` may
        need, and at the latest after ``seconds``."""
        if not getattr(self.fs, "async_impl", False):
            return getattr(self.fs, method)(*arguments, **options)
        longest = self.retry.attempt_seconds + num_bytes / SLOWEST_BYTES_PER_SECOND
        ends = time.monotonic() + min(seconds, longest)
        coroutine = getattr(self.fs, f"_{method}")(*arguments, **options)
        # As fsspec.asyn.sync does it, but what is given up is also cancelled.
        future = asyncio.run_coroutine_threadsafe(coroutine, self.fs.loop)
        try:
            while True:
                with suppress(TimeoutError):
                    return future.result(max(0.0, min(POLL_SECONDS, ends - time.monotonic())))
                if future.done():
                    return future.result()  # the time-out was the call's own, or it just ended
                self.check_stop()
                if time.monotonic() >= ends:
                    raise TimeoutError(f"no answer in {min(seconds, longest):.1f} s")
        finally:
            future.cancel()

    def info(self, seconds: float) -> dict[str, Any]:
        """What the file system knows of the object, asked once."""
        try:
            return cast(dict[str, Any], self.call(seconds, 0, "info", self.path))
        except FileNotFoundError as error:
            # fsspec's HTTP calls every failure "not found" here; the truth is in its cause.
            cause = error.__cause__
            known = getattr(cause, "status", None) in (404, 410)
            if self.protocol.startswith("http") and isinstance(cause, Exception) and not known:
                raise cause from None
            raise

    def size(self) -> int | None:
        """Bytes; None where the server does not tell."""
        return self.tried(self._size)

    def _size(self, seconds: float) -> int | None:
        info = self.info(seconds)
        if info.get("type") == "directory":
            raise IsADirectoryError(errno.EISDIR, "is a folder")
        return cast("int | None", info["size"])

    def whole(self) -> bytes:
        """All bytes in one request: for a server that does not tell how many there are."""
        return cast(
            bytes, self.tried(lambda seconds: self.call(seconds, 1 << 50, "cat_file", self.path))
        )

    def range(self, start: int, end: int) -> tuple[bytes, bytes | None]:
        """Bytes ``start`` to ``end``; and the whole object, if that is what the server sent."""
        wanted = end - start
        if not wanted:
            return b"", None

        def attempt(seconds: float) -> tuple[bytes, bytes | None]:
            data = self.call(seconds, wanted, "cat_file", self.path, start=start, end=end)
            whole = data if len(data) > wanted else None  # simple HTTP servers ignore ranges
            data = data if whole is None else data[start:end]
            if len(data) < wanted:
                found = self._size(seconds)
                if found is not None and found < end:
                    raise ends_early(self.url, found, end)
                raise OSError(f"{len(data)} bytes came of {wanted}")
            return data, whole

        return self.tried(attempt)

    def stopped(self) -> bool:
        """Whether somebody asked to end."""
        return any(stop.is_set() for stop in self.stops)

    def check_stop(self) -> None:
        """Raise a DataError if somebody asked to end."""
        if self.stopped():
            raise DataError(f"{shown(self.url)}: reading was stopped")

    def _sleep(self, seconds: float) -> None:
        ends = time.monotonic() + seconds
        while (left := ends - time.monotonic()) > 0 and not self.stopped():
            time.sleep(min(left, POLL_SECONDS))

    def _words(self, error: BaseException | None) -> str:
        """An error in one line, without the secrets of a signed URL."""
        if (status := getattr(error, "status", None)) is not None:
            return f"HTTP {status} {getattr(error, 'message', '')}".strip()
        text = " ".join(str(error).replace(self.url, shown(self.url)).split()).rstrip(".")
        return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def is_transient(error: BaseException) -> bool:
    """Whether an error may pass by itself: all but not found, not allowed, wrongly asked."""
    if isinstance(error, PERMANENT) or not isinstance(error, Exception):
        return False
    if isinstance(error, OSError) and error.errno in PERMANENT_ERRNOS:
        return False
    if type(error).__name__ in PERMANENT_NAMES:
        return False
    status = getattr(error, "status", None)
    if isinstance(status, int) and 400 <= status < 500:
        return status in TRANSIENT_STATUSES
    return True


def ends_early(url: str, found: int, end: int) -> DataError:
    """The error of a range that an object does not have."""
    return DataError(
        f"{shown(url)} has {found} bytes, a range up to {end} was asked: it is not the one that "
        "was indexed; restore it, or index again"
    )


def shown(url: str) -> str:
    """``url`` as it may stand in a log: without a password, or the query of a signed one."""
    base, query, _ = url.partition("?")
    scheme, separator, rest = base.partition("://")
    if not separator:
        return url  # a local path
    host, slash, path = rest.partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}{'?…' if query else ''}"


def _file_system(url: str, protocol: str, retry: Retry, inner_tries: int) -> tuple[Any, str]:
    """The file system of ``url``, with our time-outs where it takes any, and the path in it."""
    options: dict[str, Any] = {}
    if protocol in ("s3", "s3a"):
        ours = {
            "connect_timeout": min(CONNECT_SECONDS, retry.attempt_seconds),
            "read_timeout": retry.attempt_seconds,
            "retries": {"total_max_attempts": inner_tries, "mode": "standard"},
            "max_pool_connections": CONNECTIONS,
        }
        options["config_kwargs"] = ours | _configured(("s3", "s3a"), "config_kwargs")
        options["use_listings_cache"] = False
    elif protocol in ("http", "https"):
        import aiohttp

        ours = {
            "timeout": aiohttp.ClientTimeout(
                total=None,
                sock_connect=min(CONNECT_SECONDS, retry.attempt_seconds),
                sock_read=retry.attempt_seconds,
            )
        }
        options["client_kwargs"] = ours | _configured(("http", "https"), "client_kwargs")
        # A body that is packed on its way has another length than the object.
        identity = {"Accept-Encoding": "identity"}
        options["headers"] = _configured(("http", "https"), "headers") | identity
    try:
        fs, path = url_to_fs(url, **options)
    except ImportError as error:
        package = error.name or _package(protocol)
        raise DataError(
            f"{shown(url)}: {protocol}:// needs the package {package}, which is not installed; "
            f"run `python -m pip install {package}`"
        ) from error
    except ValueError as error:
        raise DataError(f"{shown(url)}: {error}") from error
    if hasattr(fs, "retries"):
        fs.retries = inner_tries  # s3fs's own loop around botocore's
    return fs, path


def _configured(protocols: tuple[str, ...], option: str) -> dict[str, Any]:
    """What the user set for ``option`` through fsspec's configuration (FSSPEC_S3_..., files)."""
    found: dict[str, Any] = {}
    for protocol in protocols:
        found |= fsspec.config.conf.get(protocol, {}).get(option, {})
    return found


def _package(protocol: str) -> str:
    known = known_implementations.get(protocol, {"class": protocol})
    return str(known["class"]).partition(".")[0]


def _hint(error: Exception) -> str:
    denied = getattr(error, "status", None) in (401, 403) or isinstance(error, PermissionError)
    if denied or type(error).__name__ in PERMANENT_NAMES:
        return ". Check the credentials and what they allow"
    return ""


class _Log:
    """At most one line in ten seconds from a process: a thousand shards may wait at once."""

    def __init__(self) -> None:
        self._last, self._kept_back = -LOG_EVERY_SECONDS, 0

    def say(self, text: str) -> None:
        now = time.monotonic()
        if now - self._last < LOG_EVERY_SECONDS:
            self._kept_back += 1
            return
        more = f" ({self._kept_back} such lines kept back)" if self._kept_back else ""
        self._last, self._kept_back = now, 0
        print(f"storage: {text}{more}", file=sys.stderr, flush=True)


_log = _Log()
