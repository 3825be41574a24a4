"""Fetch a registered model."""

import argparse

from pretrain import mlflow_env, registry

HELP = "download a registered model and check every file against its recorded hash"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="models:/NAME@ALIAS or models:/NAME/VERSION")
    parser.add_argument("--out", required=True, help="folder to make")
    parser.add_argument("--uri", help="tracking URI; else MLFLOW_TRACKING_URI")


def run(args: argparse.Namespace) -> int:
    folder = registry.pull(args.model, mlflow_env.require_uri(args.uri), args.out)
    print(f"{args.model} is in {folder}; every file has its recorded hash")
    return 0
