"""Golden outputs: small differences are taken, larger ones are told; the clean environment."""

import base64
import copy
import io
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pretrain.errors import RegistryError
from pretrain.registry import clean, golden


def png(level: int, size: int = 4) -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), (level, 0, 0)).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


EMPTY = {"image": None, "embedding": None, "label": None, "probabilities": None}
ANSWERS: list[dict[str, Any]] = [
    {**EMPTY, "task": "generate", "image": png(100)},
    {**EMPTY, "task": "generate", "image": png(90)},
    {**EMPTY, "task": "embed_text", "embedding": [0.6, 0.8]},
    {**EMPTY, "task": "embed_image", "embedding": [1.0, 0.0]},
    {**EMPTY, "task": "classify", "label": "a", "probabilities": [0.7, 0.3]},
]


@pytest.mark.parametrize(
    ("number", "field", "value", "said"),
    [
        (0, "image", png(103), ""),
        (0, "image", png(104), "request 0 (generate): image differs by 4, more than 3"),
        (0, "image", png(100, 5), "image differs by inf"),
        (0, "image", None, "image differs by inf"),
        (2, "embedding", [0.601, 0.8], ""),
        (2, "embedding", [0.603, 0.8], "request 2 (embed_text): embedding differs by 0.003"),
        (2, "embedding", [np.nan, 0.8], "embedding differs by nan"),
        (3, "embedding", [1.0, 0.0, 0.0], "embedding differs by inf"),
        (4, "probabilities", [0.695, 0.305], ""),
        (4, "probabilities", [0.68, 0.32], "(classify): probabilities differs by 0.02"),
    ],
)
def test_differences(number: int, field: str, value: Any, said: str) -> None:
    kept = golden.make(lambda rows, params: ANSWERS)
    given = copy.deepcopy(ANSWERS)
    given[number][field] = value
    found = golden.differences(kept, given)
    assert (said in found[0] and len(found) == 1) if said else found == []


def test_another_number_of_answers_differs() -> None:
    kept = golden.make(lambda rows, params: ANSWERS)
    assert golden.differences(kept, ANSWERS[:4]) == ["4 answers to 5 requests"]


def test_a_model_that_says_nan_is_not_registered() -> None:
    broken = copy.deepcopy(ANSWERS)
    broken[2]["embedding"][1] = float("nan")
    with pytest.raises(RegistryError, match="task='embed_text' gives numbers that are not finite"):
        golden.make(lambda rows, params: broken)


LOOK = """
import importlib.util, json, sys
sys.path.append(sys.argv[1])
names = ["numpy", "sentencepiece", "pydantic", "pydantic_core", "torch", "deepspeed", "pretrain"]
print(json.dumps([name for name in names if importlib.util.find_spec(name)]))
"""


def test_the_clean_environment_has_what_is_named_and_what_that_needs() -> None:
    with clean.site_of(["pydantic", "sentencepiece"]) as (site, other):
        command = [sys.executable, "-I", "-S", "-c", LOOK, str(site)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == '["sentencepiece", "pydantic", "pydantic_core"]'
    assert other == [] and not site.exists()


def test_another_release_is_told_and_a_missing_one_refused() -> None:
    here = version("pydantic")
    with clean.site_of([f"pydantic=={here}", "numpy==1.0.0"]) as (_, other):
        assert other == [f"numpy {version('numpy')} (logged: ==1.0.0)"]
    with (
        pytest.raises(RegistryError, match=r"'no-such-thing==1\.0'.*is not installed; run pip"),
        clean.site_of(["no-such-thing==1.0"]),
    ):
        pass


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("raise SystemExit('it broke')", "does not run in a clean environment: it broke"),
        ('print(\'{"answers": [], "code": "/elsewhere"}\')', "ran code from '/elsewhere'"),
        (
            'import os; print(\'{"answers": [], "deepspeed": true, "code": "\''
            " + os.path.realpath(os.environ['VERSION']) + '/code/pretrain\"}')",
            "the version imports deepspeed",
        ),
    ],
)
def test_a_version_that_runs_otherwise_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, said: str
) -> None:
    """The process is real; what it runs stands in for a version that takes seconds to load."""
    (tmp_path / "requirements.txt").write_text("sentencepiece\n")
    stand_in = tmp_path / "stand_in.py"
    stand_in.write_text(script)
    monkeypatch.setattr(clean, "_SCRIPT", stand_in)
    monkeypatch.setenv("VERSION", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", "/nowhere")
    with pytest.raises(RegistryError, match=said):
        clean.answers(tmp_path)


def test_every_task_is_asked() -> None:
    from pretrain.registry.version import example

    asked = {row["task"] for row in golden.requests()}
    assert asked == {"generate", "classify", "embed_text", "embed_image"} == set(example()["task"])
