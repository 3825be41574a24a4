"""What a user describes, checked by pydantic without conversions; errors name a remedy."""

import re
from collections.abc import Mapping
from difflib import get_close_matches
from types import MappingProxyType
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Strict, ValidationError


class JobError(Exception):
    """A job cannot run as asked; the message names the field, the value and the remedy."""


class Part(BaseModel):
    """A frozen node within another. Unknown fields are refused; `"2"` is not taken for 2."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, validate_default=True)


class Described(Part):
    """A node that stands by itself.

    Raises:
        JobError: from the constructor, about the first wrong field.
    """

    def __init__(self, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise JobError(_explain(type(self), error.errors()[0])) from None


# YAML has lists, a frozen node has tuples: of these two alone one stands for the other.
Texts = Annotated[tuple[str, ...], Strict(False)]
# A frozen node holds no dict that its maker could still change.
Variables = Annotated[Mapping[str, str], AfterValidator(lambda v: MappingProxyType(dict(v)))]
Tree = Annotated[Mapping[str, Any], AfterValidator(lambda v: MappingProxyType(dict(v)))]

_EXPECTED = {
    "string_type": "must be text; put it in quotes",
    "int_type": "must be a whole number",
    "bool_type": "must be true or false",
    "float_type": "must be a number",
    "tuple_type": "must be a list",
    "mapping_type": "must be a mapping of names to values",
}


def _explain(cls: type[BaseModel], problem: Any) -> str:
    field = ".".join(map(str, problem["loc"]))
    kind, context = problem["type"], problem.get("ctx", {})
    if kind == "extra_forbidden":
        known = sorted(_node(cls, problem["loc"][:-1]).model_fields)
        close = get_close_matches(str(problem["loc"][-1]), known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"there are: {', '.join(known)}"
        return f"{field}: unknown field; {hint}"
    if kind == "missing":
        return f"{field}: required, but not given; add it"
    if kind == "value_error":
        # A check of ours: its text names value and remedy, and the field where it knows better.
        return str(context["error"]).replace("{field}", field)
    said = _EXPECTED.get(kind) or problem["msg"][0].lower() + problem["msg"][1:]
    if problem["loc"] and problem["loc"][0] in ("env", "secrets"):
        return f"{field}: {said}"  # the value may be a secret
    return f"{field}={problem['input']!r} {said}"


def _node(cls: type[BaseModel], path: tuple[Any, ...]) -> type[BaseModel]:
    for part in path:
        inner = cls.model_fields[part].annotation if part in cls.model_fields else None
        for one in (inner, *getattr(inner, "__args__", ())):
            if isinstance(one, type) and issubclass(one, BaseModel):
                cls = one
    return cls


def check_text(name: str, value: str, shown: str = "") -> None:
    """Raises:
    JobError: ``value`` holds a control character, or cannot be written as UTF-8.
    """
    if any(ord(c) < 32 or ord(c) == 127 for c in value):
        raise JobError(f"{name}={shown or repr(value)} holds a control character; remove it")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise JobError(f"{name}={shown or repr(value)} is not Unicode text; correct it") from None


def check_match(name: str, value: str, pattern: re.Pattern[str], remedy: str) -> None:
    """Raises:
    JobError: the whole of ``value`` is not of the form ``pattern``.
    """
    if not pattern.fullmatch(value):
        raise JobError(f"{name}={value!r} is not usable; {remedy}")


def check_path(name: str, value: str) -> None:
    """Raises:
    JobError: ``value`` is empty, would be read as an option, or `check_text` refuses it.
    """
    check_text(name, value)
    if value == "":
        raise JobError(f"{name}='' is empty; give a path")
    if value.startswith("-"):
        raise JobError(f"{name}={value!r} would be read as an option; write ./{value}")
