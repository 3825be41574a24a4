"""`export`: a committed checkpoint as a folder of safetensors, JSON and the tokenizer."""

import argparse

from pretrain.commands._options import add_choice

HELP = "write a run's checkpoint as a model folder without pickles"


def configure(parser: argparse.ArgumentParser) -> None:
    """Options."""
    parser.add_argument("--output", required=True, help="the run's output folder")
    parser.add_argument("--to", required=True, help="the folder to write")
    add_choice(parser)


def run(args: argparse.Namespace) -> int:
    """Export."""
    from pretrain.export import export

    print(f"exported {export(args.output, args.to, args.checkpoint, args.weights)}")
    return 0
