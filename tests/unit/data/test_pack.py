"""Packing: the same source gives the same bytes, a killed run goes on, what is left out is told."""

import csv
import io
import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from pretrain import storage
from pretrain.data import pack as packer
from pretrain.data import rows
from pretrain.data.manifest import Manifest
from pretrain.data.pack import State, pack
from pretrain.data.prepare import PackOptions, Prepared, prepare
from pretrain.data.reader import ReadConfig, ShardReader
from pretrain.data.rows import Columns, Row, open_source
from pretrain.data.samples import Bounds, decode
from pretrain.errors import DataError
from tests.support.web import WebServer
from tests.unit.data.conftest import png


def photo(size: tuple[int, int] = (40, 30), format: str = "JPEG", **more: object) -> bytes:
    """A gradient, so that scaling and encoding show."""
    image = Image.linear_gradient("L").resize(size).convert("RGB")
    stream = io.BytesIO()
    image.save(stream, format, **more)
    return stream.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve pictures in two folders, four of which cannot be used."""
    root = tmp_path / "source"
    for place in ("a", "b"):
        (root / place).mkdir(parents=True)
        for i in range(4):
            (root / place / f"{i}.jpg").write_bytes(photo((40 + i, 30)))
            (root / place / f"{i}.txt").write_text(f"picture {i} of {place}\n")
    (root / "a" / "none.png").write_bytes(png())
    (root / "a" / "half.jpg").write_bytes(photo()[:300])
    (root / "a" / "half.txt").write_text("half")
    (root / "b" / "old.gif").write_bytes(photo(format="GIF"))
    (root / "b" / "old.txt").write_text("gif")
    (root / "b" / "blank.png").write_bytes(png())
    (root / "b" / "blank.txt").write_text("  \n")
    (root / "b" / ".hidden.png").write_bytes(png())
    (root / "b" / "notes.md").write_text("no picture")
    return root


def samples(out: str) -> list[tuple[str, dict[str, bytes]]]:
    """What a trainer reads back, in order; every sample must decode."""
    manifest = Manifest.load(f"{out}/manifest.json")
    reader = ShardReader([manifest], ReadConfig(access="ranged"))
    found = []
    for shard, size in enumerate(manifest.sizes.tolist()):
        for index in range(size):
            raw, rejects = reader.read(0, shard, index)
            assert raw is not None and not rejects
            decode(raw, Bounds(1 << 20, 1 << 20))
            found.append((raw.key, raw.files))
    reader.close()
    return found


def tars(out: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(out.iterdir()) if p.suffix == ".tar"}


def test_a_folder_becomes_samples_and_what_is_left_out_is_told(
    folder: Path, tmp_path: Path
) -> None:
    out = str(tmp_path / "out")
    state = pack(open_source(str(folder)), out, PackOptions(shard_samples=3))
    found = samples(out)
    assert [key for key, _ in found] == [f"{place}/{i}" for place in "ab" for i in range(4)]
    assert found[5][1] == {
        "jpg": (folder / "b" / "1.jpg").read_bytes(),  # untouched
        "txt": b"picture 1 of b",
    }
    assert state.rejects == {
        "no caption": 2,
        "undecodable image": 1,
        "unsupported format": 1,
    }
    assert state.examples["no caption"] == ["a/none.png", "b/blank.png"]
    assert Manifest.load(f"{out}/manifest.json").sizes.tolist() == [3, 3, 2]
    assert state.finished and state.samples == 8 and state.next_row == 12


def test_bytes_depend_on_nothing_but_the_source(folder: Path, tmp_path: Path) -> None:
    options = PackOptions(shard_samples=3, max_side=16, format="webp")
    for name, parallel in (("one", 1), ("two", 1), ("parallel", 2)):
        pack(open_source(str(folder)), str(tmp_path / name), options, parallel=parallel)
    assert tars(tmp_path / "one") == tars(tmp_path / "two") == tars(tmp_path / "parallel")
    manifests = {(tmp_path / n / "manifest.json").read_bytes() for n in ("one", "two", "parallel")}
    assert len(manifests) == 1
    with tarfile.open(tmp_path / "one" / "00000.tar") as tar:
        for member in tar:
            assert (member.mtime, member.uid, member.gid, member.uname) == (0, 0, 0, "")


def test_a_shard_never_exceeds_its_bytes(folder: Path, tmp_path: Path) -> None:
    small = 8 << 10
    pack(open_source(str(folder)), str(tmp_path / "out"), PackOptions(shard_bytes=small))
    sizes = [len(data) for data in tars(tmp_path / "out").values()]
    assert len(sizes) > 1
    # What a tar pads its end to is no sample's.
    assert all(size <= small + 10240 for size in sizes)
    with tarfile.open(tmp_path / "out" / "00000.tar") as tar:
        assert sum(512 + -(-m.size // 512) * 512 for m in tar) <= small


class Killed(BaseException):
    pass


@pytest.mark.parametrize("rows_before", [1, 5, 9])
@pytest.mark.parametrize("remote", [False, True])
def test_a_killed_packing_goes_on_at_the_first_unfinished_shard(
    folder: Path, tmp_path: Path, rows_before: int, remote: bool
) -> None:
    out = f"memory://packed-{rows_before}" if remote else str(tmp_path / "out")
    options = PackOptions(shard_samples=2)
    whole = pack(open_source(str(folder)), str(tmp_path / "whole"), options)

    def kill(read: int, samples: int, shards: int) -> None:
        if read > rows_before:
            raise Killed

    with pytest.raises(Killed):
        pack(open_source(str(folder)), out, options, report=kill)
    before = storage.exists(f"{out}/00000.tar")
    done = []
    source = open_source(str(folder))
    again = pack(source, out, options, report=lambda *at: done.append(at[0]))
    assert again == whole  # refusals are counted once, too
    assert before == (rows_before >= 3)
    assert min(done) > (rows_before - 3)  # finished shards were not done again
    for name, data in tars(tmp_path / "whole").items():
        assert storage.read_bytes(f"{out}/{name}") == data
    if not remote:
        assert not [p for p in Path(out).iterdir() if p.name.endswith(".part")]


def test_a_finished_packing_does_no_work_again(folder: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    first = pack(open_source(str(folder)), out, PackOptions())
    calls: list[int] = []
    second = pack(open_source(str(folder)), out, PackOptions(), report=lambda *a: calls.append(1))
    assert first == second and not calls


def test_another_packing_in_the_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    pack(open_source(str(folder)), out, PackOptions(shard_samples=3))
    with pytest.raises(DataError, match=r"quality=92, now it is 50.*another --out"):
        pack(open_source(str(folder)), out, PackOptions(shard_samples=3, quality=50))
    with pytest.raises(DataError, match="another source"):
        pack(open_source(str(folder / "a")), out, PackOptions(shard_samples=3))
    (tmp_path / "out" / "00001.tar").unlink()
    with pytest.raises(DataError, match=r"00001\.tar was written and is gone"):
        pack(open_source(str(folder)), out, PackOptions(shard_samples=3))


def test_nothing_usable_is_an_error_with_the_reasons(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "x.png").write_bytes(png())
    with pytest.raises(DataError, match=r"no usable sample \(1 × no caption\)"):
        pack(open_source(str(tmp_path / "s")), str(tmp_path / "o"), PackOptions())


def write_csv(path: Path, header: list[str], lines: list[list[str]], delimiter: str = ",") -> str:
    with path.open("w", newline="", encoding="utf-8-sig") as stream:  # as spreadsheets save it
        csv.writer(stream, delimiter=delimiter).writerows([header, *lines])
    return str(path)


@pytest.mark.parametrize("name", ["t.csv", "t.tsv"])
def test_a_table_of_paths_with_several_captions(tmp_path: Path, name: str) -> None:
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(png((i, 0, 0)))
    table = write_csv(
        tmp_path / name,
        ["ID", "File_Name", "caption", "licence"],
        [
            ["x", "0.png", "first,\nwith a line break", "CC0"],
            ["y", "1.png", '["one", "two"]', "CC0"],
            ["z", "missing.png", "gone", "CC0"],
            ["w", "", "nothing", "CC0"],
            ["x", "2.png", "the key again", "CC0"],
        ],
        "\t" if name.endswith("tsv") else ",",
    )
    columns = Columns(key="ID", fields=("licence",))
    state = pack(open_source(table, columns), str(tmp_path / "out"), PackOptions())
    found = samples(str(tmp_path / "out"))
    assert [key for key, _ in found] == ["x", "y"]
    assert json.loads(found[1][1]["json"]) == {"captions": ["one", "two"], "licence": "CC0"}
    assert found[0][1]["txt"] == b"first,\nwith a line break"
    assert state.rejects == {"missing image file": 1, "no image": 1, "duplicate key": 1}


def test_columns_are_guessed_or_asked_for_by_name(tmp_path: Path) -> None:
    table = write_csv(tmp_path / "t.csv", ["foo", "bar"], [["1", "2"]])
    with pytest.raises(DataError, match=r"--image-column, one of foo, bar"):
        open_source(table)
    with pytest.raises(DataError, match=r"no column 'baz'; it has foo, bar"):
        open_source(table, Columns(image="baz"))
    with pytest.raises(DataError, match=r"--caption-column"):
        open_source(table, Columns(image="foo"))
    assert open_source(table, Columns(image="foo", captions=("bar",)))
    with pytest.raises(DataError, match="neither a folder nor a table"):
        open_source(str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="has no columns"):
        open_source(str(tmp_path), Columns(image="foo"))


def test_a_table_that_is_not_text_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(b"path,caption\n0.png,caf\xe9\n")
    with pytest.raises(DataError, match=r"t\.csv.*must be UTF-8"):
        list(open_source(str(tmp_path / "t.csv")).rows(0))


def parquet(path: Path, **columns: list[object]) -> str:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=3)
    return str(path)


def test_parquet_of_bytes_and_lists_is_read_in_batches_and_from_any_row(tmp_path: Path) -> None:
    pictures = [{"bytes": png((i, 0, 0)), "path": None} for i in range(8)]
    captions = [[f"caption {i}", f"again {i}"] for i in range(8)]
    parquet(tmp_path / "0.parquet", image=pictures, text=captions)
    parquet(tmp_path / "1.parquet", image=pictures[:2], text=captions[:2])
    source = open_source(str(tmp_path / "*.parquet"))
    whole = list(source.rows(0))
    assert [row.number for row in whole] == list(range(10))
    assert whole[9].image == png((1, 0, 0)) and whole[9].captions == ("caption 1", "again 1")
    for start in (1, 3, 7, 8, 9, 10):
        assert list(source.rows(start)) == whole[start:]
    state = pack(source, str(tmp_path / "out"), PackOptions(shard_samples=4))
    assert state.samples == 10 and state.shards == 3
    assert json.loads(samples(str(tmp_path / "out"))[3][1]["json"]) == {"captions": captions[3]}


def test_csv_rows_from_any_row(tmp_path: Path) -> None:
    lines = [[f"{i}.png", f"caption {i}"] for i in range(7)]
    source = open_source(write_csv(tmp_path / "t.csv", ["path", "caption"], lines))
    whole = list(source.rows(0))
    assert len(whole) == 7
    for start in (1, 6, 7):
        assert list(source.rows(start)) == whole[start:]


def test_pictures_by_url_are_fetched_and_dead_ones_counted(tmp_path: Path) -> None:
    retry = storage.Retry(deadline_seconds=0.3, attempt_seconds=0.2, first_wait_seconds=0.05)
    with WebServer({"0.png": png(), "1.png": png((1, 2, 3))}) as web:
        base = web.url
        table = write_csv(
            tmp_path / "t.csv",
            ["url", "caption"],
            [
                [f"{base}/0.png", "zero"],
                [f"{base}/gone.png", "gone"],
                [f"{base}/1.png", "one"],
                ["http://127.0.0.1:1/x.png", "no server"],
            ],
        )
        state = pack(open_source(table), str(tmp_path / "out"), PackOptions(), retry=retry)
    assert [files["txt"] for _, files in samples(str(tmp_path / "out"))] == [b"zero", b"one"]
    assert state.rejects == {"missing image file": 1, "unreadable image file": 1}


def prepared(image: bytes, **options: object) -> Prepared:
    return prepare(Row(0, "k", "row", image, ("a caption",)), PackOptions(**options))  # type: ignore[arg-type]


def test_pictures_are_scaled_and_encoded_only_where_asked() -> None:
    image = photo((40, 30))
    assert prepared(image, max_side=40).files["jpg"] == image
    small = Image.open(io.BytesIO(prepared(image, max_side=20).files["jpg"]))
    assert small.size == (20, 15) and small.format == "JPEG"
    as_png = Image.open(io.BytesIO(prepared(image, format="png").files["png"]))
    assert as_png.size == (40, 30)
    low, high = (len(prepared(image, max_side=39, quality=q).files["jpg"]) for q in (10, 95))
    assert low < high
    assert prepared(image, min_side=31).refused == "too small"


def test_a_turned_picture_stays_upright_when_it_loses_its_exif() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = photo((40, 30), exif=exif)
    assert Image.open(io.BytesIO(prepared(turned, format="png").files["png"])).size == (30, 40)


def test_the_extension_is_that_of_the_bytes(tmp_path: Path) -> None:
    assert set(prepared(png()).files) == {"png", "txt"}
    assert set(prepared(photo()).files) == {"jpg", "txt"}
    assert set(prepared(photo(format="WEBP")).files) == {"webp", "txt"}


@pytest.mark.parametrize(
    ("image", "options", "reason"),
    [
        (b"", {}, "undecodable image"),
        (b"no picture at all", {}, "undecodable image"),
        (photo((300, 200)), {"max_pixels": 50_000}, "too many pixels"),
        (photo((300, 200)), {"max_bytes": 500}, "too many bytes"),
        (photo(format="GIF"), {}, "undecodable image"),
    ],
)
def test_what_the_trainer_would_refuse_is_refused(
    image: bytes, options: dict[str, int], reason: str
) -> None:
    assert prepared(image, **options).refused == reason


def test_captions_beside_a_picture(tmp_path: Path) -> None:
    cases: dict[str, tuple[object, str | None]] = {
        "list": ({"captions": [" one ", "two", ""], "author": "me"}, None),
        "one": ({"caption": "one"}, "two"),
        "fields": ({"author": "me"}, "from the text"),
        "broken": ("{", None),
        "half": ({"caption": "\ud800"}, None),
    }
    for name, (tree, text) in cases.items():
        (tmp_path / f"{name}.png").write_bytes(png())
        written = tree if isinstance(tree, str) else json.dumps(tree)
        (tmp_path / f"{name}.json").write_text(written)
        if text:
            (tmp_path / f"{name}.txt").write_text(text)
    found = {r.key: prepare(r, PackOptions()) for r in open_source(str(tmp_path)).rows(0)}
    assert json.loads(found["list"].files["json"]) == {"author": "me", "captions": ["one", "two"]}
    assert found["one"].files["txt"] == b"one"
    assert json.loads(found["fields"].files["json"])["captions"] == ["from the text"]
    assert found["broken"].refused == found["half"].refused == "undecodable text"


def test_keys_are_safe_and_never_become_one() -> None:
    same = ["a", "a/b", "ünï", "a b"]
    assert [rows.safe_key(text) for text in same] == same
    odd = [
        "a.b",
        "a_b.",
        "../up",
        "/root",
        "",
        "x" * 300,
        "x" * 301,
        "a\nb",
        "a\\b",
        "..",
        "é" * 90,
    ]
    keys = [rows.safe_key(text) for text in odd]
    assert len(set(keys)) == len(odd)
    for key in keys:
        assert "." not in key and not key.startswith("/") and key.isprintable()
        assert 0 < len(key.encode()) <= rows.KEY_BYTES


def test_two_pictures_of_one_name_are_two_samples(tmp_path: Path) -> None:
    for extension in ("png", "jpg"):
        (tmp_path / f"cat.{extension}").write_bytes(png())
    (tmp_path / "cat.txt").write_text("a cat")
    state = pack(open_source(str(tmp_path)), str(tmp_path / "out"), PackOptions())
    assert state.samples == 2 and not state.rejects


def test_rows_that_carry_bytes_travel_in_small_tasks() -> None:
    heavy = [Row(i, str(i), str(i), bytes(5 << 20)) for i in range(5)]
    assert [len(task) for task in packer._tasks(heavy)] == [2, 2, 1]
    light = [Row(i, str(i), str(i), "x.png") for i in range(20)]
    assert [len(task) for task in packer._tasks(light)] == [16, 4]


def test_a_damaged_state_is_an_error(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / packer.STATE).write_text('{"what": 1}')
    with pytest.raises(DataError, match="not the state of a packing"):
        pack(open_source(str(folder)), str(tmp_path / "out"), PackOptions())
    assert State("s", {}).rejects == {}
