"""Write pictures and captions as shards, with their manifest.

SOURCE is a folder of pictures with a .txt or .json of the same name beside each; or a .csv, .tsv
or .parquet table with a column of paths, URLs or bytes and columns of captions; or tables by a
pattern, as 'part-*.parquet'. Samples that cannot be used are left out and counted. The order of the
source is kept, and the same source gives the same bytes. Run the same command again to go on after
a stop.
"""

import argparse

HELP = "write a folder or a table of pictures and captions as shards"


def configure(parser: argparse.ArgumentParser) -> None:
    """Options."""
    parser.add_argument("source", help="folder, table or pattern of tables; local or a URL")
    parser.add_argument("--out", required=True, help="folder of the shards, local or a URL")
    parser.add_argument(
        "--shard-mib", type=int, default=256, help="a shard's bound (default: %(default)s)"
    )
    parser.add_argument(
        "--shard-samples", type=int, default=10_000, help="likewise (default: %(default)s)"
    )
    parser.add_argument("--max-side", type=int, help="scale larger pictures down to so many pixels")
    parser.add_argument("--min-side", type=int, default=1, help="refuse smaller pictures")
    parser.add_argument(
        "--format", choices=("jpg", "png", "webp"), help="encode all pictures so (default: keep)"
    )
    parser.add_argument(
        "--quality", type=int, default=92, help="of jpg and webp (default: %(default)s)"
    )
    parser.add_argument("--parallel", type=int, default=1, help="processes (default: %(default)s)")
    parser.add_argument("--image-column", metavar="NAME", help="of a table; guessed if not given")
    parser.add_argument(
        "--caption-column",
        metavar="NAME",
        action="append",
        default=[],
        help="likewise; may be given several times, and may hold lists",
    )
    parser.add_argument("--key-column", metavar="NAME", help="names samples (default: row number)")
    parser.add_argument(
        "--field",
        metavar="NAME",
        action="append",
        default=[],
        help="column to copy into the samples' .json; may be given several times",
    )
    parser.add_argument(
        "--root", help="folder or URL of a table's relative paths (default: its own)"
    )
    parser.add_argument(
        "--deadline",
        type=float,
        default=30.0,
        metavar="SECONDS",
        help="after which a picture's URL is given up (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Pack, and say what became of the rows."""
    from pretrain import storage
    from pretrain.commands._data._meter import Meter
    from pretrain.data import pack, prepare, rows
    from pretrain.errors import ConfigError
    from pretrain.page.show import plain

    for name, least in (
        *(("shard_mib", 1), ("shard_samples", 1), ("max_side", 1), ("min_side", 1)),
        *(("quality", 1), ("parallel", 1), ("deadline", 0.001)),
    ):
        value = getattr(args, name)
        if value is not None and value < least:
            raise ConfigError(f"--{name.replace('_', '-')}={value} must be at least {least}")
    if args.quality > 100:
        raise ConfigError(f"--quality={args.quality} must be at most 100")
    columns = rows.Columns(
        args.image_column,
        tuple(args.caption_column),
        args.key_column,
        tuple(args.field),
        args.root,
    )
    options = prepare.PackOptions(
        shard_bytes=args.shard_mib << 20,
        shard_samples=args.shard_samples,
        max_side=args.max_side,
        format=args.format,
        quality=args.quality,
        min_side=args.min_side,
    )
    retry = storage.Retry(deadline_seconds=args.deadline, attempt_seconds=min(15.0, args.deadline))
    meter = Meter("pack", "rows")

    def report(read: int, samples: int, shards: int) -> None:
        meter(read, note=f"{samples:,} samples, {shards:,} shards written")

    state = pack.pack(
        rows.open_source(args.source, columns),
        args.out,
        options,
        parallel=args.parallel,
        retry=retry,
        report=report,
    )
    meter.close()
    print(
        f"{storage.join(args.out, pack.MANIFEST)}: {state.samples:,} samples of {state.next_row:,} "
        f"rows in {state.shards:,} shards, {state.bytes:,} bytes"
    )
    for reason, count in sorted(state.rejects.items(), key=lambda pair: -pair[1]):
        named = ", ".join(state.examples[reason])
        print(plain(f"  left out: {count:,} × {reason} (as {named})"))
    return 0
