"""python -m pretrain COMMAND: one file in pretrain/commands for each."""

import argparse
import sys
from collections.abc import Sequence

from pretrain import plugins, stop
from pretrain.errors import PretrainError

PACKAGE = "pretrain.commands"


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse and run; errors that a user can mend are printed without a traceback, exit code 2."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    # The deepspeed launcher puts --local_rank=N first; ranks are read from the environment.
    arguments = [a for a in arguments if not a.startswith("--local_rank")]
    known = plugins.names(PACKAGE)
    chosen = _command(arguments)
    parser = argparse.ArgumentParser(
        prog="python -m pretrain", description="Pretrain, evaluate and use DiffDis models."
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in known:
        # Command files are light at import: each loads what it runs inside `run`.
        module = plugins.load(PACKAGE, name, "command")
        command = commands.add_parser(name, help=module.HELP, description=module.HELP)
        if name == chosen:
            module.configure(command)
        command.set_defaults(run=module.run)
    options = parser.parse_args(arguments)
    try:
        return int(options.run(options))
    except PretrainError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2


def _command(arguments: Sequence[str]) -> str | None:
    return next((a for a in arguments if not a.startswith("-")), None)


if __name__ == "__main__":
    if _command(sys.argv[1:]) == "train" and "--dry-run" not in sys.argv:
        # Before the slow imports: a signal during them must not kill the rank.
        stop.install(stop.GIVE_UP_SECONDS)
        stop.tolerate_closed_output()
    sys.exit(main())
