"""Put pictures, and captions if wanted, through frozen encoders once: the shards that this writes
are trained on with data.encoded (and data.encoded_text).

Run it again to go on after a stop. For several machines: each --part I/N on one of them, then once
without --part, which writes the manifest.
"""

import argparse
import sys
import time

from pretrain.commands._options import add_overrides, parse_part

HELP = "precompute latents and text features into shards that the trainer takes instead"


def configure(parser: argparse.ArgumentParser) -> None:
    """Options."""
    parser.add_argument("--config", required=True, help="of the run that trains on the pictures")
    add_overrides(parser)
    parser.add_argument("--out", required=True, help="folder or URL of the encoded shards")
    parser.add_argument(
        "--model",
        metavar="EXPORT",
        help="exported model whose autoencoder (and text encoder) is used (default: the config's)",
    )
    parser.add_argument("--batch", type=int, default=64, help="default: %(default)s")
    parser.add_argument(
        "--dtype", choices=("fp16", "fp32"), default="fp16", help="default: %(default)s"
    )
    parser.add_argument(
        "--flip", action="store_true", help="latents of the mirrored pictures too, for data.flip"
    )
    parser.add_argument("--text", action="store_true", help="features of every caption too")
    parser.add_argument(
        "--part", metavar="I/N", default="0/1", help="the I-th N-th of the shards (I from 0)"
    )


def run(args: argparse.Namespace) -> int:
    """Encode, and say what to set for training."""
    from pretrain import config
    from pretrain.encode import encode
    from pretrain.encoders import Options
    from pretrain.run_config import RunConfig

    part = parse_part(args.part)
    settings = config.load(RunConfig, args.config, args.overrides)
    options = Options(args.model, args.batch, args.dtype, args.flip, args.text, part)
    began = last = time.monotonic()

    def report(done: int, total: int, shard: str) -> None:
        nonlocal last
        now = time.monotonic()
        if done == total or now - last > 2:
            left = (now - began) / max(1, done) * (total - done)
            print(
                f"[encode] {done:,}/{total:,} samples, {left:.0f} s left  {shard}", file=sys.stderr
            )
            last = now

    made = encode(settings, args.out, options, report)
    reasons = ", ".join(f"{n:,} × {r}" for r, n in made.rejects.most_common())
    print(
        f"{args.out}: {made.samples:,} samples ({made.kept:,} shards were finished before); "
        f"left out: {reasons or 'none'}"
    )
    if not made.manifests:
        print(f"part {args.part} is done; when all are, run once without --part")
        return 0
    data = settings.data
    trains = made.manifests[0] if isinstance(data.train, str) else f"those of {args.out}/*/"
    wanted = [f"data.train={trains}", "data.encoded=true"]
    wanted += ["data.encoded_text=true"] if args.text else []
    wanted += ["data.jitter=0"] if data.jitter else []
    wanted += ["data.flip=0"] if data.flip and not args.flip else []
    print("to train on it, set " + " ".join(wanted))
    return 0
