"""Golden outputs: a few requests with the answers that a version gave when it was made.

They are reproduced where the version is used: in a clean environment before an alias moves and when
it is pulled. The requests take few steps, so that a large model answers them in seconds.
"""

import base64
import io
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from pretrain.errors import RegistryError
from pretrain.registry import clean

FILE = "golden.json"
PARAMS = {"steps": 4, "guidance": 2.0, "seed": 7, "noises": 2}
# Largest differences: levels of 255, and absolute. Between processes of one machine there are 1
# level and 1e-5 at most (tests/integration/test_registry.py); other machines were not measured,
# and get room. Small tampering is for the hashes to find.
TOLERANCES = {"image": 3.0, "embedding": 2e-3, "probabilities": 1e-2}

Predict = Callable[[list[dict[str, Any]], dict[str, Any]], list[dict[str, Any]]]


def requests() -> list[dict[str, Any]]:
    """Rows of the model's signature, every task among them."""
    picture = base64.b64encode(_png(_drawing())).decode("ascii")
    labels = ["red apple", "blue car", "sunflower", "house"]
    empty = {"text": None, "image": None, "labels": None}
    return [
        {**empty, "task": "generate", "text": "red apple"},
        {**empty, "task": "generate", "text": "blue car"},
        {**empty, "task": "embed_text", "text": "a house"},
        {**empty, "task": "embed_image", "image": picture},
        {**empty, "task": "classify", "image": picture, "labels": labels},
    ]


def make(predict: Predict) -> dict[str, Any]:
    """The golden file of a model.

    Raises:
        RegistryError: an answer is not finite.
    """
    rows = requests()
    answers = predict(rows, PARAMS)
    for row, answer in zip(rows, answers, strict=True):
        numbers = [*(answer["embedding"] or ()), *(answer["probabilities"] or ())]
        if not all(map(math.isfinite, numbers)):
            raise RegistryError(
                f"task={row['task']!r} gives numbers that are not finite; register a checkpoint "
                "from before the loss broke"
            )
    return {"rows": rows, "params": PARAMS, "answers": answers, "tolerances": TOLERANCES}


def write(path: Path, golden: dict[str, Any]) -> None:
    """As JSON."""
    path.write_text(json.dumps(golden, indent=1), encoding="utf-8")


def read(version: Path) -> dict[str, Any]:
    """The golden file of a downloaded version.

    Raises:
        RegistryError: it has none.
    """
    try:
        return dict(json.loads((version / FILE).read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise RegistryError(
            f"the version has no {FILE}: it was made before golden outputs were kept; register "
            "the model again"
        ) from None


def differences(golden: dict[str, Any], answers: Sequence[dict[str, Any]]) -> list[str]:
    """What is not as it was, by request; empty where all is reproduced."""
    found = []
    if len(answers) != len(golden["answers"]):
        return [f"{len(answers)} answers to {len(golden['answers'])} requests"]
    for i, (expected, given) in enumerate(zip(golden["answers"], answers, strict=True)):
        for field, most in golden["tolerances"].items():
            if expected[field] is None:
                continue
            far = _distance(field, expected[field], given[field])
            if not far <= most:
                found.append(
                    f"request {i} ({expected['task']}): {field} differs by {far:.3g}, more than "
                    f"{most:g}"
                )
    return found


def check(version: Path, *, fresh: bool = False, same_releases: bool = False) -> None:
    """Reproduce the golden outputs of a downloaded version in a clean environment.

    Args:
        fresh: in a new virtual environment, see `clean.answers`.
        same_releases: refuse an environment that has other releases than were logged.

    Raises:
        RegistryError: they differ, or cannot be made.
    """
    golden = read(version)
    given = clean.answers(version, fresh=fresh)
    other = ", ".join(given.other_releases)
    if other and same_releases:
        raise RegistryError(
            f"the packages here are not those that were logged: {other}; install the version's "
            "requirements.txt, or use --fresh-venv"
        )
    if wrong := differences(golden, given.rows):
        cause = f" (packages of other releases here: {other})" if other else ""
        raise RegistryError(
            f"golden outputs are not reproduced{cause}: {'; '.join(wrong)}; do not use this "
            "version here"
        )


def _distance(field: str, expected: Any, given: Any) -> float:
    if given is None:
        return math.inf
    a, b = (_pixels(x) if field == "image" else np.asarray(x, float) for x in (expected, given))
    return float(np.abs(a - b).max()) if a.shape == b.shape else math.inf


def _pixels(text: str) -> Any:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB"), float)


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _drawing() -> Image.Image:
    """A red disc with a leaf on white: what the preset's model could know, and never random."""
    image = Image.new("RGB", (64, 64), "white")
    draw = ImageDraw.Draw(image)
    draw.ellipse((10, 16, 54, 60), fill=(214, 40, 40))
    draw.polygon([(32, 16), (46, 4), (40, 18)], fill=(60, 150, 60))
    return image
