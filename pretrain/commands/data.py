"""`data`: make, index and verify shards."""

import argparse

HELP = "build the embedded corpus, index shards, verify a manifest"


def configure(parser: argparse.ArgumentParser) -> None:
    """Options."""
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    emoji = verbs.add_parser(
        "emoji", help="rebuild the embedded corpus from npm packages (needs npm and resvg-py)"
    )
    emoji.add_argument(
        "--out", default="data/emoji", help="folder of the shards (default: %(default)s)"
    )
    index = verbs.add_parser("index", help="write a manifest of existing shards")
    index.add_argument("shards", nargs="+", help="paths or URLs of .tar or .tar.gz files, in order")
    index.add_argument(
        "--out",
        required=True,
        help="manifest to write; shards below its folder are named relative to it",
    )
    verify = verbs.add_parser(
        "verify", help="check hashes, counts and that every sample decodes; exit code 1 on damage"
    )
    verify.add_argument("manifest")


def run(args: argparse.Namespace) -> int:
    """Run the verb."""
    return {"emoji": _emoji, "index": _index, "verify": _verify}[args.verb](args)


def _emoji(args: argparse.Namespace) -> int:
    from pathlib import Path

    from pretrain.data import emoji, manifest

    out = Path(args.out)
    for split, paths in emoji.build(out).items():
        made = manifest.build([str(p) for p in paths], str(out))
        made.save(str(out / f"{split}.json"))
        print(
            f"{split}: {made.num_samples} samples in {len(paths)} shards, "
            f"{sum(s.bytes for s in made.shards):,} bytes"
        )
    return 0


def _index(args: argparse.Namespace) -> int:
    import os

    from pretrain.data import manifest

    folder = args.out.rpartition("/")[0] or os.curdir
    made = manifest.build(args.shards, folder)
    made.save(args.out)
    print(f"{args.out}: {made.num_samples} samples in {len(made.shards)} shards")
    return 0


def _verify(args: argparse.Namespace) -> int:
    from collections import Counter

    from pretrain.data.loader import DataConfig
    from pretrain.data.manifest import Manifest
    from pretrain.data.samples import Bounds, Refused, decode
    from pretrain.data.shards import ShardCache
    from pretrain.errors import DataError

    limits = DataConfig(train="", tokenizer="")
    manifest = Manifest.load(args.manifest)
    cache = ShardCache(manifest, 1)
    problems: list[str] = []
    reasons: Counter[str] = Counter()
    for number, shard in enumerate(manifest.shards):
        try:
            for index in range(shard.samples):
                raw, odd = cache.get(number, index)
                problems += [f"{r.shard}:{r.key}: {r.reason}" for r in odd]
                reasons.update(r.reason for r in odd)
                try:
                    decode(raw, Bounds(limits.max_bytes, limits.max_pixels))
                except Refused as refused:
                    problems.append(f"{raw.shard}:{raw.key}: {refused.reason}")
                    reasons[refused.reason] += 1
        except DataError as error:
            problems.append(str(error))
            reasons["shard"] += 1
    print(
        "\n".join(problems)
        if problems
        else f"{args.manifest}: {manifest.num_samples} samples, all whole"
    )
    if problems:
        print(", ".join(f"{n} × {reason}" for reason, n in reasons.most_common()))
    return 1 if problems else 0
