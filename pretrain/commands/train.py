"""`train`: run or take up again a training; started by a launcher on every rank."""

import argparse

from pretrain.commands._options import add_overrides

HELP = (
    "train a model (under a launcher: deepspeed --num_gpus 2 --module pretrain train --config ...)"
)


def configure(parser: argparse.ArgumentParser) -> None:
    """Options."""
    parser.add_argument(
        "--config", required=True, help="YAML file, such as configs/quickstart.yaml"
    )
    add_overrides(parser)
    parser.add_argument(
        "--profile",
        action="store_true",
        help="write a trace and a table of a few steps to RUN/profile, then train on",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the plan of the run and stop")
    parser.add_argument(
        "--ranks", type=int, default=None, help="with --dry-run: number of ranks to plan for"
    )


def run(args: argparse.Namespace) -> int:
    """Train, or with --dry-run say what would be trained."""
    from pretrain import config, plan
    from pretrain.run_config import RunConfig

    settings = config.load(RunConfig, args.config, args.overrides)
    if args.dry_run:
        print(plan.render(settings, args.ranks))
        return 0
    from pretrain.train import train

    return train(settings, args.profile)
