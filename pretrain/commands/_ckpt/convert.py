"""Write a checkpoint anew as another number of ranks would have written it. (A resume does not need
this: it takes any number.)"""

import argparse

HELP = "re-cut a checkpoint for another number of ranks"


def configure(parser: argparse.ArgumentParser) -> None:
    """Options."""
    parser.add_argument("output", metavar="RUN", help="the run's output folder")
    parser.add_argument("--to", required=True, help="the folder to write")
    parser.add_argument("--ranks", type=int, default=1, help="ranks (default: %(default)s)")
    parser.add_argument(
        "--checkpoint",
        default="newest",
        metavar="WHICH",
        help="newest, best, or a number of samples (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Convert."""
    from pretrain import ckpt_tools
    from pretrain.errors import ConfigError

    if args.ranks < 1:
        raise ConfigError(f"--ranks={args.ranks} must be at least 1")
    checkpoint = ckpt_tools.choose(args.output, args.checkpoint)
    print(f"wrote {ckpt_tools.convert(checkpoint, args.to, args.ranks)}")
    return 0
