"""`server`: an MLflow server with users, a database and an object store, in one command."""

import argparse
import signal
import sys
from pathlib import Path

HELP = "start an MLflow server with passwords, its database, and an object store for its files"


def configure(parser: argparse.ArgumentParser) -> None:
    """Options."""
    parser.add_argument("--folder", type=Path, default=Path("mlflow-server"), help="(%(default)s)")
    parser.add_argument("--host", default="127.0.0.1", help="to listen on (%(default)s)")
    parser.add_argument("--port", type=int, default=5000, help="of MLflow (%(default)s)")
    parser.add_argument(
        "--database",
        help="its database, such as postgresql://user:password@host/mlflow; else a SQLite file. "
        "MLFLOW_BACKEND_STORE_URI keeps a password off the command line",
    )
    parser.add_argument("--users", help="database of users, the same; MLFLOW_USERS_DATABASE_URI")
    parser.add_argument(
        "--artifacts",
        help="s3://bucket/prefix, with AWS_* set; else SeaweedFS is started beside the server",
    )
    parser.add_argument("--s3-port", type=int, default=8333, help="of SeaweedFS (%(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="processes (%(default)s)")
    parser.add_argument("more", nargs="*", help="after --: other options of `mlflow server`")


def run(args: argparse.Namespace) -> int:
    """Serve until Ctrl-C or SIGTERM."""
    import os

    from pretrain.mlflow_server import Server, ServerConfig

    config = ServerConfig(
        folder=args.folder,
        host=args.host,
        port=args.port,
        database=args.database or os.environ.get("MLFLOW_BACKEND_STORE_URI"),
        users=args.users or os.environ.get("MLFLOW_USERS_DATABASE_URI"),
        artifacts=args.artifacts,
        s3_port=args.s3_port,
        workers=args.workers,
        more=tuple(args.more),
    )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    print(f"starting MLflow in {config.folder} (the first time, half a minute)", flush=True)
    try:
        with Server(config) as server:
            print(
                f"MLflow:    {config.url}  (users admin and trainer; passwords in "
                f"{config.folder / 'secrets.json'})\nartifacts: {server.artifacts}\n"
                f"clients:   set -a; . {config.folder / 'client.env'}; set +a\nCtrl-C ends",
                flush=True,
            )
            server.wait()
    except KeyboardInterrupt:
        pass
    return 0
