"""Evaluation sets: clip-benchmark's folders as it writes them, and manifests of ours."""

import io
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from pretrain.config import build
from pretrain.data import clipfolder, evalnotes, evalset, index
from pretrain.data.evalset import EvalSet, Sight, open_set, read_pictures
from pretrain.data.reader import ReadConfig, ShardReader
from pretrain.data.samples import Bounds, prepare
from pretrain.data.setconfig import SetConfig, definitions, read_definition
from pretrain.errors import ConfigError, DataError
from tests.support.clipset import encoded, served, write_folder
from tests.support.web import WebServer

CLS = ["2", "0", "1", "1", "0", "2", "2"]
CAPTIONS = ["a red owl\nan owl in red\n", "one caption", "\n  padded  \n\nlast\n", "x\ny\nz"]
BOUNDS = Bounds(1 << 20, 1 << 20)


@pytest.fixture
def sight(tmp_path: Path) -> Sight:
    return Sight(16, BOUNDS, ReadConfig(cache=str(tmp_path / "cache")))


def opened(sight: Sight, **fields: Any) -> EvalSet:
    return open_set("pets", build(SetConfig, fields), sight)


def test_a_folder_as_clip_benchmark_writes_it(tmp_path: Path, sight: Sight) -> None:
    url = write_folder(tmp_path / "wds_pets", CLS)
    found = opened(sight, url=url)
    assert len(found) == 7 and found.task == "classification"
    assert found.classes == ("cat", "dog", "owl")
    assert found.templates == ("a photo of a {c}.", "a drawing of the {c}.")
    assert found.labels_N.tolist() == [2, 0, 1, 1, 0, 2, 2]
    assert found.captions[0] == ("owl",) and found.keys[6] == "s0000006"
    numbers = [5, 0, 6, 0]  # of both shards, out of order, twice
    made = found.images(numbers)
    expected = [prepare(Image.open(io.BytesIO(encoded(i))), 16) for i in numbers]
    assert made.shape == (4, 3, 16, 16) and torch.equal(made, torch.stack(expected))
    assert torch.equal(found.images(numbers), made)
    assert found.pictures([3, 6]) == [encoded(3), encoded(6)]
    assert opened(sight, url=f"file://{url}").fingerprint == found.fingerprint
    assert torch.equal(opened(sight, url=f"file://{url}").images(numbers), made)
    assert found.images([]).shape == (0, 3, 16, 16) and found.pictures([]) == []


def test_a_set_too_large_to_keep_gives_the_same(
    tmp_path: Path, sight: Sight, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = write_folder(tmp_path / "wds_pets", CLS, kind="png")
    kept = opened(sight, url=url).images([4, 1])
    monkeypatch.setattr(evalset, "CACHED_BYTES", 0)
    streamed = opened(sight._replace(bounds=Bounds(1 << 20, 1 << 21)), url=url)
    assert streamed._pixels is None and torch.equal(streamed.images([4, 1]), kept)


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp"])
def test_a_folder_on_the_web_is_the_same_set(tmp_path: Path, sight: Sight, kind: str) -> None:
    folder = tmp_path / "wds_pets"
    local = opened(sight, url=write_folder(folder, CLS, kind=kind))
    with WebServer(served(folder)) as web:
        found = opened(sight, url=web.url)
        assert found.fingerprint == local.fingerprint and found.classes == local.classes
        assert torch.equal(found.images([6, 1]), local.images([6, 1]))
        del web.files["test/nshards.txt"]
        with pytest.raises(DataError, match=r"nshards\.txt does not exist.*split 'test'"):
            opened(sight, url=web.url)


def test_the_hub_keeps_small_files_and_tars_apart() -> None:
    hub = "https://huggingface.co/datasets/clip-benchmark/wds_vtab-cifar10"
    assert clipfolder.bases(f"{hub}/tree/main") == (f"{hub}/raw/main", f"{hub}/resolve/main")
    assert clipfolder.bases(f"{hub}/tree/v2/part/") == (
        f"{hub}/raw/v2/part",
        f"{hub}/resolve/v2/part",
    )
    assert clipfolder.bases(hub)[0] == f"{hub}/raw/main"
    assert clipfolder.bases("s3://b/wds_x/") == ("s3://b/wds_x", "s3://b/wds_x")


def test_captions_of_a_retrieval_folder(tmp_path: Path, sight: Sight) -> None:
    url = write_folder(tmp_path / "wds_flickr", CAPTIONS, retrieval=True, kind="jpeg")
    found = opened(sight, url=url)
    assert found.task == "retrieval" and found.classes == () and found.templates is None
    assert found.captions == (
        ("a red owl", "an owl in red"),
        ("one caption",),
        ("padded", "last"),
        ("x", "y", "z"),
    )
    assert found.labels_N.tolist() == [0, 1, 2, 3]


def test_a_manifest_is_by_class_or_by_caption(corpus: Callable[..., str], sight: Sight) -> None:
    manifest = corpus([3, 2])
    classes = open_set("mine", build(SetConfig, {"manifest": manifest}), sight)
    assert classes.classes == ("s0-0", "s0-1", "s0-2", "s1-0", "s1-1")
    assert classes.captions[4] == ("s1-1",)
    retrieval = open_set("mine", SetConfig(manifest=manifest, task="retrieval"), sight)
    assert retrieval.captions[1] == ("s0-1", "a drawing of s0-1")
    assert classes.images_sha256 == retrieval.images_sha256  # embedded once for both
    assert classes.fingerprint != retrieval.fingerprint


def test_encoded_pictures_with_their_names(corpus: Callable[..., str], sight: Sight) -> None:
    manifest = corpus([3, 2])
    found = open_set("mine", SetConfig(manifest=manifest), sight)
    pictures = read_pictures(manifest)
    assert [(p.name,) for p in pictures] == list(found.captions)
    assert pictures[0].png.startswith(b"\x89PNG") and pictures[4].key == found.keys[4]


def test_it_is_gathered_once_and_then_only_the_share_is_read(
    tmp_path: Path, sight: Sight, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = write_folder(tmp_path / "wds_pets", CLS)
    first = opened(sight, url=url)
    assert opened(sight, url=url) is first  # evaluators run many times in training
    read: list[Any] = []
    inner = ShardReader.read_many

    def counted(self: ShardReader, samples: Any) -> Any:
        read.extend(samples)
        return inner(self, samples)

    monkeypatch.setattr(ShardReader, "read_many", counted)
    monkeypatch.setattr(index, "build", None)
    evalset._sets.clear()  # as another process of the node
    again = opened(sight, url=url)
    assert again is not first and again.fingerprint == first.fingerprint and read == []
    again.images([1, 4])
    assert read == [(0, 0, 1), (0, 1, 0)]
    again.images([4, 1])
    assert len(read) == 2  # a small set stays in memory


def test_a_folder_that_changed_is_another_set(tmp_path: Path, sight: Sight) -> None:
    folder = tmp_path / "wds_pets"
    first = opened(sight, url=write_folder(folder, CLS))
    second = opened(sight, url=write_folder(folder, ["1", *CLS]))
    assert len(second) == 8 and second.labels_N[0] == 1
    assert second.fingerprint != first.fingerprint
    (folder / "zeroshot_classification_templates.txt").write_text("{c}\n")
    third = opened(sight, url=str(folder))
    assert third.templates == ("{c}",) and third.fingerprint != second.fingerprint
    assert third.images_sha256 == second.images_sha256


def test_one_process_of_a_node_indexes(
    tmp_path: Path, sight: Sight, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = write_folder(tmp_path / "wds_pets", CLS)
    folder = clipfolder.read_folder(url, "test", sight.read.retry)
    built, beats, inner = [], [], index.build
    both = threading.Barrier(2)

    def slow(*arguments: Any, **options: Any) -> Any:
        built.append(arguments)
        threading.Event().wait(0.3)
        return inner(*arguments, **options)

    def one() -> None:
        both.wait()
        versions = clipfolder.versions(folder)
        clipfolder.indexed(folder, versions, sight.read, lambda: beats.append(1))

    monkeypatch.setattr(index, "build", slow)
    threads = [threading.Thread(target=one) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 1
    assert len(beats) > 2  # the one that waits tells its watchdog


def test_notes_that_were_damaged_are_gathered_anew(tmp_path: Path, sight: Sight) -> None:
    url = write_folder(tmp_path / "wds_pets", CLS)
    first = opened(sight, url=url)
    (path,) = clipfolder.cache_of(sight.read).glob("*-cls.json")
    path.write_text(path.read_text()[:40])
    evalset._sets.clear()
    assert opened(sight, url=url).fingerprint == first.fingerprint


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"notes": ["2", "3"]}, r"'s0000001' is of class 3, and .*classnames.txt names 3"),
        ({"notes": ["2", "-1"]}, r"'s0000001' has no class number in a \.cls \(b'-1'\)"),
        ({"classes": None}, r"classnames\.txt does not exist.*class_names"),
        ({"classes": ["cat", "", "owl"]}, r"classnames\.txt: line 2 is empty"),
        ({"retrieval": True, "notes": ["a", " \n"]}, r"'s0000001' has no captions in a \.txt"),
    ],
)
def test_what_is_wrong_with_a_folder_is_said(
    tmp_path: Path, sight: Sight, change: dict[str, Any], message: str
) -> None:
    fields = {"notes": CLS, **change}
    with pytest.raises(DataError, match=message):
        opened(sight, url=write_folder(tmp_path / "wds", **fields))


def test_what_it_should_be_and_is_not_is_said(tmp_path: Path, sight: Sight) -> None:
    folder = tmp_path / "wds"
    url = write_folder(folder, CLS)
    with pytest.raises(DataError, match=r"num_images=7, it should have 8.*say num_images: 7"):
        opened(sight, url=url, num_images=8)
    with pytest.raises(DataError, match="num_classes=3, it should have 4"):
        opened(sight, url=url, num_classes=4)
    with pytest.raises(DataError, match=r"nshards\.txt does not exist.*split 'train'"):
        opened(sight, url=url, split="train")
    (folder / "dataset_type.txt").write_text("multilabel")
    with pytest.raises(DataError, match="says 'multilabel'; classification and retrieval"):
        opened(sight, url=url)
    (folder / "test" / "nshards.txt").write_text("many")
    with pytest.raises(DataError, match="holds 'many', not a number of shards"):
        opened(sight, url=url)


def test_a_damaged_picture_is_never_left_out(tmp_path: Path, sight: Sight) -> None:
    small = sight._replace(bounds=Bounds(1 << 20, 100))
    found = opened(small, url=write_folder(tmp_path / "wds", CLS))
    with pytest.raises(DataError, match="'pets': sample 's0000002' is damaged: too many pixels"):
        found.images([2])


def test_the_folders_own_words_rule_the_definitions_stand_in(tmp_path: Path, sight: Sight) -> None:
    own = {"templates": ["{c}!"], "class_names": ["a", "b", "c"]}
    url = write_folder(tmp_path / "wds", CLS)
    assert opened(sight, url=url, **own).templates == ("a photo of a {c}.", "a drawing of the {c}.")
    bare = write_folder(tmp_path / "bare", CLS, classes=None, templates=None)
    found = opened(sight, url=bare, **own)
    assert found.templates == ("{c}!",) and found.classes == ("a", "b", "c")
    assert opened(sight, url=bare, class_names=["a", "b", "c"]).templates is None


def test_a_bare_string_is_a_manifest_or_a_folder() -> None:
    assert SetConfig.model_validate("data/held.json").manifest == "data/held.json"
    assert SetConfig.model_validate("s3://b/wds_x").url == "s3://b/wds_x"
    with pytest.raises(ConfigError, match="manifest=None, url=None: give one of the two"):
        build(SetConfig, {})
    with pytest.raises(ConfigError, match=r"splitt='x': unknown field; did you mean 'split'"):
        build(SetConfig, {"url": "u", "splitt": "x"})


PAPER = {
    "caltech101",
    "cifar10",
    "cifar100",
    "dtd",
    "eurosat",
    "fgvc_aircraft",
    "flowers102",
    "food101",
    "imagenet1k",
    "oxford_pets",
    "stanford_cars",
    "sun397",
}


def test_the_ready_definitions() -> None:
    assert set(definitions()) == PAPER | {"flickr30k", "mscoco"}
    for name in definitions():
        config = build(SetConfig, {"definition": name, "url": "/data/x"})
        assert config.title and config.licence and config.paper and config.num_images
        folder = config.source.split("/")[5]
        assert config.source.startswith(f"{clipfolder.HUB}clip-benchmark/wds_")
        assert f"clip-benchmark/{folder} " in config.download
        if name in PAPER:
            assert config.task == "classification" and config.metric in ("top1", "mean_per_class")
            assert config.templates and all("{c}" in t for t in config.templates)
            assert len(set(config.templates)) == len(config.templates)
            names = config.class_names
            assert names is None or len(set(names)) == config.num_classes
        else:
            assert config.task == "retrieval" and config.metric == "recall"


def test_a_definition_is_filled_in_by_its_use(tmp_path: Path, sight: Sight) -> None:
    config = build(SetConfig, {"definition": "cifar10", "url": "/data/x", "num_images": 500})
    assert (config.num_images, config.num_classes, config.split) == (500, 10, "test")
    again = build(SetConfig, config.model_dump(mode="json"))  # as a saved run is read
    assert again == config
    with pytest.raises(
        ConfigError, match=r"give one of the two; CIFAR-10 is to be had so: hf down"
    ):
        build(SetConfig, {"definition": "cifar10"})
    with pytest.raises(ConfigError, match=r"definition='cifar' is unknown \(there are: caltech101"):
        build(SetConfig, {"definition": "cifar", "url": "u"})
    path = tmp_path / "own.yaml"
    path.write_text("title: mine\nnum_images: 7\ntask: classification\n")
    url = write_folder(tmp_path / "wds", CLS)
    assert len(opened(sight, definition=str(path), url=url)) == 7
    assert read_definition(str(path))["title"] == "mine"
    assert evalnotes.NOTES.keys() == {"name", "cls", "txt", "captions"}
