"""`disco`: the second stage of DisCo-Diff, a prior over the codes of a trained run, and images by
it."""

import argparse

from pretrain.commands._options import add_choice

HELP = "train a prior over a run's discrete codes, and draw images with it (DisCo-Diff)"


def configure(parser: argparse.ArgumentParser) -> None:
    """Options."""
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    prior = verbs.add_parser(
        "prior", help="train the prior, on one device, into OUTPUT/disco_prior"
    )
    prior.add_argument(
        "--output", required=True, help="output folder of a run with objectives.disco"
    )
    prior.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="fields such as prior.layers=12, fit.samples=100000; may be repeated",
    )
    prior.add_argument("--batch", type=int, default=256, help="default: %(default)s")
    prior.add_argument(
        "--seed", type=int, default=0, help="of initialisation and draws; default: %(default)s"
    )
    add_choice(prior)
    sample = verbs.add_parser("sample", help="images from prompts, with codes of the prior")
    sample.add_argument("prompts", nargs="+", help="one image is drawn for each")
    sample.add_argument("--output", required=True, help="output folder of the run")
    sample.add_argument("--out", default="samples.png", help="PNG to write; default: %(default)s")
    sample.add_argument("--steps", type=int, help="sampler steps (default: the run's)")
    sample.add_argument("--guidance", type=float, help="by the caption (default: the run's)")
    sample.add_argument(
        "--code-guidance", type=float, default=0.0, help="by the codes; default: %(default)s"
    )
    sample.add_argument(
        "--temperature", type=float, default=1.0, help="of the prior; default: %(default)s"
    )
    sample.add_argument("--seed", type=int, default=0, help="of the first image; image i: seed + i")
    sample.add_argument("--columns", type=int, default=8, help="of the grid")
    add_choice(sample)


def run(args: argparse.Namespace) -> int:
    """Train the prior, or sample."""
    return _prior(args) if args.verb == "prior" else _sample(args)


def _prior(args: argparse.Namespace) -> int:
    import json
    from pathlib import Path

    from pretrain.commands import _disco
    from pretrain.objectives import _disco_prior

    config, fit = _disco.settings(args.set)
    task, run_config, tokenizer, disco = _disco.load(args.output, args.checkpoint, args.weights)
    prior = _disco.new_prior(task, disco, config, args.seed)
    books = _disco.Use(disco)
    batches = _disco.coded(task, run_config, tokenizer, disco, args.batch, args.seed, fit, books)
    fitted = _disco_prior.fit(prior, batches, fit)
    facts = {
        "nats_per_image": fitted.nats,
        "heldout_nats_per_image": fitted.heldout_nats,
        "best_samples": fitted.best_samples,
        "codes_of": disco.fingerprint(),
        **books.facts(),
    }
    folder = Path(args.output) / _disco_prior.FOLDER
    _disco_prior.save(prior, folder, facts)
    print(json.dumps({"folder": str(folder), **facts}))
    return 0


def _sample(args: argparse.Namespace) -> int:
    from pathlib import Path

    from pretrain.commands import _disco
    from pretrain.evaluators.samples import grid
    from pretrain.inference import Heads, Predictor
    from pretrain.objectives import _disco_prior
    from pretrain.objectives._disco_sampling import CodeGuidance, by_prior

    task, config, tokenizer, disco = _disco.load(args.output, args.checkpoint, args.weights)
    width = task.model.config.text_encoder.width
    s = disco.settings
    prior = _disco_prior.load(Path(args.output) / _disco_prior.FOLDER, s.codes, s.values, width)
    predictor = Predictor(task.model, tokenizer, config.inference)
    guide = CodeGuidance(disco, task.model, by_prior(prior, args.temperature), args.code_guidance)
    predictor.heads = Heads(task.model, config.inference, guide)
    images = predictor.generate(
        args.prompts, steps=args.steps, guidance=args.guidance, seed=args.seed
    )
    grid(images, args.prompts, args.columns, max(96, images[0].width)).save(args.out)
    print(f"wrote {args.out}")
    return 0
