"""The data plane against webdataset as open_clip composes it, mosaicml-streaming, litdata and the
bare limit: pictures a second, from the same shards, with as many processes.

    python benchmarks/data.py [--samples 5000] [--workers 2] [--repeats 5] [--s3]

See benchmarks/README.md for what is measured and how.
"""

import argparse
import json
import os
import platform
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks._data import corpus, environment, memory, process, s3
from benchmarks._data.measure import Task, spread

BATCH, SIZE = 64, 256
TOKENIZER = str(corpus.ROOT / "data" / "emoji" / "tokenizer.model")
GOAL_OF_LIMIT = 0.95


@dataclass(frozen=True)
class Contestant:
    """A way to the batches: its module in benchmarks/_data, and whether it runs in the peers'
    environment, on its own copy of the shards."""

    name: str
    module: str
    peer: bool
    converts: bool = False


LIMIT = Contestant("limit", "limit", peer=False)
OURS = Contestant("ours", "ours", peer=False)
PEERS = (
    Contestant("webdataset (open_clip)", "webdataset_openclip", peer=True),
    Contestant("mosaicml-streaming", "mosaicml_streaming", peer=True, converts=True),
    Contestant("litdata", "litdata_optimized", peer=True, converts=True),
)
# The same loop under the peers' interpreter: whether their environment decodes as fast.
PEERS_LIMIT = Contestant("limit, peers' environment", "limit", peer=True)


class Bench:
    """The shards, and a contestant's run on them."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.peers_python = environment.peers_python() if args.peers == "all" else None
        self.source = source = Path(args.corpus).resolve() if args.corpus else corpus.study()
        folder = environment.cache_folder() / f"shards-{source.name}-{args.samples}"
        self.shards = corpus.shards(source, args.samples, folder / "tar")
        self.manifest = corpus.manifest(self.shards, folder / "index")
        self.folder = folder
        for peer in self.contestants:
            if peer.converts:
                out = folder / peer.module
                corpus.convert(self.python(peer), module(peer), str(folder / "tar"), out)
        # Both multiples of the workers, together at most one epoch.
        whole = args.samples // BATCH // args.workers * args.workers
        self.warm_up = 2 * args.workers
        self.batches = whole - self.warm_up
        if self.batches < args.workers:
            raise SystemExit(
                f"error: --samples {args.samples} are too few for {args.workers} workers"
            )

    @property
    def contestants(self) -> list[Contestant]:
        """Who runs."""
        return [LIMIT, OURS, *((*PEERS, PEERS_LIMIT) if self.peers_python else ())]

    def python(self, contestant: Contestant) -> Path:
        """Its interpreter."""
        if not contestant.peer:
            return Path(sys.executable)
        assert self.peers_python is not None
        return self.peers_python

    def task(self, contestant: Contestant, mode: str) -> Task:
        """What its process is given."""
        return Task(
            mode=mode,
            shards=tuple(self.shards),
            manifest=str(self.manifest),
            tokenizer=TOKENIZER,
            converted=str(self.folder / contestant.module),
            batch=BATCH,
            workers=self.args.workers,
            size=SIZE,
            warm_up=self.warm_up,
            batches=self.batches,
        )

    def run(self, contestant: Contestant, mode: str) -> dict[str, Any]:
        """Its result, or ``{"failed": its last lines}``."""
        try:
            return process.run(
                str(self.python(contestant)), module(contestant), self.task(contestant, mode)
            )
        except process.Failed as error:
            print(f"{contestant.name} failed:\n{error}", file=sys.stderr)
            return {"failed": str(error)}


def module(contestant: Contestant) -> str:
    """What ``python -m`` runs."""
    return f"benchmarks._data.{contestant.module}"


def same_pixels(bench: Bench) -> dict[str, str]:
    """For each contestant whether its pictures, with their captions, are the limit's; by the way
    every file comes into the page cache."""
    answers = {}
    expected = Counter(bench.run(LIMIT, "pixels").get("hashes", []))
    for contestant in bench.contestants:
        if contestant is LIMIT:
            continue
        result = bench.run(contestant, "pixels")
        if "failed" in result:
            answers[contestant.name] = "failed"
            continue
        other = Counter(result["hashes"]) - expected
        answers[contestant.name] = f"{other.total()} of {len(result['hashes'])} differ"
    return answers


def rounds(bench: Bench) -> list[dict[str, dict[str, Any]]]:
    """One dict a round: each contestant's result, the limit's from before and after the others.

    The order of the others turns by one each round.
    """
    found = []
    others = [c for c in bench.contestants if c is not LIMIT]
    for number in range(bench.args.repeats):
        turn = number % len(others)
        before = bench.run(LIMIT, "rate")
        results = {c.name: bench.run(c, "rate") for c in others[turn:] + others[:turn]}
        after = bench.run(LIMIT, "rate")
        rates = [r["images_per_second"] for r in (before, after) if "failed" not in r]
        results["limit"] = before | {"images_per_second": sum(rates) / max(1, len(rates))}
        found.append(results)
        line = ", ".join(
            f"{name} {r.get('images_per_second', 0):.0f}" for name, r in results.items()
        )
        print(f"round {number + 1}/{bench.args.repeats}, images/s: {line}", flush=True)
    return found


def summary(found: list[dict[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Median, least and greatest of each contestant over the rounds."""
    table: dict[str, dict[str, Any]] = {}
    for name in found[0]:
        good = [r for r in found if "failed" not in r[name] and "failed" not in r["limit"]]
        if not good:
            table[name] = {"failed": True}
            continue
        rates = [r[name]["images_per_second"] for r in good]
        ratios = [x / r["limit"]["images_per_second"] for x, r in zip(rates, good, strict=True)]
        table[name] = {
            "images_per_second": spread(rates),
            "of_limit": spread(ratios),
            "cpu_ms_per_image": median(r[name]["cpu_ms_per_image"] for r in good),
            # (The limit has no first batch.)
            "first_batch_seconds": median(r[name].get("first_batch_seconds", 0.0) for r in good),
            "peak_rss_mib": max(r[name]["peak_rss_mib"] for r in good),
        }
    return table


def processor() -> str:
    """Its name, as the kernel says."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def ahead(found: list[dict[str, dict[str, Any]]], peer: str) -> dict[str, float] | None:
    """Ours over a peer, round by round."""
    good = [r for r in found if "failed" not in r["ours"] and "failed" not in r[peer]]
    ratios = [r["ours"]["images_per_second"] / r[peer]["images_per_second"] for r in good]
    return spread(ratios) if ratios else None


def show(table: dict[str, dict[str, Any]]) -> None:
    """Print the table, fastest first; then who failed."""
    columns = ("images/s", "(least-greatest)", "of limit", "(least-greatest)")
    columns = (*columns, "CPU ms", "first batch", "peak RSS")
    widths = (9, 18, 10, 18, 8, 13, 11)
    rows = [columns]
    names = [""]
    done = [(name, row) for name, row in table.items() if "failed" not in row]
    for name, row in sorted(done, key=lambda x: -x[1]["of_limit"]["median"]):
        rate, part = row["images_per_second"], row["of_limit"]
        names.append(name)
        rows.append(
            (
                f"{rate['median']:.0f}",
                f"({rate['least']:.0f}-{rate['greatest']:.0f})",
                f"{part['median']:.3f}",
                f"({part['least']:.3f}-{part['greatest']:.3f})",
                f"{row['cpu_ms_per_image']:.2f}",
                f"{row['first_batch_seconds']:.1f} s" if row["first_batch_seconds"] else "-",
                f"{row['peak_rss_mib']:.0f} MiB",
            )
        )
    print()
    for name, cells in zip(names, rows, strict=True):
        print(f"{name:<26}" + "".join(f"{c:>{w}}" for c, w in zip(cells, widths, strict=True)))
    print(*(f"{name}: failed" for name in table if name not in names), sep="\n")


def goal(name: str, met: bool, figures: str) -> dict[str, Any]:
    """Print a goal and whether it is met."""
    print(f"{'PASS' if met else 'FAIL'}  {name}: {figures}")
    return {"goal": name, "met": met, "figures": figures}


def judge(bench: Bench, report: dict[str, Any]) -> list[dict[str, Any]]:
    """Every goal of the run."""
    goals = []
    for name, answer in report["pixels"].items():
        goals.append(goal(f"same pixels and captions: {name}", answer.startswith("0 of"), answer))
    if report["rounds"]:
        ours = report["table"]["ours"]
        part = ours["of_limit"]["median"] if "failed" not in ours else 0.0
        goals.append(
            goal(f"ours >= {GOAL_OF_LIMIT} of the limit", part >= GOAL_OF_LIMIT, f"{part:.3f}")
        )
        for peer in PEERS if bench.peers_python else ():
            lead = ahead(report["rounds"], peer.name)
            text = (
                f"{lead['median']:.3f} ({lead['least']:.3f}-{lead['greatest']:.3f})"
                if lead
                else "-"
            )
            goals.append(
                goal(f"ours ahead of {peer.name}", bool(lead and lead["median"] > 1), text)
            )
    if "memory" in report:
        few, *_, many = report["memory"].values()
        growth = many["anonymous_mib"] / few["anonymous_mib"]
        figures = "; ".join(
            f"{n:,} shards {m['anonymous_mib']:.0f} MiB (RSS {m['rss_mib']:.0f})"
            for n, m in report["memory"].items()
        )
        goals.append(goal("memory flat in shards", growth <= memory.FLAT, figures))
    if "s3" in report:
        found = report["s3"]["found"]
        for what, ratio in (("MB/s", "of_raw"), ("images/s", "of_raw_images")):
            part = report["s3"][ratio]
            ours, raw = ("ours", "raw") if what == "MB/s" else ("ours_images", "raw_images")
            figures = (
                f"{part['median']:.3f} ({part['least']:.3f}-{part['greatest']:.3f}), "
                f"{median(found[ours]):.0f} of {median(found[raw]):.0f} {what}"
            )
            met = part["median"] >= s3.GOAL
            goals.append(goal(f"from S3 >= {s3.GOAL} of a loop of GETs, {what}", met, figures))
    return goals


def main() -> int:
    """Run; the exit code says whether every goal was met."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=5120, help="pictures (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="processes (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="rounds (default: %(default)s)")
    parser.add_argument(
        "--peers", choices=("all", "none"), default="all", help="none: limit and ours"
    )
    parser.add_argument(
        "--corpus", help="folder of tars with .jpg and .txt (default: the study corpus)"
    )
    parser.add_argument("--s3", action="store_true", help="also read from an S3 server (SeaweedFS)")
    parser.add_argument("--no-memory", action="store_true", help="leave out memory by shards")
    parser.add_argument(
        "--out", default="runs/benchmarks/data.json", help="report (default: %(default)s)"
    )
    args = parser.parse_args()
    bench = Bench(args)
    report: dict[str, Any] = {
        "options": vars(args),
        "machine": f"{processor()}, {len(os.sched_getaffinity(0))} cores",
        "python": platform.python_version(),
    }
    report["pixels"] = same_pixels(bench)
    report["rounds"] = rounds(bench)
    report["table"] = summary(report["rounds"]) if report["rounds"] else {}
    show(report["table"])
    if not args.no_memory:
        task = {"tokenizer": TOKENIZER, "batch": BATCH}
        report["memory"] = memory.by_shards(bench.source, bench.folder, task)
    if args.s3:
        task = bench.task(OURS, "rate")
        report["s3"] = s3.run(bench.source, args.samples, bench.folder, args.repeats, task)
    report["goals"] = judge(bench, report)
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1))
    print(f"report: {out}")
    return int(not all(g["met"] for g in report["goals"]))


if __name__ == "__main__":
    sys.exit(main())
