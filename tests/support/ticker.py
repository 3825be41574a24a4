"""A contestant of the benchmarks' slices: workers that deliver at a steady pace; one of them may be
told to end."""

import json
import os
import sys
import time
from pathlib import Path

from benchmarks._data.measure import Arrivals


def main() -> None:
    """Deliver for ever, in two processes."""
    task = json.loads(Path(sys.argv[1]).read_text())
    lane = 0 if os.fork() else 1
    arrivals = Arrivals(task["arrivals"])
    for number in range(task.get("deliveries", 1 << 60)):
        time.sleep(task["pause"])
        arrivals.add(lane, task["amount"] + number % 2)
    raise SystemExit("the ticker has run down")


if __name__ == "__main__":
    main()
