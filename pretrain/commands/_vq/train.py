"""`vq train`: a VQ tokenizer for the pictures of a manifest."""

import argparse

HELP = "a VQ tokenizer for the pictures of a manifest"


def configure(parser: argparse.ArgumentParser) -> None:
    """Options."""
    add, default = parser.add_argument, "(default: %(default)s)"
    add("--data", default="data/emoji/train.json", help=f"manifest {default}")
    add("--out", default="runs/vq", help=f"folder {default}")
    add("--size", type=int, default=32, help=f"pixels on a side {default}")
    add("--samples", type=int, help="at most so many of the manifest (default: all)")
    add("--updates", type=int, default=2000, help=default)
    add("--batch", type=int, default=64, help=default)
    add("--lr", type=float, default=1e-3, help=default)
    add("--seed", type=int, default=0, help=default)
    add(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        dest="overrides",
        help="of the tokenizer: codes, dim, width, halvings, codebook (ema, gradient), ...",
    )


def run(args: argparse.Namespace) -> int:
    """Train, print the error and the use of the codes, save."""
    import torch

    from pretrain.commands._vq import _files
    from pretrain.errors import ConfigError
    from pretrain.model.vq import VQAutoencoder, VQConfig

    config = _files.settings(VQConfig, args.overrides, "vq")
    if args.size % 2**config.halvings:
        raise ConfigError(
            f"size={args.size} is not a multiple of {2**config.halvings} (halvings="
            f"{config.halvings}); choose one that is"
        )
    images = _files.read_corpus(args.data, args.size, args.samples).images_NCHW
    torch.manual_seed(args.seed)
    model = VQAutoencoder(config)
    optimizer = torch.optim.AdamW(model.parameters(), args.lr)
    for k in range(args.updates):
        out = model(images[torch.randint(len(images), (args.batch,))])
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        if (k + 1) % max(1, args.updates // 10) == 0:
            used = f"{float(out.perplexity):.1f} of {config.codes} codes"
            print(f"{k + 1:>7} loss {float(out.loss.detach()):.4f}  {used}", flush=True)
    model.eval()
    part = images[:512]
    error = float((model.decode(model.encode(part)).clamp(-1, 1) - part).square().mean())
    _files.save(
        args.out, {"made_by": "train", "size": args.size, **{"vq": config.model_dump()}}, model
    )
    psnr = 10 * torch.log10(torch.tensor(4 / max(error, 1e-12)))
    print(f"{args.out}: {len(images)} pictures, PSNR {float(psnr):.1f} dB")
    return 0
