"""Read every byte of a run's checkpoints and compare sizes and hashes; exit code 1 if one is
damaged."""

import argparse

HELP = "check sizes and hashes of a run's checkpoints"


def configure(parser: argparse.ArgumentParser) -> None:
    """Options."""
    parser.add_argument("output", metavar="RUN", help="the run's output folder")
    parser.add_argument(
        "--checkpoint",
        default="all",
        metavar="WHICH",
        help="all, newest, or a number of samples (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Print a verdict for each."""
    from pretrain import ckpt_tools

    damaged = 0
    for checkpoint, problem in ckpt_tools.verify(args.output, args.checkpoint):
        damaged += problem is not None
        print(f"{checkpoint.samples:>13,}  {problem or 'whole'}", flush=True)
    return 1 if damaged else 0
