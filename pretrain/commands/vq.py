"""`vq`: pictures as tokens, and discrete diffusion over them (VQ-Diffusion, CDCD). Each verb is a
file under `_vq/`."""

import argparse

from pretrain.commands._options import add_verbs, run_verb

HELP = "train a VQ tokenizer and a token diffusion model with CDCD, and sample it"
PACKAGE = "pretrain.commands._vq"


def configure(parser: argparse.ArgumentParser) -> None:
    """Options of every verb."""
    add_verbs(parser, PACKAGE)


def run(args: argparse.Namespace) -> int:
    """Run the verb."""
    return run_verb(args, PACKAGE)
