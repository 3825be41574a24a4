"""Tell and show the exact samples of a step, or of a range of sample numbers, of a run.

A sample is a pure function of the configuration, its seed and its number: no run is needed.
"""

import argparse

from pretrain.commands._options import add_overrides

HELP = "the exact samples of a step, as a table and as pictures"


def configure(parser: argparse.ArgumentParser) -> None:
    """Options."""
    parser.add_argument("--config", required=True, help="YAML file of the run")
    add_overrides(parser, "override one field, as the run did")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument(
        "--step",
        type=int,
        help="counted from 1, of a run that kept its training.global_batch",
    )
    which.add_argument("--samples", metavar="A:B", help="global numbers from A to B, B excluded")
    parser.add_argument("--ranks", type=int, default=1, help="of the run (default: %(default)s)")
    parser.add_argument("--out", help="also write the pictures: a .png sheet or an .html page")


def run(args: argparse.Namespace) -> int:
    """Look the samples up."""
    import shutil
    import sys

    from pretrain import config
    from pretrain.data import explain
    from pretrain.data.order import rank_numbers
    from pretrain.data.source import Source
    from pretrain.errors import ConfigError
    from pretrain.run_config import RunConfig

    if args.out and not args.out.lower().endswith((".png", ".html", ".htm")):
        raise ConfigError(f"--out={args.out!r} must end in .png or .html")
    settings = config.load(RunConfig, args.config, args.overrides)
    batch = settings.training.global_batch
    rank_numbers(0, batch, 0, args.ranks)  # says so where the batch does not divide
    if args.step is not None:
        if args.step < 1:
            raise ConfigError(f"--step={args.step} must be at least 1, the first step")
        numbers, title = range((args.step - 1) * batch, args.step * batch), f"Step {args.step}"
    else:
        numbers = _range(args.samples)
        title = f"Samples {numbers.start} to {numbers.stop - 1}"
    source = Source(settings.data, settings.seed)
    try:
        lines = explain.explain(source, numbers, batch, args.ranks)
    finally:
        source.close()
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    print(explain.table(lines, width))
    if args.out:
        explain.write(lines, args.out, f"{title} of {settings.name}")
        print(f"wrote {args.out}", file=sys.stderr)
    return 0


def _range(text: str) -> range:
    from pretrain.errors import ConfigError

    start, _, end = text.partition(":")
    try:
        found = range(int(start), int(end))
    except ValueError:
        found = range(0)
    if not found or found.start < 0:
        raise ConfigError(f"--samples={text} must be A:B with 0 <= A < B, as 1000:1064")
    return found
