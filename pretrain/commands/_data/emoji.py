"""Rebuild the embedded corpus: 2,575 drawings at 64 px, with their manifests and NOTICE.

Needs npm and resvg-py. The versions are pinned by hash, and the bytes come out the same.
"""

import argparse

HELP = "rebuild the embedded corpus from npm packages (needs npm and resvg-py)"


def configure(parser: argparse.ArgumentParser) -> None:
    """Options."""
    parser.add_argument(
        "--out", default="data/emoji", help="folder of the shards (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    """Build, index, and say what was written."""
    from pathlib import Path

    from pretrain.data import emoji, index

    out = Path(args.out)
    for split, paths in emoji.build(out).items():
        index.build([str(p) for p in paths], str(out / f"{split}.json"), versions=False)
        size = sum(p.stat().st_size for p in paths)
        print(f"{split}: {len(paths)} shards, {size:,} bytes")
    return 0
