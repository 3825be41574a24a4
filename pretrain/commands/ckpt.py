"""`ckpt`: see, check, mend and convert a run's checkpoints. Each verb is a file under `_ckpt/`."""

import argparse

from pretrain.commands._options import add_verbs, run_verb

HELP = "list, verify, mend and convert a run's checkpoints"
PACKAGE = "pretrain.commands._ckpt"


def configure(parser: argparse.ArgumentParser) -> None:
    """Options of every verb."""
    add_verbs(parser, PACKAGE)


def run(args: argparse.Namespace) -> int:
    """Run the verb."""
    return run_verb(args, PACKAGE)
