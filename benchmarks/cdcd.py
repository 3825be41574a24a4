"""Does contrast buy sampling steps? CDCD on a toy whose classes an oracle knows, by one command.

    python benchmarks/cdcd.py [--seeds 0 1 2] [--updates 3000]

Six Markov chains over 8 tokens, 12 long; masked diffusion of 12 steps; the loss that
pretrain/objectives/_cdcd_tokens.py ships, with the weight w of its negatives at 0 (the baseline),
.01 and .03. Scored: the oracle's accuracy of the asked-for class by number of sampling steps, the
least number at which it is what the baseline's is with all, and beside it what contrast may cost:
held-out likelihood (the variational bound) and the entropy of pairs of tokens. The control is the
baseline at a temperature under 1, which is mere sharpening.

Writes runs/benchmarks/cdcd.json and cdcd.png.

    python benchmarks/cdcd.py --images [--image-updates 300]

The same question on pictures: VQ tokens of the embedded corpus (benchmarks/_cdcd/images.py), by
KID and by a probe's agreement. A line of docs/results/cdcd-images.jsonl for each model as it ends;
the same command goes on where it was stopped.
"""

import argparse
import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def main() -> int:
    """Run, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, default = parser.add_argument, "(default: %(default)s)"
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help=default)
    add("--updates", type=int, default=3000, help=default)
    add("--batch", type=int, default=256, help=default)
    add("--width", type=int, default=256, help=default)
    add("--negatives", type=int, default=4, help=f"K {default}")
    add("--samples", type=int, default=12_000, help=f"of each number of steps {default}")
    add("--common", type=float, default=0.0, help=f"what classes share {default}")
    add("--own", type=float, default=2.5, help=f"what they do not {default}")
    add("--more", action="store_true", help="bounded, intra- and step-wise variants as well")
    add("--images", action="store_true", help="the part on pictures, in place of the toy")
    add("--image-updates", type=int, default=300, help=default)
    add("--vq-updates", type=int, default=400, help=f"of the VQ tokenizer {default}")
    add("--table", action="store_true", help="of --images: only show what there is")
    add("--results", type=Path, default=Path("docs/results"), help=f"of --images {default}")
    add("--out", type=Path, default=Path("runs/benchmarks"), help=default)
    args = parser.parse_args()
    import torch

    from benchmarks._cdcd import show, study

    torch.set_num_threads(1)
    if args.images:
        from benchmarks._cdcd import images

        if not args.table:
            images.run(args)
        print(images.table(args))
        images.plot(args, args.out / "cdcd-images.png")
        return 0
    print(show.HEAD)
    found = study.run(args, print)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "cdcd.json"
    path.write_text(json.dumps(found, default=str, indent=1) + "\n", encoding="utf-8")
    show.plot(found, path.with_suffix(".png"))
    print(f"\n{show.table(found)}\nwritten: {path}, {path.with_suffix('.png')}")
    return 0


if __name__ == "__main__":
    os.chdir(ROOT)
    raise SystemExit(main())
