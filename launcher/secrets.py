"""Secrets by reference: a job says where a value lies, and only the process that needs it reads it.

What counts as one: `is_secret` judges by a variable's name, as its value may be anything.
"""

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from launcher.strict import JobError

# scheme -> (form of what follows it, how it is written)
SCHEMES: dict[str, tuple[re.Pattern[str], str]] = {
    "env": (re.compile(r"[A-Za-z_][A-Za-z0-9_]*"), "env:NAME"),
    "file": (re.compile(r"/[^\x00-\x1f\x7f]+"), "file:/path"),
    "kubernetes": (
        re.compile(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?/[A-Za-z0-9._-]{1,253}"),
        "kubernetes:secret-name/key",
    ),
    "aws": (
        re.compile(
            r"arn:aws[a-z-]*:(secretsmanager:[a-z0-9-]+:\d{12}:secret:[\w/+=.@:-]+"
            r"|ssm:[a-z0-9-]+:\d{12}:parameter/[\w/.-]+)",
            re.ASCII,
        ),
        "aws:arn:aws:secretsmanager:REGION:ACCOUNT:secret:NAME",
    ),
    "gcp": (
        re.compile(r"projects/[a-z0-9:.-]+/secrets/[\w-]+/versions/(\d+|latest)", re.ASCII),
        "gcp:projects/PROJECT/secrets/NAME/versions/VERSION",
    ),
}
# Of a name's words (HF_TOKEN, AWS_SECRET_ACCESS_KEY); TOKENIZERS_PARALLELISM has none of them.
_WORDS = {"KEY", "KEYS", "TOKEN", "TOKENS", "PASS", "PWD", "PW", "AUTH", "BEARER"}
_PARTS = re.compile(r"SECRET|PASSW|CREDENTIAL|APIKEY|AUTHTOKEN", re.IGNORECASE)
# Where a secret lies is none.
_PLACE = re.compile(r".*_(FILE|PATH|DIR)|GOOGLE_APPLICATION_CREDENTIALS", re.IGNORECASE)
_URL_PASSWORD = re.compile(r"://[^/@\s'\"]*:[^/@\s'\"]+@")


def is_secret(variable: str) -> bool:
    """Whether a variable of this name holds what no plan, log or command line may show."""
    words = set(re.split(r"[._-]", variable.upper()))
    return not _PLACE.fullmatch(variable) and bool(_PARTS.search(variable) or _WORDS & words)


def holds_password(text: str) -> bool:
    """Whether ``text`` has a URL with a password in it (scheme://user:password@host)."""
    return bool(_URL_PASSWORD.search(text))


def check_reference(variable: str, reference: str) -> None:
    """Raises:
    JobError: ``reference`` is none. It is not shown: by mistake it may be the secret itself.
    """
    scheme, _, rest = reference.partition(":")
    if scheme not in SCHEMES or not SCHEMES[scheme][0].fullmatch(rest):
        forms = ", ".join(form for _, form in SCHEMES.values())
        raise JobError(
            f"secrets.{variable} is not a reference to a secret (what stands there is not shown: "
            f"it may be the secret); write one of {forms}"
        )


def scheme_of(reference: str) -> str:
    return reference.partition(":")[0]


def require_schemes(secrets: Mapping[str, str], backend: str, allowed: Iterable[str]) -> None:
    """Raises:
    JobError: one of ``secrets`` lies where ``backend`` cannot fetch it from.
    """
    allowed = tuple(allowed)
    for name, reference in secrets.items():
        if scheme_of(reference) not in allowed:
            forms = " or ".join(SCHEMES[scheme][1] for scheme in allowed)
            raise JobError(
                f"secrets.{name}={reference!r} cannot be read on {backend}; "
                f"store it there and write {forms}"
            )


def resolve(secrets: Mapping[str, str]) -> dict[str, str]:
    """The values of references to this machine (env:, file:). They go into a process's environment
    and nowhere else.

    Raises:
        JobError: the variable is not set, the file cannot be read, or the scheme is another one.
    """
    values = {}
    for name, reference in secrets.items():
        scheme, _, rest = reference.partition(":")
        if scheme == "env":
            if rest not in os.environ:
                raise JobError(
                    f"secrets.{name}={reference!r}, but {rest} is not set here; export {rest} first"
                )
            values[name] = os.environ[rest]
        elif scheme == "file":
            try:
                values[name] = Path(rest).read_text(encoding="utf-8").rstrip("\r\n")
            except (OSError, UnicodeDecodeError) as error:
                why = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
                raise JobError(
                    f"secrets.{name}={reference!r} cannot be read ({why}); "
                    "put the secret there, readable by this user alone"
                ) from None
        else:
            require_schemes({name: reference}, "this machine", ("env", "file"))
    return values
