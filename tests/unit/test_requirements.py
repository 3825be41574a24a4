"""Every third-party import is pinned exactly, and what must never be installed is not."""

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# import name -> distribution, where they differ
DISTRIBUTION = {
    "yaml": "PyYAML",
    "PIL": "pillow",
    "resvg_py": "resvg-py",
    "google": "google-cloud-batch",
    "botocore": "boto3",  # which pins its own
    "pynvml": "nvidia-ml-py",
}


def pins(file: str) -> dict[str, str]:
    found = {}
    for line in (ROOT / file).read_text().splitlines():
        text = line.partition("#")[0].strip()
        if text:
            match = re.fullmatch(r"([A-Za-z0-9._-]+)==([A-Za-z0-9.]+)", text)
            assert match, f"{file}: {text!r} is not an exact pin (name==version)"
            found[match[1]] = match[2]
    return found


def imported() -> dict[str, str]:
    """Third-party top-level packages that the code imports -> one file that does."""
    found = {}
    for folder in ("pretrain", "launcher"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                if isinstance(node, ast.ImportFrom) and not node.level:
                    names = [node.module or ""]
                found.update({name.split(".")[0]: str(path.relative_to(ROOT)) for name in names})
    own = {"pretrain", "launcher", *sys.stdlib_module_names}
    return {name: path for name, path in found.items() if name not in own}


def test_every_import_is_pinned() -> None:
    pinned = pins("requirements.txt") | pins("requirements-cloud.txt")
    for name, path in imported().items():
        assert DISTRIBUTION.get(name, name) in pinned, (
            f"{path} imports {name}: pin it in requirements.txt, or requirements-cloud.txt"
        )


def test_no_torchvision() -> None:
    """It does not load beside this torch, and would pull another one of several gigabytes."""
    for file in ("requirements.txt", "requirements-dev.txt", "requirements-cloud.txt"):
        assert not {"torchvision", "torchaudio"} & set(pins(file))


def test_deepspeed_skips_a_step_of_nan() -> None:
    """Up to 0.19.7, ZeRO-3 in bf16 destroys the model on one NaN batch."""
    assert tuple(map(int, pins("requirements.txt")["deepspeed"].split("."))) >= (0, 19, 8)
