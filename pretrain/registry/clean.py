"""A clean environment for a registered version: the packages that its requirements name and those
they need in turn, no checkout, no deepspeed; or a virtual environment made from the requirements.

The first kind takes no download: a folder of links to the installed packages is all that the
process can import from, beside the standard library. It finds a requirement that was forgotten and
code that was not logged; it cannot find that a pinned release installs badly elsewhere. The second
kind does.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from pretrain import mlflow_env
from pretrain.errors import RegistryError

_SCRIPT = Path(__file__).with_name("reproduce.py")
_TIMEOUT_SECONDS = 1800
# What decides which code runs, or leads out of the environment.
_HIDDEN = ("PYTHON", "MLFLOW_TRACKING", "VIRTUAL_ENV", "DS_", "HF_")


@dataclass(frozen=True)
class Answers:
    """What a version says in a clean environment.

    Attributes:
        rows: one answer for each golden request.
        other_releases: packages that are installed in another release than was logged.
    """

    rows: list[dict[str, Any]]
    other_releases: list[str]


def answers(version: Path, *, fresh: bool = False) -> Answers:
    """Run the golden requests of a downloaded version.

    Args:
        fresh: install the logged requirements into a new virtual environment (minutes, gigabytes)
            instead of linking what is installed here.

    Raises:
        RegistryError: a requirement is missing, the version does not load, or it ran code other
            than its own.
    """
    requirements = (version / "requirements.txt").read_text(encoding="utf-8").splitlines()
    with tempfile.TemporaryDirectory(prefix="clean-") as scratch:
        other: list[str] = []
        if fresh:
            python = _virtual_environment(Path(scratch) / "venv", version / "requirements.txt")
            report = _run([python, "-I", "-B", str(_SCRIPT), str(version)], scratch)
        else:
            with site_of(requirements) as (site, other):
                command = [sys.executable, "-I", "-S", "-B", str(_SCRIPT), str(version), str(site)]
                report = _run(command, scratch)
    own = str((version / "code" / "pretrain").resolve())
    if report["code"] != own:
        raise RegistryError(
            f"the version ran code from {report['code']!r}, not its own ({own!r}); register it "
            "again from a process that has only one `pretrain` on its path"
        )
    if report["deepspeed"]:
        raise RegistryError(
            "the version imports deepspeed; a registered model must not need it: import it inside "
            "the functions of the trainer alone"
        )
    return Answers(report["answers"], other)


@contextmanager
def site_of(requirements: Iterable[str]) -> Iterator[tuple[Path, list[str]]]:
    """A folder to import from, of links to ``requirements`` and all they need; and which of them
    are installed in another release than they pin.

    Raises:
        RegistryError: one of them is not installed.
    """
    found, other = _closure(requirements)
    with tempfile.TemporaryDirectory(prefix="site-") as folder:
        for package in found.values():
            for name in {file.parts[0] for file in package.files or ()}:
                link = Path(folder) / name
                target = Path(str(package.locate_file(name)))
                # A namespace that several packages share is linked once, with all of it.
                if name not in ("..", "__pycache__") and target.exists() and not link.exists():
                    link.symlink_to(target)
        yield Path(folder), other


def _closure(requirements: Iterable[str]) -> tuple[dict[str, Distribution], list[str]]:
    from packaging.requirements import Requirement

    found: dict[str, Distribution] = {}
    seen: set[tuple[str, frozenset[str]]] = set()
    other: list[str] = []
    waiting = [(Requirement(line), True) for line in requirements if line.strip()]
    while waiting:
        requirement, logged = waiting.pop()
        key = (requirement.name.lower().replace("_", "-"), frozenset(requirement.extras))
        if key in seen:
            continue
        seen.add(key)
        try:
            package = distribution(requirement.name)
        except PackageNotFoundError:
            raise RegistryError(
                f"requirement {str(requirement)!r} of the version is not installed; run "
                f"pip install '{requirement}'"
            ) from None
        if logged and not requirement.specifier.contains(package.version, prereleases=True):
            other.append(f"{requirement.name} {package.version} (logged: {requirement.specifier})")
        found[key[0]] = package
        for line in package.requires or ():
            inner = Requirement(line)
            extras = requirement.extras or {""}
            if inner.marker is None or any(inner.marker.evaluate({"extra": e}) for e in extras):
                waiting.append((inner, False))
    return found, other


def _virtual_environment(folder: Path, requirements: Path) -> str:
    python = str(folder / "bin" / "python")
    for command in (
        [sys.executable, "-m", "venv", str(folder)],
        [python, "-m", "pip", "install", "--quiet", "--requirement", str(requirements)],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RegistryError(
                f"requirements.txt of the version cannot be installed: {_tail(done.stderr)}; "
                "register it again in an environment whose releases can be had"
            )
    return python


def _run(command: list[str], scratch: str) -> dict[str, Any]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(_HIDDEN)}
    environment = {**mlflow_env.DEFAULTS, **environment, "HF_HUB_OFFLINE": "1"}
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            cwd=scratch,
            env=environment,
            timeout=_TIMEOUT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise RegistryError(
            f"the version gave no answer in {_TIMEOUT_SECONDS} s in a clean environment; look at "
            "its sampler steps, or run this where it is faster"
        ) from None
    if done.returncode:
        raise RegistryError(
            f"the version does not run in a clean environment: {_tail(done.stderr)}; a package "
            "that it imports must be in registry.REQUIREMENTS"
        )
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _tail(text: str) -> str:
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return lines[-1][:500] if lines else "no message"
