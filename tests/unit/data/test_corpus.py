"""The committed corpus and the commands that make and check shards."""

import io
import itertools
import json
import re
import shutil
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pretrain.__main__ import main
from pretrain.data import drawings, emoji
from pretrain.data.captions import article, variants, with_article
from pretrain.data.concepts import base_concept
from pretrain.data.evalset import read_all
from pretrain.data.manifest import Manifest
from pretrain.data.reader import ReadConfig
from pretrain.data.shards import RawSample
from pretrain.errors import DataError
from tests.unit.data.conftest import ROOT, good, write_tar

SPLITS = ("train", "heldout-renderings", "heldout-concepts")


def read(split: str) -> list[RawSample]:
    return list(read_all(str(ROOT / f"data/emoji/{split}.json"), ReadConfig()))


@pytest.fixture(scope="module")
def corpus_() -> dict[str, list[RawSample]]:
    return {split: read(split) for split in SPLITS}


@pytest.fixture(scope="module")
def fields(corpus_: dict[str, list[RawSample]]) -> dict[str, list[dict[str, Any]]]:
    return {
        s: [json.loads(r.files["json"]) | {"key": r.key} for r in rs] for s, rs in corpus_.items()
    }


@pytest.mark.parametrize("split", SPLITS)
def test_every_committed_sample_is_whole(split: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "verify", str(ROOT / f"data/emoji/{split}.json")]) == 0
    assert "all whole" in capsys.readouterr().out


def test_held_out_sets_are_large_enough_to_mean_something(fields: dict[str, Any]) -> None:
    assert len(fields["heldout-renderings"]) >= 200
    assert len(fields["heldout-concepts"]) >= 200
    assert len(fields["train"]) >= 2_000


def test_no_held_out_concept_is_in_training(fields: dict[str, Any]) -> None:
    for field in ("base", "name", "hexcode"):
        seen = {f[field] for f in fields["train"]} | {
            f[field] for f in fields["heldout-renderings"]
        }
        assert not seen & {f[field] for f in fields["heldout-concepts"]}


def test_a_held_out_rendering_is_seen_from_another_vendor_alone(fields: dict[str, Any]) -> None:
    vendors: dict[str, set[str]] = defaultdict(set)
    for f in fields["train"]:
        vendors[f["hexcode"]].add(f["vendor"])
    for f in fields["heldout-renderings"]:
        assert vendors[f["hexcode"]] and f["vendor"] not in vendors[f["hexcode"]]


def test_no_picture_is_both_held_out_and_trained_on(corpus_: dict[str, list[RawSample]]) -> None:
    trained = {r.files["png"] for r in corpus_["train"]}
    held = [r for s in SPLITS[1:] for r in corpus_[s]]
    assert [r.key for r in held if r.files["png"] in trained] == []


def test_keys_are_unique_and_vendors_are_mixed_in_every_shard(
    corpus_: dict[str, list[RawSample]],
) -> None:
    keys = [r.key for rs in corpus_.values() for r in rs]
    assert len(set(keys)) == len(keys)
    for shard in {r.shard for r in corpus_["train"]}:
        vendors = [
            json.loads(r.files["json"])["vendor"] for r in corpus_["train"] if r.shard == shard
        ]
        runs = 1 + sum(a != b for a, b in itertools.pairwise(vendors))
        assert runs > len(vendors) // 2  # about 2/3 when shuffled, 3 when grouped


def test_captions_come_from_the_fields(corpus_: dict[str, list[RawSample]]) -> None:
    for raw in corpus_["train"]:
        f = json.loads(raw.files["json"])
        assert f["captions"] == variants(f["name"], f["keywords"], f["style"])
        assert raw.files["txt"].decode() in f["captions"]
        assert f["captions"][0] == f["name"]


def test_pictures_are_rgb_drawings_on_white(corpus_: dict[str, list[RawSample]]) -> None:
    white = 0
    for raw in corpus_["heldout-renderings"]:
        image = Image.open(io.BytesIO(raw.files["png"]))
        assert image.mode == "RGB" and max(image.size) == 64
        assert len(set(image.convert("L").tobytes())) > 1  # something is drawn
        white += image.getpixel((0, 0)) == (255, 255, 255)
    assert white > 0.95 * len(corpus_["heldout-renderings"])  # a few drawings fill the square


def test_the_notice_attributes_every_vendor() -> None:
    text = (ROOT / "data/emoji/NOTICE").read_text()
    for vendor in emoji.VENDORS:
        assert vendor.author in text and vendor.licence in text and vendor.source in text
    assert "emojibase-data" in text and "MIT" in text


def test_variants_of_a_concept_share_a_base() -> None:
    assert base_concept("1f468-200d-1f692") == base_concept("1f469-1f3fd-200d-1f692")
    assert base_concept("1f3c4-200d-2640") == base_concept("1f3c4-1f3ff-200d-2642")
    assert base_concept("1f34b-200d-1f7e9") != base_concept("1f34b")


def test_a_shard_is_the_same_bytes_each_time(tmp_path: Path) -> None:
    samples = [{"__key__": "a", "png": b"1", "txt": b"2", "json": b"{}"}]
    for name in ("x", "y"):
        emoji.write_shard(tmp_path / name / "s.tar.gz", samples)
    assert (tmp_path / "x/s.tar.gz").read_bytes() == (tmp_path / "y/s.tar.gz").read_bytes()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("red apple", "a red apple"),
        ("orangutan", "an orangutan"),
        ("unicorn", "a unicorn"),
        ("one-piece swimsuit", "a one-piece swimsuit"),
        ("onion", "an onion"),
        ("hourglass done", "an hourglass done"),
        ("x-ray", "an x-ray"),
        ("euro banknote", "a euro banknote"),
        ("scissors", "scissors"),
        ("grapes", "grapes"),
        ("bus", "a bus"),
        ("compass", "a compass"),
        ("octopus", "an octopus"),
        ("nest with eggs", "a nest with eggs"),
        ("rice", "rice"),
        ("eight o'clock", "eight o'clock"),
        ("Statue of Liberty", "Statue of Liberty"),
        ("woman's hat", "a woman's hat"),
    ],
)
def test_articles(name: str, expected: str) -> None:
    assert with_article(name) == expected


def test_the_article_of_a_style_is_its_own() -> None:
    assert variants("owl", [], "outlined")[-1] == "an outlined drawing of an owl"
    assert article("Noto") == "a"


def test_keywords_are_left_out_where_there_are_none_but_the_name() -> None:
    assert variants("owl", ["owl"], "Noto") == [
        "owl",
        "owl, Noto style",
        "a Noto drawing of an owl",
    ]


def test_index_then_verify_then_damage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard = write_tar(tmp_path / "0.tar", [*good("a"), *good("b")])
    out = str(tmp_path / "m.json")
    assert main(["data", "index", shard, "--out", out]) == 0
    assert main(["data", "verify", out]) == 0
    write_tar(tmp_path / "0.tar", [*good("a"), *good("c")])
    assert main(["data", "verify", out]) == 1
    assert "0.tar" in capsys.readouterr().out


def test_verify_lists_a_sample_that_does_not_decode(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shard = write_tar(tmp_path / "0.tar", [*good("a"), ("b.png", b"x"), ("b.txt", b"b")])
    out = str(tmp_path / "m.json")
    assert main(["data", "index", shard, "--out", out]) == 0
    assert main(["data", "verify", out]) == 1
    assert re.search(r"undecodable image +1\n.*0\.tar:b\n", capsys.readouterr().out)


def test_the_committed_split_is_the_one_of_the_code(fields: dict[str, Any]) -> None:
    vendors = {v.prefix: v for v in emoji.VENDORS}
    drawn: dict[str, set[str]] = defaultdict(set)
    for f in itertools.chain.from_iterable(fields.values()):
        drawn[f["hexcode"]].add(f["vendor"])
    for split, members in fields.items():
        for f in members:
            who = [v for v in emoji.VENDORS if v.prefix in drawn[f["hexcode"]]]
            assert emoji._split(f["hexcode"], vendors[f["vendor"]], who) == split, f["key"]


def test_the_shares_are_the_documented_ones(fields: dict[str, Any]) -> None:
    bases = {split: {f["base"] for f in members} for split, members in fields.items()}
    concepts = set.union(*bases.values())
    assert 0.08 <= len(bases["heldout-concepts"]) / len(concepts) <= 0.12
    assert 0.26 <= len(bases["heldout-renderings"]) / len(concepts) <= 0.34


def test_captions_are_english_and_never_empty(fields: dict[str, Any]) -> None:
    captions = [c for members in fields.values() for f in members for c in f["captions"]]
    assert all(c.strip() == c and c for c in captions)
    # Spelt with a vowel and sounded without, and the reverse; all others go by the letter.
    odd = re.compile(r"(?:uni|euro|one|ewe|use|hour|herb|heir|honest|x-ray)", re.IGNORECASE)
    wrong = [
        c
        for c in captions
        for a, word in re.findall(r"drawing of (an?) (\S+)", c)
        if not odd.match(word) and (a == "an") != (word[0].lower() in "aeiou8")
    ]
    assert wrong == []


def test_verify_finds_one_damaged_byte(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (ROOT / "data/emoji").glob("heldout-concepts*"):
        shutil.copy(path, tmp_path)
    assert main(["data", "verify", str(tmp_path / "heldout-concepts.json")]) == 0
    shard = tmp_path / "heldout-concepts-00000.tar.gz"
    damaged = bytearray(shard.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    shard.write_bytes(damaged)
    assert main(["data", "verify", str(tmp_path / "heldout-concepts.json")]) == 1
    assert shard.name in capsys.readouterr().out


@pytest.mark.soak  # test_every_committed_sample_is_whole compares hashes
def test_the_corpus_is_rebuilt_from_npm_to_the_byte(
    tmp_path: Path, require_programs: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    require_programs("npm")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    try:
        drawings.fetch(drawings.NAMES, emoji.default_cache())
    except DataError as error:
        if "sha256" in str(error):
            raise
        pytest.skip(f"npm cannot reach its registry: {str(error)[:200]}")
    assert main(["data", "emoji", "--out", str(tmp_path / "emoji")]) == 0
    for split in SPLITS:
        committed = Manifest.load(str(ROOT / f"data/emoji/{split}.json"))
        assert Manifest.load(str(tmp_path / f"emoji/{split}.json")).shards == committed.shards
    assert (tmp_path / "emoji/NOTICE").read_text() == (ROOT / "data/emoji/NOTICE").read_text()
