"""`status`: where each rank of a run is, from the files it writes every few seconds."""

import argparse

HELP = "show where each rank of a run is"


def configure(parser: argparse.ArgumentParser) -> None:
    """Options."""
    parser.add_argument("folder", help="the run's output folder", metavar="RUN")


def run(args: argparse.Namespace) -> int:
    """One line a rank."""
    from pretrain.errors import DataError
    from pretrain.watchdog import ENDED, FAILED, read_heartbeats

    found = read_heartbeats(args.folder)
    if not found:
        raise DataError(
            f"run={args.folder!r} holds no heartbeats; give the output folder of a run that was "
            "started"
        )
    for h in found:
        age = h.age_seconds + h.written_seconds_ago
        silent = h.written_seconds_ago > 3 * h.every_seconds and h.phase not in (ENDED, FAILED)
        note = f"  SILENT for {h.written_seconds_ago:.0f} s" if silent else ""
        print(
            f"rank {h.rank:>3}  {h.phase:<10} {h.samples:>12,} samples  progress {age:.0f} s ago  "
            f"{h.host} process {h.pid}{note}"
        )
    return 0
