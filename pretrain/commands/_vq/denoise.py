"""`vq denoise`: discrete diffusion over a VQ tokenizer's tokens, given captions, with CDCD's
loss."""

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from pretrain.commands._vq._model import VQDiffusion

HELP = "a token diffusion model of pictures given captions (VQ-Diffusion, CDCD)"


def configure(parser: argparse.ArgumentParser) -> None:
    """Options."""
    add, default = parser.add_argument, "(default: %(default)s)"
    add("--data", default="data/emoji/train.json", help=f"manifest {default}")
    add("--heldout", default="data/emoji/heldout-concepts.json", help=f"for the alarm {default}")
    add("--vq", default="runs/vq", help=f"folder of `vq train` {default}")
    add("--tokenizer", default="data/emoji/tokenizer.model", help=f"of captions {default}")
    add("--out", default="runs/vq-diffusion", help=f"folder {default}")
    add("--negatives", choices=("inter", "intra"), default="intra", help=default)
    add("--count", type=int, default=10, help=f"negatives a sample (the paper: 10) {default}")
    add("--chunks", type=int, default=8, help=f"of intra-negatives (the paper: 8) {default}")
    add("--samples", type=int, help="at most so many of the manifest (default: all)")
    add("--updates", type=int, default=5000, help=default)
    add("--batch", type=int, default=32, help=default)
    add("--lr", type=float, default=4.5e-4, help=default)
    add("--seed", type=int, default=0, help=default)
    add(
        "--tolerance",
        type=float,
        default=0.1,
        help=f"nats a token of held-out likelihood lost before training stops {default}",
    )
    add(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        dest="overrides",
        help="of the model: loss.contrast=5e-5, loss.mechanism=step, process.kind=absorbing, ...",
    )


def run(args: argparse.Namespace) -> int:
    """Train; stop with code 1 where the alarm rings; save."""
    import torch

    from pretrain.commands._vq import _files, _model
    from pretrain.data.tokenizer import Tokenizer
    from pretrain.objectives import _cdcd_loss as loss
    from pretrain.objectives._cdcd_tokens import token_loss

    config = _files.settings(_model.VQDiffusionConfig, args.overrides, "vq")
    vq, size = _model.load_vq(args.vq)
    tokenizer, length = Tokenizer(args.tokenizer), config.text_encoder.length

    def prepared(manifest: str) -> "tuple[Tensor, Tensor, Tensor]":
        corpus = _files.read_corpus(manifest, size, args.samples)
        codes = torch.cat([vq.encode(part).flatten(1) for part in corpus.images_NCHW.split(256)])
        return codes, *tokenizer.encode(list(corpus.captions), length)

    data, held_out = prepared(args.data), prepared(args.heldout)
    torch.manual_seed(args.seed)
    model = _model.VQDiffusion(config, vq.config.codes, data[0].shape[1], tokenizer.vocab_size)
    process = model.process
    # The paper's optimizer, but for its base rate, which belongs to its batches.
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, (0.9, 0.96), weight_decay=4.5e-2)
    alarm = loss.LikelihoodAlarm(args.tolerance)
    for k in range(args.updates):
        rows = torch.randperm(len(data[0]))[: args.batch]
        x0, tokens, mask = (part[rows] for part in data)
        t = torch.randint(1, process.steps + 1, (len(x0),))
        x_t = process.noised(x0, t, torch.rand(*x0.shape, process.codes + 1))
        if args.negatives == "intra":
            keys = torch.rand(1, args.count, args.chunks).expand(len(x0), -1, -1)
            wrong = loss.shuffled(x0[..., None], keys)[..., 0]
            real = torch.ones(wrong.shape[:2], dtype=torch.bool)
        else:
            others = loss.others(rows, torch.rand(len(x0)), args.count, gather=False)
            wrong, real = others.of(x0), others.real_BK
        term = token_loss(
            process, model(x_t, t, tokens, mask), x0, x_t, t, wrong, real, config.loss
        )
        optimizer.zero_grad()
        term.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        if (k + 1) % max(1, args.updates // 10) == 0:
            nll = held_out_nll(model, *held_out)
            said = "".join(f"  {name} {float(v.detach()):.4f}" for name, v in term.metrics.items())
            print(f"{k + 1:>7} held-out {nll:.4f} nats a token{said}", flush=True)
            if alarm.rings(nll):
                print(
                    f"error: held-out likelihood {nll:.4f} is more than {args.tolerance} over its "
                    f"best {alarm.best:.4f}; lower loss.contrast={config.loss.contrast:g}, set "
                    "loss.bound=clamp, or train for fewer updates"
                )
                return 1
    tree = {
        "made_by": "denoise",
        "vq": args.vq,
        "tokenizer": args.tokenizer,
        "tokenizer_sha256": tokenizer.sha256,
        "model": config.model_dump(),
    }
    _files.save(args.out, tree, model)
    print(f"{args.out}: {sum(p.numel() for p in model.parameters()):,} parameters")
    return 0


def held_out_nll(
    model: "VQDiffusion", x0_NL: "Tensor", tokens_NT: "Tensor", mask_NT: "Tensor", n: int = 256
) -> float:
    """The variational bound, nats a token, on the first ``n`` samples; each sees one t of a fixed
    even spread, with fixed noise, so that values compare."""
    import torch

    from pretrain.diffusion.discrete import vb_prior, vb_terms

    process, g = model.process, torch.Generator().manual_seed(0)
    x0, tokens, mask = x0_NL[:n], tokens_NT[:n], mask_NT[:n]
    with torch.no_grad():
        t = torch.arange(len(x0)) * process.steps // len(x0) + 1
        x_t = process.noised(x0, t, torch.rand(*x0.shape, process.codes + 1, generator=g))
        terms = vb_terms(process, model(x_t, t, tokens, mask), x0, x_t, t)
        return float(process.steps * terms.mean() + vb_prior(process, x0).mean())
