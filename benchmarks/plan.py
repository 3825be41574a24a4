"""How far `python -m pretrain plan` can be believed: on this CPU, and against published runs.

python benchmarks/plan.py [--only small] [--published]
"""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
OUT = ROOT / "runs/benchmarks/plan.json"
WITHIN = 0.25


def main() -> int:
    """Print the tables; 0 if each size is predicted within a quarter."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", action="append", help="a size, any number of times")
    parser.add_argument(
        "--published", action="store_true", help="predictions beside published runs instead"
    )
    options = parser.parse_args()
    if options.published:
        from benchmarks._plan import published

        print(published.table())
        return 0
    from benchmarks._plan import cpu

    machine = cpu.measure()
    print("rates of this CPU, by operations or bytes of a call:")
    for kind, rates in machine.rates.items():
        print(f"  {kind:<21}" + "  ".join(f"{r / 1e9:6.1f} GFLOP/s" for _, r in rates))
    print(
        "  bandwidth            " + "  ".join(f"{r / 1e9:6.1f} GB/s" for _, r in machine.bandwidth)
    )
    print(f"  least of a call      {1e6 * machine.call_seconds:6.1f} us")
    machine = cpu.calibrated(machine)
    print(f"share of the bound that a probe reaches: {machine.reached:.2f}\n")
    print("| size | parameters | GFLOP a sample | predicted images/s | measured | ratio |")
    print("|---|---|---|---|---|---|", flush=True)
    rows = []
    for name in options.only or cpu.SIZES:
        rows.append(r := cpu.compare(name, machine))
        print(
            f"| {r.name} | {r.parameters:,} | {r.gflop:.2f} | {r.predicted:.1f} | "
            f"{r.measured:.1f} | {r.ratio:.2f} |",
            flush=True,
        )
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps([vars(r) | {"ratio": r.ratio} for r in rows], indent=1))
    met = all(abs(r.ratio - 1) <= WITHIN for r in rows)
    print(f"\n{'PASS' if met else 'FAIL'}  predicted within {WITHIN:.0%} of measured")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
