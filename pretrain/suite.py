"""A suite: a YAML file of named entries, each an evaluator with its settings, over named sets."""

import itertools
import json
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from pretrain import plugins
from pretrain.config import Config, build, read_yaml
from pretrain.errors import ConfigError
from pretrain.evaluators.base import Evaluator, EvaluatorConfig
from pretrain.run_config import EVALUATORS

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")
# Fields of a suite's entry that are no settings of its evaluator.
_OWN = ("evaluator", "sets", "sweep")


class SuiteConfig(Config):
    """A suite as it stands in its file.

    Attributes:
        sets: definition of each data set by name, as `SetConfig` reads it.
        entries: by name: ``evaluator``, ``sets`` (names), ``sweep`` (field: list of values), and
            settings of the evaluator. ``null`` leaves out an entry of a base.
    """

    name: str = Field(min_length=1)
    sets: dict[str, str | dict[str, Any]] = Field(default_factory=dict)
    entries: dict[str, dict[str, Any]]

    @field_validator("entries", mode="before")
    @classmethod
    def _without_null(cls, tree: Any) -> Any:
        return {k: v for k, v in tree.items() if v is not None} if isinstance(tree, dict) else tree


@dataclass(frozen=True)
class Entry:
    """One evaluator with checked settings.

    Attributes:
        name: in the suite; of a sweep with its values, as ``pareto[guidance=3.0,steps=18]``.
        base: the name in the file; the same for all of a sweep.
        evaluator: its plug-in's name.
        settings: checked.
        sets: definition of each set it reads, as written in the suite.
    """

    name: str
    base: str
    evaluator: str
    settings: EvaluatorConfig
    sets: dict[str, Any]

    def build(self) -> Evaluator:
        """The evaluator.

        Raises:
            ConfigError: settings that agree with each field, but not with each other.
        """
        module = plugins.load(EVALUATORS, self.evaluator, f"entries.{self.base}.evaluator")
        try:
            evaluator: Evaluator = module.build(self.settings)
        except ConfigError as error:
            raise ConfigError(f"entries.{self.name}: {error}") from None
        return evaluator

    def resolved(self) -> dict[str, Any]:
        """Every setting, defaults filled in, as JSON types; those of training's clock left out."""
        tree = self.settings.model_dump(mode="json")
        return {k: v for k, v in tree.items() if k not in EvaluatorConfig.model_fields}


@dataclass(frozen=True)
class Suite:
    """Checked, with sweeps made into entries."""

    name: str
    entries: tuple[Entry, ...]

    def chosen(self, names: Collection[str]) -> list[Entry]:
        """The entries of these names, all without any; a sweep's name means all of it.

        Raises:
            ConfigError: there is none such.
        """
        known = [n for e in self.entries for n in (e.base, e.name)]
        for name in names:
            if name not in known:
                raise ConfigError(f"--only {name!r} is no entry of the suite{_hint(name, known)}")
        return [e for e in self.entries if not names or e.name in names or e.base in names]


def load(path: str | Path) -> Suite:
    """Read and check a suite; no set and no other file is opened.

    Raises:
        ConfigError: unreadable; an unknown evaluator, set or setting; a setting that is not valid.
    """
    config = build(SuiteConfig, read_yaml(path))
    if not config.entries:
        raise ConfigError("entries={}: a suite needs at least one, as NAME: {evaluator: zero_shot}")
    found: dict[str, Entry] = {}
    for name, fields in config.entries.items():
        for entry in _expand(name, fields, config.sets):
            if entry.name in found:
                raise ConfigError(f"entries.{name}: two entries are called {entry.name!r}")
            entry.build()
            found[entry.name] = entry
    return Suite(config.name, tuple(found.values()))


def _expand(name: str, fields: Mapping[str, Any], sets: Mapping[str, Any]) -> Iterator[Entry]:
    where = f"entries.{name}"
    if not _NAME.fullmatch(name):
        raise ConfigError(f"{where}: a name is letters, digits and . _ + -; rename it")
    evaluator = fields.get("evaluator")
    if not isinstance(evaluator, str):
        raise ConfigError(
            f"{where}.evaluator: required, but not given; there are: "
            f"{', '.join(plugins.names(EVALUATORS))}"
        )
    module = plugins.load(EVALUATORS, evaluator, f"{where}.evaluator")
    settings = {k: v for k, v in fields.items() if k not in _OWN}
    for field in EvaluatorConfig.model_fields:
        if field in settings:
            raise ConfigError(
                f"{where}.{field}={settings[field]!r}: says when in training it runs, which means "
                "nothing in a suite; remove it"
            )
    chosen = _choose_sets(where, fields, sets)
    if "sets" in fields:
        if "sets" not in module.Settings.model_fields:
            raise ConfigError(f"{where}.sets: evaluator {evaluator!r} reads no sets; remove it")
        settings["sets"] = chosen
    for swept in _combinations(where, fields.get("sweep", {}), settings):
        values = ",".join(f"{k}={_text(v)}" for k, v in swept.items())
        full = f"{name}[{values}]" if swept else name
        checked = build(module.Settings, settings | swept, where=f"entries.{full}")
        yield Entry(full, name, evaluator, checked, chosen)


def _choose_sets(where: str, fields: Mapping[str, Any], sets: Mapping[str, Any]) -> dict[str, Any]:
    names = fields.get("sets", [])
    if not isinstance(names, list):
        raise ConfigError(f"{where}.sets={names!r} must be a list of names of the suite's sets")
    for name in names:
        if name not in sets:
            raise ConfigError(
                f"{where}.sets={name!r} is unknown{_hint(str(name), list(sets))}; define it under "
                "`sets` of the suite"
            )
    return {name: sets[name] for name in names}


def _combinations(where: str, sweep: Any, settings: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Every combination of the swept values; the last field changes fastest."""
    if not isinstance(sweep, dict):
        raise ConfigError(f"{where}.sweep={sweep!r} must be a mapping, as {{steps: [1, 4]}}")
    for field, values in sweep.items():
        if not isinstance(values, list) or not values:
            raise ConfigError(f"{where}.sweep.{field}={values!r} must be a list of values")
        texts = [_text(v) for v in values]
        if len(set(texts)) < len(texts):
            raise ConfigError(f"{where}.sweep.{field}={values!r} names a value twice")
        if field in settings or field in _OWN:
            raise ConfigError(
                f"{where}.sweep.{field}: the entry gives {field!r} beside the sweep; keep one"
            )
    for combination in itertools.product(*sweep.values()):
        yield dict(zip(sweep, combination, strict=True))


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))


def _hint(name: str, known: list[str]) -> str:
    close = get_close_matches(name, known, n=1)
    meant = f"; did you mean {close[0]!r}?" if close else ""
    return f"{meant} (there are: {', '.join(dict.fromkeys(known)) or 'none'})"
