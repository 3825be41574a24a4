"""Write the manifest and the member table of tars that exist, without rewriting them.

Names may hold braces and stars: 's3://bucket/{00000..99999}.tar', 'shards/*.tar'. Run it again to
go on after a stop, or to take in new and changed shards only.
"""

import argparse
import sys
import time

from pretrain.commands._options import parse_part

HELP = "write a manifest of existing shards, local or remote"


def configure(parser: argparse.ArgumentParser) -> None:
    """Options."""
    parser.add_argument("shards", nargs="+", help="paths, URLs or patterns of tars, in order")
    parser.add_argument(
        "--out",
        required=True,
        help="manifest to write; shards below its folder are named relative to it",
    )
    parser.add_argument("--parallel", type=int, default=1, help="processes (default: %(default)s)")
    parser.add_argument(
        "--part",
        metavar="I/N",
        default="0/1",
        help="do the I-th N-th of the shards on this machine (I from 0); a last run without "
        "--part joins them",
    )
    parser.add_argument(
        "--no-versions",
        action="store_true",
        help="keep no modification times: the same shards give the same bytes",
    )


def run(args: argparse.Namespace) -> int:
    """Index, and say what was found."""
    from pretrain.data import index

    part = parse_part(args.part)
    urls = index.expand(args.shards)
    began = last = time.monotonic()

    def report(done: int, total: int, url: str) -> None:
        nonlocal last
        now = time.monotonic()
        if done == total or now - last > 2:
            left = (now - began) / done * (total - done)
            print(f"[index] {done:,}/{total:,} shards, {left:.0f} s left  {url}", file=sys.stderr)
            last = now

    found = index.build(
        urls,
        args.out,
        parallel=args.parallel,
        versions=not args.no_versions,
        part=part,
        report=report,
    )
    if found.manifest is None:
        print(f"part {args.part} of {len(urls):,} shards is done; join without --part")
        return 0
    m = found.manifest
    size = sum(m.shards.columns["bytes"].tolist())
    print(
        f"{args.out}: {m.num_samples:,} samples in {len(m.shards):,} shards, {size:,} bytes "
        f"({found.reused:,} shards had not changed)"
    )
    for reason, count in found.rejects.most_common():
        print(f"  not part of any sample: {count} × {reason}")
    return 0
