"""Memory of our loader's processes, the trainer's and one worker's, by the shards that a manifest
lists. The samples are few and real; the manifest lists them again and again."""

import json
import multiprocessing
import sys
import time
from pathlib import Path

import numpy as np

SHARDS = (10, 1_000, 100_000)
BATCHES = 50
FLAT = 1.10  # most against fewest shards


def repeat(few: str, shards: int, folder: Path, url_folder: str | None = None) -> Path:
    """A manifest of ``shards`` entries, the shards of manifest ``few`` in turn, in ``folder``.

    Args:
        url_folder: where the shards are taken to be, under new names ``NUMBER.tar``; None: where
            they are.
    """
    from pretrain.data.manifest import Manifest, Shards, members_of

    real = Manifest.load(few)
    which = [number % len(real.shards) for number in range(shards)]
    columns = {name: list(column[which]) for name, column in real.shards.columns.items()}
    columns["aspects"] = [tuple(a.tolist()) for a in columns["aspects"]]
    for name in ("sha256", "version"):
        columns[name] = [value.decode() for value in columns[name]]
    columns["url"] = [
        f"{url_folder}/{n:08d}.tar" if url_folder else real.url(i) for n, i in enumerate(which)
    ]
    out = folder / f"{shards}.json"
    folder.mkdir(parents=True, exist_ok=True)
    Manifest(Shards.of_columns(columns), str(folder)).save(str(out))
    rows = np.fromfile(real.members_url, np.uint8).reshape(real.num_samples, -1)
    parts = [rows[a:b] for a, b in zip(real.starts, real.starts[1:], strict=False)]
    with open(members_of(str(out)), "wb") as stream:
        for i in which:
            stream.write(parts[i].tobytes())
    return out


def main() -> None:
    """MiB once batches have flowed for a while, and the seconds until the first."""
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
    found = {"anonymous_mib": 0.0, "rss_mib": 0.0}
    (worker,) = (p for p in multiprocessing.active_children() if p.daemon)
    for pid in ("self", worker.pid):
        status = Path(f"/proc/{pid}/status").read_text()
        fields = dict(line.split(":", 1) for line in status.splitlines())
        # Pages of the member table, which is mapped, count in the second, and cost nothing that
        # another process would miss.
        found["anonymous_mib"] += int(fields["RssAnon"].split()[0]) / 1024
        found["rss_mib"] += int(fields["VmRSS"].split()[0]) / 1024
    Path(sys.argv[2]).write_text(json.dumps(found | {"first_batch_seconds": first_seconds}))


if __name__ == "__main__":
    main()
