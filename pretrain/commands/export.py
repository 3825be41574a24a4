"""`export`: the newest committed checkpoint as a folder of safetensors, JSON and the tokenizer."""

import argparse

HELP = "write a run's newest committed checkpoint as a model folder without pickles"


def configure(parser: argparse.ArgumentParser) -> None:
    """Options."""
    parser.add_argument("--output", required=True, help="the run's output folder")
    parser.add_argument("--to", required=True, help="the folder to write")


def run(args: argparse.Namespace) -> int:
    """Export."""
    from pretrain.export import export

    print(f"exported {export(args.output, args.to)}")
    return 0
