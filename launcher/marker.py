"""What the trainer leaves in a run's folder: the end marker by which rank 0 says that the run is
complete, and where the run is tracked.

Exit codes of launchers lie (a killed pdsh gives 0), so success is what the run itself wrote down.
"""

import json
from pathlib import Path

MARKER = "_FINISHED"


def read_marker(output: str) -> tuple[str, str] | None:
    """When the marker of ``output`` (a path or an fsspec URL) was written, and its text.

    None if there is no whole marker. Two readings that differ mean that the run finished between
    them: no two clocks are compared.
    """
    import fsspec

    filesystem, path = fsspec.core.url_to_fs(output)
    marker = f"{path.rstrip('/')}/{MARKER}"
    filesystem.invalidate_cache()
    try:
        text = filesystem.cat_file(marker).decode()
        if not isinstance(json.loads(text), dict):
            return None
        return str(filesystem.modified(marker)), text
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None


def read_tracked(output: str) -> tuple[str, str] | None:
    """Id and server of the MLflow run that the trainer in ``output`` is tracked as.

    None before a server has answered, and where ``output`` is a URL or not on this machine: the
    journal of a run lies on a disk of rank 0's host.
    """
    try:
        run = json.loads(Path(output, "journal", "run.json").read_bytes())
        return str(run["run_id"]), str(run["uri"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
