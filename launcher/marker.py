"""The end marker, by which rank 0 says in the run's folder that the run is complete.

Exit codes of launchers lie (a killed pdsh gives 0), so success is what the run itself wrote down.
"""

import json

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
