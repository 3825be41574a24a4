"""`evaluate`: a run's evaluators on one of its committed checkpoints, in one process."""

import argparse

from pretrain.commands._options import add_choice, add_overrides

HELP = "score a run's checkpoint with its evaluators"


def configure(parser: argparse.ArgumentParser) -> None:
    """Options."""
    parser.add_argument("--output", required=True, help="the run's output folder")
    add_overrides(parser, "override one field, such as evaluators.zero_shot.noises=8")
    add_choice(parser)
    parser.add_argument("--only", action="append", help="run this evaluator alone; may be repeated")


def run(args: argparse.Namespace) -> int:
    """Evaluate and print the metrics as JSON."""
    import json

    from pretrain import config, plugins
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
    metrics, files = evaluate(task, settings, tokenizer, built, names, samples)
    print(json.dumps({"samples": samples, **metrics, "files": [str(f) for f in files]}, indent=1))
    return 0
