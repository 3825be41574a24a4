"""Put an exported model into the registry."""

import argparse

from pretrain import mlflow_env, registry, tracking
from pretrain.errors import RegistryError

HELP = "make a registered version of an exported model and point an alias to it"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="folder made by `pretrain export`")
    parser.add_argument("--name", required=True, help="registered model, for example diffdis-emoji")
    parser.add_argument(
        "--alias", default="champion", help="alias to move to it (default: %(default)s)"
    )
    parser.add_argument("--output", help="output folder of the training run that it came from")
    parser.add_argument("--uri", help="tracking URI; else the run's own, else MLFLOW_TRACKING_URI")


def run(args: argparse.Namespace) -> int:
    run_id, uri = None, args.uri
    if args.output is not None:
        recorded = tracking.recorded_run(args.output)
        run_id, uri = recorded.run_id, uri or recorded.uri
        if mlflow_env.public(uri) != mlflow_env.public(recorded.uri):
            raise RegistryError(
                f"--uri={mlflow_env.public(uri)}: the run of --output={args.output} is at "
                f"{mlflow_env.public(recorded.uri)}; leave --uri out, or send the run there first "
                f"with `python -m pretrain sync --output {args.output} --uri ...`"
            )
    uri = mlflow_env.require_uri(uri)
    made = registry.register(args.model, name=args.name, uri=uri, alias=args.alias, run_id=run_id)
    print(f"registered {made.name} version {made.version} as {made.alias}: {made.uri}")
    print(f"MLflow: {mlflow_env.public(uri)}" + (f", run {run_id}" if run_id else ", no run"))
    return 0
