"""`vq sample`: pictures for captions, in as many steps as asked."""

import argparse

HELP = "pictures for captions from a token diffusion model"


def configure(parser: argparse.ArgumentParser) -> None:
    """Options."""
    add, default = parser.add_argument, "(default: %(default)s)"
    add("captions", nargs="+", help="one picture each")
    add("--model", default="runs/vq-diffusion", help=f"folder of `vq denoise` {default}")
    add("--steps", type=int, help="sampling steps (default: all of the process)")
    add("--temperature", type=float, default=1.0, help=default)
    add("--seed", type=int, default=0, help=default)
    add("--out", default="samples.png", help=f"one picture, the samples side by side {default}")


def run(args: argparse.Namespace) -> int:
    """Sample and write."""
    import torch

    from pretrain.commands._vq import _model
    from pretrain.errors import ConfigError
    from pretrain.inference import to_pil

    loaded = _model.load_model(args.model)
    most = loaded.model.process.steps
    if args.steps is not None and not 1 <= args.steps <= most:
        raise ConfigError(f"--steps={args.steps} must lie in 1..{most}, the process's own steps")
    images = loaded.generate(args.captions, args.steps, args.seed, args.temperature)
    to_pil(torch.cat(list(images), dim=2)).save(args.out)
    print(args.out)
    return 0
