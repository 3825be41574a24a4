"""Memory of our loader's processes, the trainer's and one worker's, by the shards that a manifest
lists. The samples are few and real; the manifest lists them again and again."""

import json
import multiprocessing
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks._data import corpus, process

SHARDS = (10, 1_000, 100_000)
SAMPLES_PER_SHARD = 64
BATCHES = 50  # after which it is looked at
FLAT = 1.10  # goal: most shards against fewest


def by_shards(source: Path, folder: Path, task: dict[str, Any]) -> dict[int, dict[str, float]]:
    """For each number of shards: ``anonymous_mib`` and ``rss_mib`` of the two processes together,
    and the seconds to the first batch."""
    tars = corpus.shards(source, 10 * SAMPLES_PER_SHARD, folder / "few", SAMPLES_PER_SHARD)
    few = corpus.manifest(tars, folder / "few-index")
    found = {}
    for shards in SHARDS:
        out = folder / "many"
        shutil.rmtree(out, ignore_errors=True)
        listed = {"manifest": str(repeat(few, shards, out))}
        found[shards] = process.run(sys.executable, __name__, task | listed)
    return found


def repeat(few: Path, shards: int, folder: Path, url_folder: str | None = None) -> Path:
    """A manifest of ``shards`` entries, the shards of manifest ``few`` in turn, in ``folder``.

    Args:
        url_folder: where the shards are taken to be, under new names ``NUMBER.tar``; None: where
            they are.
    """
    import numpy as np

    from pretrain.data.manifest import ROW, Manifest, Shards, members_of

    real = Manifest.load(str(few))
    which = [number % len(real.shards) for number in range(shards)]
    columns = {
        name: [column[number] for number in which]
        if name in ("url", "sha256", "version")
        else column[which].tolist()
        for name, column in real.shards.columns.items()
    }
    columns["url"] = [
        f"{url_folder}/{n:08d}.tar" if url_folder else real.url(i) for n, i in enumerate(which)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    out = str(folder / "many.json")
    Manifest(Shards.of_columns(columns), str(folder)).save(out)
    rows = np.fromfile(real.members_url, ROW)
    with open(members_of(out), "wb") as stream:
        for number in which:
            rows[real.starts[number] : real.starts[number + 1]].tofile(stream)
    return Path(out)


def main() -> None:
    """Measure one manifest."""
    from pretrain.data.loader import DataConfig, Loader
    from pretrain.data.tokenizer import Tokenizer

    task = json.loads(Path(sys.argv[1]).read_text())
    config = DataConfig(train=task["manifest"], tokenizer=task["tokenizer"], size=64, workers=1)
    began = time.perf_counter()
    loader = Loader(config, Tokenizer(config.tokenizer), 0, task["batch"], rank=0, world=1)
    batches = iter(loader)
    next(batches)
    first_seconds = time.perf_counter() - began
    for _ in range(BATCHES):
        next(batches)
    found = {"anonymous_mib": 0.0, "rss_mib": 0.0, "first_batch_seconds": first_seconds}
    (worker,) = (p for p in multiprocessing.active_children() if p.daemon)
    for pid in ("self", str(worker.pid)):
        status = Path(f"/proc/{pid}/status").read_text()
        fields = dict(line.split(":", 1) for line in status.splitlines())
        # The second holds libraries and mapped pages of the member table too: pages of files,
        # which the kernel takes back when it needs them.
        found["anonymous_mib"] += int(fields["RssAnon"].split()[0]) / 1024
        found["rss_mib"] += int(fields["VmRSS"].split()[0]) / 1024
    Path(sys.argv[2]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
