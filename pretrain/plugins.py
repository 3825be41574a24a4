"""A plug-in is a file in a package, found by its module name: no registry to edit."""

import importlib
import pkgutil
from difflib import get_close_matches
from types import ModuleType

from pretrain.errors import ConfigError


def names(package: str) -> list[str]:
    """Names of the plug-ins of ``package``: its modules, less `base` and those with a leading
    underscore."""
    paths = importlib.import_module(package).__path__
    found = (m.name for m in pkgutil.iter_modules(paths))
    return sorted(n for n in found if n != "base" and not n.startswith("_"))


def load(package: str, name: str, field: str) -> ModuleType:
    """Import plug-in ``name`` of ``package``.

    Raises:
        ConfigError: there is no such plug-in; the message names ``field`` and lists what exists.
    """
    known = names(package)
    if name not in known:
        close = get_close_matches(name, known, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ConfigError(f"{field}={name!r} is unknown{hint} (there are: {', '.join(known)})")
    return importlib.import_module(f"{package}.{name}")
