"""Send a run's journal to MLflow, for a run whose server was missing."""

import argparse

from pretrain import tracking

HELP = "send a run's journal to MLflow, when its server was missing during the run"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", required=True, help="output folder of the run")
    parser.add_argument("--uri", help="tracking URI; else MLFLOW_TRACKING_URI, else the run's own")


def run(args: argparse.Namespace) -> int:
    unsent = tracking.sync(args.output, args.uri)
    if unsent:
        print(
            f"{unsent} events of {args.output} are still unsent; run this again when MLflow answers"
        )
        return 1
    run = tracking.recorded_run(args.output)
    print(f"{args.output} is MLflow run {run.run_id} at {run.uri}")
    return 0
