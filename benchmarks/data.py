"""The data plane against webdataset as open_clip composes it, mosaicml-streaming, litdata and the
bare limit: pictures a second, from the same shards, with as many processes.

    python benchmarks/data.py [--samples 5120] [--workers 2] [--repeats 24] [--s3]

See benchmarks/README.md for what is measured and how.
"""

import argparse
import json
import os
import platform
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks._data import corpus, environment, memory, process, s3, slices
from benchmarks._data.measure import Task

BATCH, SIZE = 64, 256
TOKENIZER = str(corpus.ROOT / "data" / "emoji" / "tokenizer.model")
GOAL_OF_LIMIT = 0.95
# That the samples are listed, so that no epoch ends while the clock runs. Ours alone needs it not:
# its epochs have no end.
TIMES = 40


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
        # A multiple of the workers, at most one epoch.
        self.batches = args.samples // BATCH // args.workers * args.workers
        if not self.batches:
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

    def task(self, contestant: Contestant, mode: str, times: int = 1) -> Task:
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
            batches=self.batches,
            times=times,
        )

    def entry(self, contestant: Contestant) -> slices.Entry:
        """Its process that delivers for as long as it is let."""
        return slices.Entry(
            contestant.name,
            str(self.python(contestant)),
            module(contestant),
            self.task(contestant, "deliver", TIMES),
            self.args.workers,
        )

    def hashes(self, contestant: Contestant) -> Counter[str] | None:
        """Of its pictures with their captions; None if it failed."""
        try:
            task = self.task(contestant, "pixels")
            found = process.run(str(self.python(contestant)), module(contestant), task)
        except process.Failed as error:
            print(f"{contestant.name} failed:\n{error}", file=sys.stderr)
            return None
        return Counter(found["hashes"])


def module(contestant: Contestant) -> str:
    """What ``python -m`` runs."""
    return f"benchmarks._data.{contestant.module}"


def same_pixels(bench: Bench) -> dict[str, str]:
    """For each contestant whether its pictures, with their captions, are the limit's; by the way
    every file comes into the page cache."""
    answers = {}
    expected = bench.hashes(LIMIT) or Counter()
    for contestant in bench.contestants:
        if contestant is not LIMIT:
            found = bench.hashes(contestant)
            answers[contestant.name] = (
                "failed"
                if found is None
                else f"{(found - expected).total()} of {found.total()} differ"
            )
    return answers


def summary(race: slices.Race) -> dict[str, dict[str, Any]]:
    """What the slices of each contestant come to."""
    table: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys([n for r in race.rounds for n in r] + list(race.failed)):
        ratios = race.ratios(name, LIMIT.name)
        if name in race.failed or not ratios:
            table[name] = {"failed": race.failed.get(name, "too little arrived in its slices")}
            continue
        mine = [r[name] for r in race.rounds if name in r]
        table[name] = {
            "images_per_second": slices.spread([one.rate for one in mine]),
            "of_limit": slices.spread(ratios),
            "of_limit_by_cpu": slices.spread(race.ratios(name, LIMIT.name, cpu=True)),
            "cpu_ms_per_image": slices.spread([one.cpu_ms for one in mine]),
            "first_batch_seconds": race.first_seconds[name],
            "peak_rss_mib": max(one.rss_bytes for one in mine) / (1 << 20),
        }
    return table


def processor() -> str:
    """Its name, as the kernel says."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def interval(found: dict[str, float]) -> str:
    """A median and the 95% interval of it."""
    return f"{found['median']:.3f} ({found['from']:.3f}-{found['to']:.3f})"


def show(table: dict[str, dict[str, Any]]) -> None:
    """Print the table, fastest first; then who failed."""
    columns = ("images/s", "of limit", "by CPU", "CPU ms", "first batch", "peak RSS")
    widths = (10, 22, 22, 9, 13, 12)
    rows = [columns]
    names = [""]
    done = [(name, row) for name, row in table.items() if "failed" not in row]
    for name, row in sorted(done, key=lambda x: -x[1]["of_limit"]["median"]):
        names.append(name)
        rows.append(
            (
                f"{row['images_per_second']['median']:.0f}",
                interval(row["of_limit"]),
                interval(row["of_limit_by_cpu"]),
                f"{row['cpu_ms_per_image']['median']:.2f}",
                f"{row['first_batch_seconds']:.1f} s",
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


def judge(bench: Bench, race: slices.Race, report: dict[str, Any]) -> list[dict[str, Any]]:
    """Every goal of the run."""
    goals = []
    for name, answer in report["pixels"].items():
        goals.append(goal(f"same pixels and captions: {name}", answer.startswith("0 of"), answer))
    if race.rounds:
        ours = race.ratios(OURS.name, LIMIT.name)
        part = slices.spread(ours) if ours else None
        met = bool(part and part["median"] >= GOAL_OF_LIMIT)
        goals.append(
            goal(f"ours >= {GOAL_OF_LIMIT} of the limit", met, interval(part) if part else "-")
        )
        for peer in PEERS if bench.peers_python else ():
            ratios = race.ratios(OURS.name, peer.name)
            lead = slices.spread(ratios) if ratios else None
            text = interval(lead) if lead else "-"
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
        for place, compared in s3.PLACES.items():
            goals += judge_s3(report["s3"][place], place, compared)
    return goals


def judge_s3(
    found: dict[str, Any], place: str, compared: Sequence[tuple[str, str, str, bool]]
) -> list[dict[str, Any]]:
    """The goals of what was read from S3; ratios that are none are printed."""
    goals = []
    for what, ours, other, wanted in compared:
        ratio = found.get("ratios", {}).get(f"{ours} / {other}")
        text, met = f"not measured: {found.get('skipped', 'it failed')}", False
        if ratio:
            scale = 1e6 if what == "MB/s" else 1
            one, two = (found["rates"][n]["median"] / scale for n in (ours, other))
            text = f"{interval(ratio['clock'])}, by CPU {interval(ratio['cpu'])}; "
            text += f"{one:.0f} of {two:.0f} {what}"
            met = ratio["clock"]["median"] >= s3.GOAL
        if wanted:
            goals.append(goal(f"S3, {place}: >= {s3.GOAL} of a loop of {other}", met, text))
        else:
            print(f"      S3, {place}, of a loop of {other}: {text}")
    return goals


def main() -> int:
    """Run; the exit code says whether every goal was met."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=5120, help="pictures (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="processes (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=24, help="rounds (default: %(default)s)")
    parser.add_argument(
        "--slice",
        type=float,
        default=2.5,
        help="seconds that each has the machine in a round (default: %(default)s)",
    )
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
    entries = [bench.entry(contestant) for contestant in bench.contestants]
    race = slices.race(entries, args.repeats, args.slice, "images/s")
    report["rounds"] = [{n: vars(one) for n, one in r.items()} for r in race.rounds]
    report["table"] = summary(race)
    show(report["table"])
    if not args.no_memory:
        task = {"tokenizer": TOKENIZER, "batch": BATCH}
        report["memory"] = memory.by_shards(bench.source, bench.folder, task)
    if args.s3:
        task = bench.task(OURS, "deliver")
        report["s3"] = s3.run(
            bench.source, args.samples, bench.folder, args.repeats, args.slice, task
        )
    report["goals"] = judge(bench, race, report)
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1))
    print(f"report: {out}")
    return int(not all(g["met"] for g in report["goals"]))


if __name__ == "__main__":
    sys.exit(main())
