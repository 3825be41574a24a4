"""`data`: make, index, check, show and plan shards. Each verb is a file under `_data/`."""

import argparse

from pretrain.commands._options import add_verbs, run_verb

HELP = "make, index, verify, show and plan shards"
PACKAGE = "pretrain.commands._data"


def configure(parser: argparse.ArgumentParser) -> None:
    """Options of every verb."""
    add_verbs(parser, PACKAGE)


def run(args: argparse.Namespace) -> int:
    """Run the verb."""
    return run_verb(args, PACKAGE)
