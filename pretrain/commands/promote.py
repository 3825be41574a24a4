"""`promote`: an alias moves to a version, if that passes the gate."""

import argparse

from pretrain.commands._options import add_overrides

HELP = "move an alias to a registered version that passes the gate"


def configure(parser: argparse.ArgumentParser) -> None:
    """Options."""
    parser.add_argument("model", help="models:/NAME@candidate or models:/NAME/VERSION")
    parser.add_argument("--to", default="champion", help="the alias (default: %(default)s)")
    parser.add_argument("--config", help="YAML file with a section `gate`")
    add_overrides(parser, "a rule, such as gate.metrics.zero_shot/concepts/top1.drop=0.01")
    parser.add_argument(
        "--fresh-venv",
        action="store_true",
        help="reproduce golden outputs in a new virtual environment of the logged requirements "
        "(minutes, gigabytes), not one of links to what is installed",
    )
    parser.add_argument("--uri", help="tracking URI; else MLFLOW_TRACKING_URI")


def run(args: argparse.Namespace) -> int:
    """Judge, and move."""
    from pretrain import config, mlflow_env, registry
    from pretrain.registry.gate import GateConfig

    tree = config.read_yaml(args.config) if args.config else {}
    for text in args.overrides:
        tree = config.merge(tree, config.parse_override(text))
    gate = config.build(GateConfig, tree.get("gate") or {}, "gate")
    uri = mlflow_env.require_uri(args.uri)
    moved = registry.promote(args.model, uri, args.to, gate, fresh=args.fresh_venv)
    for line in moved.passed:
        print(f"ok: {line}")
    before = f", before: version {moved.before}" if moved.before else ", which is new"
    print(f"{moved.uri} is version {moved.version}{before}")
    return 0
