"""What the benchmarks of CDCD, DisCo and DCD share: lines that are not made twice, and their
files."""

import argparse
from pathlib import Path

import pytest
import torch

from benchmarks import dcd
from benchmarks._cdcd import images as cdcd_images
from benchmarks._dcd import images as dcd_images
from benchmarks._dcd import methods, points
from benchmarks._images.corpus import Book, load, spread


def test_a_line_is_found_again_by_another_process(tmp_path: Path) -> None:
    path = tmp_path / "below" / "study.jsonl"
    Book(path).add({"variant": "a", "seed": 1, "kid": 2.5})
    again = Book(path)
    found = again.find(variant="a", seed=1)
    assert found is not None and found["kid"] == 2.5
    assert again.find(variant="a", seed=2) is None


def test_a_densitys_file_lies_in_its_folder(tmp_path: Path) -> None:
    """A task is named "modes .2/.8"."""
    args = argparse.Namespace(out=tmp_path)
    files = {dcd.grid_file(args, task, m) for task in points.SETS for m in methods.METHODS}
    assert len(files) == len(points.SETS) * len(methods.METHODS)
    assert {f.parent for f in files} == {dcd.grids(args)}


def test_fewest_steps_is_by_the_same_seeds_baseline() -> None:
    steps = cdcd_images.STEPS
    base = {"steps": {str(s): {"kid": 1 + 0.1 * k} for k, s in enumerate(steps)}}
    better = {"steps": {str(s): {"kid": 0.8 + 0.1 * k} for k, s in enumerate(steps)}}
    worse = {"steps": {str(s): {"kid": 2.0} for s in steps}}
    assert cdcd_images.fewest(base, base) == steps[0]
    assert cdcd_images.fewest(better, base) == steps[2]
    assert cdcd_images.fewest(worse, base) is None


def test_the_corpus_says_group_and_style() -> None:
    pictures = load(["heldout-renderings"], 8)
    assert pictures.images_NCHW.shape == (255, 3, 8, 8) and len(pictures) == 255
    caption = pictures.captions[0]
    group, style = (pictures.labels[what][0] for what in ("group", "style"))
    assert caption == f"{group.replace('-', ' ')}, {style}"


@pytest.mark.parametrize("name", dcd_images.METHODS)
def test_every_method_learns_from_pictures(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dcd_images, "BATCH", 2)
    torch.manual_seed(0)
    net = dcd_images.EnergyConv(3, 4, len(dcd_images.LEVELS))
    before = [p.clone() for p in net.parameters()]
    data = torch.rand(4, 3, 16, 16) * 2 - 1
    assert dcd_images.fit(dcd_images.METHODS[name], net, data, 0, 2)
    assert any(not torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


def test_spread_of_one_seed_has_no_deviation() -> None:
    assert (spread([1.0]), spread([1.0, 3.0], 1)) == ("1.000", "2.0 ± 1.4")
