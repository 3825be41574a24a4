"""What the trainer costs: against a bare PyTorch loop, by moving average and checkpoint, in bytes.

    python benchmarks/train.py [--config configs/quickstart.yaml] [--rounds 5]

See benchmarks/README.md for what is measured and how.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

# One rank has the whole machine, two have half of it each.
OVERRIDES = (
    *(f"evaluators.{name}=null" for name in ("validation", "zero_shot", "retrieval", "samples")),
    "tracking.kind=none",
    "checkpoint.every_samples=1000000000",
    "training.samples=1000000000",
    "training.log_every_samples=1000000000",
    "optimizer.warmup_samples=0",
    "optimizer.schedule=constant",
    "guard.spike_z=null",
)


def main() -> int:
    """Measure, print, judge; 0 if every goal is met."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/quickstart.yaml", help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=8, help="on the clock (default: %(default)s)")
    parser.add_argument("--out", default="runs/benchmarks/train.json", help="default: %(default)s")
    args = parser.parse_args()
    report: dict[str, Any] = {}
    goals = [*speed(args, report), *averages(args, report), *saves(args, report)]
    goals += memory(args, report)
    out = ROOT / args.out
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1))
    print()
    for met, text in goals:
        print(f"{'PASS' if met else 'FAIL'}  {text}")
    print(f"report: {args.out}")
    return 0 if all(met for met, _ in goals) else 1


def speed(args: argparse.Namespace, report: dict[str, Any]) -> list[tuple[bool, str]]:
    """Images/s of the trainer on one rank over those of a bare loop, in pairs."""
    ratios, rounds = [], []
    for number in range(args.rounds):
        pair = {}
        for mode in ("bare", "trainer") if number % 2 else ("trainer", "bare"):
            pair[mode] = run(args, mode, 1, warm_up=3, steps=args.steps)
        ratios.append(pair["trainer"]["rate"] / pair["bare"]["rate"])
        rounds.append(pair)
        print(
            f"round {number + 1}/{args.rounds}: bare {pair['bare']['rate']:.1f} images/s, trainer "
            f"{pair['trainer']['rate']:.1f}, ratio {ratios[-1]:.3f}; losses "
            f"{pair['bare']['loss']:.5f} and {pair['trainer']['loss']:.5f}",
            flush=True,
        )
    report["speed"] = rounds
    ratio = median(ratios)
    text = f"trainer on one rank >= 0.95 of a bare loop: {ratio:.3f} ({spread(ratios)})"
    return [(ratio >= 0.95, text)]


def averages(args: argparse.Namespace, report: dict[str, Any]) -> list[tuple[bool, str]]:
    """What one moving average takes of a step, on two ranks."""
    found = run(args, "trainer", 2, ("ema.half_lives=[2000]",), warm_up=3, steps=args.steps)
    report["averages"] = found
    share = found["averages"]
    return [(share < 0.02, f"one moving average < 2% of a step: {share:.2%}")]


def saves(args: argparse.Namespace, report: dict[str, Any]) -> list[tuple[bool, str]]:
    """Training time lost to a save in the background over that lost to a blocking one."""
    found = run(
        args, "saves", 2, ("ema.half_lives=[2000]",), warm_up=3, steps=4, repeats=args.rounds
    )
    report["saves"] = found
    lost, held = found["stalled"], found["held_up"]
    print(
        f"a checkpoint of {found['bytes'] / 1e6:.0f} MB: blocking holds training up for "
        f"{held['blocking']:.2f} s ({lost['blocking']:.2f} s lost in all), in the background for "
        f"{held['background']:.3f} s ({lost['background']:.2f} s lost in all, writing included: "
        "the processors are shared)"
    )
    ratio = held["background"] / held["blocking"]
    return [(ratio < 0.1, f"a save in the background stalls < 10% of a blocking one: {ratio:.1%}")]


def memory(args: argparse.Namespace, report: dict[str, Any]) -> list[tuple[bool, str]]:
    """Bytes of state on one rank and on each of two, with the plan's beside them."""
    more = (
        "ema.half_lives=[2000]",
        "engine.persist_parameters=0",
        "engine.cut_for_one=true",
    )
    found = {n: run(args, "trainer", n, more, warm_up=1, steps=1) for n in (1, 2)}
    report["memory"] = found
    print(
        f"\n{'state of a rank, MB':<24}"
        + "".join(f"{f'{n} rank(s)':>12}{'plan':>10}" for n in found)
    )
    worst = 0.0
    for part in found[1]["state"]:
        line = f"  {part:<22}"
        for result in found.values():
            real, planned = result["state"][part], result["planned"][part]
            line += f"{real / 1e6:>12.2f}{planned / 1e6:>10.2f}"
            worst = max(worst, abs(planned / real - 1))
        print(line)
    one, two = (sum(found[n]["state"].values()) for n in (1, 2))
    ratio = two / (one / 2)
    return [
        (ratio <= 1.05, f"ZeRO-3's state on 2 ranks <= 1.05 of half of one rank's: {ratio:.3f}"),
        (worst <= 0.1, f"the plan's bytes within 10% of the measured: worst part {worst:.2%} off"),
    ]


def run(
    args: argparse.Namespace, mode: str, ranks: int, more: tuple[str, ...] = (), **task: Any
) -> dict[str, Any]:
    """The result of a contestant on ``ranks`` processes."""
    with tempfile.TemporaryDirectory() as folder, socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
        s.close()
        given, result = Path(folder, "task.json"), Path(folder, "result.json")
        batch = json.loads(
            subprocess.check_output([sys.executable, "-c", _BATCH, args.config], cwd=ROOT)
        )
        overrides = [
            *OVERRIDES,
            f"output={folder}/run",
            f"engine.micro_batch={batch // ranks}",
            *more,
        ]
        given.write_text(
            json.dumps({"mode": mode, "config": args.config, "set": overrides, **task})
        )
        processes = []
        for rank in range(ranks):
            environment = os.environ | {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(ranks),
                "LOCAL_WORLD_SIZE": str(ranks),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // ranks)),
            }
            command = [sys.executable, "-m", "benchmarks._train.one", str(given), str(result)]
            log = open(f"{folder}/{rank}.log", "wb")  # noqa: SIM115
            processes.append(
                subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
            )
        codes = [process.wait() for process in processes]
        if any(codes) or not result.exists():
            print(Path(f"{folder}/0.log").read_text(errors="replace")[-3000:])
            raise SystemExit(f"{mode} on {ranks} ranks ended with {codes}")
        return dict(json.loads(result.read_text()))


_BATCH = (
    "import sys, json; from pretrain import config; from pretrain.run_config import RunConfig; "
    "print(config.load(RunConfig, sys.argv[1], []).training.global_batch)"
)


def spread(values: list[float]) -> str:
    """Least to greatest."""
    return f"{min(values):.3f}-{max(values):.3f}"


if __name__ == "__main__":
    raise SystemExit(main())
