"""`data plan`: who reads what on any number of ranks, before a run holds them."""

import argparse

from pretrain.commands._options import count

HELP = "simulate who reads what: bytes of each rank, longest queue, cache of a node"


def configure(parser: argparse.ArgumentParser) -> None:
    """Options."""
    parser.add_argument("manifest", nargs="?", help="or --shards and --samples, without any data")
    parser.add_argument("--ranks", type=count, required=True)
    parser.add_argument(
        "--nodes-of", type=count, default=8, metavar="N", help="ranks of a node (default: 8)"
    )
    parser.add_argument("--shards", type=count, help="of a made-up corpus")
    parser.add_argument("--samples", type=count, help="of all shards together; 1e9 is understood")
    parser.add_argument(
        "--shard-gib", type=float, default=1.0, help="mean size of a shard (default: 1)"
    )
    parser.add_argument(
        "--spread", type=float, default=0.1, help="shards vary by +- this share (default: 0.1)"
    )
    parser.add_argument("--lanes", type=count, help="default: from the number of shards")
    parser.add_argument(
        "--window",
        type=_window,
        default=16_384,
        help="samples that are shuffled together in a lane, or `lane` for all (default: 16384)",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epoch", type=int, default=0)


def run(args: argparse.Namespace) -> int:
    """Print the plan."""
    import numpy as np

    from pretrain.data import simulate
    from pretrain.data.order import EpochOrder
    from pretrain.errors import ConfigError

    made_up = args.shards is not None and args.samples is not None
    if (args.manifest is None) != made_up or (args.manifest and (args.shards or args.samples)):
        raise ConfigError("data plan needs a manifest, or --shards and --samples; give one of them")
    if made_up:
        sizes, nbytes = simulate.synthetic(
            args.shards, args.samples, int(args.shard_gib * simulate.GIB), args.spread, args.seed
        )
    else:
        from pretrain.data.manifest import Manifest

        manifest = Manifest.load(args.manifest)
        sizes = manifest.sizes
        nbytes = manifest.shards.columns["bytes"].astype(np.float64)

    def planned(lanes: int | None) -> tuple[EpochOrder, simulate.ReadPlan]:
        order = EpochOrder(sizes, args.seed, lanes=lanes, window=args.window)
        return order, simulate.plan(order, nbytes, args.ranks, args.nodes_of, args.epoch)

    order, found = planned(args.lanes)
    wanted = simulate.better_lanes(order, args.ranks)
    print(simulate.table(found, planned(wanted)[1] if wanted else None))
    return 0


def _window(text: str) -> int | None:
    return None if text == "lane" else count(text)
