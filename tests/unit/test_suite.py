"""A suite's file: what stands in it, and what is wrong with it, before anything is loaded."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from pretrain import suite
from pretrain.errors import ConfigError

SETS = {
    "small": {"manifest": "/nowhere/small.json"},
    "other": "/nowhere/other.json",
    "cifar": {"definition": "cifar10", "url": "s3://bucket/wds_vtab-cifar10", "split": "train"},
    "wrong": {"urll": "s3://bucket/wds_pets"},
}
ZERO_SHOT = {"evaluator": "zero_shot", "sets": ["small"]}
ROOT = Path(__file__).resolve().parents[2]


def loaded(path: Path, **entries: Any) -> suite.Suite:
    path = path / "suite.yaml"
    path.write_text(
        yaml.safe_dump({"name": "s", "sets": SETS, "entries": entries}, sort_keys=False)
    )
    return suite.load(path)


def test_an_entry_is_an_evaluator_with_settings_over_named_sets(tmp_path: Path) -> None:
    (entry,) = loaded(tmp_path, plain={**ZERO_SHOT, "steps": 7, "sets": ["small", "other"]}).entries
    assert (entry.name, entry.evaluator) == ("plain", "zero_shot")
    resolved = entry.resolved()
    assert resolved["steps"] == 7 and resolved["guidance"] == 0.0
    assert list(resolved["sets"]) == ["small", "other"]
    assert "every_samples" not in resolved and "at_start" not in resolved


@pytest.mark.parametrize("evaluator", ["zero_shot", "retrieval", "generation"])
def test_a_set_is_what_its_definition_says(tmp_path: Path, evaluator: str) -> None:
    """To every evaluator alike; what it says of files is not looked at yet."""
    extractor = {"features": {"kind": "inception", "path": "/nowhere.pth"}, "judge": "/nowhere"}
    more = extractor if evaluator == "generation" else {}
    entry = {"evaluator": evaluator, "sets": ["cifar", "other"], **more}
    found = loaded(tmp_path, x=entry).entries[0].resolved()["sets"]
    assert found["other"]["manifest"] == "/nowhere/other.json"
    cifar = found["cifar"]
    assert cifar["url"] == "s3://bucket/wds_vtab-cifar10" and cifar["split"] == "train"
    assert cifar["num_classes"] == 10 and cifar["class_names"][0] == "airplane"


def test_a_sweep_is_an_entry_for_each_combination(tmp_path: Path) -> None:
    sweep = {"steps": [1, 4], "noises": [1, 2, 8]}
    found = loaded(tmp_path, swept={**ZERO_SHOT, "sweep": sweep}, last=ZERO_SHOT)
    names = [e.name for e in found.entries]
    assert names[:2] == ["swept[steps=1,noises=1]", "swept[steps=1,noises=2]"]
    assert len(names) == 7 and names[-1] == "last" and len(set(names)) == 7
    settings = [(e.resolved()["steps"], e.resolved()["noises"]) for e in found.entries[:6]]
    assert settings == [(s, n) for s in (1, 4) for n in (1, 2, 8)]
    assert [e.name for e in found.chosen(["swept"])] == names[:6]
    assert [e.name for e in found.chosen([names[3]])] == [names[3]]
    assert found.chosen(()) == list(found.entries)
    with pytest.raises(ConfigError, match=r"'swpet' is no entry.*did you mean 'swept'"):
        found.chosen(["swpet"])


def test_a_swept_list_is_one_value_in_the_name(tmp_path: Path) -> None:
    (a, b) = loaded(tmp_path, t={**ZERO_SHOT, "sweep": {"templates": [["{}"], ["a {}"]]}}).entries
    assert a.name == 't[templates=["{}"]]' and b.resolved()["templates"] == ["a {}"]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (
            {"evaluator": "zero_shoot"},
            r"entries\.x\.evaluator='zero_shoot' is unknown; did you mea",
        ),
        ({"sets": ["small"]}, r"entries\.x\.evaluator: required.*there are: .*zero_shot"),
        ({**ZERO_SHOT, "sets": ["smal"]}, r"entries\.x\.sets='smal' is unknown; did you mean 'sma"),
        ({**ZERO_SHOT, "sets": "small"}, r"entries\.x\.sets='small' must be a list"),
        ({**ZERO_SHOT, "stebs": 4}, r"entries\.x\.stebs=4: unknown field; did you mean 'steps'"),
        ({**ZERO_SHOT, "steps": 0}, r"entries\.x\.steps=0: "),
        ({**ZERO_SHOT, "at_start": True}, r"entries\.x\.at_start=True: .*remove it"),
        ({**ZERO_SHOT, "sweep": {"steps": [1, 0]}}, r"entries\.x\[steps=0\]\.steps=0"),
        ({**ZERO_SHOT, "sweep": {"steps": []}}, r"entries\.x\.sweep\.steps=\[\] must be a list"),
        ({**ZERO_SHOT, "sweep": {"steps": 4}}, r"entries\.x\.sweep\.steps=4 must be a list"),
        ({**ZERO_SHOT, "sweep": {"steps": [4, 4]}}, "names a value twice"),
        ({**ZERO_SHOT, "sweep": {"sets": [["small"]]}}, "beside the sweep; keep one"),
        ({**ZERO_SHOT, "steps": 1, "sweep": {"steps": [2]}}, "beside the sweep; keep one"),
        ({**ZERO_SHOT, "sets": ["wrong"]}, r"entries\.x\.sets\.wrong\.urll=.*did you mean 'url'"),
        ({"evaluator": "samples", "sets": ["small"]}, r"entries\.x\.sets: .*reads no sets"),
        ({"evaluator": "zero_shot"}, r"entries\.x: .*sets"),
        ({"evaluator": "validation"}, r"entries\.x: .*manifest"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        loaded(tmp_path, x=fields)


def test_names_and_the_suite_itself_are_checked(tmp_path: Path) -> None:
    for name in ("a/b", "", "../up", "a[b]"):
        with pytest.raises(ConfigError, match="rename it"):
            loaded(tmp_path, **{name: ZERO_SHOT})
    with pytest.raises(ConfigError, match="at least one"):
        loaded(tmp_path)
    (tmp_path / "suite.yaml").write_text("name: s\nentires: {}\n")
    with pytest.raises(ConfigError, match="did you mean 'entries'"):
        suite.load(tmp_path / "suite.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        suite.load(tmp_path / "none.yaml")


def test_a_base_gives_entries_and_null_leaves_one_out(tmp_path: Path) -> None:
    loaded(tmp_path, one=ZERO_SHOT, two={**ZERO_SHOT, "steps": 2})
    over = {"base": "suite.yaml", "entries": {"one": None, "two": {"steps": 3}}}
    (tmp_path / "over.yaml").write_text(yaml.safe_dump(over))
    (entry,) = suite.load(tmp_path / "over.yaml").entries
    assert entry.name == "two" and entry.resolved()["steps"] == 3


@pytest.mark.parametrize("path", sorted((ROOT / "configs/suites").glob("*.yaml")), ids=str)
def test_the_suites_that_come_with_it_are_good(path: Path) -> None:
    assert suite.load(path).entries
