"""Build the study corpus into a cache: ten vendors' emoji and Debian's clip art, in .tar shards.

Splits: train; heldout-vendor (known concepts in the style of a vendor that is not in train);
heldout-concepts (10% of the concepts, of all vendors). Downloads come from npm and apt, pinned by
hash. Run it again to go on after a stop; a finished corpus is left as it is.
"""

import argparse

HELP = "build the study corpus (about 17,000 pairs) into a cache (needs npm; apt for the clip art)"


def configure(parser: argparse.ArgumentParser) -> None:
    """Options."""
    parser.add_argument(
        "--out", help="folder of the corpus (default: ~/.cache/diffdis-pretrain/study)"
    )
    parser.add_argument(
        "--vendors", nargs="+", metavar="NAME", help="these sets of emoji only (default: all ten)"
    )
    parser.add_argument("--no-openclipart", action="store_true", help="leave the clip art out")
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument(
        "--size", type=int, default=128, help="side of a picture in pixels (default: %(default)s)"
    )
    sizes.add_argument(
        "--sizes", metavar="LOW:HIGH", help="a side of its own for each picture, as 256:512"
    )
    parser.add_argument("--format", default="png", help="png, jpg or webp (default: %(default)s)")
    parser.add_argument(
        "--shard-mib", type=int, default=8, help="bound of a shard (default: %(default)s)"
    )
    parser.add_argument(
        "--limit", type=int, metavar="N", help="at most N drawings of each vendor, for a trial"
    )
    parser.add_argument(
        "--parallel", type=int, default=1, help="rendering processes (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    """Build, show progress, and say what there is."""
    from pathlib import Path

    from pretrain.commands._data._meter import Meter
    from pretrain.data import study
    from pretrain.data.drawings import VENDORS
    from pretrain.errors import ConfigError

    if args.parallel < 1:
        raise ConfigError(f"--parallel={args.parallel} must be 1 or more")
    recipe = study.Recipe(
        vendors=tuple(args.vendors or VENDORS),
        openclipart=not args.no_openclipart,
        sizes=_sizes(args.sizes) if args.sizes else (args.size, args.size),
        format=args.format,
        shard_mib=args.shard_mib,
        limit=args.limit,
    )
    out = Path(args.out) if args.out else study.default_out()
    meter = Meter("study", "drawings", every_seconds=5.0)
    before: list[int] = []  # what an earlier build had done says nothing of this one's speed

    def report(done: int, total: int, split: str) -> None:
        before[:] = before or [done]
        note = f"{split}, beside {before[0]:,} that were there" if before[0] else split
        meter(done - before[0], total - before[0], note)

    made = study.build(out, recipe, args.parallel, report)
    for split, found in made["splits"].items():
        vendors = ", ".join(f"{v} {n:,}" for v, n in found["samples"].items())
        print(
            f"{split}: {sum(found['samples'].values()):,} samples in {len(found['shards'])} "
            f"shards, {sum(found['shards'].values()):,} bytes ({vendors or 'none'})"
        )
    for reason, count in made["skipped"].items():
        print(f"  left out: {count:,} × {reason}")
    print(f"{out / 'train.json'}   attribution and licences: {out / 'NOTICE'}")
    return 0


def _sizes(text: str) -> tuple[int, int]:
    from pretrain.errors import ConfigError

    low, _, high = text.partition(":")
    try:
        return int(low), int(high)
    except ValueError:
        raise ConfigError(f"--sizes={text} must be LOW:HIGH, as 256:512") from None
