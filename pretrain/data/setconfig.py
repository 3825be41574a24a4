"""What an evaluation set is: where it lies, what it is for; and the ready definitions of known
sets, files NAME.yaml in configs/datasets."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from pretrain.config import Config, read_yaml
from pretrain.errors import ConfigError

DEFINITIONS = Path(__file__).resolve().parents[2] / "configs" / "datasets"
Task = Literal["classification", "retrieval"]


class SetConfig(Config):
    """An evaluation set: a manifest of ours or a folder in clip-benchmark's form. A bare string is
    a manifest if it ends in .json, else the URL of such a folder.

    Attributes:
        definition: NAME of configs/datasets/NAME.yaml, or the path of such a file; its fields stand
            where none are given here.
        manifest: of shards indexed by `data index`; the class is the json field `name`.
        url: of a folder with SPLIT/nshards.txt and SPLIT/0.tar, ..., local or remote.
        split: folder below ``url``.
        task: None takes what the folder's dataset_type.txt says; of a manifest, classification.
        num_classes, num_images: what the set must have; None takes it as it is.
        class_names, templates: used where the folder has no file of them; ``{c}`` or ``{}`` stands
            for the class.
        metric: the one that is reported of this set in the literature.
        title, source, download, licence, paper: for people.
    """

    definition: str | None = None
    manifest: str | None = None
    url: str | None = None
    split: str = "test"
    task: Task | None = None
    num_classes: int | None = Field(None, ge=1)
    num_images: int | None = Field(None, ge=1)
    class_names: tuple[str, ...] | None = None
    templates: tuple[str, ...] | None = None
    metric: Literal["top1", "mean_per_class", "recall"] | None = None
    title: str = ""
    source: str = ""
    download: str = ""
    licence: str = ""
    paper: str = ""

    @model_validator(mode="before")
    @classmethod
    def _filled(cls, given: Any) -> Any:
        if isinstance(given, str):
            return {"manifest" if given.endswith(".json") else "url": given}
        if not isinstance(given, Mapping) or not given.get("definition"):
            return given
        own = {k: v for k, v in given.items() if v is not None}
        try:
            return {**read_definition(str(given["definition"])), **own}
        except ConfigError as error:
            raise ValueError(str(error)) from None

    @model_validator(mode="after")
    def _placed(self) -> "SetConfig":
        if (self.manifest is None) == (self.url is None):
            get = f"; {self.title or 'the set'} is to be had so: {self.download}"
            raise ValueError(
                f"manifest={self.manifest!r}, url={self.url!r}: give one of the two"
                f"{get.rstrip() if self.download else ''}"
            )
        return self

    @property
    def place(self) -> str:
        """Where it lies, for messages."""
        return self.manifest or f"{self.url}/{self.split}"


def definitions() -> list[str]:
    """Names of the ready definitions."""
    return sorted(path.stem for path in DEFINITIONS.glob("*.yaml"))


def read_definition(name: str) -> dict[str, Any]:
    """The fields of a definition.

    Raises:
        ConfigError: there is none of this name; the message lists what there is.
    """
    is_path = "/" in name or name.endswith((".yaml", ".yml"))
    if not is_path and name not in definitions():
        raise ConfigError(
            f"definition={name!r} is unknown (there are: {', '.join(definitions())}); give one of "
            "them, or the path of a YAML file"
        )
    return read_yaml(name if is_path else DEFINITIONS / f"{name}.yaml")
