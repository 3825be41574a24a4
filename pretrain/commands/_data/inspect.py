"""Write one HTML page of a data set: contact sheet, captions, sizes, refusals, shards.

The page needs nothing else (no network, no scripts). At most --samples samples are read, each with
one ranged read; sizes come from the member table.
"""

import argparse

HELP = "show a data set as one self-contained HTML page"


def configure(parser: argparse.ArgumentParser) -> None:
    """Options."""
    parser.add_argument("manifest", help="path or URL")
    parser.add_argument("--out", required=True, help="the page to write, as page.html")
    parser.add_argument(
        "--samples", type=int, default=5000, help="read at most so many (default: %(default)s)"
    )
    parser.add_argument(
        "--pictures", type=int, default=60, help="of the contact sheet (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="draws the samples")
    parser.add_argument(
        "--tokenizer", help="sentencepiece model: captions are then measured in tokens"
    )
    parser.add_argument("--tokens", type=int, help="length at which the trainer cuts captions")
    parser.add_argument(
        "--parallel", type=int, default=8, help="samples read at a time (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    """Read, draw, write."""
    from pretrain import storage
    from pretrain.commands._data._meter import Meter
    from pretrain.data import inspect, page
    from pretrain.data.source import DataConfig
    from pretrain.data.tokenizer import Tokenizer
    from pretrain.errors import ConfigError

    for name in ("samples", "pictures", "parallel"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name}={getattr(args, name)} must be at least 1")
    if args.tokens is not None and not args.tokenizer:
        raise ConfigError(f"--tokens={args.tokens} needs --tokenizer to count them")
    meter = Meter("inspect", "samples")
    found = inspect.survey(
        args.manifest,
        samples=args.samples,
        pictures=args.pictures,
        seed=args.seed,
        bounds=DataConfig(train="", tokenizer="").bounds,
        tokenizer=Tokenizer(args.tokenizer) if args.tokenizer else None,
        limit=args.tokens,
        parallel=args.parallel,
        report=meter,
    )
    text = page.render(found).encode()
    storage.write_bytes(args.out, text)
    print(
        f"{args.out}: {found.read:,} of {found.samples:,} samples, {len(found.rejects):,} "
        f"refusals, {len(text):,} bytes"
    )
    return 0
