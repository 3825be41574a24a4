"""`tokenizer`: train sentencepiece on the captions of a manifest."""

import argparse

HELP = "train a sentencepiece tokenizer on the captions of shards"


def configure(parser: argparse.ArgumentParser) -> None:
    """Options."""
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    train = verbs.add_parser(
        "train", help="unigram model over every caption of the shards; deterministic"
    )
    train.add_argument(
        "--data", default="data/emoji/train.json", help="manifest (default: %(default)s)"
    )
    train.add_argument("--vocab-size", type=int, default=1536, help="default: %(default)s")
    train.add_argument("--out", default="data/emoji/tokenizer.model", help="default: %(default)s")


def run(args: argparse.Namespace) -> int:
    """Train."""
    from collections.abc import Iterator

    from pretrain.data import tokenizer
    from pretrain.data.manifest import Manifest
    from pretrain.data.samples import Refused, captions_of
    from pretrain.data.shards import ShardCache

    manifest = Manifest.load(args.data)
    cache = ShardCache(manifest, 1)

    def captions() -> Iterator[str]:
        for number, shard in enumerate(manifest.shards):
            for index in range(shard.samples):
                try:
                    yield from captions_of(cache.get(number, index)[0])
                except Refused:
                    continue

    sha256 = tokenizer.train(captions(), args.out, args.vocab_size)
    print(f"{args.out}: {args.vocab_size} pieces, sha256 {sha256}")
    return 0
