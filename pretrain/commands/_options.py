"""Options that several commands share."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pretrain import plugins
from pretrain.errors import ConfigError


def add_verbs(parser: argparse.ArgumentParser, package: str) -> None:
    """A verb for each file of ``package``, with its own options, as ``args.verb``."""
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name in plugins.names(package):
        module = plugins.load(package, name, "verb")
        module.configure(verbs.add_parser(name, help=module.HELP, description=module.__doc__))


def run_verb(args: argparse.Namespace, package: str) -> int:
    """Run the verb that was chosen."""
    return int(plugins.load(package, args.verb, "verb").run(args))


def count(text: str) -> int:
    """An integer from 1 on; 1e9 is one too."""
    value = float(text)
    if value != int(value) or value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number from 1 on")
    return int(value)


def add_overrides(parser: argparse.ArgumentParser, help: str = "override one field") -> None:
    """``--set FIELD=VALUE``, any number of times, as ``args.overrides``."""
    parser.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", dest="overrides", help=help
    )


def add_choice(parser: argparse.ArgumentParser) -> None:
    """Which checkpoint, as ``args.checkpoint``, and which weights of it, as ``args.weights``."""
    parser.add_argument(
        "--checkpoint",
        default="newest",
        metavar="WHICH",
        help="newest, best, or a number of samples (default: %(default)s)",
    )
    parser.add_argument(
        "--weights",
        metavar="KIND",
        help="weights, or a moving average such as ema-2000 (default: the run's ema.use)",
    )


def add_model(parser: argparse.ArgumentParser) -> None:
    """Which model, for `opened_model`."""
    parser.add_argument(
        "--model",
        required=True,
        help="folder made by `export` or `pull`, or models:/NAME@ALIAS of the registry",
    )
    parser.add_argument("--uri", help="tracking URI of models:/...; else MLFLOW_TRACKING_URI")


@contextmanager
def opened_model(args: argparse.Namespace) -> Iterator[Path]:
    """The folder of ``args.model``, fetched and verified where it names a registered version."""
    if not args.model.startswith("models:/"):
        yield Path(args.model)
        return
    from pretrain import mlflow_env, registry

    with registry.opened(args.model, mlflow_env.require_uri(args.uri)) as folder:
        yield folder


def parse_part(text: str) -> tuple[int, int]:
    """(I, N) of ``--part I/N``.

    Raises:
        ConfigError: it is not of that form, or I is not below N.
    """
    try:
        number, _, parts = text.partition("/")
        part = (int(number), int(parts))
        if not 0 <= part[0] < part[1]:
            raise ValueError
    except ValueError:
        raise ConfigError(f"--part={text} must be I/N with 0 <= I < N, as 0/4") from None
    return part
