"""Which parameters of a model start from pretrained files, and what those files say of them."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from pretrain import describe, hub
from pretrain.config import build
from pretrain.diffusion.schedule import ScaledLinearConfig
from pretrain.errors import ConfigError
from pretrain.model.diffdis import ModelConfig
from pretrain.model.text_config import TransformersTextConfig
from pretrain.model.unet import UNetConfig
from pretrain.model.weight_files import WeightFiles

UNET = "model.trunk.unet."
TEXT = "model.text_encoder.encoder."


@dataclass(frozen=True)
class _Part:
    """Parameters whose names begin with ``begins``, and where they are read.

    Attributes:
        field: the settings that give their shapes, for errors.
    """

    begins: str
    files: WeightFiles
    field: str


class Pretrained:
    """The pretrained weights that a run starts from, by the names of a task's parameters.

    Args:
        config: of the model.

    Raises:
        ConfigError: a folder, or a file in it, is missing; or its scheduler is another than the
            image path.
    """

    def __init__(self, config: ModelConfig) -> None:
        self._parts: list[_Part] = []
        self._prefixes: dict[str, str] = {}
        init, text = config.init, config.text_encoder
        if init is not None:
            folder = hub.folder("model.init.path", init.path, init.subfolder, init.variant)
            files = WeightFiles("model.init.path", folder, init.variant)
            self._parts.append(_Part(UNET, files, "model.unet"))
            check_unet(config, folder)
            if init.scheduler is not None:
                check_scheduler(config, hub.folder("model.init.path", init.path, init.scheduler))
        if isinstance(text, TransformersTextConfig) and not text.frozen and text.path is not None:
            field = "model.text_encoder.path"
            folder = hub.folder(field, text.path, text.subfolder, text.variant)
            files = WeightFiles(field, folder, text.variant)
            self._parts.append(_Part(TEXT, files, "model.text_encoder"))

    def __bool__(self) -> bool:
        return bool(self._parts)

    def check(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """That the files hold what parameters of these names and shapes need.

        Raises:
            ConfigError: as `WeightFiles.check`.
        """
        for part in self._parts:
            own = {
                n.removeprefix(part.begins): s
                for n, s in shapes.items()
                if n.startswith(part.begins)
            }
            if not own:
                raise AssertionError(f"no parameter begins with {part.begins}")
            prefix = part.files.prefix(own)
            self._prefixes[part.begins] = prefix
            part.files.check({prefix + name: shape for name, shape in own.items()}, part.field)

    def has(self, name: str) -> bool:
        """Whether a parameter starts from a file."""
        return any(name.startswith(part.begins) for part in self._parts)

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of the parameter ``name``, flat, fp32; after `check`."""
        (part,) = (part for part in self._parts if name.startswith(part.begins))
        within = self._prefixes[part.begins] + name.removeprefix(part.begins)
        return part.files.read(within, start, stop)

    def close(self) -> None:
        """Let go of the files."""
        for part in self._parts:
            part.files.close()


def check_unet(config: ModelConfig, folder: Path) -> None:
    """That the image stream is what a U-Net's configuration describes: heads and groups are not
    seen in the shapes of weights.

    Raises:
        ConfigError: it is another, with the field to change.
    """
    tree = describe.unet(folder)
    wanted = build(UNetConfig, tree, "model.unet")
    for name in tree:
        own, theirs = _resolved(config.unet, name), _resolved(wanted, name)
        if own != theirs:
            raise ConfigError(
                f"model.unet.{name}={own}, but config.json of {str(folder)!r} says {theirs}; set "
                f"model.unet.{name}: {tree[name]} (`python -m pretrain describe` prints all of it)"
            )


def _resolved(config: UNetConfig, name: str) -> Any:
    """A field; heads and head_dim as the heads of each level, which either of them may give."""
    if name not in ("heads", "head_dim"):
        return getattr(config, name)
    return [config.heads or c // config.head_dim for c in config.channels]


def check_scheduler(config: ModelConfig, folder: Path) -> None:
    """That the image path is the one that a scheduler's configuration describes.

    Raises:
        ConfigError: it is another, with the field to change.
    """
    path, wanted = config.image_path, describe.image_path(folder)
    where = f"scheduler_config.json of model.init.path={config.init and config.init.path!r}"
    if path.predict != wanted["predict"]:
        raise ConfigError(
            f"model.image_path.predict={path.predict}, but {where} says {wanted['predict']}; set "
            f"model.image_path.predict: {wanted['predict']}"
        )
    schedule = path.schedule
    for name, value in wanted["schedule"].items():
        own = getattr(schedule, name, None)
        same = own == value or (
            isinstance(own, float) and math.isclose(own, float(value), rel_tol=1e-6)
        )
        if not isinstance(schedule, ScaledLinearConfig) or not same:
            raise ConfigError(
                f"model.image_path.schedule.{name}={own}, but {where} says {value}; set "
                f"model.image_path.schedule.{name}: {value}"
            )
