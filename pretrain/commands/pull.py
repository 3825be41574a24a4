"""Fetch a registered model."""

import argparse

from pretrain import mlflow_env, registry

HELP = "download a registered model, check every file's hash, and reproduce its golden outputs"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="models:/NAME@ALIAS or models:/NAME/VERSION")
    parser.add_argument("--out", required=True, help="folder to make")
    parser.add_argument(
        "--whole",
        action="store_true",
        help="keep the MLflow model with its code, to serve it, not the exported model alone",
    )
    parser.add_argument(
        "--hashes-only",
        action="store_true",
        help="do not run the model; for a machine that lacks its requirements",
    )
    parser.add_argument("--uri", help="tracking URI; else MLFLOW_TRACKING_URI")


def run(args: argparse.Namespace) -> int:
    uri = mlflow_env.require_uri(args.uri)
    folder = registry.pull(
        args.model, uri, args.out, reproduce=not args.hashes_only, whole=args.whole
    )
    also = "" if args.hashes_only else ", and its golden outputs came out again"
    print(f"{args.model} is in {folder}; every file has its recorded hash{also}")
    return 0
