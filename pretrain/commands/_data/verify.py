"""Read every byte of a data set: hashes, the member table, every sample as the trainer reads it.

Exit code 0: nothing is damaged; 1: something is. Pictures that are alike (--duplicates) are
reported and are no damage, unless --strict.
"""

import argparse

HELP = "check hashes, checksums, decodability and duplicates; exit code 1 on damage"


def configure(parser: argparse.ArgumentParser) -> None:
    """Options."""
    parser.add_argument("manifest", help="path or URL")
    parser.add_argument("--parallel", type=int, default=1, help="processes (default: %(default)s)")
    parser.add_argument("--no-decode", action="store_true", help="decode no picture: much faster")
    parser.add_argument(
        "--duplicates", action="store_true", help="look for equal and nearly equal pictures too"
    )
    parser.add_argument(
        "--near-bits",
        type=int,
        default=3,
        help="of 64, by which the dHashes of nearly equal pictures may differ, 0-3 "
        "(default: %(default)s)",
    )
    parser.add_argument("--strict", action="store_true", help="exit code 1 for duplicates as well")
    parser.add_argument(
        "--limit", type=int, default=5, help="samples named for each reason (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print all of it as JSON")


def run(args: argparse.Namespace) -> int:
    """Verify, and say what was found."""
    import json
    from dataclasses import asdict

    from pretrain.commands._data._meter import Meter
    from pretrain.data import verify
    from pretrain.data.source import DataConfig
    from pretrain.errors import ConfigError

    if not 0 <= args.near_bits <= 3:
        raise ConfigError(f"--near-bits={args.near_bits} must be 0 to 3")
    if args.parallel < 1:
        raise ConfigError(f"--parallel={args.parallel} must be at least 1")
    options = verify.VerifyOptions(
        bounds=DataConfig(train="", tokenizer="").bounds,
        decode=not args.no_decode,
        duplicates=args.duplicates,
        near_bits=args.near_bits,
    )
    meter = Meter("verify", "shards")
    verdict = verify.verify(args.manifest, options, parallel=args.parallel, report=meter)
    if args.json:
        lists = ("problems", "same", "near")
        told = {name: [asdict(one) for one in getattr(verdict, name)] for name in lists}
        counters = {"counts": dict(verdict.counts), "by_shard": dict(verdict.by_shard)}
        print(json.dumps({"clean": verdict.clean, **vars(verdict), **counters, **told}, indent=1))
    else:
        print(verify.table(verdict, options, args.limit))
    alike = verdict.num_same + verdict.num_near
    return 0 if verdict.clean and not (args.strict and alike) else 1
