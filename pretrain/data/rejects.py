"""Every refusal counted by reason and shard, logged by key, and too many of them an error."""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from pretrain.errors import DataError
from pretrain.types import Reject

Counts = dict[str, int]  # "reason\tshard" -> how many; flat, so that it is JSON and can be summed
PRINTED = 3  # of each reason, by each rank
MAX_COUNTERS = 10_000
OTHER_SHARDS = "(other shards)"  # where counts go when there are more counters than that
WORST_SHARDS = 5


class Ledger:
    """What was refused, over all ranks and since the start of training.

    A rank adds what it met; at every log the ranks exchange what is new (`take`) and each adds all
    of it (`merge`). So totals, metrics and errors are the same on every rank.

    Args:
        output_folder: of the run; refusals are appended to its ``rejects.jsonl`` (of another rank
            than 0, ``rejects-RANK.jsonl``: a network file system does not append for two hosts).
            None: not logged.
        max_rate: refusals per sample seen above which `check` raises, in [0, 1].
        rank: of the process.
        min_samples: seen before the rate is judged at all.
        say: prints one line.
    """

    def __init__(
        self,
        output_folder: Path | str | None,
        max_rate: float,
        rank: int = 0,
        *,
        min_samples: int = 1_000,
        say: Callable[[str], None] | None = None,
    ) -> None:
        name = f"rejects-{rank}.jsonl" if rank else "rejects.jsonl"
        self.path = None if output_folder is None else Path(output_folder) / name
        self.max_rate, self.min_samples = max_rate, min_samples
        self._say = say or (lambda line: print(line, flush=True))
        self._totals: Counter[str] = Counter()
        self._new: Counter[str] = Counter()
        self._met: Counter[str] = Counter()  # by reason, on this rank since it started

    def add(self, rejects: Iterable[Reject]) -> None:
        """Count, log and print this rank's refusals. They are in the totals after `merge`."""
        listed = list(rejects)
        if not listed:
            return
        for reject in listed:
            _count(self._new, f"{reject.reason}\t{reject.shard}", 1)
            self._met[reject.reason] += 1
            self._print(reject, self._met[reject.reason])
        try:
            self._append(listed)
        except OSError as error:  # no reason to end a training run
            self._say(f"[data] {str(self.path)!r} is no longer written: {error}")
            self.path = None

    def take(self) -> Counts:
        """What was added since the last call."""
        new, self._new = dict(self._new), Counter()
        return new

    def merge(self, counts: Iterable[Mapping[str, int]]) -> None:
        """Add what every rank took."""
        for one in counts:
            for name, count in one.items():
                _count(self._totals, name, count)

    def metrics(self, samples_seen: int) -> dict[str, float]:
        """``rejects/REASON`` (totals) and ``rejects/rate`` (per sample seen)."""
        reasons = self.by_reason()
        named = {f"rejects/{reason}": float(count) for reason, count in sorted(reasons.items())}
        return {**named, "rejects/rate": self._rate(samples_seen)}

    def by_reason(self) -> Counter[str]:
        """Totals by reason."""
        found: Counter[str] = Counter()
        for name, count in self._totals.items():
            found[name.partition("\t")[0]] += count
        return found

    def check(self, samples_seen: int) -> None:
        """Raise if too much is refused.

        Raises:
            DataError: it names the rate, the limit, and the worst shards.
        """
        rate = self._rate(samples_seen)
        if samples_seen < self.min_samples or rate <= self.max_rate:
            return
        log = f"; each is listed in {str(self.path)!r}" if self.path is not None else ""
        raise DataError(
            f"data.max_reject_rate={self.max_rate:g}, but {self._totals.total():,} refusals in "
            f"{samples_seen:,} samples are {rate:.3g}. Reasons: {_listing(self.by_reason())}. "
            f"Worst shards: {self._worst()}. Mend or leave out those shards (see `python -m "
            f"pretrain data verify`), or raise the limit{log}"
        )

    def state_dict(self) -> Counts:
        """Totals by reason and shard, as far as they are merged."""
        return dict(self._totals)

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on from these totals."""
        self._totals = Counter(state)

    def _rate(self, samples_seen: int) -> float:
        return self._totals.total() / max(1, samples_seen)

    def _worst(self) -> str:
        shards: dict[str, Counter[str]] = {}
        for name, count in self._totals.items():
            reason, _, shard = name.partition("\t")
            shards.setdefault(shard, Counter())[reason] += count
        worst = sorted(shards.items(), key=lambda item: (-item[1].total(), item[0]))
        named = [
            f"{shard} ({reasons.total():,}, mostly {reasons.most_common(1)[0][0]})"
            for shard, reasons in worst[:WORST_SHARDS]
        ]
        more = len(worst) - len(named)
        return ", ".join(named) + (f" and {more:,} more" if more else "")

    def _print(self, reject: Reject, count: int) -> None:
        if count <= PRINTED:
            # repr: a key is a name from anywhere and may hold a newline.
            self._say(f"[data] refused {reject.shard}:{reject.key!r}: {reject.reason}")
        elif count in (10, 100) or count % 1_000 == 0:
            self._say(f"[data] refused so far by this rank: {_listing(self._met)}")

    def _append(self, rejects: list[Reject]) -> None:
        if self.path is None:
            return
        rows = [{"reason": r.reason, "shard": r.shard, "key": r.key} for r in rejects]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            os.write(descriptor, text.encode())  # whole lines at once: a kill leaves none halved
        finally:
            os.close(descriptor)


def _count(counter: Counter[str], name: str, count: int) -> None:
    if name not in counter and len(counter) >= MAX_COUNTERS:
        name = f"{name.partition(chr(9))[0]}\t{OTHER_SHARDS}"
    counter[name] += count


def _listing(reasons: Counter[str]) -> str:
    return ", ".join(f"{count:,} × {reason}" for reason, count in reasons.most_common())
