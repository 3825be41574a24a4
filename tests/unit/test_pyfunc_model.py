"""The served model: rows go to their task in batches, and bad requests say what to mend."""

import base64
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import pytest
from mlflow.exceptions import MlflowException
from PIL import Image

from pretrain.pyfunc_model import COLUMNS, DiffDisModel


class StubPredictor:
    """Answers from its arguments, and keeps the calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def generate(self, prompts: Sequence[str], **settings: Any) -> list[Image.Image]:
        self.calls.append(("generate", list(prompts), settings))
        return [Image.new("RGB", (2, 2), (len(prompt), 0, 0)) for prompt in prompts]

    def embed_text(self, texts: Sequence[str]) -> np.ndarray:
        self.calls.append(("embed_text", list(texts)))
        return np.asarray([[len(text), 0.0] for text in texts], np.float32)

    def embed_image(self, images: Sequence[Image.Image], **settings: Any) -> np.ndarray:
        self.calls.append(("embed_image", [image.size for image in images], settings))
        return np.asarray([image.size for image in images], np.float32)

    def classify(
        self, images: Sequence[Image.Image], labels: Sequence[str], **_: Any
    ) -> np.ndarray:
        self.calls.append(("classify", [image.size for image in images], list(labels)))
        return np.eye(len(labels), dtype=np.float32)[
            [image.width % len(labels) for image in images]
        ]


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> DiffDisModel:
    monkeypatch.setattr("pretrain.inference.Predictor.load", lambda folder: StubPredictor())
    model = DiffDisModel()
    model.load_context(type("Context", (), {"artifacts": {"model": "folder"}}))
    return model


def png(width: int, mode: str = "RGBA") -> str:
    buffer = io.BytesIO()
    Image.new(mode, (width, 1)).save(buffer, "PNG" if mode == "RGBA" else "JPEG")
    return base64.b64encode(buffer.getvalue()).decode()


def predict(model: DiffDisModel, rows: list[dict[str, Any]], **params: Any) -> pd.DataFrame:
    return model.predict(None, pd.DataFrame(rows), params)


def test_rows_of_a_task_are_one_batch_and_come_back_in_place(model: DiffDisModel) -> None:
    rows = [
        {"task": "generate", "text": "a"},
        {"task": "classify", "image": png(3), "labels": ["x", "y"]},
        {"task": "generate", "text": "abc"},
        {"task": "classify", "image": png(2), "labels": ["p", "q", "r"]},
        {"task": "embed_text", "text": "four"},
        {"task": "classify", "image": png(4, "RGB"), "labels": np.asarray(["x", "y"])},
        {"task": "embed_image", "image": png(9)},
    ]
    answer = predict(model, rows, steps=0, guidance=-1.0, seed=5, noises=0)
    assert list(answer.columns) == COLUMNS and list(answer["task"]) == [row["task"] for row in rows]
    calls = model.predictor.calls
    assert [call[0] for call in calls] == [
        "generate",
        "classify",
        "classify",
        "embed_text",
        "embed_image",
    ]
    assert calls[0][1:] == (["a", "abc"], {"steps": None, "guidance": None, "seed": 5})
    assert calls[1][1:] == ([(3, 1), (4, 1)], ["x", "y"]) and calls[2][2] == ["p", "q", "r"]
    assert calls[4][2] == {"steps": None, "noises": None, "guidance": None, "seed": 5}
    for i, red in ((0, 1), (2, 3)):
        image = Image.open(io.BytesIO(base64.b64decode(answer["image"][i])))
        assert image.format == "PNG" and image.getpixel((0, 0)) == (red, 0, 0)
    assert [answer["label"][i] for i in (1, 3, 5)] == ["y", "r", "x"]
    assert answer["probabilities"][3] == [0.0, 0.0, 1.0] and answer["embedding"][4] == [4.0, 0.0]
    assert (
        answer["image"][1] is None and answer["embedding"][0] is None and answer["label"][0] is None
    )


def test_parameters_override_the_models_own(model: DiffDisModel) -> None:
    predict(
        model, [{"task": "embed_image", "image": png(1)}], steps=3, guidance=0.0, seed=1, noises=2
    )
    assert model.predictor.calls[0][2] == {"steps": 3, "noises": 2, "guidance": 0.0, "seed": 1}


@pytest.mark.parametrize(
    ("row", "params", "said"),
    [
        ({"task": "draw"}, {}, "row 1: task='draw': give one of generate, classify"),
        ({"task": None}, {}, "row 1: task=None: give one of"),
        ({"task": "generate"}, {}, "row 1: text=None: task 'generate' needs a text; give a string"),
        ({"task": "embed_text", "text": np.nan}, {}, "row 1: text=None: task 'embed_text'"),
        ({"task": "embed_image"}, {}, "row 1: image=None: task 'embed_image' needs an image"),
        ({"task": "classify", "image": png(1)}, {}, "row 1: labels=None: task 'classify' needs"),
        ({"task": "classify", "image": png(1), "labels": []}, {}, "row 1: labels=[]"),
        ({"task": "embed_image", "image": "no base64"}, {}, "row 1: image='no base64': give a PNG"),
        (
            {"task": "embed_image", "image": "AAAA"},
            {},
            "image='AAAA': give a PNG or JPEG as base64 (not",
        ),
        ({"task": "embed_image", "image": png(9)[:-40]}, {}, "give a PNG or JPEG as base64"),
        ({"task": "embed_image", "image": "A" * 200}, {}, "AAA...: give a PNG or JPEG as base64"),
        (
            {"task": "generate", "text": "x"},
            {"steps": -1},
            "steps=-1: give a number from 1 to 1000, or 0 for the model's own",
        ),
        ({"task": "generate", "text": "x"}, {"steps": 1001}, "steps=1001: give a number from 1"),
        ({"task": "generate", "text": "x"}, {"guidance": np.inf}, "guidance=inf: give a number"),
    ],
)
def test_a_bad_request_names_row_field_value_and_remedy(
    model: DiffDisModel, row: dict[str, Any], params: dict[str, Any], said: str
) -> None:
    with pytest.raises(MlflowException) as error:
        predict(model, [{"task": "embed_text", "text": "good"}, row], **params)
    assert error.value.error_code == "INVALID_PARAMETER_VALUE" and said in str(error.value)
