"""A file in a folder is a plug-in: found by its name, with no list to edit."""

import sys
from pathlib import Path

import pytest

from pretrain import plugins
from pretrain.errors import ConfigError


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    folder = tmp_path / "some_plugins"
    folder.mkdir()
    for name in ("__init__", "base", "_hidden", "second", "first"):
        (folder / f"{name}.py").write_text(f"NAME = {name!r}\n")
    (folder / "notes.txt").write_text("no plug-in")
    monkeypatch.syspath_prepend(tmp_path)
    yield "some_plugins"
    for module in [m for m in sys.modules if m.split(".")[0] == "some_plugins"]:
        del sys.modules[module]


def test_names_are_the_files_less_base_and_hidden_ones(package: str) -> None:
    assert plugins.names(package) == ["first", "second"]


def test_a_new_file_is_a_plug_in(package: str, tmp_path: Path) -> None:
    assert "third" not in plugins.names(package)
    (tmp_path / "some_plugins/third.py").write_text("NAME = 'third'\n")
    assert plugins.names(package) == ["first", "second", "third"]
    assert plugins.load(package, "third", "things.third").NAME == "third"


def test_a_plug_in_is_imported_when_it_is_asked_for_alone(package: str) -> None:
    assert plugins.load(package, "first", "things.first").NAME == "first"
    assert "some_plugins.second" not in sys.modules


@pytest.mark.parametrize("name", ["frist", "base", "_hidden", "os.path", ""])
def test_what_is_no_plug_in_is_named_with_those_that_are(package: str, name: str) -> None:
    with pytest.raises(ConfigError, match=rf"things={name!r} is unknown.*first, second"):
        plugins.load(package, name, "things")


def test_the_nearest_name_is_suggested(package: str) -> None:
    with pytest.raises(ConfigError, match="did you mean 'first'"):
        plugins.load(package, "frist", "things")


@pytest.mark.parametrize(
    ("package_name", "expected"),
    [
        ("pretrain.objectives", {"generate", "align"}),
        ("pretrain.evaluators", {"zero_shot", "retrieval", "generation", "validation", "samples"}),
        ("pretrain.commands", {"train", "evaluate", "export", "data"}),
    ],
)
def test_the_folders_of_the_project_are_found(package_name: str, expected: set[str]) -> None:
    assert expected <= set(plugins.names(package_name))
