"""The study corpus, built from small packages that the tests write: no network, no npm, no apt."""

import hashlib
import io
import itertools
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pretrain.__main__ import main
from pretrain.data import concepts, drawings, openclipart, resumable, study
from pretrain.data.concepts import Names, base_concept, spoken
from pretrain.data.drawings import NAMES, VENDORS, Package
from pretrain.data.manifest import Manifest
from pretrain.data.resumable import Made
from pretrain.data.study import Recipe
from pretrain.errors import ConfigError, DataError

ROOT = Path(__file__).resolve().parents[3]
EXPLODES = "<svg"  # no SVG
NUM_CONCEPTS = 40
# Concepts 0-39 are letters U+1F400...; some of them are held out, by the hash of their hexcode.
HEXCODES = [f"{0x1F400 + i:x}" for i in range(NUM_CONCEPTS)]


def tgz(path: Path, files: dict[str, Any]) -> None:
    """An npm archive of JSON files, and of text given as str."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            data = (content if isinstance(content, str) else json.dumps(content)).encode()
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def body(number: int, colour: str) -> str:
    return (
        f'<rect x="2" y="2" width="{3 + number % 9}" height="{5 + number // 9}" fill="{colour}"/>'
    )


def icon_set(chars: bool, colour: str) -> dict[str, Any]:
    icons = {f"thing-{i}": {"body": body(i, colour)} for i in range(NUM_CONCEPTS)}
    icons["nothing-official"] = {"body": body(0, colour)}
    named = {h.upper(): f"thing-{i}" for i, h in enumerate(HEXCODES)} if chars else {}
    return {"icons.json": {"icons": icons, "width": 16, "height": 16}, "chars.json": named}


def emojibase() -> dict[str, Any]:
    data = [
        {"label": f"thing {i}", "hexcode": h.upper(), "tags": ["toy"], "group": 3, "subgroup": 5}
        for i, h in enumerate(HEXCODES)
    ]
    data += [
        {"label": "light skin tone", "hexcode": "1F3FB", "group": 2, "subgroup": 5},
        {"label": "regional indicator A", "hexcode": "1F1E6"},
    ]
    return {
        "meta/groups.json": {
            "groups": {"2": "component", "3": "animals-nature"},
            "subgroups": {"5": "animal-bug"},
        },
        "meta/unicode-names.json": {HEXCODES[0].upper(): "ANCIENT THING"},
        "en/data.json": data,
        **{
            f"en/shortcodes/{b}.json": {HEXCODES[1].upper(): ["gizmo", "widget"]}
            for b in ("cldr", "joypixels", "emojibase", "iamcal")
        },
        "LICENSE": "MIT License, of the names",
    }


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of small packages under the names of the real ones, with their hashes pinned."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    cache = drawings.cache_folder("npm")

    def pin(package: Package, files: dict[str, Any]) -> Package:
        tgz(cache / package.filename, files)
        digest = hashlib.sha256((cache / package.filename).read_bytes()).hexdigest()
        return replace(package, sha256=digest)

    names = pin(NAMES, emojibase())
    for module in (drawings, study):
        monkeypatch.setattr(module, "NAMES", names)
    for prefix, colour in (("noto", "red"), ("openmoji", "blue"), ("streamline-emojis", "green")):
        package = pin(VENDORS[prefix].package, icon_set(prefix == "noto", colour))
        monkeypatch.setitem(VENDORS, prefix, replace(VENDORS[prefix], package=package))
    return cache


SMALL = Recipe(("noto", "openmoji", "streamline-emojis"), False, (16, 16), "png", 1)


def samples(out: Path, split: str) -> dict[str, dict[str, bytes]]:
    """Files of every sample of a split, by key and extension, in order."""
    found: dict[str, dict[str, bytes]] = {}
    for path in sorted(out.glob(f"{split}-*.tar")):
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                stream = tar.extractfile(member)
                assert stream is not None
                assert extension not in found.setdefault(key, {})
                found[key][extension] = stream.read()
    return found


def fields(out: Path, split: str) -> list[dict[str, Any]]:
    return [json.loads(files["json"]) for files in samples(out, split).values()]


def digests(out: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(out.glob("*.tar"))}


def test_splits_hold_out_a_vendor_and_a_tenth_of_the_concepts(
    packages: Path, tmp_path: Path
) -> None:
    study.build(tmp_path / "out", SMALL)
    train, vendor, unseen = (fields(tmp_path / "out", s) for s in study.SPLITS)
    held = {h for h in HEXCODES if drawings.held_out(h)}
    assert 1 <= len(held) <= 10
    assert {f["hexcode"] for f in unseen} == held == {f["base"] for f in unseen}
    assert {f["vendor"] for f in unseen} == {"noto", "openmoji", "streamline-emojis"}
    assert {f["vendor"] for f in vendor} == {"streamline-emojis"}
    assert {f["vendor"] for f in train} == {"noto", "openmoji"}
    assert {f["hexcode"] for f in train} == {f["hexcode"] for f in vendor} == set(HEXCODES) - held
    assert len(train) + len(vendor) + len(unseen) == 3 * NUM_CONCEPTS


def test_samples_have_the_fields_of_the_embedded_corpus(packages: Path, tmp_path: Path) -> None:
    study.build(tmp_path / "out", SMALL)
    with tarfile.open(ROOT / "data/emoji/heldout-concepts-00000.tar.gz") as tar:
        member = next(m for m in tar if m.name.endswith(".json"))
        stream = tar.extractfile(member)
        assert stream is not None
        embedded = json.load(stream)
    for key, files in samples(tmp_path / "out", "train").items():
        one = json.loads(files["json"])
        assert list(one) == list(embedded)
        assert key == f"{one['vendor']}-{one['hexcode']}" and "." not in key
        assert files["txt"].decode() in one["captions"] and one["captions"][0] == one["name"]
        assert one["licence"] == VENDORS[one["vendor"]].licence
        image = Image.open(io.BytesIO(files["png"]))
        assert image.size == (16, 16) and image.mode == "RGB"
        assert image.getpixel((0, 0)) == (255, 255, 255)


def test_vendors_are_mixed_in_a_shard(packages: Path, tmp_path: Path) -> None:
    study.build(tmp_path / "out", SMALL)
    vendors = [f["vendor"] for f in fields(tmp_path / "out", "train")]
    assert sum(a != b for a, b in itertools.pairwise(vendors)) > len(vendors) // 4  # half expected


def test_the_manifest_lists_what_the_report_counts(packages: Path, tmp_path: Path) -> None:
    report = study.build(tmp_path / "out", SMALL)
    for split in study.SPLITS:
        manifest = Manifest.load(str(tmp_path / "out" / f"{split}.json"))
        counted = sum(report["splits"][split]["samples"].values())
        assert manifest.num_samples == counted == len(samples(tmp_path / "out", split)) > 0


def test_any_number_of_processes_writes_the_same_bytes(
    packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study.build(tmp_path / "one", SMALL)
    monkeypatch.setattr(resumable, "BATCH", 4)  # more batches than are made ahead
    study.build(tmp_path / "two", SMALL, parallel=2)
    assert digests(tmp_path / "one") == digests(tmp_path / "two") != {}
    one, two = ((tmp_path / n / "train.json").read_bytes() for n in ("one", "two"))
    assert one == two


def test_a_finished_corpus_is_left_alone(
    packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = study.build(tmp_path / "out", SMALL)
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*") if p.name != ".lock"}
    monkeypatch.setattr(study, "plan", lambda recipe: pytest.fail("planned again"))
    assert study.build(tmp_path / "out", SMALL) == first
    after = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*") if p.name != ".lock"}
    assert after == times


def test_a_shard_that_was_lost_is_made_again(packages: Path, tmp_path: Path) -> None:
    study.build(tmp_path / "out", SMALL)
    before = digests(tmp_path / "out")
    (tmp_path / "out/heldout-vendor-00000.tar").unlink()
    with (tmp_path / "out/heldout-concepts-00000.tar").open("ab") as stream:
        stream.write(b"more")
    study.build(tmp_path / "out", SMALL)
    assert digests(tmp_path / "out") == before


def test_another_recipe_does_not_mix_with_a_corpus(packages: Path, tmp_path: Path) -> None:
    study.build(tmp_path / "out", SMALL)
    with pytest.raises(DataError, match=r"another recipe \(format: 'png', now 'jpg'\).*--out"):
        study.build(tmp_path / "out", replace(SMALL, format="jpg"))


def test_two_builds_of_one_folder_do_not_meet(packages: Path, tmp_path: Path) -> None:
    def second(done: int, total: int, split: str) -> None:
        with pytest.raises(DataError, match="another build is at work"):
            study.build(tmp_path / "out", SMALL)

    study.build(tmp_path / "out", SMALL, report=second)


def test_sizes_vary_by_hash_and_jpegs_are_jpegs(packages: Path, tmp_path: Path) -> None:
    study.build(tmp_path / "out", replace(SMALL, sizes=(16, 48), format="jpg"))
    seen = set()
    for files in samples(tmp_path / "out", "train").values():
        image = Image.open(io.BytesIO(files["jpg"]))
        assert image.format == "JPEG" and image.width == image.height
        seen.add(image.width)
    assert min(seen) >= 16 and max(seen) <= 48 and len(seen) > 10


def test_two_names_of_one_held_out_drawing(packages: Path, tmp_path: Path) -> None:
    held = next(i for i, h in enumerate(HEXCODES) if drawings.held_out(h))
    seen = next(i for i, h in enumerate(HEXCODES) if not drawings.held_out(h))
    files = icon_set(True, "red")
    icons = files["icons.json"]["icons"]
    icons[f"thing-{seen}"] = icons[f"thing-{held}"]
    path = packages / VENDORS["noto"].package.filename
    tgz(path, files)
    package = replace(VENDORS["noto"].package, sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    VENDORS["noto"] = replace(VENDORS["noto"], package=package)  # the fixture puts it back
    report = study.build(tmp_path / "out", SMALL)
    assert report["skipped"] == {"the drawing of a held-out concept": 1}
    keys = samples(tmp_path / "out", "train")
    assert f"noto-{HEXCODES[seen]}" not in keys and f"openmoji-{HEXCODES[seen]}" in keys


def test_what_cannot_be_drawn_is_counted_with_its_key(
    packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = [i for i, h in enumerate(HEXCODES) if not drawings.held_out(h)]
    files = icon_set(True, "red")
    icons = files["icons.json"]["icons"]
    icons[f"thing-{seen[0]}"] = {"body": "</svg><svg>"}
    icons[f"thing-{seen[1]}"] = {"body": ""}
    path = packages / VENDORS["noto"].package.filename
    tgz(path, files)
    package = replace(VENDORS["noto"].package, sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    monkeypatch.setitem(VENDORS, "noto", replace(VENDORS["noto"], package=package))
    report = study.build(tmp_path / "out", SMALL)
    assert report["skipped_keys"] == {
        "unreadable picture": [f"noto-{HEXCODES[seen[0]]}"],
        "blank picture": [f"noto-{HEXCODES[seen[1]]}"],
    }
    assert report["skipped"] == {"unreadable picture": 1, "blank picture": 1}


def test_the_notice_attributes_who_is_there_and_no_other(packages: Path, tmp_path: Path) -> None:
    study.build(tmp_path / "out", replace(SMALL, vendors=("noto", "openmoji")))
    text = (tmp_path / "out/NOTICE").read_text()
    for prefix in ("noto", "openmoji"):
        vendor = VENDORS[prefix]
        needed = (vendor.author, vendor.source, vendor.licence, vendor.package.version)
        assert all(part in text for part in needed)
    assert "Share-alike: openmoji." in text and "16 x 16" in text
    assert "MIT License, of the names" in text
    assert "streamline" not in text and "openclipart" not in text


def test_no_apple_or_facebook_and_all_share_alike_sets_say_so() -> None:
    assert not [v for v in VENDORS if "apple" in v or "facebook" in v]
    assert {p for p, v in VENDORS.items() if "-SA-" in v.licence} == {"openmoji", "emojione-v1"}
    pinned = [v.package for v in VENDORS.values()]
    assert len({p.sha256 for p in pinned}) == len(VENDORS) == 10
    assert all(len(p.sha256) == 64 and p.version for p in pinned)


def test_a_changed_package_is_refused(packages: Path, tmp_path: Path) -> None:
    with (packages / VENDORS["noto"].package.filename).open("ab") as stream:
        stream.write(b"!")
    with pytest.raises(DataError, match="is pinned; delete it"):
        study.build(tmp_path / "out", SMALL)


def test_a_missing_program_names_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "no-programs"))
    with pytest.raises(DataError, match=r"apt-get is not installed.*--no-openclipart"):
        openclipart.fetch(tmp_path / "debian")
    with pytest.raises(DataError, match=r"npm is not installed.*Node\.js"):
        drawings.fetch(NAMES, tmp_path / "npm")
    assert not list((tmp_path / "debian").glob(".unpack*"))  # nothing half done stays


def test_a_failing_download_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "cache/package.tgz"
    command = ["sh", "-c", "echo half > package.tgz; echo no route >&2; exit 3"]
    with pytest.raises(DataError, match=r"no route; try later"):
        drawings.download(command, path, "0" * 64, "try later")
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vendors": ("apple",)}, r"vendors='apple' is unknown \(there are: noto"),
        ({"vendors": (), "openclipart": False}, "name one vendor"),
        ({"sizes": (512, 256)}, "LOW <= HIGH"),
        ({"sizes": (4, 4)}, "8 <= LOW"),
        ({"format": "gif"}, "format='gif' must be one of png"),
        ({"shard_mib": 0}, "shard_mib=0"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(SMALL, **change)


# Names


def test_icons_are_known_by_new_old_and_short_names(packages: Path) -> None:
    names = Names(drawings.fetch(drawings.NAMES, packages))
    assert set(names.concepts) == set(HEXCODES)  # neither skin tones nor regional indicators
    assert names.resolve("thing-7") == HEXCODES[7]
    assert names.resolve("Thing7") == HEXCODES[7]
    assert names.resolve("ancient-thing") == HEXCODES[0]
    assert names.resolve("gizmo-2") == HEXCODES[1]  # a second drawing of it
    assert names.resolve("no-such-thing") is None


def test_a_name_of_two_concepts_is_of_none() -> None:
    assert concepts._unambiguous([("a b", "1"), ("AB", "2"), ("c", "3")]) == {"c": "3"}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("1f3c3-200d-2640-200d-27a1", "1f3c3-200d-2642"),  # woman running right, man running
        ("1f468-200d-1f9b0", "1f9d1-1f3fd-200d-1f9b0"),  # red hair
        ("1f478", "1f934"),  # princess, prince
        ("1f467", "1f466"),  # girl, boy
        ("1f46d", "1f46b"),  # holding hands
        ("1f48f", "1f469-200d-2764-200d-1f48b-200d-1f468"),  # kiss
        ("1f468-200d-1f469-200d-1f466", "1f46a"),  # families
        ("1f1fa-1f1f2", "1f1fa-1f1f8"),  # one flag
    ],
)
def test_variants_of_a_concept_have_one_base(one: str, other: str) -> None:
    assert base_concept(one) == base_concept(other)


def test_other_concepts_have_bases_of_their_own() -> None:
    others = ("1f1eb-1f1f7", "1f1fa-1f1f8", "1f9d1", "1f9d1-200d-1f692", "1f43b-200d-2744", "1f43b")
    assert len({base_concept(h) for h in others}) == len(others)


def test_official_names_become_words() -> None:
    assert spoken("flag: Japan") == "flag of Japan"
    assert spoken("man: beard") == "man with a beard"
    assert spoken("keycap: 3") == "keycap 3"
    assert spoken("red apple") == "red apple"


# Clip art


def clip_svg(title: str, subject: str, licence: str, drawing: str) -> str:
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" width="100mm" height="100mm" viewBox="0 0 90 90">'
        '<metadata><rdf:RDF xmlns:rdf="r" xmlns:cc="c" xmlns:dc="d"><cc:Work>'
        f"<dc:title>{title}</dc:title><dc:subject><rdf:Bag><rdf:li>{subject}</rdf:li>"
        "<rdf:li>HASH(0x89f892c)</rdf:li><rdf:li>hash</rdf:li></rdf:Bag></dc:subject><dc:creator><cc:Agent><dc:title>Ann"
        f'</dc:title></cc:Agent></dc:creator><cc:license rdf:resource="{licence}"/>'
        f"</cc:Work></rdf:RDF></metadata>{drawing}</svg>"
    )


@pytest.fixture
def clip_folder(tmp_path: Path) -> Callable[..., Path]:
    """``clip_folder({"a/b": svg}, {"a/b": png bytes})``: unpacked packages of these files."""

    def make(svgs: dict[str, str], pngs: dict[str, bytes] | None = None) -> Path:
        for kind, files in (("svg", svgs), ("png", pngs or {})):
            for name, content in files.items():
                path = tmp_path / "clips/usr/share/openclipart" / kind / f"{name}.{kind}"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content.encode() if isinstance(content, str) else content)
        return tmp_path / "clips"

    return make


def square(number: int) -> str:
    return f'<rect x="40" y="40" width="{9 + number}" height="{9 + number}" fill="red"/>'


def test_clips_are_taken_by_title_and_licence(clip_folder: Callable[..., Path]) -> None:
    pd = openclipart.PUBLIC_DOMAIN[0]
    svgs = {
        "food/pear_01": clip_svg("Big  pear", "some_fruit", pd, square(0)),
        "food/again": clip_svg("Another title", "x", pd, square(0)),
        "food/closed": clip_svg("Closed", "x", "http://creativecommons.org/licenses/GPL/2.0/", ""),
        "food/whale": clip_svg("Whale", "x", pd, square(1)),
        "food/linked": clip_svg("Linked", "x", pd, '<image xlink:href="a.png"/>'),
        "people/queen_02": clip_svg("ann", "Ann", pd, square(2)),
        **{f"sets/green-{w}": clip_svg("The set", "x", pd, square(i)) for i, w in
           enumerate(("car", "bus", "van", "cab"), 10)},
        **{f"shapes/stars/{w}": clip_svg("Stars", "x", pd, square(i)) for i, w in
           enumerate(("sun", "nova", "dwarf", "giant"), 20)},
    }  # fmt: skip
    folder = clip_folder(svgs)
    os.symlink("pear_01.svg", folder / "usr/share/openclipart/svg/food/link.svg")
    clips, skipped = openclipart.clips(folder, {"whale"})
    titles = {c.title for c in clips}
    # Of two equal drawings the first by path is kept; a title of four names their set.
    assert titles == {"Another title", "queen", "green car", "green bus", "green van", "green cab"}
    assert skipped == {
        "the same drawing again": 1,
        "not marked as public domain": 1,
        "named as a held-out concept": 1,
        "made of other files": 1,
        "a link to another": 1,
        "no title of its own": 4,
    }
    assert [c.keywords for c in clips if c.title == "queen"] == [()]  # its author's name is none
    keys = [c.key for c in clips]
    assert len(set(keys)) == len(keys) and not [k for k in keys if "." in k or "/" in k]


def test_a_clips_fields_are_its_authors(clip_folder: Callable[..., Path]) -> None:
    svg = clip_svg("Big  pear", "some_fruit", openclipart.PUBLIC_DOMAIN[0], square(0))
    (clip,), _ = openclipart.clips(clip_folder({"food/pear": svg}), ())
    found = clip.fields()
    assert (found["name"], found["author"], found["keywords"]) == (
        "Big pear",
        "Ann",
        ("some fruit",),
    )
    assert found["captions"] == [
        "Big pear",
        "Big pear, clip art style",
        "Big pear: some fruit",
        "clip art of Big pear",
    ]
    assert found["licence"] == "CC-PDDC" and found["vendor"] == "openclipart"


def png_bytes(size: tuple[int, int], colour: tuple[int, int, int, int]) -> bytes:
    stream = io.BytesIO()
    Image.new("RGBA", size, colour).save(stream, "PNG")
    return stream.getvalue()


def clip_of(folder: Path, name: str) -> openclipart.Clip:
    base = folder / "usr/share/openclipart"
    return openclipart.Clip(
        "k", base / f"svg/{name}.svg", base / f"png/{name}.png", "t", (), "", ""
    )


def test_a_clip_fills_its_picture(clip_folder: Callable[..., Path]) -> None:
    folder = clip_folder({"a": clip_svg("", "", "", square(0))})
    image = clip_of(folder, "a").picture(32)
    assert image.size == (32, 32) and image.mode == "RGB"
    assert image.getpixel((16, 16)) == image.getpixel((2, 2)) == (255, 0, 0)


def test_a_png_serves_where_the_svg_does_not(clip_folder: Callable[..., Path]) -> None:
    blue = png_bytes((40, 20), (0, 0, 255, 255))
    text = clip_svg("", "", "", square(0) + "<text>font</text>")
    folder = clip_folder({"a": EXPLODES, "b": text, "c": clip_svg("", "", "", "")}, {"a": blue, "b": blue, "c": blue})  # fmt: skip  # noqa: E501
    for name in ("a", "b", "c"):
        image = clip_of(folder, name).picture(32)
        assert image.getpixel((16, 16)) == (0, 0, 255), name
        assert image.getpixel((16, 2)) == (255, 255, 255), name  # twice as wide as high


def test_a_svg_without_its_namespace_is_drawn(clip_folder: Callable[..., Path]) -> None:
    bare = f'<svg width="90" height="90">{square(0)}</svg>'
    image = clip_of(clip_folder({"a": bare}), "a").picture(16)
    assert image.getpixel((8, 8)) == (255, 0, 0)


@pytest.mark.parametrize(
    ("png", "reason"),
    [
        (b"", "unreadable picture"),
        (png_bytes((500, 500), (0, 0, 255, 255))[:200], "unreadable picture"),
        (png_bytes((8, 8), (0, 0, 255, 0)), "blank picture"),
        (png_bytes((5000, 5000), (0, 0, 255, 255)), "picture too large"),
    ],
    ids=["empty", "cut short", "transparent", "25 megapixels"],
)
def test_a_picture_that_cannot_be_used_says_why(
    clip_folder: Callable[..., Path], png: bytes, reason: str
) -> None:
    folder = clip_folder({"a": EXPLODES}, {"a": png})
    with pytest.raises(openclipart.Unusable, match=reason):
        clip_of(folder, "a").picture(16)


# Shards that can be gone on with


def make(sources: Sequence[int]) -> list[Made]:
    """A sample of 1.5 KiB for each number; none for those that end in 7."""
    return [
        Made(f"k{n}", "even" if n % 2 == 0 else "odd", reason="seven")
        if n % 10 == 7
        else Made(f"k{n}", "even" if n % 2 == 0 else "odd", {"png": bytes([n % 256]) * 500})
        for n in sources
    ]


def test_shards_are_bounded_and_hold_every_sample_once(tmp_path: Path) -> None:
    shards = resumable.write(tmp_path, "s", range(200), make, 40 << 10)
    sizes = [p.stat().st_size for p in sorted(tmp_path.glob("s-*.tar"))]
    assert len(sizes) == len(shards) > 3 and max(sizes) <= 40 << 10
    assert sizes == [s.bytes for s in shards]
    assert list(samples(tmp_path, "s")) == [f"k{n}" for n in range(200) if n % 10 != 7]
    assert shards[-1].end == 200 and sum((s.samples for s in shards), start=type(
        shards[0].samples)()) == {"even": 100, "odd": 80}  # fmt: skip
    skipped = [k for s in shards for k in s.skipped.get("seven", ())]
    assert skipped == [f"k{n}" for n in range(200) if n % 10 == 7]


def test_a_build_goes_on_behind_the_last_whole_shard(tmp_path: Path) -> None:
    resumable.write(tmp_path / "a", "s", range(200), make, 40 << 10)

    def dies(sources: Sequence[int]) -> list[Made]:
        if sources[-1] > 120:
            raise KeyboardInterrupt
        return make(sources)

    with pytest.raises(KeyboardInterrupt):
        resumable.write(tmp_path / "b", "s", range(200), dies, 40 << 10)
    kept = len(list((tmp_path / "b").glob("s-*.tar")))
    assert kept >= 2
    asked: list[int] = []

    def counts(sources: Sequence[int]) -> list[Made]:
        asked.extend(sources)
        return make(sources)

    ticks: list[int] = []
    resumable.write(tmp_path / "b", "s", range(200), counts, 40 << 10, tick=ticks.append)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    assert asked[0] == ticks[0] > 40 and ticks[-1] == 200  # not from the start
    assert not list((tmp_path / "b").glob("*.part"))


SLOW_BUILD = """
import time
from pathlib import Path
from pretrain.data import resumable

def make(sources):
    if sources[-1] >= 120:
        print("waiting", flush=True)
        time.sleep(60)
    return [resumable.Made(f"k{n}", "any", {"png": bytes([n]) * 500}) for n in sources]

if __name__ == "__main__":
    resumable.write(Path("b"), "s", range(200), make, 40 << 10, parallel=2)
"""


def test_a_killed_build_ends_its_processes_and_can_go_on(tmp_path: Path) -> None:
    script = tmp_path / "build.py"
    script.write_text(SLOW_BUILD)
    process = subprocess.Popen(
        [sys.executable, str(script)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline().startswith("waiting")  # a worker's line
    began = time.monotonic()
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.read()  # ends when the last worker has: they hold the pipe
    assert time.monotonic() - began < 30

    def quick(sources: Sequence[int]) -> list[Made]:
        return [Made(f"k{n}", "any", {"png": bytes([n]) * 500}) for n in sources]

    for name in ("a", "b"):
        resumable.write(tmp_path / name, "s", range(200), quick, 40 << 10)
    assert digests(tmp_path / "a") == digests(tmp_path / "b") != {}


# The command


def test_the_command_builds_and_says_what_there_is(
    packages: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--vendors", "noto", "streamline-emojis", "--no-openclipart", "--size", "16"]
    assert main(["data", "study", *arguments]) == 0
    shown = capsys.readouterr()
    out = tmp_path / "cache/diffdis-pretrain/study"  # the default, below XDG_CACHE_HOME
    assert f"{out}/train.json" in shown.out
    counts = {s: len(samples(out, s)) for s in study.SPLITS}
    for split, count in counts.items():
        assert f"{split}: {count} samples in 1 shards" in shown.out
    assert f"noto {counts['train']}" in shown.out
    assert "80/80 drawings" in shown.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sizes", "256"], "--sizes=256 must be LOW:HIGH"),
        (["--vendors", "facebook"], "'facebook' is unknown"),
        (["--parallel", "0"], "--parallel=0"),
    ],
)
def test_the_command_refuses_nonsense(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "study", *arguments]) == 2
    assert message in capsys.readouterr().err
