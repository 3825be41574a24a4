"""The folder of a scorecard: one file an entry as it ends, and all of them as JSON and Parquet.

    results.json     every entry of the suite that has ended, in the suite's order
    results.parquet  the same, one row a metric
    entries/KEY.json one entry
    files/ENTRY/…    its pictures and details
    scratch/KEY/…    finished pieces of an entry that has not ended

Every file appears whole or not at all. Numbers that are not finite are null: JSON has none.
"""

import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pretrain import storage
from pretrain.errors import DataError

VERSION = 1
RESULTS = "results.json"
TABLE = "results.parquet"
_COLUMNS = (
    "suite",
    "model",
    "checkpoint",
    "samples",
    "weights",
    "entry",
    "evaluator",
    "settings",
    "metric",
    "value",
)


@dataclass(frozen=True)
class Model:
    """What was scored.

    Attributes:
        name, output: of the run.
        checkpoint: name of its folder.
        samples: it has seen.
        weights: "weights", or a moving average such as "ema-2000".
    """

    name: str
    output: str
    checkpoint: str
    samples: int
    weights: str


@dataclass(frozen=True)
class Finished:
    """An entry that has ended.

    Attributes:
        settings: all, defaults too; its sets by name with their definitions.
        key: of what it depends on; see `scorecard.key_of`.
        seconds: of wall clock.
        metrics: by flat name; None where the number was not finite.
        files: paths relative to the results folder.
        details: such a path to a JSON file, or None.
    """

    name: str
    evaluator: str
    settings: dict[str, Any]
    key: str
    seconds: float
    ranks: int
    metrics: dict[str, float | None]
    files: list[str]
    details: str | None


@dataclass(frozen=True)
class Scorecard:
    """results.json."""

    suite: str
    model: Model
    entries: tuple[Finished, ...]


class Folder:
    """A results folder. One process writes it."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def finished(self, key: str) -> Finished | None:
        """The entry with this key, if it has ended."""
        try:
            tree = json.loads(self._entry(key).read_text(encoding="utf-8"))
            return Finished(**tree)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError) as error:
            raise DataError(
                f"results={str(self._entry(key))!r} cannot be read ({error}); remove the file, and "
                "the entry runs again"
            ) from None

    def files(self, entry: str, key: str) -> Path:
        """Where an entry puts its files: of its own, so that a later checkpoint keeps them."""
        return self.path / "files" / re.sub(r"[^\w.,=+\[\]-]", "_", entry) / key[:12]

    def scratch(self, key: str) -> Path:
        """Where an entry keeps finished pieces until it has ended."""
        return self.path / "scratch" / key

    def keep(self, entry: Finished) -> None:
        """Write an entry that has ended."""
        _write_json(self._entry(entry.key), asdict(entry))

    def write(self, scorecard: Scorecard) -> None:
        """Write results.json and results.parquet."""
        tree = {
            "version": VERSION,
            **asdict(scorecard),
            "entries": [*map(asdict, scorecard.entries)],
        }
        storage.write_bytes(str(self.path / TABLE), parquet(scorecard))
        _write_json(self.path / RESULTS, tree)

    def tracked(self) -> set[str]:
        """Keys of the entries whose metrics the run's journal holds."""
        path = self.path / "tracked.json"
        return set(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else set()

    def note_tracked(self, keys: set[str]) -> None:
        """Write them."""
        _write_json(self.path / "tracked.json", sorted(keys))

    def _entry(self, key: str) -> Path:
        return self.path / "entries" / f"{key}.json"


def read(folder: str | Path) -> Scorecard:
    """The results in ``folder``.

    Raises:
        DataError: there are none, or of another version.
    """
    path = Path(folder) / RESULTS
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        if tree["version"] != VERSION:
            raise DataError(
                f"results={str(path)!r} is of version {tree['version']}, this program reads "
                f"{VERSION}; evaluate again into another folder"
            )
        entries = tuple(Finished(**entry) for entry in tree["entries"])
        return Scorecard(tree["suite"], Model(**tree["model"]), entries)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(
            f"results={str(path)!r} cannot be read ({error}); make it with `python -m pretrain "
            "evaluate --output RUN --suite SUITE.yaml`"
        ) from None


def parquet(scorecard: Scorecard) -> bytes:
    """One row a metric; ``settings`` as JSON text, ``value`` null where it was not finite."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    model = scorecard.model
    rows: list[Sequence[Any]] = [
        (
            scorecard.suite,
            model.name,
            model.checkpoint,
            model.samples,
            model.weights,
            entry.name,
            entry.evaluator,
            json.dumps(entry.settings, sort_keys=True),
            metric,
            value,
        )
        for entry in scorecard.entries
        for metric, value in entry.metrics.items()
    ]
    types = {"samples": pa.int64(), "value": pa.float64()}
    schema = pa.schema([(name, types.get(name, pa.string())) for name in _COLUMNS])
    columns = [[row[i] for row in rows] for i in range(len(_COLUMNS))]
    arrays = [pa.array(c, field.type) for c, field in zip(columns, schema, strict=True)]
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_arrays(arrays, schema=schema), buffer)
    return buffer.getvalue()


def finite(metrics: Mapping[str, float]) -> dict[str, float | None]:
    """As they go into JSON: None in place of NaN and infinities."""
    return {k: float(v) if math.isfinite(v) else None for k, v in metrics.items()}


def _write_json(path: Path, tree: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    storage.write_bytes(str(path), json.dumps(tree, indent=1, allow_nan=False).encode())
