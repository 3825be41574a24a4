"""`python -m launcher BACKEND --config configs/x.yaml`: plan a run, then submit it."""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from launcher import backends
from launcher.job import OUTPUT_FIELD, JobError, JobSpec


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: the backend's own, or 2 for a job that cannot run as asked."""
    parser = _parser()
    args = parser.parse_args(arguments)
    try:
        backend = backends.load(args.backend)
        plan = backend.plan(_job(args))
        if args.dry_run:
            print(plan.render(), end="")
            return 0
        return backend.submit(plan)
    except JobError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    known = "\n".join(f"  {name:<12} {backends.load(name).HELP}" for name in backends.names())
    parser = argparse.ArgumentParser(
        prog="python -m launcher",
        description="Start a pretraining run; it continues what its output folder holds.",
        epilog=f"backends:\n{known}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("backend", help="where to run; one of those below")
    parser.add_argument(
        "--config", required=True, metavar="FILE", help="YAML file of the run, as in configs/"
    )
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="lay a value over the config",
    )
    parser.add_argument(
        "--output", metavar="DIR", help="folder or URL of the run (default: the config's)"
    )
    parser.add_argument("--name", help="name of the job (default: from the config's file name)")
    parser.add_argument(
        "--ranks",
        type=int,
        metavar="N",
        help="ranks on each node (default: one per GPU, or 2 on CPU)",
    )
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="machines (default: 1)")
    parser.add_argument(
        "--env",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="variable for every rank; never logged if secret",
    )
    parser.add_argument(
        "--port", type=int, help="port of the rendezvous (default: derived from name and output)"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the plan and start nothing")
    return parser


def _job(args: argparse.Namespace) -> JobSpec:
    overrides = tuple(args.overrides)
    return JobSpec(
        name=args.name or _name(args.config),
        config=args.config,
        output=args.output or _output(args.config, overrides),
        overrides=tuple(o for o in overrides if not o.startswith(f"{OUTPUT_FIELD}=")),
        nodes=args.nodes,
        ranks_per_node=args.ranks,
        env=dict(_variable(text) for text in args.env),
        port=args.port,
    )


def _variable(text: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    if not separator:
        raise JobError(f"--env {name!r} must have the form NAME=value")
    return name, value


def _name(config: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", Path(config).stem.lower()).strip("-")[:63].strip("-") or "run"


def _output(config: str, overrides: Sequence[str]) -> str:
    """The run's output folder, as the trainer finds it: last override, config, or its base."""
    for override in reversed(overrides):
        name, _, value = override.partition("=")
        if name.strip() == OUTPUT_FIELD:
            return value
    found = _read(Path(config), ()).get(OUTPUT_FIELD)
    return found if isinstance(found, str) else f"runs/{_name(config)}"


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
    if not isinstance(tree, dict):
        raise JobError(
            f"config={str(path)!r} must hold a mapping of fields, it holds {type(tree).__name__}"
        )
    base = tree.get("base")
    if base is None:
        return tree
    return {**_read(path.parent / str(base), (*seen, path.resolve())), **tree}


if __name__ == "__main__":
    sys.exit(main())
