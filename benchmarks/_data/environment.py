"""The peers' own environment: they need a torchvision, which does not load beside the project's
torch. Made once, in the cache folder, by pip."""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

# webdataset: the newest that open_clip's training takes (it ends with a KeyError on 1.0.2, see
# open_clip#935); pandas: the rest of what open_clip_train imports. Pillow is pinned as in
# requirements.txt: every contestant decodes with the same library.
REQUIREMENTS = """\
torch==2.14.1
torchvision==0.29.1
open_clip_torch==3.3.0
mosaicml-streaming==0.13.0
litdata==0.2.76
webdataset==0.2.86
pandas==3.1.1
pillow==13.0.0
"""
NEEDED_GB = 10  # 6.4 GB installed, and what pip unpacks on the way


def cache_folder() -> Path:
    """Where environments and shards of the benchmarks are kept."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "diffdis-pretrain" / "benchmarks"


def peers_python() -> Path:
    """The interpreter of the peers' environment, installed if it is not there yet.

    Raises:
        SystemExit: the disk is too small, or pip failed (its last lines are printed).
    """
    digest = hashlib.sha256((REQUIREMENTS + sys.version).encode()).hexdigest()[:12]
    folder = cache_folder() / f"peers-{digest}"
    python, stamp = folder / "bin" / "python", folder / ".installed"
    if stamp.exists():
        return python
    shutil.rmtree(folder, ignore_errors=True)  # a half-made one
    folder.mkdir(parents=True)
    free_gb = shutil.disk_usage(folder).free / 1e9
    if free_gb < NEEDED_GB:
        raise SystemExit(
            f"error: {folder} has {free_gb:.0f} GB free and the peers' environment takes up to "
            f"{NEEDED_GB}; set XDG_CACHE_HOME to a larger disk, or pass --peers none"
        )
    print(f"installing the peers into {folder}: 5 to 10 minutes, 6.4 GB, once", flush=True)
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    requirements = folder / "requirements.txt"
    requirements.write_text(REQUIREMENTS)
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    done = subprocess.run(
        [*pip, "--requirement", str(requirements)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"error: pip could not install the peers:\n{done.stdout[-2000:]}")
    stamp.touch()
    return python
