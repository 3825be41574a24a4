"""The base of every configuration node, and how a YAML file and overrides become a checked tree.

Each node is declared beside the code that it configures; `run_config.py` composes them.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from pretrain.errors import ConfigError


class Config(BaseModel):
    """A frozen configuration node. Unknown keys are errors that name the nearest known key."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


C = TypeVar("C", bound=Config)


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with ``over`` laid on it: mappings merge key by key, anything else is replaced.

    A mapping of another ``kind`` is replaced too: the fields of one kind mean nothing to another.
    """
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        if isinstance(value, Mapping) and isinstance(old, Mapping) and _same_kind(old, value):
            merged[key] = merge(old, value)
        else:
            merged[key] = value
    return merged


def _same_kind(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    return "kind" not in new or "kind" not in old or new["kind"] == old["kind"]


def read_yaml(path: str | Path, _seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The mapping in a YAML file. A top-level ``base: other.yaml`` (beside it) is read first and
    merged under.

    Raises:
        ConfigError: no such file, not a mapping, bad YAML, or a circle of bases.
    """
    path = Path(path)
    if path.resolve() in _seen:
        raise ConfigError(f"base={path} includes itself; remove one of the `base:` lines")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"config={str(path)!r} cannot be read ({error.strerror}); give the path of a YAML file"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"config={str(path)!r} is not valid YAML: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(
            f"config={str(path)!r} must hold a mapping of fields, it holds {type(tree).__name__}"
        )
    base = tree.pop("base", None)
    if base is None:
        return tree
    return merge(read_yaml(path.parent / base, (*_seen, path.resolve())), tree)


def parse_override(text: str) -> dict[str, Any]:
    """``a.b.c=value`` as a nested mapping; the value is YAML, so ``true``, ``1e-4`` and ``[1, 2]``
    are typed.

    Raises:
        ConfigError: there is no ``=``, or the value is not YAML.
    """
    name, separator, value = text.partition("=")
    if not separator or not name.strip():
        raise ConfigError(f"--set {text!r} must have the form field.name=value")
    try:
        tree: Any = yaml.safe_load(value)
        if isinstance(tree, str):
            # YAML 1.1 reads 1e-4 (no dot) as a string; a user means the number.
            with suppress(ValueError):
                tree = float(tree)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {text!r}: the value is not valid YAML: {error}") from None
    for key in reversed(name.strip().split(".")):
        tree = {key: tree}
    return dict(tree)


def build(cls: type[C], tree: Mapping[str, Any], where: str = "") -> C:
    """Validate ``tree`` as ``cls``.

    Raises:
        ConfigError: every problem, one a line, each with its dotted field (below ``where``) and
            value.
    """
    try:
        return cls.model_validate(dict(tree))
    except ValidationError as error:
        lines = [_explain(cls, problem, where) for problem in error.errors()]
        raise ConfigError("\n".join(lines)) from None


def load(cls: type[C], path: str | Path, overrides: Sequence[str] = ()) -> C:
    """Read ``path``, lay ``overrides`` (``a.b=value``) over it, and validate the whole.

    Raises:
        ConfigError: as `read_yaml`, `parse_override` and `build`.
    """
    tree = read_yaml(path)
    for text in overrides:
        tree = merge(tree, parse_override(text))
    return build(cls, tree)


def _explain(cls: type[BaseModel], problem: Any, where: str) -> str:
    location, node = _walk(cls, problem["loc"])
    field = ".".join([*([where] if where else []), *map(str, location)]) or "(config)"
    if problem["type"] == "extra_forbidden":
        known = sorted(getattr(node, "model_fields", {}))
        close = get_close_matches(str(location[-1]), known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known here: {', '.join(known)}"
        return f"{field}={problem['input']!r}: unknown field; {hint}"
    if problem["type"] == "missing":
        return f"{field}: required, but not given; add it to the config or pass --set {field}=…"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        # A validator of ours: its text already names field, value and remedy.
        return f"{field}: {message}" if location else message
    return f"{field}={problem['input']!r}: {message[0].lower()}{message[1:]}"


def _walk(cls: type[BaseModel], loc: Sequence[Any]) -> tuple[list[Any], Any]:
    """The fields on the way to a problem, as they stand in a file, and the node that holds the
    last."""
    node: Any = cls
    held: Any = cls
    options: list[type[BaseModel]] = []
    shown: list[Any] = []
    keyed = False  # the next part is a key of a mapping, whose values are `node`
    for part in loc:
        if keyed:
            shown.append(part)
            keyed = False
            continue
        chosen = [o for o in options if _kind_of(o) == part]
        if chosen:
            node, options = chosen[0], []  # pydantic's tag of the kind, no field of the file
            continue
        shown.append(part)
        held = node
        field = getattr(node, "model_fields", {}).get(part)
        node = field.annotation if field else None
        keyed = get_origin(node) is dict
        arguments = getattr(node, "__args__", ())
        options = [o for o in arguments if isinstance(o, type) and issubclass(o, BaseModel)]
        if len(options) == 1:
            node = options[0]  # X | None
    return shown, held


def _kind_of(node: type[BaseModel]) -> Any:
    field = node.model_fields.get("kind")
    return field.default if field else None
