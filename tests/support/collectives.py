"""What a rank asks of its process group, call by call: ranks whose lists differ would hang."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch.profiler import ProfilerActivity, profile


@contextmanager
def traced() -> Iterator[list[tuple[str, str]]]:
    """Collects (operation, shapes) of every collective inside, DeepSpeed's own too, in order; known
    when it ends."""
    found: list[tuple[str, str]] = []
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        yield found
    events = [e for e in profiler.events() if e.name.startswith("c10d::")]
    events.sort(key=lambda e: e.time_range.start)
    found.extend((e.name.removeprefix("c10d::"), str(e.input_shapes)) for e in events)
