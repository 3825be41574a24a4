"""`classify`: zero-shot class probabilities of images, by a model folder or a registered model."""

import argparse

from pretrain.commands._options import add_model, opened_model

HELP = "classify images against labels of your own with an exported or registered model"


def configure(parser: argparse.ArgumentParser) -> None:
    """Options."""
    parser.add_argument("images", nargs="+", help="image files")
    add_model(parser)
    parser.add_argument("--labels", required=True, help="class names, comma-separated")
    parser.add_argument(
        "--template", action="append", help="class prompt with {} for the name; may be repeated"
    )
    parser.add_argument(
        "--noises", type=int, help="chains that are averaged (default: the model's)"
    )
    parser.add_argument("--steps", type=int, help="steps of a chain (default: the model's)")
    parser.add_argument("--top", type=int, default=3, help="labels to print for each image")


def run(args: argparse.Namespace) -> int:
    """Classify."""
    from PIL import Image

    from pretrain.errors import DataError
    from pretrain.inference import Predictor

    labels = [label.strip() for label in args.labels.split(",") if label.strip()]
    opened = []
    for path in args.images:
        try:
            opened.append(Image.open(path))
        except OSError as error:
            raise DataError(
                f"image={path!r} cannot be read ({error}); give PNG, JPEG or WebP files"
            ) from None
    with opened_model(args) as folder:
        rows = Predictor.load(folder).classify(
            opened, labels, templates=args.template or ("{}",), noises=args.noises, steps=args.steps
        )
    for path, row in zip(args.images, rows, strict=True):
        best = sorted(zip(row.tolist(), labels, strict=True), reverse=True)[: args.top]
        print(f"{path}: " + ", ".join(f"{label} {p:.1%}" for p, label in best))
    return 0
