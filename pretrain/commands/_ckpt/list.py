"""The committed checkpoints of a run: samples, ranks, size, age, metrics; * is the best."""

import argparse

HELP = "list a run's committed checkpoints"


def configure(parser: argparse.ArgumentParser) -> None:
    """Options."""
    parser.add_argument("output", metavar="RUN", help="the run's output folder")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Print one line each."""
    import dataclasses
    import json
    import time

    from pretrain import ckpt_tools

    found = ckpt_tools.rows(args.output)
    if args.json:
        print(json.dumps([dataclasses.asdict(row) for row in found], indent=1, default=str))
        return 0
    print(f"{'samples':>14}  {'ranks':>5}  {'MiB':>9}  {'written':<16}  state")
    for row in found:
        written = time.strftime("%Y-%m-%d %H:%M", time.localtime(row.written))
        print(
            f"{row.samples:>13,}{'*' if row.best else ' '}  {row.ranks:>5}  "
            f"{row.bytes / (1 << 20):>9.1f}  {written}  {' '.join(row.kinds)}"
        )
        shown = {k: v for k, v in row.metrics.items() if k.endswith(("/loss", "/top1"))}
        if shown:
            print(f"{'':>16}" + "  ".join(f"{k} {v:.4g}" for k, v in shown.items()))
    if not found:
        print("none is committed; `ckpt doctor` tells what is there")
    return 0
