"""`sample`: images from text, by a model folder or a registered model."""

import argparse

from pretrain.commands._options import add_model, opened_model

HELP = "generate images from prompts with an exported or registered model"


def configure(parser: argparse.ArgumentParser) -> None:
    """Options."""
    parser.add_argument("prompts", nargs="+", help="one image is drawn for each")
    add_model(parser)
    parser.add_argument(
        "--out", default="samples.png", help="the PNG to write: a grid of all images"
    )
    parser.add_argument("--steps", type=int, help="sampler steps (default: the model's)")
    parser.add_argument(
        "--guidance", type=float, help="classifier-free guidance, 0 is none (default: the model's)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the first image; image i has seed + i"
    )
    parser.add_argument("--columns", type=int, default=8, help="of the grid")


def run(args: argparse.Namespace) -> int:
    """Generate."""
    from pretrain.evaluators.samples import grid
    from pretrain.inference import Predictor

    with opened_model(args) as folder:
        images = Predictor.load(folder).generate(
            args.prompts, steps=args.steps, guidance=args.guidance, seed=args.seed
        )
    grid(images, args.prompts, args.columns, max(96, images[0].width)).save(args.out)
    print(f"wrote {args.out}")
    return 0
