"""Folders of pretrained weights: on this machine, or fetched from the Hugging Face hub by name."""

import re
from pathlib import Path

from pretrain.errors import ConfigError

_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_WANTED = ("*.json", "*.safetensors", "*.txt", "*.model")
_VARIANTS = ("*.fp16*", "*.fp32*", "*.bf16*", "*.non_ema*", "*.ema*")  # several times the weights


def folder(field: str, path: str, subfolder: str | None = None, variant: str | None = None) -> Path:
    """The folder that ``path`` and ``subfolder`` name; of a hub name, the part that is needed is
    fetched into the hub's cache first.

    Args:
        field: of the configuration, for errors.
        variant: of the weights' files; the others are not fetched.

    Raises:
        ConfigError: there is none, or the hub does not give it.
    """
    root = Path(path)
    if not root.is_dir():
        if root.exists() or not _NAME.fullmatch(path):
            raise ConfigError(
                f"{field}={path!r} is not a folder of this machine, nor the hub's OWNER/NAME; give "
                "a folder in diffusers' or transformers' layout"
            )
        root = _fetched(field, path, subfolder, variant)
    found = root / subfolder if subfolder else root
    if not found.is_dir():
        there = sorted(p.name for p in root.iterdir() if p.is_dir())
        raise ConfigError(
            f"{field}={path!r} has no folder {subfolder!r}; there are: "
            f"{', '.join(there) or 'none'}. Set its subfolder (null: in {path!r} itself)"
        )
    return found


def _fetched(field: str, name: str, subfolder: str | None, variant: str | None) -> Path:
    from huggingface_hub import snapshot_download

    prefix = f"{subfolder}/" if subfolder else ""
    ignored = [pattern for pattern in _VARIANTS if variant is None or variant not in pattern]
    try:
        return Path(
            snapshot_download(
                name, allow_patterns=[prefix + p for p in _WANTED], ignore_patterns=ignored
            )
        )
    except Exception as error:  # its own kinds, requests' and the operating system's
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"{field}={name!r} is not a folder of this machine, and the hub does not give it "
            f"({why}); check the name, or fetch it where there is a network (`hf download {name}`) "
            "and give its folder"
        ) from None
