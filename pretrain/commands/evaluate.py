"""`evaluate`: a run's evaluators, or a suite of them, on one of its committed checkpoints; in one
process, or on every rank that a launcher starts."""

import argparse

from pretrain.commands._options import add_choice, add_overrides

HELP = "score a run's checkpoint with its evaluators, or with a suite"


def configure(parser: argparse.ArgumentParser) -> None:
    """Options."""
    parser.add_argument("--output", required=True, help="the run's output folder")
    add_overrides(parser, "override one field, such as evaluators.zero_shot.noises=8")
    add_choice(parser)
    parser.add_argument(
        "--only",
        action="append",
        help="run this evaluator, or this entry of the suite, alone; may be repeated",
    )
    parser.add_argument(
        "--suite", metavar="YAML", help="run its entries that have no result yet (docs/EVALUATION)"
    )
    parser.add_argument(
        "--results", metavar="DIR", help="of a suite (default: the folder scorecard of the run)"
    )
    parser.add_argument(
        "--list", action="store_true", help="of a suite: what is done and what would run; no more"
    )


def run(args: argparse.Namespace) -> int:
    """Evaluate, and print the metrics as JSON; or run the suite."""
    import os

    import torch

    from pretrain import comm
    from pretrain.engine import init_distributed
    from pretrain.errors import ConfigError

    if not args.suite and (args.list or args.results):
        raise ConfigError("--list and --results belong to a suite; give --suite SUITE.yaml")
    if comm.world_size() > 1 and not args.list:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // comm.local_world_size()))
        init_distributed()
    return _suite(args) if args.suite else _configured(args)


def _suite(args: argparse.Namespace) -> int:
    from pathlib import Path

    from pretrain import scorecard, suite
    from pretrain.results import Folder

    asked = suite.load(args.suite)
    chosen = asked.chosen(args.only or ())
    choice = scorecard.Choice(args.output, args.checkpoint, args.weights, tuple(args.overrides))
    results = args.results or Path(args.output) / "scorecard"
    if not args.list:
        return scorecard.run(asked, choice, results, args.only or ())
    plan = scorecard.plan(asked, choice, Folder(results))
    m = plan.model
    print(f"{m.name}, {m.checkpoint}, {m.weights}; results in {results}")
    width = max(len(e.name) for e in chosen)
    for entry in chosen:
        done = plan.done.get(entry.name)
        told = f"done   {scorecard.summary(done)}" if done else "to run"
        print(f"{entry.name:<{width}}  {entry.evaluator:<10}  {told}")
    return 0


def _configured(args: argparse.Namespace) -> int:
    import json

    from pretrain import comm, config, plugins
    from pretrain.errors import ConfigError
    from pretrain.export import load_task
    from pretrain.run_config import EVALUATORS, RunConfig, check_evaluators
    from pretrain.train import evaluate

    task, settings, tokenizer, samples = load_task(
        args.output, which=args.checkpoint, weights=args.weights
    )
    tree = settings.model_dump(mode="json")
    for text in args.overrides:
        tree = config.merge(tree, config.parse_override(text))
    settings = config.build(RunConfig, tree)
    checked = check_evaluators(settings.evaluators)
    names = args.only or list(checked)
    for name in names:
        if name not in checked:
            raise ConfigError(f"--only {name!r} is not configured; there are: {', '.join(checked)}")
    built = {n: plugins.load(EVALUATORS, n, "evaluators").build(checked[n]) for n in names}
    task = task.to(comm.device())
    metrics, files = evaluate(task, settings, tokenizer, built, names, samples)
    if comm.is_main():
        report = {"samples": samples, **metrics, "files": [str(f) for f in files]}
        print(json.dumps(report, indent=1))
    return 0
