"""`register`: a committed checkpoint, or a folder of `export`, as a version in the registry."""

import argparse

from pretrain.commands._options import add_choice

HELP = "make a registered version of a run's checkpoint, as the candidate for an alias"


def configure(parser: argparse.ArgumentParser) -> None:
    """Options."""
    parser.add_argument("--output", help="output folder of the training run")
    add_choice(parser)
    parser.add_argument(
        "--model", help="folder made by `pretrain export`, in place of a checkpoint of --output"
    )
    parser.add_argument("--name", help="registered model (default: the configuration's name)")
    parser.add_argument("--licence", help="of the weights, for the card, as Apache-2.0")
    parser.add_argument("--uri", help="tracking URI; else the run's own, else MLFLOW_TRACKING_URI")


def run(args: argparse.Namespace) -> int:
    """Export where needed, register, and say what to do next."""
    import json
    import tempfile
    from pathlib import Path

    from pretrain import mlflow_env, registry, tracking
    from pretrain.errors import ConfigError, RegistryError

    if args.output is None and args.model is None:
        raise ConfigError("--output is not given; name a run's output folder, or give --model")
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
    with tempfile.TemporaryDirectory(prefix="export-") as scratch:
        folder = args.model
        if folder is None:
            from pretrain.export import export

            folder = export(
                args.output, Path(scratch) / "model", args.checkpoint, args.weights, args.licence
            )
        definition = Path(folder) / "config.json"
        name = args.name
        if name is None and definition.is_file():
            name = json.loads(definition.read_text(encoding="utf-8")).get("name")
        made = registry.register(folder, name=name or "model", uri=uri, run_id=run_id)
    alias = registry.CANDIDATE
    print(f"registered {made.name} version {made.version} as {alias}: {made.uri}")
    print(f"MLflow: {mlflow_env.public(uri)}" + (f", run {run_id}" if run_id else ", no run"))
    print(
        f"next: python -m pretrain promote models:/{made.name}@{alias} --to champion --config ..."
    )
    return 0
