"""A job from a YAML file: one as in configs/jobs/, or a run's config, with defaults around it."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from launcher.job import OUTPUT_FIELD, JobError, JobSpec

# A job names a run's config; a run's config has no such field.
_MARK = "config"


def load(path: str, given: Mapping[str, Any]) -> JobSpec:
    """The job of the file ``path``, with the fields ``given`` in place of the file's.

    ``overrides``, ``env`` and ``secrets`` are added to the file's instead. What is still missing
    is derived: name from the file's name, output from the run's config.

    Raises:
        JobError: a file cannot be read, or the job cannot run as asked.
    """
    tree = _read(Path(path), ())
    tree.pop("base", None)
    if _MARK not in tree:
        tree = {_MARK: path}
    overrides = [*_sequence(tree, "overrides"), *given.get("overrides", ())]
    fields = {**tree, **{k: v for k, v in given.items() if v is not None}}
    for name in ("env", "secrets"):
        fields[name] = _joined(tree.get(name), given.get(name))
    fields.setdefault("name", _name(path))
    output, fields["overrides"] = _take_output(overrides)
    if given.get(OUTPUT_FIELD) is None and output is not None:
        fields[OUTPUT_FIELD] = output
    if OUTPUT_FIELD not in fields:
        fields[OUTPUT_FIELD] = _output(str(fields[_MARK]))
    return JobSpec(**fields)


def _sequence(tree: Mapping[str, Any], name: str) -> list[Any]:
    value = tree.get(name, [])
    if not isinstance(value, list):
        raise JobError(f"{name}={value!r} must be a list")
    return value


def _joined(file: Any, given: Any) -> Any:
    return {**(file or {}), **(given or {})} if isinstance(file, dict) or not file else file


def _take_output(overrides: list[Any]) -> tuple[str | None, list[Any]]:
    """The last override of the output folder, and the others."""
    output, others = None, []
    for override in overrides:
        name, _, value = str(override).partition("=")
        if name.strip() == OUTPUT_FIELD:
            output = value
        else:
            others.append(override)
    return output, others


def _output(config: str) -> str:
    """The output folder that the run's config names. The config may lie on the run's hosts only."""
    try:
        found = _read(Path(config), ()).get(OUTPUT_FIELD)
    except JobError as error:
        raise JobError(f"output is not given, and {error}, or give output") from None
    return found if isinstance(found, str) else f"runs/{_name(config)}"


def _name(path: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", Path(path).stem.lower()).strip("-")[:63].strip("-") or "run"


def _read(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in seen:
        raise JobError(f"base={str(path)!r} includes itself; remove one of the `base:` lines")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise JobError(
            f"config={str(path)!r} cannot be read ({error.strerror}); give the path of a YAML file"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError, ValueError) as error:
        raise JobError(f"config={str(path)!r} is not valid YAML: {error}") from None
    if not isinstance(tree, dict) or not all(isinstance(key, str) for key in tree):
        raise JobError(
            f"config={str(path)!r} must hold a mapping of fields, it holds {type(tree).__name__}"
        )
    base = tree.get("base")
    if base is None:
        return tree
    return {**_read(path.parent / str(base), (*seen, path.resolve())), **tree}
