"""`ckpt`: see, check, mend and convert a run's checkpoints. Each verb is a file under `_ckpt/`."""

import argparse

from pretrain import plugins

HELP = "list, verify, mend and convert a run's checkpoints"
PACKAGE = "pretrain.commands._ckpt"


def configure(parser: argparse.ArgumentParser) -> None:
    """Options of every verb."""
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name in plugins.names(PACKAGE):
        module = plugins.load(PACKAGE, name, "verb")
        one = verbs.add_parser(name, help=module.HELP, description=module.__doc__)
        module.configure(one)


def run(args: argparse.Namespace) -> int:
    """Run the verb."""
    return int(plugins.load(PACKAGE, args.verb, "verb").run(args))
