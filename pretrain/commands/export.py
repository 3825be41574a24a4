"""`export`: a committed checkpoint as files that anyone can load: safetensors, JSON, tokenizer."""

import argparse

from pretrain.commands._options import add_choice

HELP = "write a run's checkpoint as a model folder without pickles"


def configure(parser: argparse.ArgumentParser) -> None:
    """Options."""
    parser.add_argument("--output", help="the run's output folder")
    parser.add_argument("--model", help="a model folder, in place of a checkpoint of --output")
    parser.add_argument("--to", required=True, help="the folder to write")
    parser.add_argument(
        "--as",
        dest="form",
        choices=("model", "diffusers", "classifier"),
        default="model",
        help="model: both heads, for this program and the registry; diffusers: a pipeline folder "
        "that draws; classifier: the discriminative head alone (default: %(default)s)",
    )
    parser.add_argument("--licence", help="of the weights, for the card, as Apache-2.0")
    add_choice(parser)


def run(args: argparse.Namespace) -> int:
    """Export."""
    import tempfile
    from pathlib import Path

    from pretrain.errors import ConfigError

    if (args.output is None) == (args.model is None):
        raise ConfigError("give --output, a run's folder, or --model, a model folder; one of them")
    if args.model is not None and args.form == "model":
        raise ConfigError("--model is a model folder already; give --as diffusers or classifier")
    with tempfile.TemporaryDirectory(prefix="export-") as scratch:
        model = args.model
        if model is None:
            from pretrain.export import export

            whole = args.to if args.form == "model" else Path(scratch) / "model"
            model = export(args.output, whole, args.checkpoint, args.weights, args.licence)
        if args.form == "diffusers":
            from pretrain import diffusers_folder

            diffusers_folder.write(model, args.to)
        elif args.form == "classifier":
            from pretrain import classifier

            classifier.write_folder(model, args.to)
    print(f"exported {args.to}")
    return 0
