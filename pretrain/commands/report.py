"""`report`: one run or several side by side, as one HTML page."""

import argparse

HELP = "write one page about a run, or several side by side: curves, scores, pictures, cost"


def configure(parser: argparse.ArgumentParser) -> None:
    """Options."""
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="a run's output folder, or a folder of results of `evaluate --suite`",
    )
    parser.add_argument("--out", required=True, help="the page to write, as report.html")


def run(args: argparse.Namespace) -> int:
    """Read, draw, write."""
    from pretrain import storage
    from pretrain.report import page, read

    text = page.render(read.load(args.runs)).encode()
    storage.write_bytes(args.out, text)
    print(f"{args.out}: {len(text) / 1e6:.1f} MB")
    return 0
