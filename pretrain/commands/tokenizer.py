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
    from pretrain.data.evalset import read_all
    from pretrain.data.reader import ReadConfig
    from pretrain.data.samples import Refused, captions_of

    def captions() -> Iterator[str]:
        for raw in read_all(args.data, ReadConfig()):
            try:
                yield from captions_of(raw)
            except Refused:
                continue

    sha256 = tokenizer.train(captions(), args.out, args.vocab_size)
    print(f"{args.out}: {args.vocab_size} pieces, sha256 {sha256}")
    return 0
