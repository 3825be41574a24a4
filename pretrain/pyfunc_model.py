"""The model that MLflow serves: this file's code over safetensors; nothing is unpickled.

MLflow executes this file by its path at load (models-from-code), with the logged copy of the
package first on sys.path. So a fresh process imports the logged `pretrain`, even in a checkout. In
a process that has imported another one, Python keeps that, and a warning says so.
"""

import base64
import io
import logging
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel, PythonModelContext
from PIL import Image, UnidentifiedImageError

_log = logging.getLogger("pretrain.pyfunc_model")

COLUMNS = ["task", "image", "embedding", "label", "probabilities"]
# A request beyond these would hold the server for minutes or take its memory.
MOST = {"steps": 1000, "noises": 256}
_MAX_PIXELS = 64_000_000


class DiffDisModel(PythonModel):
    """Four tasks over one model: each row names its own, and rows of one task run as one batch."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load the exported model folder among the version's artifacts."""
        _warn_of_other_code(Path(__file__).parent / "code" / "pretrain")
        from pretrain.inference import Predictor

        self.predictor = Predictor.load(context.artifacts["model"])
        self.tasks: dict[str, Callable[..., list[dict[str, Any]]]] = {
            "generate": self._generate,
            "classify": self._classify,
            "embed_text": self._embed_text,
            "embed_image": self._embed_image,
        }

    def predict(
        self,
        context: PythonModelContext,
        model_input: pd.DataFrame,
        params: dict[str, Any] | None = None,
    ) -> pd.DataFrame:
        """Answer every row.

        Args:
            context: unused; the model is loaded already.
            model_input: columns task; text; image (base64 of a PNG or JPEG); labels (strings).
            params: steps and noises (0: the model's own), guidance (-1: the model's own), seed (of
                the first generated image; that of the i-th generate row is seed + i, so that one
                request of n rows gives what n requests would).

        Returns:
            Columns task, image (base64 PNG), embedding, label, probabilities (in the order of
            labels); what a task does not give is null. Same order and index as the input.

        Raises:
            MlflowException: INVALID_PARAMETER_VALUE, naming row, field, value and remedy.
        """
        settings = _settings(params or {})
        rows = [_Row(i, dict(row)) for i, row in enumerate(model_input.to_dict("records"))]
        by_task: dict[str, list[_Row]] = {}
        for row in rows:
            task = row.value("task")
            if task not in self.tasks:
                raise row.invalid("task", f"give one of {', '.join(self.tasks)}")
            by_task.setdefault(task, []).append(row)
        answers: list[dict[str, Any]] = [{} for _ in rows]
        for task, group in by_task.items():
            for row, answer in zip(group, self.tasks[task](group, settings), strict=True):
                answers[row.number] = {**dict.fromkeys(COLUMNS), "task": task, **answer}
        return pd.DataFrame(answers, columns=COLUMNS, index=model_input.index, dtype=object)

    def _generate(self, rows: Sequence["_Row"], settings: dict[str, Any]) -> list[dict[str, Any]]:
        chosen = {name: settings[name] for name in ("steps", "guidance", "seed")}
        images = self.predictor.generate([row.text() for row in rows], **chosen)
        return [{"image": _encode(image)} for image in images]

    def _embed_text(self, rows: Sequence["_Row"], settings: dict[str, Any]) -> list[dict[str, Any]]:
        embeddings_NE = self.predictor.embed_text([row.text() for row in rows])
        return [{"embedding": row.tolist()} for row in np.asarray(embeddings_NE)]

    def _embed_image(
        self, rows: Sequence["_Row"], settings: dict[str, Any]
    ) -> list[dict[str, Any]]:
        embeddings_NE = self.predictor.embed_image([row.image() for row in rows], **settings)
        return [{"embedding": row.tolist()} for row in np.asarray(embeddings_NE)]

    def _classify(self, rows: Sequence["_Row"], settings: dict[str, Any]) -> list[dict[str, Any]]:
        images = [row.image() for row in rows]
        labels = [row.labels() for row in rows]
        answers: list[dict[str, Any]] = [{} for _ in rows]
        for names in dict.fromkeys(labels):  # one call for each list of labels
            which = [i for i, own in enumerate(labels) if own == names]
            chosen = [images[i] for i in which]
            probabilities_NK = np.asarray(self.predictor.classify(chosen, list(names), **settings))
            for i, row in zip(which, probabilities_NK, strict=True):
                answers[i] = {"label": names[int(row.argmax())], "probabilities": row.tolist()}
        return answers


class _Row:
    """One request, and the errors that name it."""

    def __init__(self, number: int, fields: dict[str, Any]) -> None:
        self.number = number
        self.fields = fields

    def value(self, field: str) -> Any:
        """The field, or None where it is absent or null."""
        value = self.fields.get(field)
        return None if pd.api.types.is_scalar(value) and pd.isna(value) else value

    def invalid(self, field: str, remedy: str) -> MlflowException:
        value = repr(self.value(field))
        shown = value if len(value) <= 60 else f"{value[:57]}..."
        return MlflowException.invalid_parameter_value(
            f"row {self.number}: {field}={shown}: {remedy}"
        )

    def text(self) -> str:
        text = self.value("text")
        if not isinstance(text, str):
            raise self.invalid("text", f"task {self.value('task')!r} needs a text; give a string")
        return text

    def labels(self) -> tuple[str, ...]:
        labels = self.value("labels")
        if labels is None or isinstance(labels, str) or not len(labels):
            raise self.invalid("labels", "task 'classify' needs labels; give a list of strings")
        return tuple(map(str, labels))

    def image(self) -> Image.Image:
        data = self.value("image")
        remedy = "give a PNG or JPEG as base64"
        if not isinstance(data, str):
            raise self.invalid("image", f"task {self.value('task')!r} needs an image; {remedy}")
        try:
            image = Image.open(
                io.BytesIO(base64.b64decode(data, validate=True)), formats=("PNG", "JPEG")
            )
            if image.width * image.height > _MAX_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels are too many")
            image.load()  # decode now, where a failure names the row
            return image
        except (ValueError, OSError, SyntaxError, Image.DecompressionBombError) as error:
            kind = "not such an image" if isinstance(error, UnidentifiedImageError) else str(error)
            raise self.invalid("image", f"{remedy} ({kind})") from None


def _settings(params: dict[str, Any]) -> dict[str, Any]:
    """The predictor's keyword arguments; None is the model's own default."""
    for name, most in MOST.items():
        if not 0 <= params.get(name, 0) <= most:
            raise MlflowException.invalid_parameter_value(
                f"{name}={params[name]}: give a number from 1 to {most}, or 0 for the model's own"
            )
    guidance = params.get("guidance", -1.0)
    if not math.isfinite(guidance):
        raise MlflowException.invalid_parameter_value(
            f"guidance={guidance}: give a number, 0 for none, or -1 for the model's own"
        )
    return {
        "steps": params.get("steps") or None,
        "noises": params.get("noises") or None,
        "guidance": None if guidance < 0 else guidance,
        "seed": params.get("seed", 0),
    }


def _encode(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def _warn_of_other_code(logged: Path) -> None:
    """Say so where this process runs other code than was logged with the weights."""
    loaded = sys.modules.get("pretrain")
    if loaded is None or loaded.__file__ is None or not logged.is_dir():
        return
    used = Path(loaded.__file__).parent
    if any(
        not (used / path.relative_to(logged)).is_file()
        or (used / path.relative_to(logged)).read_bytes() != path.read_bytes()
        for path in logged.rglob("*.py")
    ):
        _log.warning(
            "pretrain was imported from %s, which differs from the code logged with this model and "
            "is used in its place; load the model in a fresh process to run the logged code",
            used,
        )


set_model(DiffDisModel())
